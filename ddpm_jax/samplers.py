"""Samplers: from x_T ~ N(0, I) to x_0, each one `lax.scan` over a Schedule.

A sampler takes a `denoise_fn(x_t, t) -> Denoised` and knows nothing of networks. Noise of example i at
time t is drawn from that example's key and t, so a sample does not depend on the batch it is part of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion
from ddpm_jax.schedules import Schedule


class Trajectory(NamedTuple):
    """What a chain looked like at K of its steps."""

    t: jax.Array  # int32 [B, K], the time of each
    x_t: jax.Array  # [B, K, H, W, C]
    x_0: jax.Array  # [B, K, H, W, C] x̂_0(x_t), clipped if the sampler does


def prior(keys, image_shape):
    """x_T ~ N(0, I): [B, H, W, C] from one key for each example; the keys are not consumed."""
    return diffusion.noise(keys, np.uint32(2**32 - 1), image_shape)  # the one time no chain has


def _reverse(
    schedule: Schedule,
    denoise_fn: Callable,
    x_T,
    step: Callable,
    *,
    clip_x0: bool,
    keep: Sequence[int] | None,
):
    """Runs x_{i−1} = step(i, t, x_i, denoised) from the last step of the schedule to the first."""
    times = jnp.asarray(schedule.timesteps)
    kept = np.asarray([] if keep is None else keep, np.int32)
    place = np.full(len(schedule), len(kept), np.int32)  # out of range: not kept
    place[kept] = np.arange(len(kept))
    place = jnp.asarray(place)

    def body(carry, i):
        x, frames = carry
        t = times[i]
        denoised = denoise_fn(x, jnp.full(x.shape[:1], t))
        if clip_x0:
            x_0 = jnp.clip(denoised.x_0, -1.0, 1.0)
            # The noise that leads from the clipped x̂_0 to this x_t, so that both describe the same.
            eps = diffusion.from_x_0(schedule, "eps", x_0, x, i)
            denoised = denoised._replace(x_0=x_0, eps=eps)
        if keep is not None:
            now = (x, denoised.x_0)
            frames = tuple(
                all_kept.at[:, place[i]].set(one, mode="drop")
                for all_kept, one in zip(frames, now, strict=True)
            )
        return (step(i, t, x, denoised), frames), None

    empty = jnp.zeros((x_T.shape[0], len(kept), *x_T.shape[1:]))
    frames = () if keep is None else (empty, empty)
    (x, frames), _ = jax.lax.scan(body, (x_T, frames), jnp.arange(len(schedule))[::-1])
    if keep is None:
        return x
    t = jnp.broadcast_to(times[kept], (x.shape[0], len(kept)))
    return x, Trajectory(t, *frames)


def ancestral(
    schedule: Schedule,
    denoise_fn: Callable,
    x_T,
    keys,
    *,
    variance: str | np.ndarray = "fixed_large",
    clip_x0: bool = True,
    keep: Sequence[int] | None = None,
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
      keep: K steps of the schedule to be remembered.

    Returns:
      x_0: [B, H, W, C]; within [−1, 1] if clipped. With `keep`, (x_0, Trajectory).
    """

    def step(i, t, x_t, denoised):
        mean = diffusion.posterior_mean(schedule, denoised.x_0, x_t, i)
        log_variance = diffusion.model_log_variance(schedule, variance, denoised, x_t, i)
        std = jnp.where(i > 0, jnp.exp(0.5 * log_variance), 0.0)  # z = 0 at the last step
        return mean + std * diffusion.noise(keys, t, x_t.shape[1:])

    return _reverse(schedule, denoise_fn, x_T, step, clip_x0=clip_x0, keep=keep)


def ddim(
    schedule: Schedule,
    denoise_fn: Callable,
    x_T,
    *,
    clip_x0: bool = True,
    keep: Sequence[int] | None = None,
):
    """Song et al. 2021 (12) with η = 0: x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1 − ᾱ_{t−1}) ε̂, deterministic.

    Arguments and result as `ancestral`. ε̂ is derived anew from the clipped x̂_0, so that both describe
    the same x_t (as Improved DDPM's code; Song et al. do not clip).
    """
    of_x_0 = np.sqrt(schedule.alpha_bar_prev)
    of_eps = np.sqrt(1.0 - schedule.alpha_bar_prev)

    def step(i, t, x_t, denoised):
        return (
            diffusion.at(of_x_0, i, x_t) * denoised.x_0
            + diffusion.at(of_eps, i, x_t) * denoised.eps
        )

    return _reverse(schedule, denoise_fn, x_T, step, clip_x0=clip_x0, keep=keep)
