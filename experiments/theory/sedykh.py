"""Sedykh (2024), Diffusion Models in Depth: From a Theoretical and a Practical Perspective."""

import numpy as np
from scipy import special

from ddpm_jax.experiments.theory import chain, ours
from ddpm_jax.experiments.theory.chain import BETA, over, symbols
from ddpm_jax.experiments.theory.erratum import Erratum, Numbers

EARLY = (2, 10, 100, 500, 1000)  # β̃_t and β_t differ most at the first
CORRELATED = (100, 10, 500, 1000)  # at the first, x_t still contains much of the data


def density() -> Numbers:
    """The density of x_1 at its mean, as the slope of the normal distribution function there. The
    printed value is the largest number in [0, 1].
    """
    std, h = np.sqrt(BETA[0]), 1e-6
    slope = (special.ndtr(h / std) - special.ndtr(-h / std)) / (2 * h)
    return Numbers(slope, 1.0, 1 / np.sqrt(2 * np.pi * BETA[0]))


def first_factor() -> Numbers:
    """The variance 1 − ᾱ_t of x_t given x_0, kernel by kernel, at t = 1; also at t = 2, 10, 100.
    There is no β_0; in the printed formula it is 8e-5, which continues the linear schedule.
    """
    times = (1, 2, 10, 100)
    beta_0 = BETA[0] - (BETA[1] - BETA[0])

    def printed(t):
        return 1 - (1 - beta_0) * symbols(t)[2]

    right = over(lambda t: 1 - symbols(t)[2], times=times)
    return Numbers(over(chain.variance, times=times), over(printed, times=times), right)


def correlation() -> Numbers:
    """The correlation of two pixels of x_t that are equal in the data, both 1 or both −1 with
    probability ½, from their covariance matrix C, which each step maps to α_t C + β_t I, at t = 100;
    also at t = 10, 500, 1000. Given x_{t−1} or x_0, the correlation is 0.
    """

    def truth(t):
        covariance = np.ones((2, 2))
        for beta in BETA[:t]:
            covariance = (1 - beta) * covariance + beta * np.eye(2)
        return covariance[0, 1] / covariance[0, 0]

    return Numbers(
        over(truth, times=CORRELATED),
        np.zeros(len(CORRELATED)),
        over(lambda t: symbols(t)[2], times=CORRELATED),
    )


def first_term() -> Numbers:
    """The increase of −log p(x_0 | x_1) of one pixel if ε_θ is off by 1, for x_0 = 0 (nearest level)
    and σ_1² = β_1, from exact normal integrals over the level. The correct value is β_1²/(2σ_1² α_1
    (1−ᾱ_1)), the weight that L_simple leaves out at t = 1 as at all other t.
    """
    alpha, beta, bar, _ = symbols(1)
    x_0, std = 128 / 127.5 - 1, np.sqrt(beta)
    off = beta / np.sqrt(1 - bar) / np.sqrt(alpha)

    def log_p(mean):
        edges = (x_0 + np.array([-1, 1]) / 255 - mean) / std
        return np.log(special.ndtr(edges[1]) - special.ndtr(edges[0]))

    return Numbers(log_p(x_0) - log_p(x_0 + off), 0.0, beta**2 / (2 * beta * alpha * (1 - bar)))


def sinusoids() -> Numbers:
    """The embedding of t = 500 in 8 numbers, as get_timestep_embedding of Ho et al.'s code
    (diffusion_tf/nn.py) computes it; the second number is shown. A network that was trained with one
    order accepts another order, but its results are wrong. ddpm_jax uses Ho et al.'s order; weights of
    other programs need theirs (Improved DDPM: cosines first, divisor half).
    """
    t, half = 500.0, 4
    ho = np.array([t * np.exp(-np.log(10000) * k / (half - 1)) for k in range(half)])
    truth = [np.sin(angle) for angle in ho] + [np.cos(angle) for angle in ho]
    transformer = t / 10000.0 ** (2 * np.arange(half) / (2 * half))
    printed = np.stack([np.sin(transformer), np.cos(transformer)], axis=1).ravel()
    angles = t * 10000.0 ** (-np.arange(half) / (half - 1))
    right = np.concatenate([np.sin(angles), np.cos(angles)])
    return Numbers(*(np.roll(v, -1) for v in (np.array(truth), printed, right)))


