"""DDIM, Song et al. 2021."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ddpm_jax.options import option
from ddpm_jax.process import diffusion
from ddpm_jax.process.samplers.chain import scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM:
    """DDIM: x_s = α_s x̂_0 + √(σ_s² − η² β̃_t) ε̂ + η √β̃_t z; Song et al. 2021 (12).

    With η = 1 it is ancestral sampling with "fixed_small", and draws the same noise. ε̂ is computed from the clipped x̂_0,
    as in Improved DDPM's code; Song et al. do not clip.

    >>> dj.DDIM(), dj.DDIM(eta=0.5)
    (DDIM(eta=0.0), DDIM(eta=0.5))
    """

    eta: float | Literal["hat"] = option(
        0.0,
        "The noise of ddim: from 0, none, to 1, that of the ancestral chain; or hat for Song et al.'s σ̂.",
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

        return scan(chain, denoiser, x_T, step, **loop)
