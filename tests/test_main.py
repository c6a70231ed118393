"""The command line: one line and a status for each mistake, and no traceback."""

import json
import os
import shlex
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from test_train import make_config

import ddpm_jax
from ddpm_jax import data, main, modes
from ddpm_jax.files import checkpoints, locks, results
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.run_data import RunError
from ddpm_jax.method import from_config
from ddpm_jax.training import loop, parallel, resume

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIGITS = "--config=configs/digits.py:smoke"

MISTAKES = {
    (): "give --config=configs/NAME.py",
    ("--config=configs/digts.py",): "did you mean 'configs/digits.py'",
    ("--config=digts",): "did you mean 'configs/digits.py'",
    ("--config=configs",): "there is no config file 'configs'",
    ("--config=configs/digits.py:smke",): "it has smoke",
    (DIGITS, "--config.optimzer.name=adam"): "did you mean --config.optimizer.name?",
    (DIGITS, "--config.optimizer.learning_rte=1"): "did you mean --config.optimizer.learning_rate?",
    (DIGITS, "--config.num_steps=5"): "did you mean --config.training.num_steps?",
    (DIGITS, "--config.model=5"): "config.model is a section; give its fields: config.model.",
    (DIGITS, "--config.optimizer.learning_rate=fast"): "must be a number, got 'fast'",
    (DIGITS, "--config.training.num_steps=1.5"): "must be a whole number, got '1.5'",
    (DIGITS, "--config.training.num_steps=inf"): "must be a whole number, got 'inf'",
    (DIGITS, "--config.training.num_steps=None"): "num_steps must be a whole number, got None",
    (DIGITS, "--config.data.flip=perhaps"): "must be true or false, got 'perhaps'",
    (DIGITS, "--config.model.head_channels=7"): "head_channels=7 does not divide",
    (DIGITS, "--config.schedule.name=betas", "--config.schedule.betas=0.1,1.5"): "beta[1] = 1.5",
    (DIGITS, "--config.preview.steps=10,15,334"): "asks for 334 of 333 steps",
    (DIGITS, "--config.model.channel_mults=1,a"): "config.model.channel_mults must be",
    (DIGITS, "--config.model.channel_mults="): "config.model",
    (DIGITS, "--config.schedule.name=cosin"): "did you mean 'cosine'",
    (DIGITS, "--config.schedule.name=linear", "--config.schedule.end=2"): "(0, 1]",
    (DIGITS, "--config.diffusion.prediction=noise"): "eps, x_0, mean, v",
    (
        DIGITS,
        "--config.schedule.name=jsd",
        "--config.diffusion.prediction=eps",
    ): "alpha² falls to 0",
    (DIGITS, "--config.schedule.end=0.1"): "not 'end'",
    (DIGITS, "--config.data.name=npz:nowhere.npz"): "nowhere.npz",
    (DIGITS, "config.seed=3"): "what is 'config.seed=3'",
    (DIGITS, "--seed=3"): "write --config.seed",
    (DIGITS, "--num_steps=5"): "did you mean --config.training.num_steps?",
    (DIGITS, "--training.num_steps=5"): "did you mean --config.training.num_steps?",
    (DIGITS, "--traning.num_steps=5"): "did you mean --config.training.num_steps?",
    (DIGITS, "--config.seed=-1"): "seed must lie in",
    (DIGITS, "--config.preview.steps=200000"): "config.preview: steps='200000'",
    (DIGITS, "--config.preview.sampler=ddmi"): "did you mean 'ddim'",
    ("--config.seed=3",): "--config.seed needs --config=configs/NAME.py",
    ("--wrkdir=x",): "did you mean '--workdir'",
    ("--mode=sample", "--num_steps=5"): "did you mean '--steps'",
    ("--mode=sample", "--num_image=5"): "did you mean '--num_samples'",
    ("sample", "--workdir=x"): "no config at",
    ("sample", "smaple", "--workdir=x"): "what is 'smaple'? Every option begins with --",
    ("import", "nowhere", "--workdir=x"): "there is no nowhere; expected a folder",
    ("--mode=sample", "--workdir=runs/not_there"): "runs/not_there/config.json",
    (
        "--mode=nll",
        "--num_samples=3",
    ): "--num_samples is for --mode=sample, progressive, nearest, eval, not for nll",
    ("--mode=report", "--distributed"): "--distributed is for --mode=train, sample, progressive",
    ("--mode=sample", "--workdir=x", "--distributed"): "give --coordinator, --num_processes and",
    ("--mode=denoise", "--workdir=runs/not_there"): "give --from_t",
    ("--mode=sample", "--sampler=ddim", "--eta=hot"): "--eta must be a number or hat, got 'hot'",
    (
        "--mode=sample",
        "--clip=soft",
    ): "must be true or false or dynamic, or such as dynamic:1.5; got 'soft'",
    ("--mode=sample", "--spacing=cubic"): "uniform or linear or quadratic or log_snr",
    ("--mode=nll", "--guidance=2"): "--guidance is for --mode=",
    ("--mode=smaple",): "did you mean 'sample'?",
}


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Runs a command line in this process, at the root: (status, stdout, lines of stderr)."""

    def call(*arguments):
        status = 0
        try:
            main.main(list(arguments))
        except SystemExit as end:
            status = end.code
        out, err = capfd.readouterr()
        return status, out, [line for line in err.splitlines() if line.strip()]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(parallel, "enable_compilation_cache", lambda: None)
    for name in ("stdout", "stderr", "path"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # to be put back
    return call


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_mistakes(command, arguments, tmp_path):
    there = any("workdir" in a or "wrkdir" in a for a in arguments) or not arguments
    where = [] if there else [f"--workdir={tmp_path / 'runs' / 'x'}"]
    status, _, lines = command(*arguments, *where)
    assert status in (1, 2) and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and MISTAKES[arguments] in lines[0]
    assert not (tmp_path / "runs").exists()  # a start that fails leaves nothing


def parsed(*arguments):
    return main.Request(list(arguments)).config()


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py", "configs/digits"])
def test_a_config_by_its_name(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parsed(f"--config={name}:smoke").to_dict() == parsed(DIGITS).to_dict()


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("data.image_shape", "None", None),
        ("data.image_shape", "48,32,3", (48, 32, 3)),
        ("data.flip", "true", True),
        ("data.memory_limit_gb", "0.5", 0.5),
        ("training.num_steps", "1e3", 1000),
        ("training.num_steps", "12", 12),
        ("model.attention_resolutions", "", ()),
        ("model.attention_resolutions", "()", ()),
        ("model.attention_resolutions", "8", (8,)),
        ("model.attention_resolutions", "[8, 4]", (8, 4)),
        ("optimizer.decay", "none", "none"),
        ("optimizer.learning_rate", "1", 1.0),
        ("schedule.start", "1e-3", 1e-3),
        ("schedule.betas", "0.1,0.2", (0.1, 0.2)),
        ("preview.steps", "None", None),
        ("data.name", "npz:a=b.npz", "npz:a=b.npz"),
    ],
)
def test_a_field_is_read_as_its_type(field, text, value, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = config_lib.fields(parsed(DIGITS, f"--config.{field}={text}"))[field]
    assert found == value and type(found) is type(value)


def test_fields_as_absl_has_flags(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = parsed(DIGITS, "--config.data.flip", "--config.training.num_steps", "7", "--mode=nll")
    assert found.data.flip is True and found.training.num_steps == 7
    assert parsed("--config=cifar10", "--noconfig.data.flip").data.flip is False


def test_no_attention_trains(tmp_path):
    given = parsed(
        *(f"--config={ROOT}/configs/digits.py:smoke", "--config.training.num_steps=1"),
        "--config.model.attention_resolutions=none",
    )
    assert given.model.attention_resolutions is None
    method = from_config(given)
    assert not any(
        "attention" in jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(method.init, jax.random.key(0))
        )
    )


def test_pictures_of_ones_own_have_their_own_size(tmp_path, monkeypatch, capfd):
    """They must not be trained as 8×8 and grey, like configs/digits.py, without a message."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(12):
        pixels = np.random.default_rng(n).integers(0, 256, (12, 10, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{n}.png")
    monkeypatch.chdir(ROOT)
    name = f"--config.data.name=image_folder:{pictures}"
    assert parsed(DIGITS, name).data.image_shape is None
    assert parsed(DIGITS, name, "--config.data.image_shape=6,6,1").data.image_shape == (6, 6, 1)
    assert parsed(DIGITS).data.image_shape == (8, 8, 1)
    assert parsed(DIGITS, "--config.data.name=mnist").data.image_shape == (8, 8, 1)  # is refused

    given = make_config(num_steps=1)
    given.data = parsed(DIGITS, name).data.copy_and_resolve_references()
    workdir = tmp_path / "run"
    loop.train(given, workdir)
    assert config_lib.load(workdir / "config.json").data.image_shape == (12, 10, 3)
    out = capfd.readouterr().out
    assert "12 images 12×10×3" in out and "--config.data.image_shape=12,10,3" in out
    loop.train(given, workdir)  # the same command again

    Image.fromarray(np.zeros((9, 10, 3), np.uint8)).save(pictures / "5.png")
    with pytest.raises(Exception, match=r"9×10×3.*--config.data.image_shape=12,10,3"):
        loop.train(given, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_of_the_config_files_own_size_goes_on(tmp_path):
    """The saved image size applies, also if the command leaves it to the data."""
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 8, 8, 1), np.uint8))
    name = f"npz:{tmp_path}/x.npz"
    loop.train(make_config(num_steps=1, data__name=name), tmp_path / "run")
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 12, 10, 1), np.uint8))
    given = make_config(num_steps=2, data__name=name, data__image_shape=None)
    with pytest.raises(data.DataError, match="12×10×1, but the config asks for 8×8×1"):
        loop.train(given, tmp_path / "run")
    np.savez(tmp_path / "x.npz", images=np.zeros((9, 8, 8, 1), np.uint8))
    state = loop.train(given, tmp_path / "run")
    assert int(state.step) == 2
    assert config_lib.load(tmp_path / "run" / "config.json").data.image_shape == (8, 8, 1)


