"""The library: models made from parts, trained, sampled and measured on arrays, without flags, and without files by default."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import data, options, pretrained
from ddpm_jax.ddpm import DDPM, Bounding
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import model_config, runs, writers
from ddpm_jax.files.progress import Progress
from ddpm_jax.method import Method, labels_of, sample_of
from ddpm_jax.options import ConfigError
from ddpm_jax.stats import mean_and_error
from ddpm_jax.training import jobs, parallel
from ddpm_jax.training import step as step_lib
from ddpm_jax.training.guards import TrainingError
from ddpm_jax.training.loop import train
from ddpm_jax.training.preview import check_sampling, drawn


class Images(np.ndarray):
    """uint8 [N, H, W, C] that a notebook shows as a grid."""

    def _repr_png_(self) -> bytes | None:
        if self.ndim != 4 or self.dtype != np.uint8 or not len(self):
            return None
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(writers.grid(np.asarray(self)[:100])).save(buffer, "png")
        return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Bits:
    """The bound on −log p(x_0) of N images, in bits per dimension.

    Attributes:
      mean, stderr: over images; stderr is None for a single one.
      total, L_T, L_0: float64 [N].
      terms: float64 [S], L_0, L_1, … of each step, means over images.
    """

    mean: float
    stderr: float | None
    total: np.ndarray
    L_T: np.ndarray
    L_0: np.ndarray
    terms: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run(runs.Run):
    """A loaded run directory; `params` are those of its checkpoint."""

    def sample(self, num_samples: int = 16, **settings) -> Images:
        """`sample` of this run."""
        return sample(self.method, self.params, num_samples, **settings)

    def bits_per_dim(self, images, **settings) -> Bits:
        """`bits_per_dim` of this run."""
        return bits_per_dim(self.method, self.params, images, **settings)


def load(
    workdir: str,
    *,
    weights: str = "ema",
    checkpoint: runs.Checkpoint = "newest",
    model: Method | None = None,
    allow_code: bool = False,
) -> Run:
    """Loads a checkpoint of a run directory, made by the command line or by `fit`.

    Args:
      weights: "ema", the moving average of the parameters, or "raw", the last ones.
      checkpoint: "newest"; "best", by config.training.keep_best; or the step of one that is there.
      model: the model itself, if its parts cannot be imported by name, such as classes of a notebook.
      allow_code: import modules outside ddpm_jax and experiments that the run names; only for runs that you trust.

    Raises:
      ConfigError, CheckpointError, RunError: one line that says what to do.

    >>> run = dj.load(workdir)
    >>> run.step, run.sample(3).shape
    (2, (3, 8, 8, 1))
    """
    more = {"checkpoint": checkpoint, "allow_code": allow_code, "method": model}
    run = runs.load(workdir, weights=weights, **more)
    return Run(**{field.name: getattr(run, field.name) for field in dataclasses.fields(run)})


def load_pretrained(source: str, *, config: ConfigDict | None = None) -> Run:
    """Loads pretrained weights of another codebase as a run without a directory.

    Args:
      source: a folder or hub name of diffusers, such as "google/ddpm-cifar10-32"; or, with the config of its network, a .pt
        of OpenAI's Improved DDPM or guided-diffusion, or an .npz of Ho et al.'s variables.

    Raises:
      ConfigError, DataError, RunError: one line that names what is missing or cannot be expressed.

    >>> run = dj.load_pretrained("tests/pretrained/pipeline")
    >>> run.method.image_shape, len(run.method.schedule)
    ((8, 8, 3), 100)
    """
    found = pretrained.read(source, config)
    return Run(
        workdir=source,
        config=found.config,
        method=found.method,
        params=found.params,
        step=0,
        weights="ema",
    )


def fit(
    model: Method,
    images,
    *,
    num_steps: int,
    batch_size: int = 64,
    labels=None,
    learning_rate: float = 2e-4,
    warmup_steps: int | None = None,
    ema_decay: float | None = None,
    seed: int = 0,
    workdir: str | None = None,
) -> step_lib.TrainState:
    """Trains a model on images, with Adam and an average of the parameters that suit the number of steps.

    Args:
      images: uint8 [N, H, W, C], or a `Dataset`.
      labels: int [N], for a network with classes.
      warmup_steps: None for a twentieth of the steps, at most 5000, or as in the run that is continued.
      ema_decay: None for 1 − 10/num_steps, at most 0.9999, or as in the run that is continued.
      workdir: a run directory to train in, and to resume from; None writes no files.

    Returns:
      the state after the last step, with `params` and `ema_params`.

    Raises:
      ConfigError, DataError, CheckpointError, TrainingError: one line that says what to do.

    >>> state = dj.fit(model, images, num_steps=2, batch_size=4)
    >>> int(state.step)
    2
    """
    for name, value in {"num_steps": num_steps, "batch_size": batch_size}.items():
        check_whole(name, value)
    dataset = _dataset(model, images, labels)
    if model.num_classes and dataset.num_classes != model.num_classes:
        raise data.DataError(
            f"the model has {model.num_classes} classes and the labels have {dataset.num_classes}"
        )
    is_ddpm, config = isinstance(model, DDPM), ConfigDict()
    if workdir is not None:
        name = model_config.full_name_of(type(model))
        config = model_config.to_config(model) if is_ddpm else ConfigDict({"method": name})
    config.seed = seed
    config.data = {"name": "arrays", "data_dir": "data", "image_shape": tuple(model.image_shape)}
    config.data.flip, config.data.shift = getattr(model, "flip", False), getattr(model, "shift", 0)
    warmup, decay = _of_run(workdir)
    warmup = min(5000, num_steps // 20) if warmup is None else warmup
    warmup = warmup if warmup_steps is None else warmup_steps
    config.optimizer = {"learning_rate": float(learning_rate), "warmup_steps": int(warmup)}
    config.optimizer.decay = "none"
    decay = min(0.9999, 1.0 - 10.0 / max(num_steps, 20)) if decay is None else decay
    decay = decay if ema_decay is None else ema_decay
    config.step = {"ema_decay": float(decay), "ema_warmup": True, "accumulate": 1}
    config.training = {"num_steps": int(num_steps), "batch_size": int(batch_size)}
    config.preview = {"every": max(1, num_steps // 4), "num_images": 16}
    if is_ddpm:
        config.preview.update(sampler="ddim", steps=str(min(50, len(model.schedule))))
    if workdir is not None:
        return train(config, workdir, method=model, dataset=dataset)
    return _fit(model, dataset, config)


def _of_run(workdir: str | None) -> tuple[int | None, float | None]:
    """warmup_steps and ema_decay of a run that is to be continued; None, None for a new one."""
    path = os.path.join(workdir or "", "config.json")
    if workdir is None or not os.path.exists(path):
        return None, None
    config = config_lib.load(path)
    return config.optimizer.warmup_steps, config.step.ema_decay


def check_whole(name: str, value: Any) -> None:
    """Refuses what is not a whole number of at least 1.

    Raises:
      ConfigError: one line.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def _dataset(model: Method, images, labels) -> data.Dataset:
    """Images, an array or a data set, with labels that suit the model.

    Raises:
      DataError: shapes that differ, or labels of other classes; one line.
    """
    if isinstance(images, data.Dataset):
        if labels is not None:
            raise data.DataError("a data set has its own labels; leave out labels=")
        dataset = images
    else:
        dataset = data.Dataset.from_arrays(images, labels)
    if dataset.image_shape != tuple(model.image_shape):
        raise data.DataError(
            f"the images are {dataset.image_shape}, and the model is for {tuple(model.image_shape)}"
        )
    labels, count = np.asarray(dataset.labels), model.num_classes
    if count and not dataset.num_classes:
        raise data.DataError(
            f"the model has {count} classes; give labels=, one of 0 to {count - 1} for each image"
        )
    if count and (labels >= count).any():
        wrong = labels[labels >= count][0]
        raise data.DataError(
            f"labels must be 0 to {count - 1}, as the model's classes are; got {wrong}"
        )
    return dataset


