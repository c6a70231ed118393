"""Properties of files of a run, and of its copy in a .zip: odd trees, bytes, lines and archives."""

from __future__ import annotations

import json
import os
import pathlib
import warnings
import zipfile

from hypothesis import given
from hypothesis import strategies as st

from tests.faults import tiny
from tests.faults.damages import COMMANDS
from tests.faults.room import Room

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def _rewritten(path: pathlib.Path, change) -> None:
    """Applies a change to the JSON tree of a file, whose digest is then right."""
    from ddpm_jax.files import config as config_lib

    tree = json.loads(path.read_text())
    digest = tree.pop("sha256", None)
    change(tree)
    if digest is not None:
        tree = json.loads(json.dumps(tree))
        tree["sha256"] = config_lib.digest(tree)
    path.write_text(json.dumps(tree))


def _places(tree, path=()):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _places(value, (*path, key))


@given(
    st.data(),
    st.sampled_from(["config.json", "data.json"]),
    JSON,
    st.sampled_from(["sample", "nll", "longer", "report"]),
)
def trees_of_runs(room: Room, data, name, value, command):
    """A value of config.json or data.json is another one, of any type, and the digest is right."""
    path = pathlib.Path(room.copy(), name)

    def change(tree):
        *outer, last = data.draw(st.sampled_from(sorted(_places(tree))))
        for key in outer:
            tree = tree[key]
        tree[last] = value

    _rewritten(path, change)
    room.passes([*tiny.filled(COMMANDS[command], path.parent), *SMALLER.get(command, [])])


SMALLER = {"longer": ["--config.training.num_steps=10"]}


@given(
    st.data(),
    st.binary(max_size=40),
    st.sampled_from(["sample", "nll", "longer", "report", "eval"]),
)
def bytes_of_runs(room: Room, data, content, command):
    """Bytes anywhere in any file of a run."""
    run = pathlib.Path(room.copy())
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.suffix not in (".png", ".html"))
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    at = data.draw(st.integers(0, len(before)))
    end = at if data.draw(st.booleans()) else at + len(content)
    path.write_bytes(before[:at] + content + before[end:])
    room.passes([*tiny.filled(COMMANDS[command], run), *SMALLER.get(command, [])])


@given(
    st.sampled_from(["metrics.jsonl", "history.jsonl"]),
    st.lists(JSON, max_size=3),
    st.dictionaries(
        st.sampled_from(["step", "loss", "field", "old", "new", "grad_norm", "time"]), JSON
    ),
    st.sampled_from(["longer", "report"]),
)
def lines_of_runs(room: Room, name, rows, row, command):
    """Lines with right digests and wrong values."""
    from ddpm_jax.files import writers

    path = pathlib.Path(room.copy(), name)
    with open(path, "a") as file:
        for each in [*rows, row, {"step": 9, "loss": 1.0} | row]:
            file.write(writers.to_line(each) if isinstance(each, dict) else json.dumps(each) + "\n")
    room.passes([*tiny.filled(COMMANDS[command], path.parent), *SMALLER.get(command, [])])


# ---- archives --------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [
        "../out",
        "/out",
        "checkpoints/3/meta.json",
        "checkpoints/x",
        "checkpoints",
        "checkpoints/3",
        "config.json",
        "a/../../out",
        "",
        ".",
        "..",
        "checkpoints/-1/a",
        "samples",
        "x" * 300,
        "\\out",
        "C:/out",
        "checkpoints/3/../../../out",
        ".lock",
        "log.txt/a",
    ]
) | st.text(min_size=1, max_size=8)


@given(
    st.data(),
    st.lists(st.tuples(NAMES, st.binary(max_size=20), st.booleans()), max_size=4),
    st.booleans(),
    st.integers(0, 2**32),
)
def mirrors(room: Room, data, members, whole, seed):
    """A .zip that is no mirror of a run: odd names, links, damaged members."""
    folder = room.clean()
    path, run = folder / "copy.zip", folder / "inside" / "run"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content, link in members:
            info = zipfile.ZipInfo(name or "x")
            info.filename = name
            if link:
                info.external_attr = 0o120777 << 16
                content = b"/etc"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # two of the same name
                archive.writestr(info, content)
        if whole:
            source = pathlib.Path(room.subject)
            for file in [*source.glob("*.json*"), *(source / "checkpoints" / "9").rglob("*")]:
                if file.is_file():
                    archive.write(file, file.relative_to(source))
    if data.draw(st.booleans()):
        content = bytearray(path.read_bytes())
        content[seed % len(content)] ^= 1 + seed % 255
        path.write_bytes(content)
    argv = tiny.filled(tiny.LONGER, run)
    before = set(os.listdir(folder))
    room.passes([*argv, "--config.training.num_steps=10", f"--config.training.mirror={path}"])
    left = set(os.listdir(folder)) - before - {"inside"}
    assert not left and not os.path.exists("/out"), f"written outside of the run directory: {left}"