# ---- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["-h", "--help", "--helpfull"])
def test_help_lists_the_modes(command, word):
    status, out, err = command(word)
    assert status == 0 and not err
    assert all(f"\n  {mode} " in out for mode in modes.COMMANDS)


@pytest.mark.parametrize("mode", modes.COMMANDS)
def test_help_on_a_mode_has_its_flags_and_no_others(command, mode):
    status, out, err = command(f"--mode={mode}", "--help")
    assert status == 0 and not err
    listed = {line.split("=")[0].strip() for line in out.splitlines() if line.startswith("  --")}
    known = modes.all_flags(mode).values()
    assert listed == {f"--[no]{one.flag}" if one.is_boolean else f"--{one.flag}" for one in known}


def test_help_is_in_whole_sentences_with_defaults(command):
    for one in (one for mode in modes.COMMANDS for one in modes.all_flags(mode).values()):
        text = one.help
        assert text[0].isupper() and text.endswith(".") and len(text.split()) > 3, one.flag
    _, out, _ = command("--mode=sample", "--help")
    for default in ("ema", "0", "ancestral", "all T", "false", "cycle"):
        assert f"Default: {default}." in out
    _, out, _ = command("--mode=eval", "--help")
    out = " ".join(out.split())
    assert "Default: train." in out and "Default: 50000, as in the papers." in out


