"""Starts the real program, hurt or not, with a limit of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
        """The lines of standard error without warnings."""
        return [s for s in self.err.splitlines() if s.strip() and not s.startswith("WARNING")]

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


def run(command, workdir, scratch, hurt: dict | None = None, prefix=()) -> Ended:
    """Runs a command line on a run directory until it ends.

    Args:
      hurt: arguments of `hurt.Hurt`; None for the program as it is.
      prefix: words before the command, such as those of prlimit.
    """
    words = ["-m", "ddpm_jax.main"]
    if hurt is not None:
        words = ["-m", "tests.faults.hurt", json.dumps({"folder": str(workdir), **hurt})]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*prefix, sys.executable, *words, *filled(command, workdir)],
        cwd=ROOT,
        env=environment(scratch),
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
        status = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        status = None
    return Ended(status, out, err, time.perf_counter() - begin)


def operations(command, workdir, scratch) -> int:
    """The number of operations on files of an undisturbed command."""
    path = os.path.join(scratch, f"count-{os.path.basename(workdir)}")
    ended = run(command, workdir, scratch, {"count": path})
    assert ended.status == 0, ended.err
    with open(path) as file:
        return int(file.read())
