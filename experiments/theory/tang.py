"""Tang (2024), A Collection of Frequently Asked Questions about Denoising Diffusion Probabilistic
Models.
"""

import numpy as np

from ddpm_jax.experiments.theory import chain, ours, sedykh
from ddpm_jax.experiments.theory.erratum import Erratum, Numbers

MEAN_1, MEAN_2 = np.array([0.3, -0.2, 0.5]), np.array([-0.1, 0.4, 0.2])
SIGMA_1, SIGMA_2 = 0.7, 1.3
VARIANCES = (SIGMA_1**2, SIGMA_2**2), (SIGMA_1, SIGMA_2)


def corollary() -> Numbers:
    """KL of two Gaussians in ℝ³ with σ_1 = 0.7, σ_2 = 1.3, integrated dimension by dimension on a
    grid, with Σ_i = σ_i² I; also with Σ_i = σ_i I, as the corollary says.
    """
    n, distance = 3, np.sum((MEAN_2 - MEAN_1) ** 2)
    x = np.linspace(-20, 20, 40001)

    def truth(variance_1, variance_2):
        return sum(
            chain.divergence(
                x, chain.log_normal(x, m_1, variance_1), chain.log_normal(x, m_2, variance_2)
            )
            for m_1, m_2 in zip(MEAN_1, MEAN_2, strict=True)
        )

    def right(variance_1, variance_2):
        r = variance_1 / variance_2
        return 0.5 * (distance / variance_2 + n * r - n * np.log(r) - n)

    printed = 0.5 * (
        distance / SIGMA_2**2 + n * SIGMA_1**2 / SIGMA_2**2 - np.log(SIGMA_1 / SIGMA_2) - n
    )
    truth, right = (np.array([f(*pair) for pair in VARIANCES]) for f in (truth, right))
    return Numbers(truth, np.array([printed, printed]), right)


def convexity() -> Numbers:
    """Jensen's inequality for ln: the sign of E[ln X] − ln E[X] for X uniform on {1, 3}. It is
    + for a convex function.
    """
    X = np.array([1.0, 3.0])
    return Numbers(np.sign(np.mean(np.log(X)) - np.log(np.mean(X))), 1.0, -1.0)


ERRATA = (
    Erratum(
        "Corollary 2.1",
        "Σ_i = σ_i I; ½[‖Δμ‖²/σ_2² + nσ_1²/σ_2² − ln(σ_1/σ_2) − n]",
        "Σ_i = σ_i² I; ½[‖Δμ‖²/σ_2² + nσ_1²/σ_2² − n ln(σ_1²/σ_2²) − n]",
        corollary,
        ours=lambda: ours.isotropic_divergence(MEAN_1, MEAN_2, VARIANCES),
    ),
    Erratum("§2.1", "ln is a convex function", "concave; (26) is correct", convexity),
    Erratum(
        "(60)",
        "L_{t−1} = E[β_t²/(2σ_t² α_t (1−ᾱ_t)) ‖ε − ε_θ‖²]",
        "… + const., as in (54) and (57): ½(β̃_t/σ_t² − 1 − ln(β̃_t/σ_t²)) for each dimension",
        sedykh.two_variances,
        ours=lambda: ours.divergence_of_eps(sedykh.EARLY, "fixed_large"),
    ),
)
