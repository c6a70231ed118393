"""The truth: the chain by its definition, in float64 and on grids. It shares no code with ddpm_jax.

It takes only the kernel q(x_t | x_{t−1}) = N(√α_t x_{t−1}, β_t) of a single number from the documents.
Everything else is composed from it step by step, or integrated by the trapezoidal rule, which is exact up to
rounding for densities that vanish at both ends. Times are those of the documents, t = 1 … 1000.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BETA = np.linspace(1e-4, 0.02, 1000)  # β_1 … β_T of Ho et al. §4
TIMES = (500, 2, 10, 100, 1000)  # the table shows the first


def over(function: Callable[..., float], *arguments, times=TIMES) -> np.ndarray:
    """function(t, *arguments) at each of the times."""
    return np.array([function(t, *arguments) for t in times])


def symbols(t: int) -> tuple[float, float, float, float]:
    """α_t, β_t, ᾱ_t and ᾱ_{t−1}, the symbols of the formulas; ᾱ_0 = 1."""
    alpha = 1 - BETA
    return alpha[t - 1], BETA[t - 1], np.prod(alpha[:t]), np.prod(alpha[: t - 1])


def forward(t: int, start: int = 0) -> tuple[float, float]:
    """Factor and variance of q(x_t | x_start) = N(factor · x_start, variance), kernel by kernel."""
    factor, variance = 1.0, 0.0
    for beta in BETA[start:t]:
        factor, variance = np.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
    return factor, variance


def variance(t: int) -> float:
    """The variance of x_t given x_0."""
    return forward(t)[1]


def log_normal(x, mean, variance):
    """log N(x; mean, variance)."""
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def normalise(log_density, x):
    """Normalises the logarithm of a density on an even grid."""
    peak = log_density.max()
    return log_density - peak - np.log(np.exp(log_density - peak).sum() * (x[1] - x[0]))


def posterior(t: int, x_t: float, x_0: float, before: int | None = None):
    """log q(x_s | x_t, x_0) on a grid by Bayes' rule: x [N], log density [N].

    Args:
      before: the time s; None for t − 1.
    """
    before = t - 1 if before is None else before
    x = np.linspace(-15, 15, 20001) * np.sqrt(forward(t)[1])
    factor, variance = forward(before)
    step, step_variance = forward(t, before)
    log_density = log_normal(x_t, step * x, step_variance) + log_normal(x, factor * x_0, variance)
    return x, normalise(log_density, x)


def ddim_posterior(t: int, x_t, x_0: float, eta: float):
    """Mean and variance of DDIM's q_σ(x_{t−1} | x_t, x_0), Lemma 2.1 of Liu, with σ = η √β̃_t."""
    (factor, spread), (earlier, earlier_spread) = forward(t), forward(t - 1)
    variance = eta**2 * BETA[t - 1] * earlier_spread / spread
    line = np.sqrt((earlier_spread - variance) / spread)
    return earlier * x_0 + line * (x_t - factor * x_0), variance


def ddim_forward(t: int, x_before: float, x_0: float, eta: float):
    """log q_σ(x_t | x_{t−1}, x_0) on a grid by Bayes' rule: x [N], log density [N]."""
    factor, spread = forward(t)
    line = ddim_posterior(t, 1.0, 0.0, eta)[0]
    middle, variance = ddim_posterior(t, 0.0, x_0, eta)
    # The x_t at which q_σ(x_{t−1} | x_t, x_0) is largest.
    middle = (x_before - middle) / line
    x = middle + np.linspace(-12, 12, 20001) * np.sqrt(variance) / line
    mean, _ = ddim_posterior(t, x, x_0, eta)
    log_density = log_normal(x_before, mean, variance) + log_normal(x, factor * x_0, spread)
    return x, normalise(log_density, x)


def moments(x, log_density) -> tuple[float, float]:
    """Mean and variance of a density on a grid."""
    p = np.exp(log_density) * (x[1] - x[0])
    mean = np.sum(p * x)
    return mean, np.sum(p * (x - mean) ** 2)


def divergence(x, log_p, log_q) -> float:
    """KL(p ‖ q) of two densities on a grid."""
    return np.sum(np.exp(log_p) * (log_p - log_q)) * (x[1] - x[0])


def posterior_variance(t: int) -> float:
    """The variance of x_{t−1} given x_t and x_0."""
    return moments(*posterior(t, 0.0, 0.0))[1]


def divergence_of_x_0(t: int) -> float:
    """KL(q(x_{t−1} | x_t, x_0) ‖ q(x_{t−1} | x_t, x_θ)) for ‖x_θ − x_0‖² = (1−ᾱ_t)/ᾱ_t."""
    factor, variance = forward(t)
    return _divergence(t, 0.0, np.sqrt(variance) / factor)


def divergence_of_eps(t: int, variance: float | None = None) -> float:
    """KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)) for ‖ε_θ − ε‖ = 1.

    Args:
      variance: σ_t² of p_θ; None for the variance of q.
    """
    factor, of_x_t = forward(t)
    x_t = 0.3 * np.sqrt(of_x_t)
    eps, eps_theta = 0.5, 1.5
    x_0, x_theta = ((x_t - np.sqrt(of_x_t) * e) / factor for e in (eps, eps_theta))
    return _divergence(t, x_0, x_theta, x_t, variance)


def _divergence(t, x_0, x_theta, x_t=0.0, variance=None):
    x, log_q = posterior(t, x_t, x_0)
    _, log_p = posterior(t, x_t, x_theta)
    if variance is not None:
        log_p = log_normal(x, moments(x, log_p)[0], variance)
    return divergence(x, log_q, log_p)


def mean_of_eps(t: int, x_t: float, eps: float) -> float:
    """The mean of x_{t−1} given x_t and the x_0 that follows from x_t and ε."""
    factor, variance = forward(t)
    return moments(*posterior(t, x_t, (x_t - np.sqrt(variance) * eps) / factor))[0]
