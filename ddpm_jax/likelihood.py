"""The variational bound on −log p(x_0) over a Schedule and a `denoise_fn`, and what follows from its terms.

    −log p(x_0) ≤ L_T + Σ_{t>1} L_{t−1} + L_0                                            Ho et al. (5)

Everything is in bits per dimension: nats of an 8-bit image divided by (H·W·C · ln 2). Step i of a schedule
of S steps carries L_i: L_0 at i = 0, the divergences L_{t−1} = KL(q(x_{t−1}|x_t, x_0) ‖ p(x_{t−1}|x_t)) above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion, gaussians
from ddpm_jax.schedules import Schedule

CDFS = ("normal", "tanh")


class Bound(NamedTuple):
    """The bound of each example, term by term, and the errors that make it."""

    terms: jax.Array  # [B, S] L_0, L_1, … in bits/dim
    prior: jax.Array  # [B] L_T in bits/dim
    x_0_error: jax.Array  # [B, S] squared error of x̂_0, clipped if asked, per dimension in [−1, 1]
    eps_error: jax.Array  # [B, S] squared error of ε̂ per dimension, before any clipping


def bits_per_dim(nats):
    """Nats for each dimension [B, H, W, C] to bits per dimension [B]."""
    return jnp.mean(nats, axis=(1, 2, 3)) / np.float32(np.log(2.0))


def prior_term(schedule: Schedule, x_0):
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) in bits/dim: [B] from x_0 [B, H, W, C]."""
    alpha_bar = schedule.alpha_bar[-1]
    mean = np.float32(np.sqrt(alpha_bar)) * x_0
    return bits_per_dim(gaussians.kl(mean, np.float32(np.log1p(-alpha_bar)), 0.0, 0.0))


def term(
    schedule: Schedule,
    denoised: diffusion.Denoised,
    x_0,
    x_t,
    t,
    *,
    variance: str | np.ndarray,
    cdf: str = "normal",
):
    """L_{t−1}, or L_0 where t = 0, in bits/dim: [B]; Ho et al. (5) and (13).

    Args:
      denoised: what the network says of x_t; its x_0 makes the mean, by μ̃_t(x_t, x̂_0).
      x_0, x_t: [B, H, W, C]; x_0 of the 256 levels.
      t: step of `schedule`, int [B], or a scalar for all: then only the term that is needed is computed.
      variance: a name or a table of log σ², float64 [S]; see `diffusion.model_log_variance`.
      cdf: of the decoder; see `gaussians.discretized_log_likelihood`.
    """
    log_variance = diffusion.model_log_variance(schedule, variance, denoised, x_t, t)

    def decoder():
        # At t = 0 the posterior mean is x̂_0 itself.
        log_p = gaussians.discretized_log_likelihood(x_0, denoised.x_0, log_variance, cdf=cdf)
        return bits_per_dim(-log_p)

    def divergence():
        # The means differ by a multiple of x_0 − x̂_0: subtracting them would lose what they share.
        of_x_0, _ = diffusion.posterior_mean_coefficients(schedule)
        difference = diffusion.at(of_x_0, t, x_t) * (x_0 - denoised.x_0)
        of_posterior = diffusion.at(diffusion.posterior_log_variance(schedule), t, x_t)
        return bits_per_dim(gaussians.kl(difference, of_posterior, 0.0, log_variance))

    if jnp.ndim(t) == 0:
        return jax.lax.cond(t == 0, decoder, divergence)
    return jnp.where(t == 0, decoder(), divergence())


def bound(
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    keys,
    *,
    variance: str | np.ndarray = "fixed_large",
    clip_x0: bool = True,
    cdf: str = "normal",
) -> Bound:
    """Every term of the bound, one Monte-Carlo draw of x_t for each: a `lax.scan` over the schedule.

    The noise of an example at time t comes from its key and t alone, so a term is the same in any chain
    that visits t with the same step.

    Args:
      schedule: the chain, full or shortened.
      denoise_fn: (x_t [B, H, W, C], t int [B]) -> Denoised.
      x_0: [B, H, W, C] of the 256 levels in [−1, 1].
      keys: [B] keys.
      variance, cdf: see `term`.
      clip_x0: clip x̂_0 to [−1, 1] first, as Ho et al.'s evaluation does.
    """
    times = jnp.asarray(schedule.timesteps)

    def body(carry, i):
        t = times[i]
        eps = diffusion.noise(keys, t, x_0.shape[1:])
        x_t = diffusion.q_sample(schedule, x_0, i, eps)
        denoised = denoise_fn(x_t, jnp.full(x_0.shape[:1], t))
        eps_error = jnp.mean(jnp.square(eps - denoised.eps), axis=(1, 2, 3))
        if clip_x0:
            denoised = denoised._replace(x_0=jnp.clip(denoised.x_0, -1.0, 1.0))
        x_0_error = jnp.mean(jnp.square(x_0 - denoised.x_0), axis=(1, 2, 3))
        value = term(schedule, denoised, x_0, x_t, i, variance=variance, cdf=cdf)
        return carry, (value, x_0_error, eps_error)

    _, rows = jax.lax.scan(body, None, jnp.arange(len(schedule)))
    terms, x_0_error, eps_error = (row.T for row in rows)
    return Bound(terms, prior_term(schedule, x_0), x_0_error, eps_error)


