"""Compares the speed of programs that run in turns, A B A B, each in a process of its own.

On a shared machine an absolute time means little; the ratio of two programs that ran within the same seconds does.
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


def serve(calls: dict[str, Callable]) -> None:
    """The worker's side: for each name that comes on standard input, makes that call and prints its seconds.

    Args:
      calls: by name; each returns only when its work is done.
    """
    for call in calls.values():
        call()
        call()
    print(json.dumps(sorted(calls)), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        calls[line.strip()]()
        print(time.perf_counter() - start, flush=True)


class Worker:
    """A process that calls `serve`; what else it prints goes to standard error."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None):
        self.command = command
        self.process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
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
        raise RuntimeError(f"{' '.join(self.command)} ended with status {self.process.wait()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def workers(commands: dict[str, list[str]], env=None) -> Iterator[dict[str, Worker]]:
    """Starts workers one after the other, and ends them."""
    running = {}
    try:
        for name, command in commands.items():
            running[name] = Worker(command, env)
        yield running
    finally:
        for worker in running.values():
            worker.close()


def in_turns(running: dict[str, Worker], name: str, rounds: int) -> dict[str, list[float]]:
    """The seconds of the same call in each worker, in turns."""
    times = {key: [] for key in running}
    for _ in range(rounds):
        for key, worker in running.items():
            times[key].append(worker.seconds(name))
    return times
