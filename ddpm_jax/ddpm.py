"""Denoising diffusion probabilistic models (Ho et al. 2020): the paper on a page.

`make(config)` puts the parts together: a Schedule, a U-Net, a parameterisation, a loss and the samplers.
What comes out is a `Method`, a few pure functions and no state. An experiment writes a `make` of its own,
usually this one with a function replaced: `make(config)._replace(loss=my_loss)`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, losses, samplers, schedules
from ddpm_jax.unet import UNet, check, init_params

SECTIONS = ("model", "schedule", "diffusion")  # of a config, beside those that every Method has


class Method(NamedTuple):
    """A generative model as pure functions: what the trainer and the commands need of it.

    A batch is a dict of image uint8 [B, H, W, C], label int32 [B], index int32 [B]. All randomness of
    example i comes from the key that is passed and from index[i], and from nothing else, so results do
    not depend on how a batch is split.

    Attributes:
      image_shape: (H, W, C) of what it models.
      num_classes: of its labels; 0 if it looks at none.
      init: (key) -> params.
      loss: (params, key, batch) -> (loss [B], metrics), for training: with dropout and flips. metrics is
        {name: (values [B], weights [B])}; a weight of 0 leaves the example out of that mean.
      metric_names: the keys of those metrics.
      make_sample: (**options) -> sample, with sample(params, key, index int32 [B], label int32 [B]) ->
        x float32 [B, H, W, C] in [−1, 1] or beyond. The options are the method's own, checked here.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    init: Callable
    loss: Callable
    metric_names: tuple[str, ...]
    make_sample: Callable


