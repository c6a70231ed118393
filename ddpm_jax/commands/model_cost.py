"""What the training of a config costs, computed without compiling: sizes that follow from shapes alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from ddpm_jax.method import from_config
from ddpm_jax.networks import cost
from ddpm_jax.training import step as step_lib


class Cost(NamedTuple):
    """Exact counts of a config.

    Attributes:
      parameters: how many numbers.
      train_flops: operations of a training step for one image.
      state_bytes: of parameters, their moving average, Adam's two moments and the counters.
      gradient_bytes: of the gradients, float32.
    """

    parameters: int
    train_flops: int
    state_bytes: int
    gradient_bytes: int


def of(config) -> Cost:
    """The counts of a config, whose image shape and classes are known."""
    method = from_config(config)
    tx, _ = step_lib.optimizer_of(config)
    state = jax.eval_shape(lambda: step_lib.init_state(method, tx, jax.random.key(0)))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    flops = 3 * cost.forward_flops(method.sized_network, method.image_shape)
    return Cost(parameters, flops, _bytes(state), _bytes(state.params))


def ring_bytes(size: int, devices: int) -> float:
    """The bytes that each device sends in a ring all-reduce of `size` bytes."""
    return 2 * (devices - 1) / devices * size


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
