"""A new schedule from idea to result, in one file: log SNR falls in even steps.

Idea: the linear schedule was chosen for T = 1000; what if every step takes away the same share of what is
left, so that log SNR falls evenly from `log_linear.start` to `log_linear.end`, whatever T is?

    python -m ddpm_jax.main --config=experiments/log_linear.py:smoke --workdir=runs/log_linear_smoke
    python -m ddpm_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m ddpm_jax.main --config=experiments/log_linear.py --workdir=runs/log_linear
    python -m ddpm_jax.main --mode=nll --workdir=runs/log_linear        and the same of runs/digits

Expected: a similar bound on the full chain, and a better one where few steps are left, since no step is wide.
"""

import numpy as np
from ml_collections import ConfigDict

from configs import digits
from ddpm_jax import ddpm

SECTIONS = (*ddpm.SECTIONS, "log_linear")  # the config's sections that this Method reads


def get_config(variant: str = ""):
    config = digits.get_config(variant)
    config.method = "experiments.log_linear"
    config.log_linear = ConfigDict({"start": 9.2, "end": -10.1})  # as the linear schedule's ends
    return config


def betas(num_timesteps: int, start: float, end: float) -> np.ndarray:
    """β_0 … β_{T−1} whose log ᾱ/(1 − ᾱ) falls from `start` to `end` in even steps; float64 [T]."""
    alpha_bar = 1.0 / (1.0 + np.exp(-np.linspace(start, end, num_timesteps)))
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def make(config):
    """The Method of `ddpm_jax.ddpm` with other β."""
    config = config.copy_and_resolve_references()
    T = config.schedule.num_timesteps
    config.schedule = ConfigDict({"name": "betas", "betas": tuple(betas(T, **config.log_linear))})
    return ddpm.make(config)
