"""A run as one file elsewhere, such as on Google Drive: written after each checkpoint, read where the run directory is gone."""

from __future__ import annotations

import errno
import io
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ddpm_jax import processes
from ddpm_jax.files import checkpoints, console, locks, results, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.options import ConfigError
from ddpm_jax.training import guards

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
FOLDERS = ("samples", *guards.FIRST_FOLDERS)  # written in training, beside files and checkpoints


def save(path: str | None, workdir: str, keep_best: str | None, say: Callable[[str], None]) -> None:
    """Writes the last checkpoint of a run and the best, its files, previews and logs to one .zip, which replaces the earlier one at once.

    If it cannot be written, as on a full drive, the earlier file stays, and a warning is printed.
    """
    if path is None:
        return
    workdir = Path(workdir)
    best = checkpoints.best_of(workdir / "checkpoints", keep_best) or ()
    steps = {checkpoints.latest_step(workdir / "checkpoints"), *best[:1]}
    files = [file for file in workdir.iterdir() if file.name != locks.LOCK]
    for folder in (*FOLDERS, *(f"checkpoints/{step}" for step in steps)):
        files += (workdir / folder).rglob("*")

    def write(temporary):
        with zipfile.ZipFile(temporary, "w") as archive:  # weights do not become smaller
            for file in filter(Path.is_file, files):
                if (
                    file.suffix not in (".npz", ".zip") and not file.is_symlink()
                ):  # drawn by --mode=sample; itself
                    archive.write(file, file.relative_to(workdir))

    with guards.os_errors_as_warnings(say):
        writers.replace(str(config_lib.path(path)), write, listed=False)


def restore(path: str | None, workdir: str) -> None:
    """Unpacks a file of `save` into a run directory without checkpoints; does nothing if there are some.

    Raises:
      ConfigError: the folder of the file is missing, so that it could never be written; or there are several processes.
      CheckpointError: the file cannot be read or is damaged, or another process trains there.
      WriteError: the run directory cannot be written.
    """
    if path is None:
        return
    file, directory = Path(config_lib.path(path)).absolute(), Path(workdir)
    if not file.parent.is_dir() or file.is_dir() or file.suffix != ".zip":
        raise ConfigError(
            f"config.training.mirror must be a .zip in a folder that exists, got {path}; is the drive mounted?"
        )
    if processes.count() > 1:
        raise ConfigError("config.training.mirror is for a run of one process; leave it out")
    if not file.exists():
        return
    with guards.run_directory(workdir) as undo:
        if checkpoints.latest_step(directory / "checkpoints") is not None:
            return
        try:
            with tempfile.TemporaryDirectory(dir=directory, prefix=guards.UNPACKED) as folder:
                step = _unpack(file, folder)
                _merge(Path(folder), directory)
        except BaseException:
            undo()
            raise
    console.say(f"the run of {file} is unpacked, at step {step:,}")


def _merge(folder: Path, directory: Path) -> None:
    """Moves the files of an unpacked run into a run directory, and its checkpoints last.

    Files of the same name are replaced, and others stay. A checkpoint in the place of another, which is damaged, renames
    that to STEP.damaged.
    """
    unpacked, target = folder / "checkpoints", directory / "checkpoints"
    for path in sorted(folder.rglob("*")):  # folders before what is in them
        new = directory / path.relative_to(folder)
        if path == folder / locks.LOCK or new.is_relative_to(target):
            continue
        with writers.named(new):
            new.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, new)
    with writers.named(target):
        target.mkdir(exist_ok=True)
    for step in map(
        str, checkpoints.complete_steps(unpacked)
    ):  # the newest last: then all are there
        with writers.named(target / step):
            if (target / step).exists():
                os.rename(target / step, results.free_name(str(target / f"{step}.damaged")))
            os.replace(unpacked / step, target / step)


class _Mirror(io.BufferedReader):
    """The file of `save`, whose errors name it: a drive may fail while it is read."""

    def read(self, *size):
        try:
            return super().read(*size)
        except OSError as error:
            raise _cannot_be_read(self.name, error) from error


def _cannot_be_read(file, error: OSError) -> checkpoints.CheckpointError:
    return checkpoints.CheckpointError(
        f"{file} cannot be read: {error.strerror}; is the drive mounted? Run the same command again, or move it away"
    )


def _unpack(file: Path, folder: str) -> int:
    """Unpacks a file of `save`, and returns the newest step of its checkpoints.

    Raises:
      CheckpointError: the file cannot be read, is damaged, or is another one.
      OSError: the folder cannot be written.
    """
    try:
        opened = _Mirror(io.FileIO(file))
    except OSError as error:
        raise _cannot_be_read(file, error) from error
    try:
        with opened, zipfile.ZipFile(opened) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > file.stat().st_size:  # `save` does not compress
                raise ValueError("its files are larger than it is")
            with writers.named(folder):
                archive.extractall(folder)
        if not (steps := checkpoints.complete_steps(os.path.join(folder, "checkpoints"))):
            raise ValueError("it holds no complete checkpoint")
        return steps[-1]
    except checkpoints.CheckpointError:
        raise
    except Exception as error:  # zipfile, zlib and struct each raise their own
        if isinstance(error, OSError) and error.errno in WRITING:
            raise
        line = " ".join(str(error).split())
        raise checkpoints.CheckpointError(
            f"{file} is not a mirrored run or is damaged ({line}); move it away to begin anew"
        ) from error
