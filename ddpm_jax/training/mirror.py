"""A run as one file elsewhere, such as on Google Drive: written after each checkpoint, read where the run directory is gone."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ddpm_jax import processes
from ddpm_jax.files import checkpoints, console, locks, writers
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
      CheckpointError: the file is damaged.
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
    target = directory / "checkpoints"
    if not file.exists() or checkpoints.latest_step(target) is not None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=guards.UNPACKED) as folder:
        step = _unpack(file, folder)
        for name in sorted(set(os.listdir(folder)) - {"checkpoints", locks.LOCK}):
            if (directory / name).is_dir():
                shutil.rmtree(directory / name)
            os.replace(os.path.join(folder, name), directory / name)
        unpacked = Path(folder, "checkpoints")
        for left in target.iterdir() if target.exists() else ():  # damaged, or left by a kill
            if not (unpacked / left.name).exists():
                os.replace(left, unpacked / left.name)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unpacked, target)  # at once, and the last: complete
    console.say(f"the run of {file} is unpacked, at step {step:,}")


def _unpack(file: Path, folder: str) -> int:
    """Unpacks a file of `save`, and returns the newest step of its checkpoints.

    Raises:
      CheckpointError: the file is damaged, or is another one.
      OSError: the folder cannot be written.
    """
    try:
        with zipfile.ZipFile(file) as archive, writers.named(folder):
            size = sum(member.file_size for member in archive.infolist())
            if size > file.stat().st_size:  # `save` does not compress
                raise ValueError("its files are larger than it is")
            archive.extractall(folder)
        if not (steps := checkpoints.complete_steps(os.path.join(folder, "checkpoints"))):
            raise ValueError("it holds no complete checkpoint")
        return steps[-1]
    except Exception as error:  # zipfile, zlib and struct each raise their own
        if isinstance(error, OSError) and error.errno in WRITING:
            raise
        line = " ".join(str(error).split())
        raise checkpoints.CheckpointError(
            f"{file} is not a mirrored run or is damaged ({line}); move it away to begin anew"
        ) from error
