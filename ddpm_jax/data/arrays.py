"""Data sets of arrays: the digits of scikit-learn, drawn images, and .npz files."""

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ddpm_jax.data.batching import permutation
from ddpm_jax.data.dataset import (
    DataError,
    Dataset,
    check_images,
    check_labels,
    count_classes,
    no_split,
    one_line,
)


def digits(split: str) -> Dataset:
    """The 8×8 digits of scikit-learn: 1,500 in train and 297 in test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()  # images [1797, 8, 8] with grey levels 0..16
    part = slice(0, 1500) if split == "train" else slice(1500, None)
    order = permutation(len(bunch.images), 0, 0)[part]
    images = np.rint(bunch.images[order] * (255 / 16)).astype(np.uint8)
    labels = bunch.target[order]
    return Dataset.from_arrays(images, labels, name="digits", split=split, class_names="0123456789")


def synthetic(split: str, image_shape: tuple[int, int, int]) -> Dataset:
    """Gradients in one of ten directions, the class, with a blob of random position, size and colour."""
    height, width, channels = image_shape
    indices = range(1024) if split == "train" else range(1024, 1280)
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    images = np.empty((len(indices), *image_shape), np.uint8)
    for image, i in zip(images, indices, strict=True):
        bits = np.random.PCG64(np.random.SeedSequence(0, spawn_key=(i,))).random_raw(4 + channels)
        direction, centre_y, centre_x, radius, *colour = bits / 2.0**64  # each in [0, 1)
        angle = 2 * np.pi * (i % 10 + 0.5 * direction) / 10
        ramp = (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2)  # in [-1, 1]
        distance = (x - 2 * centre_x + 1) ** 2 + (y - 2 * centre_y + 1) ** 2
        blob = np.exp(-distance / (0.1 + 0.4 * radius) ** 2)
        tint = 2 * np.array(colour) - 1
        image[:] = np.rint(127.5 + 70 * ramp[..., None] + 57 * blob[..., None] * tint)
    return Dataset.from_arrays(images, np.array(indices) % 10, name="synthetic", split=split)


@contextlib.contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an .npz, read on use; never objects, which could run code.

    Raises:
        OSError, ValueError: it cannot be read, or its arrays take more than this machine's memory.
    """
    with open(path, "rb") as raw:
        with zipfile.ZipFile(raw) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf(
            "SC_PAGE_SIZE"
        ):
            raise ValueError(
                f"its arrays take {size / 1e9:.0f} GB, more than this machine's memory"
            )
        raw.seek(0)
        # A header may name any shape.
        with np.errstate(over="ignore"), np.load(raw, allow_pickle=False) as arrays:
            yield arrays


def npz(path: Path, name: str, split: str) -> Dataset:
    """The arrays of an .npz file; see `load` for their names."""
    try:
        with open_npz(path) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # zipfile, zlib, pickle and NumPy each raise their own
        raise DataError(f"{path} cannot be read as .npz: {one_line(error)}") from error
    splits = {key[2:]: (key, f"y_{key[2:]}") for key in arrays if key.startswith("x_")}
    for pair in (("images", "labels"), ("arr_0", "arr_1")):
        if pair[0] in arrays:
            splits.setdefault("train", pair)
    if not splits:
        raise DataError(
            f"{path} has the arrays {sorted(arrays)} and no images; expected x_train and y_train, x_test"
            " and y_test, or images and labels"
        )
    if split not in splits:
        raise no_split(path, split, sorted(splits))
    image_key, label_key = splits[split]
    images, labels = check_images(arrays[image_key], f"{path}: {image_key}", "save"), None
    if label_key in arrays:
        where, of = f"{path}: {label_key}", f" of {image_key}"
        labels = check_labels(arrays[label_key], where, len(images), of)
    names = tuple(map(str, arrays["class_names"].reshape(-1))) if "class_names" in arrays else ()
    train_labels = arrays.get(splits.get("train", splits[split])[1], np.zeros(0, int)).reshape(-1)
    num_classes = count_classes(train_labels, names, path)  # other splits do not add classes
    return Dataset.from_arrays(
        images, labels, name=name, split=split, class_names=names, num_classes=num_classes
    )
