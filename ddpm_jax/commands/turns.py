"""Compares the speed of programs that run in turns, A B A B, each in a process of its own.

On a shared machine an absolute time means little; the ratio of two programs that ran within the same seconds does. A
worker is a process that waits for the name of a call on standard input and answers with its seconds.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Ratio(NamedTuple):
    """How often `other` takes the time of `ours`: above 1, ours is faster.

    Attributes:
      median, low, high: of the ratios of the rounds, low and high their quartiles.
      ours, other: median seconds.
    """

    median: float
    low: float
    high: float
    ours: float
    other: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(ours: list[float], other: list[float]) -> Ratio:
    """The ratio of two series of times that were measured in turns."""
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    middle = statistics.median
    return Ratio(middle(ratios), low, high, middle(ours), middle(other))


class Worker:
    """A process that calls `serve`. Lines that are not JSON are skipped."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None):
        self.command = command
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe)
        self.names = self._answer()

    def seconds(self, name: str) -> float:
        """The seconds of one call."""
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                return json.loads(line)
        self.close()
        raise RuntimeError(f"{' '.join(self.command)} ended with status {self.process.returncode}")

    def close(self) -> None:
        """Ends the process; its last lines are not read."""
        self.process.communicate()


def serve(calls: dict[str, Callable]) -> None:
    """The side of the worker: makes the calls that standard input names, after two of each.

    Args:
      calls: by name; each returns only when its work is done.
    """
    for call in [*calls.values(), *calls.values()]:
        call()
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - start, flush=True)


@contextlib.contextmanager
def workers(commands: list[list[str]], environments=None) -> Iterator[list[Worker]]:
    """Starts workers one after the other, and ends them."""
    running = []
    try:
        for command, env in zip(commands, environments or [None] * len(commands), strict=True):
            running.append(Worker(command, env))
        yield running
    finally:
        for worker in running:
            worker.close()


def in_turns(running: list[Worker], name: str, rounds: int) -> list[list[float]]:
    """The seconds of the same call in each worker, in turns."""
    times = [[] for _ in running]
    for _ in range(rounds):
        for worker, seconds in zip(running, times, strict=True):
            seconds.append(worker.seconds(name))
    return times


def main(config_file: str, batch_size: str) -> None:
    """Serves the benchmark of a config, with whatever checkout of ddpm_jax is first on the path."""
    import jax

    from ddpm_jax.commands.benchmark import Benchmark
    from ddpm_jax.ddpm import Sampling
    from ddpm_jax.files import config as config_lib

    bench = Benchmark.of(config_lib.load(config_file), int(batch_size))
    calls = {"training step": bench.train, **bench.bare(bench.method.sized_network)}
    calls[f"{bench.steps} sampler steps"] = bench.chains(Sampling())["ancestral"]
    waiting = {
        name: lambda call=call: jax.block_until_ready(call()) for name, call in calls.items()
    }
    serve(waiting)


if __name__ == "__main__":
    main(*sys.argv[1:])
