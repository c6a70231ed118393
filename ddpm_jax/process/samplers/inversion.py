"""DDIM inversion, from images to their latents, and interpolation between latents."""

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
    """DDIM inversion: the x_T from which `DDIM` with η = 0 samples x_0, approximately; Song et al. 2021 §4.3.

    A step from x_s to x_t uses ε̂(x_s, t), the network at the time where the step ends. (With ε̂(x_s, s) the error for a
    mixture of two normal densities was twice as large, at any S.) It takes S network calls.

    Args:
      x_0: [B, H, W, C] in [−1, 1].
      clip_x0: whether ε̂ is computed from a clipped x̂_0, as in `DDIM`; see `chain.clip`.

    Returns:
      x_t at the last step of the chain.
    """
    from_x, from_eps = flow(chain.alpha_prev, chain.sigma_prev, chain.alpha, chain.sigma)

    def step(k, t, x, denoised, carry):
        return diffusion.at(from_x, t, x) * x + diffusion.at(from_eps, t, x) * denoised.eps, carry

    return scan(chain, denoiser, x_0, step, clip_x0=clip_x0, rows=np.arange(len(chain)))


def slerp(x: Images, y: Images, fraction: Float[Array, " B"]) -> Images:
    """Spherical interpolation from x (fraction 0) to y (fraction 1); Song et al. 2021, App. D.5.

    Args:
      x, y: [B, H, W, C]; no image may be a negative multiple of the other.
      fraction: in 0 … 1.
    """
    dot, x_norm, y_norm = (
        jnp.sum(values, axis=(1, 2, 3)) for values in (x * y, jnp.square(x), jnp.square(y))
    )
    angle = jnp.arccos(jnp.clip(dot / jnp.sqrt(x_norm * y_norm), -1.0, 1.0))
    flat = angle < 1e-4  # nearly the same direction: linear interpolation
    safe = jnp.where(flat, 1.0, jnp.sin(angle))
    from_x = jnp.where(flat, 1.0 - fraction, jnp.sin((1.0 - fraction) * angle) / safe)
    from_y = jnp.where(flat, fraction, jnp.sin(fraction * angle) / safe)
    return from_x[:, None, None, None] * x + from_y[:, None, None, None] * y
