"""The variational bound on −log p(x_0), term by term, and its rate and distortion.

    −log p(x_0) ≤ L_T + Σ_{t>1} L_{t−1} + L_0                                            Ho et al. (5)

Everything is in bits per dimension: nats of an 8-bit image divided by H·W·C · ln 2. Steps are numbered from 0 here: the
term of step 0 is L_0, the decoder, and that of step t ≥ 1 is KL(q(x_s|x_t, x_0) ‖ p(x_s|x_t)).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float64, Key

from ddpm_jax.process import diffusion, gaussians
from ddpm_jax.process.diffusion import Denoised, Denoiser, Images, Step
from ddpm_jax.process.schedules import Schedule

CDFS = ("normal", "tanh")


class Bound(NamedTuple):
    """The bound of each example, term by term, and the squared errors at each step."""

    terms: Float[Array, "B S"]  # L_0, L_1, … in bits/dim
    prior: Float[Array, " B"]  # L_T in bits/dim
    x_0_error: Float[Array, "B S"]  # mean squared error of x̂_0, after clipping, data in [−1, 1]
    eps_error: Float[Array, "B S"]  # mean squared error of ε̂, before clipping


def bits_per_dim(nats: Images) -> Float[Array, " B"]:
    """Converts the nats of each dimension, [B, H, W, C], to bits per dimension, [B]."""
    return jnp.mean(nats, axis=(1, 2, 3)) / np.float32(np.log(2.0))


def prior_term(schedule: Schedule, x_0: Images) -> Float[Array, " B"]:
    """L_T = KL(q(x_T | x_0) ‖ N(0, prior_std² I)) in bits/dim, [B]."""
    alpha, std = schedule.alpha[-1], schedule.prior_std
    mean = np.float32(alpha / std) * x_0
    if std == 1.0:  # log1p keeps the digits of a small ᾱ
        log_variance = np.log1p(-(alpha**2))
    else:
        log_variance = 2.0 * np.log(schedule.sigma[-1] / std)
    return bits_per_dim(gaussians.kl(mean, np.float32(log_variance), 0.0, 0.0))


def term(
    schedule: Schedule,
    denoised: Denoised,
    x_0: Images,
    x_t: Images,
    t: Step,
    *,
    cdf: str = "normal",
) -> Float[Array, " B"]:
    """The term of step t in bits/dim, [B]: a KL divergence, or L_0 at t = 0; Ho et al. (5) and (13).

    Args:
      denoised: the model at x_t, with a log_variance; p(x_s | x_t) has the posterior mean of its x_0.
      x_0: [B, H, W, C], any of the 256 levels in [−1, 1].
      t: step of `schedule`, [B] or a scalar. With a scalar only one kind of term is computed.
      cdf: see `gaussians.discretized_log_likelihood`.
    """
    log_variance = denoised.log_variance

    def decoder():  # at step 0 the posterior mean is x̂_0 itself
        log_p = gaussians.discretized_log_likelihood(x_0, denoised.x_0, log_variance, cdf=cdf)
        return bits_per_dim(-log_p)

    def divergence():
        # The two means differ by k_0 (x_0 − x̂_0); computing both and subtracting would lose digits.
        k_0, _ = diffusion.posterior_mean_coefficients(schedule)
        difference = diffusion.at(k_0, t, x_t) * (x_0 - denoised.x_0)
        small = diffusion.at(diffusion.fixed_log_variance(schedule, "fixed_small"), t, x_t)
        return bits_per_dim(gaussians.kl(difference, small, 0.0, log_variance))

    if jnp.ndim(t) == 0:
        return jax.lax.cond(t == 0, decoder, divergence)
    return jnp.where(t == 0, decoder(), divergence())


def bound(
    schedule: Schedule,
    denoiser: Denoiser,
    x_0: Images,
    keys: Key[Array, " B"],
    *,
    clip_x0: bool = True,
    cdf: str = "normal",
) -> Bound:
    """Every term of the bound, each from one draw of x_t: a `lax.scan` over the schedule.

    The noise is `diffusion.step_noise`, so shortened chains use the same x_t as the full one.

    Args:
      schedule: the chain, full or shortened.
      denoiser: one that computes a log_variance.
      x_0: [B, H, W, C], any of the 256 levels in [−1, 1].
      keys: one for each image.
      clip_x0: clip x̂_0 to [−1, 1] first, as in Ho et al.'s evaluation.
      cdf: see `gaussians.discretized_log_likelihood`.
    """
    denoise_fn = denoiser(schedule)

    def body(carry, t):
        eps = diffusion.step_noise(schedule, keys, t, x_0.shape[1:])
        x_t = diffusion.q_sample(schedule, x_0, t, eps)
        denoised = denoise_fn(x_t, t)
        eps_error = jnp.mean(jnp.square(eps - denoised.eps), axis=(1, 2, 3))
        if clip_x0:
            denoised = denoised._replace(x_0=jnp.clip(denoised.x_0, -1.0, 1.0))
        x_0_error = jnp.mean(jnp.square(x_0 - denoised.x_0), axis=(1, 2, 3))
        value = term(schedule, denoised, x_0, x_t, t, cdf=cdf)
        return carry, (value, x_0_error, eps_error)

    _, rows = jax.lax.scan(body, None, jnp.arange(len(schedule)))
    terms, x_0_error, eps_error = (row.T for row in rows)
    return Bound(terms, prior_term(schedule, x_0), x_0_error, eps_error)


def rmse(x_0_error: ArrayLike) -> Float64[np.ndarray, ...]:
    """The root mean squared error on the scale 0 … 255, from a mean squared error of data in [−1, 1]."""
    return 127.5 * np.sqrt(np.asarray(x_0_error, np.float64))


def rate_distortion(
    terms: Float[ArrayLike, " S"], prior: float, x_0_error: Float[ArrayLike, " S"]
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """Progressive coding: rate in bits/dim and distortion (`rmse`) after 1 … S reverse steps; Ho et al. §4.3, Table 4.

    After n of S steps the receiver has x_t with t = S − n, which cost L_T and the terms above t, and its estimate of the
    image is x̂_0(x_t).

    Args:
      terms, x_0_error: means over images of those of `Bound`.
      prior: L_T.
    """
    kl, error = (np.asarray(values, np.float64)[::-1] for values in (terms, x_0_error))
    return prior + np.append(0.0, np.cumsum(kl[:-1])), rmse(error)
