"""The real program in a process of its own, which is hurt at a moment.

`python -m tests.faults.hurt` imports the program, which takes longer than the run itself, and for each line of its standard
input forks a process that runs a command line as `python -m ddpm_jax.main` does.

The moment is the number of an operation on files (open for writing, rename, remove, mkdir, rmdir) below a folder, which
Python's audit hooks count, plus a delay. So moments fall while files are written, and a seed names them.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import pathlib
import runpy
import signal
import sys
import threading
import time

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Hurt:
    """An audit hook.

    Args:
      folder: operations on files below it are counted.
      at: the number of the operation, from 1 on; 0 only counts.
      delay: seconds from then on.
      signal: the signal that the process gets, or the name of an error that this operation and `times` − 1 after it raise.
      count: a file that gets the number of operations at the end.
    """

    def __init__(self, folder, at=0, delay=0.0, signal=9, times=1, count=None):
        self.folder, self.at, self.delay, self.signal = folder, at, delay, signal
        self.left, self.number = times, 0
        if count:
            atexit.register(lambda: pathlib.Path(count).write_text(str(self.number)))

    def __call__(self, event: str, args: tuple) -> None:
        if event not in OPERATIONS or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if self.folder not in os.path.abspath(os.fsdecode(args[0])):
            return
        self.number += 1
        if isinstance(self.signal, str):
            if self.at and self.number >= self.at and self.left:
                self.left -= 1
                number = getattr(errno, self.signal)
                raise OSError(number, os.strerror(number), os.fsdecode(args[0]))
        elif self.number == self.at:
            if self.delay:
                threading.Thread(target=self.strike, daemon=True).start()
            else:
                self.strike()

    def strike(self):
        time.sleep(self.delay)
        os.kill(os.getpid(), self.signal)


def child(channel) -> dict:
    """Reads requests and forks; returns one of them, in the process that is to fulfil it."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return request
        print(pid, file=channel, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=channel, flush=True)
    os._exit(0)


if __name__ == "__main__":
    import ddpm_jax.main  # noqa: F401 – in the first process, once

    said = os.fdopen(os.dup(1), "w")
    asked = child(said)
    for fd, name in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), fd)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if asked["hurt"] is not None:
        sys.addaudithook(Hurt(**asked["hurt"]))
    sys.argv = ["ddpm_jax.main", *asked["argv"]]
    del sys.modules["ddpm_jax.main"]
    runpy.run_module("ddpm_jax.main", run_name="__main__", alter_sys=True)
