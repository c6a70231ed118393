"""Sampling from a run directory: as many images as one likes, restartable, image i always the same.

    python -m ddpm_jax.main --mode=sample --workdir=runs/digits --num_samples=64
    python -m ddpm_jax.main --mode=progressive --workdir=runs/digits

The first writes one .npz (images uint8 [N, H, W, C], labels if the model has classes, recipe) and a grid
as .png. While it runs, finished images stand in FILE.partial/, and the same command goes on from there.
The second writes what the model takes the image for on the way, Ho et al. Figure 6.
"""

from __future__ import annotations

import json
import math
import os

import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, parallel, runs, training, writers
from ddpm_jax.ddpm import all_options, labels_of

GRID_LIMIT = 100  # images in the .png
GRID_ROWS = 20  # images in the progressive strip
FRAMES = 12  # its columns


def sample(
    workdir: str,
    *,
    num_samples: int = 64,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> str:
    """Draws images 0 … num_samples − 1 of a seed from the last checkpoint of a run.

    Args:
      workdir: the run directory; its config is the truth.
      weights: "ema" or "raw".
      seed: 0 … 2³² − 1; image i depends on it and on i, not on how many are drawn.
      batch_size: images at a time; it changes memory and speed, and an image by rounding at most.
      out: the .npz to write; None names it after step, weights, seed and options, in workdir/samples.
        Images that it already has by the same recipe are kept, and only further ones are drawn.
      options: of the Method's `make_sample`, such as variance="fixed_small"; None leaves the config's.

    Returns:
      the path of the .npz.

    Raises:
      ConfigError, CheckpointError, RunError: one line that says what to do.
    """
    run, draw, recipe, out = _prepare(workdir, weights, seed, out, options)
    key = training.make_keys(seed).sample
    with runs.in_progress(out, recipe) as (folder, finished):
        growing = _GrowingFile(folder, run.method.image_shape, finished)
        print(f"writing {out}\nrecipe: {json.dumps(recipe)}", flush=True)
        mapped = parallel.map_examples(lambda *args: diffusion.to_uint8(draw(*args)))
        params = parallel.place(run.params)
        batch_size = batch_size or parallel.examples_at_once()
        num_samples = max(num_samples, growing.count)
        progress = writers.Progress("image", num_samples, growing.count, unit="images")
        while growing.count < num_samples:
            index = growing.count + np.arange(min(batch_size, num_samples))
            images = mapped(params, key, index, labels_of(run.method, index))
            growing.append(images[: num_samples - growing.count])
            progress.done = growing.count
            print(progress.line(), flush=True)
        images = growing.images()
        labels = labels_of(run.method, np.arange(num_samples))
        labels = {"labels": labels} if run.method.num_classes else {}
        writers.save_npz(out, images=images, recipe=json.dumps(recipe), **labels)
        writers.save_png(f"{out[:-4]}.png", writers.grid(images[:GRID_LIMIT]))
    print(f"{num_samples} images in {out}, a grid in the .png beside it", flush=True)
    return out


def progressive(
    workdir: str,
    *,
    num_samples: int = 8,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> str:
    """Writes x̂_0(x_t) at `FRAMES` times of the chain, one row for each image; Ho et al. 2020, Figure 6.

    The images are 0 … num_samples − 1 that `sample` draws with the same arguments. The .npz holds t
    int32 [K], x_t float32 and x_0 uint8 [N, K, H, W, C], the images uint8 [N, H, W, C] and the recipe.

    Returns, Raises: as `sample`.
    """
    options["frames"] = FRAMES
    name = ("progressive", f"{num_samples}images")
    run, draw, recipe, out = _prepare(workdir, weights, seed, out, options, *name)
    recipe["num_samples"] = num_samples
    key, shape = training.make_keys(seed).sample, run.method.image_shape
    with runs.in_progress(out, recipe):
        print(f"writing {out}\nrecipe: {json.dumps(recipe)}", flush=True)
        mapped, params = parallel.map_examples(draw), parallel.place(run.params)
        batch_size = min(batch_size or parallel.examples_at_once(), num_samples)
        progress = writers.Progress("image", num_samples, 0, unit="images")
        parts = []
        for first in range(0, num_samples, batch_size):
            index = first + np.arange(batch_size)
            x, frames = mapped(params, key, index, labels_of(run.method, index))
            images, x_0 = (np.asarray(diffusion.to_uint8(values)) for values in (x, frames.x_0))
            parts.append({"images": images, "x_t": frames.x_t, "x_0": x_0})
            progress.done = min(first + batch_size, num_samples)
            print(progress.line(), flush=True)
        arrays = {k: np.concatenate([part[k] for part in parts])[:num_samples] for k in parts[0]}
        t = frames.t[0]
        writers.save_npz(out, **arrays, t=t, recipe=json.dumps(recipe))
        strip = writers.grid(arrays["x_0"][:GRID_ROWS].reshape(-1, *shape), columns=len(t))
        writers.save_png(f"{out[:-4]}.png", strip)
    print(f"x_0 as seen from t = {', '.join(map(str, t))}: {out[:-4]}.png", flush=True)
    return out


def _prepare(workdir, weights, seed, out, options, *name):
    """The run, its compiled sampler, the recipe of its images and the .npz they go to."""
    with config_lib.errors_at("sampling"):
        training.make_keys(seed)
    run = runs.load(workdir, weights)
    chosen = runs.given(options)
    given, said = runs.with_errors(run, chosen)
    draw = config_lib.call("sampling", run.method.make_sample, given)
    recipe = run.recipe() | {"seed": seed} | all_options(run.method.make_sample, said)
    if out is None:
        file = run.name(*name, f"seed{seed}", **chosen)
        out = os.path.join(run.workdir, "samples", f"{file}.npz")
    if not out.endswith(".npz"):
        raise runs.RunError(f"--out must end in .npz, got {out}")
    return run, draw, recipe, os.path.abspath(out)


class _GrowingFile:
    """Images 0 … count − 1, kept in a folder while the rest are drawn.

    They are raw bytes in one file: whatever is whole in it after a kill is good.
    """

    def __init__(self, folder: str, image_shape: tuple[int, int, int], finished: dict | None):
        self._path = os.path.join(folder, "images")
        self._shape = image_shape
        if not os.path.exists(self._path):
            start = finished["images"].tobytes() if finished else b""
            writers.save_bytes(self._path, start)
        size = math.prod(image_shape)
        self.count = os.path.getsize(self._path) // size
        os.truncate(self._path, self.count * size)

    def append(self, images: np.ndarray) -> None:
        with open(self._path, "ab") as file:
            file.write(images.tobytes())
        self.count += len(images)

    def images(self) -> np.ndarray:
        return np.fromfile(self._path, np.uint8).reshape(-1, *self._shape)
