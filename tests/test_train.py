"""Whole runs, with the tiny Method of affine.py: what a directory holds, resuming, stopping, refusing."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from configs import digits
from ddpm_jax import checkpoints, runs, schedules, train
from ddpm_jax import config as config_lib
from ddpm_jax.data import DataError

HERE = os.path.dirname(os.path.abspath(__file__))


def make_config(num_steps=6, **changes):
    config = digits.get_config()
    config.method = "affine"
    config.affine = ConfigDict({"scale": 1.0})
    config.optimizer.warmup_steps = 2
    config.optimizer.decay = "none"
    config.training.num_steps = num_steps
    config.training.batch_size = 8
    config.training.log_every = 2
    config.training.checkpoint_every = 3
    config.preview = ConfigDict({"every": 100, "num_images": 5, "spread": 0.2})
    for field, value in changes.items():
        *path, name = field.split("__")
        section = functools.reduce(lambda node, key: node[key], path, config)
        with section.ignore_type():
            section[name] = value
    return config


def make_diffusion():
    config = make_config(num_steps=2, method="tiny")
    config.preview = ConfigDict({"every": 100, "num_images": 2, "steps": "2"})
    config.schedule.num_timesteps = 30
    return config


def metrics(workdir):
    with open(workdir / "metrics.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((a, b)))


def test_a_run_directory(tmp_path, capsys):
    state = train.train(make_config(), tmp_path)
    assert int(state.step) == 6
    assert {p.name for p in tmp_path.iterdir()} >= {
        *("config.json", "log.txt", "metrics.jsonl", "loss.png", "data_preview.png"),
        *("checkpoints", "samples"),
    }
    assert [row["step"] for row in metrics(tmp_path)] == [2, 4, 6]
    assert metrics(tmp_path)[-1]["learning_rate"] == pytest.approx(1e-3)
    picture = np.asarray(Image.open(tmp_path / "samples" / "step_00000006.png"))
    assert picture.shape[1] == 5 * (8 * 7 + 2) + 2 and picture.std() > 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] == f"run directory: {tmp_path}"
    assert any("1500 images 8×8×1, 10 classes" in line for line in lines)
    assert any("step 6/6  100 %" in line and "images/s" in line for line in lines)


def test_the_forward_process_is_a_picture_of_every_diffusion(tmp_path, capsys):
    train.train(make_config(num_steps=2), tmp_path / "other")
    assert not (tmp_path / "other" / "forward.png").exists()  # affine.py is no diffusion
    assert "alpha_bar" not in capsys.readouterr().out
    config = make_diffusion()
    train.train(config, tmp_path / "run")
    assert "30 steps, sum of beta 0.3015" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "run" / "forward.png")).astype(float)
    assert picture.shape == (16 + 4 * 58 + 2, 11 * 58 + 2, 3)
    columns = [picture[16:, 58 * k + 2 : 58 * k + 58] for k in range(11)]
    # What is left of the data falls from left to right; the last column of so short a chain shows some.
    alike = [np.corrcoef(columns[0].ravel(), column.ravel())[0, 1] for column in columns]
    assert alike[1] > 0.99 and 0.5 < alike[-1] < 0.95
    before = (tmp_path / "run" / "forward.png").read_bytes()
    config.training.num_steps = 3
    train.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "forward.png").read_bytes() == before


def test_a_method_with_another_chain_shows_its_own(tmp_path, capsys, monkeypatch):
    make = tiny.make

    def make_another(config):
        method = make(config)
        chain = schedules.from_betas([0.1, 0.7])
        return method._replace(diffusion=method.diffusion._replace(schedule=chain))

    monkeypatch.setattr(tiny, "make", make_another)
    train.train(make_diffusion(), tmp_path)
    assert "schedule: 2 steps, sum of beta 0.8" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "forward.png")).shape[1] == 3 * 58 + 2


def test_resuming_is_exact(tmp_path):
    straight = train.train(make_config(), tmp_path / "straight")
    train.train(make_config(num_steps=3), tmp_path / "halves")
    halves = train.train(make_config(), tmp_path / "halves")
    same(straight, halves)
    # num_steps=3 ended a span of log lines at step 3; from step 4 on both files say the same.
    assert metrics(tmp_path / "straight")[-1] == metrics(tmp_path / "halves")[-1]


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    straight = train.train(make_config(num_steps=9), tmp_path / "straight")
    train.train(make_config(num_steps=9), tmp_path / "killed")
    # As a kill right after step 8 would leave it: the last checkpoint gone, log lines already written.
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "9")
    again = train.train(make_config(num_steps=9), tmp_path / "killed")
    same(straight, again)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "killed")


def test_a_finished_run_says_so(tmp_path, capsys):
    train.train(make_config(), tmp_path)
    train.train(make_config(), tmp_path)
    assert "nothing to do: 6 of 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, number):
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_train\n"
        "test_train.train.train(test_train.make_config(num_steps=1_000_000), sys.argv[3])"
    )
    command = [sys.executable, "-c", script, HERE, os.path.dirname(HERE), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 2/"):
                break
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}" in output and "the same command continues" in output
    step = checkpoints.latest_step(tmp_path / "checkpoints")
    assert 2 <= step < 1_000_000
    # What it saved is what an undisturbed run has at that step, its log lines included.
    resumed = train.train(make_config(num_steps=step + 4), tmp_path)
    straight = train.train(make_config(num_steps=step + 4), tmp_path / "straight")
    same(resumed, straight)
    assert metrics(tmp_path) == metrics(tmp_path / "straight")


def test_a_second_process_is_refused(tmp_path):
    with checkpoints.lock(tmp_path):
        code = (
            "import sys; sys.path[:0] = sys.argv[1:3]; import test_train\n"
            "test_train.train.train(test_train.make_config(), sys.argv[3])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, HERE, os.path.dirname(HERE), str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode != 0 and "is in use by process" in result.stderr
    assert not (tmp_path / "config.json").exists()


def test_two_processes_are_one_run(tmp_path):
    """Two processes of two devices each learn what one process of four does, and save it once."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import jax\n"
        "jax.distributed.initialize(sys.argv[4], 2, int(sys.argv[5])); import test_train\n"
        "test_train.train.train(test_train.make_config(), sys.argv[3])"
    )
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, HERE, os.path.dirname(HERE), tmp_path, address, str(i)],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for i in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    one = train.train(make_config(), tmp_path / "one")
    run = runs.load(tmp_path, "raw")
    assert run.step == 6
    np.testing.assert_allclose(run.params["level"], one.params["level"], atol=1e-6)
    assert [row["step"] for row in metrics(tmp_path)] == [2, 4, 6]


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path):
    train.train(make_config(num_steps=3), tmp_path)
    config = config_lib.load(tmp_path / "config.json")
    config.affine.scale = float("inf")
    config.training.num_steps = 9
    config_lib.save(config, tmp_path / "config.json")
    with pytest.raises(train.TrainingError, match=r"not finite at step 3.*the last is step 3"):
        train.train(config, tmp_path)
    assert checkpoints.latest_step(tmp_path / "checkpoints") == 3
    run = runs.load(tmp_path)
    assert run.step == 3 and np.isfinite(run.params["level"]).all()


