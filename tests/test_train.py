"""Whole runs with the tiny Method of affine.py: files of a run directory, resuming, stopping, errors."""

import dataclasses
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from ddpm_jax import data
from ddpm_jax.configs import digits
from ddpm_jax.files import checkpoints, locks, run_data, runs, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.options import ConfigError
from ddpm_jax.process import schedules
from ddpm_jax.training import guards, loop, parallel, resume

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
    config.schedule.update(name="linear", num_timesteps=30)
    return config


def metrics(workdir):
    rows = writers.read_metrics(str(workdir / "metrics.jsonl"))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((a, b)))


def test_a_run_directory(tmp_path, capsys):
    state = loop.train(make_config(), tmp_path)
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


@pytest.mark.slow
def test_the_forward_process_is_a_picture_of_every_diffusion(tmp_path, capsys):
    loop.train(make_config(num_steps=2), tmp_path / "other")
    assert not (tmp_path / "other" / "forward.png").exists()  # affine.py is no diffusion
    assert "alpha_bar" not in capsys.readouterr().out
    config = make_diffusion()
    loop.train(config, tmp_path / "run")
    assert "30 steps, sum of beta 0.3015" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "run" / "forward.png")).astype(float)
    assert picture.shape == (16 + 4 * 58 + 2, 11 * 58 + 2, 3)
    columns = [picture[16:, 58 * k + 2 : 58 * k + 58] for k in range(11)]
    # What is left of the data falls from left to right; the last column of so short a chain shows some.
    alike = [np.corrcoef(columns[0].ravel(), column.ravel())[0, 1] for column in columns]
    assert alike[1] > 0.99 and 0.5 < alike[-1] < 0.95
    before = (tmp_path / "run" / "forward.png").read_bytes()
    config.training.num_steps = 3
    loop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "forward.png").read_bytes() == before


def test_a_method_with_another_chain_shows_its_own(tmp_path, capsys, monkeypatch):
    make = tiny.make

    def make_another(config):
        method = make(config)
        chain = schedules.from_betas([0.1, 0.7])
        return dataclasses.replace(method, schedule=chain)

    monkeypatch.setattr(tiny, "make", make_another)
    loop.train(make_diffusion(), tmp_path)
    assert "schedule: 2 steps, sum of beta 0.8" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "forward.png")).shape[1] == 3 * 58 + 2


def test_resuming_is_exact(tmp_path):
    straight = loop.train(make_config(), tmp_path / "straight")
    loop.train(make_config(num_steps=3), tmp_path / "halves")
    halves = loop.train(make_config(), tmp_path / "halves")
    same(straight, halves)
    # num_steps=3 ended a span of log lines at step 3; from step 4 on both files say the same.
    assert metrics(tmp_path / "straight")[-1] == metrics(tmp_path / "halves")[-1]


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    straight = loop.train(make_config(num_steps=9), tmp_path / "straight")
    loop.train(make_config(num_steps=9), tmp_path / "killed")
    # As a kill right after step 8 would leave it: the last checkpoint gone, log lines already written.
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "9")
    again = loop.train(make_config(num_steps=9), tmp_path / "killed")
    same(straight, again)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "killed")


def test_a_finished_run_says_so(tmp_path, capsys):
    loop.train(make_config(), tmp_path)
    loop.train(make_config(), tmp_path)
    assert "nothing to do: 6 of 6 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, number):
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_train\n"
        "test_train.loop.train(test_train.make_config(num_steps=1_000_000), sys.argv[3])"
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
    resumed = loop.train(make_config(num_steps=step + 4), tmp_path)
    straight = loop.train(make_config(num_steps=step + 4), tmp_path / "straight")
    same(resumed, straight)
    assert metrics(tmp_path) == metrics(tmp_path / "straight")


