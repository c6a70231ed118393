"""Networks by name: functions of x [B, H, W, C] and t [B] to [B, H, W, out_channels]."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Num

from ddpm_jax.networks.unet import UNet

NETWORKS = {"unet": UNet}


class Network(Protocol):
    """The interface of a network: a flax Module, named in config.model.name as module:NAME, with its fields in config.model.

    Attributes:
      out_channels: channels of the output, filled in by the model.
      num_classes: optional; number of labels, 0 for none, as without this field. With label_dropout the model adds one,
        which means "no label".
    """

    out_channels: int

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Num[Array, " B"],
        labels: Int32[Array, " B"] | None = None,
        *,
        dropout_keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B H W out_channels"]:
        """Evaluates the network.

        Args:
          t: the time, 0 … T−1 or fractional.
          labels: in 0 … num_classes − 1; None if num_classes is 0.
          dropout_keys: one for each example, the only source of randomness; None for no dropout. A network without this
            parameter is called without it.
        """
        ...


def init_params(network: Any, key: Key[Array, ""], image_shape: tuple[int, int, int]) -> Any:
    """Initialises the parameters of a network for images (H, W, C), with its own initialisers."""
    if hasattr(network, "init_params"):
        return network.init_params(key, image_shape)
    x, t = jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32)
    labels = t if getattr(network, "num_classes", 0) else None
    return jax.jit(network.init)(key, x, t, labels)["params"]