def test_a_run_keeps_its_config(tmp_path):
    train.train(make_config(num_steps=3), tmp_path)
    with pytest.raises(config_lib.ConfigError, match=r"config.seed is 0 there and 1 here") as error:
        train.train(make_config(seed=1), tmp_path)
    assert "another --workdir" in str(error.value) and "\n" not in str(error.value)
    train.train(make_config(num_steps=4, training__log_every=1), tmp_path)  # these may change


def test_a_run_from_before_a_field_existed_goes_on(tmp_path):
    train.train(make_config(num_steps=3), tmp_path)
    config = config_lib.load(tmp_path / "config.json")
    for name in ("t_sampling", "min_snr_gamma"):
        del config.diffusion[name]
    config_lib.save(config, tmp_path / "config.json")
    path = tmp_path / "config.json"
    train.refuse_another_config(make_config(), path)  # both have their defaults
    with pytest.raises(config_lib.ConfigError, match=r"t_sampling is '.no such field.' there"):
        train.refuse_another_config(make_config(diffusion__t_sampling="antithetic"), path)


@pytest.mark.parametrize(
    "section, name, other",
    [
        ("data", "memory_limit_gb", 1.0),
        ("model", "head_channels", 8),
        ("model", "attention_resolutions", (8,)),
        ("schedule", "end", 0.5),
        ("diffusion", "label_dropout", 0.1),
        ("optimizer", "weight_decay", 0.1),
        ("step", "ema_warmup", True),
    ],
)
def test_a_field_that_a_run_lacks_stands_for_its_default(tmp_path, section, name, other):
    defaults = {
        "memory_limit_gb": 4.0,
        "attention_resolutions": (16,),
        "ema_warmup": False,
    }
    new = make_config()
    with new.ignore_type(), new.unlocked():
        for key, value in defaults.items():
            home = "data" if key == "memory_limit_gb" else "step" if "ema" in key else "model"
            new[home][key] = value
    old = new.copy_and_resolve_references()
    with old.unlocked():
        del old[section][name]
    path = tmp_path / "config.json"
    config_lib.save(old, path)
    train.refuse_another_config(new, path)
    config_lib.save(new, path)
    train.refuse_another_config(old, path)  # and the other way round: a config file of one's own
    config_lib.save(old, path)
    with new.ignore_type():
        new[section][name] = other
    with pytest.raises(config_lib.ConfigError, match=f"{name} is '.no such field.' there"):
        train.refuse_another_config(new, path)


