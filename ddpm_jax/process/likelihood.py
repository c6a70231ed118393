"""The variational bound on −log p(x_0) over a Schedule and a denoiser, and its rate and distortion.

    −log p(x_0) ≤ L_T + Σ_{t>1} L_{t−1} + L_0                                            Ho et al. (5)

Everything is in bits per dimension: nats of an 8-bit image divided by (H·W·C · ln 2). Step i of a schedule of S steps
carries L_i: L_0 at i = 0, and above the divergences KL(q(x_s|x_t, x_0) ‖ p(x_s|x_t)).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Key

from ddpm_jax.process import diffusion, gaussians
from ddpm_jax.process.diffusion import Denoised, Denoiser, Images, Row
from ddpm_jax.process.schedules import Schedule

CDFS = ("normal", "tanh")


class Bound(NamedTuple):
    """The bound of each example, term by term, and the errors of x̂_0 and ε̂ that it consists of."""

    terms: Float[Array, "B S"]  # L_0, L_1, … in bits/dim
    prior: Float[Array, " B"]  # L_T in bits/dim
    x_0_error: Float[
        Array, "B S"
    ]  # squared error of x̂_0, clipped if asked, per dimension in [−1, 1]
    eps_error: Float[Array, "B S"]  # squared error of ε̂ per dimension, before any clipping


def bits_per_dim(nats: Images) -> Float[Array, " B"]:
    """Nats for each dimension [B, H, W, C] to bits per dimension [B]."""
    return jnp.mean(nats, axis=(1, 2, 3)) / np.float32(np.log(2.0))


def prior_term(schedule: Schedule, x_0: Images) -> Float[Array, " B"]:
    """L_T = KL(q(x_T | x_0) ‖ N(0, prior_std² I)) in bits/dim."""
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
    row: Row,
    *,
    cdf: str = "normal",
) -> Float[Array, " B"]:
    """L_{t−1}, or L_0 at row 0, in bits/dim; Ho et al. (5) and (13).

    Args:
      denoised: of x_t, with a log_variance; its x_0 makes the mean of p(x_s | x_t).
      x_0: of the 256 levels in [−1, 1].
      row: row of `schedule`: [B], or a scalar for all, for which only the needed kind of term is computed.
      cdf: of the decoder; see `gaussians.discretized_log_likelihood`.
    """
    log_variance = denoised.log_variance

    def decoder():  # at row 0 the posterior mean is x̂_0 itself
        log_p = gaussians.discretized_log_likelihood(x_0, denoised.x_0, log_variance, cdf=cdf)
        return bits_per_dim(-log_p)

    def divergence():
        # The means differ by a multiple of x_0 − x̂_0: subtracting them would lose what they share.
        of_x_0, _ = diffusion.posterior_mean_coefficients(schedule)
        difference = diffusion.at(of_x_0, row, x_t) * (x_0 - denoised.x_0)
        small = diffusion.at(diffusion.fixed_log_variance(schedule, "fixed_small"), row, x_t)
        return bits_per_dim(gaussians.kl(difference, small, 0.0, log_variance))

    if jnp.ndim(row) == 0:
        return jax.lax.cond(row == 0, decoder, divergence)
    return jnp.where(row == 0, decoder(), divergence())


def bound(
    schedule: Schedule,
    denoiser: Denoiser,
    x_0: Images,
    keys: Key[Array, " B"],
    *,
    clip_x0: bool = True,
    cdf: str = "normal",
) -> Bound:
    """Every term of the bound, one Monte-Carlo draw of x_t for each: a `lax.scan` over the schedule.

    The noise of an example at time t comes from its key and t alone, so a term is the same in any chain that visits t
    with the same step.

    Args:
      schedule: the chain, full or shortened.
      denoiser: with a variance of p(x_s | x_t).
      x_0: of the 256 levels in [−1, 1].
      clip_x0: clip x̂_0 to [−1, 1] first, as Ho et al.'s evaluation does.
      cdf: see `term`.
    """
    denoise_fn = denoiser(schedule)

    def body(carry, i):
        eps = diffusion.step_noise(schedule, keys, i, x_0.shape[1:])
        x_t = diffusion.q_sample(schedule, x_0, i, eps)
        denoised = denoise_fn(x_t, i)
        eps_error = jnp.mean(jnp.square(eps - denoised.eps), axis=(1, 2, 3))
        if clip_x0:
            denoised = denoised._replace(x_0=jnp.clip(denoised.x_0, -1.0, 1.0))
        x_0_error = jnp.mean(jnp.square(x_0 - denoised.x_0), axis=(1, 2, 3))
        value = term(schedule, denoised, x_0, x_t, i, cdf=cdf)
        return carry, (value, x_0_error, eps_error)

    _, rows = jax.lax.scan(body, None, jnp.arange(len(schedule)))
    terms, x_0_error, eps_error = (row.T for row in rows)
    return Bound(terms, prior_term(schedule, x_0), x_0_error, eps_error)


def rmse(x_0_error) -> Float64[np.ndarray, ...]:
    """A mean squared error in [−1, 1] as a root mean squared error on the scale 0 … 255."""
    return 127.5 * np.sqrt(np.asarray(x_0_error, np.float64))


def rate_distortion(
    terms, prior: float, x_0_error
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """Progressive coding, Ho et al. §4.3 and Table 4: rate in bits/dim and distortion (`rmse`) of 1 … S reverse steps.

    After n of S steps the receiver has x_i with i = S − n. That cost L_T and the divergences above i; the image it can
    show is x̂_0(x_i).

    Args:
      terms, x_0_error: [S], means over images, as in `Bound`.
      prior: L_T.
    """
    terms, x_0_error = (np.asarray(values, np.float64)[::-1] for values in (terms, x_0_error))
    return prior + np.append(0.0, np.cumsum(terms[:-1])), rmse(x_0_error)
