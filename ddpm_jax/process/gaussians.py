"""Gaussians: Kullback-Leibler divergences, and the likelihood of 8-bit images under a normal density."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

Values = Float[Array, "..."] | float | np.floating


def kl(
    mean_1: Values, log_variance_1: Values, mean_2: Values, log_variance_2: Values
) -> Float[Array, ...]:
    """KL(N(mean_1, variance_1) ‖ N(mean_2, variance_2)) of each dimension, in nats; shapes broadcast.

    ½[(μ_1 − μ_2)²/σ_2² + σ_1²/σ_2² − ln(σ_1²/σ_2²) − 1].
    """
    log_ratio = log_variance_1 - log_variance_2
    squared = jnp.square(mean_1 - mean_2) * jnp.exp(-log_variance_2)
    # For nearly equal variances exp(r) − 1 − r cancels; expm1 keeps its digits.
    return 0.5 * (squared + jnp.expm1(log_ratio) - log_ratio)


def kl_full(
    mean_1: Float[Array, " n"],
    covariance_1: Float[Array, "n n"],
    mean_2: Float[Array, " n"],
    covariance_2: Float[Array, "n n"],
) -> Float[Array, ""]:
    """KL of two n-dimensional Gaussians with full covariances, in nats.

    Args:
      mean_1, mean_2: [n].
      covariance_1, covariance_2: [n, n], symmetric and positive definite.
    """
    n = mean_1.shape[-1]
    delta = mean_2 - mean_1
    trace = jnp.trace(jnp.linalg.solve(covariance_2, covariance_1))
    distance = delta @ jnp.linalg.solve(covariance_2, delta)
    log_determinants = jnp.linalg.slogdet(covariance_2)[1] - jnp.linalg.slogdet(covariance_1)[1]
    return 0.5 * (trace + distance - n + log_determinants)


def _tanh_log_ndtr(z):
    """log Φ(z) with Φ(z) ≈ ½(1 + tanh(√(2/π)(z + 0.044715 z³))), as in Ho et al.'s code."""
    return jax.nn.log_sigmoid(2.0 * jnp.sqrt(2.0 / jnp.pi) * (z + 0.044715 * z**3))


def discretized_log_likelihood(
    x: Float[Array, ...],
    mean: Float[Array, ...],
    log_variance: Float[Array, ...],
    *,
    cdf: str = "normal",
) -> Float[Array, ...]:
    """log P of 8-bit values under a normal density integrated over their bins, in nats; Ho et al. (13).

    The 256 levels are k/127.5 − 1. A bin extends 1/255 to each side of its level, and the first and last extend to ∓∞, so
    the 256 probabilities sum to one.

    Args:
      x: any of the 256 levels in [−1, 1]; any shape.
      mean, log_variance: of the density, broadcastable to `x`.
      cdf: "normal" for the exact Φ, "tanh" for the approximation in Ho et al.'s code.
    """
    cdfs: dict[str, Callable] = {"normal": log_ndtr, "tanh": _tanh_log_ndtr}
    log_cdf = cdfs[cdf]
    inverse_std = jnp.exp(jnp.minimum(-0.5 * log_variance, 60.0))
    bound = 1e6  # where the density is 0 in float32; keeps z³ finite
    lower = jnp.clip((x - mean - 1.0 / 255.0) * inverse_std, -bound, bound)
    upper = jnp.clip((x - mean + 1.0 / 255.0) * inverse_std, -bound, bound)
    # Bins in the right tail are mirrored into the left one, where log Φ is accurate.
    mirror = lower + upper > 0
    near, far = jnp.where(mirror, -lower, upper), jnp.where(mirror, -upper, lower)
    log_near = log_cdf(near)
    # log(Φ(near) − Φ(far)) = log Φ(near) + log(1 − exp(gap)), gap < 0.
    gap = jnp.minimum(log_cdf(far) - log_near, -1e-12)
    inside = log_near + jnp.where(
        gap > -0.693, jnp.log(-jnp.expm1(gap)), jnp.log1p(-jnp.exp(jnp.minimum(gap, -0.693)))
    )
    first, last = x < -0.999, x > 0.999
    return jnp.where(first, log_cdf(upper), jnp.where(last, log_cdf(-lower), inside))
