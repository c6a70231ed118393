"""Batches: which examples are in each, a function of (seed, step), and threads that decode them ahead."""

import collections
import contextlib
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ddpm_jax.data.dataset import Dataset

THREADS = min(32, os.cpu_count() or 1)  # decoding releases the GIL, so threads are enough
CHOICE = 2**32 - 1  # stream of the permutation in `choose`; epochs of training have 0, 1, …


@functools.lru_cache(maxsize=4)  # one epoch is used in every step: 5 ms at n = 60,000
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n], of one stream for each seed and epoch; not to be written to.

    Sorted raw bits rather than Generator.permutation: NumPy promises to keep the stream of a bit
    generator for ever, the algorithms of Generator only until the next version.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(n)
    return np.argsort(bits, kind="stable")


def choose(total: int, count: int | None = None) -> np.ndarray:
    """Positions of `count` of `total` images, int64 [count]: the first ones of one fixed permutation.

    Wherever some of the images of a split stand for all of them, they are chosen here: the first in
    the order of the files may all be of one class. A larger count begins with the same images. The
    permutation depends on the total, but all totals rank the same random numbers: the choices from
    splits of similar sizes are correlated, not independent.
    """
    return permutation(total, 0, CHOICE)[:count].copy()


def batch_indices(n: int, *, seed: int, step: int, batch_size: int) -> np.ndarray:
    """The examples of one batch: int64 [batch_size] in 0..n-1, a function of its arguments alone.

    Every epoch is an independent permutation of the n examples and the batches run across its
    end, so each example is seen exactly once per epoch even where n < batch_size.
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
        prefetch: how many batches threads decode ahead, where the images are not in memory.

    Yields:
        `image` uint8 [b, H, W, C], `label` int32 [b], `index` int32 [b] (the position in the
        global batch). Closing the generator ends its threads.

    Raises:
        DataError: a picture could not be decoded; the line names it.
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
