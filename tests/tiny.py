"""A diffusion whose network is one matrix: compiles in a moment where a U-Net takes seconds."""

import flax.linen as nn
import jax.numpy as jnp

from ddpm_jax import ddpm, options
from ddpm_jax.process import schedules


class Network(nn.Module):
    """[x, t] times a matrix, at each pixel."""

    out_channels: int = 1
    num_classes: int = 0

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        time = jnp.broadcast_to(0.01 * t[:, None, None, None], (*x.shape[:-1], 1))
        y = nn.Dense(self.out_channels)(jnp.concatenate([x, time], axis=-1))
        if self.num_classes:
            y += nn.Embed(self.num_classes, self.out_channels)(labels)[:, None, None, :]
        return y


def make(config):
    """The Method of a config, whose section model gives the number of classes only."""
    return options.build(
        ddpm.DDPM,
        config.diffusion,
        "config.diffusion",
        schedule=schedules.make(**config.schedule),
        network=Network(num_classes=config.model.num_classes),
        image_shape=tuple(config.data.image_shape),
        flip=bool(config.data.flip),
    )
