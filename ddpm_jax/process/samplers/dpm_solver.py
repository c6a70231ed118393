"""DPM-Solver++, Lu et al. 2022: the probability-flow ODE in λ = log(α/σ)."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from ddpm_jax.options import option
from ddpm_jax.process import diffusion
from ddpm_jax.process.samplers.chain import scan


class Weights(NamedTuple):
    """Coefficients of a step: x_s = from_x x_t + from_x_before x_before + Σ_j from_x_0[:, j] x̂_0[j].

    x_before is the input of the previous network call, and x̂_0[j] the output of the j-th last.
    """

    from_x: Float64[np.ndarray, " S"]
    from_x_before: Float64[np.ndarray, " S"]
    from_x_0: Float64[np.ndarray, "S order"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolver:
    """DPM-Solver++ of order 1, 2 or 3, deterministic, with one network call per step; Lu et al. 2022.

    It is multistep by default. `singlestep` is more accurate if x̂_0 changes fast, as with strong guidance: its error for a
    mixture of two normal densities with guidance 4 and 10 log-SNR steps was 0.044, and 0.136 without.

    >>> dj.DPMSolver(order=3)
    DPMSolver(order=3, singlestep=False)
    """

    order: Literal[1, 2, 3] = option(2, "The order of dpm_solver: 1, 2 or 3.")
    singlestep: bool = option(
        False, "Lets dpm_solver take its steps in groups, not one after another."
    )

    def check(self, chain) -> None:
        """Raises ValueError for an unknown order, or one that singlestep does not have."""
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order!r}")
        if self.singlestep and self.order != 2:
            raise ValueError(f"singlestep needs order=2, got order={self.order}")

    def weights(self, chain) -> Weights:
        """The coefficients of all steps.

        With λ = log(α/σ) and h = λ_s − λ_t the exact solution of the ODE is

            x_s = (σ_s/σ_t) x_t + α_s ∫_0^h e^{−(h−u)} x̂_0(λ_t + u) du                    Lu et al. (8)

        Order 1 takes x̂_0 as constant, which is DDIM. Order 2 is Lu et al.'s Algorithm 2 (2M). Order 3 integrates the
        parabola through the last three x̂_0. (The authors' code weights the second difference by half of that integral;
        its error then falls only as S⁻², see the tests.) With `singlestep`, order 2 is their Algorithm 1 (2S), which
        takes two steps of the chain at a time and evaluates the network in the middle too.

        The order is lower in the first steps, in the last, where λ is infinite, and in a step more than twice as long as
        the previous ones that it extrapolates from. (This rule lowered the error for a mixture of two normal densities
        in 10 uniform steps from 0.36 to 0.12; with log-SNR spacing it changes nothing.)
        """
        self.check(chain)
        S, order = len(chain), self.order
        with np.errstate(divide="ignore"):
            level = -np.log(chain.ratio)  # λ
        level_prev = np.append(np.inf, level[:-1])
        from_x, from_before = chain.sigma_prev / chain.sigma, np.zeros(S)
        from_x_0 = np.zeros((S, order))
        for i in range(S):
            h, begin = level_prev[i] - level[i], i + 1
            if self.singlestep and i % 2 == 1 and begin < S and np.isfinite(level[begin]):
                h = level_prev[i] - level[begin]
                through = -np.expm1(-h) * h / (2.0 * (level[i] - level[begin]))
                share = [through, -np.expm1(-h) - through]
                from_x[i], from_before[i] = 0.0, chain.sigma_prev[i] / chain.sigma[begin]
            else:
                backs = np.zeros(0) if self.singlestep else level[i] - level[begin : i + order]
                backs = backs[np.isfinite(backs)]
                if (np.diff(backs, prepend=0.0) <= 0).any():  # steps of equal σ/α
                    backs = backs[:0]
                while len(backs) and h > 2.0 * backs[-1] / len(backs):
                    backs = backs[:-1]
                share = _multistep(h, backs, order)
            from_x_0[i, : len(share)] = chain.alpha_prev[i] * np.asarray(share)
        return Weights(from_x, from_before, from_x_0)

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        weights, at = self.weights(chain), diffusion.at

        def step(k, t, x_t, denoised, carry):
            before, *past = carry
            past = (denoised.x_0, *past)
            x = at(weights.from_x, t, x_t) * x_t
            if self.singlestep:
                x += at(weights.from_x_before, t, x_t) * before
            x += sum(at(weights.from_x_0[:, j], t, x_t) * x_0 for j, x_0 in enumerate(past))
            return x, (x_t, *past[:-1])

        carry = (jnp.zeros_like(x_T),) * self.order
        return scan(chain, denoiser, x_T, step, carry=carry, **loop)


def _multistep(h: float, backs: np.ndarray, order: int) -> list[float]:
    """The weights of x̂_0 at u = 0 and u = −backs in ∫_0^h e^{−(h−u)} x̂_0(u) du."""
    moment_0 = -np.expm1(-h)
    if len(backs) == 0:
        return [moment_0]
    if order == 2:  # Algorithm 2 evaluates the line at the middle of the step, not in the integral
        ahead = moment_0 * h / (2.0 * backs[0])
        return [moment_0 + ahead, -ahead]
    moment_1 = h - moment_0  # ∫ e^{−(h−u)} u du
    moment_2 = h**2 - 2.0 * moment_1  # ∫ e^{−(h−u)} u² du
    nodes, factors = np.append(0.0, -backs), []
    for j, node in enumerate(nodes):  # the polynomial that is 1 at this node and 0 at the others
        others = np.delete(nodes, j)
        powers = np.poly(others)[::-1] / np.prod(node - others)  # its coefficients of 1, u, u²
        factors.append(float(powers @ (moment_0, moment_1, moment_2)[: len(powers)]))
    return factors
