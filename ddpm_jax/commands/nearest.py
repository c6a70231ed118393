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

from ddpm_jax import augmentation, data, options
from ddpm_jax.commands import sampling as sampling_lib
from ddpm_jax.commands import shared
from ddpm_jax.commands.shared import DataDir, Images, Labels, Output, Seed
from ddpm_jax.ddpm import Sampling
from ddpm_jax.files import results, run_data
from ddpm_jax.files.neighbours import nearest_of, save_picture
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.options import AtLeast


def nearest(
    run: Run,
    *,
    sampling: Sampling = Sampling(),
    num_samples: Annotated[int | None, "How many images to draw. Default: 8.", AtLeast(1)] = None,
    neighbours: Annotated[
        int | None,
        "How many training images to show beside each sample. Default: 7, or all if there are fewer.",
        AtLeast(1),
    ] = None,
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

    The distance is the root mean square difference of pixels, the least over the changes of config.data.flip and shift. For
    comparison, it is also measured for as many test images. Ho et al. 2020 show nearest neighbours in their appendix.

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
    neighbours = neighbours or min(7, len(train))
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
    num_samples, changes = len(queries), augmentation.of(run.config.data)
    unseen = _test_images(run, data_dir, len(queries))

    def make(folder):
        del folder  # quickly done again
        index, distance = nearest_of(queries, train, neighbours, **changes)
        result = {"images": queries, "index": index, "distance": distance}
        result["neighbours"] = train.fetch(index.ravel()).reshape(*index.shape, *queries.shape[1:])
        if unseen is not None:
            result["distance_of_test"] = nearest_of(unseen, train, 1, **changes)[1][:, 0]
        return result

    recipe = {"seed": seed, "of": origin, "data": train.name, "neighbours": neighbours}
    recipe |= {"num_samples": num_samples, "data_sha256": train.digest()}
    test = None if unseen is None else hashlib.sha256(unseen.tobytes()).hexdigest()
    recipe |= {"test_sha256": test} | ({"changes": changes} if any(changes.values()) else {})
    settings |= {"images": images, "num_samples": num_samples, "neighbours": neighbours}
    name = run.name("nearest", f"seed{seed}", settings=settings)
    out, arrays = shared.write(run, "nearest", recipe, make, output, name)
    what = "sample" if images is None else "image"
    save_picture(f"{out[:-4]}.png", arrays["images"], arrays["neighbours"], what)
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
