"""A run as one file elsewhere, such as on Google Drive: written after each checkpoint, read where the run directory is gone or older."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import io
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpm_jax import processes
from ddpm_jax.files import checkpoints, console, locks, results, run_data, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.options import ConfigError
from ddpm_jax.training import guards, resume

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
FOLDERS = ("samples", *guards.FIRST_FOLDERS)  # written in training, beside files and checkpoints


def save(path: str | None, workdir: str, keep_best: str | None, say: Callable[[str], None]) -> None:
    """Writes the last checkpoint of a run and the best, its files, previews and logs to one .zip, which replaces the earlier one at once.

    A file that has the last checkpoint already stays as it is. One of another run, or with a newer step, is renamed to
    FILE.replaced.zip, and a warning is printed. If the file cannot be written, as on a full drive, the earlier one stays,
    and a warning is printed.
    """
    if path is None:
        return
    file, workdir = Path(config_lib.path(path)), Path(workdir)
    newest = checkpoints.latest_step(workdir / "checkpoints")
    best = checkpoints.best_of(workdir / "checkpoints", keep_best) or ()
    files = [one for one in workdir.iterdir() if one.name != locks.LOCK]
    for folder in (*FOLDERS, *(f"checkpoints/{step}" for step in {newest, *best[:1]})):
        files += (workdir / folder).rglob("*")

    def write(temporary):
        # weights do not become smaller; .zip has no dates before 1980
        with zipfile.ZipFile(temporary, "w", strict_timestamps=False) as archive:
            for one in filter(Path.is_file, files):
                if one.suffix in (".npz", ".zip") or one.is_symlink():
                    continue  # drawn by --mode=sample; itself
                try:
                    archive.write(one, one.relative_to(workdir))
                except ValueError as error:  # a name that is not UTF-8
                    say(f"WARNING: {str(one)!r} is not in the mirror: {error}; rename it")
        if why:  # only now, so that a failed save leaves it alone
            aside = results.free_name(f"{file.with_suffix('')}.replaced", ".zip")
            os.rename(file, aside)
            say(f"WARNING: {file} is now {aside}, since {why}")

    with guards.os_errors_as_warnings(say, Exception):
        why = ""
        if file.exists():
            try:
                step, why = _compare(file, workdir)
                why = why and f"it is of another run: {why}"
            except _NotARunError as error:
                line = " ".join(str(error.__cause__).split())
                step, why = -1, f"it is not a mirrored run or is damaged ({line})"
            if step == newest and not why:
                return
            if step > (newest or 0):
                why = why or f"it holds step {step:,}, and {workdir} only step {newest or 0:,}"
        writers.replace(str(file), write, listed=False)


def restore(path: str | None, workdir: str) -> None:
    """Unpacks a file of `save` into a run directory, unless this has a checkpoint as new as the newest of the file.

    Raises:
      ConfigError: the folder of the file is missing, so that it could never be written; there are several processes; or the
        file has a newer checkpoint than the directory, and is of another run.
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
        local = checkpoints.latest_step(directory / "checkpoints")
        if local is not None:
            try:
                step, why = _compare(file, directory)
            except _NotARunError:
                return  # `save` renames it
            if step <= local:
                return
            if why:
                raise ConfigError(
                    f"{file} holds step {step:,}, and {directory} step {local:,} of another run: {why}. Give another"
                    " config.training.mirror to continue the directory, or another --workdir to continue the file"
                )
        merging = False
        try:
            with tempfile.TemporaryDirectory(dir=directory, prefix=guards.UNPACKED) as folder:
                step = _unpack(file, folder)
                if local is not None and step <= local:  # its newest is not whole
                    return
                merging = True
                _merge(Path(folder), directory)
        except BaseException:
            if not merging:  # else some files have moved: the next start unpacks again
                undo()
            raise
    console.say(f"the run of {file} is unpacked, at step {step:,}")


