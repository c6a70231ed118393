"""Sampling from a run directory: as many images as one likes, restartable, image i always the same.

    python -m ddpm_jax.main --mode=sample --workdir=runs/digits --num_samples=64
    python -m ddpm_jax.main --mode=sample --workdir=runs/digits --sampler=dpm_solver --steps=20 --trajectory
    python -m ddpm_jax.main --mode=progressive --workdir=runs/digits

The first writes one .npz (images uint8 [N, H, W, C], labels if the model has classes, recipe) and a grid
as .png. While it runs, finished images stand in FILE.partial/, and the same command goes on from there.
`--trajectory` adds the chain of the first images as a strip and as an animation. The third writes what
the model takes the image for on the way, Ho et al. Figure 6.
"""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, parallel, runs, schedules, training, writers
from ddpm_jax.ddpm import all_options, labels_of

GRID_LIMIT = 100  # images in the .png
GRID_ROWS = 20  # images in the progressive strip
FRAMES = 12  # its columns, and those of a trajectory
TRAJECTORY_IMAGES = 8
ANIMATION_FRAMES = 48


def sample(
    workdir: str,
    *,
    num_samples: int | None = None,
    labels: str = "cycle",
    latents: str | None = None,
    trajectory: bool = False,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> str:
    """Draws images 0 … num_samples − 1 of a seed from the last checkpoint of a run.

    Args:
      workdir: the run directory; its config is the truth.
      num_samples: how many; None for 64, or for all latents.
      labels: of a model with classes, by number or by name; see `labels_of` and `runs.class_numbers`.
        They are saved beside the images, with the names of the classes as class_names.
      latents: an .npz that `edit.encode` wrote, to be decoded in place of noise, with its labels; by DDIM
        with the steps and guidance that it was encoded with unless told otherwise.
      trajectory: also write the chains of the first `TRAJECTORY_IMAGES` images, x_t and x̂_0, as a strip
        OUT_trajectory.png and an animation .gif.
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
    start, name, about = None, (), {}
    if latents is not None:
        latents = config_lib.path(latents)
        if labels != "cycle":
            raise runs.RunError(f"the labels are those of --latents={latents}; leave out --labels")
        start, of_latents, about = _read_latents(latents)
        options = of_latents | runs.given(options)
        name = ("latents", about["latents_sha256"][:8])
        num_samples = num_samples or len(start)
        if num_samples > len(start):
            raise runs.RunError(
                f"{num_samples} samples asked of the {len(start)} latents in {latents}"
            )
    num_samples = num_samples or 64
    named = out is not None
    run, draw, recipe, out, labels = _prepare(workdir, weights, seed, labels, out, options, *name)
    if start is not None and start.shape[1:] != run.method.image_shape:
        raise runs.RunError(
            f"{latents} holds latents {start.shape[1:]}, and this model has {run.method.image_shape}"
        )
    if start is not None:
        recipe["latents_sha256"], recipe["labels"] = about["latents_sha256"], "of the latents"
        with config_lib.errors_at("--latents"):
            chosen = about["labels"] if run.method.num_classes else "cycle"
            about["labels"] = labels_of(run.method, np.arange(len(start)), chosen)
        last = _last_time(run, options)
        if about["last"] is not None and about["last"] != last:
            raise runs.RunError(
                f"{latents} holds x_t of t = {about['last']}, and these steps begin at t = {last}; choose"
                " steps and spacing that begin there"
            )
    key = training.make_keys(seed).sample

    def inputs(index):
        chosen = about["labels"][index] if about else labels_of(run.method, index, labels, key=key)
        return index, chosen, *(() if start is None else (start[index],))

    with runs.in_progress(out, recipe, named=named) as (folder, finished):
        growing = runs.GrowingFile(os.path.join(folder, "images"), run.method.image_shape, np.uint8)
        if finished and not growing.count:
            growing.append(finished["images"])
        if growing.count:
            print(f"{growing.count} images of this recipe are there already", flush=True)
        params, mapped = None, None
        batch_size = batch_size or parallel.examples_at_once()
        num_samples = max(num_samples, growing.count)
        progress = writers.Progress("image", num_samples, growing.count, unit="images")
        while growing.count < num_samples:
            index = growing.count + np.arange(min(batch_size, num_samples))
            index = index if start is None else np.minimum(index, len(start) - 1)
            batch = inputs(index)
            if mapped is None:
                params = parallel.place(run.params)
                function = lambda *args: runs.drawn(draw(*args))  # noqa: E731
                mapped = runs.compiled(function, progress, params, key, *batch)
            images, finite = mapped(params, key, *batch)
            runs.check_finite(finite, recipe)
            growing.append(images[: num_samples - growing.count])
            progress.done = growing.count
            progress.show()
        images = growing.rows()
        arrays = {"labels": inputs(np.arange(num_samples))[1]} if run.method.num_classes else {}
        if run.method.num_classes and run.class_names:
            arrays["class_names"] = np.array(run.class_names)
        writers.save_npz(out, images=images, recipe=json.dumps(recipe), **arrays)
        writers.save_png(f"{out[:-4]}.png", writers.grid(images[:GRID_LIMIT]))
    if trajectory:
        index = np.arange(min(num_samples, TRAJECTORY_IMAGES))
        _save_trajectory(run, key, inputs(index), options, out)
    print(f"{num_samples} images in {out}, a grid in the .png beside it", flush=True)
    return out


def _save_trajectory(run, key, examples, options, out) -> None:
    """x_t over x̂_0 at `FRAMES` times as a strip, and at `ANIMATION_FRAMES` as an animation."""
    given, _ = runs.with_errors(run, runs.given(options) | {"frames": ANIMATION_FRAMES})
    draw = config_lib.call("sampling", run.method.make_sample, given)
    x, frames = runs.map_images(run, draw, key, *examples)
    runs.check_finite(np.isfinite(x).all(axis=(1, 2, 3)), options)
    x_t, x_0, last = (np.asarray(diffusion.to_uint8(v)) for v in (frames.x_t, frames.x_0, x))
    t, rows = frames.t[0], []
    columns = np.unique(np.round(np.linspace(0, len(t) - 1, FRAMES)).astype(int))
    for n in range(len(last)):
        rows += [*x_t[n, columns], *x_0[n, columns]]
    title = f"above x_t, below x_0 as seen from it, at t = {', '.join(map(str, t[columns]))}"
    path = f"{out[:-4]}_trajectory"
    writers.save_grids(f"{path}.png", [(title, np.stack(rows))], columns=len(columns))
    width = max(1, len(last) // 2)
    pictures = []
    for k in range(len(t) + 1):
        parts = (x_t[:, k], x_0[:, k]) if k < len(t) else (last, last)
        grids = [writers.grid(part, columns=width) for part in parts]
        pictures.append(np.concatenate(grids, axis=1))
    writers.save_animation(f"{path}.gif", pictures)
    print(f"the chain of {len(last)} images: {path}.png, .gif", flush=True)


def _read_latents(path: str):
    """The latents of an .npz, the options that they are to be decoded with, and what a recipe says of them."""
    arrays = runs.read_npz(path)
    try:
        latents, there = arrays["latents"], json.loads(str(arrays["recipe"]))
        if not len(latents) == len(arrays["labels"]) > 0:
            raise ValueError
    except (KeyError, ValueError):
        line = f"{path} holds no latents with labels and recipe; --mode=encode writes such a file"
        raise runs.RunError(line) from None
    shared = ("steps", "spacing", "clip_x0", "guidance")
    options = {name: there[name] for name in shared if there.get(name) is not None}
    digest = hashlib.sha256(latents.tobytes() + arrays["labels"].tobytes()).hexdigest()
    about = {"latents_sha256": digest, "labels": arrays["labels"], "last": there.get("last")}
    return latents, {"sampler": "ddim", **options}, about


def _last_time(run, options) -> int:
    """The time that a chain of these options begins at."""
    chain = {"spacing": options.get("spacing")}
    chain = schedules.shorten(run.method.diffusion.schedule, options.get("steps"), **chain)
    return int(chain.timesteps[-1])


def progressive(
    workdir: str,
    *,
    num_samples: int = 8,
    labels: str = "cycle",
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
    name, named = ("progressive", f"{num_samples}images"), out is not None
    run, draw, recipe, out, labels = _prepare(workdir, weights, seed, labels, out, options, *name)
    recipe["num_samples"] = num_samples
    key, shape = training.make_keys(seed).sample, run.method.image_shape
    with runs.in_progress(out, recipe, named=named):
        index = np.arange(num_samples)
        examples = (index, labels_of(run.method, index, labels, key=key))
        x, frames = runs.map_images(run, draw, key, *examples, batch_size=batch_size)
        runs.check_finite(np.isfinite(x).all(axis=(1, 2, 3)), recipe)
        images, x_0 = (np.asarray(diffusion.to_uint8(values)) for values in (x, frames.x_0))
        t = frames.t[0]
        arrays = {"images": images, "x_t": frames.x_t, "x_0": x_0, "t": t}
        arrays |= {"labels": examples[1]} if run.method.num_classes else {}
        writers.save_npz(out, **arrays, recipe=json.dumps(recipe))
        strip = writers.grid(x_0[:GRID_ROWS].reshape(-1, *shape), columns=len(t))
        writers.save_png(f"{out[:-4]}.png", strip)
    print(f"x_0 as seen from t = {', '.join(map(str, t))}: {out[:-4]}.png", flush=True)
    return out


def _prepare(workdir, weights, seed, labels, out, options, *name):
    """The run, its sampler, the recipe of its images, the .npz they go to, and the labels as numbers."""
    with config_lib.errors_at("sampling"):
        key = training.make_keys(seed).sample
    run = runs.load(workdir, weights)
    labels = runs.class_numbers(run, labels)
    with config_lib.errors_at("sampling"):
        labels_of(run.method, np.arange(1), labels, key=key)
    chosen = runs.given(options)
    given, said = runs.with_errors(run, chosen)
    draw = config_lib.call("sampling", run.method.make_sample, given)
    described = run.method.sample_options
    said = described(**said) if described else all_options(run.method.make_sample, said)
    recipe = run.recipe() | {"seed": seed} | said
    if run.method.num_classes:
        recipe["labels"] = labels
        chosen |= {} if labels == "cycle" else {"labels": labels}
    if out is None:
        file = run.name(*name, f"seed{seed}", **chosen)
        out = os.path.join(run.workdir, "samples", f"{file}.npz")
    return run, draw, recipe, runs.out_path(out, ".npz", run.workdir), labels
