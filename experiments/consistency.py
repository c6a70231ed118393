"""Consistency models in one file: an image in one call; Song et al. 2023, Song & Dhariwal 2023.

    python -m ddpm_jax.main --config=experiments/consistency.py --workdir=runs/consistency
    python -m ddpm_jax.main --mode=sample --workdir=runs/consistency --steps='[492,1280]'

trains without a teacher, and samples with two calls. With a teacher, a run of EDM, whose weights the student begins with:

    python -m ddpm_jax.main --config=experiments/edm.py --workdir=runs/edm
    python -m ddpm_jax.main --config=experiments/consistency.py:distil --config.init_from=runs/edm --workdir=runs/distilled

f(x, σ) leads from any point of a path of the ODE to its end, the image. It is EDM's x̂_0, which is x at σ = 0, so samplers
and editing use f as they use x̂_0. Training compares f at neighbouring levels of one path, of which the lower is held fixed:
its value y takes the place of x_0, and (x_t − y)/σ_t that of ε, in any loss. At the lowest level y is x itself. Without a
teacher the path is the straight line x_0 + σ ε, with one a step of Heun's method.

Song & Dhariwal (Table 1) changed the levels (`improved`: their number doubles, and ln σ is normal), divide the loss by the distance
of the levels (`weighted`), and have a robust distance, the loss `pseudo_huber`. Without these, levels, weights and target are those of
Song et al.; `squared` is their ℓ2 distance. Numbers that grow follow from num_steps, so a run that is made longer goes back to fewer
levels. s_1 is 80, for the 2,000 steps of configs/digits.py; Song & Dhariwal have 1,280. Products need full float32 precision: rounding
errors must stay far below the distances of f.

Measured with a teacher: the row `distilled` of experiments/frontier in one call, mean ± standard deviation of five seeds; the second column
has --config.diffusion.weighted=False, the second row --config.diffusion.improved=True with s_0=10 and s_1=80 (jax 0.10.2, CPU).

    levels                       weights 1/(σ_high − σ_low)    1
    17 intervals                          9.7 ± 0.5      49.2 ± 6.0
    10 … 80 intervals, ln σ normal       11.5 ± 1.7      18.0 ± 2.8

So the weights matter most: they are 39.5 ± 2.6 better with the first levels, 6.5 ± 1.9 with the second (paired, ± standard error). With
them the first levels, which `distil` has, are 1.8 ± 0.6 better in one call, 1.7 ± 0.8 in two, and not different with `trailing4`; without
them 31.2 ± 3.2 worse. A probable cause: with equal weights low levels have a small share of the gradient, and each level learns from
the one below; a normal ln σ draws them more often. The four were compared on the seeds of experiments/frontier, not on others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.ddpm import DDPM, Sampling
from ddpm_jax.experiments import edm
from ddpm_jax.options import Choice, ConfigError, option
from ddpm_jax.process.diffusion import at, noise_of, q_sample, step_noise
from ddpm_jax.process.losses import mean_over_pixels
from ddpm_jax.process.samplers import SAMPLERS, Sampler
from ddpm_jax.process.samplers.chain import scan

ROWS = 1281  # of the table of σ: 10 · 2ⁿ intervals fit for n = 0 … 7
SCALE = 0.00054  # of the robust distance, times √(number of values); Song & Dhariwal 2023 §3.3
LOG_MEAN, LOG_STD = -1.1, 2.0  # of ln σ; Song & Dhariwal 2023 §3.5
DISTIL = {"distil": True, "improved": False, "s_0": 17, "s_1": 17}  # 18 levels; Song et al. 2023


def get_config(variant: str = ""):
    """`distil` learns from a teacher, and has no form in other sizes; the variants of configs/digits.py have no teacher."""
    config = edm.get_config("" if variant == "distil" else variant)
    config.method = "experiments.consistency:Consistency"
    config.schedule.num_timesteps = ROWS
    config.diffusion.t_sampling = "uniform"  # replaced
    config.diffusion.loss = "experiments.consistency:pseudo_huber"
    config.diffusion.update(improved=True, weighted=True, distil=False)
    config.diffusion.update(s_0=10, s_1=80, target_decay=0.0)
    config.optimizer.decay = "none"  # the last steps, with the most levels, need their rate
    config.step.clip = "none"  # the weights make the gradient large
    config.preview.sampler = "experiments.consistency:Renoise"
    config.preview.steps = "1"
    if variant == "distil":
        config.diffusion.update(DISTIL)
        config.init_from = ""  # the run of the teacher
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renoise:
    """x_s = α_s f(x_t) + σ_s ε, with new noise in each step; Song et al. 2023, Algorithm 1."""

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        def step(k, t, x, f, carry):
            eps = step_noise(chain, keys, t, x.shape[1:])
            return at(chain.alpha_prev, t, x) * f.x_0 + at(chain.sigma_prev, t, x) * eps, carry

        return scan(chain, denoiser, x_T, step, **loop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneCall(Sampling):
    """The options of sampling of a consistency model: one call, if nothing else is given."""

    steps: str | int | tuple[int, ...] | None = option("1", "The calls; trailing2 for two of use.")
    sampler: Annotated[Sampler, Choice("sampler", SAMPLERS)] = option(
        Renoise(), "The sampler that draws the images: a built-in one or module:NAME."
    )


class Memory(NamedTuple):
    """The state of the loss."""

    step: Any  # int32 [], updates done so far
    teacher: Any  # the weights that the run began with, or None
    target: Any  # a moving average of the weights, or None for the weights themselves


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Consistency(DDPM):
    """f(x, σ) = x̂_0, trained to be the same along each path; Song et al. 2023, Algorithms 2 and 3.

    There are n(k) intervals between levels at step k of K: if improved, min(s_0 2^⌊k/K'⌋, s_1) with K' steps for each number
    of intervals; otherwise ⌈√(k/K ((s_1 + 1)² − s_0²) + s_0²) − 1⌉; and s_0 if s_0 = s_1.
    """

    improved: bool = option(True, "Whether levels and their law are Song & Dhariwal's.")
    weighted: bool = option(
        True, "Whether losses are divided by the distance of their levels, as Song & Dhariwal's."
    )
    distil: bool = option(False, "Whether the model that the run begins with is the teacher.")
    s_0: int = option(10, "The intervals between noise levels at the beginning.", least=1)
    s_1: int = option(80, "The intervals between noise levels at the end.", least=1)
    target_decay: float = option(0.0, "Of the moving average that gives the target; 0: none.")
    num_steps: int = 1

    Sampling = OneCall

    def __post_init__(self):
        super().__post_init__()
        last = len(self.schedule) - 1
        if not (self.schedule.alpha == 1).all() or self.prediction != "edm":
            raise ValueError("a consistency model needs schedule 'exploding' and prediction 'edm'")
        if not 0 <= self.target_decay < 1 or not self.s_0 <= self.s_1 <= last:
            raise ValueError(
                f"target_decay must lie in [0, 1) and 1 ≤ s_0 ≤ s_1 ≤ {last}; got {self.target_decay},"
                f" {self.s_0} and {self.s_1}"
            )
        if self.improved and (last % self.s_1 or self.s_1 % self.s_0):
            raise ValueError(
                f"the levels must be rows of the schedule: s_0 = {self.s_0} must divide s_1 = {self.s_1}, and"
                f" that the {last} intervals of the schedule"
            )

    @classmethod
    def from_config(cls, config) -> Consistency:
        if config.diffusion.get("distil") and not config.get("init_from"):
            raise ConfigError("distillation needs a teacher: give its run, --config.init_from=DIR")
        model = super().from_config(config)
        return dataclasses.replace(model, num_steps=config.training.num_steps)

    def init_loss_state(self, params):
        teacher, target = (params if has else None for has in (self.distil, self.target_decay))
        return Memory(jnp.zeros((), jnp.int32), teacher, target)

    def update_loss_state(self, loss_state, record, params):
        step, teacher, target = loss_state
        if self.target_decay:
            first, now = self.intervals(0) + 1, self.intervals(step) + 1  # numbers of levels
            decay = self.target_decay ** (first / now)  # Song et al. 2023, §6.1
            target = jax.tree.map(lambda a, b: decay * a + (1.0 - decay) * b, target, params)
        return Memory(step + 1, teacher, target)

    def intervals(self, k):
        """n(k), an integer."""
        if self.s_0 == self.s_1:
            return self.s_1
        if self.improved:
            stages = int(np.log2(self.s_1 / self.s_0)) + 1
            doublings = jnp.minimum(k // max(1, self.num_steps // stages), stages)
            return jnp.minimum(self.s_0 * 2**doublings, self.s_1)
        done = jnp.minimum(k / self.num_steps, 1.0)
        n = jnp.ceil(jnp.sqrt(done * ((self.s_1 + 1) ** 2 - self.s_0**2) + self.s_0**2) - 1.0)
        return jnp.clip(n, 1, self.s_1).astype(jnp.int32)

    def levels(self, n, keys):
        """Two of n + 1 levels for each key, neighbours, as rows of the schedule: low, high, int32 [B] each."""
        last = len(self.schedule) - 1
        if self.improved:  # ln σ of a normal distribution, cut off where the table ends
            table = jnp.asarray((np.log(self.schedule.sigma) - LOG_MEAN) / LOG_STD, jnp.float32)
            draw = functools.partial(jax.random.truncated_normal, lower=table[0], upper=table[-1])
            u = jnp.interp(jax.vmap(draw)(keys), table, np.arange(last + 1) / last)
        else:
            u = jax.vmap(jax.random.uniform)(keys)
        j = jnp.minimum((u * n).astype(jnp.int32), n - 1)
        low, high = (jnp.round(i * (last / n)).astype(jnp.int32) for i in (j, j + 1))
        return low, high

    def heun(self, denoise_fn, x, t, s):
        """A step of Heun's method from row t down to row s."""
        sigma = self.schedule.sigma
        length = at(sigma, s, x) - at(sigma, t, x)
        slope = denoise_fn(x, t).eps
        return x + 0.5 * length * (slope + denoise_fn(x + length * slope, s).eps)

    def draw(self, params, loss_state, key, batch):
        """Two levels of one path: t is the higher one, and x_0 is f at the lower one."""
        drawn, chain = super().draw(params, (), key, batch), self.schedule
        n = self.intervals(loss_state.step)
        low, high = self.levels(n, self.example_keys(key, batch)[0])
        x_high = q_sample(chain, drawn.x_0, high, drawn.eps)
        if self.distil:
            teacher = self.denoiser(loss_state.teacher, drawn.label)
            x_low = self.heun(teacher(chain), x_high, high, low)
        else:
            x_low = q_sample(chain, drawn.x_0, low, drawn.eps)
        weights = params if loss_state.target is None else loss_state.target
        f = self.denoiser(weights, drawn.label, dropout_keys=drawn.dropout_keys)(chain)
        is_lowest = (low == 0)[:, None, None, None]
        y = jnp.where(is_lowest, x_low, f(x_low, low).x_0)
        sigma = jnp.asarray(chain.sigma, jnp.float32)
        weight = 1.0 / (sigma[high] - sigma[low]) if self.weighted else drawn.weight
        return drawn._replace(x_0=y, t=high, weight=weight, eps=noise_of(chain, y, x_high, high))


def squared(schedule, denoise_fn, x_0, t, eps):
    """‖f − y‖², averaged over pixels."""
    return mean_over_pixels(jnp.square(denoise_fn(q_sample(schedule, x_0, t, eps), t).x_0 - x_0))


def pseudo_huber(schedule, denoise_fn, x_0, t, eps):
    """√(‖f − y‖² + c²) − c with c = 0.00054 √(number of values); Song & Dhariwal 2023 (7)."""
    c = SCALE * np.sqrt(np.prod(x_0.shape[1:]))
    error = denoise_fn(q_sample(schedule, x_0, t, eps), t).x_0 - x_0
    return jnp.sqrt(jnp.sum(jnp.square(error), axis=(1, 2, 3)) + c**2) - c