def ratio(t):
    _, _, bar, before = symbols(t)
    return (1 - before) / (1 - bar)


def variance_without_beta() -> Numbers:
    """The variance of q(x_{t−1} | x_t, x_0), by Bayes' rule on a grid, at t = 500; also at t = 2,
    10, 100, 1000.
    """
    right = over(lambda t: ratio(t) * symbols(t)[1])
    return Numbers(over(chain.posterior_variance), over(ratio), right)


def normalising_factor() -> Numbers:
    """The largest value of q(x_{t−1} | x_t, x_0), normalised on a grid, at t = 500; also at t = 2,
    10, 100, 1000.
    """

    def truth(t):
        _, log_density = chain.posterior(t, 0.0, 0.0)
        return np.exp(log_density.max())

    def printed(t):
        alpha, _, bar, before = symbols(t)
        return 1 / np.sqrt(2 * np.pi * (1 - bar) * (1 - before) * np.sqrt(alpha))

    right = over(lambda t: 1 / np.sqrt(2 * np.pi * ratio(t) * symbols(t)[1]))
    return Numbers(over(truth), over(printed), right)


def exponent(t, x_t, x_0):
    """C(x_t, x_0) from densities: −2 times the exponent of Bayes' rule at x_{t−1} = 0."""

    def log_ratio(x_t, x_0):
        (step, beta), (factor, variance) = chain.forward(t, t - 1), chain.forward(t - 1)
        whole, whole_variance = chain.forward(t)
        return (
            chain.log_normal(x_t, step * 0.0, beta)
            + chain.log_normal(0.0, factor * x_0, variance)
            - chain.log_normal(x_t, whole * x_0, whole_variance)
        )

    return -2 * (log_ratio(x_t, x_0) - log_ratio(0.0, 0.0))


def constant() -> Numbers:
    """C(x_t, x_0) for x_t = 1, x_0 = ½, from the three densities of Bayes' rule, at t = 500; also
    at t = 2, 10, 100, 1000.
    """

    def formula(t, root):
        alpha, beta, bar, before = symbols(t)
        x_t, x_0 = 1.0, 0.5
        root = np.sqrt({"alpha": alpha, "bar": bar}[root])
        return x_t**2 / beta + before * x_0**2 / (1 - before) - (x_t - root * x_0) ** 2 / (1 - bar)

    return Numbers(over(exponent, 1.0, 0.5), over(formula, "alpha"), over(formula, "bar"))


def sign() -> Numbers:
    """The sign of x_t x_0 in C(x_t, x_0), from the three densities of Bayes' rule, at t = 500;
    also at t = 2, 10, 100, 1000.
    """

    def truth(t):
        return np.sign(exponent(t, 1.0, 1.0) - exponent(t, 1.0, 0.0) - exponent(t, 0.0, 1.0))

    def printed(t):
        alpha, _, bar, before = symbols(t)
        return np.sign(2 * np.sqrt(alpha) * (1 - alpha) * (1 - before) / (1 - bar) ** 2)

    right = over(lambda t: np.sign(2 * np.sqrt(symbols(t)[2]) / (1 - symbols(t)[2])))
    return Numbers(over(truth), over(printed), right)


def variance() -> Numbers:
    """The variance of q(x_{t−1} | x_t, x_0), by Bayes' rule on a grid, at t = 2; also at t = 10,
    100, 500, 1000. The printed fraction equals β_t.
    """

    def printed(t):
        alpha, _, _, before = symbols(t)
        return (1 - alpha) * (1 - before) / (1 - before)

    right = over(lambda t: ratio(t) * symbols(t)[1], times=EARLY)
    return Numbers(over(chain.posterior_variance, times=EARLY), over(printed, times=EARLY), right)


def factor_of_x_0() -> Numbers:
    """The factor of x_0 in the mean of q(x_{t−1} | x_t, x_0), by Bayes' rule on a grid, at t =
    500; also at t = 2, 10, 100, 1000.
    """

    def truth(t):
        factor, spread = chain.forward(t)
        x_0 = np.sqrt(spread) / factor
        return chain.moments(*chain.posterior(t, 0.0, x_0))[0] / x_0

    def formula(t, which):
        alpha, _, bar, before = symbols(t)
        return np.sqrt(before) * {"bar": 1 - bar, "alpha": 1 - alpha}[which] / (1 - bar)

    return Numbers(over(truth), over(formula, "bar"), over(formula, "alpha"))


