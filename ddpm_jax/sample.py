"""Sampling from a run directory: as many images as one likes, restartable, image i always the same.

    python -m ddpm_jax.main --mode=sample --workdir=runs/digits --num_samples=64

Writes one .npz (images uint8 [N, H, W, C], labels if the model has classes, recipe) and a grid as .png.
While it runs, finished images stand in FILE.partial/, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zipfile

import jax
import numpy as np

from ddpm_jax import checkpoints, diffusion, parallel, training, writers
from ddpm_jax import config as config_lib
from ddpm_jax.ddpm import all_options, labels_of, make_method

GRID_LIMIT = 100  # images in the .png


class SampleError(RuntimeError):
    """No images can be drawn: one line with the reason and what to do."""


def load_run(workdir: str, weights: str = "ema"):
    """What a run directory holds: (config, Method, parameters on the host, step).

    Args:
      weights: "ema" or "raw".

    Raises:
      ConfigError, CheckpointError, SampleError: no run there, no checkpoint yet, or none to be read.
    """
    config = config_lib.load(os.path.join(workdir, "config.json"))
    method = make_method(config)
    tx, _ = training.optimizer_of(config)
    template = jax.eval_shape(lambda key: training.init_state(method, tx, key), jax.random.key(0))
    restored = checkpoints.restore(os.path.join(workdir, "checkpoints"), template)
    if restored is None:
        raise SampleError(f"{workdir} has no checkpoint yet; train first, or wait for one")
    state, step = restored
    return config, method, {"ema": state.ema_params, "raw": state.params}[weights], step


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
      seed: 0 … 2³² − 1; image i depends on it and on i, not on how many are drawn.
      batch_size: images at a time; it changes memory and speed, and an image by rounding at most.
      out: the .npz to write; None names it after step, weights, seed and options, in workdir/samples.
        Images that it already has by the same recipe are kept, and only further ones are drawn.
      options: of the Method's `make_sample`, such as variance="fixed_small"; None leaves the config's.

    Returns:
      the path of the .npz.

    Raises:
      ConfigError, CheckpointError, SampleError: one line that says what to do.
    """
    workdir = os.path.abspath(workdir)
    with config_lib.errors_at("sampling"):
        key = training.make_keys(seed).sample
    _, method, params, step = load_run(workdir, weights)
    chosen = {name: value for name, value in options.items() if value is not None}
    draw = config_lib.call("sampling", method.make_sample, chosen)
    name = [f"step_{step:08d}", weights, f"seed{seed}"]
    name += [f"{option}_{value}" for option, value in sorted(chosen.items())]
    out = os.path.abspath(out or os.path.join(workdir, "samples", f"{'_'.join(name)}.npz"))
    if not out.endswith(".npz"):
        raise SampleError(f"--out must end in .npz, got {out}")
    recipe = {
        "workdir": workdir,
        "step": step,
        "weights": weights,
        "weights_sha256": _sha256(params),
    }
    recipe |= {"seed": seed, **all_options(method.make_sample, chosen)}

    folder = f"{out}.partial"
    with checkpoints.lock(folder):
        growing = _GrowingFile(out, folder, recipe, method.image_shape)
        print(f"writing {out}\nrecipe: {json.dumps(recipe)}", flush=True)
        mapped = parallel.map_examples(lambda *args: diffusion.to_uint8(draw(*args)))
        params = parallel.place(params)
        num_samples = max(num_samples, growing.count)
        progress = writers.Progress("image", num_samples, growing.count, unit="images")
        while growing.count < num_samples:
            index = growing.count + np.arange(min(batch_size, num_samples))
            images = mapped(params, key, index, labels_of(method, index))
            growing.append(images[: num_samples - growing.count])
            progress.done = growing.count
            print(progress.line(), flush=True)
        images = growing.images()
        labels = {"labels": labels_of(method, np.arange(num_samples))} if method.num_classes else {}
        writers.save_npz(out, images=images, recipe=json.dumps(recipe), **labels)
        writers.save_png(f"{out[:-4]}.png", writers.grid(images[:GRID_LIMIT]))
        shutil.rmtree(folder)
    print(f"{num_samples} images in {out}, a grid in the .png beside it", flush=True)
    return out


def _sha256(params) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


class _GrowingFile:
    """Images 0 … count − 1 of a recipe, kept in a folder while the rest are drawn.

    The images are raw bytes in one file: whatever is whole in it after a kill is good. An .npz that is
    already there with the same recipe counts as drawn.
    """

    def __init__(self, out: str, folder: str, recipe: dict, image_shape: tuple[int, int, int]):
        self._path = os.path.join(folder, "images")
        self._shape = image_shape
        recipe_path = os.path.join(folder, "recipe.json")
        if os.path.exists(recipe_path):
            with open(recipe_path, encoding="utf-8") as file:
                self._check(folder, recipe, json.load(file))
        else:
            start = b""
            if os.path.exists(out):
                start = self._finished(out, recipe).tobytes()
            with open(self._path, "wb") as file:
                file.write(start)
            writers.save_text(recipe_path, json.dumps(recipe))  # last, and in one piece
        size = math.prod(image_shape)
        self.count = os.path.getsize(self._path) // size
        os.truncate(self._path, self.count * size)

    @staticmethod
    def _check(path: str, recipe: dict, there) -> None:
        if there != recipe:
            raise SampleError(f"{path} was made in another way; move it, or choose another --out")

    def _finished(self, out: str, recipe: dict) -> np.ndarray:
        there, images = None, None
        try:
            with np.load(out) as file:
                there, images = json.loads(str(file["recipe"])), file["images"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass  # not ours: there stays None
        self._check(out, recipe, there)
        return images

    def append(self, images: np.ndarray) -> None:
        with open(self._path, "ab") as file:
            file.write(images.tobytes())
        self.count += len(images)

    def images(self) -> np.ndarray:
        return np.fromfile(self._path, np.uint8).reshape(-1, *self._shape)
