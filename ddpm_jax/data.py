"""Images from files or the network to uint8 batches.

Everything here is NumPy: no TensorFlow, no JAX, no worker processes. An image stays uint8 in
0..255 with shape [H, W, C] until the training step scales it, and the order of the examples is a
pure function of (seed, step), so a run resumes without any iterator state.

`load` turns a name into a `Dataset`; `batches` turns a `Dataset` into batches. To bring your own
data, use `image_folder:PATH` or `npz:PATH`, or construct a `Dataset` of your own.

In this order: the four public names; arrays; the official archives, and `download`; pictures; what
tensorflow-datasets has prepared.
"""

import collections
import contextlib
import dataclasses
import difflib
import functools
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import re
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BUILT_IN = ("digits", "mnist", "fashion_mnist", "cifar10", "synthetic")
THREADS = min(32, os.cpu_count() or 1)  # decoding releases the GIL, so threads are enough
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SPLITS = ("train", "test", "val", "validation")  # sub-folders that may be splits, not classes
BACKOFF = 1.0  # seconds before the second try of a download, doubled for the third


class DataError(ValueError):
    """One line: what is wrong with the data, what was expected, and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """N images with labels, in memory or decoded on demand.

    Attributes:
        name: what `load` was asked for.
        split: "train", "test", …
        image_shape: (H, W, C).
        num_classes: 0 if the data set has no labels.
        labels: int32 [N]; zeros if the data set has no labels.
        fetch: int64 indices [B] in 0..N-1 -> uint8 [B, H, W, C]; called from several threads.
        images: uint8 [N, H, W, C] if they are in memory, else None.
    """

    name: str
    split: str
    image_shape: tuple[int, int, int]
    num_classes: int
    labels: np.ndarray
    fetch: Callable[[np.ndarray], np.ndarray]
    images: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """SHA-256 over all images, in their order."""
        sha256 = hashlib.sha256()
        for first in range(0, len(self), 1000):
            rows = np.arange(first, min(first + 1000, len(self)))
            sha256.update(np.ascontiguousarray(self.fetch(rows)))
        return sha256.hexdigest()

    def describe(self) -> str:
        """One line for the log, such as `digits/train: 1500 images 8×8×1, 10 classes, …`."""
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        place = "in memory" if self.images is not None else "decoded on demand"
        shape = _times(self.image_shape)
        return f"{self.name}/{self.split}: {len(self)} images {shape}, {classes}, uint8, {place}"


def load(
    name: str,
    *,
    split: str = "train",
    image_shape: tuple[int, int, int] | None = None,
    data_dir: str | os.PathLike = "data",
    memory_limit_gb: float = 4.0,
) -> Dataset:
    """Finds, checks and reads a data set; downloads it only if it is nowhere on this machine.

    Args:
        name: one of
            * `digits`: scikit-learn's 8×8 digits; train is the first 1,500 images of a fixed
              permutation, test the other 297.
            * `mnist`, `fashion_mnist`, `cifar10`: the official archives, looked for in
              `data_dir/<name>` and `data_dir`; failing that, a copy that tensorflow-datasets has
              prepared; failing that, downloaded into `data_dir/<name>`. Sizes and SHA-256 sums
              are checked every time.
            * `synthetic`: 1,024 + 256 images of gradients with blobs, from no file at all.
            * `npz:PATH`: uint8 arrays `x_train`, `y_train`, `x_test`, `y_test`, or `images` and
              `labels`, or `arr_0` and `arr_1`; the labels are optional.
            * `image_folder:PATH`: every sub-folder is a class, a flat folder has no labels;
              sub-folders `train` and `test` or `val` are splits instead.
            * any other name: what tensorflow-datasets has already prepared as array_record in
              `data_dir/tfds`, `data_dir` or its default folder.
        split: which part; `train` and `test` exist for every built-in data set.
        image_shape: (H, W, C). Pictures of a folder or of tensorflow-datasets are resized
            (shorter side to fit, antialiased), cropped at the centre and converted to C = 1 or 3
            channels; without it all must have the size of the first. Arrays are never resized:
            for them it must be the shape they have (`synthetic` is drawn at any shape).
        data_dir: where archives are looked for and put.
        memory_limit_gb: pictures larger than this in all (N·H·W·C bytes) are decoded on demand.

    Raises:
        DataError: whatever is wrong, in one line.
    """
    kind, _, path = name.partition(":")
    root = Path(data_dir).expanduser()
    shape = _checked_shape(image_shape)
    try:
        if kind == "image_folder":
            pictures = _image_folder(_existing(kind, path), split)
            return _from_pictures(name, split, *pictures, shape, memory_limit_gb)
        if kind == "npz":
            arrays = _npz(_existing(kind, path), split)
        elif name in BUILT_IN and split not in ("train", "test"):
            raise DataError(f"{name} has no split {split!r}; it has train and test")
        elif name == "digits":
            arrays = _digits(split)
        elif name == "synthetic":
            arrays = _synthetic(split, shape or (32, 32, 3))
        elif name in _ARCHIVES and (_has_archives(name, split, root) or not _prepared(name, root)):
            arrays = _archive_arrays(name, split, root)
        else:
            pictures = _tensorflow_datasets(name, split, root)
            return _from_pictures(name, split, *pictures, shape, memory_limit_gb)
    except OSError as error:
        raise DataError(f"{name}: {error}") from error
    return _from_arrays(name, split, *arrays, shape)


# Batches.


def batch_indices(n: int, *, seed: int, step: int, batch_size: int) -> np.ndarray:
    """The examples of one batch: int64 [batch_size] in 0..n-1, a function of its arguments alone.

    Every epoch is an independent permutation of the n examples and the batches run across its
    end, so each example is seen exactly once per epoch even where n < batch_size.
    """
    first = step * batch_size  # Python integers: exact at any step
    epochs = range(first // n, (first + batch_size - 1) // n + 1)
    return np.concatenate(
        [
            _permutation(n, seed, epoch)[max(first - epoch * n, 0) : first + batch_size - epoch * n]
            for epoch in epochs
        ]
    )


@functools.lru_cache(maxsize=4)  # one epoch is asked for once per step: 5 ms at n = 60,000
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    # Sorted raw bits rather than Generator.permutation: NumPy promises to keep the stream of a bit
    # generator for ever, the algorithms of Generator only until the next version.
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(n)
    return np.argsort(bits, kind="stable")


def batches(
    dataset: Dataset,
    *,
    seed: int,
    start: int,
    stop: int,
    batch_size: int,
    rows: slice = slice(None),
    prefetch: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of steps start, …, stop - 1.

    Args:
        batch_size: the size of the global batch, over all processes.
        rows: the b rows of the global batch that this process wants.
        prefetch: how many batches threads decode ahead, where the images are not in memory.

    Yields:
        `image` uint8 [b, H, W, C], `label` int32 [b], `index` int32 [b] (the position in the
        global batch). Closing the generator ends its threads.

    Raises:
        DataError: a picture could not be decoded; it is named.
    """
    index = np.arange(batch_size, dtype=np.int32)[rows]

    def chosen(step):
        return batch_indices(len(dataset), seed=seed, step=step, batch_size=batch_size)[rows]

    def batch(indices, image):
        return {"image": image, "label": dataset.labels[indices], "index": index}

    if dataset.images is not None:
        for step in range(start, stop):
            indices = chosen(step)
            yield batch(indices, dataset.fetch(indices))
        return

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ddpm_jax-data")
    ahead = collections.deque()
    try:
        for step in range(start, stop + prefetch):
            if step < stop:
                indices = chosen(step)
                parts = np.array_split(indices, min(THREADS, len(indices)))
                ahead.append((indices, [pool.submit(dataset.fetch, part) for part in parts]))
            if step >= start + prefetch:
                indices, parts = ahead.popleft()
                yield batch(indices, np.concatenate([part.result() for part in parts]))
    finally:
        pool.shutdown(cancel_futures=True)


