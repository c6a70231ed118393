"""Properties of data: odd pictures and odd arrays."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.faults import tiny
from tests.faults.room import Room

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
