"""Denoising diffusion probabilistic models (Ho et al. 2020): the paper on a page.

`make(config)` puts the parts together: a Schedule, a U-Net, a parameterisation, a loss and the samplers.
What comes out is a `Method`, a few pure functions and no state. An experiment writes a `make` of its own,
usually this one with a function replaced: `make(config)._replace(loss=my_loss)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, losses, samplers, schedules
from ddpm_jax.unet import UNet, check, init_params


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
      sample: (params, key, index int32 [B], label int32 [B], **options) -> x float32 [B, H, W, C] in
        [−1, 1] or beyond; the options are the method's own and static.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    init: Callable
    loss: Callable
    sample: Callable


def fold_in_each(key, index):
    """One key for each example: [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def make_parts(config) -> tuple[schedules.Schedule, UNet]:
    """The Schedule and the network of a config, checked against its data.image_shape."""
    image_shape = tuple(config.data.image_shape)
    schedule = config_lib.call("config.schedule", schedules.make, config.schedule)
    unet = config_lib.call("config.model", UNet, config.model, out_channels=image_shape[-1])
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
    for name, value, choices in (
        ("prediction", prediction, diffusion.PREDICTIONS),
        ("variance", variance, diffusion.VARIANCES),
        ("loss", loss, ("simple", "variational")),
    ):
        if value not in choices:
            near = config_lib.nearest(value, choices)
            raise ValueError(f"unknown {name} {value!r}{near} (choose from {', '.join(choices)})")
    if prediction == "eps" and schedule.alpha_bar[-1] == 0:
        raise ValueError(
            "prediction 'eps' cannot recover x_0 at the end of this schedule, where alpha_bar = 0;"
            " use prediction 'x_0' or 'v', or a schedule whose betas stay below 1"
        )

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
            mirror = jax.vmap(jax.random.bernoulli)(flip_keys)
            x_0 = jnp.where(mirror[:, None, None, None], x_0[:, :, ::-1], x_0)
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
        return values, {f"loss_t{q + 1}": (values, quarter == q) for q in range(4)}

    def sample(
        params,
        key,
        index,
        label,
        *,
        sampler: str = "ancestral",
        steps=None,
        variance: str = variance,
        clip_x0: bool = clip_x0,
    ):
        """sampler: "ancestral" or "ddim"; steps: see `schedules.subsequence`, None for all T."""
        keys = fold_in_each(key, index)
        x_T = samplers.prior(keys, image_shape)
        chain = schedule
        if steps is not None:
            chain = schedules.respace(schedule, schedules.subsequence(steps, len(schedule)))
        if sampler == "ddim":
            return samplers.ddim(chain, denoiser(params, label), x_T, clip_x0=clip_x0)
        return samplers.ancestral(
            chain, denoiser(params, label), x_T, keys, variance=variance, clip_x0=clip_x0
        )

    return Method(image_shape, unet.num_classes, init=init, loss=loss_fn, sample=sample)


def make_method(config) -> Method:
    """The Method that config.method names: a module with a `make(config)`.

    Raises:
      ConfigError: there is no such module, or it has no `make`.
    """
    try:
        module = importlib.import_module(config.method)
        return module.make(config)
    except ModuleNotFoundError as error:
        if not config.method.startswith(str(error.name)):
            raise
        raise config_lib.ConfigError(
            f"config.method {config.method!r} is no module that can be imported from here ({error})"
        ) from None
    except AttributeError:
        if hasattr(module, "make"):
            raise
        raise config_lib.ConfigError(
            f"config.method {config.method!r} has no function make(config)"
        ) from None
