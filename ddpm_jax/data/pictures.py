"""Pictures: decoding with Pillow, folders of pictures, and data sets of pictures from any source."""

import collections
import contextlib
import functools
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from ddpm_jax.data.batching import THREADS, choose
from ddpm_jax.data.dataset import (
    NO_LABEL,
    DataError,
    Dataset,
    no_split,
    one_line,
    shape_option,
    times,
)
from ddpm_jax.data.progress import Progress

SPLITS = ("train", "test", "val", "validation")  # names of sub-folders that are splits
_SPLIT_NAMES = {name: name for name in SPLITS} | {"training": "train", "testing": "test"}
GREY = "1LI"  # first letters of Pillow's modes of grey pictures
# Formats whose endings Pillow knows, but which it cannot decode without other programs.
NOT_DECODED = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF")


class CannotDecode(DataError):
    """A picture is damaged or of an unknown format."""


class Pictures(NamedTuple):
    """The pictures of one split, not yet decoded."""

    read: Callable  # [i, …] -> iterable of (path or file, label, name in error messages)
    count: int
    class_names: tuple[str, ...]  # empty if there are no labels
    files: str  # SHA-256 of names and sizes
    left_out: tuple[str, ...] = ()


# A data set of pictures.


def dataset_of(
    pictures: Pictures, name: str, split: str, image_shape, memory_limit_gb, skip_broken, background
) -> Dataset:
    """The data set of these pictures, decoded now or on demand; see `load` for the arguments."""
    count = pictures.count
    if count == 0:
        raise DataError(f"{name}/{split} holds no image")
    if image_shape and image_shape[2] not in (1, 3):
        raise DataError(f"{name}: pictures have 1 or 3 channels, not {times(image_shape)}")
    reader = _Reader(pictures, f"{name}/{split}", image_shape, skip_broken, background)
    reader.find_shape()
    if count * math.prod(reader.shape) <= memory_limit_gb * 1e9:
        reader.images = np.empty((count, *reader.shape), np.uint8)
    if reader.images is not None or skip_broken or pictures.class_names:
        reader.read_all()
    labels, images, left_out = reader.labels, reader.images, pictures.left_out
    if reader.broken:
        kept = reader.kept = np.setdiff1d(reader.kept, list(reader.broken))
        if not len(kept):
            raise reader.none_left()
        labels, images = labels[kept], None if images is None else images[kept]
        number, why = len(reader.broken), "; ".join(list(reader.broken.values())[:20])
        why += f" and {number - 20} more" if number > 20 else ""
        left_out += (f"{number} pictures that cannot be decoded: {why}",)
    fetch = reader.fetch if images is None else images.__getitem__
    names, files = pictures.class_names, pictures.files
    return Dataset(
        name, split, reader.shape, len(names), labels, fetch, images, names, left_out, files
    )


class _Reader:
    """Reads pictures at one shape: all at once, or some on demand."""

    def __init__(self, pictures, name, image_shape, skip_broken, background):
        self.pictures, self.name, self.image_shape = pictures, name, image_shape
        self.skip_broken, self.background = skip_broken, background
        self.shape, self.first_name = image_shape, None  # the picture that sets the shape
        unlabelled = NO_LABEL if pictures.class_names else 0
        self.labels = np.full(pictures.count, unlabelled, np.int32)
        self.images = None  # uint8 [N, H, W, C] if they are kept in memory
        self.broken = {}  # {position: reason} of pictures that cannot be decoded
        self.kept = np.arange(pictures.count)  # positions of all others

    def none_left(self):
        return DataError(f"{self.name}: none of its {self.pictures.count} pictures can be decoded")

    def decode(self, file, where):
        try:
            return decode(file, where, self.image_shape, self.background)
        except CannotDecode as error:
            hint = "; training leaves out such pictures with --config.data.skip_broken=True"
            hint = hint if self.name.startswith("image_folder:") and not self.skip_broken else ""
            raise CannotDecode(f"{error}{hint}") from error

    def find_shape(self):
        """Sets the shape that all pictures must have to that of the first, unless image_shape sets it."""
        for i in range(self.pictures.count):
            if self.shape is not None:
                return
            [(file, _, self.first_name)] = self.pictures.read([i])
            try:
                self.shape = self.decode(file, self.first_name).shape
            except CannotDecode:
                if not self.skip_broken:
                    raise
        if self.shape is None:
            raise self.none_left()

    def pixels(self, file, where):
        """Decodes one picture and checks its shape."""
        picture, shape = self.decode(file, where), self.shape
        if picture.shape == (*shape[:2], 1):
            return np.broadcast_to(picture, shape)  # grey among colour pictures
        if picture.shape != shape:
            colour = (*shape[:2], max(shape[2], picture.shape[2]))
            raise DataError(
                f"{where} is {times(picture.shape)}, but {self.first_name} is {times(shape)}; "
                f"{shape_option(colour)} resizes and crops them all"
            )
        return picture

    def read_all(self):
        """Reads all labels and, if needed, decodes all pictures, in threads."""
        count = self.pictures.count
        decoding = self.images is not None or self.skip_broken
        what = "decoding" if decoding else "reading the labels of"
        progress = Progress(f"{what} {self.name}", count, "images")
        chunks = [range(i, min(i + 256, count)) for i in range(0, count, 256)]
        with ThreadPoolExecutor(THREADS) as pool:
            for done in pool.map(functools.partial(self._read_chunk, decoding), chunks):
                progress.update(done)

    def _read_chunk(self, decoding, chunk):
        for i, (file, label, where) in zip(chunk, self.pictures.read(chunk), strict=True):
            self.labels[i] = label
            try:
                pixels = self.pixels(file, where) if decoding else None
            except CannotDecode as error:
                if not self.skip_broken:
                    raise
                self.broken[i] = str(error)
                continue
            if self.images is not None:
                self.images[i] = pixels
        return chunk.stop

    def fetch(self, indices):
        """Decodes the pictures at these positions among those that are kept: uint8 [B, H, W, C]."""
        result = np.empty((len(indices), *self.shape), np.uint8)
        read = self.pictures.read(self.kept[indices])
        for image, (file, _, where) in zip(result, read, strict=True):
            image[:] = self.pixels(file, where)
        return result


