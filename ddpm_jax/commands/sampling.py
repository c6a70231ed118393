"""Sampling from a run directory: restartable, and image i is always the same.

    python -m ddpm_jax.main --mode=sample --workdir=runs/digits --num_samples=64
    python -m ddpm_jax.main --mode=sample --workdir=runs/digits --sampler=dpm_solver --steps=20 --trajectory
    python -m ddpm_jax.main --mode=progressive --workdir=runs/digits

The first command writes an .npz (images uint8 [N, H, W, C], labels if the model has classes, recipe) and a grid of the
images (.png). While it runs, finished images are kept in FILE.partial/, and the same command continues from there.
`--png` adds every image as a file of its own. `--trajectory` adds the chain of the first images as a strip and as an
animation. The third command writes the model's predictions of x_0 along the chain, as in Ho et al. 2020, Figure 6.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from typing import Annotated, Any

import numpy as np

from ddpm_jax import options
from ddpm_jax.commands import analytic, shared
from ddpm_jax.commands.shared import Labels, Output, Seed
from ddpm_jax.ddpm import Sampling
from ddpm_jax.files import animations, results, run_data, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.progress import Progress
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.method import labels_of, sample_of
from ddpm_jax.options import AtLeast, ConfigError
from ddpm_jax.process.diffusion import to_uint8
from ddpm_jax.process.samplers import DDIM
from ddpm_jax.training import jobs
from ddpm_jax.training.preview import check_sampling

GRID_LIMIT = 100  # maximum number of images in the .png
GRID_ROWS = 20  # maximum number of rows of the progressive strip
FRAMES = 12  # number of columns of the progressive strip and of a trajectory
TRAJECTORY_IMAGES = 8  # number of images in a trajectory
ANIMATION_FRAMES = 48  # maximum number of frames in an animation

NumSamples = Annotated[
    int | None, "How many images to draw. Default: 64, or all of --latents.", AtLeast(1)
]


def sample(
    run: Run,
    *,
    sampling: Sampling = Sampling(),
    num_samples: NumSamples = None,
    labels: Labels = "cycle",
    latents: Annotated[
        str | None, "An .npz from --mode=encode; its latents are decoded instead of random noise."
    ] = None,
    png: Annotated[
        bool,
        "Also writes each image as a PNG file, 000000.png and so on, in a folder named like the .npz.",
    ] = False,
    trajectory: Annotated[
        bool, "Also writes the chain of the first eight images, as a strip and as an animation."
    ] = False,
    animation: Annotated[
        animations.Kinds,
        "The animations of --trajectory: gif, mp4 (needs imageio-ffmpeg), or both with commas.",
    ] = ("gif",),
    seed: Seed = 0,
    output: Output = Output(),
) -> str:
    """Draws images from the last checkpoint of a run.

    Args:
      latents: by default, DDIM decodes them with the steps, guidance and labels that they were encoded with.
      output: the path of the .npz; its images with the same recipe are kept, and only the missing images are drawn.

    Returns:
      the path of the .npz.

    Raises:
      ConfigError, CheckpointError, RunError: one line that says what to do.
    """
    _check_animation(animation, trajectory)
    encoded, parts = None, ()
    if latents is not None:
        encoded = _Latents.read(run, config_lib.path(latents), sampling, labels)
        sampling, parts = encoded.sampling, ("latents", encoded.sha256[:8])
        num_samples = num_samples or len(encoded.latents)
        if num_samples > len(encoded.latents):
            raise RunError(
                f"{num_samples} samples requested, but {latents} has {len(encoded.latents)} latents"
            )
    num_samples = num_samples or 64
    plan = prepare(run, sampling, seed, labels, output, *parts)
    if encoded:
        plan.recipe.update(latents_sha256=encoded.sha256, labels="of the latents")

    def inputs(index):
        if encoded is None:
            return index, labels_of(run.method, index, plan.labels, key=plan.key)
        return index, encoded.labels[index], encoded.latents[index]

    with results.in_progress(plan.out, plan.recipe, named=plan.named) as (folder, finished):
        shape = run.method.image_shape
        growing = results.GrowingFile(os.path.join(folder, "images"), shape, np.uint8)
        if finished and not growing.count:
            growing.append(finished["images"])
        if growing.count:
            print(f"{growing.count} images with this recipe exist already", flush=True)
        num_samples = max(num_samples, growing.count)
        _grow(run, plan, growing, inputs, num_samples, output.batch_size, png)
        images = growing.rows()
        arrays = {}
        if run.method.num_classes:
            arrays["labels"] = inputs(np.arange(num_samples))[1]
            if run.class_names:
                arrays["class_names"] = np.array(run.class_names)
        writers.save_npz(plan.out, {"images": images} | arrays, plan.recipe)
        writers.save_png(f"{plan.out[:-4]}.png", writers.grid(images[:GRID_LIMIT]))
    if trajectory:
        examples = inputs(np.arange(min(num_samples, TRAJECTORY_IMAGES)))
        _save_trajectory(run, plan, examples, animation)
    print(
        f"{num_samples} images in {plan.out}, and a grid in the .png of the same name", flush=True
    )
    return plan.out


def _check_animation(animation: animations.Kinds, trajectory: bool) -> None:
    """Checks --animation before anything is computed."""
    if animation != ("gif",) and not trajectory:
        raise ConfigError("--animation chooses the files of --trajectory; give --trajectory, too")
    animations.check(animation if trajectory else ())


def _grow(run, plan, growing, inputs, num_samples, batch_size, png) -> None:
    """Draws images until `num_samples` are saved; with `png`, all of them as PNG files, too."""
    progress = Progress("image", num_samples, growing.count, unit="images")
    folder = results.png_folder(plan.out, plan.recipe, named=plan.named)
    with folder if png else contextlib.nullcontext(lambda first, images: None) as save_pngs:
        if png and growing.count:
            save_pngs(0, growing.rows())
        for _, (images, finite) in jobs.in_batches(
            plan.draw, run.params, plan.key, inputs, progress, batch_size
        ):
            shared.check_finite(finite, plan.recipe)
            growing.append(images)
            save_pngs(growing.count - len(images), images)
            progress.show()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked request for samples."""

    run: Run
    sampling: Any
    key: Any
    labels: str  # names of classes replaced by their numbers
    recipe: dict
    out: str
    named: bool  # whether the user has named `out`
    x_0_error: np.ndarray | None

    def draw(self, params, key, index, label, *x_T) -> shared.Drawn:
        """Images as they are saved; the chains start from x_T if it is passed."""
        return shared.as_saved(self.chains(0, params, key, index, label, *x_T))

    def chains(self, frames: int, params, key, index, label, *x_T):
        """Images in [−1, 1]; if `frames` is not 0, also their chains at so many times."""
        extra = {"x_0_error": self.x_0_error} if self.x_0_error is not None else {}
        extra |= {"frames": frames} if frames else {}
        extra |= {"x_T": x_T[0]} if x_T else {}
        return sample_of(self.run.method, params, key, index, label, self.sampling, **extra)


