"""Nonsense as input, drawn by hypothesis: each case ends with status 0, or with one line of error and status 1 or 2.

Each property takes the draws of its strategies and a `Worker`; `settings` sets how many. A case that hangs, ends the
interpreter, shows a traceback or needs more than 4 GiB fails, and hypothesis looks for the smallest one.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pathlib
import shutil
import struct
import zipfile
import zlib

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import tiny
from tests.faults.worker import Worker

ODD = st.sampled_from(
    [
        *(
            "nan",
            "inf",
            "-inf",
            "-1",
            "0",
            "1",
            "2",
            "-0.0",
            "0.5",
            "1e-400",
            "1e400",
            "1e30",
            str(2**31),
        ),
        *(
            str(2**63),
            str(-(2**63) - 1),
            "9" * 400,
            "True",
            "false",
            "None",
            "none",
            "",
            " ",
            ",",
            "()",
            "(,)",
        ),
        *(
            "1,2",
            "1,,2",
            "[1, 2]",
            "((1,),)",
            "{}",
            "x",
            "ε",
            "\u202e",
            "a:b",
            ":",
            "a.b:C",
            "os:system",
            "a" * 5000,
        ),
        *(
            "..",
            "/",
            "/dev/null",
            "~",
            "~nobody",
            "0x10",
            "1_000",
            "1e3",
            "--",
            "{1:2}",
            "[" * 200,
            "lambda: 1",
        ),
        *(
            "cosine",
            "linear",
            "v",
            "eps",
            "ddim",
            "uniform",
            "cycle",
            "random",
            "learned",
            "tests.faults.tiny:get_config",
        ),
    ]
)
VALUES = ODD | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


class Room:
    """Where cases run: a worker, a finished run with results, and a folder that each case gets empty."""

    def __init__(self, scratch: str, worker: Worker, subject: str):
        self.worker, self.subject = worker, subject
        self.folder = pathlib.Path(scratch, f"fuzz-{os.getpid()}")

    def clean(self) -> pathlib.Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def copy(self) -> str:
        """A copy of the run without its unfinished results."""
        ignored = shutil.ignore_patterns("*.partial")
        target = self.clean() / "run"
        shutil.copytree(self.subject, target, ignore=ignored)
        return str(target)

    def passes(self, argv: list[str], *, check: bool = False) -> int:
        """Runs a command line; returns its exit status, 0, 1 or 2.

        Raises:
          AssertionError: it ended in another way.
        """
        argv = [word.replace("\0", "") for word in argv]
        ended = self.worker.run(argv, check=check)
        fault = ended.fault() or ("memory" if "MEMORY" in ended.err else None)
        assert not fault and ended.status in (0, 1, 2), f"{fault}: {argv}\n{ended.err[-3000:]}"
        if ended.status:
            assert len(ended.error_lines[0]) < 2000 + sum(map(len, argv)), ended.err[:3000]
        return ended.status


# ---- command lines ---------------------------------------------------------------------------------


@functools.cache
def config_fields() -> list[str]:
    """The fields of a config, and the options of its sections that it leaves at their defaults."""
    from ddpm_jax.files import config as config_lib
    from ddpm_jax.training import resume

    config = tiny.get_config()
    found = set(config_lib.fields(config))
    for section in config:
        with_options = config_lib._options_of_section(config, section, resume.readers_of)
        found |= {f"{section}.{name}" for name in with_options}
    return sorted(found)


@given(st.data(), st.lists(VALUES, min_size=1, max_size=3))
def fields_of_configs(room: Room, data, values):
    """--config.FIELD=VALUE of a training, which is checked."""
    fields = [data.draw(st.sampled_from(config_fields())) for _ in values]
    pairs = [f"--config.{field}={value}" for field, value in zip(fields, values, strict=True)]
    room.passes(
        [f"--config={tiny.CONFIG}", f"--workdir={room.clean() / 'run'}", *pairs], check=True
    )


@given(st.data(), VALUES)
def fields_of_trainings(room: Room, data, value):
    """--config.FIELD=VALUE of a training of two steps."""
    field = data.draw(st.sampled_from([f for f in config_fields() if f not in LONG]))
    limits = ["--config.training.num_steps=2", f"--config.{field}={value}"]
    room.passes([f"--config={tiny.CONFIG}", f"--workdir={room.clean() / 'run'}", *limits])


LONG = ("training.num_steps",)  # a value of these may rightly take hours
SIZES = ("num_samples", "num_images", "num_pairs", "num_seeds", "batch_size", "repeats", "steps")


@functools.cache
def flags_of(mode: str) -> list[str]:
    from ddpm_jax import modes

    left_out = ("config", "workdir", "debug", "data_dir", "push")
    return sorted(flag for flag in modes.all_flags(mode) if flag not in left_out)


@given(
    st.data(),
    st.sampled_from(
        [*tiny.COMMANDS, "nearest", "progressive", "interpolate", "reconstruct", "animate"]
    ),
    VALUES,
)
def flags_of_commands(room: Room, data, mode, value):
    """--FLAG=VALUE of a command on a finished run, which runs unless its size is the flag."""
    flag = data.draw(st.sampled_from(flags_of(mode)))
    argv = [f"--mode={mode}", f"--workdir={room.subject}", f"--{flag}={value}"]
    if flag in SIZES or flag == "out" or (mode == "eval" and flag == "metrics"):
        room.passes(argv, check=True)
        return
    run = room.copy()
    known = {
        "num_samples": "4",
        "num_images": "4",
        "steps": "2",
        "batch_size": "4",
        "features": "tests.faults.pixels:2",
    }
    small = [
        f"--{name}={size}"
        for name, size in known.items()
        if name in flags_of(mode) and name != flag
    ]
    room.passes([f"--mode={mode}", f"--workdir={run}", *small, f"--{flag}={value}"])


@given(
    st.lists(
        st.text(max_size=6)
        | st.sampled_from(
            [
                "--",
                "-",
                "=",
                "--=",
                "--config",
                "--mode",
                "sample",
                "--config.",
                "--config=digits",
                "--noconfig.x",
                "--mode=",
                "--help",
                "--version",
                "--workdir=",
            ]
        ),
        max_size=4,
    )
)
def words(room: Room, words):
    """Words that are no options."""
    if "train" in words or "--config=digits" in words:
        words = [*words, "--config.nothing=1"]
    room.passes(words, check=not {"--help", "--version"} & set(words))


# ---- files of a run --------------------------------------------------------------------------------


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
    from tests.faults.damages import COMMANDS

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
    from tests.faults.damages import COMMANDS

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
    from tests.faults.damages import COMMANDS

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
            import warnings

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


# ---- pictures --------------------------------------------------------------------------------------


def _png(width, height, depth, colour, content, palette=None) -> bytes:
    """A PNG file of these header fields, whatever they are."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    parts = [
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
    ]
    parts += [] if palette is None else [chunk(b"PLTE", palette)]
    return b"".join([*parts, chunk(b"IDAT", zlib.compress(content)), chunk(b"IEND", b"")])


