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


def exact_denoiser(schedule, prediction="eps", variance_fn=None):
    """The same as a `denoise_fn`, given in any parameterisation; variance_fn(x_t, t) is its second half."""
    eps_fn = exact_eps(schedule)

    def network_fn(x_t, t):
        value = eps_fn(x_t, t)
        if prediction != "eps":
            x_0 = diffusion.to_x_0(schedule, "eps", value, x_t, t)
            value = diffusion.from_x_0(schedule, prediction, x_0, x_t, t)
        if variance_fn is None:
            return value
        return jnp.concatenate([value, variance_fn(x_t, t)], axis=-1)

    return diffusion.denoiser(
        schedule, network_fn, prediction=prediction, learned_variance=variance_fn is not None
    )


def x_0_error(alpha_bar):
    """The conditional variance of x_0 given x_t, which is the exact denoiser's squared error."""
    return STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)


def steps_of(alpha_bar):
    """ᾱ_{t−1}, β_t, and the factors of x_0 and x_t in the posterior mean: each [S]."""
    p = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / p
    of_x_0 = np.sqrt(p) * beta / (1 - alpha_bar)
    of_x_t = np.sqrt(alpha_bar / p) * (1 - p) / (1 - alpha_bar)
    return p, beta, of_x_0, of_x_t


def sigma2(alpha_bar, variance, said=None):
    """σ_t² of the reverse process [S, …]; `said` [S, …] is what the network gives for a learned one.

    Where β̃_0 = 0 has no logarithm, the first step borrows that of the second.
    """
    p, beta, of_x_0, _ = steps_of(alpha_bar)
    posterior = beta * (1 - p) / (1 - alpha_bar)
    if len(alpha_bar) > 1:
        small, large = posterior.copy(), beta.copy()
        small[0] = large[0] = posterior[1]
    else:
        small = large = beta
    if variance == "learned":
        return np.exp(said)
    if variance == "learned_range":
        low, high = (np.log(end).reshape(-1, *[1] * (said.ndim - 1)) for end in (small, large))
        return np.exp(low + (said + 1) / 2 * (high - low))
    if variance == "analytic":
        return posterior + of_x_0**2 * x_0_error(alpha_bar)
    return {"fixed_small": small, "fixed_large": large}[variance]


def ancestral_moments(alpha_bar, sigma2):
    """Mean and standard deviation of x_0 after ancestral sampling over the given ᾱ, σ²: two floats."""
    mean, var = 0.0, 1.0
    _, _, all_of_x_0, all_of_x_t = steps_of(alpha_bar)
    for i in reversed(range(len(alpha_bar))):
        a, of_x_0, of_x_t = alpha_bar[i], all_of_x_0[i], all_of_x_t[i]
        # E[x_0 | x_t] = MEAN + gain · (x_t − √a MEAN); the posterior mean mixes it with x_t.
        gain = np.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
        slope = of_x_0 * gain + of_x_t
        mean = of_x_0 * (MEAN - gain * np.sqrt(a) * MEAN) + slope * mean
        var = slope**2 * var + (sigma2[i] if i > 0 else 0.0)
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
