"""Locks of directories, against two programs that write the same files."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from ddpm_jax.files.checkpoints import CheckpointError
from ddpm_jax.files.writers import named

LOCK = ".lock"  # name of the file that `lock` locks


@contextlib.contextmanager
def lock(directory: str | os.PathLike) -> Iterator[None]:
    """Locks `directory` for this process; the system releases it when the process ends or dies.

    Without locks on the file system or platform, it warns and continues.

    Raises:
      CheckpointError: another process holds it.
    """
    directory = Path(directory).absolute()
    with named(directory / LOCK):
        directory.mkdir(parents=True, exist_ok=True)
        opened = open(directory / LOCK, "a+")  # noqa: SIM115
    with opened as file:
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise CheckpointError(
                f"{directory} is in use by {file.read().strip() or 'another process'}; "
                "wait for it, stop it, or choose another directory"
            ) from error
        except (ImportError, OSError) as error:
            logging.warning("%s cannot be locked (%s): use it from one process", directory, error)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk; the lock holds without the line
            os.truncate(file.fileno(), 0)
            line = f"process {os.getpid()} on host {socket.gethostname()}, since {since}\n"
            os.write(file.fileno(), line.encode())
        yield
