"""The state of training and one step of it: pure functions, on one device or on a shard of many."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax import options
from ddpm_jax.method import loss_of
from ddpm_jax.names import check_choice

NEVER = np.int32(2**31 - 1)
STEP_METRICS = ("grad_norm", "update_norm", "param_norm", "ema_decay")


class Metrics(NamedTuple):
    """Sums of the metrics of one or several steps: see `merge` and `means`."""

    sums: dict[str, jax.Array]  # float32 [2] each: weighted sum, sum of weights
    bad_step: jax.Array  # int32 [], first step with a loss or gradient that is not finite, or NEVER


class TrainState(flax.struct.PyTreeNode):
    """The whole state of training, and all that a checkpoint holds. No device axis, no key."""

    step: jax.Array  # int32 [], updates done so far
    params: Any
    ema_params: Any
    opt_state: Any
    loss_state: Any  # see `Method.init_loss_state`; often ()
    metrics: Metrics  # since the last log line; here, so that a resumed run writes the same lines


def make_optimizer(
    *,
    num_steps: int,
    name: str = "adam",
    learning_rate: float = 2e-4,
    warmup_steps: int = 5000,
    decay: str = "none",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Adam (Ho et al. App. B) or AdamW, and the learning rate as a function of the step.

    Args:
      num_steps: length of the run, where the cosine ends.
      warmup_steps: steps of linear warm-up from 0 at step 0.
      decay: "none", or "cosine" down to 0 after the warm-up.
      weight_decay: decoupled, for "adamw"; of all parameters, biases and norms included.

    Raises:
      ValueError: an unknown choice or a number out of range.
    """
    check_choice("name", name, ("adam", "adamw"))
    check_choice("decay", decay, ("none", "cosine"))
    positive = 0 < learning_rate < math.inf and eps > 0
    if not positive or warmup_steps < 0 or not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(
            "learning_rate and eps must be positive, warmup_steps at least 0, b1 and b2 in [0, 1); got"
            f" {learning_rate}, {eps}, {warmup_steps}, {b1}, {b2}"
        )
    if weight_decay and name == "adam":
        raise ValueError(f"weight_decay={weight_decay} needs name='adamw'; adam has none")

    def schedule(step):
        rate = learning_rate * (jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else 1.0)
        if decay == "cosine":
            done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
            rate *= 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
        return rate

    if name == "adamw":
        return optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay), schedule
    return optax.adam(schedule, b1, b2, eps), schedule


