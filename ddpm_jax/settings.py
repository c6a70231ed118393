"""Settings of sampling and of the bound: the options that the commands, configs and the library share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from ddpm_jax.options import Choice, option
from ddpm_jax.process.samplers import SAMPLERS, Ancestral, Sampler
from ddpm_jax.process.samplers.chain import check_clip

STEPS_HELP = (
    "The steps of the chain: their number, such as 50; ddim50, quad50, logsnr50, leading50 or trailing50 for a number"
    " with its spacing;"
    " 10,15,20 for that many in each third; or the times themselves, as [0,20,41]. Default: all T."
)
CLIP_HELP = "Clips predictions of x_0 to [-1, 1]; --noclip does not. Default: as in the config."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """The steps of a reverse chain, and how the model is used at each."""

    steps: str | int | tuple[int, ...] | None = option(None, STEPS_HELP)
    spacing: Literal["uniform", "linear", "quadratic", "log_snr", "leading", "trailing"] | None = (
        option(None, "How a plain number of steps is spread over the chain. Default: uniform.")
    )
    clip_x0: bool | str | None = option(
        None,
        CLIP_HELP.replace(
            " Default", " --clip=dynamic clips by percentile, dynamic:1.5 to 1.5 at most. Default"
        ),
        flag="clip",
    )
    guidance: float = option(
        1.0,
        "The scale of classifier-free guidance: 1 is the model with labels, 0 the one without, and more than 1"
        " exaggerates the labels.",
    )

    def __post_init__(self):
        if self.clip_x0 is not None:
            check_clip(self.clip_x0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Chain):
    """How a diffusion draws images: a sampler and the chain that it runs.

    >>> sampling = dj.Sampling(sampler=dj.DDIM(eta=0.5), steps=5, spacing="quadratic")
    >>> model.chain(sampling).times.tolist()
    [0, 1, 2, 4, 8]
    """

    sampler: Annotated[Sampler, Choice("sampler", SAMPLERS)] = option(
        Ancestral(), "The sampler that draws the images: a built-in one or module:NAME."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounding:
    """How the variational bound is measured."""

    steps: str | int | tuple[int, ...] | None = option(None, STEPS_HELP)
    variance: str | None = option(
        None,
        "The variance of the reverse chain: fixed_small, fixed_large, analytic, or what was learned. Default:"
        " as in the config.",
    )
    clip_x0: bool | None = option(None, CLIP_HELP, flag="clip")
    cdf: Literal["normal", "tanh"] = option(
        "normal",
        "The distribution function of the decoder: normal, or tanh as in Ho et al.'s code.",
    )
