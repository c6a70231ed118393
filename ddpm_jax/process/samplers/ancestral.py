"""Ancestral sampling, Ho et al. 2020, Algorithm 2."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ddpm_jax.options import option
from ddpm_jax.process import diffusion
from ddpm_jax.process.samplers.chain import scan


def ancestral_step(chain, row, x_t, denoised, z):
    """x_s ~ p(x_s | x_t) from the noise z ~ N(0, I); none at the last step."""
    mean = diffusion.posterior_mean(chain, denoised.x_0, x_t, row)
    return mean + jnp.where(row > 0, jnp.exp(0.5 * denoised.log_variance), 0.0) * z


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral:
    """x_s ~ N(μ̃_t(x_t, x̂_0), σ² I), no noise at the last step; Ho et al. 2020, Algorithm 2.

    x̂_0 is clipped before the posterior mean, as Ho et al.'s code does and the paper does not say.

    >>> Ancestral(variance="fixed_small")
    Ancestral(variance='fixed_small')
    """

    variance: str | None = option(
        None,
        "The variance of the reverse chain: fixed_small, fixed_large, analytic, or what was learned. Default:"
        " as in the config.",
    )

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        def step(k, i, x_t, denoised, carry):
            z = diffusion.step_noise(chain, keys, i, x_t.shape[1:])
            return ancestral_step(chain, i, x_t, denoised, z), carry

        return scan(chain, denoiser, x_T, step, **loop)