def optimizer_of(config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """`make_optimizer` of a config's section optimizer, for a run of its training.num_steps."""
    num_steps = config.training.num_steps
    return options.build(make_optimizer, config.optimizer, "config.optimizer", num_steps=num_steps)


class Keys(NamedTuple):
    """The random streams of a seed; sampling does not share any with training."""

    init: jax.Array
    train: jax.Array
    preview: jax.Array
    sample: jax.Array
    evaluate: jax.Array  # a new stream comes last: it leaves those before as they are


def make_keys(seed: int) -> Keys:
    """The streams of a seed in 0 … 2³² − 1 (larger ones would repeat).

    Raises:
      ValueError: the seed is out of range, or no whole number.
    """
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in 0 … {2**32 - 1}, got {seed!r}")
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


def init_state(method, tx: optax.GradientTransformation, key) -> TrainState:
    """The state before the first step, with new parameters."""
    return state_of(method, tx, method.init(key))


def state_of(method, tx: optax.GradientTransformation, params) -> TrainState:
    """The state before the first step with these parameters; the EMA starts as a copy of them."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),  # a donated buffer must not be shared
        opt_state=jax.jit(tx.init)(params),
        # A donated buffer must not be shared: a teacher is a copy.
        loss_state=jax.tree.map(jnp.array, method.init_loss_state(params)),
        metrics=no_metrics(method),
    )


def check_shapes(method) -> None:
    """Traces the loss of one image, without computing it.

    Raises:
      ConfigError, or what code of the user's own raises.
    """
    key = jax.random.key(0)
    params = jax.eval_shape(method.init, key)
    loss = functools.partial(loss_of, method)
    loss_state = jax.eval_shape(method.init_loss_state, params)
    jax.eval_shape(loss, params, loss_state, key, batch_shapes(method, 1))


def batch_shapes(method, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and types of a batch as `loss_fn` gets it."""
    shapes = {"image": ((size, *method.image_shape), np.uint8), "label": ((size,), np.int32)}
    shapes |= {"index": ((size,), np.int32), "position": ((size,), np.float32)}
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def norm(tree):
    """The Euclidean norm of all numbers of a tree, float32 []."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def clip_by_norm(tree, tree_norm, max_norm: float):
    """Scales a tree of norm `tree_norm` to a norm of at most `max_norm`."""
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(tree_norm, 1e-12))
    return jax.tree.map(lambda leaf: leaf * scale, tree)


def make_update(
    method,
    tx: optax.GradientTransformation,
    key,
    *,
    axis_name: str | None = None,
    accumulate: int = 1,
    clip: str = "global",
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.9999,
    ema_warmup: bool = False,
) -> Callable:
    """update(state, batch) -> (state, loss): one step of Ho et al. Algorithm 1 on this shard.

    Randomness is a function of (key, state.step, batch["index"]), so neither the number of devices nor
    `accumulate` changes which noise an example gets. It is a `jax.tree_util.Partial` that holds the key, so a program that
    takes it as an argument, as that of `parallel.compile_step`, is the same for every seed.

    Args:
      method: a `Method`, or anything with its `loss_fn`.
      key: of the run's training noise.
      axis_name: the mapped axis over which gradients and metrics are averaged; None on one device.
      accumulate: parts that the shard is cut into, their gradients averaged before the one update; a
        loop in Python, since XLA:CPU runs gradient convolutions inside lax.scan ten times slower.
      clip: "global" scales the averaged gradient to a norm of at most `max_grad_norm`; "per_replica"
        scales each device's gradient before they are averaged, as Ho et al.'s code; "none".
      ema_decay: of the exponential moving average of the parameters, in [0, 1).
      ema_warmup: use min(ema_decay, (1 + step)/(10 + step)), so that the average of a short run does not
        contain its initial values; the paper does not use it.

    Raises:
      ValueError: an unknown choice or a number out of range.
    """
    check_choice("clip", clip, ("global", "per_replica", "none"))
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}")
    if accumulate < 1 or not max_grad_norm > 0:
        numbers = f"{accumulate}, {max_grad_norm}"
        raise ValueError(f"accumulate must be at least 1 and max_grad_norm positive, got {numbers}")

    def loss_and_more(params, loss_state, key, batch):
        loss, metrics, record = loss_of(method, params, loss_state, key, batch)
        return jnp.mean(loss), (_sums(loss, metrics), record)

    gradient = jax.grad(loss_and_more, has_aux=True)

    def update(key, state: TrainState, batch) -> tuple[TrainState, jax.Array]:
        step_key = jax.random.fold_in(key, state.step)
        batch = _with_position(batch, axis_name)
        parts = [
            gradient(state.params, state.loss_state, step_key, part)
            for part in _parts(batch, accumulate)
        ]
        records = [record for _, (_, record) in parts]
        grads, sums = _sum_of([(grads, sums) for grads, (sums, _) in parts])
        grads = jax.tree.map(lambda g: g / accumulate, grads) if accumulate > 1 else grads
        if clip == "per_replica":
            grads = clip_by_norm(grads, norm(grads), max_grad_norm)
        grads, sums = _mean_over_devices((grads, sums), axis_name)
        grad_norm = norm(grads)
        if clip == "global":
            grads = clip_by_norm(grads, grad_norm, max_grad_norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = _decay_at(state.step, ema_decay, ema_warmup)
        ema_params = optax.incremental_update(params, state.ema_params, 1.0 - decay)

        once = (grad_norm, norm(updates), norm(params), decay)
        sums |= {k: jnp.stack([v, 1.0]) for k, v in zip(STEP_METRICS, once, strict=True)}
        loss = sums["loss"][0] / sums["loss"][1]
        bad_step = jnp.where(jnp.isfinite(loss) & jnp.isfinite(grad_norm), NEVER, state.step)
        metrics = merge(state.metrics, Metrics(sums, bad_step))
        record = jax.tree.map(lambda *parts: jnp.concatenate(parts), *records)
        record = _of_all_devices(record, axis_name)
        loss_state = method.update_loss_state(state.loss_state, record, params)
        return TrainState(state.step + 1, params, ema_params, opt_state, loss_state, metrics), loss

    return jax.tree_util.Partial(update, key)


def _sum_of(trees: list):
    """The sum of trees of one structure, leaf by leaf."""
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)


def _decay_at(step, ema_decay: float, ema_warmup: bool):
    """The decay of the moving average at a step."""
    decay = jnp.float32(ema_decay)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if ema_warmup else decay


def _mean_over_devices(tree, axis_name: str | None):
    return jax.lax.pmean(tree, axis_name) if axis_name else tree


def _of_all_devices(record, axis_name: str | None):
    if not axis_name:
        return record
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), record)


def _with_position(batch: dict, axis_name: str | None) -> dict:
    """Adds the position, in [0, 1), of each example in the batch of all devices."""
    size = batch["index"].shape[0]
    first = size * jax.lax.axis_index(axis_name) if axis_name else 0
    total = size * (jax.lax.axis_size(axis_name) if axis_name else 1)
    return {**batch, "position": (first + jnp.arange(size)) / np.float32(total)}


def _parts(batch: dict, count: int) -> list[dict]:
    """A batch cut into equal parts."""
    size = batch["index"].shape[0]
    assert size % count == 0, (size, count)
    cuts = [slice(i, i + size // count) for i in range(0, size, size // count)]
    return [{name: values[cut] for name, values in batch.items()} for cut in cuts]


# ---- metrics ---------------------------------------------------------------------------------------


def _sums(loss, metrics) -> dict[str, jax.Array]:
    """Values [B] and weights [B] by name, and the loss itself, to weighted sum and sum of weights."""
    metrics = {"loss": (loss, jnp.ones_like(loss)), **metrics}
    return {
        name: jnp.stack([jnp.sum(values * weights), jnp.sum(weights)]).astype(jnp.float32)
        for name, (values, weights) in metrics.items()
    }


def no_metrics(method) -> Metrics:
    """The neutral element of `merge`, with the names that a step of this method reports."""
    names = ("loss", *method.metric_names, *STEP_METRICS)
    return Metrics({name: jnp.zeros(2, jnp.float32) for name in names}, jnp.asarray(NEVER))


def clear(metrics: Metrics) -> Metrics:
    """The neutral element of `merge` with the same names, on the host."""
    return Metrics({name: np.zeros(2, np.float32) for name in metrics.sums}, NEVER)


def merge(a: Metrics, b: Metrics) -> Metrics:
    """The Metrics of both together."""
    return Metrics(jax.tree.map(jnp.add, a.sums, b.sums), jnp.minimum(a.bad_step, b.bad_step))


def means_of_rows(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each number of several lines of metrics.jsonl, over the lines that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and value is not None:
                found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def means(metrics: Metrics) -> dict[str, float | None]:
    """Weighted means by name; None where nothing had a weight."""
    sums = jax.device_get(metrics.sums)
    return {name: float(s[0] / s[1]) if s[1] > 0 else None for name, s in sums.items()}
