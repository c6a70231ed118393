"""Liu (2023), Notes on Diffusion Models: VAE, DDPM, DDIM."""

import numpy as np
from scipy import special

from ddpm_jax.experiments.theory import chain, ours
from ddpm_jax.experiments.theory.chain import over, symbols
from ddpm_jax.experiments.theory.erratum import Erratum, Numbers

LEVELS = np.arange(256) / 127.5 - 1
TAU = tuple(range(100, 1001, 100))  # a sub-sequence of ten times


def divergence_from_the_prior() -> Numbers:
    """−KL(N(0.4, 0.6²) ‖ N(0, 1)), integrated on a grid."""
    mean, variance = 0.4, 0.36
    x = np.linspace(-12, 12, 20001)
    truth = -chain.divergence(x, chain.log_normal(x, mean, variance), chain.log_normal(x, 0.0, 1.0))
    printed, right = (0.5 * (1 + np.log(variance) - mean**2 + s * variance) for s in (1, -1))
    return Numbers(truth, printed, right)


def sum_of_levels() -> Numbers:
    """The sum of p(x_0 | x_1) over the 256 levels of a pixel, for μ_θ = 0.2, σ_1 = 0.5.
    Probabilities sum to 1.
    """

    def total(side):
        upper = np.where(LEVELS > 0.999, np.inf, LEVELS + 1 / 255)
        lower = np.where(LEVELS < -0.999, -np.inf, LEVELS + side / 255)
        return np.sum(special.ndtr((upper - 0.2) / 0.5) - special.ndtr((lower - 0.2) / 0.5))

    return Numbers(1.0, total(1), total(-1))


def first_mean() -> Numbers:
    """μ_θ(x_1, 1) for x_0 = 0.3 and a network that returns ε = 0.7 exactly; it must equal x_0."""
    beta, x_0, eps = chain.BETA[0], 0.3, 0.7
    x_1 = np.sqrt(1 - beta) * x_0 + np.sqrt(beta) * eps
    return Numbers(x_0, x_1 - eps, (x_1 - np.sqrt(beta) * eps) / np.sqrt(1 - beta))


def weight_of_the_decoder() -> Numbers:
    """The increase of −log p(x_0 | x_1) if μ_θ is 0.1 away from x_0 = 0 (nearest level), divided by
    0.1², for σ_1 = 0.1, from exact normal integrals over the level.
    """
    x_0, std, off = LEVELS[128], 0.1, 0.1

    def log_p(mean):
        edges = (x_0 + np.array([-1, 1]) / 255 - mean) / std
        return np.log(special.ndtr(edges[1]) - special.ndtr(edges[0]))

    truth = (log_p(x_0) - log_p(x_0 + off)) / off**2
    return Numbers(truth, 2 / 255 / (2 * std**2), 1 / (2 * std**2))


def weight_of_ddim() -> Numbers:
    """KL(q_σ(x_t | x_{t+1}, x_0) ‖ p_θ(x_t | x_{t+1})) for ‖ε_θ − ε‖ = 1, both as in Lemma 2.1
    with half of DDPM's σ, integrated on a grid, at t + 1 = 500; also at 2, 10, 100, 1000.
    """

    def truth(t):  # t is the document's t + 1
        factor, spread = chain.forward(t)
        x_t = 0.2
        x_0, x_theta = ((x_t - np.sqrt(spread) * eps) / factor for eps in (0.5, 1.5))
        means, (variance, _) = zip(
            *(chain.ddim_posterior(t, x_t, x, 0.5) for x in (x_0, x_theta)), strict=True
        )
        x = np.mean(means) + np.linspace(-1, 1, 20001) * (
            abs(means[1] - means[0]) + 12 * variance**0.5
        )
        return chain.divergence(x, *(chain.log_normal(x, m, variance) for m in means))

    def printed(t):
        alpha, beta, bar, before = symbols(t)
        variance = 0.25 * beta * (1 - before) / (1 - bar)
        return (np.sqrt(1 - before - variance) - np.sqrt((1 - bar) / alpha)) ** 2 / variance

    return Numbers(over(truth), over(printed), over(printed) / 2)


