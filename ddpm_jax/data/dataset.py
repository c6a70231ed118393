"""The `Dataset`: images, labels and class names, with checks of arrays and one-line errors."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

NO_LABEL = -1


class DataError(RuntimeError):
    """A mistake in the data or their description. One line: what is wrong, what was expected, what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """N images with labels, in memory or decoded on demand.

    Attributes:
        name: the argument of `load`.
        split: "train", "test", …
        image_shape: (H, W, C).
        num_classes: number of classes of the training split; 0 if it has no labels.
        labels: int32 [N]; −1 for an image without a label, for example in a test split without labels;
            all zeros if num_classes is 0.
        fetch: a function of indices, int64 [B] in 0..N-1, that returns uint8 [B, H, W, C]. It is called
            from several threads.
        images: uint8 [N, H, W, C] if they are in memory, otherwise None.
        class_names: the names of classes 0, 1, …; empty if unknown.
        left_out: one line for each kind of file that was not read, with the reason.
        files: SHA-256 of the names and sizes of the files; empty for arrays.

    >>> images = np.zeros((10, 8, 8), np.uint8)
    >>> dataset = dj.Dataset.from_arrays(images, labels=np.arange(10) % 2, class_names=["cat", "dog"])
    >>> dataset.image_shape, dataset.num_classes, len(dataset)
    ((8, 8, 1), 2, 10)
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

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        name: str = "arrays",
        split: str = "train",
        class_names: Sequence[str] = (),
        num_classes: int | None = None,
    ) -> "Dataset":
        """A data set of arrays in memory. Images are not copied.

        Args:
            images: uint8 [N, H, W] or [N, H, W, C].
            labels: integers 0, 1, … [N]; None for images without labels.
            class_names: the names of classes 0, 1, …
            num_classes: number of classes of the training split; by default that of class_names, or one more
                than the largest label. Larger labels become −1.

        Raises:
            DataError: arrays of another type or shape.
        """
        images = check_images(images, f"{name}: images")
        class_names = tuple(map(str, class_names))
        if labels is not None:
            labels = check_labels(labels, f"{name}: labels", len(images))
        if num_classes is None:
            found = [] if labels is None else labels
            num_classes = count_classes(found, class_names, name) or len(class_names)
        if labels is None:
            labels = np.full(len(images), NO_LABEL)
        labels = labels.astype(np.int64) * (num_classes > 0)  # uint8 has no −1
        labels = np.where(labels < max(num_classes, 1), labels, NO_LABEL).astype(np.int32)
        images = images.reshape(*images.shape[:3], -1)
        shape, fetch = images.shape[1:], images.__getitem__
        return cls(name, split, shape, num_classes, labels, fetch, images, class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """A hash of the names and sizes of the files, or of the pixels of arrays; independent of the folder."""
        return self.files or self.digest()

    def digest(self) -> str:
        """SHA-256 of all images, in order."""
        sha256 = hashlib.sha256()
        for first in range(0, len(self), 1000):
            rows = np.arange(first, min(first + 1000, len(self)))
            sha256.update(np.ascontiguousarray(self.fetch(rows)))
        return sha256.hexdigest()

    def describe(self) -> str:
        """One line for the log, such as `digits/train: 1500 images 8×8×1, 10 classes, …`."""
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        source = "in memory" if self.images is not None else "decoded on demand"
        shape = times(self.image_shape)
        return f"{self.name}/{self.split}: {len(self)} images {shape}, {classes}, uint8, {source}"


def renumbered(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """The data set with its classes numbered in the order of these names; other classes become −1."""
    names = tuple(class_names)
    if not dataset.class_names or names == dataset.class_names:
        return dataset
    number = {name: i for i, name in enumerate(names)}
    table = np.array([number.get(name, NO_LABEL) for name in dataset.class_names], np.int32)
    labels = np.where(dataset.labels < 0, NO_LABEL, table[dataset.labels])
    return dataclasses.replace(dataset, labels=labels, num_classes=len(names), class_names=names)


def image_digests(images: np.ndarray) -> np.ndarray:
    """The first 16 bytes of the SHA-256 of each image: uint8 [N, 16] from uint8 [N, H, W, C]."""
    digests = [hashlib.sha256(np.ascontiguousarray(image)).digest()[:16] for image in images]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


# Checks of arrays.


def check_images(images, where: str, remedy: str = "pass") -> np.ndarray:
    """Converts images to an array and checks that it is uint8 [N, H, W] or [N, H, W, C].

    Args:
        where: what the images are, for messages.
        remedy: verb for what to do with scaled images, such as "pass" or "save".

    Raises:
        DataError: they are not; the message for floats says how to scale them.
    """
    images = _array(images, where)
    where = f"{where} is {images.dtype} {list(images.shape)}"
    if images.ndim not in (3, 4) or images.size == 0:
        raise DataError(f"{where}, expected [N, H, W] or [N, H, W, C] with at least one image")
    if images.dtype.kind not in "biuf":
        raise DataError(f"{where}, expected uint8 in 0..255")
    if images.dtype != np.uint8:
        low, high = float(images.min()), float(images.max())
        scaled = "(x + 1) * 127.5" if low < 0 else "x * 255" if high <= 1 else "x"
        raise DataError(
            f"{where} in {low:.3g}..{high:.3g}, expected uint8 in 0..255; if that is its range, "
            f"{remedy} numpy.rint({scaled}).astype(numpy.uint8)"
        )
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise DataError(f"{where}, expected channels last; transpose with (0, 2, 3, 1)")
    return images


def check_labels(labels, where: str, count: int, of: str = "") -> np.ndarray:
    """Converts labels to an array [count] and checks that it holds integers ≥ 0.

    Args:
        where: what the labels are, for messages.
        of: " of …", what the images are, for messages.

    Raises:
        DataError: one line.
    """
    labels = _array(labels, where)
    flat = labels.reshape(-1)
    if len(flat) != count or flat.dtype.kind not in "iu" or flat.min() < 0:
        raise DataError(
            f"{where} is {labels.dtype} {list(labels.shape)}, expected one "
            f"class 0, 1, … (an integer) for each of the {count} images{of}"
        )
    return flat


def count_classes(labels, class_names: Sequence[str], where) -> int:
    """The number of classes: that of the names, or one more than the largest label; 0 without labels."""
    needed = 1 + int(np.max(labels)) if len(labels) else 0
    if class_names and len(class_names) < needed:
        raise DataError(f"{where}: {len(class_names)} class_names for {needed} classes")
    return max(needed, len(class_names)) if needed else 0


def check_shape(dataset: Dataset, image_shape, where: str) -> Dataset:
    """The data set itself, after a check that its images have the shape `image_shape`, unless that is None."""
    found = dataset.image_shape
    if image_shape not in (None, found):
        raise DataError(
            f"{where} holds images {times(found)}, but the config asks for {times(image_shape)}; "
            f"arrays are not resized: set {shape_option(found)}"
        )
    return dataset


def _array(values, where: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except Exception as error:  # for example ValueError for ragged lists
        raise DataError(f"{where} is not an array: {one_line(error)}") from error


# Parts of messages.


def no_split(where, split: str, splits: Iterable[str]) -> DataError:
    """The error for a split that a data set does not have."""
    splits = list(splits)
    first = next((part for part in ("test", "val", "validation") if part in splits), splits[0])
    return DataError(
        f"{where} has no split {split!r}; it has {', '.join(splits)}; choose one, such as --split={first}"
    )


def times(shape: Sequence[int]) -> str:
    """A shape as text, such as 28×28×1."""
    return "×".join(map(str, shape))


def shape_option(shape: Sequence[int]) -> str:
    """The command-line option that sets this image_shape."""
    return f"--config.data.image_shape={','.join(map(str, shape))}"


def one_line(error: BaseException) -> str:
    """The type and message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
