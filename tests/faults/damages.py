"""Damaged files of a run directory: each is refused by name, or the result is that of the undamaged directory."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import random
import re
import shutil
import signal

from tests.faults import process, tiny
from tests.faults.report import Case
from tests.faults.worker import Worker

CHANGED = [*tiny.LONGER, "--change=optimizer.learning_rate=5e-4"]
SECOND = [*tiny.COMMANDS["sample"], "--seed=1"]  # found unfinished, in a folder .partial
COMMANDS = {"longer": tiny.LONGER, "second": SECOND} | tiny.COMMANDS
READ_BY = {  # pattern of files: the commands that read them
    "config.json": ("longer", "sample", "report"),
    "data.json": ("longer", "nll", "report"),
    "*.jsonl": ("longer", "report"),
    "checkpoints/*": ("longer", "sample"),
    "samples/*seed1*": ("second",),
    "samples/*encode*.npz": ("encode",),
    "samples/*inpaint*.npz": ("inpaint",),
    "samples/*denoise*.npz": ("denoise",),
    "samples/*seed0*.npz": ("sample", "eval"),
    "eval/features*.npz": ("eval",),
    "eval/*metrics*.json": ("eval", "report"),
    "eval/*nll*": ("nll", "report"),
}
HARMLESS = (  # the file stays as it is, and the result is the same
    ("data.json", "delete"),  # the remedy that its error names
    ("history.jsonl", "double a line"),  # the same change twice is one change
)
BESIDE = ("longer", "report")  # of the rest, which nothing reads: pictures, log.txt
OLDER = "checkpoints/6/"  # than the one from which commands begin
ASIDE = ("*.damaged*", "*.replaced*")  # what was put aside with a message

# ---- kinds of damage -------------------------------------------------------------------------------


def _flip(path, draw, _):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _truncate(path, draw, _):
    os.truncate(path, draw.randrange(1, max(2, path.stat().st_size)))


def _empty(path, draw, _):
    path.write_bytes(b"")


def _delete(path, draw, _):
    path.unlink()


def _swap(path, draw, others):
    other = draw.choice(others)
    aside = path.with_name("aside")
    path.rename(aside), other.rename(path), aside.rename(other)


def _double(path, draw, _):
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
    path.write_bytes(b"".join(lines))


def _other(path, draw, _):
    """Other content of the same syntax, or none at all."""
    path.write_text(draw.choice(["[]", "null", "3", "{}", '{"a": [1]}', "[" * 50_000, "\0" * 100]))


def _folder(path, draw, _):
    path.unlink()
    path.mkdir()


KINDS = {
    **{"flip a bit": _flip, "truncate": _truncate, "empty": _empty, "delete": _delete},
    **{"swap": _swap, "double a line": _double, "other text": _other, "a folder": _folder},
}


# ---- a run directory with everything in it ---------------------------------------------------------


def subject(scratch) -> str:
    """A run that was changed on purpose, with results of every command and an unfinished one; made once."""
    workdir = os.path.join(scratch, "subject")
    if os.path.isdir(workdir):
        return workdir
    made = f"{workdir}-made"
    with Worker(scratch) as worker:
        for command in (tiny.TRAIN, CHANGED):
            ended = worker.run(tiny.filled(command, made))
            assert ended.status == 0, ended
        shutil.rmtree(os.path.join(made, "checkpoints", "12"))  # so step 9 is the last
        os.remove(os.path.join(made, "samples", "step_00000012.png"))
        for command in tiny.COMMANDS.values():
            ended = worker.run(tiny.filled(command, made))
            assert ended.status == 0, ended
    for at in range(8, 40):  # until some rows are there
        process.run(SECOND, made, scratch, {"at": at, "signal": int(signal.SIGKILL)})
        rows = list(pathlib.Path(made, "samples").glob("*.partial/images"))
        if rows and rows[0].stat().st_size:
            break
    os.rename(made, workdir)
    return workdir


def kind_of(name: str) -> str:
    """The row of the table of a file."""
    parts = pathlib.PurePath(name).parts
    if parts[0] == "checkpoints":
        return "checkpoints/"
    if ".partial" in name:
        return "FILE.partial/"
    end = pathlib.PurePath(name).suffix
    return f"{parts[0]}/*{end}" if len(parts) > 1 else "pictures" if end == ".png" else name


def is_read(name: str) -> bool:
    """Whether a command reads a file."""
    pictures = name.endswith((".png", ".html"))
    return not pictures and any(fnmatch.fnmatch(name, pattern) for pattern in READ_BY)


def commands_for(name: str) -> tuple[str, ...]:
    if not is_read(name):
        return BESIDE
    return next(READ_BY[pattern] for pattern in READ_BY if fnmatch.fnmatch(name, pattern))


def like(workdir, name: str) -> list[pathlib.Path]:
    """Other files of the same kind."""
    end, path = pathlib.PurePath(name).suffix, pathlib.Path(workdir, name)
    found = [p for p in pathlib.Path(workdir).rglob(f"*{end}") if p.is_file() and p != path]
    if name.startswith("checkpoints"):
        mine = pathlib.PurePath(name).name
        found = [p for p in found if "checkpoints" in p.parts]
        found = [p for p in found if p.name == mine] or found
    else:
        found = [p for p in found if "checkpoints" not in p.parts]
    return sorted(found)


def all_cases(scratch, many: bool):
    """(name of a file, kind of damage, command) of each case."""
    workdir = pathlib.Path(subject(scratch))
    names = sorted(str(p.relative_to(workdir)) for p in workdir.rglob("*") if p.is_file())
    cases = [
        (name, kind, command)
        for name in names
        if not name.endswith((".lock", ".html"))
        for kind in KINDS
        if kind != "double a line" or name.endswith((".json", ".jsonl", ".txt"))
        for command in commands_for(name)
    ]
    draw, chosen = random.Random(0), []
    for row in sorted({kind_of(name) for name in names}):
        fitting = [case for case in cases if kind_of(case[0]) == row]
        chosen += draw.sample(fitting, min(120 if many else 4, len(fitting)))
    return chosen


class Damager:
    """Runs cases with a worker, in a folder of this number."""

    def __init__(self, scratch, number: int, worker: Worker):
        self.scratch, self.number, self.worker = scratch, number, worker
        self.expected: dict[str, tuple[dict, str | None]] = {}

    def undamaged(self, command: str) -> tuple[dict, str | None]:
        """The files after a command on the undamaged directory, and the report it writes."""
        if command not in self.expected:
            workdir = self._fresh()
            ended = self.worker.run(tiny.filled(COMMANDS[command], workdir))
            assert ended.status == 0, ended
            self.expected[command] = tiny.contents(workdir), page(workdir)
        return self.expected[command]

    def _fresh(self) -> str:
        workdir = os.path.join(self.scratch, f"damaged-{self.number}", "run")
        shutil.rmtree(workdir, ignore_errors=True)
        return tiny.copy(subject(self.scratch), workdir)

    def run(self, name: str, kind: str, command: str) -> Case:
        expected, report = self.undamaged(command)
        workdir = self._fresh()
        path, draw = pathlib.Path(workdir, name), random.Random(f"{name} {kind} {command}")
        if not path.stat().st_size and kind in ("flip a bit", "truncate", "empty", "double a line"):
            return Case("", "unread", "an empty file", 0)
        others = like(workdir, name)
        if kind == "swap" and not others:
            return Case("", "unread", "the only file of its kind", 0)
        KINDS[kind](path, draw, others)
        what, about = kind_of(name), f"{kind}, {name}, then {command}"
        ended = self.worker.run(tiny.filled(COMMANDS[command], workdir))
        if fault := ended.fault():
            return Case(what, fault, f"{about}: {ended.err[-3000:]}")
        named = any(
            word in ended.err + ended.out.replace(f"run directory: {workdir}", "")
            for word in (name, pathlib.PurePath(name).name, *_checkpoint(workdir, name))
        )
        if ended.status:
            line = ended.error_lines[0]
            named |= workdir in line
            return Case(what, "refused" if named else "wrong", f"{about}: {line}")
        if command == "report":
            lost = kind == "delete" or (kind == "truncate" and name == "metrics.jsonl")
            # A report has less to show, and a kill cuts a line short, too. Pictures, the log and results that changed places are shown as they are.
            of_result = name.startswith("eval/") and (name.endswith(".png") or kind == "swap")
            shown = not is_read(name) or of_result or lost
            same = page(workdir) == report
            outcome = "repaired" if same else "refused" if named else "unread" if shown else "wrong"
            return Case(what, outcome, f"{about}: {ended.err}")
        wrong = tiny.differences(workdir, expected, also=ASIDE)
        if not wrong:
            return Case(what, "repaired", about)
        mine = {name, *(str(p.relative_to(workdir)) for p in others if kind == "swap")}
        unread = not is_read(name) or command not in commands_for(name)
        if wrong == [name] and (name, kind) in HARMLESS:
            return Case(what, "repaired", about)
        if name.startswith(OLDER):  # more of them stay, so that three are complete
            unread, wrong = True, [one for one in wrong if not one.startswith(OLDER)]
        outcome = "unread" if unread and set(wrong) <= mine else "refused" if named else "wrong"
        return Case(what, outcome, f"{about}: {wrong} {ended.err} {ended.out}")


def _checkpoint(workdir, name: str) -> list[str]:
    """The directory of a checkpoint that a file belongs to."""
    parts = pathlib.PurePath(name).parts
    return [os.path.join(workdir, *parts[:2])] if parts[0] == "checkpoints" else []


def page(workdir) -> str | None:
    """The report of a run without what differs from time to time."""
    path = pathlib.Path(workdir, "report.html")
    return (
        re.sub(r"\d\d\d\d-\d\d-\d\d.\d\d:\d\d(:\d\d)?", "", path.read_text())
        if path.exists()
        else None
    )
