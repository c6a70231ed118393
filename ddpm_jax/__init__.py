"""Denoising diffusion probabilistic models in JAX and Flax.

    import ddpm_jax as dj

    model = dj.DDPM(schedule=dj.linear_schedule(1000), network=dj.UNet(channels=32), image_shape=(28, 28, 1))
    state = dj.fit(model, images, num_steps=2000, batch_size=64, workdir="runs/mine")
    x = dj.sample(model, state.ema_params, 64, sampler=dj.DDIM(eta=0.0), steps=50, seed=0)
    bits = dj.bits_per_dim(model, state.ema_params, images[:100])
    run = dj.load("runs/mine")

Examples in docstrings use jax, jnp, np and a small `model`, `images`, `params` and `workdir` made in this way.
Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
import os

__version__ = "0.2.0"

_HOMES = {
    "DDPM": "ddpm_jax.ddpm",
    "Sampling": "ddpm_jax.settings",
    "UNet": "ddpm_jax.networks",
    "Method": "ddpm_jax.method",
    "Schedule": "ddpm_jax.process.schedules",
    "linear_schedule": "ddpm_jax.process.schedules:linear",
    "cosine_schedule": "ddpm_jax.process.schedules:cosine",
    "exploding_schedule": "ddpm_jax.process.schedules:exploding",
    "straight_schedule": "ddpm_jax.process.schedules:straight",
    "zero_terminal_snr": "ddpm_jax.process.schedules",
    "shorten": "ddpm_jax.process.timesteps",
    "q_sample": "ddpm_jax.process.diffusion",
    "Ancestral": "ddpm_jax.process.samplers",
    "DDIM": "ddpm_jax.process.samplers",
    "DPMSolver": "ddpm_jax.process.samplers",
    "Heun": "ddpm_jax.process.samplers",
    "option": "ddpm_jax.options",
    "Dataset": "ddpm_jax.data",
    "fit": "ddpm_jax.library",
    "sample": "ddpm_jax.library",
    "bits_per_dim": "ddpm_jax.library",
    "load": "ddpm_jax.library",
    "load_pretrained": "ddpm_jax.library",
    "train": "ddpm_jax.training.loop",
}

# ddpm_jax.configs and ddpm_jax.experiments lie inside an installed package, and beside it in a clone.
if not os.path.isdir(os.path.join(__path__[0], "configs")):
    __path__.append(os.path.dirname(__path__[0]))
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'ddpm_jax' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(module), attribute or name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
