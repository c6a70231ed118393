"""A diffusion whose network is one matrix: compiles in a moment where a U-Net takes seconds."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from ddpm_jax import augmentation, options
from ddpm_jax.ddpm import DDPM
from ddpm_jax.networks import UNet
from ddpm_jax.process import schedules


class Network(nn.Module):
    """[x, t] times a matrix, at each pixel."""

    out_channels: int = 1
    num_classes: int = 0
    act: Callable | None = None

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        time = jnp.broadcast_to(0.01 * t[:, None, None, None], (*x.shape[:-1], 1))
        y = nn.Dense(self.out_channels)(jnp.concatenate([x, time], axis=-1))
        if self.num_classes:
            y += nn.Embed(self.num_classes, self.out_channels)(labels)[:, None, None, :]
        return y

    init_params = UNet.init_params  # by the names of the leaves, never compiled


def make(config):
    return options.build(
        DDPM,
        config.diffusion,
        "config.diffusion",
        schedule=schedules.make(**config.schedule),
        network=Network(num_classes=config.model.num_classes),
        image_shape=tuple(config.data.image_shape),
        **augmentation.of(config.data),
    )