def variance_of_lemma() -> Numbers:
    """The variance of q_σ(x_{k−1} | x_k, x_0) with the σ of (2.14), for which it is DDPM's, by
    Bayes' rule on a grid, at k = 500; also at k = 2, 10, 100, 1000. The printed variance is that of
    q_σ(x_{k−1} | x_0), the subject of the proof.
    """

    def right(t):
        _, beta, bar, before = symbols(t)
        return beta * (1 - before) / (1 - bar)

    printed = over(lambda t: 1 - symbols(t)[3])
    return Numbers(over(chain.posterior_variance), printed, over(right))


def mean_of_x_1() -> Numbers:
    """The mean of x_1 for x_0 = 0.3, by the kernel; also for x_0 = −0.8."""
    x_0, root = np.array([0.3, -0.8]), np.sqrt(1 - chain.BETA[0])
    return Numbers(chain.forward(1)[0] * x_0, np.array([root, root]), root * x_0)


def deterministic_step() -> Numbers:
    """The mean of q_σ(x_{t+1} | x_t, x_0) for x_t = 0.5, x_0 = −0.3, by Bayes' rule on a grid from
    Lemma 2.1 with 1/100 of DDPM's σ, at t + 1 = 500; also at 2, 10, 100, 1000.
    """

    def truth(t):
        return chain.moments(*chain.ddim_forward(t, 0.5, -0.3, 0.01))[0]

    def solved(t):
        _, _, bar, before = symbols(t)
        return -0.3 * np.sqrt(bar) + np.sqrt((1 - bar) / (1 - before)) * (0.5 + 0.3 * before**0.5)

    return Numbers(over(truth), over(solved), over(solved))


# X ~ N(0.3, 0.5²) and Y given X ~ N(0.7 X − 0.2, 0.4²): an example of Liu's Appendix B in one dimension.
MEAN_X, VARIANCE_X, SLOPE, SHIFT, VARIANCE_Y_X = 0.3, 0.25, 0.7, -0.2, 0.16


def conditional(x):
    """Mean and variance of Y given X = x, from the joint density of the two on a grid of y."""
    y = np.linspace(-8, 8, 20001)
    log_joint = chain.log_normal(x, MEAN_X, VARIANCE_X)
    log_joint = log_joint + chain.log_normal(y, SLOPE * x + SHIFT, VARIANCE_Y_X)
    return chain.moments(y, chain.normalise(log_joint, y))


def joint():
    """μ_1, Σ_11, Σ_12 of Appendix B for Y = X_1 and X = X_2; μ_2 and Σ_22 are those of X."""
    variance = VARIANCE_Y_X + SLOPE**2 * VARIANCE_X
    return SLOPE * MEAN_X + SHIFT, variance, SLOPE * VARIANCE_X


def conditional_variance() -> Numbers:
    """The variance of Y given X for X ~ N(0.3, 0.5²) and Y | X ~ N(0.7 X − 0.2, 0.4²), from the
    joint density on a grid. Σ_{22|1} is the variance of X given Y, Σ_22 − Σ_21 Σ_11⁻¹ Σ_12; the
    expression printed after it is Σ_{11|2}.
    """
    _, of_y, both = joint()
    truth = conditional(0.9)[1]
    return Numbers(truth, VARIANCE_X - both**2 / of_y, of_y - both**2 / VARIANCE_X)


def conditional_mean() -> Numbers:
    """The mean of Y given X = 0.9 for X ~ N(0.3, 0.5²) and Y | X ~ N(0.7 X − 0.2, 0.4²), from the
    joint density on a grid; also given X = −1.
    """
    x = np.array([0.9, -1.0])
    mean, _, both = joint()
    printed = both / VARIANCE_X * (x - MEAN_X)
    return Numbers(np.array([conditional(value)[0] for value in x]), printed, mean + printed)


def variance_of_a_jump() -> Numbers:
    """σ² for η = 1, which should give DDPM: the variance of x_{τ_{i−1}} given x_{τ_i} and x_0 by
    Bayes' rule on a grid, for τ = 100, 200 … 1000, shown at τ_i = 500.
    """

    def truth(t):
        return chain.moments(*chain.posterior(t, 0.0, 0.0, before=t - 100))[1]

    def printed(t):
        alpha, _, bar, before = symbols(t)
        return (1 - alpha) * (1 - before) / (1 - bar)

    def right(t):
        bar, earlier = symbols(t)[2], symbols(t - 100)[2]
        return (1 - earlier) / (1 - bar) * (1 - bar / earlier)

    times = (500, *(t for t in TAU[1:] if t != 500))
    return Numbers(*(over(f, times=times) for f in (truth, printed, right)))


