"""Denoising diffusion probabilistic models (Ho et al. 2020): the paper on a page.

A `DDPM` puts the parts together: a Schedule, a network, a prediction, a loss. Samplers, the bound and the editing of
images use only its `denoiser`. To change an idea, subclass it and replace a method, or name a part as module:NAME.
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

from ddpm_jax import options
from ddpm_jax.method import Method, fold_in_each, mirror_at_random
from ddpm_jax.names import check_choice, check_takes, described, find
from ddpm_jax.networks import NETWORKS, UNet, init_params
from ddpm_jax.options import Choice, ConfigError, option
from ddpm_jax.process import diffusion, likelihood, losses, predictions, schedules, timesteps
from ddpm_jax.process.diffusion import LEARNED, VARIANCES, Denoiser
from ddpm_jax.process.samplers import SAMPLERS, Ancestral, Sampler
from ddpm_jax.process.samplers.chain import check_clip
from ddpm_jax.process.schedules import Schedule
from ddpm_jax.process.time_sampling import TIME_SAMPLERS, TimeSampler

SECTIONS = ("model", "schedule", "diffusion")  # of a config, beside those of every Method

# Fields of a config's section model that older configs may lack, and what was the default then.
ONCE_DEFAULT = {"num_groups": 32, "attention_resolutions": (16,)}

STEPS_HELP = (
    "The steps of the chain: their number, such as 50; ddim50, quad50 or logsnr50 for a number with its spacing;"
    " 10,15,20 for that many in each third; or the times themselves, as [0,20,41]. Default: all T."
)
CLIP_HELP = (
    "Clips predictions of x_0 to [-1, 1]; --noclip does not, and --clip=dynamic clips by percentile. Default: as"
    " in the config."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Which steps of the chain are visited, and with which model."""

    steps: str | int | tuple[int, ...] | None = option(None, STEPS_HELP)
    spacing: Literal["uniform", "linear", "quadratic", "log_snr"] | None = option(
        None, "How a plain number of steps is spread over the chain. Default: uniform."
    )
    clip_x0: bool | Literal["dynamic"] | None = option(None, CLIP_HELP, flag="clip")
    guidance: float = option(
        1.0,
        "The scale of classifier-free guidance: 1 is the model with labels, 0 the one without, and more than 1"
        " exaggerates the labels.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Chain):
    """How images are drawn from a diffusion.

    >>> from ddpm_jax.process.samplers import DDIM
    >>> sampling = Sampling(sampler=DDIM(), steps=50, clip_x0=False)
    """

    sampler: Annotated[Sampler, Choice("sampler", SAMPLERS)] = option(
        Ancestral(), "The sampler that draws the images: a built-in one or module:NAME."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounding:
    """How the bound is measured."""

    steps: str | int | tuple[int, ...] | None = option(None, STEPS_HELP)
    variance: str | None = option(
        None,
        "The variance of the reverse chain: fixed_small, fixed_large, analytic, or what was learned. Default:"
        " as in the config.",
    )
    clip_x0: bool | None = option(None, CLIP_HELP, flag="clip")
    cdf: Literal["normal", "tanh"] = option(
        "normal",
        "The distribution function of the decoder: normal, or tanh as in Ho et al.'s code.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DDPM(Method):
    """A denoising diffusion model. The fields after the first three are the keys of config.diffusion.

    Attributes:
      schedule: the full chain of T steps that it is trained on.
      network: a flax Module, (x [B, H, W, C], t [B], labels [B] or None, *, dropout_keys) -> [B, H, W, out_channels].
        Its field out_channels is filled in here, and label_dropout adds one class to num_classes.
      image_shape: (H, W, C).
      flip: mirror training images left to right with probability ½ (config.data.flip).

    Raises:
      ValueError: parts that do not fit together; one line.

    >>> import ddpm_jax as dj
    >>> network = dj.UNet(channels=8, channel_mults=(1,), num_groups=2)
    >>> model = dj.DDPM(schedule=dj.linear_schedule(1000), network=network, image_shape=(8, 8, 1))
    >>> params = model.init(jax.random.key(0))
    >>> dj.DDPM(schedule=dj.linear_schedule(10), network=network, image_shape=(8, 8, 1), loss="vbl")
    Traceback (most recent call last):
    ValueError: unknown loss 'vbl'; did you mean 'vlb'? (choose from simple, vlb, hybrid, or module:NAME)
    """

    schedule: Schedule
    network: nn.Module
    image_shape: tuple[int, int, int]
    flip: bool = False
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
    clip_x0: bool = option(True, "Whether samplers and the bound clip x_0 to [-1, 1] by default.")

    Sampling = Sampling
    Bounding = Bounding

    def __post_init__(self):
        check_choice("variance", self.variance, VARIANCES)
        loss = find(self.loss, dict.fromkeys(losses.LOSSES), "loss")
        if callable(loss):
            check_takes(loss, ("schedule", "denoise_fn", "x_0", "t", "eps"), "loss")
        losses.check(self.loss, self.variance, self.min_snr_gamma)
        predictions.check(self.schedule, self.prediction)
        if not isinstance(self.network, nn.Module):
            raise ValueError(f"{described(self.network, 'network')} is not a flax Module")
        check_takes(self.network, ("x", "t", "labels"), "network")
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
        """Number of classes of the data; a network with label_dropout has one more, for no label."""
        return getattr(self.network, "num_classes", 0)

    @functools.cached_property
    def sized_network(self) -> nn.Module:
        """The network with the channels and classes that it needs here."""
        channels = self.image_shape[-1] * (1 + (self.variance in LEARNED))
        sizes = {"out_channels": channels}
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
        """The parameters before training, by the network's own initialisers."""
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
        """The model as losses and samplers see it, see `diffusion.denoiser`.

        With guidance g the output is the unconditional one plus g times its difference to the conditional one (Ho &
        Salimans 2021), both evaluated in one batch; a learned variance is the conditional one.
        """
        network, learned = self.sized_network, self.variance in LEARNED
        no_label = np.int32(self.num_classes)

        takes = inspect.signature(type(network).__call__).parameters
        drops = {"dropout_keys": dropout_keys} if "dropout_keys" in takes else {}

        def apply(x, t, label):
            label = label if getattr(network, "num_classes", 0) else None
            result = network.apply({"params": params}, x, t, label, **drops)
            check_shape(result, (*x.shape[:-1], network.out_channels), network, "network")
            return result

        def guided(x, t):
            if guidance == 0:
                return apply(x, t, jnp.full_like(label, no_label))
            both = [jnp.concatenate([values, values]) for values in (x, t, label)]
            both[2] = both[2].at[label.shape[0] :].set(no_label)
            with_label, without = jnp.split(apply(*both), 2)
            value = without + guidance * (with_label - without)
            if learned:
                mean, _ = jnp.split(value, 2, axis=-1)
                _, values = jnp.split(with_label, 2, axis=-1)
                value = jnp.concatenate([mean, values], axis=-1)
            return value

        return diffusion.denoiser(
            self.schedule,
            guided if guidance != 1 else lambda x, t: apply(x, t, label),
            prediction=self.prediction,
            learned_variance=learned,
            variance=variance,
        )

    # ---- training

    @property
    def metric_names(self) -> tuple[str, ...]:
        quarters = ("loss_t1", "loss_t2", "loss_t3", "loss_t4")
        return quarters + (("simple", "vlb") if self.loss == "hybrid" else ())

    def init_loss_state(self) -> Any:
        return self.t_sampling.init(self.schedule)

    def update_loss_state(self, loss_state: Any, record: Any) -> Any:
        return self.t_sampling.update(loss_state, *record) if record else loss_state

    def example_keys(self, key, batch) -> tuple:
        """Keys of t, ε, dropout, mirroring and hidden labels: [B] each."""
        keys = fold_in_each(key, batch["index"])
        keys = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
        return tuple(keys[:, n] for n in range(5))

    def shown(self, key, batch):
        x_0, (*_, flip_keys, _) = (
            diffusion.from_uint8(batch["image"]),
            self.example_keys(key, batch),
        )
        return mirror_at_random(flip_keys, x_0) if self.flip else x_0

    def loss_fn(self, params, loss_state, key, batch):
        """The loss of Ho et al. Algorithm 1, for one draw of t and ε per example."""
        t_keys, eps_keys, dropout_keys, _, label_keys = self.example_keys(key, batch)
        x_0, label = self.shown(key, batch), batch["label"]
        if self.label_dropout:
            hidden = jax.vmap(lambda key: jax.random.bernoulli(key, self.label_dropout))(label_keys)
            label = jnp.where(hidden, np.int32(self.num_classes), label)
        t, weight = self.t_sampling.draw(self.schedule, loss_state, key, t_keys, batch["position"])
        eps = jax.vmap(lambda key: jax.random.normal(key, self.image_shape))(eps_keys)
        variance = None if self.loss == "simple" else self.variance
        denoiser = self.denoiser(params, label, variance=variance, dropout_keys=dropout_keys)
        values, parts = self.compare(denoiser(self.schedule), x_0, t, eps)
        metrics = {name: (part, weight) for name, part in parts.items()}
        quarter = 4 * t // len(self.schedule)
        for q in range(4):
            metrics[f"loss_t{q + 1}"] = values, weight * (quarter == q)
        return values * weight, metrics, (t, values)

    def compare(self, denoise_fn, x_0, t, eps):
        """The loss [B] at x_t, and its parts {name: [B]} for the log."""
        args = (self.schedule, denoise_fn, x_0, t, eps)
        squared = functools.partial(
            losses.simple if self.loss == "simple" else losses.hybrid,
            prediction=self.prediction,
            min_snr_gamma=self.min_snr_gamma,
        )
        if self.loss == "simple":
            return squared(*args), {}
        if self.loss == "hybrid":
            of_mean, of_variance = squared(*args)
            parts = {"simple": of_mean, "vlb": of_variance}
            return of_mean + losses.HYBRID_WEIGHT * of_variance, parts
        loss = losses.vlb if self.loss == "vlb" else find(self.loss, {}, "loss")
        values = loss(*args)
        check_shape(values, x_0.shape[:1], loss, "loss")
        return values, {}

    # ---- sampling and the bound

    def resolve(self, chosen):
        """Options of sampling or of the bound, with None replaced by the model's own values."""
        values = {"clip_x0": self.clip_x0 if chosen.clip_x0 is None else chosen.clip_x0}
        if chosen.steps is not None:
            values["steps"] = timesteps.as_text(chosen.steps)
        for holder in (getattr(chosen, "sampler", None), chosen):
            if hasattr(holder, "variance") and holder.variance is None:
                holder = dataclasses.replace(holder, variance=self.variance)
                if isinstance(holder, type(chosen)):
                    values["variance"] = holder.variance
                else:
                    values["sampler"] = holder
        return dataclasses.replace(chosen, **values)

    def chain(
        self, sampling: Chain = Sampling(), *, from_t: int | None = None, x_0_error=None
    ) -> Schedule:
        """The chain that the options of sampling describe, after a check that they fit this model.

        Args:
          from_t: begin at this time of the full chain instead of T − 1.
          x_0_error: [S], for variance "analytic"; see `diffusion.analytic_log_variance`.

        Raises:
          ValueError: one line.
        """
        steps = timesteps.shorten(
            self.schedule, sampling.steps, spacing=sampling.spacing, last=from_t
        )
        check_clip(self.clip_x0 if sampling.clip_x0 is None else sampling.clip_x0)
        if not np.isfinite(sampling.guidance):
            raise ValueError(f"guidance must be a finite number, got {sampling.guidance}")
        if sampling.guidance != 1.0 and not self.label_dropout:
            raise ValueError(
                "guidance needs a model that has learned to do without labels: train with classes and"
                " config.diffusion.label_dropout above 0, such as 0.1"
            )
        sampler = getattr(sampling, "sampler", None)
        if sampler is not None:
            arguments = ("chain", "denoiser", "x_T", "keys")
            check_takes(sampler, arguments, "sampler", keywords=("clip_x0", "keep"))
        if hasattr(sampler, "variance"):
            if sampler.variance == "analytic" and from_t is not None:
                raise ValueError(
                    "variance 'analytic' is measured for whole chains, not from_t; use fixed_small or"
                    " fixed_large"
                )
            self.reverse_variance(sampler.variance, steps, x_0_error)
        if hasattr(sampler, "check"):
            sampler.check(steps)
        return steps

    def reverse_variance(self, asked: str | None, steps: Schedule, x_0_error=None):
        """A variance for `diffusion.model_log_variance`, after a check that it fits this model and chain."""
        asked = asked or self.variance
        if not isinstance(asked, str):
            return asked
        check_choice("variance", asked, VARIANCES)
        if asked in LEARNED and asked != self.variance:
            raise ValueError(
                f"variance {asked!r} needs outputs that this network does not have: it was trained with"
                f" {self.variance!r}; use that, fixed_small, fixed_large or analytic"
            )
        if asked == "learned" and (steps.times != self.schedule.times[: len(steps)]).any():
            raise ValueError(
                "variance 'learned' is that of single steps of the full chain; in fewer steps use"
                " fixed_small, fixed_large or analytic, or train with learned_range"
            )
        if asked != "analytic":
            return asked
        if x_0_error is None or len(x_0_error) != len(steps):
            raise ValueError(
                "variance 'analytic' needs x_0_error, the mean squared error of x̂_0 measured at each"
                f" of the {len(steps)} steps of the chain"
            )
        return diffusion.analytic_log_variance(steps, x_0_error)

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
        """Images x_0, from x_T if that is given, otherwise from noise.

        Args:
          x_T: [B, H, W, C] of the last step of the chain; needed with `from_t`.
          from_t, x_0_error: see `chain`.
          frames: return (x_0, `Trajectory`) with this many steps of the chain, evenly spaced.
        """
        steps = self.chain(sampling, from_t=from_t, x_0_error=x_0_error)
        keys, sampler, variance = fold_in_each(key, index), sampling.sampler, None
        if hasattr(sampler, "variance"):
            variance = self.reverse_variance(sampler.variance, steps, x_0_error)
        if x_T is None:
            if from_t is not None:
                raise ValueError(f"a chain from_t={from_t} begins with an x_T that is given")
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
        """The chain that the options of the bound describe, after a check that they fit this model."""
        steps = timesteps.shorten(self.schedule, options.steps)
        check_choice("cdf", options.cdf, likelihood.CDFS)
        self.reverse_variance(options.variance, steps, x_0_error)
        return steps

    def bound(
        self,
        params,
        key,
        batch,
        options: Bounding = Bounding(),
        *,
        x_0_error=None,
    ) -> dict[str, Float[Array, ...]]:
        """The bound on −log p(x_0) in bits/dim: total, L_T and L_0 [B]; terms, x_0_error and eps_error [B, S]."""
        steps = self.bound_chain(options, x_0_error=x_0_error)
        x_0, keys = diffusion.from_uint8(batch["image"]), fold_in_each(key, batch["index"])
        variance = self.reverse_variance(options.variance, steps, x_0_error)
        clip = self.clip_x0 if options.clip_x0 is None else options.clip_x0
        denoiser = self.denoiser(params, batch["label"], variance=variance)
        parts = likelihood.bound(steps, denoiser, x_0, keys, clip_x0=clip, cdf=options.cdf)
        total = parts.prior + jnp.sum(parts.terms, axis=1)
        scalars = {"total": total, "L_T": parts.prior, "L_0": parts.terms[:, 0]}
        return scalars | {
            "terms": parts.terms,
            "x_0_error": parts.x_0_error,
            "eps_error": parts.eps_error,
        }

    # ---- from a config

    @classmethod
    def from_config(cls, config) -> DDPM:
        """The model described by the sections data, model, schedule and diffusion of a config.

        Raises:
          ConfigError: a field that is unknown, of a wrong type or impossible.
        """
        if config.data.image_shape is None:
            raise ConfigError("config.data.image_shape must be given, such as (32, 32, 3)")
        image_shape = tuple(config.data.image_shape)
        with options.errors_at("config.schedule"):
            schedule = schedules.make(**config.schedule)
        network = make_network(config.model, image_shape)
        parts = {"schedule": schedule, "network": network, "image_shape": image_shape}
        parts["flip"] = bool(config.data.get("flip", False))
        return options.build(cls, config.diffusion, "config.diffusion", **parts)


def check_shape(value: Any, shape: tuple[int, ...], source: Any, kind: str) -> None:
    """Checks the shape that a network, loss or sampler returns.

    Raises:
      ConfigError: the shape is wrong; names the file of the network, loss or sampler.
    """
    found = getattr(value, "shape", None)
    if found != tuple(shape):
        found = type(value).__name__ if found is None else found
        raise ConfigError(f"{described(source, kind)} returns {found}, and must return {shape}")


def make_network(section, image_shape: tuple[int, int, int]) -> nn.Module:
    """The network described by a config's section model, whose `name` is a key of NETWORKS (default: unet) or module:NAME."""
    section = dict(section)
    with options.errors_at("config.model"):
        network = find(section.pop("name", "unet"), NETWORKS, "network")
        if not (inspect.isclass(network) and issubclass(network, nn.Module)):
            raise ValueError(f"{described(network, 'network')} is not a flax Module")
    if network is UNet:  # what a config without these fields has always meant
        section = ONCE_DEFAULT | section
        section["attention_resolutions"] = section["attention_resolutions"] or ()
    network = options.build(network, section, "config.model", name=None, parent=None)
    if hasattr(network, "check"):
        with options.errors_at("config.model"):
            network.check(image_shape)
    return network


def make(config) -> DDPM:
    """The Method of `config.method = "ddpm_jax.ddpm"`."""
    return DDPM.from_config(config)
