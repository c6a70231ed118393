"""The exact oracle: if every pixel of the data is N(m, s²), the best denoiser is known in closed form.

Then x_t is N(√ᾱ_t m, ᾱ_t s² + 1 − ᾱ_t), the posterior mean of the noise is affine in x_t, and so each
sampler is an affine map with independent noise, whose output mean and variance follow from a scalar
recursion. The recursions below are written in float64 from the definitions and share no code with the
samplers.
"""

import jax.numpy as jnp
import numpy as np
from scipy import special

from ddpm_jax.process import diffusion

MEAN, STD = 0.3, 0.5


def exact_eps(schedule):
    """network_fn(x_t, t) = E[ε | x_t] of the data N(MEAN, STD²)."""
    a = schedule.alpha_bar
    slope = np.sqrt(1 - a) / (a * STD**2 + 1 - a)
    shift = -slope * np.sqrt(a) * MEAN

    def network_fn(x_t, t):
        return diffusion.at(slope, t, x_t) * x_t + diffusion.at(shift, t, x_t)

    return network_fn


def exact_denoiser(schedule, prediction="eps", variance_fn=None, variance=None):
    """The same as a `denoiser`, in any parameterisation.

    Args:
      variance_fn: (x_t, t), the second half of the network's channels.
      variance: of p(x_s | x_t), as `diffusion.denoiser` takes it.
    """
    eps_fn, a = exact_eps(schedule), schedule.alpha_bar
    _, _, of_x_0, of_x_t = steps_of(a)

    def network_fn(x_t, t):
        value = eps_fn(x_t, t)
        if prediction != "eps":
            alpha, sigma = (diffusion.at(np.sqrt(table), t, x_t) for table in (a, 1 - a))
            x_0 = (x_t - sigma * value) / alpha
            value = {
                "x_0": x_0,
                "v": alpha * value - sigma * x_0,
                "mean": diffusion.at(of_x_0, t, x_t) * x_0 + diffusion.at(of_x_t, t, x_t) * x_t,
            }[prediction]
        if variance_fn is None:
            return value
        return jnp.concatenate([value, variance_fn(x_t, t)], axis=-1)

    return diffusion.denoiser(
        schedule,
        network_fn,
        prediction=prediction,
        learned_variance=variance_fn is not None,
        variance=variance,
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
        low, high = (along(np.log(end), said) for end in (small, large))
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


def exact_x_0(x, a):
    """E[x_0 | x_t = x] at ᾱ = a."""
    gain = np.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
    return MEAN + gain * (x - np.sqrt(a) * MEAN)


def flow(x, a, to):
    """The exact solution of the probability-flow ODE from x at ᾱ = a to another ᾱ: (x − mean)/std is constant."""
    spread, spread_to = (np.sqrt(v * STD**2 + 1 - v) for v in (a, to))
    return np.sqrt(to) * MEAN + spread_to * (x - np.sqrt(a) * MEAN) / spread


def ddim_moments(alpha_bar, eta=0.0):
    """Mean and standard deviation of x_0 after DDIM over the given ᾱ; eta may be "hat"."""
    previous = np.append(1.0, alpha_bar[:-1])
    mean, var = 0.0, 1.0
    for i in reversed(range(len(alpha_bar))):
        a, p = alpha_bar[i], previous[i]
        sigma = (1.0 if eta == "hat" else eta) * np.sqrt((1 - p) / (1 - a) * (1 - a / p))
        noise = np.sqrt(1 - a / p) if eta == "hat" and i > 0 else sigma

        def step(x, a=a, p=p, sigma=sigma):
            x_0 = exact_x_0(x, a)
            eps = (x - np.sqrt(a) * x_0) / np.sqrt(1 - a)
            return np.sqrt(p) * x_0 + np.sqrt(max(1 - p - sigma**2, 0)) * eps

        mean, var = step(mean), (step(1.0) - step(0.0)) ** 2 * var + noise**2
    return mean, np.sqrt(var)


def there_and_back(x_0, alpha_bar):
    """x_0 encoded and decoded over the given ᾱ, with ε̂ evaluated at the noisier end of each step."""
    previous = np.append(1.0, alpha_bar[:-1])

    def move(x, a, start, end):
        eps = (x - np.sqrt(a) * exact_x_0(x, a)) / np.sqrt(1 - a)
        return np.sqrt(end / start) * (x - np.sqrt(1 - start) * eps) + np.sqrt(1 - end) * eps

    x = x_0
    for a, p in zip(alpha_bar, previous, strict=True):
        x = move(x, a, p, a)
    for a, p in zip(alpha_bar[::-1], previous[::-1], strict=True):
        x = move(x, a, a, p)
    return x


def dpm_solver(alpha_bar, x, order):
    """DPM-Solver++ (multistep) for one number x, its integrals by quadrature; order 2 as Lu et al. write it."""
    level = 0.5 * np.log(alpha_bar / (1 - alpha_bar))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    seen = []  # (λ, x̂_0), the newest first
    for i in reversed(range(len(alpha_bar))):
        seen.insert(0, (level[i], exact_x_0(x, alpha_bar[i])))
        if i == 0:
            return seen[0][1]
        h, a, p = level[i - 1] - level[i], alpha_bar[i], alpha_bar[i - 1]
        known = seen[:order]
        while len(known) > 1 and h > 2 * (known[0][0] - known[-1][0]) / (len(known) - 1):
            known = known[:-1]  # no extrapolation over more than twice what lies behind
        if order == 2 and len(known) == 2:
            (now, x_0), (before, x_0_before) = known
            r = (now - before) / h
            integral = (1 - np.exp(-h)) * ((1 + 1 / (2 * r)) * x_0 - x_0_before / (2 * r))
        else:
            curve = np.polynomial.Polynomial.fit(*zip(*known, strict=True), deg=len(known) - 1)
            u = (nodes + 1) * h / 2
            integral = np.sum(weights * h / 2 * np.exp(u - h) * curve(level[i] + u))
        x = np.sqrt((1 - p) / (1 - a)) * x + np.sqrt(p) * integral


def dpm_solver_2s(alpha_bar, x):
    """DPM-Solver++ (2S) for one number x: two steps at a time, an odd one first."""

    def half(x, i, to, x_0):  # a step of order 1 from level i to level `to`
        a, p = alpha_bar[i], alpha_bar[to]
        sigma_ratio = np.sqrt((1 - p) / (1 - a))
        return sigma_ratio * x + (np.sqrt(p) - sigma_ratio * np.sqrt(a)) * x_0

    level, i = 0.5 * np.log(alpha_bar / (1 - alpha_bar)), len(alpha_bar) - 1
    if i % 2:
        x, i = half(x, i, i - 1, exact_x_0(x, alpha_bar[i])), i - 1
    while i > 0:
        first = exact_x_0(x, alpha_bar[i])
        second = exact_x_0(half(x, i, i - 1, first), alpha_bar[i - 1])
        r = (level[i - 1] - level[i]) / (level[i - 2] - level[i])
        x, i = half(x, i, i - 2, (1 - 1 / (2 * r)) * first + second / (2 * r)), i - 2
    return exact_x_0(x, alpha_bar[0])


def heun(alpha_bar, x):
    """Heun's method for one number x, in x/√ᾱ and σ̄."""

    def sigma(a):
        return np.sqrt((1 - a) / a)

    def slope(scaled, a):
        return (scaled - exact_x_0(scaled * np.sqrt(a), a)) / sigma(a)

    x = x / np.sqrt(alpha_bar[-1])
    for a, p in zip(alpha_bar[:0:-1], alpha_bar[-2::-1], strict=True):
        first = second = slope(x, a)
        if sigma(a) <= 10 or sigma(a) <= 10 * sigma(p):  # else a step of Euler's
            second = slope(x + (sigma(p) - sigma(a)) * first, p)
        x = x + (sigma(p) - sigma(a)) * (first + second) / 2
    return exact_x_0(x * np.sqrt(alpha_bar[0]), alpha_bar[0])


def affine_moments(function):
    """Mean and standard deviation of function(x) for an affine function and x of N(0, 1)."""
    return function(0.0), abs(function(1.0) - function(0.0))


def level_bits(x_0, mean, std):
    """−log₂ of the probability of 8-bit levels under N(mean, std²), open at both ends; Ho et al. (13)."""
    lower = np.where(x_0 < -0.999, -np.inf, (x_0 - 1 / 255 - mean) / std)
    upper = np.where(x_0 > 0.999, np.inf, (x_0 + 1 / 255 - mean) / std)
    side = np.where(lower + upper > 0, -1.0, 1.0)  # where the difference keeps its digits
    near, far = np.maximum(side * lower, side * upper), np.minimum(side * lower, side * upper)
    return -np.log2(special.ndtr(near) - special.ndtr(far))


def bound_terms(alpha_bar, x_0, eps, sigma2):
    """L_0, L_1, … in bits of each number x_0 […] for given noise eps [S, …] and σ² [S, …]: [S, …]."""
    p, beta, of_x_0, _ = (along(table, eps) for table in steps_of(alpha_bar))
    a = along(alpha_bar, eps)
    x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps
    gain = np.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
    guess = MEAN + gain * (x_t - np.sqrt(a) * MEAN)
    with np.errstate(divide="ignore"):  # the first step has no divergence
        ratio = beta * (1 - p) / (1 - a) / along(sigma2, eps)
        squared = (of_x_0 * (x_0 - guess)) ** 2 / along(sigma2, eps)
        terms = 0.5 * (squared + ratio - 1 - np.log(ratio)) / np.log(2)
    terms[0] = level_bits(x_0, guess[0], np.sqrt(along(sigma2, eps)[0]))
    return terms


def along(table, like):
    """[S] or [S, …] to the rank of `like` [S, …]."""
    return table.reshape(table.shape + (1,) * (like.ndim - table.ndim))


def prior_bits(alpha_bar, x_0):
    """KL(N(√ᾱ x_0, 1 − ᾱ) ‖ N(0, 1)) in bits of each number."""
    a = alpha_bar[-1]
    return 0.5 * (a * x_0**2 - a - np.log(1 - a)) / np.log(2)


def data(key_or_rng, shape):
    """Numbers of N(MEAN, STD²)."""
    return jnp.asarray(MEAN + STD * key_or_rng.standard_normal(shape), jnp.float32)
