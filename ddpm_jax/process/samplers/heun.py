"""Heun's method for the probability-flow ODE, Karras et al. 2022."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from ddpm_jax.process import diffusion
from ddpm_jax.process.samplers.chain import flow, scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun:
    """Heun's method on dx̄/ds = ε̂, with x̄ = x/α and s = σ/α: 2S − 1 network calls, order 2.

    The ODE is Song et al. 2021 (14) and the method Karras et al. 2022, Algorithm 1 without churn: a DDIM step, then the
    same step with the mean of ε̂ at both ends. The last step is DDIM's, because the network is not trained at its end.
    So is a step from α = 0, or from s > 10 to less than s/10, where the slope at the end would get too much weight.
    (With the cosine schedule, 10 steps and normal data of standard deviation 0.5, the standard deviation of the samples
    is 7.4 without this rule and 0.48 with it.)

    >>> Heun()  # 19 network calls for steps=10
    Heun()
    """

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        S, at = len(chain), diffusion.at
        ratio_prev = chain.sigma_prev / chain.alpha_prev
        too_far = jnp.asarray((chain.ratio > 10.0) & (chain.ratio > 10.0 * ratio_prev))
        of_x, of_eps = flow(chain.alpha, chain.sigma, chain.alpha_prev, chain.sigma_prev)
        # The network is evaluated at the last step, then twice at each below: where Euler's step ends, and where the
        # corrected one does.
        rows = np.append(S - 1, np.repeat(np.arange(S - 1)[::-1], 2))

        def step(k, i, x, denoised, carry):
            start, slope = carry  # of the step that is being corrected
            euler = at(chain.alpha_prev, i, x) * denoised.x_0
            euler += at(chain.sigma_prev, i, x) * denoised.eps
            above = jnp.minimum(i + 1, S - 1)
            mean_slope = 0.5 * (slope + denoised.eps)
            corrected = at(of_x, above, x) * start + at(of_eps, above, x) * mean_slope
            corrected = jnp.where(too_far[above], x, corrected)
            return jnp.where(k % 2 == 1, corrected, euler), (x, denoised.eps)

        carry = (x_T, jnp.zeros_like(x_T))
        return scan(chain, denoiser, x_T, step, rows=rows, carry=carry, **loop)
