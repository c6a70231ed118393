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
from typing import NamedTuple

import numpy as np
from absl import logging

BUILT_IN = ("digits", "mnist", "fashion_mnist", "cifar10", "synthetic")
THREADS = min(32, os.cpu_count() or 1)  # decoding releases the GIL, so threads are enough
SPLITS = ("train", "test", "val", "validation")  # sub-folders that may be splits, not classes
_SPLIT_NAMES = {name: name for name in SPLITS} | {"training": "train", "testing": "test"}
CHOICE = 2**32 - 1  # stream of the permutation in `choose`; epochs of training have 0, 1, …
# Formats that Pillow recognises by their ending and does not decode by itself.
NOT_DECODED = ("BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF")
NO_LABEL = -1
WITH_PATH = ("image_folder", "npz")  # kinds of data sets whose name holds where they lie
BACKOFF = 1.0  # seconds before the second try of a download, doubled for the third


class DataError(RuntimeError):
    """One line: what is wrong with the data, what was expected, and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """N images with labels, in memory or decoded on demand.

    Attributes:
        name: what `load` was asked for.
        split: "train", "test", …
        image_shape: (H, W, C).
        num_classes: of the training split; 0 if that has no labels.
        labels: int32 [N]; −1 for an image without a label, as in a test split that has none; zeros
            if num_classes is 0.
        fetch: int64 indices [B] in 0..N-1 -> uint8 [B, H, W, C]; called from several threads.
        images: uint8 [N, H, W, C] if they are in memory, else None.
        class_names: the name of each class, by its number; empty if they are not known.
        left_out: one line for each kind of file that was not read, and why.
        files: SHA-256 of the names and sizes of the files; empty for arrays, see `fingerprint`.
    """

    name: str
    split: str
    image_shape: tuple[int, int, int]
    num_classes: int
    labels: np.ndarray
    fetch: Callable[[np.ndarray], np.ndarray]
    images: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    files: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Changes with the names or sizes of the files, or with the pixels of arrays; not with the place."""
        return self.files or self.digest()

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


def choose(total: int, count: int | None = None) -> np.ndarray:
    """Positions of `count` of `total` images, int64 [count]: the first ones of one fixed permutation.

    Wherever some of the images of a split stand for all of them, they are chosen here: the first in the
    order of the files may all be of one class. A larger count begins with the same images.
    """
    return _permutation(total, 0, CHOICE)[:count].copy()


