"""A Method small enough to train in milliseconds: one number per channel, pulled towards the data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.method import Method, fold_in_each
from ddpm_jax.options import option
from ddpm_jax.process.diffusion import from_uint8


def _noise(key, index):
    """[B, 1, 1, 1] in [−½, ½): the keys themselves, which compile much faster than normal numbers."""
    words = jax.vmap(jax.random.key_data)(fold_in_each(key, index))[:, 0]
    return (words[:, None, None, None] >> 8).astype(jnp.float32) / 2**24 - 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """The options of sampling."""

    spread: float = option(0.1, "How far images are from the level.")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Method):
    image_shape: tuple[int, int, int]
    scale: float
    metric_names = ("dark", "never")
    Sampling = Spread

    def init(self, key):
        del key
        return {"level": jnp.linspace(-0.5, 0.5, self.image_shape[-1])}

    def loss_fn(self, params, loss_state, key, batch):
        del loss_state  # nothing here depends on it
        image = from_uint8(batch["image"])
        level = params["level"][None, None, None, :]
        error = image + 0.1 * _noise(key, batch["index"]) - level
        values = jnp.mean(jnp.square(error), axis=(1, 2, 3))
        dark = jnp.mean(image, axis=(1, 2, 3)) < 0
        metrics = {"dark": (values, dark), "never": (values, dark & ~dark)}
        return values * self.scale, metrics, values

    def sample(self, params, key, index, label, sampling=Spread()):
        height, width, _ = self.image_shape
        ramp = jnp.linspace(-1.0, 1.0, height * width).reshape(1, height, width, 1)
        level = params["level"][None, None, None, :]
        return level + sampling.spread * (_noise(key, index) + ramp)

    def init_loss_state(self, params):
        return np.zeros(8, np.float32)  # losses, in the batch's order

    def update_loss_state(self, loss_state, record, params):
        return jnp.concatenate([loss_state, record])[-len(loss_state) :]


def make(config):
    return Affine(image_shape=tuple(config.data.image_shape), scale=config.affine.scale)