def test_a_second_process_is_refused(tmp_path):
    with locks.lock(tmp_path):
        code = (
            "import sys; sys.path[:0] = sys.argv[1:3]; import test_train\n"
            "test_train.loop.train(test_train.make_config(), sys.argv[3])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, HERE, os.path.dirname(HERE), str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode != 0 and "is in use by process" in result.stderr
    assert not (tmp_path / "config.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path):
    loop.train(make_config(num_steps=3), tmp_path)
    config = config_lib.load(tmp_path / "config.json")
    config.affine.scale = float("inf")
    config.training.num_steps = 9
    config_lib.save(config, tmp_path / "config.json")
    with pytest.raises(guards.TrainingError, match=r"not finite at step 3.*the last is step 3"):
        loop.train(config, tmp_path)
    assert checkpoints.latest_step(tmp_path / "checkpoints") == 3
    run = runs.load(tmp_path, allow_code=True)
    assert run.step == 3 and np.isfinite(run.params["level"]).all()


def test_a_run_keeps_its_config(tmp_path):
    loop.train(make_config(num_steps=3), tmp_path)
    with pytest.raises(ConfigError, match=r"config.seed is 0 there and 1 here") as error:
        loop.train(make_config(seed=1), tmp_path)
    assert "another --workdir" in str(error.value) and "\n" not in str(error.value)
    loop.train(make_config(num_steps=4, training__log_every=1), tmp_path)  # these may change


def test_a_run_from_before_a_field_existed_goes_on(tmp_path):
    loop.train(make_config(num_steps=3), tmp_path)
    config = config_lib.load(tmp_path / "config.json")
    for name in ("t_sampling", "min_snr_gamma"):
        del config.diffusion[name]
    config_lib.save(config, tmp_path / "config.json")
    path = tmp_path / "config.json"
    resume.refuse_another_config(make_config(), path)  # both have their defaults
    with pytest.raises(ConfigError, match=r"t_sampling is '.no such field.' there"):
        resume.refuse_another_config(make_config(diffusion__t_sampling="antithetic"), path)


@pytest.mark.parametrize(
    "section, name, other",
    [
        ("data", "background", "black"),
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
        "background": "white",
        "attention_resolutions": (16,),
        "ema_warmup": False,
    }
    new = make_config()
    with new.ignore_type(), new.unlocked():
        for key, value in defaults.items():
            home = "data" if key == "background" else "step" if "ema" in key else "model"
            new[home][key] = value
    old = new.copy_and_resolve_references()
    with old.unlocked():
        del old[section][name]
    path = tmp_path / "config.json"
    config_lib.save(old, path)
    resume.refuse_another_config(new, path)
    config_lib.save(new, path)
    resume.refuse_another_config(old, path)  # and the other way round: a config file of one's own
    config_lib.save(old, path)
    with new.ignore_type():
        new[section][name] = other
    with pytest.raises(ConfigError, match=f"{name} is '.no such field.' there"):
        resume.refuse_another_config(new, path)


def test_a_field_without_a_default_is_missed(tmp_path):
    config = make_config()
    config_lib.save(config, tmp_path / "config.json")
    del config.affine["scale"]
    with pytest.raises(ConfigError, match=r"affine.scale is 1.0 there and '.no such"):
        resume.refuse_another_config(config, tmp_path / "config.json")


def test_a_run_of_own_betas_needs_no_number_of_steps(tmp_path):
    betas = {"schedule__name": "betas", "schedule__betas": (0.1, 0.5, 0.9)}
    loop.train(make_config(num_steps=3, **betas), tmp_path)  # the base config says 1000
    assert config_lib.load(tmp_path / "config.json").schedule.num_timesteps == 3
    for length in (1000, 3, None):  # how such a run was begun before, too
        again = make_config(num_steps=3, **betas, schedule__num_timesteps=length)
        loop.train(again, tmp_path)
        saved = again.copy_and_resolve_references()
        config_lib.save(saved, tmp_path / "other.json")
        resume.refuse_another_config(make_config(**betas), tmp_path / "other.json")
    betas["schedule__betas"] = (0.1, 0.5, 0.8)
    with pytest.raises(ConfigError, match=r"0\.9\] there and \[0\.1, 0\.5, 0\.8\] here"):
        loop.train(make_config(num_steps=3, **betas), tmp_path)


def test_a_run_with_nothing_to_do_is_left_as_it_is(tmp_path):
    loop.train(make_config(num_steps=3), tmp_path)
    config = config_lib.load(tmp_path / "config.json")
    del config.model["head_channels"]  # from before there was this field: recipes digest the config
    config_lib.save(config, tmp_path / "config.json")
    before = (tmp_path / "config.json").read_bytes()
    loop.train(make_config(num_steps=3), tmp_path)
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
        ({"preview__spread": "much"}, "config.preview.spread must be a number"),
        ({"method": "afine"}, "no module"),
    ],
)
def test_bad_configs_are_one_line_and_leave_no_run(tmp_path, changes, words):
    with pytest.raises((ConfigError, data.DataError), match=words) as error:
        loop.train(make_config(**changes), tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# ---- what a run keeps, whatever ends it --------------------------------------------------------------


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a folder with a file", "a run"])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data__name": "npz:nowhere.npz"}, "nowhere.npz"),
        ({"data__image_shape": (9, 9, 1)}, "8, ?8, ?1"),
        ({"optimizer__name": "adma"}, "adam"),
        ({}, "accumulate=2"),  # a step that does not fit into the memory
    ],
)
def test_a_failed_start_leaves_everything_as_it_was(tmp_path, monkeypatch, there, changes, words):
    workdir = tmp_path / "runs" / "mine"
    if there == "a run":
        loop.train(make_config(num_steps=3), workdir)
    elif there != "nothing":
        workdir.mkdir(parents=True)
    if there == "a folder with a file":
        (workdir / "notes.txt").write_text("mine")

    def files():
        found = (path for path in tmp_path.rglob("*") if path.name != locks.LOCK)
        return {path: path.read_bytes() if path.is_file() else None for path in found}

    before = files()
    monkeypatch.setattr(parallel, "free_memory", lambda: 0.0 if not changes else float("inf"))
    with pytest.raises((ValueError, RuntimeError), match=words) as error:
        loop.train(make_config(**changes), workdir)
    assert "\n" not in str(error.value)
    assert files() == before


