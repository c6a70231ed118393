"""DDIM, Song et al. 2021."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from ddpm_jax.options import option
from ddpm_jax.process import diffusion
from ddpm_jax.process.samplers.chain import scan
from ddpm_jax.process.schedules import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM:
    """DDIM: x_s = α_s x̂_0 + √(σ_s² − η² β̃_t) ε̂ + η √β̃_t z; Song et al. 2021 (12).

    With η = 1 it is ancestral sampling with "fixed_small", and draws the same noise. By default ε̂ is computed from the
    clipped x̂_0, as in Improved DDPM's code; Song et al. do not clip. The last three options are those of the DDIM of
    diffusers, for pretrained weights whose samples are to agree.

    >>> dj.DDIM(eta=0.5).eta
    0.5
    """

    eta: float | Literal["hat"] = option(
        0.0,
        "The noise of ddim: from 0, none, to 1, that of the ancestral chain; or hat for Song et al.'s σ̂.",
    )

    clipped_eps: bool = option(
        True,
        "Whether ddim computes the noise from the clipped x_0; in diffusers it does not.",
        quiet=True,
    )
    stride: bool = option(
        False,
        "Whether each step of ddim goes down by T/S times, rounded down, wherever the next one begins; in diffusers it"
        " does.",
        quiet=True,
    )
    to_first: bool = option(
        False,
        "Whether ddim ends at the noise level of time 0, not at the image: set_alpha_to_one=False in diffusers.",
        quiet=True,
    )

    def adapt(self, chain: Schedule, trained: Schedule) -> Schedule:
        """The chain with the noise levels to which `stride` and `to_first` lead."""
        return (
            _jumps(chain, trained, self.stride, self.to_first)
            if self.stride or self.to_first
            else chain
        )

    def check(self, chain) -> None:
        """Raises ValueError if η is neither in 0 … 1 nor "hat"."""
        diffusion.ddim_std(chain, self.eta)

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        from_eps, std = diffusion.ddim_std(chain, self.eta)

        def step(k, t, x_t, denoised, carry):
            at = diffusion.at
            x = at(chain.alpha_prev, t, x_t) * denoised.x_0 + at(from_eps, t, x_t) * denoised.eps
            if self.eta != 0:
                x += at(std, t, x_t) * diffusion.step_noise(chain, keys, t, x_t.shape[1:])
            return x, carry

        return scan(chain, denoiser, x_T, step, clipped_eps=self.clipped_eps, **loop)


@functools.lru_cache(maxsize=64)  # schedules are compared by identity: equal chains compile once
def _jumps(chain: Schedule, trained: Schedule, stride: bool, to_first: bool) -> Schedule:
    rows = np.searchsorted(trained.times, chain.times)
    before = rows - len(trained) // len(chain) if stride else np.append(-1, rows[:-1])
    first = (trained.alpha[0], trained.sigma[0]) if to_first else (1.0, 0.0)
    ends = [
        np.where(before >= 0, table[before], end)
        for table, end in zip((trained.alpha, trained.sigma), first, strict=True)
    ]
    return Schedule(chain.alpha, chain.sigma, chain.times, ends=(ends[0], ends[1]))
