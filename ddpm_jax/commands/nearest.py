"""Samples beside the training images nearest to them, to see whether the model has memorised.

python -m ddpm_jax.main --mode=nearest --workdir=runs/digits --num_samples=8
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Annotated

import numpy as np

from ddpm_jax import data, options
from ddpm_jax.commands import sampling as sampling_lib
from ddpm_jax.commands import shared
from ddpm_jax.commands.shared import DataDir, Images, Labels, Output, Seed
from ddpm_jax.ddpm import Sampling
from ddpm_jax.files import results, run_data, writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.options import AtLeast

BLOCK = 4096  # number of training images that are compared at once
ROWS = 20  # maximum number of samples in the picture


def nearest(
    run: Run,
    *,
    sampling: Sampling = Sampling(),
    num_samples: Annotated[int | None, "How many images to draw. Default: 8.", AtLeast(1)] = None,
    neighbours: Annotated[
        int, "How many training images to show beside each sample.", AtLeast(1)
    ] = 7,
    images: Annotated[
        str | None,
        "A folder of pictures or an .npz with images to use instead of samples. Default: samples are drawn.",
    ] = None,
    labels: Labels = "cycle",
    data_dir: DataDir = None,
    seed: Seed = 0,
    output: Output = Output(),
) -> str:
    """Shows samples beside the training images nearest to them.

    The distance is the root mean square difference of pixels. For comparison, it is also measured for the same number of
    test images, which the model has never seen. Ho et al. 2020 show nearest neighbours of face crops in their appendix.

    Returns:
      the path of the .npz: images uint8 [N, H, W, C], neighbours uint8 [N, K, H, W, C], index int64 [N, K] in the
      training split, distance float32 [N, K] on the scale 0 … 255.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    if output.out is not None:  # check the path before samples are drawn
        results.out_path(output.out, ".npz", run.workdir)
    settings = options.changed(sampling) | ({} if labels == "cycle" else {"labels": labels})
    if images is not None and settings:
        raise RunError(
            f"--{sorted(settings)[0]} is for samples, but with --images={images} none are drawn"
        )
    train = run_data.data_of(run, "train", data_dir)
    if neighbours > len(train):
        raise RunError(
            f"{neighbours} neighbours requested, but there are only {len(train)} training images"
        )
    if images is None:
        num_samples, drawing = num_samples or 8, dataclasses.replace(output, out=None)
        draw = functools.partial(sampling_lib.sample, run, sampling=sampling, labels=labels)
        with np.load(draw(num_samples=num_samples, seed=seed, output=drawing)) as file:
            queries, origin = file["images"][:num_samples], json.loads(str(file["recipe"]))
            origin["workdir"] = ""  # a run may be moved
    else:
        labels = "cycle" if run.method.num_classes else None  # labels do not affect distances
        which = Images(images=images, num_images=num_samples, labels=labels)
        loaded = shared.load_images(run, which, default=8)
        queries, origin = loaded.images, loaded.recipe
    num_samples = len(queries)
    unseen = _test_images(run, data_dir, len(queries))

    def make():
        index, distance = nearest_of(queries, train, neighbours)
        result = {"images": queries, "index": index, "distance": distance}
        result["neighbours"] = train.fetch(index.ravel()).reshape(*index.shape, *queries.shape[1:])
        if unseen is not None:
            result["distance_of_test"] = nearest_of(unseen, train, 1)[1][:, 0]
        return result

    recipe = {"seed": seed, "of": origin, "data": train.name, "neighbours": neighbours}
    recipe |= {"num_samples": num_samples, "data_sha256": train.digest()}
    test = None if unseen is None else hashlib.sha256(unseen.tobytes()).hexdigest()
    recipe |= {"test_sha256": test}
    settings |= {"images": images, "num_samples": num_samples, "neighbours": neighbours}
    name = run.name("nearest", f"seed{seed}", settings=settings)
    out, arrays = shared.write(run, "nearest", recipe, make, output, name)
    strip = np.concatenate([arrays["images"][:, None], arrays["neighbours"]], axis=1)[:ROWS]
    what = "sample" if images is None else "image"
    title = f"first column: each {what}; then the {neighbours} training images nearest to it"
    rows = [(title, strip.reshape(-1, *queries.shape[1:]))]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=1 + neighbours)
    mean = np.mean(arrays["distance"][:, 0])
    text = f"distance to the nearest training image {mean:.2f} on average"
    if "distance_of_test" in arrays:
        text += f", for test images {np.mean(arrays['distance_of_test']):.2f}"
    print(f"{text} (root mean square, 0 … 255)\n{out}, a picture in the .png beside it", flush=True)
    return out


def _test_images(run: Run, data_dir: str | None, count: int) -> np.ndarray | None:
    try:
        dataset = run_data.data_of(run, "test", data_dir)
    except data.DataError as error:  # such as a folder without test images
        print(f"no test images to compare with: {str(error).partition(';')[0]}", flush=True)
        return None
    return dataset.fetch(data.choose(len(dataset), count))


def nearest_of(queries: np.ndarray, dataset: data.Dataset, count: int):
    """Finds the `count` images of a data set that are nearest to each query.

    Args:
      queries: uint8 [N, H, W, C].

    Returns:
      positions in the data set, int64 [N, count], the nearest first; root mean square differences, float32 [N, count].
    """
    flat = queries.reshape(len(queries), -1).astype(np.float64)
    index, squares = (np.zeros((len(flat), 0), kind) for kind in (np.int64, np.float64))
    for first in range(0, len(dataset), BLOCK):
        rows = np.arange(first, min(first + BLOCK, len(dataset)))
        others = dataset.fetch(rows).reshape(len(rows), -1).astype(np.float64)
        distance = (flat**2).sum(1)[:, None] - 2 * flat @ others.T + (others**2).sum(1)[None, :]
        index = np.concatenate([index, np.broadcast_to(rows, distance.shape)], axis=1)
        squares = np.concatenate([squares, distance], axis=1)
        order = np.argsort(squares, axis=1, kind="stable")[:, :count]
        index, squares = (np.take_along_axis(values, order, axis=1) for values in (index, squares))
    return index, np.sqrt(np.maximum(squares, 0) / flat.shape[1]).astype(np.float32)
