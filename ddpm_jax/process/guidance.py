"""Classifier-free guidance, Ho & Salimans 2021."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int32


def guided(
    network_fn: Callable,
    label: Int32[Array, " B"],
    no_label: int | Int32[Array, ""],
    scale: float,
    *,
    learned_variance: bool,
) -> Callable:
    """The function (x, t) -> F(no label) + scale (F(label) − F(no label)), evaluated in one batch of 2B.

    Args:
      network_fn: F, a function (x, t, label) -> output.
      no_label: the label that the network was trained to read as "no label".
      learned_variance: whether the last half of the output's channels is a variance; it is then that of F(label).
    """

    def apply(x, t):
        if scale == 0:
            return network_fn(x, t, jnp.full_like(label, no_label))
        both = [jnp.concatenate([values, values]) for values in (x, t, label)]
        both[2] = both[2].at[label.shape[0] :].set(no_label)
        with_label, without = jnp.split(network_fn(*both), 2)
        value = without + scale * (with_label - without)
        if learned_variance:
            mean, _ = jnp.split(value, 2, axis=-1)
            _, variance = jnp.split(with_label, 2, axis=-1)
            value = jnp.concatenate([mean, variance], axis=-1)
        return value

    return apply
