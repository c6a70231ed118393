"""Images encoded by DDIM run backwards, and latents interpolated along a great circle."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddpm_jax.process import diffusion
from ddpm_jax.process.diffusion import Denoiser, Images
from ddpm_jax.process.samplers.chain import flow, scan
from ddpm_jax.process.schedules import Schedule


def encode(
    chain: Schedule, denoiser: Denoiser, x_0: Images, *, clip_x0: bool | str = True
) -> Images:
    """x_T of images in [−1, 1]: DDIM's step backwards, S network calls; Song et al. 2021 §4.3.

    ε̂ is evaluated at x_s with the time t that the step goes to; `DDIM` with η = 0 decodes. (Evaluating at the time
    that the step comes from gave twice the error for a mixture of two normal densities, at any S.) ε̂ is derived from
    the clipped x̂_0, as in decoding.

    Returns:
      x_t of the last step of the chain.
    """
    of_x, of_eps = flow(chain.alpha_prev, chain.sigma_prev, chain.alpha, chain.sigma)

    def step(k, i, x, denoised, carry):
        return diffusion.at(of_x, i, x) * x + diffusion.at(of_eps, i, x) * denoised.eps, carry

    return scan(chain, denoiser, x_0, step, clip_x0=clip_x0, rows=np.arange(len(chain)))


def slerp(x: Images, y: Images, fraction: Float[Array, " B"]) -> Images:
    """From x (fraction 0) to y (1) along the great circle between them: Song et al. 2021, App. D.5.

    Args:
      x, y: not of opposite directions.
      fraction: in 0 … 1.
    """
    dot, x_norm, y_norm = (
        jnp.sum(values, axis=(1, 2, 3)) for values in (x * y, jnp.square(x), jnp.square(y))
    )
    angle = jnp.arccos(jnp.clip(dot / jnp.sqrt(x_norm * y_norm), -1.0, 1.0))
    flat = angle < 1e-4  # the same direction: a straight line
    safe = jnp.where(flat, 1.0, jnp.sin(angle))
    of_x = jnp.where(flat, 1.0 - fraction, jnp.sin((1.0 - fraction) * angle) / safe)
    of_y = jnp.where(flat, fraction, jnp.sin(fraction * angle) / safe)
    return of_x[:, None, None, None] * x + of_y[:, None, None, None] * y
