"""Samplers: from x_T ~ N(0, I) to x_0, each one `lax.scan` over a Schedule.

A sampler takes a `denoise_fn(x_t, t) -> Denoised` and knows nothing of networks. Noise of example i at
time t is drawn from that example's key and t, so a sample does not depend on the batch it is part of.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion
from ddpm_jax.schedules import Schedule


def prior(keys, image_shape):
    """x_T ~ N(0, I): [B, H, W, C] from one key for each example; the keys are not consumed."""
    return diffusion.noise(keys, np.uint32(2**32 - 1), image_shape)  # the one time no chain has


def _reverse(schedule: Schedule, denoise_fn: Callable, x_T, step):
    """Runs x_{i−1} = step(i, t, x_i, denoised) from the last step of the schedule to the first."""
    times = jnp.asarray(schedule.timesteps)

    def body(x, i):
        t = times[i]
        return step(i, t, x, denoise_fn(x, jnp.full(x.shape[:1], t))), None

    return jax.lax.scan(body, x_T, jnp.arange(len(schedule))[::-1])[0]


def ancestral(
    schedule: Schedule,
    denoise_fn: Callable,
    x_T,
    keys,
    *,
    variance: str | np.ndarray = "fixed_large",
    clip_x0: bool = True,
):
    """Ho et al. Algorithm 2: x_{t−1} ~ N(μ̃_t(x_t, x̂_0), σ_t² I), no noise at the last step.

    Args:
      schedule: the chain to run, full or shortened.
      denoise_fn: (x_t [B, H, W, C], t int [B]) -> Denoised.
      x_T: [B, H, W, C] from N(0, I).
      keys: [B] keys, one for each example.
      variance: a name or a table of log σ², float64 [S]; see `diffusion.model_log_variance`.
      clip_x0: clip x̂_0 to [−1, 1] before the posterior mean, as Ho et al.'s code does and the paper
        does not say; it applies to every parameterisation.

    Returns:
      x_0: [B, H, W, C]; within [−1, 1] if clipped.
    """

    def step(i, t, x_t, denoised):
        x_0 = jnp.clip(denoised.x_0, -1.0, 1.0) if clip_x0 else denoised.x_0
        mean = diffusion.posterior_mean(schedule, x_0, x_t, i)
        log_variance = diffusion.model_log_variance(schedule, variance, denoised, x_t, i)
        std = jnp.where(i > 0, jnp.exp(0.5 * log_variance), 0.0)  # z = 0 at the last step
        return mean + std * diffusion.noise(keys, t, x_t.shape[1:])

    return _reverse(schedule, denoise_fn, x_T, step)


def ddim(schedule: Schedule, denoise_fn: Callable, x_T, *, clip_x0: bool = True):
    """Song et al. 2021 (12) with η = 0: x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1 − ᾱ_{t−1}) ε̂, deterministic.

    Arguments and result as `ancestral`. ε̂ is derived anew from the clipped x̂_0, so that both describe
    the same x_t (as Improved DDPM's code; Song et al. do not clip).
    """
    of_x_0 = np.sqrt(schedule.alpha_bar_prev)
    of_eps = np.sqrt(1.0 - schedule.alpha_bar_prev)

    def step(i, t, x_t, denoised):
        x_0, eps = denoised.x_0, denoised.eps
        if clip_x0:
            x_0 = jnp.clip(x_0, -1.0, 1.0)
            eps = diffusion.from_x_0(schedule, "eps", x_0, x_t, i)
        return diffusion.at(of_x_0, i, x_t) * x_0 + diffusion.at(of_eps, i, x_t) * eps

    return _reverse(schedule, denoise_fn, x_T, step)