def _fit(model, dataset, config) -> step_lib.TrainState:
    """The loop without files."""
    num_steps, batch_size = config.training.num_steps, config.training.batch_size
    with options.errors_at("fit"):
        parallel.check_batch_size("batch_size", batch_size)
        keys = step_lib.make_keys(config.seed)
    tx, _ = step_lib.optimizer_of(config)
    with options.errors_at("fit"):
        update = step_lib.make_update(
            model, tx, keys.train, axis_name=parallel.AXIS, **config.step.to_dict()
        )
    state = parallel.place(step_lib.init_state(model, tx, keys.init))
    progress = Progress("step", num_steps, 0, unit="images", per_count=batch_size)
    compiled = None
    with contextlib.closing(
        data.batches(dataset, seed=config.seed, start=0, stop=num_steps, batch_size=batch_size)
    ) as batches:
        for step, batch in enumerate(batches, 1):
            batch = parallel.shard(batch)
            if compiled is None:
                with progress.once("compiling"):
                    compiled = parallel.compile_step(update, state, batch)
            state, loss = compiled(state, batch)
            progress.done = step
            if progress.is_due() or step == num_steps:
                _check_loss(float(loss), step)
                progress.show(f"loss {float(loss):.4f}")
    return state


def _check_loss(loss: float, step: int) -> None:
    if not np.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {step} or before: try a smaller learning_rate, or more warmup_steps"
        )