def test_the_run_directory_is_printed_once_before_an_error(tmp_path, capsys):
    with pytest.raises(ConfigError):
        loop.train(make_config(optimizer__name="adma"), tmp_path)
    assert capsys.readouterr().out.count("run directory:") == 1


def stop_reading(monkeypatch, error, step):
    """The data end with an error, like that of a picture that cannot be decoded."""
    batches = data.batches

    def until(dataset, *, start, stop, **given):
        for number, batch in enumerate(batches(dataset, start=start, stop=stop, **given), start):
            if number == step and "rows" in given:  # not for data_preview.png
                raise error
            yield batch

    monkeypatch.setattr(data, "batches", until)


@pytest.mark.parametrize("error", [data.DataError("7.png is cut short"), OSError(5, "I/O error")])
def test_an_error_that_is_not_the_states_own_saves_the_state(tmp_path, monkeypatch, capsys, error):
    straight = loop.train(make_config(num_steps=9), tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_reading(patch, error, 5)
        with pytest.raises(type(error)) as raised:
            loop.train(make_config(num_steps=9, training__checkpoint_every=100), tmp_path / "run")
    assert raised.value is error
    said = "stopped by an error; step 5 is saved, and the same command continues there"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "run" / "log.txt").read_text()
    assert checkpoints.latest_step(tmp_path / "run" / "checkpoints") == 5
    same(loop.train(make_config(num_steps=9), tmp_path / "run"), straight)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_a_truncated_picture_met_on_the_way(tmp_path, capsys):
    """One of three hundred pictures, decoded on demand at a step that the permutation determines."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(300):
        pixels = np.random.default_rng(n).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{n:03}.png")
    tenth = data.batch_indices(300, seed=0, step=9, batch_size=8)
    seen = data.choose(300, 64)  # looked at before the first step, as those of steps 0 … 7 are
    broken = pictures / f"{np.setdiff1d(tenth, seen)[0]:03}.png"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    changes = {"data__name": f"image_folder:{pictures}", "data__memory_limit_gb": 0.0}
    config = make_config(num_steps=12, training__checkpoint_every=100, **changes)
    with pytest.raises(data.DataError, match=rf"{broken.name}.*--config\.data\.skip_broken=True"):
        loop.train(config, tmp_path / "run")
    assert checkpoints.latest_step(tmp_path / "run" / "checkpoints") == 9
    broken.write_bytes(content)
    state = loop.train(config, tmp_path / "run")
    assert int(state.step) == 12 and "resuming at step 9" in capsys.readouterr().out


def test_a_state_that_is_not_finite_is_not_saved_on_an_error(tmp_path, monkeypatch, capsys):
    rare = {"training__log_every": 100, "training__checkpoint_every": 100}
    config = make_config(num_steps=9, affine__scale=float("inf"), **rare)
    stop_reading(monkeypatch, OSError(5, "I/O error"), 5)
    with pytest.raises(OSError, match="I/O error"):
        loop.train(config, tmp_path)
    assert "nothing is saved: the same command begins at step 0" in capsys.readouterr().out
    assert checkpoints.latest_step(tmp_path / "checkpoints") is None


def test_a_state_that_went_into_a_failing_step_is_not_saved(tmp_path, monkeypatch, capsys):
    compile_step, calls = parallel.compile_step, []

    def failing(*arguments):
        step = compile_step(*arguments)

        def call(state, batch):
            calls.append(state)
            if len(calls) == 5:
                jax.tree.map(lambda leaf: leaf.delete(), state)  # it was donated
                raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")
            return step(state, batch)

        return call

    monkeypatch.setattr(parallel, "memory", lambda step: float("nan"))
    monkeypatch.setattr(parallel, "compile_step", failing)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is gone"):
        loop.train(make_config(), tmp_path)
    assert "step 3 is saved, and the same command continues there" in capsys.readouterr().out
    assert checkpoints.latest_step(tmp_path / "checkpoints") == 3


def test_what_cannot_be_written_beside_the_state_does_not_end_a_run(tmp_path, capsys):
    """Folders have the names of the log and of a picture, and a file that of the preview folder."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "log.txt").mkdir()
    (full / "loss.png").mkdir()
    (full / "data_preview.png").mkdir()
    (full / "samples").write_text("in the way")
    state = loop.train(make_config(preview__every=2), full)
    out, err = capsys.readouterr()
    assert int(state.step) == 6 and checkpoints.latest_step(full / "checkpoints") == 6
    assert out.count("WARNING: a file could not be written; training continues: ") == 7, out
    assert all(word in out for word in ("data_preview.png", "samples", "loss"))
    assert err.count("log.txt cannot be written: [Errno 21] Is a directory") == 1
    same(state, loop.train(make_config(), tmp_path / "straight"))


