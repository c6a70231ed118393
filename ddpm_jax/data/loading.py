"""Loads a data set by its name: built in, from files, prepared by tensorflow-datasets, or a function of your own."""

import dataclasses
import inspect
import os
import sys
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ddpm_jax import names
from ddpm_jax.data import archives, arrays, pictures, prepared
from ddpm_jax.data.dataset import (
    DataError,
    Dataset,
    check_shape,
    no_split,
    one_line,
)

BUILT_IN = ("digits", "mnist", "fashion_mnist", "cifar10", "synthetic")
WITH_PATH = ("image_folder", "npz")  # kinds of data sets whose name holds their path


class Loader(Protocol):
    """The interface of a data set of your own: the function NAME of `data.name = "module:NAME"`."""

    def __call__(
        self, *, split: str, image_shape: tuple[int, int, int] | None, data_dir: Path
    ) -> Dataset | tuple[np.ndarray, np.ndarray | None]:
        """Returns one split. It must be a pure function of the arguments, because a resumed run calls it again.

        Args:
            split: "train", "test", …; raise DataError for a split that does not exist.
            image_shape: (H, W, C) of the config, which the images must have, or None for any.
            data_dir: the folder for files, `data.data_dir`.

        Returns:
            (images, labels): uint8 [N, H, W, C] or [N, H, W], and integers 0, 1, … [N] or None. The classes are
            those of "train", for which the function is called too. Or a `Dataset`, which can also have class
            names, or images decoded on demand.
        """
        ...


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
    """Loads and checks a data set. It is downloaded only if there is no copy on this machine.

    Args:
        name: one of
            * `digits`: scikit-learn's 8×8 digits; train is the first 1,500 images of a fixed random
              permutation, test the other 297.
            * `mnist`, `fashion_mnist`, `cifar10`: the official archives in `data_dir/<name>` or
              `data_dir`, or a copy prepared by tensorflow-datasets, or else a download into
              `data_dir/<name>`. Sizes and SHA-256 sums of archives are checked every time.
            * `synthetic`: 1,024 + 256 computed images of gradients with blobs.
            * `npz:PATH`: uint8 arrays `x_train`, `y_train`, `x_test`, `y_test`, or `images` and
              `labels`, or `arr_0` and `arr_1`. Labels are optional, and so is `class_names`.
            * `image_folder:PATH`: a folder with one sub-folder for each class, or with pictures only,
              which then have no labels; or with the splits `train` and `test` or `val` as sub-folders.
              Classes are those of the training split, in the order of their names (2 before 10 if all
              are numbers). All formats that Pillow decodes are read; HEIC needs the package pillow-heif.
            * `module:NAME`: a function of your own, see `Loader`, in a module on Python's path or in the
              current folder. For example `my_data:stripes` if my_data.py has
              `def stripes(*, split, image_shape, data_dir): return images, labels`.
            * any other name: a data set prepared by tensorflow-datasets as array_record in
              `data_dir/tfds`, `data_dir` or its default folder.
        split: built-in data sets have `train` and `test`.
        image_shape: (H, W, C). Pictures of a folder or of tensorflow-datasets are resized (antialiased, so
            that the shorter side fits), cropped at the centre and converted to C = 1 or 3 channels; without
            it all must have the size of the first. Arrays must have this shape (`synthetic` has any).
        data_dir: the folder in which archives are looked for and saved.
        memory_limit_gb: pictures that need more memory (N·H·W·C bytes) are decoded on demand.
        flatten: read the pictures of a folder at any depth, without classes.
        skip_broken: leave out and list the pictures of a folder that cannot be decoded; by default they
            are an error. All are decoded once at the start, to find them.
        background: colour behind transparent pictures, a name or #rrggbb.

    Raises:
        DataError: one line: what is wrong with the data or the arguments.
    """
    kind, _, path = name.partition(":")
    root, shape = _user_path(data_dir), None
    if image_shape is not None:
        try:
            shape = check_image_shape(image_shape)
        except ValueError as error:
            raise DataError(str(error)) from None
    colour, found = _checked_colour(background), None
    try:
        if kind == "image_folder":
            found = pictures.image_folder(_existing(kind, path), split, flatten)
        elif flatten or skip_broken:
            option = "flatten" if flatten else "skip_broken"
            raise DataError(f"{option}=True is for image_folder:PATH, and the data are {name}")
        elif kind == "npz":
            dataset = arrays.npz(_existing(kind, path), name, split)
        elif name in BUILT_IN and split not in ("train", "test"):
            raise no_split(name, split, ("train", "test"))
        elif name == "digits":
            dataset = arrays.digits(split)
        elif name == "synthetic":
            dataset = arrays.synthetic(split, shape or (32, 32, 3))
        elif name in archives.SUMS and archives.are_here(name, split, root):
            dataset = archives.official(name, split, root)
        elif folder := prepared.find(name, root):
            found = prepared.pictures(folder, name, split)
        elif name in archives.SUMS:  # to be downloaded
            dataset = archives.official(name, split, root)
        elif name == "arrays":
            raise DataError(
                "this run was trained on arrays in Python, which it does not keep; give --images=FILE.npz where the"
                " command takes it, or use run = dj.load(…) and run.bits_per_dim(images) in Python"
            )
        elif _is_module_name(name):
            return _of_own(name, split, shape, root)
        else:
            raise DataError(prepared.advice(name, root, _known_names(root)))
        if found:
            options = (shape, memory_limit_gb, skip_broken, colour)
            return pictures.dataset_of(found, name, split, *options)
    except OSError as error:
        raise DataError(f"{name}: {error} (data_dir is {root})") from error
    return check_shape(dataset, shape, name)


