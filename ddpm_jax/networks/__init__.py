"""Networks by name: functions of x [B, H, W, C] and t [B] to [B, H, W, out_channels]."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Num

from ddpm_jax import options
from ddpm_jax.hints import fields
from ddpm_jax.names import check_takes, described, find
from ddpm_jax.networks.unet import UNet

NETWORKS = {"unet": UNet}

# Earlier defaults of fields of config.model, for configs without these fields.
ONCE_DEFAULT = {"num_groups": 32, "attention_resolutions": (16,)}


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


def check_network(network: Any, image_shape: tuple[int, int, int]) -> None:
    """Checks that a network is a flax Module with the arguments of `Network`, and fits the images.

    Raises:
      ValueError: one line; for another class or arguments it names the network's file.
    """
    if inspect.isclass(network):
        raise ValueError(
            f"network must be an instance, such as {network.__name__}(), not the class"
        )
    if not isinstance(network, nn.Module):
        raise ValueError(f"{described(network, 'network')} is not a flax Module")
    check_takes(network, ("x", "t", "labels"), "network")
    if isinstance(count := getattr(network, "num_classes", 0), int) and not 0 <= count < 2**31:
        raise ValueError(f"num_classes must be at least 0 and below 2^31, got {count}")
    if hasattr(network, "check"):
        network.check(image_shape)


def init_params(network: Any, key: Key[Array, ""], image_shape: tuple[int, int, int]) -> Any:
    """Initialises the parameters of a network for images (H, W, C), with its own initialisers.

    Raises:
      ConfigError: it has no parameters, or also other variables, such as the averages of batch normalisation.
    """
    if hasattr(network, "init_params"):
        return network.init_params(key, image_shape)
    x, t = jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32)
    labels = t if getattr(network, "num_classes", 0) else None
    variables = jax.jit(network.init)(key, x, t, labels)
    if set(variables) != {"params"}:
        raise options.ConfigError(
            f"{described(network, 'network')} must have parameters, and no other variables; it has"
            f" {', '.join(sorted(variables)) or 'none'}"
        )
    return variables["params"]


def make_network(section: Any, image_shape: tuple[int, int, int]) -> nn.Module:
    """The network of config.model, whose `name` is a key of NETWORKS (by default "unet") or module:NAME."""
    with options.errors_at("config.model"):
        section = fields(section)
        network = find(section.pop("name", "unet"), NETWORKS, "network")
        if not (inspect.isclass(network) and issubclass(network, nn.Module)):
            raise ValueError(f"{described(network, 'network')} is not a flax Module")
    if network is UNet:
        section = ONCE_DEFAULT | section
        section["attention_resolutions"] = section["attention_resolutions"] or ()
    network = options.build(network, section, "config.model", name=None, parent=None)
    with options.errors_at("config.model"):
        check_network(network, image_shape)
    return network
