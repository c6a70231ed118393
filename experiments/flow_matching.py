"""Flow matching in one file: the straight path, its velocity, Euler's and Heun's method; Lipman et al. 2023.

    python -m ddpm_jax.main --config=experiments/flow_matching.py --workdir=runs/flow
    python -m ddpm_jax.main --mode=sample --workdir=runs/flow --steps=20 --sampler=experiments.flow_matching:Heun

x_u = (1 − u) x_0 + u ε with u = 1/T, 2/T, …, 1. The network predicts dx/du = ε − x_0, and sampling integrates it from
u = 1 to 0. On this path Euler's step is DDIM's with η = 0: both go straight to (1 − u_s) x̂_0 + u_s ε̂.
--config.diffusion.t_sampling=experiments.flow_matching:LogitNormal trains more in the middle of the path.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax.configs import digits
from ddpm_jax.options import option
from ddpm_jax.process.diffusion import at
from ddpm_jax.process.samplers.chain import scan
from ddpm_jax.process.time_sampling import TimeSampler


def get_config(variant: str = ""):
    config = digits.get_config(variant)
    config.schedule = ConfigDict({"name": "straight", "num_timesteps": 1000})
    config.diffusion.prediction = "velocity"
    config.preview.sampler = "experiments.flow_matching:Euler"
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeSampler):
    """ln(u/(1 − u)) ~ N(location, scale²), rounded to rows of the path; Esser et al. 2024 (19).

    Its density is 0 at both ends, so of u = 1, where sampling begins, the network learns from u nearby.
    """

    location: float = option(0.0, "Mean of ln(u/(1 − u)): below 0 for less noise.")
    scale: float = option(1.0, "Standard deviation of ln(u/(1 − u)).")

    def draw(self, schedule, state, key, keys, position):
        T, z = len(schedule), jax.vmap(jax.random.normal)(keys)
        row = jnp.round(T * jax.nn.sigmoid(self.location + self.scale * z)).astype(jnp.int32) - 1
        return jnp.clip(row, 0, T - 1), jnp.ones(z.shape, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler:
    """x_s = x_u + (u_s − u) (ε̂ − x̂_0), one network call for each step."""

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        length = chain.sigma_prev - chain.sigma  # u_s − u

        def step(k, i, x, denoised, carry):
            return x + at(length, i, x) * (denoised.eps - denoised.x_0), carry

        return scan(chain, denoiser, x_T, step, **loop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun:
    """Euler's step, repeated with the mean of the velocities at both of its ends; the last step is Euler's."""

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        S, length = len(chain), chain.sigma_prev - chain.sigma
        rows = np.append(S - 1, np.repeat(np.arange(S - 1)[::-1], 2))

        def step(k, i, x, denoised, carry):
            start, slope = carry
            velocity = denoised.eps - denoised.x_0
            euler = x + at(length, i, x) * velocity
            above = jnp.minimum(i + 1, S - 1)
            corrected = start + at(length, above, x) * 0.5 * (slope + velocity)
            return jnp.where(k % 2 == 1, corrected, euler), (x, velocity)

        carry = (x_T, jnp.zeros_like(x_T))
        return scan(chain, denoiser, x_T, step, rows=rows, carry=carry, **loop)
