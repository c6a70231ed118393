"""Denoising diffusion probabilistic models (Ho et al. 2020): the paper on a page.

A `DDPM` combines a Schedule, a network, a prediction and a loss. Training uses `loss_fn`; samplers, the bound and image
editing use only `denoiser`. To change an idea, subclass it and override a method, or name a part of your own as
module:NAME.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from ddpm_jax import augmentation, hints, options
from ddpm_jax.method import Method, check_shape, fold_in_each
from ddpm_jax.names import check_choice, check_takes, described, find
from ddpm_jax.networks import check_network, init_params, make_network
from ddpm_jax.options import Choice, ConfigError, option
from ddpm_jax.process import (
    diffusion,
    likelihood,
    losses,
    predictions,
    samplers,
    schedules,
    time_sampling,
    timesteps,
)
from ddpm_jax.process.diffusion import LEARNED, VARIANCES, Denoiser
from ddpm_jax.process.guidance import guided
from ddpm_jax.process.samplers.chain import check_clip
from ddpm_jax.process.schedules import Schedule
from ddpm_jax.process.time_sampling import TIME_SAMPLERS, TimeSampler
from ddpm_jax.settings import Bounding, Chain, Sampling

SECTIONS = ("model", "schedule", "diffusion")  # read from a config, beside those of every Method


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DDPM(Method):
    """A denoising diffusion model. The fields after the first five are the keys of config.diffusion.

    Attributes:
      schedule: the full chain of T steps, on which it is trained.
      network: a flax Module, see `networks.Network`. The model sets its out_channels, and with label_dropout adds a class.
      image_shape: (H, W, C).
      flip, shift: mirror training images with probability ½, and move them by up to this many pixels (config.data).

    Raises:
      ValueError: one line: parts that are incompatible.

    >>> network = dj.UNet(channels=8, channel_mults=(1,), num_res_blocks=1)
    >>> model = dj.DDPM(schedule=dj.linear_schedule(10, end=0.5), network=network, image_shape=(8, 8, 1))
    >>> params = model.init(jax.random.key(0))
    >>> denoise_fn = model.denoiser(params)(model.schedule)
    >>> denoise_fn(jnp.zeros((2, 8, 8, 1)), 5).x_0.shape
    (2, 8, 8, 1)
    """

    schedule: Schedule
    network: nn.Module
    image_shape: tuple[int, int, int]
    flip: bool = False
    shift: int = 0
    prediction: str | Callable = option(
        "eps", "What the network predicts: eps, x_0, mean, v, velocity, edm, or module:NAME."
    )
    variance: Literal["fixed_small", "fixed_large", "learned", "learned_range", "analytic"] = (
        option(
            "fixed_large",
            "The variance of the reverse chain; a learned one doubles the network's channels.",
        )
    )
    loss: str | Callable = option(
        "simple", "simple, vlb (the bound), hybrid (a learned variance), or module:NAME."
    )
    t_sampling: Annotated[TimeSampler, Choice("t_sampling", TIME_SAMPLERS)] = option(
        TIME_SAMPLERS["uniform"](), "How t is drawn in training."
    )
    min_snr_gamma: float | None = option(None, "γ of Min-SNR weights for L_simple; None for none.")
    label_dropout: float = option(
        0.0, "Share of training images whose label is hidden, so that samples can be guided."
    )
    clip_x0: bool | str = option(True, "Clips x_0 to [-1, 1] in samplers and bound; or dynamic.")

    Sampling = Sampling
    Bounding = Bounding

    def __post_init__(self):
        if not isinstance(self.schedule, Schedule):
            raise ValueError(
                f"schedule must be a Schedule, such as dj.linear_schedule(1000); got {self.schedule!r}"
            )
        if np.shape(self.image_shape) != (3,) or not all(
            isinstance(size, (int, np.integer)) and size > 0 for size in self.image_shape
        ):
            raise ValueError(
                f"image_shape must be (H, W, C), such as (32, 32, 3); got {self.image_shape}"
            )
        if isinstance(self.t_sampling, str):
            time_sampler = find(self.t_sampling, TIME_SAMPLERS, "t_sampling")()
            object.__setattr__(self, "t_sampling", time_sampler)
        augmentation.check(self.image_shape, shift=self.shift)
        check_choice("variance", self.variance, VARIANCES)
        check_clip(self.clip_x0)
        arguments = ("schedule", "denoise_fn", "x_0", "t", "eps")
        check_takes(losses.named(self.loss), arguments, "loss")
        losses.check(self.loss, self.variance, self.min_snr_gamma)
        predictions.check(self.schedule, self.prediction)
        time_sampling.check(self.t_sampling, self.schedule)
        check_network(self.network, self.image_shape)
        classes = getattr(self.network, "num_classes", 0)
        if not 0 <= self.label_dropout < 1 or (self.label_dropout and not classes):
            raise ValueError(
                "label_dropout must lie in [0, 1), and be 0 for a model without classes; got"
                f" {self.label_dropout}"
            )
        _ = self.sized_network  # refuses a network without the fields that are filled in

    # ---- the network

    @functools.cached_property
    def num_classes(self) -> int:
        """Number of classes of the data; with label_dropout the network has one more, for no label."""
        return getattr(self.network, "num_classes", 0)

    @functools.cached_property
    def sized_network(self) -> nn.Module:
        """The network with the output channels and classes that this model needs."""
        sizes = {"out_channels": self.image_shape[-1] * (1 + (self.variance in LEARNED))}
        if self.label_dropout:
            sizes["num_classes"] = self.num_classes + 1
        fields = {field.name for field in dataclasses.fields(self.network)}
        if missing := sizes.keys() - fields:
            raise ValueError(
                f"{described(self.network, 'network')} has no field {', '.join(missing)}, which the model"
                " fills in"
            )
        return self.network.clone(**sizes)

    def init(self, key: Key[Array, ""]) -> Any:
        """Initialises the parameters, with the network's own initialisers."""
        return init_params(self.sized_network, key, self.image_shape)

    def denoiser(
        self,
        params: Any,
        label: Int32[Array, " B"] | None = None,
        *,
        guidance: float = 1.0,
        variance: str | np.ndarray | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Denoiser:
        """The function from a chain to denoise_fn(x_t, t) that losses and samplers use; see `diffusion.denoiser`.

        Args:
          label: of each image; required for a model with classes.
          guidance: scale of classifier-free guidance, see `guidance.guided`.
          variance: of p(x_s | x_t), see `diffusion.model_log_variance`; by default it is not computed.
          dropout_keys: one for each image; None for no dropout.
        """
        network, learned = self.sized_network, self.variance in LEARNED
        takes = inspect.signature(type(network).__call__).parameters
        drops = {"dropout_keys": dropout_keys} if "dropout_keys" in takes else {}

        def apply(x, t, label):
            label = label if getattr(network, "num_classes", 0) else None
            result = network.apply({"params": params}, x, t, label, **drops)
            check_shape(result, (*x.shape[:-1], network.out_channels), network, "network")
            return result

        if guidance == 1:
            network_fn = functools.partial(apply, label=label)
        else:
            no_label = np.int32(self.num_classes)
            network_fn = guided(apply, label, no_label, guidance, learned_variance=learned)
        return diffusion.denoiser(
            self.schedule,
            network_fn,
            prediction=self.prediction,
            learned_variance=learned,
            variance=variance,
        )

    # ---- training

    @property
    def metric_names(self) -> tuple[str, ...]:
        quarters = ("loss_t1", "loss_t2", "loss_t3", "loss_t4")
        return quarters + (("simple", "vlb") if self.loss == "hybrid" else ())

    def init_loss_state(self, params: Any) -> Any:
        return time_sampling.initial(self.t_sampling, self.schedule)

    def update_loss_state(self, loss_state: Any, record: Any, params: Any) -> Any:
        return time_sampling.updated(self.t_sampling, loss_state, *record) if record else loss_state

    def example_keys(self, key, batch) -> tuple:
        """Keys of t, ε, dropout, mirroring and hidden labels: [B] each."""
        keys = fold_in_each(key, batch["index"])
        keys = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
        return tuple(keys[:, n] for n in range(5))

    def shown(self, key, batch):
        x_0 = diffusion.from_uint8(batch["image"])
        keys = self.example_keys(key, batch)[3]
        return augmentation.augmented(keys, x_0, flip=self.flip, shift=self.shift)

    def loss_fn(self, params, loss_state, key, batch):
        """The loss of one step of Ho et al. 2020, Algorithm 1: evaluates `compare` at what `draw` returns."""
        drawn = jax.lax.stop_gradient(self.draw(params, loss_state, key, batch))
        t, weight = drawn.t, drawn.weight
        variance = None if self.loss == "simple" else self.variance
        more = {"variance": variance, "dropout_keys": drawn.dropout_keys}
        denoise_fn = self.denoiser(params, drawn.label, **more)(self.schedule)
        values, parts = self.compare(denoise_fn, drawn.x_0, t, drawn.eps)
        check_shape(values, t.shape, self.compare, "the Method's")
        metrics = {name: (part, weight) for name, part in parts.items()}
        quarter = 4 * t // len(self.schedule)
        for q in range(4):
            metrics[f"loss_t{q + 1}"] = values, weight * (quarter == q)
        return values * weight, metrics, (t, values)

    def draw(self, params, loss_state, key, batch) -> losses.Drawn:
        """The images as they are shown, t, and ε ~ N(0, I).

        A subclass may return another x_0 and ε on the same x_t, such as those of a teacher; no gradient goes through them.
        """
        t_keys, eps_keys, dropout_keys, _, label_keys = self.example_keys(key, batch)
        x_0, label = self.shown(key, batch), batch["label"]
        if self.label_dropout:
            hidden = jax.vmap(lambda key: jax.random.bernoulli(key, self.label_dropout))(label_keys)
            label = jnp.where(hidden, np.int32(self.num_classes), label)
        t, weight = self.t_sampling.draw(self.schedule, loss_state, key, t_keys, batch["position"])
        eps = jax.vmap(lambda key: jax.random.normal(key, self.image_shape))(eps_keys)
        return losses.Drawn(x_0, label, t, weight, eps, dropout_keys)

    def compare(self, denoise_fn, x_0, t, eps):
        """The loss [B] of the network at x_t, and its parts {name: [B]} for the log."""
        weights = {"prediction": self.prediction, "min_snr_gamma": self.min_snr_gamma}
        args = (self.schedule, denoise_fn, x_0, t, eps)
        values, parts = losses.evaluate(self.loss, *args, **weights)
        check_shape(values, x_0.shape[:1], losses.named(self.loss), "loss")
        return values, parts

    # ---- sampling and the bound

    def resolve(self, chosen):
        """The settings `chosen` (Chain, Sampling or Bounding) with this model's defaults in place of None."""
        values = {"clip_x0": self.clip_x0 if chosen.clip_x0 is None else chosen.clip_x0}
        if chosen.steps is not None:
            values["steps"] = timesteps.as_text(chosen.steps)
        sampler = getattr(chosen, "sampler", None)
        if hasattr(sampler, "variance") and sampler.variance is None:
            values["sampler"] = dataclasses.replace(sampler, variance=self.variance)
        if hasattr(chosen, "variance") and chosen.variance is None:
            values["variance"] = self.variance
        return dataclasses.replace(chosen, **values)

    def chain(
        self, sampling: Chain = Sampling(), *, from_t: int | None = None, x_0_error=None
    ) -> Schedule:
        """The shortened chain of these settings, after a check that this model can use them.

        Args:
          from_t: begin at this step of the full chain instead of T − 1.
          x_0_error: [S], for variance "analytic"; see `diffusion.analytic_log_variance`.

        Raises:
          ValueError: one line: settings that this model cannot use.
        """
        steps = timesteps.shorten(
            self.schedule, sampling.steps, spacing=sampling.spacing, last=from_t
        )
        check_clip(self.clip_x0 if sampling.clip_x0 is None else sampling.clip_x0)
        if not np.isfinite(sampling.guidance):
            raise ValueError(f"guidance must be a finite number, got {sampling.guidance}")
        if sampling.guidance != 1.0 and not self.label_dropout:
            raise ValueError(
                "guidance needs a model that was also trained without labels: train with classes and"
                " config.diffusion.label_dropout above 0, such as 0.1"
            )
        sampler = getattr(sampling, "sampler", None)
        if sampler is not None:
            steps = samplers.prepare(sampler, steps, self.schedule)
        if hasattr(sampler, "variance"):
            if sampler.variance == "analytic" and from_t is not None:
                raise ValueError(
                    "variance 'analytic' is measured for whole chains, not with from_t; use fixed_small or"
                    " fixed_large"
                )
            self.reverse_variance(sampler.variance, steps, x_0_error)
        return steps

    def reverse_variance(
        self, variance: str | None, steps: Schedule, x_0_error=None
    ) -> str | np.ndarray:
        """A variance as an argument of `diffusion.model_log_variance`; None for that of the model."""
        return diffusion.reverse_variance(
            variance or self.variance, steps, self.schedule, self.variance, x_0_error
        )

    def sample(
        self,
        params,
        key,
        index,
        label,
        sampling: Sampling = Sampling(),
        *,
        x_T=None,
        from_t: int | None = None,
        x_0_error=None,
        frames: int = 0,
    ):
        """Draws images x_0 [B, H, W, C], in [−1, 1] or beyond.

        Args:
          index: [B], the numbers of the images, from which their noise follows.
          label: [B]; not used by a model without classes.
          x_T: [B, H, W, C], x_t at the last step of the chain; required with `from_t`. By default noise of the prior.
          from_t, x_0_error: see `chain`.
          frames: if positive, return (x_0, `Trajectory`) with this many evenly spaced steps.
        """
        steps = self.chain(sampling, from_t=from_t, x_0_error=x_0_error)
        keys, sampler, variance = fold_in_each(key, index), sampling.sampler, None
        if hasattr(sampler, "variance"):
            variance = self.reverse_variance(sampler.variance, steps, x_0_error)
        if x_T is None:
            if from_t is not None:
                raise ValueError(f"from_t={from_t} needs x_T, the images to begin with")
            x_T = diffusion.prior(steps, keys, self.image_shape)
        keep = None
        if frames:
            keep = timesteps.subsequence(min(frames, len(steps)), len(steps))[::-1]
        denoiser = self.denoiser(params, label, guidance=sampling.guidance, variance=variance)
        clip = self.clip_x0 if sampling.clip_x0 is None else sampling.clip_x0
        result = sampler(steps, denoiser, x_T, keys, clip_x0=clip, keep=keep)
        check_shape(result[0] if frames else result, x_T.shape, sampler, "sampler")
        return result

    def bound_chain(self, options: Bounding = Bounding(), *, x_0_error=None) -> Schedule:
        """The shortened chain of these settings, after a check that this model can use them."""
        steps = timesteps.shorten(self.schedule, options.steps)
        check_choice("cdf", options.cdf, likelihood.CDFS)
        self.reverse_variance(options.variance, steps, x_0_error)
        return steps

    def bound(
        self, params, key, batch, options: Bounding = Bounding(), *, x_0_error=None
    ) -> dict[str, Float[Array, ...]]:
        """The bound on −log p(x_0) in bits/dim: total, L_T and L_0 [B]; terms, x_0_error and eps_error [B, S]."""
        steps = self.bound_chain(options, x_0_error=x_0_error)
        x_0, keys = diffusion.from_uint8(batch["image"]), fold_in_each(key, batch["index"])
        variance = self.reverse_variance(options.variance, steps, x_0_error)
        clip = self.clip_x0 if options.clip_x0 is None else options.clip_x0
        denoiser = self.denoiser(params, batch["label"], variance=variance)
        parts = likelihood.bound(steps, denoiser, x_0, keys, clip_x0=clip, cdf=options.cdf)
        scalars = {"total": parts.prior + jnp.sum(parts.terms, axis=1), "L_T": parts.prior}
        tables = {"terms": parts.terms, "x_0_error": parts.x_0_error, "eps_error": parts.eps_error}
        return scalars | {"L_0": parts.terms[:, 0]} | tables

    # ---- from a config

    @classmethod
    def from_config(cls, config) -> DDPM:
        """The model of the config sections data, model, schedule and diffusion.

        Raises:
          ConfigError: a field is unknown, of a wrong type or impossible.
        """
        if config.data.get("image_shape") is None:
            raise ConfigError("config.data.image_shape is missing; set it, such as (32, 32, 3)")
        changes, image_shape = augmentation.of(config.data), tuple(config.data.image_shape)
        with options.errors_at("config.schedule"):
            schedule = schedules.make(**{"name": None} | hints.fields(config.get("schedule")))
        network = make_network(config.get("model"), image_shape)
        return options.build(
            cls,
            config.get("diffusion"),
            "config.diffusion",
            schedule=schedule,
            network=network,
            image_shape=image_shape,
            **changes,
        )


def make(config) -> DDPM:
    """The Method of a config with `config.method = "ddpm_jax.ddpm"`."""
    return DDPM.from_config(config)
