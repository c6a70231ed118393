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

pytestmark = pytest.mark.once

HERE = os.path.dirname(os.path.abspath(__file__))
RELATIVE = (
    4 * 2.0**-23
)  # difference of a loss in float32: four of its last digits; sums over devices have another order


def make_config(num_steps=60, **changes):
    """A small U-Net, of two levels, with attention."""
    config = digits.get_config()
    config.model.update(channels=8, channel_mults=(1, 2), num_res_blocks=1, num_groups=2)
    config.training.update(num_steps=num_steps, batch_size=16, log_every=1, checkpoint_every=30)
    config.preview.update(every=1000, num_images=2, steps="2")
    config.optimizer.update(warmup_steps=10, decay="none")
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
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={devices}")
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
    found = float(np.max(np.abs(a - b) / a))
    print(f"largest relative difference of a loss: {found:.3g}")
    return found


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return train_on(1, tmp_path_factory.mktemp("one"), 60)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_losses_do_not_depend_on_the_number_of_devices(devices, one_device, tmp_path):
    assert furthest(one_device, train_on(devices, tmp_path, 60)) <= RELATIVE
    assert one_device[60] < 0.9 * one_device[1]  # something was learned


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 8), (8, 2)])
def test_a_run_continues_on_another_number_of_devices(before, after, one_device, tmp_path):
    train_on(before, tmp_path, 30)
    assert furthest(one_device, train_on(after, tmp_path, 60)) <= RELATIVE


@pytest.mark.slow
def test_the_bound_can_fail(one_device, tmp_path):
    """A learning rate that is larger by a thousandth is further away."""
    rate = 1.001 * make_config().optimizer.learning_rate
    loop.train(make_config(**{"optimizer.learning_rate": rate}), tmp_path)
    assert furthest(one_device, losses(tmp_path)) > 10 * RELATIVE


@pytest.mark.slow
def test_bfloat16_learns_what_float32_learns(tmp_path, monkeypatch):
    """Five seeds, paired: the same images, times and noise; the loss averaged over the last 50 of 300 steps."""
    monkeypatch.setattr(writers, "save_loss_curve", lambda *args: None)
    differences, noise = [], []
    for seed in range(5):
        final = {}
        for dtype in ("float32", "bfloat16"):
            place = tmp_path / f"{dtype}{seed}"
            changes = {"seed": seed, "model.dtype": dtype, "training.checkpoint_every": 1000}
            changes |= {"model.channels": 4, "model.channel_mults": (1,)}
            changes |= {"model.attention_resolutions": ()}
            loop.train(make_config(300, **changes), place)
            final[dtype] = np.mean([losses(place)[step] for step in range(251, 301)])
        differences.append(final["bfloat16"] - final["float32"])
        noise.append(final["float32"])
    mean, error = np.mean(differences), np.std(differences, ddof=1) / np.sqrt(5)
    print(json.dumps({"difference": mean, "error": error, "losses": noise}))
    assert np.all(np.abs(differences) > 0)  # it was another arithmetic
    assert abs(mean) < 2 * error or abs(mean) < 1e-3 * np.mean(noise)
    assert abs(mean) < 0.1 * np.std(noise, ddof=1)  # far below what a seed changes


class Clock:
    """A clock that jumps by up to two weeks at each look, back and forth."""

    def __init__(self):
        self.draw, self.looks = np.random.default_rng(0), 0

    def __call__(self):
        self.looks += 1
        return 1e9 + self.draw.uniform(-1e6, 1e6)


def without_speed(workdir):
    rows = writers.read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("names", [("time", "time_ns"), ("perf_counter",)])
def test_a_clock_that_jumps_moves_nothing(names, tmp_path, monkeypatch):
    """The time of day, back and forth; and the monotonic clock, forward by an hour at each look, as after a suspend."""
    monkeypatch.setattr(writers, "save_loss_curve", lambda *args: None)  # matplotlib warns if slow
    config = make_diffusion()
    config.training.update(num_steps=8, log_every=2, checkpoint_every=4)
    straight = loop.train(config, tmp_path / "straight")
    drawn = call("sample", str(tmp_path / "straight"), num_samples=4, steps="3")
    clock, hours = Clock(), iter(range(10**9))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", clock if "time" in names else time.time)
        patch.setattr(
            time, "time_ns", (lambda: int(1e9 * clock())) if "time" in names else time.time_ns
        )
        if "perf_counter" in names:
            patch.setattr(time, "perf_counter", lambda: 3600.0 * next(hours))
        config.training.num_steps = 4
        loop.train(config, tmp_path / "jumping")
        config.training.num_steps = 8
        state = loop.train(config, tmp_path / "jumping")
        again = call("sample", str(tmp_path / "jumping"), num_samples=4, steps="3")
    assert clock.looks or next(hours) > 20  # it was looked at
    same(straight, state)
    assert without_speed(tmp_path / "straight") == without_speed(tmp_path / "jumping")
    with np.load(drawn) as one, np.load(again) as other:
        assert np.array_equal(one["images"], other["images"])