def test_a_start_that_died_before_its_first_checkpoint_leaves_no_record_of_its_data(tmp_path):
    """The next run there may have other data; one that continues from a checkpoint keeps its record."""
    images = np.zeros((9, 8, 8, 1), np.uint8)
    run_data.save_data(str(tmp_path), data.Dataset.from_arrays(images))
    loop.train(make_config(num_steps=3), tmp_path)
    record = (tmp_path / "data.json").read_bytes()
    assert run_data.saved_data(str(tmp_path))["count"] == 1500
    loop.train(make_config(num_steps=6), tmp_path)
    assert (tmp_path / "data.json").read_bytes() == record


def test_lines_that_were_not_due_yet_are_not_missed(tmp_path, monkeypatch, caplog):
    """A run that was to log every hundred steps ends at step 5, and continues with a line every two steps."""
    with monkeypatch.context() as patch, pytest.raises(OSError, match="I/O error"):
        stop_reading(patch, OSError(5, "I/O error"), 5)
        loop.train(make_config(training__log_every=100), tmp_path)
    loop.train(make_config(training__log_every=2), tmp_path)
    assert "has no line" not in caplog.text
    assert [row["step"] for row in metrics(tmp_path)] == [6]


def test_a_line_of_metrics_is_whole_or_not_there(tmp_path, monkeypatch):
    path = str(tmp_path / "metrics.jsonl")
    writers.append_line(path, {"step": 1})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a disk that is full in the middle of a line
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 5, limits[1]))
        with pytest.raises(OSError):
            writers.append_line(path, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    writers.append_line(path, {"step": 3})
    assert [row["step"] for row in writers.read_metrics(path)] == [1, 3]


def test_an_early_preview_says_that_it_is_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "FIRST_PREVIEW_SECONDS", 0.0)
    loop.train(make_config(preview__every=4), tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "an early preview" in line]
    assert "step_00000001.png" in line and "every 4 steps" in line
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step_00000001.png", "step_00000004.png", "step_00000006.png"]


def test_a_field_of_the_data_that_an_old_run_lacks(tmp_path):
    loop.train(make_config(num_steps=3), tmp_path)
    config = config_lib.load(tmp_path / "config.json")
    del config.data["memory_limit_gb"]
    config_lib.save(config, tmp_path / "config.json")
    state = loop.train(make_config(num_steps=4, data__memory_limit_gb=0.1), tmp_path)
    assert int(state.step) == 4


# ---- memory ----------------------------------------------------------------------------------------


