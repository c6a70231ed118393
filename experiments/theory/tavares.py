"""Tavares de Andrade (2025), Denoising Diffusion Probabilistic Models: slides with code."""

import functools

import numpy as np
from scipy import optimize

from ddpm_jax.experiments.theory import chain, ours
from ddpm_jax.experiments.theory.chain import BETA, over, symbols
from ddpm_jax.experiments.theory.erratum import Erratum, Numbers

X_0 = 0.7  # for a chain of two steps, which can be integrated over both latent variables


@functools.cache
def two_steps():
    """A chain with β = 0.3, 0.5 and some reverse process, on a grid of (x_1, x_2).

    Returns:
      x [N]; log q(x_1 | x_0), log q(x_2 | x_1), log p(x_2), log p(x_1 | x_2), log p(x_0 | x_1), each
      [N, N] or broadcastable to it.
    """
    x = np.linspace(-9, 9, 901)
    x_1, x_2 = x[:, None], x[None, :]
    log_q1 = chain.log_normal(x_1, np.sqrt(0.7) * X_0, 0.3)
    log_q2 = chain.log_normal(x_2, np.sqrt(0.5) * x_1, 0.5)
    log_p2 = chain.log_normal(x_2, 0.0, 1.0)
    log_p1 = chain.log_normal(x_1, 0.6 * x_2 + 0.1, 0.4)
    log_p0 = chain.log_normal(X_0, 0.8 * x_1, 0.2)
    return x, log_q1, log_q2, log_p2, log_p1, log_p0


def lower_bound() -> Numbers:
    """The bound minus log p_θ(x_0) for a chain of two steps, integrated over x_1 and x_2 on a grid.
    The truth is −KL(q ‖ posterior of p_θ), which is negative, as for every lower bound.
    """
    x, log_q1, log_q2, log_p2, log_p1, log_p0 = two_steps()
    area = (x[1] - x[0]) ** 2
    log_q, log_p = log_q1 + log_q2, log_p2 + log_p1 + log_p0
    evidence = np.log(np.sum(np.exp(log_p)) * area)
    truth = -np.sum(np.exp(log_q) * (log_q - (log_p - evidence))) * area
    L = np.sum(np.exp(log_q) * -(log_p - log_q)) * area
    return Numbers(truth, L - evidence, -L - evidence)


def signs() -> Numbers:
    """L = E_q[−log p_θ(x_{0:T})/q(x_{1:T}|x_0)] for a chain of two steps, integrated over x_1 and
    x_2 on a grid. Both formulas are sums of the three terms.
    """
    x, log_q1, log_q2, log_p2, log_p1, log_p0 = two_steps()
    dx = x[1] - x[0]
    q = np.exp(log_q1 + log_q2) * dx**2
    truth = np.sum(q * (log_q1 + log_q2 - log_p2 - log_p1 - log_p0))
    log_q2_given_x0 = np.log(np.sum(np.exp(log_q1 + log_q2), axis=0, keepdims=True) * dx)
    prior, decoder = np.sum(q * (log_q2_given_x0 - log_p2)), np.sum(q * -log_p0)
    consistency = np.sum(q * (log_q1 + log_q2 - log_q2_given_x0 - log_p1))
    return Numbers(truth, prior + decoder - consistency, prior + decoder + consistency)


def weight_of_x_0() -> Numbers:
    """L_{t−1} for ‖x_θ − x_0‖² = (1−ᾱ_t)/ᾱ_t, integrated on a grid, at t = 500; also at t = 2, 10,
    100, 1000.
    """

    def formula(t, inverted):
        alpha, _, bar, before = symbols(t)
        fraction = (1 - bar) / (1 - alpha)
        fraction = fraction if inverted else 1 / fraction
        return fraction * before / (2 * (1 - before)) * (1 - bar) / bar

    return Numbers(over(chain.divergence_of_x_0), over(formula, True), over(formula, False))


def weight_of_eps() -> Numbers:
    """L_{t−1} for ‖ε_θ − ε‖ = 1 and σ_t² = β̃_t, integrated on a grid, at t = 500; also at t = 2,
    10, 100, 1000.
    """

    def printed(t):
        alpha, _, bar, before = symbols(t)
        first = (1 - bar) * before / (2 * (1 - alpha) * (1 - before))
        return first * (1 - alpha) ** 2 / ((1 - bar) * alpha)

    def right(t):
        alpha, beta, bar, before = symbols(t)
        variance = beta * (1 - before) / (1 - bar)
        return (1 - alpha) ** 2 / (2 * variance * alpha * (1 - bar))

    return Numbers(over(chain.divergence_of_eps), over(printed), over(right))


