"""SIGKILL and SIGTERM at seeded moments; the same command again must end as if nothing had happened."""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import threading

from tests.faults import process, tiny
from tests.faults.report import Case

ATTEMPTS = 3  # kills of one training before it may end
FIRST = {"train": tiny.TRAIN, "longer": tiny.LONGER}


def base(scratch) -> str:
    """A finished run of 6 steps, made once."""
    workdir = os.path.join(scratch, "base")
    if not os.path.isdir(workdir):
        ended = process.run(tiny.TRAIN, workdir, scratch)
        assert ended.status == 0, ended.err
    return workdir


_once = threading.Lock()


def undisturbed(name: str, scratch) -> tuple[dict, int]:
    """The files after a command, and the number of its operations on files; made once."""
    with _once:
        return _undisturbed(name, scratch)


def _undisturbed(name: str, scratch) -> tuple[dict, int]:
    workdir = os.path.join(scratch, f"undisturbed-{name}")
    count = pathlib.Path(scratch, f"count-undisturbed-{name}")
    if not count.exists():
        if name != "train":
            tiny.copy(base(scratch), workdir)
        process.operations(command_of(name), workdir, scratch)
    return tiny.contents(workdir), int(count.read_text())


def command_of(name: str) -> list[str]:
    return FIRST.get(name) or tiny.COMMANDS[name]


def moments(draw: random.Random, total: int) -> dict:
    """A moment: an operation on files, exactly there or up to 30 ms later, where a file is half written."""
    delay = 0.0 if draw.random() < 0.5 else draw.uniform(0, 0.03)
    return {"at": draw.randint(1, total), "delay": delay}


def kill(name: str, number: int, scratch, sent: int = signal.SIGKILL) -> Case:
    """Case `number` of hurting a command by a signal.

    A training may be hurt several times. After SIGTERM its exit status is 143, and the last line says what is saved.
    """
    draw = random.Random(f"{name} {number} {int(sent)}")
    expected, total = undisturbed(name, scratch)
    what = f"{'kill -9' if sent == signal.SIGKILL else 'SIGTERM'} of {name}"
    workdir = os.path.join(scratch, f"{name}-{number}-{int(sent)}")
    if name != "train":
        tiny.copy(base(scratch), workdir)
    hurt = 0
    for _ in range(draw.randint(1, ATTEMPTS) if name in FIRST else 1):
        moment = moments(draw, total)
        ended = process.run(command_of(name), workdir, scratch, {**moment, "signal": int(sent)})
        about = f"{what}, case {number}, {moment}"
        if ended.status == 0:
            break
        hurt += 1
        if ended.status is None:
            return Case(what, "hang", about)
        if sent == signal.SIGTERM and (wrong := _wrong_end(name, ended)):
            return Case(what, "wrong", f"{about}: {wrong}")
    ended = process.run(command_of(name), workdir, scratch)
    if fault := ended.fault():
        return Case(what, fault, f"{about}, then again: {ended.err[-2000:]}")
    if ended.status:
        return Case(what, "wrong", f"{about}, then again refused: {ended.err}")
    wrong = tiny.differences(workdir, expected) + tiny.leftovers(workdir)
    if sent == signal.SIGTERM:  # which saves a checkpoint of its own, and an older one goes
        wrong = [one for one in wrong if not _is_older(one, expected)]
    if wrong:
        return Case(what, "wrong", f"{about}: {wrong}")
    shutil.rmtree(workdir)
    return Case(what, "repaired", about, hurt)


def _is_older(name: str, expected: dict) -> bool:
    """Whether a file belongs to a checkpoint before the last one."""
    steps = [int(one.split("/")[1]) for one in expected if one.startswith("checkpoints/")]
    return name.startswith("checkpoints/") and not name.startswith(f"checkpoints/{max(steps)}/")


def _wrong_end(name: str, ended: process.Ended) -> str | None:
    """What is wrong with the end of a command that got SIGTERM; only a training handles the signal."""
    if ended.status not in (143, -signal.SIGTERM):
        return f"status {ended.status}: {ended.err[-500:]}"
    if "Traceback" in ended.err + ended.out:
        return ended.err[-2000:]
    began = ended.out.count("run directory:") == 1  # the second is the last line
    if name in FIRST and began and "the same command" not in ended.out:
        return f"no message: {ended.out[-300:]}"
    return None


def all_cases(scratch, many: bool):
    """Functions that run a case each."""
    kills = {"train": 50, "longer": 16, "sample": 10, "nll": 10, "encode": 6, "eval": 10}
    kills |= {"inpaint": 6, "denoise": 6}
    if not many:
        kills = {"train": 4, "sample": 1, "nll": 1, "eval": 1}
    terms = {"train": 24, "longer": 8, "sample": 4} if many else {"train": 2}
    for sent, counts in ((signal.SIGKILL, kills), (signal.SIGTERM, terms)):
        for name, count in counts.items():
            for number in range(count):
                yield lambda n=name, i=number, s=sent: kill(n, i, scratch, s)