# Arrays: digits, synthetic, npz and the official archives. Each reader returns
# (images uint8 [N, H, W] or [N, H, W, C], labels int [N], num_classes).


def _from_arrays(name, split, images, labels, num_classes, image_shape) -> Dataset:
    images = images.reshape(*images.shape[:3], -1)
    shape = images.shape[1:]
    if image_shape not in (None, shape):
        raise DataError(
            f"{name} holds images {_times(shape)}, but the config asks for {_times(image_shape)}; "
            f"arrays are not resized: set {_option(shape)}"
        )
    labels = labels.astype(np.int32)
    return Dataset(name, split, shape, num_classes, labels, images.__getitem__, images)


def _digits(split):
    from sklearn.datasets import load_digits

    digits = load_digits()  # images [1797, 8, 8] with the grey levels 0..16
    part = slice(0, 1500) if split == "train" else slice(1500, None)
    order = _permutation(len(digits.images), 0, 0)[part]
    images = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)
    return images, digits.target[order], 10


def _synthetic(split, shape):
    """Gradients, whose direction tells the class, under blobs of any place, size and colour."""
    height, width, channels = shape
    indices = range(1024) if split == "train" else range(1024, 1280)
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    images = np.empty((len(indices), *shape), np.uint8)
    for image, i in zip(images, indices, strict=True):
        bits = np.random.PCG64(np.random.SeedSequence(0, spawn_key=(i,))).random_raw(4 + channels)
        turn, centre_y, centre_x, radius, *colour = bits / 2.0**64  # each in [0, 1)
        angle = 2 * np.pi * (i % 10 + 0.5 * turn) / 10
        ramp = (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2)  # in [-1, 1]
        distance = (x - 2 * centre_x + 1) ** 2 + (y - 2 * centre_y + 1) ** 2
        blob = np.exp(-distance / (0.1 + 0.4 * radius) ** 2)
        tint = 2 * np.array(colour) - 1
        image[:] = np.rint(127.5 + 70 * ramp[..., None] + 57 * blob[..., None] * tint)
    return images, np.array(indices) % 10, 10


