"""RePaint, Lugmayr et al. 2022: fills in the missing part of images."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.process import diffusion
from ddpm_jax.process.diffusion import Denoiser, Images
from ddpm_jax.process.samplers.ancestral import ancestral_step
from ddpm_jax.process.samplers.chain import scan
from ddpm_jax.process.schedules import Schedule


def resampling(num_steps: int, *, resample: int, jump: int) -> Int[np.ndarray, " K"]:
    """The rows at which RePaint evaluates the network, in order; Lugmayr et al. 2022, App. B.

    The chain goes down from S − 1. Each time 1, 1 + jump, 1 + 2 jump, … steps are left, it goes back up by `jump` steps
    and down again, until it has walked them `resample` times.

    Raises:
      ValueError: resample or jump below 1, or a chain too short to go back at all.
    """
    if min(resample, jump) < 1:
        raise ValueError(f"resample and jump must be at least 1, got {resample} and {jump}")
    if resample > 1 and num_steps <= jump:
        raise ValueError(
            f"a chain of {num_steps} steps cannot go back by jump={jump}; lower it, or take resample=1"
        )
    rows, level = [], num_steps  # the level is how many steps are still to be done
    walks = {at: resample - 1 for at in range(1, num_steps - jump + 1, jump)}
    while level > 0:
        level -= 1
        rows.append(level)
        if walks.get(level, 0) > 0:
            walks[level] -= 1
            level += jump
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
    """Fills in what is missing of images: RePaint, Lugmayr et al. 2022, Algorithm 1.

    After each ancestral step the known pixels are drawn from q(x_s | x_0); to let the rest agree with them, the chain
    goes back up `jump` steps and down again, `resample` times in all.

    Args:
      denoiser: with a variance of p(x_s | x_t).
      x_0: in [−1, 1]; kept exactly where the mask is 1.
      mask: 1 where the image is known and 0 where it is filled in.
      resample: how often each part of the chain is walked, at least 1; 1 never goes back.
      jump: steps that it goes back, at least 1.
    """
    at, shape = diffusion.at, x_0.shape[1:]
    rows = resampling(len(chain), resample=resample, jump=jump)
    following = np.append(rows[1:], -1)  # where the network is evaluated next
    back = following >= rows  # from the level below a row up to another one
    share = np.where(back, chain.alpha[following] / chain.alpha_prev[rows], 1.0)
    added = chain.sigma[following] ** 2 - share**2 * chain.sigma_prev[rows] ** 2
    std = diffusion.sqrt(np.where(back, added, 0.0))

    def step(k, i, x_t, denoised, carry):
        z, known_z, up_z = (diffusion.noise(keys, 3 * k + n, shape) for n in range(3))
        made = ancestral_step(chain, i, x_t, denoised, z)
        known = at(chain.alpha_prev, i, x_0) * x_0 + at(chain.sigma_prev, i, x_0) * known_z
        x = mask * known + (1.0 - mask) * made
        return at(share, k, x) * x + at(std, k, x) * up_z, carry

    x_T = diffusion.prior(chain, keys, shape)
    return scan(chain, denoiser, x_T, step, clip_x0=clip_x0, rows=rows)