def test_a_step_that_cannot_fit_is_refused_before_it_runs(tmp_path, monkeypatch):
    found = {}
    check = guards.check_memory
    monkeypatch.setattr(
        guards,
        "check_memory",
        lambda config, needed, state: found.update(config=config, needed=needed, state=state),
    )
    loop.train(make_config(num_steps=1), tmp_path)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(found["state"]))
    assert found["needed"] > held > 0
    monkeypatch.setattr(parallel, "free_memory", lambda: found["needed"] - held)
    check(**found)  # just fits
    check(found["config"], float("nan"), found["state"])  # of several processes: unknown
    monkeypatch.setattr(parallel, "free_memory", lambda: found["needed"] - held - 1)
    names = r"accumulate=2 \(now 1\).*training.batch_size=.* \(now .*a smaller network"
    with pytest.raises(guards.TrainingError, match=names):
        check(**found)


@pytest.mark.parametrize(
    "batch_size, accumulate, times, said",
    [
        (128, 1, 2.0, ["accumulate=2 (now 1)", "batch_size=64 (now 128)"]),
        (128, 2, 3.5, ["accumulate=8 (now 2)", "batch_size=36 (now 128)"]),
        (24, 1, 3.0, ["accumulate=3 (now 1)", "batch_size=8 (now 24)"]),
        (
            4,
            1,
            2.0,
            ["For a new run --config.model.dtype=bfloat16 or a smaller network"],
        ),
    ],
)
def test_what_to_change_when_memory_does_not_suffice(
    batch_size, accumulate, times, said, monkeypatch
):
    config = make_config()
    config.training.batch_size, config.step.accumulate = batch_size, accumulate
    line = guards.less_memory(config, times)
    assert all(words in line for words in said), line
    chosen = [int(number) for number in re.findall(r"accumulate=(\d+)", line)]
    assert all(batch_size % (number * jax.device_count()) == 0 for number in chosen)
    config.model = {"remat": False, "dtype": "float32"}
    assert "remat" not in guards.less_memory(config)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "--config.model.remat=True" in guards.less_memory(config)


MIB = 2**20


@pytest.mark.parametrize(
    "groups, files, free",
    [
        ("", {}, 800),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max"}, 800),
        ("0::/\n", {"sys/fs/cgroup/memory.max": 500, "sys/fs/cgroup/memory.current": 100}, 500),
        (
            "0::/user/me\n",  # the limit of a group above
            {
                "sys/fs/cgroup/user/memory.max": 300,
                "sys/fs/cgroup/user/memory.current": 200,
                "sys/fs/cgroup/user/memory.stat": "anon 5\ninactive_file 52428800\n",
                "sys/fs/cgroup/user/me/memory.max": "max",
            },
            300 - 200 + 50 + 100,
        ),
        (
            "4:memory:/docker/0123\n0::/\n",  # version 1, as seen from inside the container
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 64,
                "sys/fs/cgroup/memory/memory.usage_in_bytes": 60,
            },
            4 + 100,
        ),
        ("4:memory:/\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": 2**43}, 800),
        ("3:cpu:/\n", {"sys/fs/cgroup/cpu/memory.max": 1}, 800),
    ],
)
def test_the_memory_that_is_there(tmp_path, groups, files, free):
    info = "MemTotal: 999999 kB\nMemAvailable: 716800 kB\nSwapFree: 102400 kB\nHugePages_Total: 0\n"
    files = {"proc/meminfo": info, "proc/self/cgroup": groups} | files
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else f"{content * MIB}\n")
    assert parallel.free_memory(str(tmp_path)) == free * MIB / jax.local_device_count()


def test_where_nobody_says_what_memory_there_is(tmp_path, monkeypatch):
    assert parallel.free_memory(str(tmp_path)) == float("inf")
    assert 0 < parallel.free_memory() < float("inf")  # this machine does

    class Accelerator:
        platform = "gpu"

        def memory_stats(self):
            return self.stats

    device = Accelerator()
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    for device.stats, free in (
        ({"bytes_limit": 100, "bytes_in_use": 30}, 70),
        ({}, float("inf")),
        (None, float("inf")),
    ):
        assert parallel.free_memory() == free


# ---- signals ---------------------------------------------------------------------------------------


def interrupt_when(monkeypatch, *, saving):
    """Ctrl-C at step 4, and again in the middle of the save that follows."""
    append, sha256 = writers.append_line, checkpoints._sha256_files

    def at_step_4(path, row):
        append(path, row)
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    def in_the_save(path):
        if path.name == "4.tmp" and saving:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)  # which Ctrl-C ends
        return sha256(path)

    monkeypatch.setattr(writers, "append_line", at_step_4)
    monkeypatch.setattr(checkpoints, "_sha256_files", in_the_save)