def _npz(path, split):
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # zipfile, zlib, pickle and NumPy each have their own
        raise DataError(f"{path} cannot be read as .npz: {_line(error)}") from error
    splits = {key[2:]: (key, f"y_{key[2:]}") for key in arrays if key.startswith("x_")}
    for pair in (("images", "labels"), ("arr_0", "arr_1")):
        if pair[0] in arrays:
            splits.setdefault("train", pair)
    if split not in splits:
        raise DataError(
            f"{path} has no split {split!r}: it has {sorted(splits) or 'no images'} in the arrays "
            f"{sorted(arrays)}; expected x_{split} and y_{split}, or images and labels for train"
        )
    image_key, label_key = splits[split]
    images = arrays[image_key]
    where = f"{path}: {image_key} is {images.dtype} {list(images.shape)}"
    if images.ndim not in (3, 4) or images.size == 0:
        raise DataError(f"{where}, expected [N, H, W] or [N, H, W, C] with at least one image")
    if images.dtype != np.uint8:
        low, high = images.min(), images.max()
        scaled = "(x + 1) * 127.5" if low < 0 else "x * 255" if high <= 1 else "x"
        raise DataError(
            f"{where} in {low:.3g}..{high:.3g}, expected uint8 in 0..255; if that is its range, "
            f"save numpy.rint({scaled}).astype(numpy.uint8)"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise DataError(f"{where}, expected channels last; transpose with (0, 2, 3, 1)")
    if label_key not in arrays:
        return images, np.zeros(len(images)), 0
    labels = arrays[label_key].reshape(-1)
    if len(labels) != len(images) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(
            f"{path}: {label_key} is {labels.dtype} {list(arrays[label_key].shape)}, expected one "
            f"class 0, 1, … (an integer) for each of the {len(images)} images of {image_key}"
        )
    # Over all splits, so that the classes of train and test are numbered from one list.
    every = [arrays[key] for _, key in splits.values() if key in arrays and arrays[key].size]
    return images, labels, 1 + max(int(array.max()) for array in every)


# The official archives: mirrors, then file, bytes and SHA-256 sum as tensorflow-datasets registers
# them (tensorflow_datasets/url_checksums/<name>.txt). The sums make any mirror safe, http included.
# CIFAR-10's second is the one of MindSpore's tutorials.

_ARCHIVES = {
    "mnist": """
https://storage.googleapis.com/cvdf-datasets/mnist/
https://ossci-datasets.s3.amazonaws.com/mnist/
train-images-idx3-ubyte.gz 9912422 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
train-labels-idx1-ubyte.gz 28881 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
t10k-images-idx3-ubyte.gz 1648877 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
t10k-labels-idx1-ubyte.gz 4542 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
""",
    "fashion_mnist": """
https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/
http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/
train-images-idx3-ubyte.gz 26421880 3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84
train-labels-idx1-ubyte.gz 29515 a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845
t10k-images-idx3-ubyte.gz 4422102 346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073
t10k-labels-idx1-ubyte.gz 5148 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5
""",
    "cifar10": """
https://www.cs.toronto.edu/~kriz/
https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/
cifar-10-binary.tar.gz 170052171 c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
""",
}
_MIRRORS = {name: re.findall(r"^(\S+/)$", text, re.M) for name, text in _ARCHIVES.items()}
_SUMS = {  # {data set: {file: (bytes, SHA-256)}}
    name: {
        file: (int(size), sha256)
        for file, size, sha256 in re.findall(r"^(\S+) (\d+) (\w+)$", text, re.M)
    }
    for name, text in _ARCHIVES.items()
}


def _files(name, split):
    if name == "cifar10":
        return ("cifar-10-binary.tar.gz",)
    part = {"train": "train", "test": "t10k"}[split]
    return (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")


def _local(name, file, root):
    return next((path for path in (root / name / file, root / file) if path.is_file()), None)


def _has_archives(name, split, root):
    return all(_local(name, file, root) for file in _files(name, split))


def _archive_arrays(name, split, root):
    paths = []
    for file in _files(name, split):
        path, sums = _local(name, file, root), _SUMS[name][file]
        if path is None:
            urls = [mirror + file for mirror in _MIRRORS[name]]
            path = download(urls, root / name / file, *sums)
        if fault := damage(path, *sums):
            raise DataError(
                f"{path} is not {name}'s archive or is damaged: {fault}; delete it and run again "
                f"to download it, or put the right file into {root / name}"
            )
        paths.append(path)
    if name == "cifar10":
        return _cifar10(paths[0], split)
    images, labels = (_idx(path) for path in paths)
    return images, labels, 10


def damage(path: Path, size: int, sha256: str) -> str | None:
    """None, or how the file differs from the expected size in bytes and SHA-256 sum."""
    found = path.stat().st_size
    if found != size:
        return f"expected {size} bytes, found {found}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == sha256 else f"expected SHA-256 {sha256}, found {digest}"


def download(urls: Sequence[str], path: Path, size: int, sha256: str) -> Path:
    """Fetches a file to `path`, where it appears only when it is complete.

    Args:
        urls: addresses of the same file; each is tried three times.
        size, sha256: in bytes, and the sum it must have, which makes any address safe.

    Raises:
        DataError: no address gave the right file.
        OSError: the folder of `path` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # processes may download at once
    failures = {}
    try:
        for wait in (0, BACKOFF, 2 * BACKOFF):
            time.sleep(wait)
            for url in urls:
                try:
                    _copy(url, part, size)
                except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                    failures[url] = _line(error)
                    continue
                fault = damage(part, size, sha256)
                if fault is None:
                    os.replace(part, path)
                    return path
                failures[url] = fault
    finally:
        part.unlink(missing_ok=True)
    tried = "; ".join(f"{url} ({why})" for url, why in failures.items())
    raise DataError(
        f"cannot download {path.name}: {tried}; put {path.name} into {path.parent} by hand"
    )


def _copy(url, path, size):
    update = _progress(f"downloading {url}", size / 1e6, "MB")
    with urllib.request.urlopen(url, timeout=20) as response, open(path, "wb") as out:
        while out.tell() <= size and (chunk := response.read(1 << 16)):
            out.write(chunk)
            update(out.tell() / 1e6)


def _idx(path):
    """IDX: bytes 0, 0, 8 (uint8), the rank, then big-endian int32 sizes, then the values."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _cifar10(path, split):
    """Records of 3,073 bytes: the class, then the red, green and blue planes, 32×32 each."""
    wanted = "data_batch_" if split == "train" else "test_batch"
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:  # in the order of the archive: gzip cannot go back
            if os.path.basename(member.name).startswith(wanted):
                found[member.name] = tar.extractfile(member).read()
    records = np.frombuffer(b"".join(found[file] for file in sorted(found)), np.uint8)
    records = records.reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0], 10


def picture(path: str | os.PathLike, image_shape: tuple[int, int, int]) -> np.ndarray:
    """One picture file as uint8 [H, W, C], resized and cropped as `load` does it for a folder.

    Raises:
        DataError: there is none, or it cannot be decoded.
    """
    if not os.path.isfile(path):
        raise DataError(f"there is no picture {path}")
    return _decode(path, path, image_shape)


# Pictures: folders and tensorflow-datasets. Each reader returns (read, N, num_classes), where
# read([i, …]) is a list of (path or file, label, name in error messages).


def _from_pictures(name, split, read, count, num_classes, image_shape, memory_limit_gb) -> Dataset:
    if count == 0:
        raise DataError(f"{name}/{split} holds no image")
    if image_shape and image_shape[2] not in (1, 3):
        raise DataError(f"{name}: pictures have 1 or 3 channels, not {_times(image_shape)}")
    [(first, _, first_name)] = read([0])
    shape = image_shape or _decode(first, first_name).shape

    def pixels(file, where):
        picture = _decode(file, where, image_shape)
        if picture.shape == (*shape[:2], 1):
            return np.broadcast_to(picture, shape)  # a grey picture among colour ones
        if picture.shape != shape:
            raise DataError(
                f"{where} is {_times(picture.shape)}, but {first_name} is {_times(shape)}; "
                f"{_option(shape)} resizes and crops them all"
            )
        return picture

    def fetch(indices):
        images = np.empty((len(indices), *shape), np.uint8)
        for image, (file, _, where) in zip(images, read(indices), strict=True):
            image[:] = pixels(file, where)
        return images

    labels = np.zeros(count, np.int32)
    chunks = [range(i, min(i + 256, count)) for i in range(0, count, 256)]
    if count * math.prod(shape) > memory_limit_gb * 1e9:
        update = _progress(f"reading the labels of {name}/{split}", count, "images")
        for chunk in chunks if num_classes else ():
            labels[chunk] = [label for _, label, _ in read(chunk)]
            update(chunk.stop)
        return Dataset(name, split, shape, num_classes, labels, fetch)

    images = np.empty((count, *shape), np.uint8)
    update = _progress(f"decoding {name}/{split}", count, "images")

    def fill(chunk):
        for i, (file, label, where) in zip(chunk, read(chunk), strict=True):
            images[i], labels[i] = pixels(file, where), label
        return chunk.stop

    with ThreadPoolExecutor(THREADS) as pool:
        for done in pool.map(fill, chunks):
            update(done)
    return Dataset(name, split, shape, num_classes, labels, images.__getitem__, images)


def _decode(file, where, shape=None):
    """Decodes one picture to uint8 [H, W, C]; without `shape` at its own size, with C = 1 or 3.

    EXIF orientation is applied, transparency is laid over white, 16 bits become 8 by division by
    257, and of an animation the first frame is taken.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as picture:
            if shape:  # lets JPEG decode at 1/2, 1/4 or 1/8 where that leaves twice the size
                picture.draft(None, (2 * max(shape[:2]),) * 2)
            ImageOps.exif_transpose(picture, in_place=True)
            channels = shape[2] if shape else 1 if picture.mode[0] in "1LI" else 3
            if picture.mode[0] == "I":
                grey = np.clip((np.asarray(picture).astype(np.int64) + 128) // 257, 0, 255)
                picture = Image.fromarray(grey.astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
            if shape:
                picture = ImageOps.fit(picture, (shape[1], shape[0]), Image.Resampling.BICUBIC)
            return np.asarray(picture).reshape(picture.height, picture.width, channels)
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, …
        raise DataError(
            f"{where} cannot be decoded: {_line(error)}; repair or remove it"
        ) from error


def _image_folder(folder, split):
    places = {place.name: place for place in folder.iterdir() if place.is_dir()}
    parts = {part: places[part] for part in SPLITS if part in places}
    if "train" not in parts or len(parts) == 1 < len(places):  # `train` beside `bus` is a class
        parts = {"train": folder}
    if split not in parts:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(parts)}")
    found = {part: _picture_files(place) for part, place in parts.items()}
    files = found[split]
    if not files:
        raise DataError(f"{parts[split]} holds no picture ({', '.join(SUFFIXES)})")
    if "" in files and len(files) > 1:
        raise DataError(
            f"{parts[split]} holds both pictures ({files[''][0].name}) and classes ({max(files)}/);"
            " move the pictures into a folder of their own"
        )
    # One list of classes for all splits, so that train and test number them alike.
    classes = sorted({name for part in found.values() for name in part if name})
    number = {name: i for i, name in enumerate(classes)} | {"": 0}
    examples = [(path, number[name], path) for name in sorted(files) for path in files[name]]
    return (lambda indices: [examples[i] for i in indices]), len(examples), len(classes)


def _picture_files(folder):
    """{sub-folder, or "" for the folder itself: its pictures, sorted}, without hidden ones."""

    def refuse(error):  # os.walk would leave out what it may not read
        raise error

    files = collections.defaultdict(list)
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        relative = Path(place).relative_to(folder).parts
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                files[relative[0] if relative else ""].append(Path(place, name))
    return {name: sorted(paths) for name, paths in files.items()}


# tensorflow-datasets. Preparing a data set needs TensorFlow, reading one does not; a prepared one
# is opened by its folder, which asks neither tensorflow-datasets' own list nor any server.


def _tensorflow_datasets(name, split, root):
    folder = _prepared(name, root)
    if folder is None:
        raise DataError(_advice(name, root))

    @contextlib.contextmanager
    def explained():  # a missing package, an unknown split, a damaged file
        try:
            yield
        except Exception as error:
            raise DataError(f"tensorflow-datasets cannot read {folder}: {_line(error)}") from error

    with explained():
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        features = dict(builder.info.features.items())
        images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
        key = "image" if "image" in images else "".join(images)
        if key not in images or features[key].np_dtype != np.uint8:
            raise TypeError(f"expected one uint8 feature `image`, found {builder.info.features}")
        decoders = {key: tfds.decode.SkipDecoding()}  # `_decode` does it, as for any picture
        source = builder.as_data_source(split=split, decoders=decoders)
        num_classes = getattr(features.get("label"), "num_classes", None) or 0

    def read(indices):
        indices = [int(i) for i in indices]
        with explained():
            items = source.__getitems__(indices)
        return [
            (io.BytesIO(item[key]), item["label"] if num_classes else 0, f"{name}/{split}[{i}]")
            for i, item in zip(indices, items, strict=True)
        ]

    return read, len(source), num_classes


def _tfds_folders(root):
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return root / "tfds", root, Path(default).expanduser()


def _prepared(name, root, file_format="array_record"):
    """The folder of the newest version prepared in this format, or None.

    `name` may carry a config and a version, as in "lsun/church" and "mnist:3.0.1".
    """
    dataset, _, version = name.partition(":")
    for place in _tfds_folders(root):
        infos = (place / dataset).glob("*/dataset_info.json")
        for info in sorted(infos, key=_version, reverse=True):
            if version in ("", info.parent.name) and _file_format(info) == file_format:
                return info.parent
    return None


def _version(info):
    return [int(number) for number in re.findall(r"\d+", info.parent.name)]


def _file_format(info):
    try:
        return json.loads(info.read_text()).get("fileFormat", "tfrecord")
    except (ValueError, AttributeError):
        return "damaged"


def _advice(name, root):
    """What to do about a name that is neither built in nor prepared."""
    prepare = (
        f'pip install tensorflow && python -c "import tensorflow_datasets as tfds; tfds.builder('
        f"{name!r}, data_dir={str(root / 'tfds')!r}, file_format='array_record')"
        f'.download_and_prepare()"'
    )
    if name.partition("/")[0] in _HARD_TO_PREPARE:
        prepare += (
            f" ({_HARD_TO_PREPARE[name.partition('/')[0]]}; image_folder:PATH reads any folder)"
        )
    if folder := _prepared(name, root, "tfrecord"):
        return (
            f"{folder} is prepared as tfrecord, which only TensorFlow reads; prepare it once more "
            f"as array_record: {prepare}"
        )
    known = _known_names(root)
    near = difflib.get_close_matches(name.partition(":")[0], known, n=3)
    guess = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."
    return (
        f"no data set {name!r} on this machine; {guess} If it is one of tensorflow-datasets, "
        f"prepare it once, which needs TensorFlow: {prepare}"
    )


def _known_names(root):
    prepared = {}  # {folder: name}; data_dir/tfds comes before data_dir, which contains it
    for place in _tfds_folders(root):
        for pattern in ("*/*.*.*", "*/*/*.*.*"):  # name/version, name/config/version
            for info in place.glob(f"{pattern}/dataset_info.json"):
                folder = info.parent.parent
                prepared.setdefault(folder, folder.relative_to(place).as_posix())
    return sorted({*BUILT_IN, "npz:", "image_folder:", *prepared.values()})


_HARD_TO_PREPARE = {
    "celeb_a": "its files are on Google Drive, which often refuses them",
    "celeb_a_hq": "its files must first be made by hand, see its page at tensorflow.org/datasets",
    "lsun": "it needs tensorflow_io too",
}


# Small change.


def _existing(kind, path):
    if not path:
        raise DataError(f"{kind} needs a path, as in {kind}:/home/me/pictures")
    place = Path(path).expanduser()
    if not (place.is_dir() if kind == "image_folder" else place.is_file()):
        raise DataError(
            f"{kind}: there is no {'folder' if kind == 'image_folder' else 'file'} {place}"
        )
    return place


def _checked_shape(shape):
    if shape is None:
        return None
    shape = tuple(shape)
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise DataError(f"image_shape is {shape}, expected (height, width, channels)")
    return shape


def _times(shape):
    return "×".join(map(str, shape))


def _option(shape):
    return f"--config.data.image_shape={','.join(map(str, shape))}"


def _line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def _progress(what, total, unit):
    """Returns update(done), which prints amount, speed and time left to stderr.

    A terminal sees one line, rewritten twice a second; a log file gets one every ten seconds; work
    of less than a second is not mentioned.
    """
    began = shown = time.monotonic()
    start, end, pause = ("\r", "\x1b[K", 0.5) if sys.stderr.isatty() else ("", "\n", 10)

    def update(done):
        nonlocal shown
        now = time.monotonic()
        if now - began < 1 or (now - shown < pause and done < total):
            return
        shown, speed = now, done / (now - began)
        line = f"{what}: {done:.0f} of {total:.0f} {unit}, {speed:.1f} {unit}/s"
        left = f", {(total - done) / speed:.0f} s left" if done < total else ", done"
        print(start + line + left, end=end if done < total else "\n", file=sys.stderr, flush=True)

    return update
