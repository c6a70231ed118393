"""A diffusion whose network is one matrix: compiles in a moment where a U-Net takes seconds."""

import flax.linen as nn
import jax.numpy as jnp

from ddpm_jax import config as config_lib
from ddpm_jax import ddpm, schedules


class Network(nn.Module):
    """[x, t] times a matrix, at each pixel."""

    out_channels: int
    num_classes: int = 0

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        time = jnp.broadcast_to(0.01 * t[:, None, None, None], (*x.shape[:-1], 1))
        y = nn.Dense(self.out_channels)(jnp.concatenate([x, time], axis=-1))
        if self.num_classes:
            y += nn.Embed(self.num_classes, self.out_channels)(labels)[:, None, None, :]
        return y


def make(config):
    shape = tuple(config.data.image_shape)
    learned = config.diffusion.variance in ("learned", "learned_range")
    classes = config.model.num_classes
    classes += bool(classes and config.diffusion.label_dropout)  # the last one: no label
    return config_lib.call(
        "config.diffusion",
        ddpm.diffusion_method,
        config.diffusion,
        schedule=schedules.make(**config.schedule),
        unet=Network(shape[-1] * (1 + learned), classes),
        image_shape=shape,
        flip=config.data.flip,
    )