def factor_of_eps() -> Numbers:
    """The factor of −ε in the mean of x_{t−1}, by Bayes' rule on a grid, at t = 500; also at t =
    2, 10, 100, 1000.
    """

    def formula(t, root):
        alpha, _, bar, _ = symbols(t)
        return (1 - alpha) / np.sqrt(1 - bar) / np.sqrt({"bar": bar, "alpha": alpha}[root])

    truth = -over(chain.mean_of_eps, 0.0, 1.0)
    return Numbers(truth, over(formula, "bar"), over(formula, "alpha"))


def two_variances() -> Numbers:
    """L_{t−1} of one dimension for ‖ε_θ − ε‖ = 1 and σ_t² = β_t, integrated on a grid, at t = 2;
    also at t = 10, 100, 500, 1000.
    """

    def printed(t):
        alpha, beta, bar, _ = symbols(t)
        return beta**2 / (2 * beta * alpha * (1 - bar))

    right = over(lambda t: printed(t) + 0.5 * (ratio(t) - 1 - np.log(ratio(t))), times=EARLY)
    truth = over(lambda t: chain.divergence_of_eps(t, symbols(t)[1]), times=EARLY)
    return Numbers(truth, over(printed, times=EARLY), right)


def last_step() -> Numbers:
    """The standard deviation of generated x_0 if all data are one point, with the exact ε and
    σ_t² = β_t, from the moments of every step of Algorithm 2. That of the data is 0.
    """

    def generated(noise_while):
        data, mean, spread = 0.3, 0.0, 1.0
        for t in range(1000, 0, -1):
            alpha, beta, bar, _ = symbols(t)
            # ε(x) = (x − √ᾱ m)/√(1−ᾱ) makes one step of Algorithm 2 the map slope · x + shift.
            of_eps = (1 - alpha) / np.sqrt(1 - bar)
            slope = (1 - of_eps / np.sqrt(1 - bar)) / np.sqrt(alpha)
            shift = of_eps * np.sqrt(bar / (1 - bar)) * data / np.sqrt(alpha)
            mean, spread = slope * mean + shift, slope**2 * spread + beta * noise_while(t)
        return np.sqrt(spread)

    return Numbers(0.0, generated(lambda t: t > 0), generated(lambda t: t > 1))


def pixels_lost() -> Numbers:
    """The width of x_t minus the width of the network's output; it must be 0, since ε_θ has the shape
    of x_t. The printed network is Ronneberger et al.'s, 572 to 388.
    """

    def lost(width, per_convolution):
        out = width
        for _ in range(4):  # two 3×3 convolutions, then half the size
            out = (out - 2 * per_convolution) // 2
        out -= 2 * per_convolution
        for _ in range(4):  # twice the size, then two 3×3 convolutions
            out = 2 * out - 2 * per_convolution
        return float(width - out)

    return Numbers(0.0, lost(572, 2), lost(32, 0))


