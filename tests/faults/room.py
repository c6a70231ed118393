"""Where nonsense is given to the program: a worker, a finished run with results, and an empty folder."""

from __future__ import annotations

import os
import pathlib
import shutil

from tests.faults.worker import Worker


class Room:
    """Where cases run: a worker, a finished run with results, and a folder that each case gets empty."""

    def __init__(self, scratch: str, worker: Worker, subject: str):
        self.worker, self.subject = worker, subject
        self.folder = pathlib.Path(scratch, f"fuzz-{os.getpid()}")

    def clean(self) -> pathlib.Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def copy(self) -> str:
        """A copy of the run without its unfinished results."""
        ignored = shutil.ignore_patterns("*.partial")
        target = self.clean() / "run"
        shutil.copytree(self.subject, target, ignore=ignored)
        return str(target)

    def passes(self, argv: list[str], *, check: bool = False) -> int:
        """Runs a command line; returns its exit status, 0, 1 or 2.

        Raises:
          AssertionError: it ended in another way.
        """
        argv = [word.replace("\0", "") for word in argv]
        ended = self.worker.run(argv, check=check)
        fault = ended.fault() or ("memory" if "MEMORY" in ended.err else None)
        assert not fault and ended.status in (0, 1, 2), f"{fault}: {argv}\n{ended.err[-3000:]}"
        if ended.status:
            assert len(ended.error_lines[0]) < 2000 + sum(map(len, argv)), ended.err[:3000]
        return ended.status
