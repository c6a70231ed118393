"""The best checkpoint stays, is named, and can be taken by every command; a kill changes nothing in that."""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from running import call
from test_train import make_config, make_diffusion

import ddpm_jax as dj
from ddpm_jax import main
from ddpm_jax.files import checkpoints, runs, writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop, mirror, parallel
from ddpm_jax.training import step as step_lib


def save(directory, step, keep_best=None, keep=2, **values):
    state = {"step": np.int32(step), "x": np.full(3, step, np.float32)}
    return checkpoints.save(
        directory, state, step=step, keep=keep, values=values, keep_best=keep_best
    )


def there(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit())


# ---- which one it is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, losses, best",
    [
        ("loss", [3, 1, 2, 2, 2, 2], 2),
        ("-loss", [1, 3, 2, 2, 2, 2], 2),
        ("loss", [2, 2, 2, 2, 2, 2], 1),  # of equal ones the first
        ("loss", [5, 4, 3, 2, 1, 0], 6),
        ("loss", [-1, 3, -2, 2, 2, 2], 3),
        ("loss", [1, 2, 3, None, 5, 6], 1),
        ("loss", [None, None, 3, None, 5, 6], 3),
        ("loss", [None] * 6, None),
        (None, [0, 3, 2, 2, 2, 2], None),
    ],
)
def test_the_best_stays_beside_the_newest(tmp_path, name, losses, best):
    said = []
    for step, loss in enumerate(losses, 1):
        said.append(save(tmp_path, step, name, **({} if loss is None else {"loss": loss, "b": 7})))
        known = [x for x in losses[:step] if x is not None]
        if name and known:  # in every moment, not only at the end
            now = 1 + losses.index(max(known) if name == "-loss" else min(known))
            assert checkpoints.best_of(tmp_path, name) == (now, losses[now - 1])
            assert now in there(tmp_path)
            assert said[-1] == (f"loss {losses[now - 1]:.6g}" if now == step else "")
    assert there(tmp_path) == sorted({5, 6} | ({best} if best else set()))


def test_a_checkpoint_without_values_is_never_the_best(tmp_path):
    """As those of older versions are; and a damaged one does not hide the others."""
    save(tmp_path, 1, loss=2.0)
    meta = tmp_path / "1" / "meta.json"
    tree = json.loads(meta.read_text())
    del tree["values"], tree["sha256"]
    meta.write_text(json.dumps(tree | {"sha256": checkpoints._sha256_json(tree)}))
    assert checkpoints.best_of(tmp_path, "loss") is None
    save(tmp_path, 2, "loss", loss=9.0)
    save(tmp_path, 3, "loss", loss=8.0)
    assert checkpoints.best_of(tmp_path, "loss") == (3, 8.0)
    (tmp_path / "3" / "meta.json").write_text("{")
    assert checkpoints.best_of(tmp_path, "loss") == (2, 9.0)
    assert checkpoints.best_of(tmp_path, "other") is None
    assert checkpoints.best_of(tmp_path / "nowhere", "loss") is None


def test_the_mean_of_an_interval():
    rows = [{"step": 1, "a": 1.0, "b": None}, {"step": 2, "a": 4.0, "b": 2.0, "c": None}]
    assert step_lib.means_of_rows(rows) == {"a": 2.5, "b": 2.0}
    assert step_lib.means_of_rows([]) == {}


# ---- of a run --------------------------------------------------------------------------------------


