"""Training losses over a Schedule and a `denoise_fn`: L_simple, and the terms of the variational bound.

Each returns one number for each example; x_0, eps are [B, H, W, C], t is int [B].
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion, gaussians
from ddpm_jax.schedules import Schedule


def mean_over_pixels(x):
    """[B, H, W, C] -> [B]."""
    return jnp.mean(x, axis=(1, 2, 3))


def _target(schedule: Schedule, prediction: str, x_0, x_t, t, eps):
    return eps if prediction == "eps" else diffusion.from_x_0(schedule, prediction, x_0, x_t, t)


def simple(schedule: Schedule, denoise_fn: Callable, x_0, t, eps, *, prediction: str = "eps"):
    """L_simple, Ho et al. (14): the squared error of what the network predicts, averaged over pixels. [B]"""
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    target = _target(schedule, prediction, x_0, x_t, t, eps)
    return mean_over_pixels(jnp.square(denoise_fn(x_t, t).prediction - target))


def variational_weight(schedule: Schedule, prediction: str, variance: str) -> np.ndarray:
    """w_t with L_{t−1} = w_t ‖target − prediction‖² + constant, in nats: float64 [S], Ho et al. (8)–(12).

        mean: 1/(2σ_t²)                                       Ho et al. (8)
        x_0:  ᾱ_{t−1} β_t² / (2σ_t² (1 − ᾱ_t)²)
        eps:  β_t² / (2σ_t² α_t (1 − ᾱ_t))                    Ho et al. (12)
        v:    (1 − ᾱ_t) times that of x_0, as Δx_0 = −√(1 − ᾱ_t) Δv

    Row 0 belongs to L_0, which is no squared error; see `variational`.
    """
    of_mean = 0.5 * np.exp(-diffusion.reverse_log_variance(schedule, variance))
    of_x_0 = of_mean * diffusion.posterior_mean_coefficients(schedule)[0] ** 2
    if prediction == "mean":
        return of_mean
    if prediction == "x_0":
        return of_x_0
    if prediction == "v":
        return of_x_0 * (1.0 - schedule.alpha_bar)
    if prediction == "eps":
        return of_mean * schedule.beta**2 / (schedule.alpha * (1.0 - schedule.alpha_bar))
    raise ValueError(
        f"unknown prediction {prediction!r}; choose from {', '.join(diffusion.PREDICTIONS)}"
    )


def variational(
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    t,
    eps,
    *,
    prediction: str = "eps",
    variance: str = "fixed_large",
):
    """One term of the bound for a fixed variance, scaled so that its mean over t estimates the whole. [B]

    T·L_{t−1} of Ho et al. (5) in bits per dimension: the weighted squared error where t > 0, without the
    constant KL of the two fixed variances; the discretised likelihood of x_0 where t = 0. L_T does not
    depend on the network and is left out.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    denoised = denoise_fn(x_t, t)
    target = _target(schedule, prediction, x_0, x_t, t, eps)
    squared_error = jnp.square(denoised.prediction - target)
    weight = diffusion.at(variational_weight(schedule, prediction, variance), t, x_t)
    mean = diffusion.posterior_mean(schedule, denoised.x_0, x_t, t)
    log_variance = diffusion.at(diffusion.reverse_log_variance(schedule, variance), t, x_t)
    decoder = -gaussians.discretized_log_likelihood(x_0, mean, log_variance)
    first = t.reshape(*t.shape, 1, 1, 1) == 0
    nats = mean_over_pixels(jnp.where(first, decoder, weight * squared_error))
    return nats * (len(schedule) / np.log(2.0))