ERRATA = (
    Erratum(
        "§1, networks",
        "Kingma and Welling's MLPs have ReLU",
        "tanh; the 500 hidden units and the sigmoid are as in their paper",
        "Argument: Kingma & Welling 2014, appendix C. Both networks make a VAE; experiments/vae uses ReLU, as the notes do.",
    ),
    Erratum(
        "(1.3)",
        "−KL = ½ Σ (1 + log σ² − μ² + σ²)",
        "½ Σ (1 + log σ² − μ² − σ²)",
        divergence_from_the_prior,
        ours=ours.divergence_from_the_prior,
    ),
    Erratum("(2.10)", "δ_−(x) = x + 1/255", "x − 1/255", sum_of_levels, ours=ours.sum_of_levels),
    Erratum(
        "before (2.11)",
        "μ_θ(x_1, 1) = x_1 − ε_θ",
        "(x_1 − √β_1 ε_θ)/√α_1",
        first_mean,
        ours=ours.first_mean,
    ),
    Erratum(
        "(2.11)",
        "log p(x_0∣x_1) ≈ −Σ (2/255) · 1/(2σ_1²) (…)² + C",
        "−Σ 1/(2σ_1²) (…)² + C: the width 2/255 of a level multiplies the density, so its logarithm belongs to C",
        weight_of_the_decoder,
        tolerance=1e-2,
        ours=ours.weight_of_the_decoder,
        ours_tolerance=1e-3,
    ),
    Erratum(
        "above (2.15), twice",
        "KL = ((√(1−ᾱ_t−σ²) − √((1−ᾱ_{t+1})/α_{t+1}))/σ)² ‖ε_θ − ε‖²",
        "½ (…)²; (2.15) itself is correct for this γ_t",
        weight_of_ddim,
        ours=ours.weight_of_ddim,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "§2.2, the end of the proof of Lemma 2.1",
        "q_σ(x_{k−1}∣x_k, x_0) ~ N(√ᾱ_{k−1} x_0, (1−ᾱ_{k−1}) I)",
        "q_σ(x_{k−1}∣x_0) ~ …; q_σ(x_{k−1}∣x_k, x_0) has the variance σ_k²",
        variance_of_lemma,
        ours=ours.posterior_variance,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "§2.2, “The forward process in this case”",
        "q_α(x_1∣x_0) ~ N(√α_1, (1−α_1) I)",
        "q_σ(x_1∣x_0) ~ N(√α_1 x_0, (1−α_1) I)",
        mean_of_x_1,
        ours=lambda: ours.mean_of_x_1([0.3, -0.8]),
    ),
    Erratum(
        "§2.2, (2.13) read forwards for σ ≡ 0",
        "x_t = √ᾱ_t x_0 + √((1−ᾱ_t)/(1−ᾱ_{t+1})) (x_{t+1} − √ᾱ_{t+1} x_0), solved for x_{t+1}",
        "the same",
        deterministic_step,
        tolerance=1e-3,
        ours=lambda: ours.ddim_step(0.5, -0.3),
        ours_tolerance=1e-3,
        is_one=False,
    ),
    Erratum(
        "§2.2, σ_{τ_i}",
        "η √((1−α_{τ_i})(1−ᾱ_{τ_i −1})/(1−ᾱ_{τ_i}))",
        "η √((1−ᾱ_{τ_{i−1}})/(1−ᾱ_{τ_i})) √(1−ᾱ_{τ_i}/ᾱ_{τ_{i−1}}), with the neighbour on the sub-sequence",
        variance_of_a_jump,
        ours=ours.variance_of_a_jump,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "Appendix B, the last system, second line",
        "Σ_{Y∣X} = Σ_{22∣1} = Σ_11 − Σ_12 Σ_22⁻¹ Σ_21",
        "Σ_{Y∣X} = Σ_{11∣2} = …, as in its Theorem B.1",
        conditional_variance,
    ),
    Erratum(
        "Appendix B, after “only need to solve”",
        "Ax + b = Σ_12 Σ_22⁻¹ (x − μ_2) = μ_1 + …",
        "Ax + b = μ_1 + Σ_12 Σ_22⁻¹ (x − μ_2) = μ_1 + …",
        conditional_mean,
    ),
)
