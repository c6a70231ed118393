"""Your own photographs: size, network and length of the run follow from the pictures and the device.

    python -m ddpm_jax.main --config=configs/folder.py:PATH

PATH is a folder with pictures at any depth (write ./smoke for a folder named smoke). The run directory is
runs/folder_NAME, where NAME is the last part of the path. The first lines say what was chosen and how long it takes at
most. Any field can be given, such as --config.data.image_shape=64,64,3 or --config.training.num_steps=10000; the open
ones follow from it. See docs/your-images.md.

Measured on two shared cores of an AMD EPYC server: 1,000 steps at 16×16 of 1,500 photographs in 4m 50s, blurred ships; at
32×32 of ten photographs in 15m 55s, mixtures of them and near copies; see docs/your-images.md.
"""

from __future__ import annotations

import functools
import math
import os
import re
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax import data
from ddpm_jax.configs import cifar10, variants
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import run_data
from ddpm_jax.files.progress import duration
from ddpm_jax.method import from_config
from ddpm_jax.networks import cost
from ddpm_jax.options import ConfigError

SIZES = (8, 16, 32, 64, 128, 256)
WIDTHS = (32, 64, 96, 128)  # config.model.channels
LEAST_STEPS = (
    2000  # of a run that shows something, up to 64×64; with fewer, smaller pictures are better
)
ENOUGH_STEPS = 10_000  # with more, a wider network is better
PREVIEWS = 6  # number of previews of a run, with the early one and nearest.png
START = 60.0  # seconds of compiling and reading

OPEN = {  # the fields that `plan` fills in, and their types
    "data": {"image_shape": tuple, "flip": bool, "shift": int},
    "model": {
        **{"channels": int, "channel_mults": tuple, "num_res_blocks": int, "num_groups": int},
        **{"attention_resolutions": tuple, "dropout": float, "dtype": str},
    },
    "optimizer": {"learning_rate": float, "warmup_steps": int},
    "training": {"num_steps": int, "batch_size": int, "log_every": int, "checkpoint_every": int},
    "preview": {"every": int},
}


def get_config(variant: str = ""):
    config = cifar10.get_config()
    config.schedule.name = "cosine"  # for this and v see experiments/frontier_fashion.py
    config.diffusion.prediction = "v"
    config.optimizer.decay = "cosine"
    config.step.ema_decay = 0.999
    config.step.ema_warmup = True
    config.preview.nearest = True
    if variant == "smoke":
        return variants.apply(config, variant)
    config.data.name = f"image_folder:{variant}"
    config.data.flatten = True
    config.data.skip_broken = True
    for section, fields in OPEN.items():
        for name, kind in fields.items():
            del config[section][name]
            config[section][name] = placeholder(kind)
    config.plan = ConfigDict()  # see `run_data.planned`
    config.plan.name = "ddpm_jax.configs.folder:plan"
    config.plan.minutes = 30.0  # the time in which the run should end
    return config