def sample(
    model: Method,
    params: Any,
    num_samples: int,
    *,
    labels="cycle",
    seed: int = 0,
    batch_size: int | None = None,
    **sampling,
) -> Images:
    """Draws images 0 … num_samples − 1 of a seed: uint8 [N, H, W, C]; image i depends on the seed and i alone.

    Args:
      labels: for a model with classes, see `labels_of`.
      batch_size: images at a time; None for a default that suits the device.
      sampling: the options of sampling, such as sampler=DDIM(eta=0.5), steps=50, guidance=3.0.

    Raises:
      ConfigError: options that the model cannot have; one line.

    >>> x = dj.sample(model, params, 4, sampler=dj.DDIM(), steps=5, seed=0)
    >>> x.shape, x.dtype
    ((4, 8, 8, 1), dtype('uint8'))
    """
    check_whole("num_samples", num_samples)
    chosen = options.build(model.Sampling, sampling, "")
    check_sampling(model, chosen, "sampling")
    with options.errors_at("sampling"):
        key = step_lib.make_keys(seed).sample
        classes = labels_of(model, np.arange(num_samples), labels, key=key)

    def draw(params, key, index, label):
        return drawn(sample_of(model, params, key, index, label, chosen))[0]

    examples = np.arange(num_samples), classes
    return np.asarray(_map(draw, params, key, examples, batch_size)).view(Images)


def bits_per_dim(
    model: DDPM,
    params: Any,
    images,
    *,
    labels=None,
    seed: int = 0,
    batch_size: int | None = None,
    **bounding,
) -> Bits:
    """The variational bound on −log p of images uint8 [N, H, W, C], one draw of x_t for each image and time.

    Args:
      labels: int [N], for a model with classes.
      bounding: the options of the bound, such as steps=50, variance="fixed_small".

    Raises:
      ConfigError, DataError: one line that says what to do.

    >>> bits = dj.bits_per_dim(model, params, images[:4], steps=5)
    >>> bits.mean > 0, bits.total.shape, bits.terms.shape
    (True, (4,), (5,))
    """
    dataset = _dataset(model, images, labels)
    chosen = options.build(Bounding, bounding, "")
    with options.errors_at("bits_per_dim"):
        model.bound_chain(chosen)
        key = step_lib.make_keys(seed).evaluate

    def bound(params, key, index, label, image):
        return model.bound(params, key, {"image": image, "label": label, "index": index}, chosen)

    index = np.arange(len(dataset))
    examples = (index, dataset.labels, dataset.fetch(index))
    parts = _map(bound, params, key, examples, batch_size)
    total, L_T, L_0 = (parts[name].astype(np.float64) for name in ("total", "L_T", "L_0"))
    terms = parts["terms"].astype(np.float64).mean(axis=0)
    return Bits(*mean_and_error(total), total, L_T, L_0, terms)


def _map(function, params, key, examples, batch_size: int | None):
    """function(params, key, *examples) over all examples, in batches."""
    if batch_size is not None:
        check_whole("batch_size", batch_size)
    progress, parts = Progress("image", len(examples[0]), 0, unit="images"), []

    def chosen(rows):
        return tuple(np.asarray(values)[rows] for values in examples)

    for _, part in jobs.in_batches(function, params, key, chosen, progress, batch_size):
        parts.append(part)
        progress.show()
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