ERRATA = (
    Erratum("(1)", "q : ℝᴰ → [0, 1]", "[0, ∞): q is a density", density, tolerance=1e-6),
    Erratum(
        "§2.1, after (1)",
        "the pixels of x_t are mutually independent, since β_t I is diagonal",
        "they are independent given x_{t−1} or x_0; the covariance of x_t contains ᾱ_t times that of the data",
        correlation,
        ours=lambda: ours.correlation(CORRELATED),
    ),
    Erratum(
        "(9), after (47)",
        "ᾱ_t = ∏_{i=0…t} α_i",
        "from i = 1; ᾱ_0 = 1",
        first_factor,
        ours=lambda: ours.forward_variance((1, 2, 10, 100)),
        ours_tolerance=1e-9,
    ),
    Erratum(
        "§2.2",
        "σ_t² = β_t = (1−ᾱ_{t−1})/(1−ᾱ_t)",
        "β̃_t = (1−ᾱ_{t−1})/(1−ᾱ_t) · β_t",
        variance_without_beta,
        ours=ours.posterior_variance,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "(43)",
        "1/√(2π (1−ᾱ_t)(1−ᾱ_{t−1}) √(1−β_t))",
        "1/√(2π β_t (1−ᾱ_{t−1})/(1−ᾱ_t))",
        normalising_factor,
    ),
    Erratum(
        "(45), (47), (54), (55), (57)",
        "(x_t − √α_t x_0)² / (1−ᾱ_t)",
        "(x_t − √ᾱ_t x_0)² / (1−ᾱ_t)",
        constant,
    ),
    Erratum(
        "(58)–(60), the sign of the cross term",
        "+ 2 x_t x_0 √α_t (…)",
        "+, with √ᾱ_t, see the row above",
        sign,
        is_one=False,
    ),
    Erratum(
        "(51)–(53), (56), (57), (63)–(66)",
        "variance (1−α_t)(1−ᾱ_{t−1})/(1−ᾱ_{t−1})",
        "(1−α_t)(1−ᾱ_{t−1})/(1−ᾱ_t); (49) and (50) are correct",
        variance,
        ours=lambda: ours.posterior_variance(EARLY),
        ours_tolerance=1e-9,
    ),
    Erratum(
        "(60)–(64)",
        "x_0 √ᾱ_{t−1} (1−ᾱ_t)/(1−ᾱ_t)",
        "x_0 √ᾱ_{t−1} (1−α_t)/(1−ᾱ_t), as in (53), (65) and (66)",
        factor_of_x_0,
        ours=ours.factor_of_x_0,
        ours_tolerance=1e-9,
    ),
    Erratum(
        "(72)–(76)",
        "(1−α_t)/(√(1−ᾱ_t) √ᾱ_t) ε",
        "(1−α_t)/(√(1−ᾱ_t) √α_t) ε, as in (77) and (78)",
        factor_of_eps,
        ours=ours.factor_of_eps,
    ),
    Erratum(
        "(81)–(91)",
        "L_{t−1} = β_t²/(2σ_t² α_t (1−ᾱ_t)) ‖ε − ε_θ‖², both variances σ_t²",
        "the variance of q is β̃_t, which adds ½(β̃_t/σ_t² − 1 − ln(β̃_t/σ_t²)) for each dimension; it is 0 only if σ_t² = β̃_t",
        two_variances,
        ours=lambda: ours.divergence_of_eps(EARLY, "fixed_large"),
    ),
    Erratum(
        "§2.2.2, before (96)",
        "the authors also ignored the entire term L_0",
        "L_0 is the term t = 1 of L_simple; Ho et al. §3.4 approximate its integral by density · width",
        first_term,
        tolerance=0.06,
        ours=ours.first_term,
        ours_tolerance=1e-3,
    ),
    Erratum(
        "Algorithm 2, line 3",
        "z ~ N(0, I) if t > 0 (with t = T … 1)",
        "if t > 1, else z = 0",
        last_step,
        ours=ours.last_step,
    ),
    Erratum(
        "§2.2.3, size",
        "unpadded convolutions and max pooling, as in the original U-Net; not among the changes by Ho et al.",
        "padded convolutions; down by a convolution of stride 2, up by nearest neighbour and convolution",
        pixels_lost,
        ours=ours.pixels_lost,
    ),
    Erratum(
        "§2.2.3, block",
        "convolution, ReLU, convolution, group norm, ReLU",
        "group norm, swish, convolution, twice, with the embedding of t added between",
        "Argument: the code that Ho et al. published with the paper (diffusion_tf/models/unet.py, "
        "resnet_block). A block that ends in a ReLU can only increase its input.",
    ),
    Erratum(
        "§2.2.3, “residual”",
        "the encoder's result is concatenated with the decoder's",
        "the block returns x + h(x); the concatenation is the U-Net's skip connection, which is different",
        "Argument: He et al. 2016 (1), and the last line of resnet_block in Ho et al.'s code.",
    ),
    Erratum(
        "(97), (98)",
        "sine at 2i, cosine at 2i + 1, of pos/10000^(2i/d): as in the Transformer, and so in Ho et al.",
        "all sines, then all cosines, of t/10000^(i/(d/2 − 1)): as in Ho et al.'s code",
        sinusoids,
        ours=lambda: np.roll(ours.time_embedding(500, 8), -1),
    ),
)
