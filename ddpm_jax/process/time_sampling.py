"""Time samplers: how the step t of each training example is drawn.

A time sampler of your own is a frozen dataclass with the method `draw` of `TimeSampler`, and with `init` and `update` if
it has a state; config.diffusion.t_sampling names it, as module:NAME.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Key, UInt32

from ddpm_jax.names import check_takes, described
from ddpm_jax.process.schedules import PRIOR_STREAM, Schedule


class TimeSampler(Protocol):
    """Draws t for each training example. Its state is saved in checkpoints, so a resumed run draws the same t."""

    def init(self, schedule: Schedule) -> Any:
        """The initial state: a tree of arrays, by default ()."""
        return ()

    def draw(
        self,
        schedule: Schedule,
        state: Any,
        key: Key[Array, ""],
        keys: Key[Array, " B"],
        position: Float32[Array, " B"],
    ) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
        """Draws a step of the schedule for each example, with the weight of its loss.

        Args:
          key: of the training step, the same for the whole batch.
          keys: one for each example. `key` and `keys` are the only sources of randomness.
          position: the example's index in the global batch (of all devices) divided by the batch size.
        """
        ...

    def update(self, state: Any, t: Int[Array, " B"], losses: Float[Array, " B"]) -> Any:
        """The state after a training step, from t and the losses of the whole global batch, in order."""
        return state


@dataclasses.dataclass(frozen=True)
class Uniform(TimeSampler):
    """t is uniform in 0 … T−1 and independent for each example; Ho et al. 2020, Algorithm 1."""

    def draw(self, schedule, state, key, keys, position):
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(schedule)))(keys)
        return t, jnp.ones(t.shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Antithetic(TimeSampler):
    """The t of a batch are evenly spaced, modulo T, from one random start; Kingma et al. 2021 §I.1.

    Each t is still uniform, and the loss of a batch has a lower variance.
    """

    def draw(self, schedule, state, key, keys, position):
        T = len(schedule)
        u = (jax.random.uniform(jax.random.fold_in(key, PRIOR_STREAM)) + position) % 1.0
        t = jnp.minimum((u * T).astype(jnp.int32), T - 1)
        return t, jnp.ones(t.shape, jnp.float32)


class LossHistory(NamedTuple):
    """The last losses at each t."""

    losses: Float32[Array, "T 10"]  # each row is a ring buffer
    count: Int32[Array, " T"]  # type: ignore[assignment]  # losses seen so far at each t


@dataclasses.dataclass(frozen=True)
class Importance(TimeSampler):
    """Importance sampling by the loss history: p_t ∝ √E[L_t²], weights 1/(T p_t); Nichol & Dhariwal 2021 (18).

    Attributes:
      size: number of losses kept for each t.
      uniform: weight of the uniform distribution mixed into p_t.
    """

    size: int = 10
    uniform: float = 0.001

    def __post_init__(self):
        if self.size < 1 or not 0 <= self.uniform <= 1:
            raise ValueError(
                f"size must be at least 1 and uniform in [0, 1], got {self.size} and {self.uniform}"
            )

    def init(self, schedule) -> LossHistory:
        T = len(schedule)
        losses, count = np.zeros((T, self.size), np.float32), np.zeros(T, np.int32)
        return LossHistory(losses, count)  # type: ignore[arg-type]

    def update(self, state: LossHistory, t, losses) -> LossHistory:
        """Adds the losses of a batch. If a t occurs more than `size` times, its last losses are kept."""
        size = state.losses.shape[1]
        same = t[:, None] == t[None, :]
        earlier = jnp.sum(jnp.tril(same, -1), axis=1)  # examples before this one with the same t
        later = jnp.sum(jnp.triu(same, 1), axis=1)
        column = jnp.where(later < size, (state.count[t] + earlier) % size, size)  # size drops it
        rings = state.losses.at[t, column].set(losses, mode="drop")
        return LossHistory(rings, state.count.at[t].add(1))

    def probabilities(self, state: LossHistory) -> UInt32[Array, " T"]:
        """2³² p_t as whole numbers, whose sum is 2³² (0 in uint32).

        They are equal until every t has a full row, and if the losses are all zero or not finite. A float32 cumulative
        distribution would be too coarse for the least likely t.
        """
        T, size = state.losses.shape
        largest = jnp.max(jnp.abs(state.losses))  # scaled by it, squares do not overflow
        root = jnp.sqrt(jnp.mean(jnp.square(state.losses / largest), axis=1))
        total = jnp.sum(root)
        learned = (1.0 - self.uniform) * root / total + self.uniform / T
        usable = jnp.all(state.count >= size) & (total > 0)  # False where a loss is not finite
        p = jnp.where(usable, learned, 1.0 / T)
        parts = (p * (2.0**32 * (1.0 - 1e-5))).astype(jnp.uint32)  # their sum stays below 2³² …
        return parts.at[0].add(0 - jnp.sum(parts))  # … and t = 0 takes the rest

    def draw(self, schedule, state, key, keys, position):
        """Draws t from `probabilities`. The weights 1/(T p_t) keep the expected loss that of uniform t."""
        parts = self.probabilities(state)
        last = jnp.cumsum(parts) - np.uint32(1)  # the largest of the 32-bit words that mean each t
        words = jax.vmap(jax.random.bits)(keys)
        t = jnp.searchsorted(last, words, side="left").astype(jnp.int32)
        count = (parts[t] - np.uint32(1)).astype(jnp.float32) + 1.0  # 2³² is stored as 0
        return t, (2.0**32 / len(parts)) / count


def initial(time_sampler: TimeSampler, schedule: Schedule) -> Any:
    """The state before the first step; () for a time sampler without `init`."""
    return time_sampler.init(schedule) if hasattr(time_sampler, "init") else ()


def updated(time_sampler: TimeSampler, state: Any, t, losses) -> Any:
    """The state after a step; the same for a time sampler without `update`."""
    return time_sampler.update(state, t, losses) if hasattr(time_sampler, "update") else state


def check(time_sampler: TimeSampler, schedule: Schedule) -> None:
    """Draws t once from a time sampler of one's own, and checks them.

    Raises:
      ValueError: other arguments or results than those of `TimeSampler`; names the file.
    """
    if type(time_sampler) in TIME_SAMPLERS.values():
        return
    draw = getattr(time_sampler, "draw", None)
    if draw is None:
        raise ValueError(f"{described(time_sampler, 'time sampler')} has no draw")
    check_takes(draw, ("schedule", "state", "key", "keys", "position"), "time sampler")
    if hasattr(time_sampler, "update"):
        check_takes(time_sampler.update, ("state", "t", "losses"), "time sampler")
    size, key = 8, jax.random.key(0)
    state, position = initial(time_sampler, schedule), np.arange(size, dtype=np.float32) / size
    result = jax.jit(draw, static_argnums=0)(
        schedule, state, key, jax.random.split(key, size), position
    )
    parts = jax.tree.leaves(result)
    fits = isinstance(result, tuple) and [part.shape for part in parts] == [(size,)] * 2
    got = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts) or "nothing"
    if fits and jnp.issubdtype(parts[0].dtype, jnp.integer):
        low, high = int(parts[0].min()), int(parts[0].max())
        if low >= 0 and high < len(schedule):
            return
        got = f"t from {low} to {high}"
    raise ValueError(
        f"{described(draw, 'time sampler')} must return t, int32 [B] in 0 … {len(schedule) - 1}, and a"
        f" weight, float32 [B]; for {size} examples it returns {got}"
    )


TIME_SAMPLERS = {"uniform": Uniform, "antithetic": Antithetic, "importance": Importance}
