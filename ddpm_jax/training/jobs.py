"""Long jobs: a function of many examples, batch by batch on all devices, with the progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ddpm_jax import processes
from ddpm_jax.files.progress import Progress
from ddpm_jax.files.run_data import RunError
from ddpm_jax.networks import cost
from ddpm_jax.training import parallel

CPU_BATCH = 16  # examples at a time on a CPU device: few, so that progress is shown often
LARGEST_BATCH = 512  # on an accelerator device; more bring nothing, see docs/speed.md


def in_batches(
    function: Callable,
    params: Any,
    key: Any,
    examples: Callable[[np.ndarray], tuple],
    progress: Progress,
    batch_size: int | None = None,
) -> Iterator[tuple[np.ndarray, Any]]:
    """Maps function(params, key, *examples) over the examples from `progress.done` to `progress.total`.

    Each batch is divided among the devices of all processes, and all of them get all results. A batch is sent before the
    results of the batch before it are fetched, so what the caller does with results takes no time from the devices.

    Args:
      examples: numbers of examples int [B] -> their arrays [B, …].
      progress: does not count the time of compiling; `done` includes the results that are yielded.
      batch_size: examples at a time; None for a default that fills the device.

    Yields:
      numbers of examples [n], and the results [n, …] as NumPy.
    """
    first, count = progress.done, progress.total
    if first >= count:
        return
    params, mapped, sent = parallel.place(params), parallel.map_examples(function), None
    if batch_size is None:  # of the first process: free memory may differ
        batch_size = processes.from_first(
            lambda: default_batch_size(function, params, key, examples)
        )
    batch_size = min(batch_size, count)
    batch_size += -batch_size % processes.count()
    mine = parallel.local_rows(batch_size)

    def fetch(rows, handle):
        with _memory_advice(batch_size):
            result = processes.gather(mapped.fetch(handle))
            result = jax.tree.map(lambda x: x[: len(rows)], result)
        progress.done = int(rows[-1]) + 1
        return rows, result

    for begin in range(first, count, batch_size):
        rows = begin + np.arange(batch_size)
        batch = examples(np.minimum(rows, count - 1)[mine])  # batches of equal shape
        with _memory_advice(batch_size):
            if begin == first:
                with progress.once("compiling"):
                    mapped.compile(params, key, *batch)
            following = rows[rows < count], mapped.send(params, key, *batch)
        if sent is not None:
            yield fetch(*sent)
        sent = following
    yield fetch(*sent)


@contextlib.contextmanager
def _memory_advice(batch_size: int):
    """Turns the device's out-of-memory error into one line.

    Raises:
      RunError: names a smaller batch.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        smaller = max(1, batch_size // 2)
        raise RunError(
            f"the device is out of memory with {batch_size} images at a time; give --batch_size={smaller}, or"
            f" batch_size={smaller} in Python ({str(error).splitlines()[0][:200]})"
        ) from error


def default_batch_size(function: Callable, params, key, examples: Callable) -> int:
    """The number of examples at a time that fills at most half of the free memory of the devices."""
    devices = jax.device_count()
    if jax.default_backend() == "cpu":
        return CPU_BATCH * devices
    one = [np.asarray(values) for values in examples(np.zeros(1, int))]
    each = cost.live_bytes(jax.make_jaxpr(function)(params, key, *one).jaxpr)
    fits = max(1.0, parallel.free_memory() / (2 * max(each, 1)))
    return min(LARGEST_BATCH, 2 ** int(np.log2(fits))) * devices
