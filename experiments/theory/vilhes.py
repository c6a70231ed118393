"""Vilhes (2024), The Theory behind Denoising Diffusion Probabilistic Models."""

import numpy as np

from ddpm_jax.experiments.theory import chain, ours
from ddpm_jax.experiments.theory.chain import over, symbols
from ddpm_jax.experiments.theory.erratum import Erratum, Numbers

SHORT = (2, 3, 5, 8)  # times at which ∏β_s does not underflow


def factor_of_x_t() -> Numbers:
    """The factor of x_t in the mean of q(x_{t−1} | x_t, x_0), by Bayes' rule on a grid, at t =
    500; also at t = 2, 10, 100, 1000.
    """

    def truth(t):
        x_t = np.sqrt(chain.forward(t)[1])
        return chain.moments(*chain.posterior(t, x_t, 0.0))[0] / x_t

    def formula(t, root):
        alpha, _, bar, before = symbols(t)
        return np.sqrt({"bar": bar, "alpha": alpha}[root]) * (1 - before) / (1 - bar)

    return Numbers(over(truth), over(formula, "bar"), over(formula, "alpha"))


def weight_with_beta_bar() -> Numbers:
    """The divergence L_{t−1} for ‖ε_θ − ε‖ = 1, integrated on a grid, at t = 2; also at t = 3, 5,
    8. The document does not define β̄_t; here it is ∏β_s, as ᾱ_t is ∏α_s.
    """

    def formula(t, variance):
        alpha, beta, bar, _ = symbols(t)
        return beta**2 / (2 * variance(t) * (1 - bar) * alpha)

    printed = over(formula, lambda t: np.prod(chain.BETA[:t]), times=SHORT)
    right = over(formula, beta_tilde, times=SHORT)
    return Numbers(over(chain.divergence_of_eps, times=SHORT), printed, right)


def beta_tilde(t):
    _, beta, bar, before = symbols(t)
    return beta * (1 - before) / (1 - bar)


def weight_of_eps() -> Numbers:
    """The divergence L_{t−1} for ‖ε_θ − ε‖ = 1, integrated on a grid, at t = 500; also at t = 2,
    10, 100, 1000. Here β̄_t is replaced by β̃_t, to isolate the effect of the second ᾱ_t.
    """

    def formula(t, last):
        alpha, beta, bar, _ = symbols(t)
        return beta**2 / (2 * beta_tilde(t) * (1 - bar) * {"bar": bar, "alpha": alpha}[last])

    return Numbers(over(chain.divergence_of_eps), over(formula, "bar"), over(formula, "alpha"))


def mean_from_eps() -> Numbers:
    """The mean of x_{t−1} for ε_θ = 1 and x_t = 2√(1−ᾱ_t), by Bayes' rule on a grid, at t = 500;
    also at t = 2, 10, 100, 1000.
    """

    def formula(t, first):
        alpha, _, bar, _ = symbols(t)
        x_t, eps = 2 * np.sqrt(1 - bar), 1.0
        first = {"bar": bar, "alpha": alpha}[first]
        return (x_t - (1 - alpha) / np.sqrt(1 - bar) * eps) / np.sqrt(first)

    truth = over(lambda t: chain.mean_of_eps(t, 2 * np.sqrt(chain.forward(t)[1]), 1.0))
    return Numbers(truth, over(formula, "bar"), over(formula, "alpha"))


def variance_of_the_sum() -> Numbers:
    """The variance of x_{t+1} given x_0, kernel by kernel, at t + 1 = 500; also at 2, 10, 100, 1000."""

    def formula(t):
        alpha, _, _, before = symbols(t)
        return alpha * (1 - before) + 1 - alpha

    return Numbers(over(chain.variance), over(formula), over(lambda t: 1 - symbols(t)[2]))


def variance_of_the_last_line() -> Numbers:
    """The variance of x_{t+1} given x_0, kernel by kernel, at t + 1 = 500; also at 2, 10, 100, 1000.
    The variance of a formula is the sum of its two squared factors.
    """

    def formula(t, first):
        alpha, _, bar, before = symbols(t)
        return {"bar": bar, "alpha": alpha}[first] * (1 - before) + 1 - alpha

    return Numbers(over(chain.variance), over(formula, "bar"), over(formula, "alpha"))


def inverse() -> Numbers:
    """The variance of q(x_{t−1} | x_t, x_0), by Bayes' rule on a grid, at t = 500; also at t = 2,
    10, 100, 1000.
    """
    return Numbers(
        over(chain.posterior_variance), over(lambda t: 1 / beta_tilde(t)), over(beta_tilde)
    )


def bracket() -> Numbers:
    """The variance of q(x_{t−1} | x_t, x_0), by Bayes' rule on a grid, at t = 500; also at t = 2,
    10, 100, 1000. The variance of a formula is −½ divided by the factor of x²_{t−1}
    in its exponent.
    """

    def formula(t, of_second):
        alpha, beta, _, before = symbols(t)
        return -0.5 / (-0.5 * alpha / beta + of_second / (1 - before))

    return Numbers(over(chain.posterior_variance), over(formula, 1.0), over(formula, -0.5))


