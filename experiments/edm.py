"""EDM in one file: preconditioning, log-normal noise levels, Heun's method with churn; Karras et al. 2022.

    python -m ddpm_jax.main --config=experiments/edm.py --workdir=runs/edm
    python -m ddpm_jax.main --mode=sample --workdir=runs/edm --steps=18 --sampler=experiments.edm:HeunWithChurn --churn=10

Their weight λ(σ) makes the loss the plain squared error of the preconditioned output, which is `simple`. The noise levels
are the rows of a fine table with their ρ = 7, so uniformly spread steps, in any number, have their spacing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax.configs import digits
from ddpm_jax.options import option
from ddpm_jax.process.diffusion import at, noise
from ddpm_jax.process.samplers.chain import scan
from ddpm_jax.process.time_sampling import TimeSampler


def get_config(variant: str = ""):
    config = digits.get_config(variant)
    config.schedule = ConfigDict({"name": "exploding", "num_timesteps": 1000})
    config.diffusion.prediction = "edm"
    config.diffusion.t_sampling = "experiments.edm:LogNormal"
    config.preview.sampler = "heun"
    config.preview.steps = "18"
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogNormal(TimeSampler):
    """ln σ ~ N(mean, std²), on the rows of the schedule; Karras et al. 2022, Table 1."""

    mean: float = option(-1.2, "Mean of ln σ in training.")
    std: float = option(1.2, "Standard deviation of ln σ in training.")

    def draw(self, schedule, state, key, keys, position):
        level = np.log(schedule.ratio)
        width = np.gradient(level)  # width of ln σ that a row represents
        logits = -0.5 * ((level - self.mean) / self.std) ** 2 + np.log(width)
        logits = jnp.asarray(logits, jnp.float32)
        t = jax.vmap(lambda key: jax.random.categorical(key, logits))(keys)
        return t.astype(jnp.int32), jnp.ones(t.shape, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeunWithChurn:
    """Karras et al. 2022, Algorithm 2, on a variance-exploding chain."""

    churn: float = option(0.0, "Noise added back over all steps, S_churn; 0 is deterministic.")
    churn_from: float = option(0.0, "The lowest σ with churn, S_min.")
    churn_to: float = option(float("inf"), "The highest σ with churn, S_max.")
    churn_std: float = option(1.0, "Standard deviation of the added noise, S_noise.")

    def __call__(self, chain, denoiser, x_T, keys, *, keep=None, **loop):
        sigma, S = chain.ratio, len(chain)
        gamma = np.where((sigma >= self.churn_from) & (sigma <= self.churn_to), self.churn / S, 0.0)
        gamma = np.minimum(gamma, np.sqrt(2) - 1)
        # The network was not trained with more noise than the chain begins with.
        lifted = np.minimum(sigma * (1.0 + gamma), sigma[-1])
        levels = np.unique(np.append(sigma, lifted))
        down = np.arange(S)[::-1]  # the step of iterations 0; 1, 2; 3, 4; …
        visited = np.append(lifted[-1], np.stack([sigma[down[1:]], lifted[down[1:]]], 1).ravel())
        rows = np.searchsorted(levels, visited)
        length = np.repeat(np.append(sigma[down[1:]], 0.0) - lifted[down], 2)[: len(rows)]
        added = np.sqrt(np.maximum(lifted**2 - sigma**2, 0.0)) * self.churn_std
        added = np.append(0.0, np.stack([added[down[1:]], 0.0 * added[down[1:]]], 1).ravel())

        def step(k, i, x, denoised, carry):
            start, slope = carry
            euler = x + at(length, k, x) * denoised.eps
            corrected = start + at(length, k, x) * 0.5 * (slope + denoised.eps)
            corrected += at(added, k, x) * noise(keys, k, x.shape[1:])
            return jnp.where(k % 2 == 1, corrected, euler), (x, denoised.eps)

        carry, keep = (x_T, x_T), None if keep is None else np.searchsorted(levels, sigma[keep])
        return scan(
            chain.at(levels), denoiser, x_T, step, rows=rows, carry=carry, keep=keep, **loop
        )