# ---- what the terms say ----------------------------------------------------------------------------


def rate_distortion(terms, prior, x_0_error) -> tuple[np.ndarray, np.ndarray]:
    """Progressive coding, Ho et al. §4.3 and Table 4: two float64 [S], for 1 … S reverse steps.

    After n of S steps the receiver has x_i with i = S − n. That cost L_T and the divergences above i; the
    image it can show is x̂_0(x_i).

    Args:
      terms, x_0_error: [S], means over images, as in `Bound`.
      prior: L_T.

    Returns:
      rate in bits/dim; distortion as root mean squared error on the scale 0 … 255.
    """
    terms, x_0_error = (np.asarray(values, np.float64)[::-1] for values in (terms, x_0_error))
    rate = prior + np.append(0.0, np.cumsum(terms[:-1]))
    return rate, 127.5 * np.sqrt(x_0_error)


def jump_bits(schedule: Schedule, x_0_error, variance: str) -> np.ndarray:
    """The divergence of one step from t straight to s < t: float64 [T, T] in bits/dim, at [t, s].

    A fixed or analytic variance makes it a function of E‖x_0 − x̂_0(x_t, t)‖² alone. Inf where s ≥ t.

    Args:
      schedule: the full chain.
      x_0_error: [T], mean squared error of x̂_0 for each pixel at each of its steps.
      variance: "fixed_small", "fixed_large" or "analytic".
    """
    if variance not in ("fixed_small", "fixed_large", "analytic"):
        raise ValueError(f"the cost of a jump is not known for variance {variance!r}")
    alpha_bar = schedule.alpha_bar
    error = np.asarray(x_0_error, np.float64)[:, None]
    a, p = alpha_bar[:, None], alpha_bar[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        beta = 1.0 - a / p
        posterior = beta * (1.0 - p) / (1.0 - a)
        squared = (np.sqrt(p) * beta / (1.0 - a)) ** 2 * error
        of_model = {"fixed_small": posterior, "fixed_large": beta, "analytic": posterior + squared}
        of_model = of_model[variance]
        ratio = posterior / of_model
        nats = 0.5 * (squared / of_model + ratio - 1.0 - np.log(ratio))
    return np.where(np.tri(len(schedule), k=-1, dtype=bool), nats / np.log(2.0), np.inf)


def check_num_steps(num_steps: int, T: int) -> None:
    """Refuses what `best_steps` cannot choose: its chains have a first and a last step.

    Raises:
      ValueError: one line.
    """
    if T < 2:
        raise ValueError(f"a chain of {T} step leaves nothing to choose")
    if not 2 <= num_steps <= T:
        raise ValueError(f"the best {num_steps} of {T} steps: choose 2 to {T}")


def best_steps(schedule: Schedule, x_0_error, num_steps: int, *, variance: str) -> np.ndarray:
    """The S steps with the lowest bound, by dynamic programming over `jump_bits`; Watson et al. 2021.

    Every chain begins at step 0 and ends at T − 1: L_0 and L_T are then the same for all (but for the
    variance that a fixed kind borrows from the second step at the first).

    Args:
      schedule, x_0_error, variance: see `jump_bits`.
      num_steps: S in 2 … T.

    Returns:
      int [S], strictly increasing from 0 to T − 1.

    Raises:
      ValueError: S is outside.
    """
    T = len(schedule)
    check_num_steps(num_steps, T)
    bits = jump_bits(schedule, x_0_error, variance)
    cost = np.where(np.arange(T) == 0, 0.0, np.inf)  # of the best chain that ends at each step
    came_from = []
    for _ in range(num_steps - 1):
        through = bits + cost
        came_from.append(np.argmin(through, axis=1))
        cost = np.min(through, axis=1)
    tau = [T - 1]
    for previous in reversed(came_from):
        tau.append(previous[tau[-1]])
    return np.array(tau[::-1])
