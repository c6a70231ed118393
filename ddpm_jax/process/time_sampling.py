"""How the time t of each training example is drawn: `TimeSampler`s.

A time sampler of one's own is a frozen dataclass with the three methods of `TimeSampler`, named `module:NAME` in
config.diffusion.t_sampling.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Key, UInt32

from ddpm_jax.process.schedules import PRIOR_STREAM, Schedule


class TimeSampler(Protocol):
    """Draws t; its state is part of the TrainState, so that a resumed run draws the same."""

    def init(self, schedule: Schedule) -> Any:
        """The state before the first step: a tree of arrays, often ()."""
        return ()

    def draw(
        self,
        schedule: Schedule,
        state: Any,
        key: Key[Array, ""],
        keys: Key[Array, " B"],
        position: Float32[Array, " B"],
    ) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
        """A step of the schedule for each example, and the weight that its loss gets.

        Args:
          key: of the training step, the same for the whole batch.
          keys: one of each example; t may depend on them and on `key` alone.
          position: [0, 1), where the example stands in the batch of all devices.
        """

    def update(self, state: Any, t: Int[Array, " B"], losses: Float[Array, " B"]) -> Any:
        """The state after the losses [B] of the whole batch, over all devices, in its order."""
        return state


@dataclasses.dataclass(frozen=True)
class Uniform(TimeSampler):
    """t uniform in 0 … T−1, independent for each example; Ho et al. Algorithm 1."""

    def draw(self, schedule, state, key, keys, position):
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(schedule)))(keys)
        return t, jnp.ones(t.shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Antithetic(TimeSampler):
    """t at even distances around the whole range from one random start; Kingma et al. 2021 §I.1.

    Each t is uniform, and a batch covers the range evenly, so the mean loss varies less.
    """

    def draw(self, schedule, state, key, keys, position):
        T = len(schedule)
        u = (jax.random.uniform(jax.random.fold_in(key, PRIOR_STREAM)) + position) % 1.0
        t = jnp.minimum((u * T).astype(jnp.int32), T - 1)
        return t, jnp.ones(t.shape, jnp.float32)


class LossHistory(NamedTuple):
    """The last losses seen at each t."""

    losses: Float32[Array, "T 10"]  # each row a ring
    count: Int32[Array, " T"]  # type: ignore[assignment]  # losses seen at each t so far


@dataclasses.dataclass(frozen=True)
class Importance(TimeSampler):
    """t by the loss history, p_t ∝ √E[L_t²], Nichol & Dhariwal (18), weighted by 1/(T p_t).

    Attributes:
      size: losses remembered for each t.
      uniform: share of the uniform distribution in p_t.
    """

    size: int = 10
    uniform: float = 0.001

    def init(self, schedule) -> LossHistory:
        T = len(schedule)
        return LossHistory(jnp.zeros((T, self.size), jnp.float32), jnp.zeros(T, jnp.int32))

    def update(self, state: LossHistory, t, losses) -> LossHistory:
        """The history after a batch. Where a t occurs more often than a row is long, its last losses count."""
        size = state.losses.shape[1]
        same = t[:, None] == t[None, :]
        earlier = jnp.sum(jnp.tril(same, -1), axis=1)  # examples before this one with the same t
        later = jnp.sum(jnp.triu(same, 1), axis=1)
        column = jnp.where(later < size, (state.count[t] + earlier) % size, size)  # size: dropped
        rings = state.losses.at[t, column].set(losses, mode="drop")
        return LossHistory(rings, state.count.at[t].add(1))

    def probabilities(self, state: LossHistory) -> UInt32[Array, " T"]:
        """p_t as whole numbers of 2⁻³² that sum to 2³², the sum understood modulo 2³².

        All are equal until every t has a full row, and while the losses are all zero or not all finite. Whole
        numbers, because a float32 distribution function has too few digits for the least likely t, and its sample would
        not follow p_t.
        """
        T, size = state.losses.shape
        largest = jnp.max(jnp.abs(state.losses))  # whose squares neither overflow nor vanish
        root = jnp.sqrt(jnp.mean(jnp.square(state.losses / largest), axis=1))
        total = jnp.sum(root)
        learned = (1.0 - self.uniform) * root / total + self.uniform / T
        usable = jnp.all(state.count >= size) & (total > 0)  # False where a loss is not finite
        p = jnp.where(usable, learned, 1.0 / T)
        parts = (p * (2.0**32 * (1.0 - 1e-5))).astype(jnp.uint32)  # their sum stays below 2³² …
        return parts.at[0].add(0 - jnp.sum(parts))  # … and t = 0 takes the rest

    def draw(self, schedule, state, key, keys, position):
        """t from `probabilities`, with the weight 1/(T p_t) that leaves the expected loss as it is."""
        parts = self.probabilities(state)
        last = jnp.cumsum(parts) - np.uint32(1)  # the last word that belongs to each t
        words = jax.vmap(jax.random.bits)(keys)
        t = jnp.searchsorted(last, words, side="left").astype(jnp.int32)
        count = (parts[t] - np.uint32(1)).astype(jnp.float32) + 1.0  # all 2³² words wrap to 0
        return t, (2.0**32 / len(parts)) / count


TIME_SAMPLERS = {"uniform": Uniform, "antithetic": Antithetic, "importance": Importance}
