"""The training images nearest to given images, and a picture of both."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ddpm_jax import data
from ddpm_jax.files import writers

BLOCK = 4096  # number of training images that are compared at once
ROWS = 20  # maximum number of images in the picture


def nearest_of(
    queries: np.ndarray, dataset: data.Dataset, count: int, *, flip: bool = False, shift: int = 0
):
    """Finds the `count` images of a data set that are nearest to each query.

    Args:
      queries: uint8 [N, H, W, C].
      flip, shift: the changes of `augmentation.augmented` that training used: the least distance over all of them counts, so that
        the copy of a mirrored image is near to it.

    Returns:
      positions in the data set, int64 [N, count], the nearest first; root mean square differences, float32 [N, count].
    """
    changed = [
        one.reshape(len(one), -1).astype(np.float64) for one in _changes(queries, flip, shift)
    ]
    index, squares = (np.zeros((len(queries), 0), kind) for kind in (np.int64, np.float64))
    for first in range(0, len(dataset), BLOCK):
        rows = np.arange(first, min(first + BLOCK, len(dataset)))
        others = dataset.fetch(rows).reshape(len(rows), -1).astype(np.float64)
        lengths, distance = (others**2).sum(1)[None, :], np.inf
        for flat in changed:
            square = (flat**2).sum(1)[:, None] - 2 * flat @ others.T + lengths
            distance = np.minimum(distance, square)
        index = np.concatenate([index, np.broadcast_to(rows, distance.shape)], axis=1)
        squares = np.concatenate([squares, distance], axis=1)
        order = np.argsort(squares, axis=1, kind="stable")[:, :count]
        index, squares = (np.take_along_axis(values, order, axis=1) for values in (index, squares))
    pixels = queries[0].size
    return index, np.sqrt(np.maximum(squares, 0) / pixels).astype(np.float32)


def _changes(images: np.ndarray, flip: bool, shift: int) -> Iterator[np.ndarray]:
    """The images [N, H, W, C], mirrored and moved in every way that training may have used."""
    height, width = images.shape[1:3]
    for one in (images, images[:, :, ::-1])[: 1 + flip]:
        wide = np.pad(one, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
        for top in range(2 * shift + 1):
            for left in range(2 * shift + 1):
                yield wide[:, top : top + height, left : left + width]


def save_picture(path: str, images: np.ndarray, neighbours: np.ndarray, what: str) -> None:
    """Writes a picture with a row for each image, uint8 [N, H, W, C]: the image, then its neighbours [N, K, H, W, C]."""
    strip = np.concatenate([images[:, None], neighbours], axis=1)[:ROWS]
    count = neighbours.shape[1]
    nearest = f"the {count} training image{'s' if count > 1 else ''} nearest to it"
    title = f"first column: each {what}; then {nearest}"
    rows = [(title, strip.reshape(-1, *images.shape[1:]))]
    writers.save_grids(path, rows, columns=1 + count)


def save_beside(path: str, samples: np.ndarray, dataset: data.Dataset, **changes) -> str:
    """Writes a picture of samples beside the training images nearest to them, up to seven.

    Args:
      changes: flip and shift, see `nearest_of`.

    Returns:
      a line with the mean distance.
    """
    count = min(7, len(dataset))
    index, distance = nearest_of(samples[:ROWS], dataset, count, **changes)
    found = dataset.fetch(index.ravel()).reshape(*index.shape, *samples.shape[1:])
    save_picture(path, samples[:ROWS], found, "sample")
    return f"{path}: samples beside their nearest training images, {distance_text(distance)}"


def distance_text(distance: np.ndarray) -> str:
    """The mean distance to the nearest neighbour in words, from distances [N, K]."""
    mean = np.mean(distance[:, 0])
    return f"at a distance of {mean:.2f} on average (root mean square, 0 … 255)"