class Survey(NamedTuple):
    """What is known of a folder of pictures before they are decoded.

    Attributes:
        count: number of training pictures.
        num_classes: number of their classes; 0 if they have no labels.
        sizes: int [N, 2], height and width of some of them.
        channels: 1 if these are all grey, otherwise 3.
    """

    count: int
    num_classes: int
    sizes: np.ndarray
    channels: int


def survey(name: str, *, flatten: bool = False, count: int = 2000) -> Survey:
    """Reads the headers of at most `count` training pictures of `image_folder:PATH`.

    Raises:
        DataError: one line: there is no such folder, or no picture in it that can be read.
    """
    kind, _, path = name.partition(":")
    try:
        found = pictures.image_folder(_existing(kind, path), "train", flatten)
        sizes, channels = pictures.sizes_of(found, count)
    except OSError as error:
        raise DataError(f"{name}: {error}") from error
    if not len(sizes):
        raise DataError(f"{name}: none of its {found.count} pictures can be decoded")
    return Survey(found.count, len(found.class_names), sizes, channels)


# A data set of your own.


def _is_module_name(name):
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _of_own(name, split, image_shape, root):
    """The data set of the function module:NAME, after a check."""
    result, where = _called(name, split, image_shape, root)
    if not isinstance(result, Dataset):
        train = None if split == "train" else _of_own(name, "train", image_shape, root)
        classes, number = (train.class_names, train.num_classes) if train else ((), None)
        result = Dataset.from_arrays(*result, name=where, class_names=classes, num_classes=number)
    result = check_shape(_checked(result, where), image_shape, where)
    return dataclasses.replace(result, name=name, split=split)


def _called(name, split, image_shape, root):
    """The result of the function module:NAME, a Dataset or a pair, and "FILE: NAME" for messages."""
    module, _, attribute = name.partition(":")
    signature = f"{attribute}(*, split, image_shape, data_dir)"
    try:
        function = names.find(name, {}, "data set")
    except ValueError as error:
        line = " ".join(str(error).split())
        if isinstance(error.__cause__, ModuleNotFoundError):
            line += names.nearest(module, _known_names(root))
        raise DataError(f"{line}; expected a function {signature}") from error
    where = f"{getattr(sys.modules[module], '__file__', module)}: {attribute}"
    try:
        inspect.signature(function).bind(split=split, image_shape=image_shape, data_dir=root)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}; expected a function {signature}") from error
    try:
        result = function(split=split, image_shape=image_shape, data_dir=root)
    except DataError:
        raise
    except Exception as error:  # any error of the user's function
        raise DataError(f"{names.place_of(error)}: {one_line(error)}") from error
    if isinstance(result, Dataset) or (isinstance(result, tuple) and len(result) == 2):
        return result, where
    raise DataError(
        f"{where} returns {_described(result)}, expected a Dataset or (images uint8 [N, H, W, C],"
        " labels int [N] or None)"
    )


def _checked(dataset, where):
    """The data set itself, after a check that its labels and first image are as `Dataset` says."""
    labels = dataset.labels
    if _described(labels) != f"int32 [{np.size(labels)}]" or not len(labels):
        raise DataError(f"{where}: labels is {_described(labels)}, expected int32 [N], N > 0")
    try:
        image = dataset.fetch(np.zeros(1, np.int64))
    except Exception as error:
        raise DataError(f"{names.place_of(error)}: fetch: {one_line(error)}") from error
    expected = f"uint8 {[1, *dataset.image_shape]}"
    if _described(image) != expected:
        raise DataError(f"{where}: fetch returns {_described(image)} for one, expected {expected}")
    return dataset


def _described(value):
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    length = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return type(value).__name__ + length


# Arguments.


def _known_names(root):
    return sorted({*BUILT_IN, "npz:", "image_folder:", *prepared.known_names(root)})


def _existing(kind, path):
    if not path:
        raise DataError(f"{kind} needs a path, as in {kind}:/home/me/pictures")
    what, found = "folder" if kind == "image_folder" else "file", _user_path(path)
    if not (found.is_dir() if what == "folder" else found.is_file()):
        raise DataError(
            f"{kind}: there is no {what} {found}; if it has moved, give its new path:"
            f" --data_dir=PATH for a trained run, --config.data.name={kind}:PATH to train"
        )
    return found


def _user_path(text) -> Path:
    return Path(os.path.expanduser(text))  # does not fail for ~nobody, unlike Path.expanduser


def check_image_shape(shape) -> tuple[int, int, int]:
    """An image_shape (height, width, channels), after a check.

    Raises:
        ValueError: it is something else.
    """
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sizes) != 3 or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise ValueError(f"image_shape is {shape!r:.80}, expected (height, width, channels)")
    return sizes


def _checked_colour(background):
    from PIL import ImageColor

    try:
        return (*ImageColor.getrgb(background)[:3], 255)
    except (ValueError, AttributeError):
        raise DataError(
            f"background is {background!r}, expected a colour such as white, black or #808080"
        ) from None
