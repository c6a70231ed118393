"""Locks of directories, against two programs that write the same files."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from absl import logging

from ddpm_jax.files.checkpoints import CheckpointError
from ddpm_jax.files.writers import named

LOCK = ".lock"  # name of the file that `lock` locks


@contextlib.contextmanager
def lock(directory: str | os.PathLike) -> Iterator[Callable[[], None]]:
    """Locks `directory` for this process; the system releases it when the process ends or dies.

    Without locks on the file system or platform, it warns and continues.

    Yields:
      a function that removes the directory, which must be empty otherwise. On NFS it is gone once the lock is released.

    Raises:
      CheckpointError: another process holds it.
    """
    path, removed = Path(directory).absolute() / LOCK, []

    def remove() -> None:
        removed.append(path.parent)
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()

    with _locked(path) as file:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk; the lock holds without the line
            os.truncate(file.fileno(), 0)
            line = f"process {os.getpid()} on host {socket.gethostname()}, since {since}\n"
            os.write(file.fileno(), line.encode())
        try:
            yield remove
        finally:
            file.close()
            for folder in removed:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _locked(path: Path) -> TextIO:
    """The file, open and locked. It is opened again if another process has removed it, or its directory, in between."""
    for is_last in [*[False] * 20, True]:
        with named(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open(path, "a+")  # noqa: SIM115
            except FileNotFoundError:
                if is_last:
                    raise
                continue
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise CheckpointError(
                    f"{path.parent} is in use by {file.read().strip() or 'another process'}; "
                    "wait for it, stop it, or choose another directory"
                ) from error
        except (ImportError, OSError) as error:
            logging.warning("%s cannot be locked (%s): use it from one process", path.parent, error)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        if not is_last:  # some network file systems give a file a new number each time
            file.close()
    return file