def prepare(run: Run, sampling, seed: int, labels: str, output: Output, *parts: str) -> Plan:
    """Checks a request for samples before anything is computed, and chooses the output path.

    Args:
      parts: further parts of the file name.
    """
    key, chosen = shared.sample_key(seed), shared.resolved(run, sampling)
    labels = run_data.class_numbers(run, labels)
    with options.errors_at("sampling"):
        labels_of(run.method, np.arange(1), labels, key=key)
    x_0_error, origin = None, None
    variance = getattr(getattr(chosen, "sampler", None), "variance", None)
    if variance == "analytic":
        x_0_error, origin = analytic.errors_for(run, sampling, variance)
        with options.errors_at("sampling"):
            run.method.chain(chosen, x_0_error=x_0_error)
    else:
        check_sampling(run.method, chosen, "sampling")
    described = options.describe(chosen)
    recipe = run.recipe(described) | {"seed": seed} | described | {"x_0_error": origin}
    named = options.changed(sampling)
    if run.method.num_classes:
        recipe["labels"] = labels
        named |= {} if labels == "cycle" else {"labels": labels}
    name = run.name(*parts, f"seed{seed}", settings=named)
    out = output.out or os.path.join(run.workdir, "samples", f"{name}.npz")
    out = results.out_path(out, ".npz", run.workdir)
    return Plan(run, chosen, key, labels, recipe, out, output.out is not None, x_0_error)


@dataclasses.dataclass(frozen=True)
class _Latents:
    """Latents of an .npz, and the options to decode them with."""

    latents: np.ndarray
    labels: np.ndarray
    sha256: str
    sampling: Sampling

    @classmethod
    def read(cls, run: Run, path: str, sampling: Sampling, labels: str) -> _Latents:
        if labels != "cycle":
            raise RunError(f"--latents={path} contains the labels; leave out --labels")
        model, arrays = shared.diffusion_of(run), results.read_npz(path)
        try:
            latents, recipe = arrays["latents"], json.loads(str(arrays["recipe"]))
            recipe = dict(recipe)
            if latents.dtype.kind != "f" or not len(latents) == len(arrays["labels"]) > 0:
                raise ValueError
        except (KeyError, ValueError, TypeError, RecursionError):
            raise RunError(f"{path} contains no latents; --mode=encode makes such files") from None
        if latents.shape[1:] != run.method.image_shape:
            raise RunError(
                f"{path} contains latents of shape {latents.shape[1:]}, but the images of this model have shape"
                f" {run.method.image_shape}"
            )
        changed = options.changed(sampling)
        sampler = sampling.sampler if "sampler" in changed else DDIM()
        encoded = {name: recipe.get(name) for name in ("steps", "spacing", "clip_x0", "guidance")}
        encoded = {k: v for k, v in encoded.items() if v is not None and k not in changed}
        sampling = dataclasses.replace(sampling, sampler=sampler, **encoded)
        with options.errors_at("sampling"):
            last = model.chain(model.resolve(sampling)).times[-1].item()
        if recipe.get("last") not in (None, last):
            raise RunError(
                f"{path} contains x_t of t = {recipe['last']}, but these steps begin at t = {last}; choose"
                f" steps and spacing that begin at {recipe['last']}"
            )
        digest = hashlib.sha256(latents.tobytes() + arrays["labels"].tobytes()).hexdigest()
        with options.errors_at("--latents"):
            chosen = arrays["labels"] if run.method.num_classes else "cycle"
            labels = labels_of(run.method, np.arange(len(latents)), chosen)
        return cls(latents, labels, digest, sampling)