def renumbered(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """A data set whose classes have the numbers that these names have; −1 for a class that is not among them."""
    if not dataset.class_names or tuple(class_names) == dataset.class_names:
        return dataset
    number = {name: i for i, name in enumerate(class_names)}
    table = np.array([number.get(name, NO_LABEL) for name in dataset.class_names], np.int32)
    labels = np.where(dataset.labels < 0, NO_LABEL, table[dataset.labels])
    names = tuple(class_names)
    return dataclasses.replace(dataset, labels=labels, num_classes=len(names), class_names=names)


def image_digests(images: np.ndarray) -> np.ndarray:
    """The first 16 bytes of the SHA-256 of each image: uint8 [N, 16] from uint8 [N, H, W, C]."""
    digests = [hashlib.sha256(np.ascontiguousarray(image)).digest()[:16] for image in images]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def load(
    name: str,
    *,
    split: str = "train",
    image_shape: tuple[int, int, int] | None = None,
    data_dir: str | os.PathLike = "data",
    memory_limit_gb: float = 4.0,
    flatten: bool = False,
    skip_broken: bool = False,
    background: str = "white",
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
              `labels`, or `arr_0` and `arr_1`; the labels are optional, and so is `class_names`.
            * `image_folder:PATH`: every sub-folder is a class, a flat folder has no labels;
              sub-folders `train` and `test` or `val` are splits instead. Classes are those of the
              training split, numbered in the order of their names (2 before 10, if all are
              numbers). Pictures are what Pillow decodes; HEIC needs the package pillow-heif.
            * any other name: what tensorflow-datasets has already prepared as array_record in
              `data_dir/tfds`, `data_dir` or its default folder.
        split: which part; `train` and `test` exist for every built-in data set.
        image_shape: (H, W, C). Pictures of a folder or of tensorflow-datasets are resized
            (shorter side to fit, antialiased), cropped at the centre and converted to C = 1 or 3
            channels; without it all must have the size of the first. Arrays are never resized:
            for them it must be the shape they have (`synthetic` is drawn at any shape).
        data_dir: where archives are looked for and put.
        memory_limit_gb: pictures larger than this in all (N·H·W·C bytes) are decoded on demand.
        flatten: take the pictures of a folder at any depth, without classes.
        skip_broken: leave out pictures of a folder that cannot be decoded, and list them; without it
            the first one is an error. All are decoded once at the start, in memory or not.
        background: colour laid under transparent pictures, by a name or #rrggbb.

    Raises:
        DataError: whatever is wrong, in one line.
    """
    kind, _, path = name.partition(":")
    root = _path(data_dir)
    shape = _checked_shape(image_shape)
    decoding = (shape, memory_limit_gb, skip_broken, _checked_colour(background))
    try:
        if kind == "image_folder":
            pictures = _image_folder(_existing(kind, path), split, flatten)
            return _from_pictures(name, split, pictures, *decoding)
        if flatten or skip_broken:
            option = "flatten" if flatten else "skip_broken"
            raise DataError(f"{option}=True is for image_folder:PATH, and the data are {name}")
        if kind == "npz":
            arrays = _npz(_existing(kind, path), split)
        elif name in BUILT_IN and split not in ("train", "test"):
            raise _no_split(name, split, ("train", "test"))
        elif name == "digits":
            arrays = _digits(split)
        elif name == "synthetic":
            arrays = _synthetic(split, shape or (32, 32, 3))
        elif name in _ARCHIVES and (_has_archives(name, split, root) or not _prepared(name, root)):
            arrays = _archive_arrays(name, split, root)
        else:
            pictures = _tensorflow_datasets(name, split, root)
            return _from_pictures(name, split, pictures, *decoding)
    except OSError as error:
        raise DataError(f"{name}: {error} (data_dir is {root})") from error
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
# (images uint8 [N, H, W] or [N, H, W, C], labels int [N], num_classes, class_names).


def _from_arrays(name, split, images, labels, num_classes, class_names, image_shape) -> Dataset:
    images = images.reshape(*images.shape[:3], -1)
    shape = images.shape[1:]
    if image_shape not in (None, shape):
        raise DataError(
            f"{name} holds images {_times(shape)}, but the config asks for {_times(image_shape)}; "
            f"arrays are not resized: set {_option(shape)}"
        )
    labels = labels.astype(np.int32)
    given = {"images": images, "class_names": class_names}
    return Dataset(name, split, shape, num_classes, labels, images.__getitem__, **given)


def _digits(split):
    from sklearn.datasets import load_digits

    digits = load_digits()  # images [1797, 8, 8] with the grey levels 0..16
    part = slice(0, 1500) if split == "train" else slice(1500, None)
    order = _permutation(len(digits.images), 0, 0)[part]
    images = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)
    return images, digits.target[order], 10, _CLASS_NAMES["digits"]


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
    return images, np.array(indices) % 10, 10, ()


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
        if splits:
            raise _no_split(path, split, sorted(splits))
        raise DataError(
            f"{path} has the arrays {sorted(arrays)} and no images; expected x_train and y_train, x_test"
            " and y_test, or images and labels"
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
    labels = arrays.get(label_key, np.full(len(images), NO_LABEL)).reshape(-1)
    if label_key in arrays and (
        len(labels) != len(images) or labels.dtype.kind not in "iu" or labels.min() < 0
    ):
        raise DataError(
            f"{path}: {label_key} is {labels.dtype} {list(arrays[label_key].shape)}, expected one "
            f"class 0, 1, … (an integer) for each of the {len(images)} images of {image_key}"
        )
    of_train = arrays.get(splits.get("train", splits[split])[1], np.zeros(0, int))
    num_classes = 1 + int(of_train.max()) if of_train.size else 0  # no other split makes a class
    names = tuple(map(str, arrays["class_names"].reshape(-1))) if "class_names" in arrays else ()
    if names and len(names) < num_classes:
        raise DataError(f"{path}: {len(names)} class_names for {num_classes} classes")
    num_classes = max(num_classes, len(names)) if num_classes else 0
    labels = labels.astype(np.int64) * (num_classes > 0)  # uint8 has no −1
    labels = np.where(labels < max(num_classes, 1), labels, NO_LABEL)
    return images, labels, num_classes, names


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
_CLASS_NAMES = {
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "fashion_mnist": tuple(
        [
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ]
    ),
    "cifar10": tuple(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    ),
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
        images, labels = _cifar10(paths[0], split)
    else:
        images, labels = (_idx(path) for path in paths)
    return images, labels, 10, _CLASS_NAMES[name]


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
    return np.ascontiguousarray(images), records[:, 0]


def picture(path: str | os.PathLike, image_shape: tuple[int, int, int]) -> np.ndarray:
    """One picture file as uint8 [H, W, C], resized and cropped as `load` does it for a folder.

    Raises:
        DataError: there is none, or it cannot be decoded.
    """
    if not os.path.isfile(path):
        raise DataError(f"there is no picture {path}")
    return _decode(path, path, image_shape)


# Pictures: folders and tensorflow-datasets.


class _Pictures(NamedTuple):
    """What a reader of pictures found."""

    read: Callable  # [i, …] -> a list of (path or file, label, name in error messages)
    count: int
    class_names: tuple[str, ...]  # empty if there are no labels
    files: str  # SHA-256 of names and sizes
    left_out: tuple[str, ...] = ()


def _from_pictures(
    name, split, pictures, image_shape, memory_limit_gb, skip_broken, background
) -> Dataset:
    read, count, class_names, files, left_out = pictures
    num_classes = len(class_names)
    if count == 0:
        raise DataError(f"{name}/{split} holds no image")
    if image_shape and image_shape[2] not in (1, 3):
        raise DataError(f"{name}: pictures have 1 or 3 channels, not {_times(image_shape)}")
    # Decoded now or on demand, a picture that stops a run is answered with the option that leaves it out.
    option = "; training leaves out such pictures with --config.data.skip_broken=True"
    option = option if name.startswith("image_folder:") and not skip_broken else ""

    def decode(file, where):
        try:
            return _decode(file, where, image_shape, background)
        except CannotDecode as error:
            raise CannotDecode(f"{error}{option}") from error

    shape, first_name = image_shape, None
    for i in range(count if image_shape is None else 0):  # all have the size of the first
        [(file, _, first_name)] = read([i])
        try:
            shape = decode(file, first_name).shape
            break
        except DataError:
            if not skip_broken:
                raise
    if shape is None:
        raise DataError(f"{name}/{split}: none of its {count} pictures can be decoded")

    def pixels(file, where):
        picture = decode(file, where)
        if picture.shape == (*shape[:2], 1):
            return np.broadcast_to(picture, shape)  # a grey picture among colour ones
        if picture.shape != shape:
            colour = (*shape[:2], max(shape[2], picture.shape[2]))
            raise DataError(
                f"{where} is {_times(picture.shape)}, but {first_name} is {_times(shape)}; "
                f"{_option(colour)} resizes and crops them all"
            )
        return picture

    labels = np.full(count, NO_LABEL if num_classes else 0, np.int32)
    chunks = [range(i, min(i + 256, count)) for i in range(0, count, 256)]
    in_memory = count * math.prod(shape) <= memory_limit_gb * 1e9
    images = np.empty((count, *shape), np.uint8) if in_memory else None
    broken = {}  # {position: reason}

    def fill(chunk):
        for i, (file, label, where) in zip(chunk, read(chunk), strict=True):
            labels[i] = label
            if not (in_memory or skip_broken):
                continue
            try:
                found = pixels(file, where)
            except CannotDecode as error:
                if not skip_broken:
                    raise
                broken[i] = str(error)
                continue
            if in_memory:
                images[i] = found
        return chunk.stop

    if in_memory or skip_broken or num_classes:
        what = "decoding" if in_memory or skip_broken else "reading the labels of"
        update = _progress(f"{what} {name}/{split}", count, "images")
        with ThreadPoolExecutor(THREADS) as pool:
            for done in pool.map(fill, chunks):
                update(done)
    kept = np.setdiff1d(np.arange(count), list(broken))
    if not len(kept):
        raise DataError(f"{name}/{split}: none of its {count} pictures can be decoded")
    if broken:
        labels = labels[kept]
        left_out += (f"{len(broken)} pictures that cannot be decoded: {_few(broken.values())}",)

    def fetch(indices):
        result = np.empty((len(indices), *shape), np.uint8)
        for image, (file, _, where) in zip(result, read(kept[indices]), strict=True):
            image[:] = pixels(file, where)
        return result

    if in_memory:
        images = images[kept] if broken else images
        fetch = images.__getitem__
    about = {"images": images, "class_names": class_names, "left_out": left_out, "files": files}
    return Dataset(name, split, shape, num_classes, labels, fetch, **about)


class CannotDecode(DataError):
    """One picture is damaged or of an unknown kind."""


def _decode(file, where, shape=None, background="white"):
    """Decodes one picture to uint8 [H, W, C]; without `shape` at its own size, with C = 1 or 3.

    EXIF orientation is applied, transparency is laid over the background, 16 bits become 8 by
    division by 257, and of an animation the first frame is taken.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as picture:
            if shape:  # lets JPEG decode at 1/2, 1/4 or 1/8 where that leaves twice the size
                picture.draft(None, (2 * max(shape[:2]),) * 2)
            picture.load()
            picture = _upright(picture, where)
            channels = shape[2] if shape else 1 if picture.mode[0] in "1LI" else 3
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
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, …
        raise CannotDecode(
            f"{where} cannot be decoded: {_line(error)}; repair or remove it"
        ) from error


def _upright(picture, where):
    """The picture turned as its EXIF orientation says, or as it is where the EXIF data are damaged."""
    from PIL import Image

    flip = Image.Transpose
    turns = {2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM}
    turns |= {5: flip.TRANSPOSE, 6: flip.ROTATE_270, 7: flip.TRANSVERSE, 8: flip.ROTATE_90}
    try:
        orientation = picture.getexif().get(0x0112)  # "Orientation"
        turn = turns.get(orientation)
    except Exception as error:  # the pixels are decoded already: only this tag is lost
        line = "%s: its EXIF data are damaged (%s), so it is not turned; its pixels are used"
        logging.log_first_n(logging.WARNING, line, 10, where, _line(error))
        return picture
    return picture if turn is None else picture.transpose(turn)


@functools.cache
def picture_endings() -> tuple[str, ...]:
    """The endings of files that Pillow decodes here, such as ".png"; HEIC too if pillow-heif is installed."""
    from PIL import Image

    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    found = Image.registered_extensions().items()
    decoded = {ending for ending, kind in found if kind in Image.OPEN and kind not in NOT_DECODED}
    return tuple(sorted(decoded))


def _image_folder(folder, split, flatten):
    places = {place.name: place for place in folder.iterdir() if place.is_dir()}
    places = {name: place for name, place in places.items() if not _is_hidden(name)}
    parts = {_SPLIT_NAMES[name.lower()]: name for name in places if name.lower() in _SPLIT_NAMES}
    parts = {part: places[parts[part]] for part in SPLITS if part in parts}
    if "train" not in parts or len(parts) == 1 < len(places):  # `train` beside `bus` is a class
        parts = {"train": folder}
    if split not in parts:
        raise _no_split(folder, split, parts)
    files, left_out = _picture_files(parts[split], flatten)
    if len(parts) > 1:
        beside = [f"{name}/" for name, place in places.items() if place not in parts.values()]
        left_out += [f"{', '.join(sorted(beside))} beside {' and '.join(parts)}"] if beside else []
    if not files:
        unread = f"; left out: {'; '.join(left_out)}" if left_out else ""
        raise DataError(f"{parts[split]} holds no picture ({', '.join(picture_endings())}){unread}")
    if "" in files and len(files) > 1:
        raise DataError(
            f"{parts[split]} holds both pictures ({files[''][0].name}) and classes ({max(files)}/);"
            " move the pictures into a folder of their own, or take all of them without classes by"
            " --config.data.flatten=True"
        )
    # The classes are those of train: a test split without labels has none, nor can it add one.
    of_train = files if split == "train" else _picture_files(parts["train"], flatten)[0]
    classes = _in_order(name for name in of_train if name)
    number = {name: i for i, name in enumerate(classes)}
    if strangers := [name for name in files if name and name not in number and classes]:
        line = (
            f"{', '.join(_in_order(strangers))}: not classes of {parts['train']}, so without labels"
        )
        left_out.append(line)
    unlabelled = NO_LABEL if classes else 0
    examples = [
        (path, number.get(name, unlabelled), path)
        for name in (_in_order(files))
        for path in files[name]
    ]
    listing = [(os.path.relpath(path, parts[split]), _size(path)) for path, _, _ in examples]
    about = (len(examples), tuple(classes), _sha256(listing), tuple(left_out))
    return _Pictures(lambda indices: [examples[i] for i in indices], *about)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _size(path) -> int:
    """Bytes of a file; −1 for a link to nowhere, which decoding will name."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _in_order(names) -> list[str]:
    """Names sorted as text, or as numbers if all of them are: 2 before 10."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _picture_files(folder, flatten):
    """The pictures below a folder, without hidden ones, and what was left out.

    Returns:
        {sub-folder, or "" for the folder itself: paths, sorted}, all under "" if `flatten`;
        and lines on the files that are not read, by their endings.
    """

    def refuse(error):  # os.walk would leave out what it may not read
        raise error

    files, others = collections.defaultdict(list), collections.Counter()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        relative = Path(place).relative_to(folder).parts
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(picture_endings()):
                files[relative[0] if relative and not flatten else ""].append(Path(place, name))
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
        except DataError:
            raise
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
        if split.isidentifier() and split not in builder.info.splits:  # not train[:10%]
            raise _no_split(name, split, builder.info.splits)
        source = builder.as_data_source(split=split, decoders=decoders)
        class_names = tuple(getattr(features.get("label"), "names", None) or ())

    def read(indices):
        indices = [int(i) for i in indices]
        with explained():
            items = source.__getitems__(indices)
        return [
            (io.BytesIO(item[key]), item["label"] if class_names else 0, f"{name}/{split}[{i}]")
            for i, item in zip(indices, items, strict=True)
        ]

    listing = sorted((path.name, path.stat().st_size) for path in Path(folder).iterdir())
    return _Pictures(read, len(source), class_names, _sha256([split, *listing]))


def _tfds_folders(root):
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return root / "tfds", root, _path(default)


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
    path = _path(name)
    if path.is_dir() or path.is_file() or name.startswith(("/", "./", "../", "~")):
        kind = "npz" if path.suffix == ".npz" else "image_folder"
        there = "" if path.exists() else f", and there is no {path}"
        return f"data.name is a path: did you mean {kind}:{name}?{there}"
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
    place = _path(path)
    if not (place.is_dir() if kind == "image_folder" else place.is_file()):
        raise DataError(
            f"{kind}: there is no {'folder' if kind == 'image_folder' else 'file'} {place}; if it has moved,"
            f" give the new place: --data_dir=PATH for a trained run, --config.data.name={kind}:PATH to train"
        )
    return place


def _path(text) -> Path:
    return Path(os.path.expanduser(text))  # leaves ~nobody as it is, where Path.expanduser fails


def _no_split(name, split, there):
    first = next(
        (part for part in ("test", "val", "validation") if part in there), next(iter(there))
    )
    return DataError(
        f"{name} has no split {split!r}; it has {', '.join(there)}; choose one, such as --split={first}"
    )


def _checked_colour(background):
    from PIL import ImageColor

    try:
        return (*ImageColor.getrgb(background)[:3], 255)
    except (ValueError, AttributeError):
        raise DataError(
            f"background is {background!r}, expected a colour such as white, black or #808080"
        ) from None


def _few(lines, count=20):
    lines = list(lines)
    more = f" and {len(lines) - count} more" if len(lines) > count else ""
    return "; ".join(lines[:count]) + more


def _sha256(tree):
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


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