def norm() -> Numbers:
    """What a network learns for x_t = 0.3 at t = 500 if the data are 1 with probability 0.2 and −1
    with 0.8: E[ε | x_t] by Bayes' rule, and the minimisers of E‖ε − c‖ and E‖ε − c‖² found
    numerically. μ_θ needs the mean of ε.
    """
    factor, variance = chain.forward(500)
    x_t, x_0, prior = 0.3, np.array([1.0, -1.0]), np.array([0.2, 0.8])
    weight = prior * np.exp(chain.log_normal(x_t, factor * x_0, variance))
    weight /= weight.sum()
    eps = (x_t - factor * x_0) / np.sqrt(variance)

    def learned(power):
        def loss(c):
            return np.sum(weight * np.abs(eps - c) ** power)

        found = optimize.minimize_scalar(
            loss, bounds=(eps.min(), eps.max()), method="bounded", options={"xatol": 1e-10}
        )
        return found.x

    return Numbers(np.sum(weight * eps), learned(1), learned(2))


def length_of_the_chain() -> Numbers:
    """Mean and standard deviation of generated x_0 for data N(0.3, 0.5²), with the exact ε, from the
    moments of every step of the algorithm: for T = 1000, and for T drawn from 1 … 1000. The mean is
    shown.
    """
    data, std = 0.3, 0.5
    a, b, noise = 1.0, 0.0, 0.0  # x_0 = a x_T + b + noise, from the steps below T
    means, variances = [], []
    bar, before = 1.0, 1.0
    for t in range(1, 1001):
        alpha, beta = 1 - BETA[t - 1], BETA[t - 1]
        before, bar = bar, bar * alpha
        total = bar * std**2 + 1 - bar  # the variance of x_t; ε(x) = √(1−ᾱ)(x − √ᾱ m)/total
        slope = (1 - beta / total) / np.sqrt(alpha)
        shift = beta / total * np.sqrt(bar) * data / np.sqrt(alpha)
        added = beta * (1 - before) / (1 - bar) if t > 1 else 0.0
        a, b, noise = a * slope, b + a * shift, noise + a**2 * added
        means.append(b)
        variances.append(a**2 + noise)
    mean, square = np.mean(means), np.mean(np.array(variances) + np.square(means))
    printed = np.array([mean, np.sqrt(square - mean**2)])
    return Numbers(np.array([data, std]), printed, np.array([means[-1], np.sqrt(variances[-1])]))


def attribute() -> Numbers:
    """α_t at t = 500, from the definition 1 − β_t; also at t = 2, 10, 100, 1000. The printed value is
    `scheduler.alpha` at t.
    """
    return Numbers(
        over(lambda t: 1 - BETA[t - 1]),
        np.cumprod(1 - BETA)[np.array(chain.TIMES) - 1],
        over(lambda t: symbols(t)[0]),
    )


ERRATA = (
    Erratum(
        "(21), (22) and “maximize … (L)”",
        "L := E_q[−log (p/q)] is the evidence lower bound, to be maximised",
        "E_q[log (p/q)] is the lower bound, as in (20); L bounds −log p from above and is minimised",
        lower_bound,
    ),
    Erratum("(25)", "L = E[L_T] − log p_θ(x_0∣x_1) − E[Σ KL]", "+ E[Σ KL]", signs),
    Erratum(
        "(49)",
        "(1−ᾱ_t) ᾱ_{t−1} / (2(1−α_t)(1−ᾱ_{t−1})) ‖x_θ − x_0‖²",
        "(1−α_t) ᾱ_{t−1} / (2(1−ᾱ_t)(1−ᾱ_{t−1})) ‖x_θ − x_0‖²",
        weight_of_x_0,
        ours=ours.divergence_of_eps,
    ),
    Erratum(
        "(57)",
        "the weight of (49) times (1−α_t)²/((1−ᾱ_t) α_t), for ‖ε_θ − ε‖²",
        "(1−α_t)² / (2σ_t² α_t (1−ᾱ_t)): the correct weight of (49) times (1−ᾱ_t)/ᾱ_t",
        weight_of_eps,
        ours=ours.divergence_of_eps,
    ),
    Erratum("Training, line 6", "∇_θ ‖ε − ε_θ‖", "∇_θ ‖ε − ε_θ‖²", norm, tolerance=1e-6),
    Erratum(
        "Sampling, line 3",
        "T ~ Uniform({1, …, 1000})",
        "T = 1000, the end of the chain; only training draws a time",
        length_of_the_chain,
        tolerance=1e-2,
    ),
    Erratum(
        "Code, DDPMScheduler",
        "the attribute `alpha` is cumprod(1 − β)",
        "this is ᾱ, which the line that adds noise needs, and should have that name; the α_t of the sampling slide is different",
        attribute,
        ours=ours.alpha,
        ours_tolerance=1e-9,
    ),
)