def sizes_of(pictures: Pictures, count: int) -> tuple[np.ndarray, int]:
    """The sizes (height, width) of at most `count` of the pictures, int [N, 2], and their channels: 1 if all are grey, or 3.

    Reads their headers only. Pictures whose header cannot be read are left out.
    """
    from PIL import Image

    sizes, grey = [], True
    for file, _, _ in pictures.read(choose(pictures.count, count)):
        with contextlib.suppress(Exception), Image.open(file) as picture:
            sizes.append((picture.height, picture.width))
            grey = grey and picture.mode[0] in GREY
    return np.array(sizes, np.int64).reshape(-1, 2), 1 if grey else 3


# One picture.


def picture(path: str | os.PathLike, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes a picture file to uint8 [H, W, C], resized and cropped as by `load` for folders.

    Raises:
        DataError: the file does not exist or cannot be decoded.
    """
    if not os.path.isfile(path):
        raise DataError(f"there is no picture {path}")
    return decode(path, path, image_shape)


def decode(file, where, shape=None, background="white") -> np.ndarray:
    """Decodes a picture to uint8 [H, W, C], resized and cropped to `shape`; by default at its own size.

    The EXIF orientation is applied, transparent pictures are composed with the background, 16-bit values
    are divided by 257, and only the first frame of an animation is read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as picture:
            if shape:  # JPEG is decoded at 1/2, 1/4 or 1/8 if that is at least twice the size
                picture.draft(None, (2 * max(shape[:2]),) * 2)
            picture.load()
            picture = _upright(picture, where)
            channels = shape[2] if shape else 1 if picture.mode[0] in GREY else 3
            if picture.mode[0] == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")
            if picture.mode[0] == "I":
                grey = np.clip((np.asarray(picture).astype(np.int64) + 128) // 257, 0, 255)
                picture = Image.fromarray(grey.astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                under = Image.new("RGBA", picture.size, background)
                picture = Image.alpha_composite(under, picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
            if shape:
                picture = ImageOps.fit(picture, (shape[1], shape[0]), Image.Resampling.BICUBIC)
            return np.asarray(picture).reshape(picture.height, picture.width, channels)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, …
        raise CannotDecode(
            f"{where} cannot be decoded: {one_line(error)}; repair or remove it"
        ) from error


def _upright(picture, where):
    """Applies the picture's EXIF orientation; not if its EXIF data are damaged."""
    from PIL import Image

    flip = Image.Transpose
    methods = {2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM}
    methods |= {5: flip.TRANSPOSE, 6: flip.ROTATE_270, 7: flip.TRANSVERSE, 8: flip.ROTATE_90}
    try:
        method = methods.get(picture.getexif().get(0x0112))  # "Orientation"
    except Exception as error:  # Pillow raises various errors; the pixels are decoded already
        line = "%s: its EXIF data are damaged (%s), so it is not turned; its pixels are used"
        logging.log_first_n(logging.WARNING, line, 10, where, one_line(error))
        return picture
    return picture if method is None else picture.transpose(method)


@functools.cache
def picture_endings() -> tuple[str, ...]:
    """The endings of files that Pillow decodes, such as ".png", and HEIC if pillow-heif is installed."""
    from PIL import Image

    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    found = Image.registered_extensions().items()
    decoded = {ending for ending, kind in found if kind in Image.OPEN and kind not in NOT_DECODED}
    return tuple(sorted(decoded))


# A folder of pictures.


def image_folder(folder: Path, split: str, flatten: bool) -> Pictures:
    """The pictures of one split of a folder; see `load` for its layouts."""
    parts, beside = _splits(folder)
    if split not in parts:
        raise no_split(folder, split, parts)
    files, left_out = _picture_files(parts[split], flatten)
    if len(parts) > 1 and beside:
        left_out.append(f"{', '.join(beside)} beside {' and '.join(parts)}")
    if not files:
        unread = f"; left out: {'; '.join(left_out)}" if left_out else ""
        raise DataError(f"{parts[split]} holds no picture ({', '.join(picture_endings())}){unread}")
    if "" in files and len(files) > 1:
        raise DataError(
            f"{parts[split]} holds both pictures ({files[''][0].name}) and classes ({max(files)}/);"
            " move the pictures into a folder of their own, or take all of them without classes by"
            " --config.data.flatten=True"
        )
    # The classes of every split are those of train.
    train_files = files if split == "train" else _picture_files(parts["train"], flatten)[0]
    classes = _in_order(name for name in train_files if name)
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in files if name and name not in number and classes]
    if unknown:
        names = ", ".join(_in_order(unknown))
        left_out.append(f"{names}: not classes of {parts['train']}, so without labels")
    unlabelled = NO_LABEL if classes else 0
    order = [(name, path) for name in _in_order(files) for path in files[name]]
    examples = [(path, number.get(name, unlabelled), path) for name, path in order]
    listing = [(os.path.relpath(path, parts[split]), _size(path)) for _, path in order]
    read = functools.partial(map, examples.__getitem__)
    return Pictures(read, len(examples), tuple(classes), sha256(listing), tuple(left_out))


def _splits(folder):
    """{split: its folder}, and the sorted names of other sub-folders, as "name/"."""
    found = {path.name: path for path in folder.iterdir() if path.is_dir()}
    found = {name: path for name, path in found.items() if not _is_hidden(name)}
    parts = {_SPLIT_NAMES[name.lower()]: name for name in found if name.lower() in _SPLIT_NAMES}
    parts = {part: found[parts[part]] for part in SPLITS if part in parts}
    if "train" not in parts or len(parts) == 1 < len(found):  # `train` beside `bus` is a class
        parts = {"train": folder}
    return parts, sorted(f"{name}/" for name, path in found.items() if path not in parts.values())


def _picture_files(folder, flatten):
    """Lists the pictures in a folder at any depth, except hidden ones.

    Returns:
        {sub-folder, or "" for the folder itself and if `flatten`: sorted paths};
        and lines about the files that are not pictures.
    """
    files, others, seen = collections.defaultdict(list), collections.Counter(), set()
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (place := os.path.realpath(parent)) in seen:  # a link to a folder above would never end
            folders[:] = []
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not _is_hidden(name)]
        relative = Path(parent).relative_to(folder).parts
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(picture_endings()):
                files[relative[0] if relative and not flatten else ""].append(Path(parent, name))
            else:
                others[os.path.splitext(name)[1].lower() or "without an ending"] += 1
    left_out = []
    if others:
        counts = ", ".join(f"{number} {ending}" for ending, number in sorted(others.items()))
        line = f"files that are not pictures by their endings: {counts}"
        if others.keys() & {".heic", ".heif"}:
            line += " (pip install pillow-heif reads .heic and .heif)"
        left_out.append(line)
    return {name: sorted(paths) for name, paths in files.items()}, left_out


def _raise(error):  # by default os.walk ignores folders that cannot be read
    raise error


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _size(path) -> int:
    """The size of a file in bytes; −1 for a broken link, which is an error when it is decoded."""
    try:
        found = path.stat()
    except OSError:
        return -1
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise DataError(f"{path} is not a file; remove it")
    return found.st_size


def _in_order(names: Iterable[str]) -> list[str]:
    """Names sorted as text, or as numbers if all of them are numbers (2 before 10)."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def sha256(tree) -> str:
    """SHA-256 of lists, texts and numbers, as JSON."""
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()
