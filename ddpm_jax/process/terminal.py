"""The end of a chain: how close x_T is to the prior, from which sampling begins."""

from __future__ import annotations

import dataclasses

import numpy as np

from ddpm_jax.process.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Health:
    """How close the end of a chain is to the prior N(0, prior_std² I).

    Attributes:
      alpha_T: the last α.
      prior_bits_per_dim: L_T = KL(q(x_T | x_0) ‖ prior) in bits per dimension.
      sum_beta: Σβ_t of a variance-preserving chain; otherwise None.
      alpha_bar_bound: e^−Σβ ≥ ∏(1 − β_t) = ᾱ_T of a variance-preserving chain; otherwise None.
      warning: one line if L_T exceeds 0.001 bits/dim, a hundred times that of Ho et al.; otherwise empty.
    """

    alpha_T: float
    prior_bits_per_dim: float
    sum_beta: float | None
    alpha_bar_bound: float | None
    warning: str


def health(schedule: Schedule, *, second_moment: float = 1.0) -> Health:
    """Measures how close the end of a chain is to the prior, from which sampling begins.

    For a variance-preserving chain with T → ∞, x_T tends to N(0, I) from any x_0 if and only if Σβ_t diverges (Tang,
    Propositions 1.1 and 1.2). For finite T, −ln(1 − β) ≥ β gives ᾱ_T ≤ e^−Σβ.

    Args:
      second_moment: E[x_0²] of the data scaled to [−1, 1]; the default is an upper bound.
    """
    alpha, scale, sum_beta, bound = float(schedule.alpha[-1]), schedule.prior_std**2, None, None
    advice = "use a path that ends with more noise or with alpha closer to 0"
    if schedule.is_variance_preserving:
        nats = 0.5 * (alpha**2 * (second_moment - 1.0) - np.log1p(-(alpha**2)))
        sum_beta = float(np.sum(schedule.step_variance))
        bound, advice = float(np.exp(-sum_beta)), "use more steps or larger betas"
    else:
        share = schedule.sigma[-1] ** 2 / scale
        nats = 0.5 * (alpha**2 * second_moment / scale + share - 1.0 - np.log(share))
    bits, warning = float(nats / np.log(2.0)), ""
    if bits > 1e-3:
        warning = (
            f"the chain does not reach its prior: alpha_T = {alpha:.3g} leaves a prior term of {bits:.3g}"
            f" bits/dim; {advice}"
        )
    return Health(alpha, bits, sum_beta, bound, warning)


def describe(schedule: Schedule, *, second_moment: float = 1.0) -> str:
    """One line on a chain and its end, and a second one with the warning of `health` if it has one."""
    end = health(schedule, second_moment=second_moment)
    line = f"schedule: {len(schedule)} steps, "
    if schedule.is_variance_preserving:
        line += f"sum of beta {end.sum_beta:.4g}, alpha_bar_T = {end.alpha_T**2:.3g}"
        line += f" (at most {end.alpha_bar_bound:.3g}), "
    else:
        line += f"alpha {schedule.alpha[0]:.4g} to {end.alpha_T:.4g}, "
        line += f"sigma {schedule.sigma[0]:.4g} to {schedule.sigma[-1]:.4g}, "
    line += f"prior term {end.prior_bits_per_dim:.3g} bits/dim"
    return f"{line}\nWARNING: {end.warning}" if end.warning else line
