"""The science does not move: not with the number of devices, nor with the clock; bfloat16 moves it within its noise."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from running import call
from test_train import make_diffusion, same

from ddpm_jax.configs import digits
from ddpm_jax.files import writers
from ddpm_jax.training import loop

HERE = os.path.dirname(os.path.abspath(__file__))
RELATIVE = 2.1e-7  # of a loss: less than two of its last digits, 2^-23 each


def make_config(num_steps=60, **changes):
    """A real network, small enough to compile in seconds."""
    config = digits.get_config()
    config.model.update(channels=8, channel_mults=(1, 2), num_res_blocks=1, num_groups=2)
    config.training.update(num_steps=num_steps, batch_size=16, log_every=1, checkpoint_every=30)
    config.preview.update(every=1000, num_images=2, steps="2")
    config.optimizer.update(warmup_steps=10, decay="none")
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


def losses(workdir):
    rows = writers.read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return {row["step"]: row["loss"] for row in rows}


def train_on(devices, workdir, num_steps):
    """A training in a process with this many CPU devices."""
    code = (
        "import sys, jax; sys.path[:0] = sys.argv[1:3]; import test_same_numbers as t\n"
        "assert jax.device_count() == int(sys.argv[3])\n"
        "t.loop.train(t.make_config(int(sys.argv[5])), sys.argv[4])"
    )
    words = [HERE, os.path.dirname(HERE), str(devices), str(workdir), str(num_steps)]
    flags = f"--xla_force_host_platform_device_count={devices}"
    process = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return losses(workdir)


def furthest(one, other):
    """The largest relative difference of two series of losses."""
    assert one.keys() == other.keys() and len(one) == 60
    a, b = (np.array([series[step] for step in sorted(one)]) for series in (one, other))
    return np.max(np.abs(a - b) / a)