def _merge(folder: Path, directory: Path) -> None:
    """Moves the files of an unpacked run into a run directory, and its checkpoints last.

    Files of the same name are replaced, and others stay. A checkpoint in the place of another one renames that to
    STEP.damaged. The newest checkpoint is the last, so that a merge that was killed is not taken for a whole one.
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
    for step in map(str, checkpoints.complete_steps(unpacked)):  # ascending
        with writers.named(target / step):
            if (target / step).exists():
                names = [one.relative_to(unpacked / step) for one in _files(unpacked / step)]
                same, *_ = filecmp.cmpfiles(unpacked / step, target / step, names, shallow=False)
                if len(same) == len(names):
                    continue
                os.rename(target / step, results.free_name(str(target / f"{step}.damaged")))
            os.replace(unpacked / step, target / step)


def _files(folder: Path) -> Iterator[Path]:
    return filter(Path.is_file, folder.rglob("*"))


def _compare(file: Path, workdir: Path) -> tuple[int, str]:
    """The newest step of a file of `save`, and why it is not of the run of a directory, in words; empty if it is.

    Raises:
      _NotARunError: the file is damaged, or is another one.
      CheckpointError: it cannot be read.
      ConfigError, RunError: a file of the directory is damaged.
    """
    with tempfile.TemporaryDirectory(dir=workdir, prefix=guards.UNPACKED) as folder:
        with _opened(file) as archive:
            names = archive.namelist()
            found = (re.fullmatch(r"checkpoints/([0-9]{1,15})/meta\.json", name) for name in names)
            steps = [int(match[1]) for match in found if match]
            if not steps or "config.json" not in names:
                raise ValueError("it holds no checkpoint, or no config.json")
            with writers.named(folder):
                for name in {"config.json", "data.json", resume.HISTORY} & {*names}:
                    archive.extract(name, folder)
            for read in (resume.history, run_data.saved_data, _config):
                read(folder)
        ahead = max(steps) > (checkpoints.latest_step(workdir / "checkpoints") or 0)
        return max(steps), _difference(folder, str(workdir), ahead)


def _config(folder: str):
    return config_lib.load(os.path.join(folder, "config.json"))


def _code(config) -> list[str]:
    """The code that a comparison of the config would import."""
    fields = config_lib.fields(config)
    names = (str(fields.get(field)) for field in ("method", "model.name", "schedule.name"))
    return [name for name in names if ":" in name]


def _difference(theirs: str, ours: str, ahead: bool) -> str:
    """Why two run directories do not hold states of the same run, in words; empty if they do.

    Args:
      ahead: theirs has the newer state.
    """
    older, newer = (ours, theirs) if ahead else (theirs, ours)
    if (code := _code(_config(theirs))) != _code(_config(ours)):  # never imported
        return f"it names other code ({', '.join(code) or 'none'})"
    path = os.path.join(newer, "config.json")
    if changed := resume.differing(_config(older), path, moved=True):
        return resume.in_words({k: v if ahead else v[::-1] for k, v in changed.items()})
    data = [run_data.saved_data(folder) for folder in (older, newer)]
    if None not in data and {**data[0], "name": ""} != {**data[1], "name": ""}:
        return "its data are others (data.json)"
    before, after = resume.history(older), resume.history(newer)
    return "" if after[: len(before)] == before else "its settings were changed (history.jsonl)"


class _NotARunError(checkpoints.CheckpointError):
    """A .zip that `save` did not write, or that is damaged."""


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


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a file of `save`, and turns what is wrong with it into one line.

    Raises:
      _NotARunError: the file is damaged, or is another one.
      CheckpointError: it cannot be read.
      OSError: a folder cannot be written.
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
            yield archive
    except checkpoints.CheckpointError:
        raise
    except Exception as error:  # zipfile, zlib and struct each raise their own
        if isinstance(error, OSError) and error.errno in WRITING:
            raise
        line = " ".join(str(error).split())
        raise _NotARunError(
            f"{file} is not a mirrored run or is damaged ({line}); move it away to go on without it"
        ) from error


def _unpack(file: Path, folder: str) -> int:
    """Unpacks a file of `save`, and returns the newest step of its checkpoints; raises as `_opened`."""
    with _opened(file) as archive:
        with writers.named(folder):
            archive.extractall(folder)
        if not (steps := checkpoints.complete_steps(os.path.join(folder, "checkpoints"))):
            raise ValueError("it holds no complete checkpoint")
        return steps[-1]
