"""Samplers: from x_T to x_0, by one `lax.scan` over a Schedule.

A sampler is a frozen dataclass in a file of its own: its fields are its options, and its `__call__` is the algorithm. One
of your own is named module:NAME wherever a sampler is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Array, Key

from ddpm_jax.names import check_takes
from ddpm_jax.process.diffusion import Denoiser, Images
from ddpm_jax.process.samplers.ancestral import Ancestral
from ddpm_jax.process.samplers.chain import Trajectory
from ddpm_jax.process.samplers.ddim import DDIM
from ddpm_jax.process.samplers.dpm_solver import DPMSolver
from ddpm_jax.process.samplers.heun import Heun
from ddpm_jax.process.schedules import Schedule


class Sampler(Protocol):
    """The interface of a sampler.

    If it has a field `variance`, the denoiser computes `Denoised.log_variance` of that kind, by default the model's own.
    A method `check(chain)`, if it has one, is called before anything is compiled. A method `adapt(chain, trained)`, if it
    has one, returns the chain that the sampler runs, from the shortened and the full one.
    """

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
        """Runs the reverse chain. It must be a pure function that jax can trace.

        Args:
          chain: the chain to run, full or shortened.
          denoiser: the model; `denoiser(chain)` is denoise_fn(x_t, t) -> Denoised.
          x_T: [B, H, W, C], x_t at the last step of the chain, such as a draw from the prior.
          keys: one for each image, the only source of randomness; see `diffusion.step_noise`.
          clip_x0: how x̂_0 is clipped; see `chain.clip`.
          keep: K steps of the chain to return as a Trajectory.

        Returns:
          x_0 [B, H, W, C]; with `keep`, (x_0, Trajectory).

        Raises:
          ValueError: one line, for a chain or an option that it cannot use.
        """
        ...


def prepare(sampler: Sampler, chain: Schedule, trained: Schedule) -> Schedule:
    """The chain that a sampler runs, after a check that it takes the arguments of `Sampler` and can run it.

    Args:
      chain, trained: the shortened chain and the full one.

    Raises:
      ValueError: one line; for arguments it names the sampler's file.
    """
    arguments = ("chain", "denoiser", "x_T", "keys")
    check_takes(sampler, arguments, "sampler", keywords=("clip_x0", "keep"))
    if hasattr(sampler, "adapt"):
        check_takes(sampler.adapt, ("chain", "trained"), "sampler")
        chain = sampler.adapt(chain, trained)
    if hasattr(sampler, "check"):
        check_takes(sampler.check, ("chain",), "sampler")
        sampler.check(chain)
    return chain


SAMPLERS = {"ancestral": Ancestral, "ddim": DDIM, "dpm_solver": DPMSolver, "heun": Heun}
