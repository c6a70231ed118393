"""What the training of a config costs, computed without compiling."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm_jax.files import run_data
from ddpm_jax.method import from_config, loss_of
from ddpm_jax.networks import cost
from ddpm_jax.training import step as step_lib

# Of the published peak: training at batch 512 on an H100 in bfloat16; see docs/speed.md.
SHARE = 0.26
FUSED = 1.3  # live bytes of the operations as written over those of a compiled program, measured: docs/speed.md


class Machine(NamedTuple):
    """Published figures: Google's page "TPU v5e", NVIDIA's data sheet "H100 Tensor Core GPU" (SXM)."""

    devices: int
    flops: float  # per second, in bfloat16, of a device
    memory: float  # bytes of a device
    link: float  # bytes per second that a device sends to the others


MACHINES = {
    "v5e-1": Machine(1, 197e12, 16e9, 200e9),
    "v5e-8": Machine(8, 197e12, 16e9, 200e9),
    "v5e-64": Machine(64, 197e12, 16e9, 200e9),
    "8×H100": Machine(8, 989e12, 80e9, 450e9),
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


def step_bytes(config, batch_size: int) -> float:
    """The bytes that a training step of this many images needs on one device, predicted.

    The state, and what the gradient holds at a time if each operation wrote its results, over `FUSED`. Compiled programs of
    a CPU need 0.90 to 1.12 times as much; see docs/speed.md. There `remat` has no effect, and here it has.
    """
    method, size = from_config(config), batch_size // config.step.get("accumulate", 1)
    tx, _ = step_lib.optimizer_of(config)
    state = jax.eval_shape(lambda: step_lib.init_state(method, tx, jax.random.key(0)))
    key = jax.random.key(0)

    def loss(params, loss_state, batch):
        return jnp.mean(loss_of(method, params, loss_state, key, batch)[0])

    batch = step_lib.batch_shapes(method, max(1, size))
    jaxpr = jax.make_jaxpr(jax.grad(loss))(state.params, state.loss_state, batch)
    return _bytes(state) + cost.live_bytes(jaxpr.jaxpr) / FUSED


def table(config, batch_size: int | None = None) -> str:
    """The predicted cost of the config's run on each of MACHINES."""
    config, _ = run_data.planned(config, "")
    run_data.fill_in(config)
    found, batch = of(config), batch_size or config.training.batch_size
    lines = [
        "predicted, not measured",
        f"{found.parameters:,} parameters, {found.train_flops / 1e9:.1f} GFLOP per image in training,"
        f" state and gradients {(found.state_bytes + found.gradient_bytes) / 2**30:.2f} GiB",
        f"hours: {config.training.num_steps:,} steps of {batch} images at {SHARE:.0%} of the published peak; few images"
        " on each device reach less",
        "machine      hours  images on a device  GB on a device    fits  all-reduce of a step, ms",
    ]
    for name, machine in MACHINES.items():
        each = max(1, batch // machine.devices)
        rate = SHARE * machine.flops * machine.devices
        hours = found.train_flops * batch * config.training.num_steps / rate / 3600
        reduce = 1e3 * ring_bytes(found.gradient_bytes, machine.devices) / machine.link
        needed = step_bytes(config, each)
        fits = "yes" if needed < 0.9 * machine.memory else "no"
        lines.append(f"{name:8}{hours:10.2f}{each:20d}{needed / 1e9:16.2f}{fits:>8}{reduce:18.2f}")
    return "\n".join(lines)


def ring_bytes(size: int, devices: int) -> float:
    """The bytes that each device sends in a ring all-reduce of `size` bytes."""
    return 2 * (devices - 1) / devices * size


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
