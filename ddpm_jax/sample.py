"""Sampling from a run directory: as many images as one likes, restartable, image i always the same.

    python -m ddpm_jax.main --mode=sample --workdir=runs/digits --num_samples=64

Writes one .npz (images uint8 [N, H, W, C], labels if the model has classes, recipe) and a grid as .png.
While it runs, finished images stand in FILE.partial, and the same command goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import zipfile

import jax
import numpy as np

from ddpm_jax import checkpoints, diffusion, parallel, training, writers
from ddpm_jax import config as config_lib
from ddpm_jax.ddpm import Method, make_method

GRID_LIMIT = 100  # images in the .png


class SampleError(RuntimeError):
    """No images can be drawn: one line with the reason and what to do."""


def load_run(workdir: str, weights: str = "ema"):
    """What a run directory holds: (config, Method, parameters on the devices, step).

    Args:
      weights: "ema" or "raw".

    Raises:
      ConfigError, CheckpointError: no run there, no checkpoint yet, or none that can be read.
    """
    config = config_lib.load(os.path.join(workdir, "config.json"))
    method = make_method(config)
    tx, _ = config_lib.call(
        "config.optimizer",
        training.make_optimizer,
        config.optimizer,
        num_steps=config.training.num_steps,
    )
    template = jax.eval_shape(lambda key: training.init_state(method, tx, key), jax.random.key(0))
    restored = checkpoints.restore(os.path.join(workdir, "checkpoints"), template)
    if restored is None:
        raise SampleError(f"{workdir} has no checkpoint yet; train first, or wait for one")
    state, step = restored
    return (
        config,
        method,
        parallel.place({"ema": state.ema_params, "raw": state.params}[weights]),
        step,
    )


def sample(
    workdir: str,
    *,
    num_samples: int = 64,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int = 64,
    out: str | None = None,
    **options,
) -> str:
    """Draws images 0 … num_samples − 1 of a seed from the last checkpoint of a run.

    Args:
      workdir: the run directory; its config is the truth.
      weights: "ema" or "raw".
      batch_size: images at a time; it changes memory and speed, never an image.
      out: the .npz to write; None names it after step, weights and seed, in workdir/samples.
      options: of the Method's `sample`, such as variance="fixed_small"; None leaves the config's.

    Returns:
      the path of the .npz.

    Raises:
      ConfigError, CheckpointError, SampleError: one line that says what to do.
    """
    workdir = os.path.abspath(workdir)
    config, method, params, step = load_run(workdir, weights)
    options = {name: value for name, value in options.items() if value is not None}
    given = ("params", "key", "index", "label")
    config_lib.arguments("sampling", method.sample, options, given)
    name = "_".join(
        [
            f"step_{step:08d}",
            weights,
            f"seed{seed}",
            *(f"{k}_{v}" for k, v in sorted(options.items())),
        ]
    )
    out = os.path.abspath(out or os.path.join(workdir, "samples", f"{name}.npz"))
    if not out.endswith(".npz"):
        raise SampleError(f"--out must end in .npz, got {out}")
    recipe = {
        "workdir": workdir,
        "step": step,
        "weights": weights,
        "seed": seed,
        "clip_x0": config.diffusion.clip_x0,
        "variance": config.diffusion.variance,
        "num_timesteps": config.schedule.num_timesteps,
        **options,
    }
    print(f"writing {out}\nrecipe: {json.dumps(recipe)}", flush=True)

    growing = _GrowingFile(out, recipe, method.image_shape)
    draw = parallel.map_examples(lambda *a: diffusion.to_uint8(method.sample(*a, **options)))
    progress = writers.Progress("image", num_samples, growing.count, unit="images")
    remaining = max(num_samples - growing.count, 1)
    even = -(-remaining // -(-remaining // batch_size))  # equal batches: one compilation
    while growing.count < num_samples:
        index = np.arange(growing.count, growing.count + even)
        drawn = draw(params, jax.random.key(seed), index, labels_of(method, index))
        growing.append(drawn[: num_samples - growing.count])
        progress.done = growing.count
        print(progress.line(), flush=True)
    images = growing.images()[:num_samples]
    labels = {"labels": labels_of(method, np.arange(num_samples))} if method.num_classes else {}
    writers.save_npz(out, images=images, recipe=json.dumps(recipe), **labels)
    writers.save_png(f"{out[:-4]}.png", writers.grid(images[:GRID_LIMIT]))
    growing.remove()
    print(f"wrote {out} and its .png", flush=True)
    return out


def labels_of(method: Method, index: np.ndarray) -> np.ndarray:
    """The classes in turn, int32 [N]; zeros for a model without."""
    return (index % max(method.num_classes, 1)).astype(np.int32)


class _GrowingFile:
    """Images 0 … count − 1 of a recipe, kept in OUT.partial while the rest are drawn.

    The file holds raw bytes: whatever is whole in it after a kill is good. An .npz that is already
    there with the same recipe counts as drawn.
    """

    def __init__(self, out: str, recipe: dict, image_shape: tuple[int, int, int]):
        self._path, self._recipe_path, self._shape = (
            f"{out}.partial",
            f"{out}.partial.json",
            image_shape,
        )
        os.makedirs(os.path.dirname(out), exist_ok=True)
        start = np.empty((0, *image_shape), np.uint8)
        if os.path.exists(out):
            start = self._finished(out, recipe)
        if not os.path.exists(self._recipe_path) or self._saved_recipe() != recipe:
            with open(self._path, "wb") as file:
                file.write(start.tobytes())
            with open(self._recipe_path, "w", encoding="utf-8") as file:
                json.dump(recipe, file)
        self.count = os.path.getsize(self._path) // math.prod(image_shape)
        os.truncate(self._path, self.count * math.prod(image_shape))

    def _saved_recipe(self):
        with open(self._recipe_path, encoding="utf-8") as file:
            try:
                return json.load(file)
            except json.JSONDecodeError:
                return None

    @staticmethod
    def _finished(out: str, recipe: dict) -> np.ndarray:
        try:
            with np.load(out) as file:
                if json.loads(str(file["recipe"])) == recipe:
                    return file["images"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass
        raise SampleError(
            f"{out} exists and was made in another way; move it, or choose another --out"
        )

    def append(self, images: np.ndarray) -> None:
        with open(self._path, "ab") as file:
            file.write(images.tobytes())
        self.count += len(images)

    def images(self) -> np.ndarray:
        return np.fromfile(self._path, np.uint8).reshape(-1, *self._shape)

    def remove(self) -> None:
        os.remove(self._path)
        os.remove(self._recipe_path)
