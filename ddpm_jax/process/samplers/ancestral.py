"""Ancestral sampling, Ho et al. 2020, Algorithm 2."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from ddpm_jax.options import option
from ddpm_jax.process import diffusion
from ddpm_jax.process.diffusion import Denoised, Images, Step
from ddpm_jax.process.samplers.chain import scan
from ddpm_jax.process.schedules import Schedule


def ancestral_step(chain: Schedule, t: Step, x_t: Images, denoised: Denoised, z: Images) -> Images:
    """x_s ~ p(x_s | x_t) for z ~ N(0, I), [B, H, W, C]; the mean at step 0."""
    assert denoised.log_variance is not None
    mean = diffusion.posterior_mean(chain, denoised.x_0, x_t, t)
    return mean + jnp.where(t > 0, jnp.exp(0.5 * denoised.log_variance), 0.0) * z


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral:
    """Ancestral sampling: x_s ~ N(μ̃_t(x_t, x̂_0), σ² I), without noise at step 0; Ho et al. 2020, Algorithm 2.

    x̂_0 is clipped before the posterior mean is computed, as in Ho et al.'s code.

    >>> dj.Ancestral(variance="fixed_small").variance
    'fixed_small'
    """

    variance: str | None = option(
        None,
        "The variance of the reverse chain: fixed_small, fixed_large, analytic, or what was learned. Default:"
        " as in the config.",
    )

    last_noise: bool = option(
        False,
        "Whether ancestral sampling adds noise of variance β in its last step too, if that is not at time 0; in"
        " diffusers with fixed_large it does.",
        quiet=True,
    )

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        last = self.last_noise and chain.times[0] > 0

        def step(k, t, x_t, denoised, carry):
            z = diffusion.step_noise(chain, keys, t, x_t.shape[1:])
            x = ancestral_step(chain, t, x_t, denoised, z)
            if last:
                x += jnp.where(t == 0, np.sqrt(chain.step_variance[0]).astype(np.float32), 0.0) * z
            return x, carry

        return scan(chain, denoiser, x_T, step, **loop)