def _save_trajectory(run: Run, plan: Plan, examples, kinds: animations.Kinds) -> None:
    """Saves x_t and x̂_0 at `FRAMES` times as a strip, and at `ANIMATION_FRAMES` times as animations."""
    shared.diffusion_of(run)
    draw = functools.partial(plan.chains, ANIMATION_FRAMES)
    x, frames = shared.map_images(
        run, draw, plan.key, *examples, batch_size=None, settings=plan.recipe
    )
    shared.check_finite(np.isfinite(x).all(axis=(1, 2, 3)), plan.recipe)
    x_t, x_0, last = (np.asarray(to_uint8(v)) for v in (frames.x_t, frames.x_0, x))
    t, rows = frames.t[0], []
    columns = np.unique(np.round(np.linspace(0, len(t) - 1, FRAMES)).astype(int))
    for n in range(len(last)):
        rows += [*x_t[n, columns], *x_0[n, columns]]
    times = ", ".join(f"{time:g}" for time in t[columns])
    title = f"in turn a row of x_t and a row of the x_0 predicted from it, at t = {times}"
    path = f"{plan.out[:-4]}_trajectory"
    writers.save_grids(f"{path}.png", [(title, np.stack(rows))], columns=len(columns))
    files = animations.save(path, _side_by_side([x_t, x_0], [last, last]), kinds)
    print(f"the chain of {len(last)} images: {', '.join([f'{path}.png', *files])}", flush=True)


def _side_by_side(chains: list[np.ndarray], last: list[np.ndarray]) -> list[np.ndarray]:
    """The pictures of an animation: grids of each chain uint8 [N, K, H, W, C] at a time, and of the last images."""
    width = max(1, len(last[0]) // 2)
    frames = [[chain[:, k] for chain in chains] for k in range(chains[0].shape[1])]
    return [
        np.concatenate([writers.grid(images, columns=width) for images in parts], axis=1)
        for parts in [*frames, last]
    ]


def progressive(
    run: Run,
    *,
    sampling: Sampling = Sampling(),
    num_samples: Annotated[int, "How many images to draw.", AtLeast(1)] = 8,
    labels: Labels = "cycle",
    animation: Annotated[
        animations.Kinds,
        "Animations to write beside the picture: gif, mp4 (needs imageio-ffmpeg), or both with commas.",
    ] = (),
    seed: Seed = 0,
    output: Output = Output(),
) -> str:
    """Draws samples together with the predicted x_0 along the chain; Ho et al. 2020, Figure 6.

    The images are the first `num_samples` images that `sample` draws with the same arguments. The .npz holds t [K], x_t
    float32 and x_0 uint8 [N, K, H, W, C], the images uint8 [N, H, W, C] and the recipe.

    Returns:
      the path of the .npz.

    Raises: as `sample`.
    """
    shared.diffusion_of(run)
    animations.check(animation)
    plan = prepare(run, sampling, seed, labels, output, "progressive", f"{num_samples}images")
    plan.recipe.update(num_samples=num_samples, frames=FRAMES)
    with results.in_progress(plan.out, plan.recipe, named=plan.named) as (folder, _):
        index = np.arange(num_samples)
        examples = (index, labels_of(run.method, index, plan.labels, key=plan.key))
        draw = functools.partial(plan.chains, FRAMES)
        x, frames = shared.map_images(
            run,
            draw,
            plan.key,
            *examples,
            batch_size=output.batch_size,
            settings=plan.recipe,
            kept=os.path.join(folder, "frames"),
        )
        shared.check_finite(np.isfinite(x).all(axis=(1, 2, 3)), plan.recipe)
        images, x_0 = (np.asarray(to_uint8(values)) for values in (x, frames.x_0))
        t = frames.t[0]
        arrays = {"images": images, "x_t": frames.x_t, "x_0": x_0, "t": t}
        arrays |= {"labels": examples[1]} if run.method.num_classes else {}
        writers.save_npz(plan.out, arrays, plan.recipe)
        strip = x_0[:GRID_ROWS].reshape(-1, *run.method.image_shape)
        writers.save_png(f"{plan.out[:-4]}.png", writers.grid(strip, columns=len(t)))
    files = animations.save(plan.out[:-4], _side_by_side([x_0], [images]), animation)
    times, files = ", ".join(f"{time:g}" for time in t), ", ".join([f"{plan.out[:-4]}.png", *files])
    print(f"predictions of x_0 at t = {times}: {files}", flush=True)
    return plan.out