def plan(config, *, minutes: float = 30.0) -> list[str]:
    """Fills in the open fields of the config: the largest pictures, and then the widest network, that this device can train
    in `minutes`.

    Returns:
      lines that say what was chosen.
    """
    if not minutes > 0:
        raise ConfigError(f"config.plan.minutes must be positive, got {minutes}")
    if config.data.name == "image_folder:":
        raise ConfigError("which pictures? Give their folder: --config=configs/folder.py:PATH")
    if not config.data.name.startswith("image_folder:"):
        raise ConfigError(
            f"configs/folder.py is for a folder of pictures, and config.data.name is {config.data.name}"
        )
    found = data.survey(config.data.name, flatten=config.data.flatten)
    sides = found.sizes.min(axis=1)
    least = np.quantile(sides, 0.1, method="lower")  # a few pictures may be enlarged
    shapes = [(size, size, found.channels) for size in SIZES if size <= max(least, SIZES[0])]
    if config.data.image_shape is not None:
        shapes = [tuple(config.data.image_shape)]
    device = Device.here()
    for shape in reversed(shapes):
        large = max(1, min(shape[:2]) // 64)
        chosen = Trial(config, found, shape, 32 if large == 1 else 64, device)
        if chosen.affordable(minutes) >= (config.training.num_steps or LEAST_STEPS * large):
            break
    widest = WIDTHS[int(np.searchsorted([300, 3000, 30_000], found.count, side="right"))]
    for width in WIDTHS:
        if chosen.width < width <= widest:
            wider = Trial(config, found, shape, width, device)
            chosen = wider if wider.affordable(minutes) >= ENOUGH_STEPS else chosen
    chosen.carry_out(config, minutes)
    line = chosen.describe(config)
    if smaller := np.mean(sides < min(chosen.shape[:2])):
        line += f"; {smaller:.0%} of the pictures are smaller and are enlarged"
    return [
        line,
        "to change this: --config.plan.minutes=M, --config.data.image_shape=H,W,C, --config.training.num_steps=N, …",
    ]


class Device(NamedTuple):
    """What the local devices do, by careful estimates: a plan must not depend on what else runs on the machine.

    Training reached 37e9 to 53e9 operations per second on two shared cores of an AMD EPYC server, and 190e12 on an H100 in
    bfloat16 with the network of configs/cifar10.py. Other accelerators were not measured, and small networks reach less.

    Attributes:
      operations: per second, of all of them.
      least: seconds of a step at least.
      count: how many.
      dtype: the fastest type of config.model.dtype.
    """

    operations: float
    least: float
    count: int
    dtype: str
    words: str

    @classmethod
    def here(cls) -> Device:
        count, first = jax.device_count(), jax.devices()[0]
        if first.platform == "cpu":
            affinity = getattr(os, "sched_getaffinity", None)
            cores = len(affinity(0)) if affinity else os.cpu_count() or 1
            words = f"{cores} CPU core{'s' if cores > 1 else ''}"
            return cls(20e9 * min(cores, 16), 0.0, count, "float32", words)
        capability = re.match(r"\d+", str(getattr(first, "compute_capability", "")))
        half = first.platform == "tpu" or (capability is not None and int(capability[0]) >= 8)
        dtype = "bfloat16" if half else "float32"
        words = f"{count} × {first.device_kind}"
        return cls((10e12 if half else 2e12) * count, 0.01, count, dtype, words)

    def seconds(self, operations: float) -> float:
        return max(operations / self.operations, self.least)


class Trial:
    """The config with pictures of one shape and a network of one width."""

    def __init__(self, config, found: data.Survey, shape: tuple, width: int, device: Device):
        count = self.count = found.count
        self.shape, self.device = shape, device
        self.config = config.copy_and_resolve_references()
        if config.model.get("num_classes") == run_data.CLASSES_OF_DATA:
            self.config.model.num_classes = found.num_classes
        side = min(shape[:2])
        levels = max(1, int(math.log2(side / 8)) + 1) if side >= 8 else 1
        batch = 16 if device.dtype == "float32" and device.least == 0 else 64 if side <= 64 else 16
        wide = (1, 1, 2, 2, 2, 2, 2, 2) if levels > 4 else (1, 2, 2, 2)
        fill(
            self.config,
            {
                "data.image_shape": shape,
                "data.flip": True,
                "data.shift": side // 16 if count < 1000 else 0,
                "model.channels": width,
                "model.channel_mults": wide[:levels],
                "model.num_res_blocks": 1 if width <= 32 else 2,
                "model.num_groups": width // 4,
                "model.attention_resolutions": (-(-side // 2 ** (levels - 1)),),
                "model.dropout": 0.2 if count < 100 else 0.1,
                "model.dtype": device.dtype,
                "training.batch_size": -(-batch // device.count) * device.count,
            },
        )
        self.width = self.config.model.get("channels") or width
        self.method = from_config(self.config)
        self.forward = cost.forward_flops(self.method.sized_network, shape)

    @functools.cached_property
    def step(self) -> float:
        """Seconds of a training step, at most about."""
        return self.device.seconds(3 * self.forward * self.config.training.batch_size)

    @functools.cached_property
    def aside(self) -> float:
        """Seconds of compiling and previews, of the raw and the EMA parameters."""
        steps = str(self.config.preview.get("steps"))
        steps = int(steps) if steps.isdecimal() else 1000
        each = self.device.seconds(self.forward * self.config.preview.num_images)
        return START + PREVIEWS * 2 * steps * each

    def affordable(self, minutes: float) -> float:
        """The number of steps within the time."""
        return (60 * minutes - self.aside) / self.step

    def carry_out(self, config, minutes: float) -> None:
        """Fills in the config."""
        fill(config, {f: v for f, v in config_lib.fields(self.config).items() if v is not None})
        most = min(max(2000 * math.sqrt(self.count), 5000), 200_000)
        steps = max(500, 100 * int(min(self.affordable(minutes), most) / 100))
        fill(config, {"training.num_steps": steps})
        steps = config.training.num_steps
        fill(
            config,
            {
                "optimizer.learning_rate": 1e-3 * (32 / self.width),
                "optimizer.warmup_steps": steps // 20,
                "training.log_every": max(1, steps // 50),
                "training.checkpoint_every": max(1, steps // 4),
                "preview.every": max(1, steps // 4),
            },
        )

    def describe(self, config) -> str:
        """One line: pictures, size, parameters, steps and time."""
        parameters = jax.eval_shape(self.method.init, jax.random.key(0))
        number = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
        steps, batch = config.training.num_steps, config.training.batch_size
        time = duration(self.aside + steps * self.step)
        pictures = f"{self.count:,} picture{'s' if self.count > 1 else ''}"
        size = "×".join(map(str, self.shape))
        return (
            f"{pictures} at {size}, a network of {number:,} parameters, {steps:,} steps of {batch} images: at most about"
            f" {time} on {self.device.words}, predicted"
        )


def fill(config, values: dict) -> None:
    """Sets fields that the config has and leaves open."""
    known = config_lib.fields(config)
    for field, value in values.items():
        if field in known and known[field] is None:
            config_lib.set_field(config, field, value)
