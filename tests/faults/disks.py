"""Full disks, refused writes, read-only directories, checkpoints that cannot be deleted."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import shutil
import subprocess

from tests.faults import kills, process, tiny
from tests.faults.report import Case
from tests.faults.worker import Worker

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EPERM")
NAMED = ("No space", "space", "free", "File too large", "Read-only", "not permitted", "denied")
NAMED += ("Input/output", "quota")


def _is_allowed(*words) -> bool:
    """Whether a command of the system works here; mount and chattr need root."""
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def mounted(folder, *options):
    """A mount; yields whether it is allowed."""
    os.makedirs(folder, exist_ok=True)
    allowed = _is_allowed("mount", *options, str(folder))
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _outcome(what, about, ended: process.Ended, workdir) -> Case | None:
    """The case, if the first end was a fault; None if it was one line that names a file and the reason, or a success."""
    if fault := ended.fault():
        return Case(what, fault, f"{about}: {ended.err[-3000:]}")
    line = ended.error_lines[0] if ended.status else ""
    if ended.status and not (str(workdir) in line and any(word in line for word in NAMED)):
        return Case(what, "wrong", f"{about}: {line}")
    return None


def _again(what, about, command, workdir, scratch, expected, run) -> Case:
    """The same command again, without the fault, must give the result of an undisturbed one."""
    ended = run(tiny.filled(command, workdir))
    if fault := ended.fault():
        return Case(what, fault, f"{about}, then again: {ended.err[-3000:]}")
    wrong = [ended.err] if ended.status else tiny.differences(workdir, expected, also=LATER)
    wrong = wrong or tiny.leftovers(workdir)
    return Case(what, "wrong" if wrong else "refused", f"{about}, then again: {wrong}")


LATER = ("data_preview.png", "forward.png", "samples/step_*.png", "loss.png", "metrics.jsonl")
# What a training goes on without, with a warning.


def full(size: int, scratch) -> Case:
    """A training on a file system of `size` KiB, and then on one with enough space."""
    what, about = "a full disk", f"tmpfs of {size} KiB"
    expected, _ = kills.undisturbed("train", scratch)
    folder = os.path.join(scratch, f"full-{size}")
    with mounted(folder, "-t", "tmpfs", "-o", f"size={size}k", "none") as allowed:
        if not allowed:
            return Case(what, "unread", "mount is not allowed here", 0)
        workdir = os.path.join(folder, "run")
        ended = process.run(tiny.TRAIN, workdir, scratch)
        if wrong := _outcome(what, about, ended, folder):
            return wrong
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)

        def run(argv):
            return process.run(argv, workdir, scratch)

        return _again(what, about, tiny.TRAIN, workdir, scratch, expected, run)


def too_large(size: int, name: str, scratch) -> Case:
    """A command whose files may have `size` KiB at most."""
    what, about = "a limit of file sizes", f"{name}, {size} KiB"
    expected, _ = kills.undisturbed(name, scratch)
    workdir = os.path.join(scratch, f"fsize-{name}-{size}")
    if name != "train":
        tiny.copy(kills.base(scratch), workdir)
    command = kills.command_of(name)
    limit = ("prlimit", f"--fsize={size * 1024}")
    if wrong := _outcome(what, about, process.start(command, workdir, scratch, limit), workdir):
        return wrong

    def run(argv):
        return process.run(argv, workdir, scratch)

    return _again(what, about, command, workdir, scratch, expected, run)


def refused(name: str, number: int, scratch, worker: Worker) -> Case:
    """Operations on files that raise an error: once, a few times or from then on."""
    draw = random.Random(f"{name} {number}")
    expected, total = kills.undisturbed(name, scratch)
    error, times = draw.choice(ERRORS), draw.choice([1, 3, 10**6])
    hurt = {"at": draw.randint(1, total), "signal": error, "times": times}
    what, about = f"{name}: writes that fail", f"{name}, case {number}, {hurt}"
    workdir = os.path.join(scratch, f"refused-{name}-{number}")
    if name != "train":
        tiny.copy(kills.base(scratch), workdir)
    command = kills.command_of(name)
    ended = worker.run(tiny.filled(command, workdir), hurt={"folder": workdir, **hurt})
    if wrong := _outcome(what, about, ended, workdir):
        return wrong
    case = _again(what, about, command, workdir, scratch, expected, worker.run)
    shutil.rmtree(workdir)
    return case


def read_only(name: str, scratch) -> Case:
    """A command on a run directory that is mounted read-only: it says so, or needs to write nothing."""
    what = "a read-only directory"
    workdir = tiny.copy(kills.base(scratch), os.path.join(scratch, f"read-only-{name}"))
    with mounted(workdir, "--bind", workdir) as allowed:
        if not allowed or not _is_allowed("mount", "-o", "remount,bind,ro", workdir):
            return Case(what, "unread", "mount is not allowed here", 0)
        ended = process.run(kills.command_of(name), workdir, scratch)
        line = ended.err.strip()
        if fault := ended.fault():
            return Case(what, fault, f"{name}: {line[-3000:]}")
        named = ended.status and workdir in line and "Read-only" in line
        return Case(what, "refused" if named else "wrong", f"{name}: {line}")


def undeletable(inside: bool, scratch) -> Case:
    """An old checkpoint, or a file in it, that cannot be deleted does not cost the next one."""
    what = "a checkpoint that cannot be deleted"
    expected, _ = kills.undisturbed("longer", scratch)
    workdir = tiny.copy(kills.base(scratch), os.path.join(scratch, f"undeletable-{inside}"))
    stuck = pathlib.Path(workdir, "checkpoints", "3")
    stuck = stuck / "meta.json" if inside else stuck
    if not _is_allowed("chattr", "+i", str(stuck)):
        return Case(what, "unread", "chattr is not allowed here", 0)
    try:
        ended = process.run(tiny.LONGER, workdir, scratch)
    finally:
        for path in (stuck, pathlib.Path(workdir, "checkpoints", "3.tmp", "meta.json")):
            _is_allowed("chattr", "-i", str(path))
    if fault := ended.fault():
        return Case(what, fault, ended.err[-3000:])
    also = ("checkpoints/3/*", "checkpoints/3.tmp/*")
    wrong = tiny.differences(workdir, expected, also=also)
    if ended.status or wrong or "could not be deleted" not in ended.err:
        return Case(what, "wrong", f"{ended} {wrong}")
    ended = process.run(tiny.LONGER, workdir, scratch)
    left = tiny.leftovers(workdir)
    return Case(
        what, "wrong" if ended.status or left else "refused", f"{stuck}: {left} {ended.err}"
    )


def all_cases(scratch, many: bool):
    """Functions of a `Worker` that run a case each."""
    draw = random.Random(1)
    for size in draw.sample(range(8, 1600), 16 if many else 1):
        yield lambda worker, size=size: full(size, scratch)
    sizes = {"train": 6, "sample": 3, "nll": 2, "eval": 2} if many else {"sample": 1}
    for name, count in sizes.items():
        for size in draw.sample(range(1, 48), count):
            yield lambda worker, name=name, size=size: too_large(size, name, scratch)
    counts = {"train": 40, "longer": 20, "sample": 16, "nll": 16, "eval": 16, "encode": 8}
    counts = counts if many else {"train": 4, "sample": 2}
    for name, count in counts.items():
        for number in range(count):
            yield lambda worker, name=name, number=number: refused(name, number, scratch, worker)
    for name in ("longer", "sample", "nll", "eval", "report") if many else ("sample",):
        yield lambda worker, name=name: read_only(name, scratch)
    for inside in (False, True):
        yield lambda worker, inside=inside: undeletable(inside, scratch)