def fold_in_each(key, index):
    """One key for each example: [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def mirror_at_random(keys, images):
    """Mirrors each image [B, H, W, C] left to right with probability ½; keys [B]."""
    mirror = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)


def make_parts(config) -> tuple[schedules.Schedule, UNet]:
    """The Schedule and the network of a config, checked against its data.image_shape."""
    if config.data.image_shape is None:
        raise config_lib.ConfigError("config.data.image_shape must be given, such as (32, 32, 3)")
    image_shape = tuple(config.data.image_shape)
    schedule = config_lib.call("config.schedule", schedules.make, config.schedule)
    given = {"out_channels": image_shape[-1], "name": None, "parent": None}
    unet = config_lib.call("config.model", UNet, config.model, **given)
    with config_lib.errors_at("config.model"):
        check(image_shape, **config.model)
    if unet.num_groups >= unet.channels and not unet.scale_shift:
        logging.warning(
            "config.model: a group norm of %d channels in %d groups takes away what the time embedding"
            " adds; set num_groups=%d or less",
            *(unet.channels, unet.channels, max(1, unet.channels // 4)),
        )
    return schedule, unet


def make(config) -> Method:
    """The Method of a config: reads its sections data, model, schedule and diffusion.

    Raises:
      ConfigError: a field that is unknown, of a wrong type or impossible.
    """
    schedule, unet = make_parts(config)
    given = {"image_shape": tuple(config.data.image_shape), "flip": config.data.flip}
    return config_lib.call(
        "config.diffusion",
        diffusion_method,
        config.diffusion,
        schedule=schedule,
        unet=unet,
        **given,
    )


def diffusion_method(
    schedule: schedules.Schedule,
    unet: UNet,
    image_shape: tuple[int, ...],
    *,
    flip: bool = False,
    prediction: str = "eps",
    variance: str = "fixed_large",
    loss: str = "simple",
    clip_x0: bool = True,
) -> Method:
    """A DDPM of its parts.

    Args:
      schedule: the full chain.
      unet: (x, t, labels) -> prediction; `image_shape` is (H, W, C).
      flip: mirror training images left to right with probability ½.
      prediction: what the network gives: "eps", "x_0", "mean" or "v".
      variance: σ_t² of the reverse process, "fixed_large" or "fixed_small".
      loss: "simple" for L_simple, "variational" for the terms of the bound with their true weights.
      clip_x0: whether samplers clip x̂_0 to [−1, 1] unless told otherwise.
    """
    config_lib.check_choice("prediction", prediction, diffusion.PREDICTIONS)
    config_lib.check_choice("variance", variance, diffusion.VARIANCES)
    config_lib.check_choice("loss", loss, ("simple", "variational"))
    diffusion.check_invertible(schedule, prediction)

    metric_names = tuple(f"loss_t{quarter}" for quarter in (1, 2, 3, 4))

    def denoiser(params, label, dropout_keys=None):
        label = label if unet.num_classes else None

        def network_fn(x_t, t):
            return unet.apply({"params": params}, x_t, t, label, dropout_keys=dropout_keys)

        return diffusion.denoiser(schedule, network_fn, prediction=prediction)

    def init(key):
        return init_params(unet, key, image_shape)

    def loss_fn(params, key, batch):
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(fold_in_each(key, batch["index"]))
        t_keys, eps_keys, dropout_keys, flip_keys = keys[:, 0], keys[:, 1], keys[:, 2], keys[:, 3]
        x_0 = diffusion.from_uint8(batch["image"])
        if flip:
            x_0 = mirror_at_random(flip_keys, x_0)
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(schedule)))(t_keys)
        eps = jax.vmap(lambda key: jax.random.normal(key, image_shape))(eps_keys)
        denoise_fn = denoiser(params, batch["label"], dropout_keys)
        if loss == "simple":
            values = losses.simple(schedule, denoise_fn, x_0, t, eps, prediction=prediction)
        else:
            values = losses.variational(
                schedule, denoise_fn, x_0, t, eps, prediction=prediction, variance=variance
            )
        quarter = 4 * t // len(schedule)
        return values, {name: (values, quarter == q) for q, name in enumerate(metric_names)}

    def make_sample(
        *,
        sampler: str = "ancestral",
        steps=None,
        variance: str = variance,
        clip_x0: bool = clip_x0,
    ):
        """sampler: "ancestral" or "ddim"; steps: see `schedules.subsequence`, None for all T."""
        config_lib.check_choice("sampler", sampler, ("ancestral", "ddim"))
        config_lib.check_choice("variance", variance, diffusion.VARIANCES)
        chain = schedule
        if steps is not None:
            chain = schedules.respace(schedule, schedules.subsequence(steps, len(schedule)))

        def sample(params, key, index, label):
            keys = fold_in_each(key, index)
            x_T = samplers.prior(keys, image_shape)
            denoise_fn = denoiser(params, label)
            if sampler == "ddim":
                return samplers.ddim(chain, denoise_fn, x_T, clip_x0=clip_x0)
            return samplers.ancestral(
                chain, denoise_fn, x_T, keys, variance=variance, clip_x0=clip_x0
            )

        return sample

    return Method(image_shape, unet.num_classes, init, loss_fn, metric_names, make_sample)


def make_method(config) -> Method:
    """The Method that config.method names: a module with a `make(config)`.

    A module that lists the sections it reads as `SECTIONS` has the config's other names checked.

    Raises:
      ConfigError: there is no such module, it has no `make`, or nobody reads a name of the config.
    """
    try:
        module = importlib.import_module(config.method)
    except (ImportError, TypeError, ValueError) as error:
        missing = getattr(error, "name", None)
        if missing and not str(config.method).startswith(missing):
            raise  # the module is there, but not what it imports
        raise config_lib.ConfigError(
            f"config.method {config.method!r} is no module that can be imported from here ({error})"
        ) from None
    if not hasattr(module, "make"):
        raise config_lib.ConfigError(f"config.method {config.method!r} has no make(config)")
    if hasattr(module, "SECTIONS"):
        known = ("method", "seed", "data", "optimizer", "step", "training", "preview")
        config_lib.check_names(config, (*known, *module.SECTIONS))
    return module.make(config)


def all_options(function: Callable, options: dict) -> dict:
    """The options with the defaults of a `make_sample` filled in: what moves its samples."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters} | options


def labels_of(method: Method, index: np.ndarray) -> np.ndarray:
    """The classes in turn, int32 [N]; zeros for a model without."""
    return (index % max(method.num_classes, 1)).astype(np.int32)
