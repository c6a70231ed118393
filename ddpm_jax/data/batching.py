"""Batches: the examples of each, as a function of (seed, step), and threads that decode them in advance."""

import collections
import contextlib
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ddpm_jax.data.dataset import Dataset

THREADS = min(32, os.cpu_count() or 1)  # decoding releases the GIL
CHOICE = 2**32 - 1  # "epoch" of the permutation in `choose`; epochs of training are 0, 1, …


@functools.lru_cache(maxsize=4)  # every step of an epoch needs it: 5 ms at n = 60,000
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of 0..n-1, int64 [n], for each seed and epoch; it is cached, so do not write to it.

    It sorts raw bits, since NumPy guarantees the stream of a bit generator in all versions, but not the
    algorithm of Generator.permutation.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(n)
    return np.argsort(bits, kind="stable")


def choose(total: int, count: int | None = None) -> np.ndarray:
    """Positions of `count` of `total` images, int64 [count]: the first of a fixed random permutation.

    Every subset of a split is chosen here, because the first images in the order of the files may all be of
    one class. A larger count begins with the same images. The choices for different totals are not
    independent: they rank the same random numbers.
    """
    return permutation(total, 0, CHOICE)[:count].copy()


def batch_indices(n: int, *, seed: int, step: int, batch_size: int) -> np.ndarray:
    """The examples of one batch: int64 [batch_size] in 0..n-1, a pure function of the arguments.

    Batches are consecutive parts of the epochs' permutations and may cross the end of an epoch, so each
    example occurs exactly once per epoch, also if n < batch_size.
    """
    first = step * batch_size  # Python integers: exact at any step
    stop = first + batch_size
    epochs = range(first // n, (stop - 1) // n + 1)
    return np.concatenate(
        [permutation(n, seed, e)[max(first - e * n, 0) : stop - e * n] for e in epochs]
    )


def batches(
    dataset: Dataset,
    *,
    seed: int,
    start: int,
    stop: int,
    batch_size: int,
    rows: slice = slice(None),
    prefetch: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of steps start, …, stop - 1.

    Args:
        batch_size: the size of the global batch, over all processes.
        rows: the b rows of the global batch that this process needs.
        prefetch: number of batches that threads decode in advance, if images are not in memory.

    Yields:
        {"image": uint8 [b, H, W, C], "label": int32 [b], "index": int32 [b]}, where index is the position in
        the global batch. Closing the generator ends its threads.

    Raises:
        DataError: a picture cannot be decoded; the message names it.
    """
    index = np.arange(batch_size, dtype=np.int32)[rows]
    chosen = (
        batch_indices(len(dataset), seed=seed, step=step, batch_size=batch_size)[rows]
        for step in range(start, stop)
    )
    if dataset.images is not None:
        fetched = ((indices, dataset.fetch(indices)) for indices in chosen)
    else:
        fetched = _fetched_ahead(dataset.fetch, chosen, prefetch)
    with contextlib.closing(fetched):
        for indices, images in fetched:
            yield {"image": images, "label": dataset.labels[indices], "index": index}


def _fetched_ahead(fetch, chosen, prefetch):
    """Yields (indices, images) in order, while threads fetch the next `prefetch` batches."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ddpm_jax-data")
    ahead = collections.deque()
    try:
        for indices in chosen:
            parts = np.array_split(indices, min(THREADS, len(indices)))
            ahead.append((indices, [pool.submit(fetch, part) for part in parts]))
            if len(ahead) > prefetch:
                yield _result(*ahead.popleft())
        while ahead:
            yield _result(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(indices, parts):
    return indices, np.concatenate([part.result() for part in parts])