def blue() -> Numbers:
    """The variance of q(x_{t−1} | x_t, x_0), by Bayes' rule on a grid, at t = 500; also at t = 2,
    10, 100, 1000. The printed value is the variance of red · blue / green as a density of x_{t−1}:
    if blue is a density of x_t, only red depends on x_{t−1}, with −½ α_t/β_t before x²_{t−1}.
    """

    def printed(t):
        alpha, beta, _, _ = symbols(t)
        return beta / alpha

    return Numbers(over(chain.posterior_variance), over(printed), over(beta_tilde))


def prior_term() -> Numbers:
    """L_T of a chain that stops at t = 100, for x_0 = 0.3: KL(q(x_T | x_0) ‖ N(0, 1)) integrated
    on a grid. Both formulas are evaluated as expectations under q.
    """
    factor, variance = chain.forward(100)
    x = np.linspace(-9, 9, 20001)
    log_q = chain.log_normal(x, 0.3 * factor, variance)
    log_p = chain.log_normal(x, 0.0, 1.0)
    printed = np.sum(np.exp(log_q) * np.exp(log_q) / log_p) * (x[1] - x[0])
    bar = symbols(100)[2]
    right = 0.5 * (1 - bar + bar * 0.3**2 - 1 - np.log(1 - bar))
    return Numbers(chain.divergence(x, log_q, log_p), printed, right)


ERRATA = (
    Erratum(
        "§3 (three times), §8.5, §8.6",
        "μ̃_t = … + √ᾱ_t (1−ᾱ_{t−1})/(1−ᾱ_t) x_t",
        "√α_t, as in its own §6 and §8.4",
        factor_of_x_t,
        ours=ours.factor_of_x_t,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "(7)",
        "½ β_t² / (β̄_t (1−ᾱ_t) α_t)",
        "½ β_t² / (β̃_t (1−ᾱ_t) α_t)",
        weight_with_beta_bar,
        ours=lambda: ours.divergence_of_eps(SHORT),
    ),
    Erratum(
        "§8.5, proof of (7)",
        "½ β_t² / (β̄_t (1−ᾱ_t) ᾱ_t)",
        "½ β_t² / (β̃_t (1−ᾱ_t) α_t); (7) itself has this α_t",
        weight_of_eps,
        ours=ours.divergence_of_eps,
    ),
    Erratum(
        "(8)",
        "μ_θ = 1/√ᾱ_t (x_t − (1−α_t)/√(1−ᾱ_t) ε_θ)",
        "1/√α_t (…), as at the end of its §8.6",
        mean_from_eps,
        ours=ours.mean_from_eps,
    ),
    Erratum(
        "§8.1, the sum of blue and red",
        "variance α_{t+1}(1−ᾱ_t) + 1 − α_{t+1}",
        "the same, which is 1 − ᾱ_{t+1}",
        variance_of_the_sum,
        ours=ours.forward_variance,
        ours_tolerance=1e-9,
        is_one=False,
    ),
    Erratum(
        "§8.1, the line after “Thus”",
        "√ᾱ_{t+1} √(1−ᾱ_t) ε + √(1−α_{t+1}) ε_{t+1}",
        "√α_{t+1} √(1−ᾱ_t) ε + …",
        variance_of_the_last_line,
        ours=ours.forward_variance,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "§8.4, β̃_t, second line",
        "β̃_t = (1−ᾱ_t)/(β_t (1−ᾱ_{t−1}))",
        "its inverse β_t (1−ᾱ_{t−1})/(1−ᾱ_t), as in the third line",
        inverse,
        ours=ours.posterior_variance,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "§8.4, the line with ∝",
        "exp[−½(…/(1−α_t)) + …/(1−ᾱ_{t−1}) − …]",
        "−½ before all three, as in the next line",
        bracket,
        ours=ours.posterior_variance,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "§8.4, “blue =”",
        "q(x_{t−1}∣x_0) = N(x_t; √ᾱ_{t−1} x_0, (1−ᾱ_{t−1}) I)",
        "N(x_{t−1}; …), as in the line with ∝",
        blue,
        ours=ours.posterior_variance,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "§8.5, the second line with “using property 9”",
        "(μ_θ − μ_θ)ᵀ β̃_t⁻¹ (μ_θ − μ_θ) + tr(…)",
        "(μ̃_t − μ̃_t)ᵀ β̃_t⁻¹ (μ̃_t − μ̃_t) + tr(…): both the mean and the u of property 9 are μ̃_t",
        "Argument: both differences are 0, and the next line, with J for the trace, is correct.",
        is_one=False,
    ),
    Erratum(
        "§8.3, the last two lines",
        "q(x_T∣x_0) / log p_θ(x_T)",
        "log (q(x_T∣x_0) / p_θ(x_T))",
        prior_term,
        ours=ours.prior_term,
    ),
)