def test_help_on_a_config(command):
    _, out, _ = command("--config=digits", "--config.training.num_steps=1e3", "--help")
    assert (
        "--config.training.num_steps=1000\n" in out and "--config.data.image_shape=8,8,1\n" in out
    )


def test_the_package_runs_and_has_a_version():
    line = [sys.executable, "-m", "ddpm_jax", "--version"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"ddpm_jax {ddpm_jax.__version__}\n" and not result.stderr


# ---- the process -----------------------------------------------------------------------------------


AFFINE = f"""
import sys; sys.path.append({os.path.dirname(os.path.abspath(__file__))!r})
from test_train import make_config
def get_config(): return make_config(num_steps=2)
"""


@pytest.mark.slow
def test_a_closed_pipe_does_not_end_training(tmp_path):
    """`… 2>&1 | head -1`: the run continues, and log.txt is complete."""
    (tmp_path / "mine.py").write_text(AFFINE)
    arguments = [f"--config={tmp_path}/mine.py", f"--workdir={tmp_path / 'run'}"]
    script = shlex.join([sys.executable, "-m", "ddpm_jax.main", *arguments])
    script = f"{{ {script}; echo $? > {tmp_path}/status; }} 2>&1 | head -1"
    environment = {**os.environ, "XLA_FLAGS": ""}
    result = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert result.stdout == f"run directory: {tmp_path / 'run'}\n" and not result.stderr
    assert (tmp_path / "status").read_text() == "0\n"
    assert checkpoints.latest_step(tmp_path / "run" / "checkpoints") == 2
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert log[0][21:] == log[-1][21:] == f"run directory: {tmp_path / 'run'}"
    assert any("step 2/2" in line for line in log)


@pytest.mark.parametrize("platform", ["nonsense", "rocm"])
def test_a_platform_that_is_not_there(platform, tmp_path):
    line = [sys.executable, "-m", "ddpm_jax.main", "--config=configs/digits.py:smoke"]
    env = os.environ | {"JAX_PLATFORMS": platform}
    line.append(f"--workdir={tmp_path / 'x'}")
    run = subprocess.run(line, env=env, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1 and run.stderr.startswith("error: Unable to initialize backend")
    assert f"JAX_PLATFORMS is '{platform}'" in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_ctrl_c_is_said_as_it_is(command, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt("stopped by Ctrl-C; step 469 is saved")

    monkeypatch.setattr(loop, "train", stopped)
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert command(DIGITS) == (130, "", ["stopped by Ctrl-C; step 469 is saved"])


def test_a_run_that_cannot_be_written(command, monkeypatch, tmp_path):
    """The error for a user without permissions; root, as in a container, does not get it."""
    loop.train(make_config(num_steps=1), tmp_path / "run")

    def refuse(directory):
        raise PermissionError(13, "Permission denied", str(directory))

    monkeypatch.setattr(locks, "lock", refuse)
    arguments = (
        f"--workdir={tmp_path / 'run'}",
        "--config=digits",
        "--mode=sample",
        "--allow_code",
    )
    monkeypatch.setattr(resume, "refuse_another_config", lambda *_: None)
    status, _, (line,) = command(*arguments)
    assert status == 1 and "Permission denied" in line and "give --out=FILE" in line


# ---- where things lie ------------------------------------------------------------------------------


def test_a_tilde_is_the_home_directory_in_every_path(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(AFFINE)
    (tmp_path / "out").mkdir()
    status, _, err = command("--config=~/mine.py", "--workdir=~/runs/a")
    assert (status, err) == (0, [])
    for arguments in (
        "--mode=sample --workdir=~/runs/a --num_samples=2 --out=~/out/x.npz --allow_code",
        "--mode=report --workdir=~/runs/a --out=~/out/page.html",
    ):
        status, _, err = command(*arguments.split())
        assert (status, err) == (0, []), err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["page.html", "x.npz", "x.png"]
    assert not (tmp_path / "~").exists()
    assert json.loads((tmp_path / "runs" / "a" / "config.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    "out, words",
    [
        ("no/x.npz", r"no folder .*/no to write .*/no/x\.npz"),
        ("eval/deeper/x.npz", "no folder"),
        ("evla/x.npz", "no folder"),
        ("x.json", r"must end in \.npz"),
    ],
)
def test_out_of_a_folder_that_does_not_exist_is_refused(out, words, tmp_path):
    with pytest.raises(RunError, match=words):
        results.out_path(str(tmp_path / out), ".npz", str(tmp_path))
    assert not list(tmp_path.iterdir())
    inside = str(tmp_path / "eval" / "x.npz")  # where a run's own results go
    assert results.out_path(inside, ".npz", str(tmp_path)) == inside


def test_signals_are_as_before_after_a_run(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    loop.train(make_config(num_steps=1), tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("word, value", [("--singlestep", "true"), ("--nosinglestep", "false")])
def test_a_switch_of_a_sampler_is_a_switch(word, value):
    request = main.Request(["--mode=sample", "--workdir=run", "--sampler=dpm_solver", word])
    assert request.flags["singlestep"] == value


def test_several_changes_add_up_and_of_other_flags_the_last_holds():
    request = main.Request(
        ["--change=data", "--change", "step.clip=none", "--workdir=a", "--workdir=b"]
    )
    assert request.flags["change"] == "data,step.clip=none" and request.workdir() == "b"