def test_a_field_without_a_default_is_missed(tmp_path):
    config = make_config()
    config_lib.save(config, tmp_path / "config.json")
    del config.affine["scale"]
    with pytest.raises(config_lib.ConfigError, match=r"affine.scale is 1.0 there and '.no such"):
        train.refuse_another_config(config, tmp_path / "config.json")


def test_a_run_of_own_betas_needs_no_number_of_steps(tmp_path):
    betas = {"schedule__name": "betas", "schedule__betas": (0.1, 0.5, 0.9)}
    train.train(make_config(num_steps=3, **betas), tmp_path)  # the base config says 1000
    assert config_lib.load(tmp_path / "config.json").schedule.num_timesteps == 3
    for length in (1000, 3, None):  # how such a run was begun before, too
        again = make_config(num_steps=3, **betas, schedule__num_timesteps=length)
        train.train(again, tmp_path)
        saved = again.copy_and_resolve_references()
        config_lib.save(saved, tmp_path / "other.json")
        train.refuse_another_config(make_config(**betas), tmp_path / "other.json")
    betas["schedule__betas"] = (0.1, 0.5, 0.8)
    with pytest.raises(config_lib.ConfigError, match=r"0\.9\] there and \[0\.1, 0\.5, 0\.8\] here"):
        train.train(make_config(num_steps=3, **betas), tmp_path)


def test_a_run_with_nothing_to_do_is_left_as_it_is(tmp_path):
    train.train(make_config(num_steps=3), tmp_path)
    config = config_lib.load(tmp_path / "config.json")
    del config.model["head_channels"]  # from before there was this field: recipes digest the config
    config_lib.save(config, tmp_path / "config.json")
    before = (tmp_path / "config.json").read_bytes()
    train.train(make_config(num_steps=3), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"training__batch_size": 6}, "use 4 or 8"),
        ({"training__num_steps": 0}, "positive"),
        ({"optimizer__name": "adma"}, "did you mean 'adam'"),
        ({"data__name": "digist"}, "digits"),
        ({"data__image_shape": (9, 9, 1)}, "8,8,1"),
        ({"step__ema_decay": 2.0}, r"\[0, 1\)"),
        ({"preview__spread": "much"}, "config.preview.spread must be float"),
        ({"method": "afine"}, "no module"),
    ],
)
def test_bad_configs_are_one_line_and_leave_no_run(tmp_path, changes, words):
    with pytest.raises((config_lib.ConfigError, ValueError, DataError), match=words) as error:
        train.train(make_config(**changes), tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "config.json").exists()
