"""Pictures of a run: the data as the network sees them, the forward process, samples during training."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import augmentation, data, options
from ddpm_jax.files import neighbours, writers
from ddpm_jax.method import Method, fold_in_each, is_diffusion, labels_of, sample_of
from ddpm_jax.options import ConfigError
from ddpm_jax.process.diffusion import from_uint8, q_path, to_uint8
from ddpm_jax.process.schedules import Schedule
from ddpm_jax.process.timesteps import respace
from ddpm_jax.settings import Bounding
from ddpm_jax.training import guards, parallel

FORWARD_ROWS, FORWARD_TIMES = 4, 10  # images and times of forward.png


def save_first(
    workdir: str, method: Method, dataset, keys, seed: int, batch_size: int, say: Callable
) -> None:
    """Writes data_preview.png, the first training images, and of a diffusion forward.png, its forward process."""
    shown = shown_images(method, dataset, keys.train, seed, batch_size)
    with guards.os_errors_as_warnings(say):
        writers.save_png(os.path.join(workdir, "data_preview.png"), writers.grid(shown))
    if is_diffusion(method):
        path = os.path.join(workdir, "forward.png")
        with guards.os_errors_as_warnings(say):
            save_forward(path, method.schedule, shown, keys.preview)


def path_of(workdir: str, step: int) -> str:
    """The preview of a step."""
    return os.path.join(workdir, "samples", f"step_{step:08d}.png")


def save_loss(workdir: str) -> None:
    """Draws loss.png from metrics.jsonl."""
    metrics = writers.read_metrics(os.path.join(workdir, "metrics.jsonl"))
    writers.save_loss_curve(os.path.join(workdir, "loss.png"), metrics)


def shown_images(method: Method, dataset, key, seed: int, batch_size: int) -> np.ndarray:
    """The first training images as the network sees them, uint8 [N, H, W, C], N ≤ 64."""
    count = min(len(dataset), 64)
    steps = -(-count // batch_size)
    images = []
    for step, batch in enumerate(
        data.batches(dataset, seed=seed, start=0, stop=steps, batch_size=batch_size)
    ):
        shown = method.shown(jax.random.fold_in(key, step), batch)
        images.append(batch["image"] if shown is None else to_uint8(shown))
    return np.concatenate(images)[:count]


def save_forward(path: str, schedule: Schedule, images: np.ndarray, key) -> None:
    """Draws the forward process: a row for each image, from x_0 on the left to x_T."""
    images = images[:FORWARD_ROWS]
    tau = np.unique(np.round(np.linspace(0, len(schedule) - 1, FORWARD_TIMES)).astype(int))
    keys = fold_in_each(key, np.arange(len(images)))
    rows = to_uint8(q_path(respace(schedule, tau), from_uint8(images), keys))
    rows = np.concatenate([images[:, None], rows], axis=1)
    title = f"data, then x_t at t = {', '.join(map(str, tau))}"
    writers.save_grids(path, [(title, rows.reshape(-1, *images.shape[1:]))], columns=len(tau) + 1)


def make_preview(section, method: Method, key) -> tuple[int, Callable]:
    """config.preview.every, and (state, step) -> (rows, columns) for `writers.save_grids`, with a method `compile(state)`.

    Raw and EMA parameters draw from the same noise at every preview, so that rows can be compared.

    Raises:
      ConfigError: options that do not fit this Method.
    """
    section = dict(section)
    every, count = section.pop("every"), section.pop("num_images")
    if not isinstance(section.pop("nearest", False), bool):
        raise ConfigError("config.preview.nearest must be True or False")
    if every < 1 or count < 1:
        raise ConfigError("config.preview: every and num_images must be at least 1")
    sampling = options.build(method.Sampling, section, "config.preview")
    check_sampling(method, sampling, "config.preview")
    index = np.arange(count)
    draw = parallel.map_examples(
        lambda params, key, index, label: drawn(
            sample_of(method, params, key, index, label, sampling)
        )
    )

    def preview(state, step):
        rows = []
        for name, params in (("raw", state.params), ("EMA", state.ema_params)):
            images, finite = draw(params, key, index, labels_of(method, index))
            bad = "" if finite.all() else f": {np.sum(~finite)} of {count} images are not finite"
            rows.append((f"step {step:,}, {name}{bad}", images))
        return rows, min(count, 8)

    def compile(state):
        draw.compile(state.params, key, index, labels_of(method, index))

    preview.compile = compile
    return every, preview


def check_sampling(method: Method, sampling, where: str) -> None:
    """Checks that options of sampling, or of the bound, fit a Method, before anything is computed.

    Raises:
      ConfigError: one line.
    """
    check = "bound_chain" if isinstance(sampling, Bounding) else "chain"
    if hasattr(method, check):
        with options.errors_at(where):
            getattr(method, check)(sampling)


def drawn(x):
    """Images as they are saved, uint8 [B, H, W, C], and whether all values of each were finite, bool [B]."""
    return to_uint8(x), jnp.all(jnp.isfinite(x), axis=(1, 2, 3))


def save_nearest(workdir: str, rows, dataset, section) -> str:
    """Writes nearest.png, the last of a preview's rows beside the nearest training images; returns a line about it.

    Args:
      section: config.data, with the changes that training made of its images.
    """
    path, samples = os.path.join(workdir, "nearest.png"), rows[-1][1]
    return neighbours.save_beside(path, samples, dataset, **augmentation.of(section))
