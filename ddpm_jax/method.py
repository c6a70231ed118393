"""The protocol of generative models, which the trainer and the commands use, and how a model is found by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from ddpm_jax.names import check_takes, described, find, import_module, nearest
from ddpm_jax.options import ConfigError, errors_at
from ddpm_jax.process.schedules import PRIOR_STREAM

SHARED_SECTIONS = ("method", "seed", "data", "optimizer", "step", "training", "preview")
OPTIONAL = ("init_from",)  # fields that a config of any Method may have


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of sampling of a Method that has none."""


class Method(Protocol):
    """A generative model as pure functions. Subclass it or match it; methods with a body here are optional.

    A batch is a dict of image uint8 [B, H, W, C], label int32 [B], index int32 [B]. All randomness of an example comes
    from the key that is passed and from its index alone, so results do not depend on how a batch is split over devices.

    Attributes:
      image_shape: (H, W, C) of what it models.
      num_classes: number of classes of its labels; 0 if it takes none.
      metric_names: names of the metrics that `loss_fn` returns.
      Sampling: a frozen dataclass whose fields are the options of `sample`.

    A diffusion also has a `schedule` and a `denoiser`, see `ddpm.DDPM`; commands that add noise to images need them.

    >>> class Mean(dj.Method):
    ...     "Draws the mean image of the data, which it learns by gradient steps."
    ...     image_shape, metric_names = (8, 8, 1), ()
    ...     def init(self, key):
    ...         return jnp.zeros(self.image_shape)
    ...     def loss_fn(self, params, loss_state, key, batch):
    ...         x_0 = batch["image"] / 127.5 - 1.0
    ...         return jnp.mean((x_0 - params[None]) ** 2, axis=(1, 2, 3)), {}, ()
    ...     def sample(self, params, key, index, label, sampling):
    ...         return jnp.broadcast_to(params, (len(index), *self.image_shape))
    >>> state = dj.fit(Mean(), np.zeros((4, 8, 8, 1), np.uint8), num_steps=2, batch_size=4)
    """

    image_shape: tuple[int, int, int]
    num_classes: int = 0
    metric_names: tuple[str, ...] = ()
    Sampling: type = NoOptions

    def init(self, key: Key[Array, ""]) -> Any:
        """The parameters before training: a tree of arrays."""

    def loss_fn(
        self, params: Any, loss_state: Any, key: Key[Array, ""], batch: dict[str, Array]
    ) -> tuple[Float[Array, " B"], dict[str, tuple[Array, Array]], Any]:
        """The loss of each example in training.

        Args:
          batch: also has position float32 [B] in [0, 1), of each example in the batch of all devices.

        Returns:
          loss [B]; metrics {name: (values [B], weights [B])}, where a weight of 0 leaves an example out of that mean;
          and a record, a tree of [B, …], for `update_loss_state`.
        """

    def sample(
        self,
        params: Any,
        key: Key[Array, ""],
        index: Int32[Array, " B"],
        label: Int32[Array, " B"],
        sampling: Any = NoOptions(),
    ) -> Float[Array, "B H W C"]:
        """Images in [−1, 1] or beyond. Raises ValueError for options that it cannot use."""

    def init_loss_state(self, params: Any) -> Any:
        """The loss's own state before the first step: a tree of arrays, often ().

        Args:
          params: the first weights: those of config.init_from, or random ones. A loss that keeps them has a teacher.
        """
        return ()

    def update_loss_state(self, loss_state: Any, record: Any, params: Any) -> Any:
        """The loss's state after a step.

        Args:
          record: of `loss_fn`, for the whole batch over all devices.
          params: the weights after the step, such as for a moving average of its own.
        """
        return loss_state

    def shown(self, key: Key[Array, ""], batch: dict[str, Array]) -> Float[Array, "B H W C"] | None:
        """The images that `loss_fn` uses for this key, such as mirrored ones; None if they are those of the batch."""
        return None


# {method: its arguments}
REQUIRED = {
    "init": ("key",),
    "loss_fn": ("params", "loss_state", "key", "batch"),
    "sample": ("params", "key", "index", "label", "sampling"),
}
ARGUMENTS = REQUIRED | {
    "init_loss_state": ("params",),
    "update_loss_state": ("loss_state", "record", "params"),
}


def is_diffusion(method: Any) -> bool:
    """Whether a Method is a diffusion: has a schedule and a denoiser."""
    return hasattr(method, "schedule") and hasattr(method, "denoiser")