SIDES = st.sampled_from([0, 1, 2, 7, 8, 9, 2**15, 2**31 - 1, 2**32 - 1])
PNG = st.builds(
    _png,
    SIDES,
    SIDES,
    st.sampled_from([1, 2, 4, 8, 16, 3]),
    st.sampled_from([0, 2, 3, 4, 6, 5]),
    st.binary(max_size=300),
    st.none() | st.binary(max_size=30),
)
MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "I;16"]
FORMATS = ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "tga", "ico"]


def _picture(mode, form, size, cut) -> bytes:
    """A picture of Pillow, perhaps cut short; grey if the format has no such mode."""
    from PIL import Image

    buffer = io.BytesIO()
    try:
        Image.new(mode, size, None if mode == "I;16" else 1 if len(mode) == 1 else None).save(
            buffer, form
        )
    except (OSError, ValueError, KeyError, SystemError):
        Image.new("L", size).save(buffer := io.BytesIO(), "png")
    content = buffer.getvalue()
    return content[: math.ceil(len(content) * cut)]


PICTURES = (
    PNG
    | st.binary(max_size=60)
    | st.builds(
        _picture,
        st.sampled_from(MODES),
        st.sampled_from(FORMATS),
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1]),
    )
)


@given(
    st.lists(
        st.tuples(
            PICTURES, st.sampled_from(FORMATS), st.sampled_from(["", "a/", "b/", "train/", "test/"])
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
    st.sampled_from(["None", "8,8,1", "8,8,3"]),
)
def pictures(room: Room, files, skip_broken, shape):
    """A folder of odd pictures as data, and as images of a command."""
    folder = room.clean() / "pictures"
    for number, (content, form, part) in enumerate(files):
        path = folder / part / f"{number}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    argv = [f"--config={tiny.CONFIG}", f"--config.data.name=image_folder:{folder}"]
    argv += [f"--config.data.skip_broken={skip_broken}", "--config.training.num_steps=1"]
    argv += [f"--config.data.image_shape={shape}", f"--workdir={room.folder / 'run'}"]
    room.passes(argv, check=shape != "8,8,1")
    encode = ["--mode=encode", f"--workdir={room.subject}", "--num_images=1", "--steps=2"]
    room.passes([*encode, f"--images={folder}", f"--out={room.folder}/x.npz"])


# ---- arrays ----------------------------------------------------------------------------------------


def _npy(dtype: str, shape, fortran: bool, content: bytes) -> bytes:
    """An .npy file with this header, whatever follows."""
    header = str({"descr": dtype, "fortran_order": fortran, "shape": tuple(shape)}).encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


DTYPES = [
    "|u1",
    "<i4",
    "<i8",
    "<u8",
    "<f4",
    "<f8",
    "<c16",
    "|O",
    "|S3",
    "<U2",
    "<M8[s]",
    "|b1",
    "|V4",
    "nonsense",
]
SHAPES = st.lists(
    st.sampled_from([0, 1, 2, 4, 8, 2**20, 2**40, 2**63, -1]), max_size=5
) | st.sampled_from([[4, 8, 8, 1], [4, 8, 8], [4]])
NPY = st.builds(
    _npy,
    st.sampled_from(DTYPES),
    SHAPES,
    st.booleans(),
    st.sampled_from([0, 4, 16, 256, 2048]).map(bytes) | st.binary(max_size=64),
)
KEYS = [
    "x_train",
    "y_train",
    "x_test",
    "y_test",
    "images",
    "labels",
    "arr_0",
    "arr_1",
    "class_names",
    "latents",
    "recipe",
    "x",
]


def _array(dtype, shape, value):
    with np.errstate(all="ignore"):
        return np.full(shape, value).astype(dtype)


ARRAYS = st.builds(
    _array,
    st.sampled_from(["u1", "i8", "u8", "f4", "U3", "?"]),
    st.sampled_from([(4, 8, 8, 1), (4, 8, 8), (4,), (), (1, 8, 8, 3), (0, 8, 8, 1)]),
    st.sampled_from([0, 1, 3, 255, 2**40, 2**63 - 1, -1]),
)


def _saved(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


MEMBERS = NPY | ARRAYS.map(_saved) | st.binary(max_size=30)


@given(
    st.dictionaries(st.sampled_from(KEYS), MEMBERS, max_size=4),
    st.sampled_from(["data", "images", "latents", "classes", "eval"]),
)
def arrays(room: Room, members, used):
    """An .npz of odd arrays as data, as images, as latents and to be judged."""
    path = room.clean() / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    train = [
        f"--config={tiny.CONFIG}",
        f"--config.data.name=npz:{path}",
        "--config.data.image_shape=None",
    ]
    out = f"--out={room.folder}/out.npz"
    argv = {
        "data": [*train, f"--workdir={room.folder}/run", "--config.training.num_steps=1"],
        "classes": [*train, "--config.model.num_classes=-1", f"--workdir={room.folder}/run"],
        "images": [
            "--mode=encode",
            f"--workdir={room.subject}",
            f"--images={path}",
            "--steps=2",
            out,
        ],
        "latents": [
            "--mode=sample",
            f"--workdir={room.subject}",
            f"--latents={path}",
            "--steps=2",
            out,
        ],
        "eval": [
            "--mode=eval",
            f"--workdir={room.subject}",
            f"--images={path}",
            "--metrics=fid",
            "--features=tests.faults.pixels:2",
            f"--out={room.folder}/out.json",
        ],
    }[used]
    room.passes(argv, check=used == "classes")


PROPERTIES = {  # a property: its share of the cases
    fields_of_configs: 4,
    fields_of_trainings: 1,
    flags_of_commands: 3,
    words: 4,
    trees_of_runs: 2,
    bytes_of_runs: 1,
    lines_of_runs: 1,
    mirrors: 1,
    pictures: 1,
    arrays: 2,
}


def run(a_property, room: Room, examples: int, *, seeded: bool = True) -> None:
    """Checks a property with this number of examples.

    Raises:
      AssertionError: a case fails; the smallest one that was found.
    """
    chosen = settings(
        max_examples=examples,
        derandomize=seeded,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    chosen(a_property)(room)
