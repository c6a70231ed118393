"""DDIM, Song et al. 2021."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ddpm_jax.options import option
from ddpm_jax.process import diffusion
from ddpm_jax.process.samplers.chain import scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM:
    """x_s = α_s x̂_0 + √(σ_s² − η² β̃_t) ε̂ + η √β̃_t z; Song et al. 2021 (12).

    With η = 1 it shares all noise with ancestral sampling with "fixed_small". ε̂ is derived anew from the clipped x̂_0
    (as Improved DDPM's code; Song et al. do not clip).

    >>> DDIM(), DDIM(eta=1.0)  # deterministic; as noisy as the ancestral chain
    (DDIM(eta=0.0), DDIM(eta=1.0))
    """

    eta: float | Literal["hat"] = option(
        0.0,
        "The noise of ddim: from 0, none, to 1, that of the ancestral chain; or hat for Song et al.'s σ̂.",
    )

    def check(self, chain) -> None:
        """Raises ValueError for an η outside 0 … 1."""
        diffusion.ddim_std(chain, self.eta)

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        of_eps, std = diffusion.ddim_std(chain, self.eta)

        def step(k, i, x_t, denoised, carry):
            at = diffusion.at
            x = at(chain.alpha_prev, i, x_t) * denoised.x_0 + at(of_eps, i, x_t) * denoised.eps
            if self.eta != 0:
                x += at(std, i, x_t) * diffusion.step_noise(chain, keys, i, x_t.shape[1:])
            return x, carry

        return scan(chain, denoiser, x_T, step, **loop)
