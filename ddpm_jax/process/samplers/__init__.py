"""Samplers: from x_T to x_0, each one `lax.scan` over a Schedule.

A sampler is a frozen dataclass in a file of its own: its fields are its options, its `__call__` is the algorithm. One
of your own is named `module:NAME` wherever these names are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Array, Key

from ddpm_jax.process.diffusion import Denoiser, Images
from ddpm_jax.process.samplers.ancestral import Ancestral
from ddpm_jax.process.samplers.chain import Trajectory
from ddpm_jax.process.samplers.ddim import DDIM
from ddpm_jax.process.samplers.dpm_solver import DPMSolver
from ddpm_jax.process.samplers.heun import Heun
from ddpm_jax.process.schedules import Schedule


class Sampler(Protocol):
    """What a sampler offers. A field called `variance` is resolved by the model: see `Denoised.log_variance`."""

    def __call__(
        self,
        chain: Schedule,
        denoiser: Denoiser,
        x_T: Images,
        keys: Key[Array, " B"] | None,
        *,
        clip_x0: bool | str = True,
        keep: Sequence[int] | None = None,
    ) -> Images | tuple[Images, Trajectory]:
        """Runs the reverse chain; pure, and traced once.

        Args:
          chain: the chain to run, full or shortened.
          denoiser: of a model; `denoiser(chain)` is its denoise_fn(x_t, row).
          x_T: [B, H, W, C] of the prior; or any x_t of the last step of the chain.
          keys: one for each example, and the only source of randomness, by `diffusion.step_noise`.
          clip_x0: how x̂_0 is brought back to [−1, 1]; see `chain.clip`.
          keep: K steps of the chain to be remembered, as a Trajectory.

        Returns:
          x_0 [B, H, W, C], or (x_0, Trajectory) with `keep`.

        Raises:
          ValueError: one line, for a chain or an option that it cannot use.
        """


SAMPLERS = {"ancestral": Ancestral, "ddim": DDIM, "dpm_solver": DPMSolver, "heun": Heun}
