"""Denoising diffusion probabilistic models (Ho et al. 2020): the paper on a page.

`make(config)` puts the parts together: a Schedule, a U-Net, a parameterisation, a loss and the samplers.
What comes out is a `Method`, a few pure functions and no state. An experiment writes a `make` of its own,
usually this one with a function replaced: `make(config)._replace(loss=my_loss)`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ddpm_jax import config as config_lib
from ddpm_jax import diffusion, likelihood, losses, samplers, schedules
from ddpm_jax.unet import UNet, check, init_params

SECTIONS = ("model", "schedule", "diffusion")  # of a config, beside those that every Method has


class Diffusion(NamedTuple):
    """A model as a diffusion, for what is done with images beside drawing them. Images are float32 [B, H, W, C].

    Attributes:
      schedule: the full chain that it was trained on.
      denoiser: (params, label int32 [B], *, guidance=1.0) -> denoise_fn; see `diffusion.denoiser`.
      make_encode: (**options) -> encode, with encode(params, label, x_0) -> x_T; see `samplers.encode`.
      make_inpaint: (**options) -> inpaint, with inpaint(params, key, index, label, x_0, mask) -> x; see
        `samplers.inpaint`.
    """

    schedule: schedules.Schedule
    denoiser: Callable
    make_encode: Callable
    make_inpaint: Callable


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
      shown: (key, batch) -> x_0 float32 [B, H, W, C], the images that `loss` shows the network for this key,
        mirrored where it does so; None if they are those of the batch.
      sample_options: (**options) -> the same with the defaults that this model gives them, for a recipe;
        None if the signature of make_sample says them all.
      make_bound: (**options) -> (chain, bound), with bound(params, key, batch) -> {name: [B] or [B, S]}:
        the bound on −log p(x_0) as "total", its parts, and curves over the steps of the Schedule `chain`.
        None if the model has no such bound.
      diffusion: what it is as a diffusion, for whatever looks inside; None if it is none.
      memory: what the loss remembers from step to step, a tree of arrays; it is part of the TrainState.
      remember: (memory, record) -> memory, with the records of the whole batch over all devices.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    init: Callable
    loss: Callable
    metric_names: tuple[str, ...]
    make_sample: Callable
    shown: Callable | None = None
    sample_options: Callable | None = None
    make_bound: Callable | None = None
    diffusion: Diffusion | None = None
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
    section = dict(config.schedule)
    if section.get("name") == "betas":  # as many as there are, whatever the base config says
        section["num_timesteps"] = None
    schedule = config_lib.call("config.schedule", schedules.make, section)
    section = config.diffusion if "diffusion" in config else {}
    learned = section.get("variance") in diffusion.LEARNED
    given = {"out_channels": image_shape[-1] * (1 + learned), "name": None, "parent": None}
    values = config_lib.arguments("config.model", UNet, config.model, given)
    unet = config_lib.call("config.model", UNet, values, **given)
    with config_lib.errors_at("config.model"):
        check(image_shape, **values)
    if unet.num_classes and section.get("label_dropout"):
        unet = unet.clone(num_classes=unet.num_classes + 1)  # the last one stands for no label
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
    label_dropout: float = 0.0,
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
      label_dropout: share of training images whose label is hidden from the network, in [0, 1), so that
        samples can be guided (Ho & Salimans 2021). Above 0 the network has one class more than the data,
        its last, which stands for no label.
      clip_x0: whether samplers and the bound clip x̂_0 to [−1, 1] unless told otherwise.
    """
    config_lib.check_choice("prediction", prediction, diffusion.PREDICTIONS)
    config_lib.check_choice("variance", variance, diffusion.VARIANCES)
    config_lib.check_choice("loss", loss, losses.LOSSES)
    config_lib.check_choice("t_sampling", t_sampling, losses.T_SAMPLINGS)
    losses.check(loss, variance, min_snr_gamma)
    diffusion.check_invertible(schedule, prediction)
    if not 0 <= label_dropout < 1 or (label_dropout and not unet.num_classes):
        raise ValueError(
            f"label_dropout must lie in [0, 1), and be 0 for a model without classes; got {label_dropout}"
        )
    T, trained_variance, trained_clip = len(schedule), variance, clip_x0
    num_classes = unet.num_classes - bool(label_dropout)
    no_label = np.int32(num_classes)  # to a network that has learned what it means

    def denoiser(params, label, dropout_keys=None, *, guidance: float = 1.0):
        """See `Diffusion`. Guidance g: what is said is that of no label plus g times what the label adds."""
        learned_variance = trained_variance in diffusion.LEARNED

        def network(x_t, t, label, dropout_keys=None):
            label = label if unet.num_classes else None
            return unet.apply({"params": params}, x_t, t, label, dropout_keys=dropout_keys)

        def network_fn(x_t, t):
            if guidance == 1:
                return network(x_t, t, label, dropout_keys)
            if guidance == 0:
                return network(x_t, t, jnp.full_like(label, no_label))
            both = [jnp.concatenate(pair) for pair in ((x_t, x_t), (t, t), (label, label))]
            both[2] = both[2].at[label.shape[0] :].set(no_label)
            with_label, without = jnp.split(network(*both), 2)
            value = without + guidance * (with_label - without)
            if learned_variance:  # of which the label's own is taken
                mean, _ = jnp.split(value, 2, axis=-1)
                _, variance_values = jnp.split(with_label, 2, axis=-1)
                value = jnp.concatenate([mean, variance_values], axis=-1)
            return value

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

    def example_keys(key, batch):
        """Keys of t, ε, dropout, mirroring and hidden labels: [B] each."""
        keys = jax.vmap(lambda key: jax.random.split(key, 5))(fold_in_each(key, batch["index"]))
        return tuple(keys[:, n] for n in range(5))

    def shown(key, batch):
        x_0, (*_, flip_keys, _) = diffusion.from_uint8(batch["image"]), example_keys(key, batch)
        return mirror_at_random(flip_keys, x_0) if flip else x_0

    def loss_fn(params, memory, key, batch):
        t_keys, eps_keys, dropout_keys, _, label_keys = example_keys(key, batch)
        x_0, label = shown(key, batch), batch["label"]
        if label_dropout:
            hidden = jax.vmap(lambda key: jax.random.bernoulli(key, label_dropout))(label_keys)
            label = jnp.where(hidden, no_label, label)
        t, weight = draw_t(memory, key, t_keys, batch["place"])
        eps = jax.vmap(lambda key: jax.random.normal(key, image_shape))(eps_keys)
        denoise_fn = denoiser(params, label, dropout_keys)

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

    def reverse_variance(asked, chain, x_0_error):
        """A variance as samplers and the bound take it, if this model can have it."""
        config_lib.check_choice("variance", asked, diffusion.VARIANCES)
        if asked in diffusion.LEARNED and asked != trained_variance:
            raise ValueError(
                f"variance {asked!r} needs outputs that this network has not: it was trained with"
                f" {trained_variance!r}; use that, fixed_small, fixed_large or analytic"
            )
        if asked == "learned" and (chain.timesteps != np.arange(len(chain))).any():
            raise ValueError(
                "variance 'learned' is that of single steps of the full chain; in fewer steps use"
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

    def sample_options(*, sampler: str = "ancestral", **options):
        """The options of a sampler, each with its default: those that it does not have are None.

        Raises:
          ValueError: an unknown sampler, or an option that belongs to another one.
        """
        config_lib.check_choice("sampler", sampler, samplers.SAMPLERS)
        options = {name: value for name, value in options.items() if value is not None}
        if "variance" in options:
            config_lib.check_choice("variance", options["variance"], diffusion.VARIANCES)
        own = {
            "ancestral": {"variance": trained_variance},
            "ddim": {"eta": 0.0},
            "dpm_solver": {"order": 2, "singlestep": False},
            "heun": {},
        }
        for name in options:
            for owner, names in own.items():
                if name in names and owner != sampler:
                    raise ValueError(
                        f"{name} is an option of sampler {owner!r}, and {sampler!r} has none"
                    )
        if not np.isfinite(options.get("guidance", 1.0)):
            raise ValueError(f"guidance must be a finite number, got {options['guidance']}")
        if options.get("variance") == "analytic" and options.get("from_t") is not None:
            raise ValueError(
                "variance 'analytic' is measured for whole chains, not from_t; use fixed_small or fixed_large"
            )
        if options.get("guidance", 1.0) != 1.0 and not label_dropout:
            raise ValueError(
                "guidance needs a model that has learned to do without labels: train with classes and"
                " config.diffusion.label_dropout above 0, such as 0.1"
            )
        every = dict.fromkeys(name for names in own.values() for name in names)
        every |= {"steps": None, "spacing": None, "clip_x0": trained_clip, "from_t": None}
        every |= {"guidance": 1.0, "x_0_error": None, "frames": 0}
        return {"sampler": sampler} | every | own[sampler] | options

    def make_sample(
        *,
        sampler: str = "ancestral",
        steps: Any = None,
        spacing: str | None = None,
        eta: float | str | None = None,
        order: int | None = None,
        singlestep: bool | None = None,
        variance: str | None = None,
        clip_x0: bool | str = clip_x0,
        guidance: float = 1.0,
        from_t: int | None = None,
        x_0_error: Any = None,
        frames: int = 0,
    ):
        """The options of sampling; None where the sampler's own default is meant.

        Args:
          sampler: one of `samplers.SAMPLERS`.
          steps, spacing: see `schedules.shorten`; None for all T.
          eta: of "ddim", 0 (the default) to 1 or "hat"; see `diffusion.ddim_std`.
          order, singlestep: of "dpm_solver", 2 and False unless told; see `samplers.dpm_solver_weights`.
          variance: of "ancestral", one of `diffusion.VARIANCES` that the network has the outputs for.
          clip_x0: True, False or "dynamic"; see `samplers.clip`.
          guidance: 1 draws from the model of the labels, 0 from the one without, more exaggerates what
            the label adds, at the price of a network call for both in one batch.
          from_t: begin at this time of the full chain, not at T − 1; for what is given as x_T.
          x_0_error: [S], for variance "analytic"; see `diffusion.analytic_log_variance`.
          frames: return (x, `samplers.Trajectory`) with this many steps of the chain, evenly spaced.

        Returns:
          sample(params, key, index, label, x_T=None): as `Method` says; it begins with x_T
          [B, H, W, C] where that is given, else with noise.
        """
        options = {"steps": steps, "spacing": spacing, "eta": eta, "order": order}
        options |= {"singlestep": singlestep, "variance": variance, "clip_x0": clip_x0}
        options |= {"guidance": guidance, "from_t": from_t, "x_0_error": x_0_error}
        options = sample_options(sampler=sampler, frames=frames, **options)
        chain = schedules.shorten(schedule, steps, spacing=spacing, last=from_t)
        names = ("eta", "order", "singlestep", "variance")
        given = {name: options[name] for name in names if options[name] is not None}
        if "variance" in given:
            given["variance"] = reverse_variance(given["variance"], chain, x_0_error)
        if frames:
            given["keep"] = schedules.subsequence(min(frames, len(chain)), len(chain))[::-1]
        reverse = samplers.make(chain, sampler, clip_x0=clip_x0, **given)

        def sample(params, key, index, label, x_T=None):
            keys = fold_in_each(key, index)
            if x_T is None:
                if from_t is not None:
                    raise ValueError(f"a chain from_t={from_t} begins with an x_T that is given")
                x_T = samplers.prior(keys, image_shape)
            return reverse(denoiser(params, label, guidance=guidance), x_T, keys)

        return sample

    def make_encode(
        *,
        steps: Any = None,
        spacing: str | None = None,
        clip_x0: bool | str = clip_x0,
        guidance: float = 1.0,
    ):
        """The options of encoding, as those of `make_sample`; `encode` is to be decoded with the same ones."""
        sample_options(sampler="ddim", guidance=guidance)
        chain = schedules.shorten(schedule, steps, spacing=spacing)
        samplers.check_clip(clip_x0)

        def encode(params, label, x_0):
            denoise_fn = denoiser(params, label, guidance=guidance)
            return samplers.encode(chain, denoise_fn, x_0, clip_x0=clip_x0)

        return encode

    def make_inpaint(
        *,
        steps: Any = None,
        spacing: str | None = None,
        variance: str = variance,
        clip_x0: bool | str = clip_x0,
        guidance: float = 1.0,
        resample: int = 10,
        jump: int = 10,
        x_0_error: Any = None,
    ):
        """The options of filling in: those of `make_sample`, and of `samplers.inpaint`."""
        sample_options(guidance=guidance)
        chain = schedules.shorten(schedule, steps, spacing=spacing)
        samplers.resampling(len(chain), resample=resample, jump=jump)
        given = {"variance": reverse_variance(variance, chain, x_0_error)}
        given |= {"clip_x0": clip_x0, "resample": resample, "jump": jump}
        samplers.check_clip(clip_x0)

        def inpaint(params, key, index, label, x_0, mask):
            denoise_fn = denoiser(params, label, guidance=guidance)
            return samplers.inpaint(chain, denoise_fn, x_0, mask, fold_in_each(key, index), **given)

        return inpaint

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
        chain = schedules.shorten(schedule, steps)
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
        image_shape=image_shape,
        num_classes=num_classes,
        init=init,
        loss=loss_fn,
        metric_names=metric_names,
        make_sample=make_sample,
        shown=shown,
        sample_options=sample_options,
        make_bound=make_bound,
        diffusion=Diffusion(schedule, denoiser, make_encode, make_inpaint),
        memory=memory,
        remember=remember,
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
    """The options with the defaults of a maker filled in: what moves its result."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters} | options


def labels_of(
    method: Method, index: np.ndarray, labels: str | int | Sequence[int] = "cycle", *, key=None
) -> np.ndarray:
    """The class of each image, int32 [N]; zeros for a model without classes.

    Args:
      index: int [N] of the images.
      labels: "cycle" for the classes in turn; "random" for a class that depends on the key and the index
        alone; or one class or several, which are then taken in turn. As text also: "3" or "3,5,7".
      key: for "random".

    Raises:
      ValueError: what cannot be read, a class that there is not, a choice where there are no classes.
    """
    count = method.num_classes
    labels = labels if isinstance(labels, str) else np.ravel(labels).tolist()
    if not count:
        if labels != "cycle":
            raise ValueError(
                f"labels={labels!r} is for a model with classes, and this one has none"
            )
        return np.zeros(len(index), np.int32)
    if labels == "cycle":
        return (index % count).astype(np.int32)
    if labels == "random":
        keys = fold_in_each(jax.random.fold_in(key, 2**32 - 1), np.asarray(index, np.uint32))
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys)
        return np.asarray(drawn, np.int32)
    try:
        chosen = np.array(
            [int(n) for n in labels.split(",")] if isinstance(labels, str) else labels
        )
    except ValueError:
        raise ValueError(
            f"cannot read labels={labels!r}; write cycle, random, a class such as 3, or 3,5,7"
        ) from None
    chosen = np.atleast_1d(chosen)
    if chosen.size == 0 or not (chosen.min() >= 0 and chosen.max() < count):
        raise ValueError(f"labels={labels!r}: this model has the classes 0 … {count - 1}")
    return chosen[np.asarray(index) % len(chosen)].astype(np.int32)
