"""Progressive distillation in one file: a student that does in one step what its teacher does in two; Salimans & Ho 2022.

    python -m ddpm_jax.main --config=experiments/progressive_distillation.py:teacher --workdir=runs/v
    python -m ddpm_jax.main --config=experiments/progressive_distillation.py --config.init_from=runs/v --workdir=runs/v32
    python -m ddpm_jax.main --config=experiments/progressive_distillation.py --config.init_from=runs/v32 \\
        --config.diffusion.calls=16 --workdir=runs/v16
    python -m ddpm_jax.main --mode=sample --workdir=runs/v16

and so on down to one call. A student begins with the weights of its teacher, `config.init_from`, and is trained at its own
S steps only. The teacher's 2S steps include them, so one and the same chain is halved each time.

A step of DDIM adds (1/r_s − 1/r_t) x̂_0 to x/σ, where r = σ/α. So two steps of the teacher, from t over m to s, are one
step with the mean of its two x̂_0, weighted by 1/r_m − 1/r_t and 1/r_s − 1/r_m. This x̃, with the ε̃ that belongs to it and
x_t, takes the place of x_0 and ε in any loss; with v and L_simple that is their weight SNR + 1.

Otherwise than there, the learning rate of a student does not fall to 0 linearly but by a cosine, and what the next student
begins with is the moving average of the weights.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated

import numpy as np

from ddpm_jax.configs import digits
from ddpm_jax.ddpm import DDPM, Sampling
from ddpm_jax.files import config as config_lib
from ddpm_jax.options import Choice, ConfigError, option
from ddpm_jax.process.diffusion import at, noise_of, q_sample
from ddpm_jax.process.samplers import DDIM, SAMPLERS, Sampler
from ddpm_jax.process.schedules import Schedule
from ddpm_jax.process.timesteps import respace, shorten


def get_config(variant: str = ""):
    """The student; `teacher` is a DDPM that predicts v, which is used with 64 steps."""
    config = digits.get_config("" if variant == "teacher" else variant)
    config.schedule.name, config.schedule.num_timesteps = "cosine", 1024
    config.diffusion.prediction = "v"
    config.preview.sampler = "ddim"
    config.preview.steps = "trailing64"
    if variant != "teacher":
        config.method = "experiments.progressive_distillation:Student"
        config.diffusion.calls = 32
        config.init_from = ""  # the run of the teacher
        config.optimizer.warmup_steps = 0
        config.training.num_steps //= 4
        config.preview.steps = None  # all S
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewSteps(Sampling):
    """The options of sampling of a student: DDIM on its own steps, if nothing else is given."""

    sampler: Annotated[Sampler, Choice("sampler", SAMPLERS)] = option(
        DDIM(), "The sampler that draws the images: a built-in one or module:NAME."
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Student(DDPM):
    """A DDPM on a chain of S steps that learns from itself on a chain of 2S; Salimans & Ho 2022, Algorithm 2."""

    calls: int = option(32, "The student's steps S; its teacher has 2S.", least=1)
    twice: Schedule | None = None  # the teacher's chain

    Sampling = FewSteps

    def __post_init__(self):
        super().__post_init__()
        if self.prediction not in ("v", "x_0") or self.loss != "simple":
            raise ValueError("a student needs prediction 'v' or 'x_0', and loss 'simple'")

    @classmethod
    def from_config(cls, config) -> Student:
        model = super().from_config(config)
        if len(model.schedule) % (2 * model.calls):
            raise ConfigError(
                f"config.diffusion.calls: the chain of {len(model.schedule)} steps must be a multiple of"
                f" {2 * model.calls} steps, the teacher's"
            )
        check_teacher(config, model.calls)
        twice = shorten(model.schedule, 2 * model.calls, spacing="trailing")
        student = respace(twice, range(1, len(twice), 2))
        return dataclasses.replace(model, schedule=student, twice=twice)

    def init_loss_state(self, params):
        """The state of the time sampler, and the teacher."""
        return super().init_loss_state(params), params

    def update_loss_state(self, loss_state, record, params):
        return super().update_loss_state(loss_state[0], record, params), loss_state[1]

    def draw(self, params, loss_state, key, batch):
        """t of the student, and x̃ and ε̃ in place of x_0 and ε."""
        drawn = super().draw(params, loss_state[0], key, batch)
        x_t = q_sample(self.schedule, drawn.x_0, drawn.t, drawn.eps)
        denoise_fn = self.denoiser(loss_state[1], drawn.label)(self.twice)
        x_0 = self.two_steps(denoise_fn, x_t, drawn.t)
        return drawn._replace(x_0=x_0, eps=noise_of(self.schedule, x_0, x_t, drawn.t))

    def two_steps(self, denoise_fn, x_t, t):
        """x̃: what the student has to predict at x_t, so that its step leads where two steps of the teacher do."""
        first = denoise_fn(x_t, 2 * t + 1)
        alpha, sigma = self.twice.alpha_prev, self.twice.sigma_prev
        x_m = at(alpha, 2 * t + 1, x_t) * first.x_0 + at(sigma, 2 * t + 1, x_t) * first.eps
        inverse = self.twice.alpha / self.twice.sigma  # 1/r
        before = np.append(np.inf, inverse[1:-1:2])  # of x_s, which is the image after step 0
        weight = (inverse[::2] - inverse[1::2]) / (before - inverse[1::2])
        second = denoise_fn(x_m, 2 * t)
        return at(weight, t, x_t) * first.x_0 + at(1.0 - weight, t, x_t) * second.x_0


def check_teacher(config, calls: int) -> None:
    """Checks that config.init_from is a teacher of a student with this many calls, if it is there.

    Raises:
      ConfigError: it is not given, it has another chain or prediction, or it is a student that has other than twice the steps.
    """
    if not config.get("init_from"):
        raise ConfigError("a student needs a teacher: give its run, --config.init_from=DIR")
    file = os.path.join(config_lib.path(config.init_from), "config.json")
    if not os.path.exists(
        file
    ):  # reported before the first step; a student that has begun no longer needs it
        return
    teacher = config_lib.load(file)
    changed = config_lib.differences(teacher, config)
    changed = [n for n in changed if n.startswith(("config.schedule.", "config.diffusion.pred"))]
    if changed or teacher.diffusion.get("calls", 2 * calls) != 2 * calls:
        raise ConfigError(
            f"config.init_from: {config.init_from} is no teacher of this student, which needs the same schedule"
            f" and prediction, and {2 * calls} steps"
        )
