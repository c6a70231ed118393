"""Starts the real program, hurt or not, with a limit of time."""

from __future__ import annotations

import atexit
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

from tests.faults.tiny import ROOT, environment, filled

LIMIT = 240.0  # seconds until a start counts as hanging


class Ended(NamedTuple):
    """How a program ended."""

    status: int | None  # negative for a signal; None if it hung, and was killed
    out: str
    err: str
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        """The lines of standard error without warnings, of this program and, such as on a cut picture, of libraries."""
        text = re.sub(r"^\S+\.py:\d+: \w*Warning: .*\n(  .*\n)?", "", self.err, flags=re.MULTILINE)
        return [s for s in text.splitlines() if s.strip() and not s.startswith("WARNING")]

    def fault(self) -> str | None:
        """What is wrong with the manner of its end: a hang, a crash, a traceback, an error of many lines; or None."""
        if self.status is None:
            return "hang"
        if "Traceback (most recent call last)" in self.err + self.out:
            return "traceback"
        if self.status < 0:
            return f"crash {self.status}"
        if self.status and len(self.error_lines) != 1:
            return f"{len(self.error_lines)} lines of error"
        return None


class Forks:
    """A process of `hurt`, which has imported the program and forks for each run; one for each thread."""

    def __init__(self, scratch):
        self._folder = tempfile.mkdtemp(dir=scratch, prefix="output-")
        self._mother = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.hurt"],
            cwd=ROOT,
            env=environment(scratch),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        _open.append(self)

    def close(self) -> None:
        self._mother.kill()
        self._mother.wait()
        self._mother.stdin.close()
        self._mother.stdout.close()

    def run(self, argv: list[str], hurt: dict | None) -> Ended:
        files = {name: os.path.join(self._folder, name) for name in ("out", "err")}
        for path in files.values():
            pathlib.Path(path).write_text("")
        begin = time.perf_counter()
        self._mother.stdin.write(json.dumps({"argv": argv, "hurt": hurt, **files}) + "\n")
        self._mother.stdin.flush()
        pid = int(self._mother.stdout.readline())
        hangs = not select.select([self._mother.stdout], [], [], LIMIT)[0]
        if hangs:
            os.kill(pid, signal.SIGKILL)
        status = int(self._mother.stdout.readline())
        texts = [pathlib.Path(path).read_text(errors="replace") for path in files.values()]
        return Ended(None if hangs else status, *texts, time.perf_counter() - begin)


_of_thread = threading.local()
_open: list[Forks] = []


def close() -> None:
    """Ends the processes that `run` forks from."""
    while _open:
        _open.pop().close()
    _of_thread.scratch = None


atexit.register(close)


def run(command, workdir, scratch, hurt: dict | None = None) -> Ended:
    """Runs a command line on a run directory, in a new process, until it ends.

    Args:
      hurt: arguments of `hurt.Hurt`; None for the program as it is.
    """
    if getattr(_of_thread, "scratch", None) != scratch:
        _of_thread.forks, _of_thread.scratch = Forks(scratch), scratch
    hurt = hurt and {"folder": str(workdir), **hurt}
    return _of_thread.forks.run(filled(command, workdir), hurt)


def start(command, workdir, scratch, prefix=()) -> Ended:
    """As `run`, but by `python -m ddpm_jax.main`, after words such as those of prlimit."""
    begin = time.perf_counter()
    ended = subprocess.run(
        [*prefix, sys.executable, "-m", "ddpm_jax.main", *filled(command, workdir)],
        cwd=ROOT,
        env=environment(scratch),
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr, time.perf_counter() - begin)


def operations(command, workdir, scratch) -> int:
    """The number of operations on files of an undisturbed command."""
    path = os.path.join(scratch, f"count-{os.path.basename(workdir)}")
    ended = run(command, workdir, scratch, {"count": path})
    assert ended.status == 0, ended.err
    with open(path) as file:
        return int(file.read())
