"""Denoising diffusion probabilistic models (Ho et al. 2020): the paper on a page.

`make(config)` puts the parts together: a Schedule, a U-Net, a parameterisation, a loss and the samplers.
What comes out is a `Method`, a few pure functions and no state. An experiment writes a `make` of its own,
usually this one with a function replaced: `make(config)._replace(loss=my_loss)`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, likelihood, losses, samplers, schedules
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
      loss: (params, memory, key, batch) -> (loss [B], metrics, record), for training: with dropout and
        flips. The batch also has place float32 [B] in [0, 1), where an example stands in the whole batch.
        metrics is {name: (values [B], weights [B])}; a weight of 0 leaves the example out of that mean.
      metric_names: the keys of those metrics.
      make_sample: (**options) -> sample, with sample(params, key, index int32 [B], label int32 [B]) ->
        x float32 [B, H, W, C] in [−1, 1] or beyond. The options are the method's own, checked here.
      make_bound: (**options) -> (chain, bound), with bound(params, key, batch) -> {name: [B] or [B, S]}:
        the bound on −log p(x_0) as "total", its parts, and curves over the steps of the Schedule `chain`.
        None if the model has no such bound.
      memory: what the loss remembers from step to step, a tree of arrays; it is part of the TrainState.
      remember: (memory, record) -> memory, with the records of the whole batch over all devices.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    init: Callable
    loss: Callable
    metric_names: tuple[str, ...]
    make_sample: Callable
    make_bound: Callable | None = None
    memory: Any = ()
    remember: Callable = lambda memory, record: memory


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
    learned = "diffusion" in config and config.diffusion.get("variance") in diffusion.LEARNED
    given = {"out_channels": image_shape[-1] * (1 + learned), "name": None, "parent": None}
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
    t_sampling: str = "uniform",
    min_snr_gamma: float | None = None,
    clip_x0: bool = True,
) -> Method:
    """A DDPM of its parts.

    Args:
      schedule: the full chain.
      unet: (x, t, labels) -> prediction; `image_shape` is (H, W, C). With a learned variance it gives 2C
        channels.
      flip: mirror training images left to right with probability ½.
      prediction: what the network gives: "eps", "x_0", "mean" or "v".
      variance: σ_t² of the reverse process: "fixed_large" or "fixed_small"; "learned", where the network
        gives log σ_t², or "learned_range", where it chooses between the two fixed ones.
      loss: "simple" for L_simple, "vlb" for the terms of the bound with their true weights, "hybrid" for
        L_simple with a learned variance.
      t_sampling: "uniform", "antithetic" (evenly over each batch) or "importance" (by the loss history).
      min_snr_gamma: γ of Min-SNR weights for L_simple; None for none.
      clip_x0: whether samplers and the bound clip x̂_0 to [−1, 1] unless told otherwise.
    """
    config_lib.check_choice("prediction", prediction, diffusion.PREDICTIONS)
    config_lib.check_choice("variance", variance, diffusion.VARIANCES)
    config_lib.check_choice("loss", loss, losses.LOSSES)
    config_lib.check_choice("t_sampling", t_sampling, losses.T_SAMPLINGS)
    losses.check(loss, variance, min_snr_gamma)
    diffusion.check_invertible(schedule, prediction)
    T, trained_variance = len(schedule), variance

    def denoiser(params, label, dropout_keys=None):
        label = label if unet.num_classes else None

        def network_fn(x_t, t):
            return unet.apply({"params": params}, x_t, t, label, dropout_keys=dropout_keys)

        learned_variance = trained_variance in diffusion.LEARNED
        return diffusion.denoiser(
            schedule, network_fn, prediction=prediction, learned_variance=learned_variance
        )

    def init(key):
        return init_params(unet, key, image_shape)

    # ---- training

    quarters = tuple(f"loss_t{quarter}" for quarter in (1, 2, 3, 4))
    metric_names = quarters + (("simple", "vlb") if loss == "hybrid" else ())
    memory, remember = (), lambda memory, record: memory
    if t_sampling == "importance":
        memory = losses.no_history(T)
        remember = lambda history, record: losses.remember(history, *record)  # noqa: E731

    def draw_t(memory, key, keys, place):
        """t int32 [B] and the weight that its loss has for it."""
        if t_sampling == "importance":
            return losses.importance_t(keys, losses.probabilities(memory))
        if t_sampling == "antithetic":
            t = losses.antithetic_t(jax.random.fold_in(key, 2**32 - 1), place, T)
        else:
            t = losses.uniform_t(keys, T)
        return t, jnp.ones(t.shape, jnp.float32)

    def loss_fn(params, memory, key, batch):
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(fold_in_each(key, batch["index"]))
        t_keys, eps_keys, dropout_keys, flip_keys = keys[:, 0], keys[:, 1], keys[:, 2], keys[:, 3]
        x_0 = diffusion.from_uint8(batch["image"])
        if flip:
            x_0 = mirror_at_random(flip_keys, x_0)
        t, weight = draw_t(memory, key, t_keys, batch["place"])
        eps = jax.vmap(lambda key: jax.random.normal(key, image_shape))(eps_keys)
        denoise_fn = denoiser(params, batch["label"], dropout_keys)

        metrics = {}
        args, of_simple = (schedule, denoise_fn, x_0, t, eps), {"prediction": prediction}
        of_simple["min_snr_gamma"] = min_snr_gamma
        if loss == "simple":
            values = losses.simple(*args, **of_simple)
        elif loss == "vlb":
            values = losses.vlb(*args, variance=variance)
        else:
            of_mean, of_variance = losses.hybrid(*args, variance=variance, **of_simple)
            values = of_mean + losses.HYBRID_WEIGHT * of_variance
            metrics = {"simple": (of_mean, weight), "vlb": (of_variance, weight)}
        quarter = 4 * t // T
        metrics |= {name: (values, weight * (quarter == q)) for q, name in enumerate(quarters)}
        record = (t, values) if t_sampling == "importance" else ()
        return values * weight, metrics, record

    # ---- what a trained model is asked

    def shortened(steps):
        if steps is None:
            return schedule
        return schedules.respace(schedule, schedules.subsequence(steps, T))

    def reverse_variance(asked, chain, x_0_error):
        """A variance as samplers and the bound take it, if this model can have it."""
        config_lib.check_choice("variance", asked, diffusion.VARIANCES)
        if asked in diffusion.LEARNED and asked != trained_variance:
            raise ValueError(
                f"variance {asked!r} needs outputs that this network has not: it was trained with"
                f" {trained_variance!r}; use that, fixed_small, fixed_large or analytic"
            )
        if asked == "learned" and len(chain) < T:
            raise ValueError(
                "variance 'learned' is that of single steps of the full chain; with fewer steps use"
                " fixed_small, fixed_large or analytic, or train with learned_range"
            )
        if asked != "analytic":
            return asked
        if x_0_error is None or len(x_0_error) != len(chain):
            raise ValueError(
                "variance 'analytic' needs x_0_error, the mean squared error of x̂_0 measured at each"
                f" of the {len(chain)} steps of the chain"
            )
        return diffusion.analytic_log_variance(chain, x_0_error)

    def make_sample(
        *,
        sampler: str = "ancestral",
        steps=None,
        variance: str = variance,
        clip_x0: bool = clip_x0,
        x_0_error=None,
        frames: int = 0,
    ):
        """The options of sampling.

        Args:
          sampler: "ancestral" or "ddim".
          steps: see `schedules.subsequence`; None for all T.
          variance: one of `diffusion.VARIANCES` that the network has the outputs for.
          x_0_error: [S], for variance "analytic"; see `diffusion.analytic_log_variance`.
          frames: return (x, `samplers.Trajectory`) with this many steps of the chain, evenly spaced.
        """
        config_lib.check_choice("sampler", sampler, ("ancestral", "ddim"))
        config_lib.check_choice(
            "variance", variance, diffusion.VARIANCES
        )  # also where none is used
        chain = shortened(steps)
        if sampler == "ancestral":
            variance = reverse_variance(variance, chain, x_0_error)
        options = {"clip_x0": clip_x0}
        if frames:
            options["keep"] = schedules.subsequence(min(frames, len(chain)), len(chain))[::-1]

        def sample(params, key, index, label):
            keys = fold_in_each(key, index)
            x_T = samplers.prior(keys, image_shape)
            denoise_fn = denoiser(params, label)
            if sampler == "ddim":
                return samplers.ddim(chain, denoise_fn, x_T, **options)
            return samplers.ancestral(chain, denoise_fn, x_T, keys, variance=variance, **options)

        return sample

    def make_bound(
        *,
        steps=None,
        variance: str = variance,
        clip_x0: bool = clip_x0,
        cdf: str = "normal",
        x_0_error=None,
    ):
        """The options of the bound: those of `make_sample`, and the decoder's cdf, "normal" or "tanh"."""
        config_lib.check_choice("cdf", cdf, likelihood.CDFS)
        chain = shortened(steps)
        given = {"variance": reverse_variance(variance, chain, x_0_error)}
        given |= {"clip_x0": clip_x0, "cdf": cdf}

        def bound(params, key, batch):
            x_0, keys = diffusion.from_uint8(batch["image"]), fold_in_each(key, batch["index"])
            denoise_fn = denoiser(params, batch["label"])
            parts = likelihood.bound(chain, denoise_fn, x_0, keys, **given)
            total = parts.prior + jnp.sum(parts.terms, axis=1)
            scalars = {"total": total, "L_T": parts.prior, "L_0": parts.terms[:, 0]}
            curves = {name: getattr(parts, name) for name in ("terms", "x_0_error", "eps_error")}
            return scalars | curves

        return chain, bound

    return Method(
        image_shape,
        unet.num_classes,
        init,
        loss_fn,
        metric_names,
        make_sample,
        make_bound,
        memory,
        remember,
    )


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
