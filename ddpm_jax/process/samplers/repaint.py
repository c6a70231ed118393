"""Inpainting by RePaint, Lugmayr et al. 2022."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.process import diffusion
from ddpm_jax.process.diffusion import Denoiser, Images
from ddpm_jax.process.samplers.ancestral import ancestral_step
from ddpm_jax.process.samplers.chain import scan
from ddpm_jax.process.schedules import Schedule


def resampling(num_steps: int, *, resample: int, jump: int) -> Int[np.ndarray, " K"]:
    """The steps at which RePaint evaluates the network, in order; Lugmayr et al. 2022, App. B.

    They go down from S − 1. When 1, 1 + jump, 1 + 2 jump, … steps remain, they go back up by `jump` steps and down again,
    `resample` − 1 times.

    Raises:
      ValueError: resample or jump is below 1, or the chain has no more than `jump` steps.
    """
    if min(resample, jump) < 1:
        raise ValueError(f"resample and jump must be at least 1, got {resample} and {jump}")
    if resample > 1 and num_steps <= jump:
        raise ValueError(
            f"a chain of {num_steps} steps cannot go back by jump={jump}; lower it, or set resample=1"
        )
    rows, remaining = [], num_steps
    jumps = {position: resample - 1 for position in range(1, num_steps - jump + 1, jump)}
    while remaining > 0:
        remaining -= 1
        rows.append(remaining)
        if jumps.get(remaining, 0) > 0:
            jumps[remaining] -= 1
            remaining += jump
    return np.array(rows)


def inpaint(
    chain: Schedule,
    denoiser: Denoiser,
    x_0: Images,
    mask: Float[Array, "B H W 1"],
    keys: Key[Array, " B"],
    *,
    resample: int = 10,
    jump: int = 10,
    clip_x0: bool | str = True,
) -> Images:
    """Inpaints the unknown pixels of images: RePaint, Lugmayr et al. 2022, Algorithm 1.

    After each ancestral step the known pixels are replaced by a draw from q(x_s | x_0). To harmonise the others with them,
    the chain goes back up by `jump` steps and repeats them, see `resampling`.

    Args:
      denoiser: one that computes a log_variance.
      x_0: [B, H, W, C] in [−1, 1]; only known pixels are used, and the result has them exactly.
      mask: 1 where a pixel is known, 0 where it is to be inpainted.
      resample: how many times each part of the chain is run, at least 1.
      jump: steps to go back, at least 1.
      clip_x0: see `chain.clip`.
    """
    at, shape = diffusion.at, x_0.shape[1:]
    rows = resampling(len(chain), resample=resample, jump=jump)
    following = np.append(rows[1:], -1)  # the step of the next network call
    back = following >= rows  # noise is added, from the level below this step to that of the next
    share = np.where(back, chain.alpha[following] / chain.alpha_prev[rows], 1.0)
    added = chain.sigma[following] ** 2 - share**2 * chain.sigma_prev[rows] ** 2
    std = diffusion.sqrt(np.where(back, added, 0.0))

    def step(k, t, x_t, denoised, carry):
        z, known_z, up_z = (diffusion.noise(keys, 3 * k + n, shape) for n in range(3))
        unknown = ancestral_step(chain, t, x_t, denoised, z)
        known = at(chain.alpha_prev, t, x_0) * x_0 + at(chain.sigma_prev, t, x_0) * known_z
        x = mask * known + (1.0 - mask) * unknown
        return at(share, k, x) * x + at(std, k, x) * up_z, carry

    x_T = diffusion.prior(chain, keys, shape)
    return scan(chain, denoiser, x_T, step, clip_x0=clip_x0, rows=rows)