def fold_in_each(key: Key[Array, ""], index: Int32[Array, " B"]) -> Key[Array, " B"]:
    """One key for each example."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def check_shape(value: Any, shape: tuple[int, ...], source: Any, kind: str) -> None:
    """Checks the shape of what a network, loss or sampler returns.

    Raises:
      ConfigError: it is another one; the line names the file of `source`.
    """
    found = getattr(value, "shape", None)
    if found != tuple(shape):
        found = type(value).__name__ if found is None else found
        raise ConfigError(f"{described(source, kind)} returns {found}, and must return {shape}")


def loss_of(method: Method, params, loss_state, key, batch) -> tuple:
    """`loss_fn`, with a check of what it returns.

    Raises:
      ConfigError: another shape, or metrics other than `metric_names`; names the file of the Method.
    """
    result = method.loss_fn(params, loss_state, key, batch)
    if not (isinstance(result, tuple) and len(result) == 3 and isinstance(result[1], dict)):
        found = "one array" if hasattr(result, "shape") else type(result).__name__
        raise ConfigError(
            f"{described(method.loss_fn, 'the Method')} returns {found}, and must return"
            " (loss [B], metrics {name: (values, weights)}, record)"
        )
    check_shape(result[0], batch["index"].shape, method.loss_fn, "the Method")
    if set(result[1]) != set(method.metric_names):
        names = ", ".join(sorted(result[1])) or "none"
        raise ConfigError(
            f"{described(method.loss_fn, 'the Method')} returns the metrics {names}, and its metric_names"
            f" are {', '.join(method.metric_names) or 'none'}"
        )
    return result


def sample_of(method: Method, params, key, index, label, sampling, **more) -> Any:
    """`sample`, with a check of the shape that it returns.

    Args:
      more: further arguments of `DDPM.sample`; with `frames` it returns a Trajectory too.

    Raises:
      ConfigError: it is another one; names the file of the Method.
    """
    result = method.sample(params, key, index, label, sampling, **more)
    images = result[0] if more.get("frames") else result
    check_shape(images, (*index.shape, *method.image_shape), method.sample, "the Method")
    return result


def from_config(config: Any) -> Method:
    """The Method of a config.

    config.method is a module with a function `make(config)`, or module:NAME: a class with a classmethod
    `from_config(config)`, or a function of the config. If the module or class lists the sections that it reads as
    SECTIONS, any other name in the config is refused.

    Raises:
      ConfigError: the name does not exist, it does not make a Method, or the config has a name that nothing reads.
    """
    spec = config.method
    if not isinstance(spec, str):
        raise ConfigError(f"config.method must be a module or module:NAME, got {spec!r}")
    with errors_at("config.method"):
        if ":" in spec:
            maker = find(spec, {}, "method")
            source = maker
            maker = getattr(maker, "from_config", maker)
            if inspect.isclass(maker):
                raise ValueError(f"{described(maker, 'class')} has no from_config(config)")
            check_takes(maker, ("config",), "method")
        else:
            source = import_module(spec, "method")
            maker = getattr(source, "make", None)
            if maker is None:
                raise ValueError(f"{source.__file__} has no function make(config)")
    sections = getattr(source, "SECTIONS", None)
    for name in config if sections is not None else ():
        if name not in (*SHARED_SECTIONS, *OPTIONAL, *sections):
            known = (*SHARED_SECTIONS, *OPTIONAL, *sections)
            raise ConfigError(
                f"config has {name!r}, which nothing reads{nearest(name, known)} (it has"
                f" {', '.join(known)})"
            )
    method = maker(config)
    names = [name for name in ("image_shape", *vars(Method)) if not name.startswith("_")]
    missing = [name for name in names if not hasattr(method, name)]
    missing += [name for name in REQUIRED if getattr(type(method), name, 0) is vars(Method)[name]]
    if missing:
        raise ConfigError(
            f"config.method: what {spec} makes is not a Method: it has no {', '.join(missing)}; subclass"
            " dj.Method, and write init, loss_fn, sample and image_shape"
        )
    with errors_at("config.method"):
        for name, arguments in ARGUMENTS.items():
            check_takes(getattr(method, name), arguments, "the Method's")
    return method


def labels_of(
    method: Method, index: np.ndarray, labels: str | int | Sequence[int] = "cycle", *, key=None
) -> np.ndarray:
    """The class of each image, int32 [N]; zeros for a model without classes.

    Args:
      index: int [N] of the images.
      labels: "cycle" for the classes in turn; "random" for a class that depends on the key and the index
        alone; or one class or several, taken in turn, also as text: "3" or "3,5,7".
      key: for "random".

    Raises:
      ValueError: unreadable text, an unknown class, or labels for a model without classes.
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
        keys = fold_in_each(jax.random.fold_in(key, PRIOR_STREAM), np.asarray(index, np.uint32))
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys)
        return np.asarray(drawn, np.int32)
    try:
        chosen = np.array(
            [int(n) for n in labels.split(",")] if isinstance(labels, str) else labels
        )
        if chosen.dtype.kind not in "iu":
            raise ValueError("not whole numbers")
    except ValueError:
        raise ValueError(
            f"cannot read labels={labels!r}; write cycle, random, a class such as 3, or 3,5,7"
        ) from None
    chosen = np.atleast_1d(chosen)
    if chosen.size == 0 or not (chosen.min() >= 0 and chosen.max() < count):
        raise ValueError(f"labels={labels!r}: this model has the classes 0 … {count - 1}")
    return chosen[np.asarray(index) % len(chosen)].astype(np.int32)