def expected(workdir, every, name="loss"):
    """{step of a checkpoint: mean of the lines that were logged since the one before it}."""
    rows = writers.read_metrics(os.path.join(workdir, "metrics.jsonl"))
    found = {}
    for row in rows:
        found.setdefault(-(-row["step"] // every) * every, []).append(row[name])
    return {step: np.mean(values) for step, values in found.items()}


@pytest.mark.slow
def test_a_run_keeps_its_best_through_a_kill(tmp_path, capsys):
    """The gradient norm rises and falls here; its largest mean is early, and one checkpoint is kept beside it."""
    changes = {"training__keep": 1, "training__keep_best": "-grad_norm"}
    config = make_config(18, **changes, training__log_every=1)
    loop.train(config, tmp_path / "straight")
    means = expected(tmp_path / "straight", 3, "grad_norm")
    best = max(means, key=means.get)
    assert best < 18, "the test needs a best checkpoint that is not the newest"
    assert there(tmp_path / "straight" / "checkpoints") == [best, 18]
    found = checkpoints.best_of(tmp_path / "straight" / "checkpoints", "-grad_norm")
    assert found == (best, pytest.approx(means[best], rel=1e-12))
    said = capsys.readouterr().out
    assert f"step {best} is the best checkpoint so far: grad_norm {found[1]:.6g}\n" in said
    for stop in (6, 9, 12):
        place = tmp_path / f"killed{stop}"
        loop.train(make_config(stop, **changes, training__log_every=1), place)
        line = {"step": stop + 1, "grad_norm": 1e9}  # logged after the last checkpoint, then killed
        writers.append_line(str(place / "metrics.jsonl"), line)
        loop.train(config, place)
        assert there(place / "checkpoints") == [best, 18]
        assert checkpoints.best_of(place / "checkpoints", "-grad_norm") == found


def test_a_name_that_metrics_do_not_have_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.training\.keep_best.*did you mean 'loss'"):
        loop.train(make_config(training__keep_best="-lose"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_it_may_be_asked_for_later(tmp_path):
    """Checkpoints have all numbers, so the best of those that are there is found from any time on."""
    loop.train(make_config(9, training__keep=2), tmp_path / "run")
    config = make_config(15, training__keep=2, training__keep_best="-loss")
    loop.train(config, tmp_path / "run")
    means = {s: v for s, v in expected(tmp_path / "run", 3).items() if s >= 6}
    assert max(means, key=means.get) in there(tmp_path / "run" / "checkpoints")


def test_the_mirror_has_it_too(tmp_path):
    file = tmp_path / "run.zip"
    changes = {"training__keep": 1, "training__keep_best": "-grad_norm"}
    config = make_config(18, **changes, training__log_every=1, training__mirror=str(file))
    loop.train(config, tmp_path / "run")
    best, newest = there(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run")
    mirror.restore(str(file), str(tmp_path / "run"))
    assert there(tmp_path / "run" / "checkpoints") == [best, newest]
    config.training.num_steps = 21
    loop.train(config, tmp_path / "run")
    assert there(tmp_path / "run" / "checkpoints") == [best, 21]


@pytest.mark.slow
def test_a_damaged_newest_is_neither_newest_nor_best(tmp_path, monkeypatch, capsys):
    """The learning rate is highest before step 9, whose arrays are then damaged: only reading them shows it."""
    run, file = tmp_path / "run", tmp_path / "run.zip"
    changes = {"optimizer__warmup_steps": 9, "optimizer__decay": "cosine", "training__keep": 9}
    loop.train(make_config(12, **changes), run)
    shutil.rmtree(run / "checkpoints" / "12")
    assert checkpoints.best_of(run / "checkpoints", "-learning_rate")[0] == 9
    for path in (run / "checkpoints" / "9" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[::-1])
    changes |= {"training__keep": 1, "training__keep_best": "-learning_rate"}
    changes |= {"training__checkpoint_every": 6, "training__mirror": str(file)}
    config = make_config(12, **changes)
    capsys.readouterr()
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(parallel, "compile_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match="step 6 is saved, and the same command"):
            loop.train(config, run)
    place = run / "checkpoints" / "9"
    assert f"WARNING: {place} is damaged; it is now {place}.damaged\n" in capsys.readouterr().out
    loop.train(config, run)
    assert sorted(os.listdir(run / "checkpoints")) == ["12", "9.damaged"]
    names = zipfile.ZipFile(file).namelist()
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"12"}


# ---- --checkpoint ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Checkpoints 4, the best by the learning rate, which falls, and 8 and 10."""
    place = tmp_path_factory.mktemp("best") / "run"
    config = make_diffusion()
    config.training.update(num_steps=10, checkpoint_every=2, keep=2, log_every=1)
    with config.ignore_type():
        config.training.keep_best = "-learning_rate"
    config.optimizer.update(warmup_steps=4, decay="cosine", learning_rate=0.1)
    loop.train(config, place)
    assert there(place / "checkpoints") == [6, 8, 10]
    return str(place)


def test_a_command_takes_any_checkpoint(workdir, tmp_path, capsys):
    drawn = {}
    for word, step in (("newest", 10), ("best", 6), ("8", 8), ("6", 6)):
        out = f"{tmp_path}/{word}.npz"
        flags = ["--num_samples=2", "--steps=3", "--weights=raw", "--allow_code", f"--out={out}"]
        main.main(["sample", f"--workdir={workdir}", f"--checkpoint={word}", *flags])
        with np.load(out) as arrays:
            assert json.loads(str(arrays["recipe"]))["step"] == step
            drawn[word] = arrays["images"]
    assert np.array_equal(drawn["best"], drawn["6"])
    assert not np.array_equal(drawn["best"], drawn["newest"])
    path = call("sample", workdir, num_samples=2, steps="3")
    assert "step_00000010" in path


@pytest.mark.parametrize(
    "word, words, status",
    [
        ("7", "no checkpoint of step 7; there are: 6, 8, 10", 1),
        ("last", "--checkpoint must be newest or best or a whole number, got 'last'", 2),
        ("-1", "no checkpoint of step -1; there are: 6, 8, 10", 1),
    ],
)
def test_what_is_not_there_is_one_line(workdir, word, words, status, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["sample", f"--workdir={workdir}", f"--checkpoint={word}", "--allow_code"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and caught.value.code == status


def test_python_takes_it_too(workdir, tmp_path):
    newest, best, eight = (
        dj.load(workdir, checkpoint=which, allow_code=True) for which in ("newest", "best", 8)
    )
    assert (newest.step, best.step, eight.step) == (10, 6, 8)
    assert best.recipe()["weights_sha256"] != newest.recipe()["weights_sha256"]
    for wrong in (True, "8", 8.0, None):
        with pytest.raises(ConfigError, match="must be newest, best or the number of a step"):
            dj.load(workdir, checkpoint=wrong, allow_code=True)
    loop.train(make_config(3), tmp_path / "run")
    with pytest.raises(RunError, match=r"train with config\.training\.keep_best"):
        runs.load(str(tmp_path / "run"), checkpoint="best", allow_code=True)
