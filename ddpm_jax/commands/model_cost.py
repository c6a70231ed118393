"""What the training of a config costs, computed without compiling: sizes that follow from shapes alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from ddpm_jax.files import run_data
from ddpm_jax.method import from_config
from ddpm_jax.networks import cost
from ddpm_jax.training import step as step_lib

SHARE = 0.35  # of the peak that training reached on an H100 in bfloat16; see docs/speed.md
MACHINES = {  # peaks that the vendors' pages of TPU v5e and H100 SXM state: devices, FLOP/s in bfloat16, links in byte/s
    "v5e-8": (8, 197e12, 200e9),
    "v5e-64": (64, 197e12, 200e9),
    "8×H100": (8, 989e12, 900e9),
}


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


def table(config, batch_size: int | None = None) -> str:
    """The predicted cost of the config's run on each of MACHINES."""
    config = config.copy_and_resolve_references()
    run_data.fill_in(config)
    found, batch = of(config), batch_size or config.training.batch_size
    lines = [
        "predicted, not measured; without memory for activations",
        f"{found.parameters:,} parameters, {found.train_flops / 1e9:.1f} GFLOP per image in training,"
        f" state and gradients {(found.state_bytes + found.gradient_bytes) / 2**30:.2f} GiB",
        f"hours: {config.training.num_steps:,} steps of {batch} at {SHARE:.0%} of the published peak",
        "machine    hours  all-reduce of a step, ms",
    ]
    for name, (devices, peak, link) in MACHINES.items():
        hours = found.train_flops * batch * config.training.num_steps / (SHARE * peak * devices)
        reduce = ring_bytes(found.gradient_bytes, devices) / link
        lines.append(f"{name:8}{hours / 3600:8.2f}  {1e3 * reduce:8.2f}")
    return "\n".join(lines)


def ring_bytes(size: int, devices: int) -> float:
    """The bytes that each device sends in a ring all-reduce of `size` bytes."""
    return 2 * (devices - 1) / devices * size


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