@pytest.mark.parametrize("every", [3, 100])
def test_a_second_ctrl_c_leaves_what_there_was_and_says_so(tmp_path, monkeypatch, capsys, every):
    assert threading.current_thread() is threading.main_thread()
    config = make_config(training__checkpoint_every=every)
    with monkeypatch.context() as patch:
        interrupt_when(patch, saving=True)
        with pytest.raises(KeyboardInterrupt) as stopped:
            loop.train(config, tmp_path)
    out = capsys.readouterr().out
    assert "SIGINT: saving after the running step; Ctrl-C once more aborts without saving" in out
    assert "leaving without saving" in out
    earlier = 3 if every == 3 else 0
    saved = "step 3 is saved, and the same command continues there"
    saved = saved if earlier else "nothing is saved: the same command begins at step 0"
    assert str(stopped.value) == f"stopped by Ctrl-C; {saved}"
    assert {path.name for path in (tmp_path / "checkpoints").glob("*")} <= {"3"}
    assert int(loop.train(config, tmp_path).step) == 6
    assert ("resuming at step 3" in capsys.readouterr().out) == bool(earlier)


def test_one_ctrl_c_saves(tmp_path, monkeypatch, capsys):
    interrupt_when(monkeypatch, saving=False)
    with pytest.raises(SystemExit) as stopped:
        loop.train(make_config(training__checkpoint_every=100), tmp_path)
    assert stopped.value.code == 130
    lines = capsys.readouterr().out.splitlines()
    assert "stopped by SIGINT after step 4, which is saved; the same command continues" in lines
    assert lines[-1] == f"run directory: {tmp_path}"
    assert checkpoints.latest_step(tmp_path / "checkpoints") == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_leaves_nothing(tmp_path, monkeypatch, capsys, number):
    compile_step, passed_on = parallel.compile_step, []

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        return compile_step(*arguments)

    monkeypatch.setattr(parallel, "compile_step", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: passed_on.append(number))
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            loop.train(make_config(), tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    saved = "nothing is saved: the same command begins at step 0"
    if number == signal.SIGTERM:
        assert stopped.value.code == 143 and passed_on  # to whoever listened before
        assert f"stopped by SIGTERM; {saved}" in capsys.readouterr().out
    else:
        assert str(stopped.value) == f"stopped by Ctrl-C; {saved}"
    assert not (tmp_path / "run").exists()


ENDLESS = """
import hashlib, sys, jax, affine, test_train

class Endless:
    __spec__ = None

    @staticmethod
    def make(config):
        method = affine.make(config)

        class Slow(affine.Affine):
            def loss_fn(self, *arguments):
                loss, *more = super().loss_fn(*arguments)
                if {while_compiling}:
                    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # an hour in C
                x = jax.lax.stop_gradient(loss)
                x = jax.lax.while_loop(lambda x: (x > -1).all(), lambda x: x + 1, x)
                return loss + x, *more

        return Slow(image_shape=method.image_shape, scale=method.scale)

sys.modules["endless"] = Endless

def get_config():
    return test_train.make_config(method="endless")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "while_compiling, numbers",
    [
        (False, [signal.SIGTERM]),
        (False, [signal.SIGINT, signal.SIGINT]),
        (True, [signal.SIGTERM]),
        (True, [signal.SIGINT, signal.SIGINT]),
    ],
)
def test_a_first_step_that_never_ends_is_left(tmp_path, while_compiling, numbers):
    """No handler runs while the main thread compiles, and an orderly exit would wait for the running step."""
    workdir, file = tmp_path / "run", tmp_path / "endless.py"
    file.write_text(ENDLESS.replace("{while_compiling}", str(while_compiling)))
    command = [sys.executable, "-m", "ddpm_jax.main", f"--config={file}", f"--workdir={workdir}"]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": HERE}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(
        command, cwd=os.path.dirname(HERE), env=environment, **streams
    ) as process:
        watch = threading.Timer(90, process.kill)  # the line that is waited for may never come
        watch.start()
        try:
            for line in process.stdout:
                if ("in memory" if while_compiling else "compiled in") in line:
                    break
            time.sleep(1.5)  # into it
            assert workdir.exists() and process.poll() is None
            for number in numbers:
                process.send_signal(number)
                time.sleep(0.3)
            output, _ = process.communicate(timeout=20)
        finally:
            watch.cancel()
            process.kill()
    assert process.returncode in (128 + number, -number), output
    assert "nothing is saved: the same command begins at step 0" in output
    assert not workdir.exists()
