"""The exact oracle: if every pixel of the data is N(m, s²), the best denoiser is known in closed form.

Then x_t is N(√ᾱ_t m, ᾱ_t s² + 1 − ᾱ_t), the posterior mean of the noise is affine in x_t, and so each
sampler is an affine map with independent noise, whose output mean and variance follow from a scalar
recursion. The recursions below are written in float64 from the definitions and share no code with the
samplers.
"""

import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion

MEAN, STD = 0.3, 0.5


def exact_eps(schedule):
    """network_fn(x_t, t) = E[ε | x_t] of the data N(MEAN, STD²)."""
    a = schedule.alpha_bar
    slope = np.sqrt(1 - a) / (a * STD**2 + 1 - a)
    shift = -slope * np.sqrt(a) * MEAN

    def network_fn(x_t, t):
        return diffusion.at(slope, t, x_t) * x_t + diffusion.at(shift, t, x_t)

    return network_fn


def exact_denoiser(schedule, prediction="eps"):
    """The same as a `denoise_fn`, given in any parameterisation."""
    eps_fn = exact_eps(schedule)

    def network_fn(x_t, t):
        eps = eps_fn(x_t, t)
        if prediction == "eps":
            return eps
        x_0 = diffusion.to_x_0(schedule, "eps", eps, x_t, t)
        return diffusion.from_x_0(schedule, prediction, x_0, x_t, t)

    return diffusion.denoiser(schedule, network_fn, prediction=prediction)


def ancestral_moments(alpha_bar, variance):
    """Mean and standard deviation of x_0 after ancestral sampling over the given ᾱ: two floats."""
    previous = np.append(1.0, alpha_bar[:-1])
    mean, var = 0.0, 1.0
    for i in reversed(range(len(alpha_bar))):
        a, p = alpha_bar[i], previous[i]
        beta = 1 - a / p
        total = a * STD**2 + 1 - a
        # E[x_0 | x_t] = MEAN + gain · (x_t − √a MEAN); the posterior mean mixes it with x_t.
        gain = np.sqrt(a) * STD**2 / total
        of_x_0 = np.sqrt(p) * beta / (1 - a)
        of_x_t = np.sqrt(a / p) * (1 - p) / (1 - a)
        slope = of_x_0 * gain + of_x_t
        mean = of_x_0 * (MEAN - gain * np.sqrt(a) * MEAN) + slope * mean
        sigma2 = {"fixed_large": beta, "fixed_small": beta * (1 - p) / (1 - a)}[variance]
        var = slope**2 * var + (sigma2 if i > 0 else 0.0)
    return mean, np.sqrt(var)


def ddim_moments(alpha_bar):
    """Mean and standard deviation of x_0 after deterministic DDIM over the given ᾱ."""
    previous = np.append(1.0, alpha_bar[:-1])
    mean, std = 0.0, 1.0
    for a, p in zip(alpha_bar[::-1], previous[::-1], strict=True):
        total = a * STD**2 + 1 - a
        # ε̂ = √(1−a)(x − √a m)/total, x̂_0 = (x − √(1−a) ε̂)/√a
        eps_slope = np.sqrt(1 - a) / total
        x0_slope = (1 - np.sqrt(1 - a) * eps_slope) / np.sqrt(a)
        slope = np.sqrt(p) * x0_slope + np.sqrt(1 - p) * eps_slope
        eps_shift = -eps_slope * np.sqrt(a) * MEAN
        x0_shift = -np.sqrt(1 - a) * eps_shift / np.sqrt(a)
        mean = slope * mean + np.sqrt(p) * x0_shift + np.sqrt(1 - p) * eps_shift
        std = slope * std
    return mean, std


def data(key_or_rng, shape):
    """Numbers of N(MEAN, STD²)."""
    return jnp.asarray(MEAN + STD * key_or_rng.standard_normal(shape), jnp.float32)
