"""Changes of a started run on purpose: --change=FIELD=VALUE, and the history that keeps them."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_train import make_config, metrics, same

from ddpm_jax.files import config as config_lib
from ddpm_jax.files import writers
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop, resume


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Without loss.png, which takes half of the time of so short a run."""
    monkeypatch.setattr(writers, "save_loss_curve", lambda path, rows: None)


def saved(workdir):
    return config_lib.load(workdir / "config.json")


def lines(workdir):
    """The history without its times."""
    found = resume.history(str(workdir))
    return [[line["step"], line["field"], line["old"], line["new"]] for line in found]


@pytest.fixture
def begun(tmp_path):
    """A run of three steps, at a learning rate of 1e-3."""
    loop.train(make_config(num_steps=3), tmp_path / "run")
    return tmp_path / "run"


def test_a_changed_learning_rate_holds_from_then_on(begun, tmp_path, capsys):
    shutil.copytree(begun, tmp_path / "plain")
    change = ("optimizer.learning_rate=1e-4",)
    changed = loop.train(make_config(num_steps=6), begun, change=change)
    plain = loop.train(make_config(num_steps=6), tmp_path / "plain")
    assert metrics(begun)[-1]["learning_rate"] == pytest.approx(1e-4)
    assert metrics(tmp_path / "plain")[-1]["learning_rate"] == pytest.approx(1e-3)
    moved, kept = (np.asarray(state.params["level"]) for state in (changed, plain))
    assert not np.array_equal(moved, kept)
    assert lines(begun) == [[3, "optimizer.learning_rate", 1e-3, 1e-4]]
    assert saved(begun).optimizer.learning_rate == 1e-4
    capsys.readouterr()
    loop.train(make_config(num_steps=8), begun)  # the plain command
    assert (
        "changed at step 3: optimizer.learning_rate from 0.001 to 0.0001" in capsys.readouterr().out
    )
    assert metrics(begun)[-1]["learning_rate"] == pytest.approx(1e-4)
    loop.train(make_config(num_steps=10, optimizer__learning_rate=1e-4), begun)  # or its own value
    assert len(lines(begun)) == 1


def test_a_changed_run_resumes_bit_for_bit(begun, tmp_path):
    change = ("optimizer.learning_rate=1e-4", "training.batch_size=16", "step.ema_decay=0.5")
    shutil.copytree(begun, tmp_path / "killed")
    straight = loop.train(make_config(num_steps=9), begun, change=change)
    loop.train(make_config(num_steps=9), tmp_path / "killed", change=change)
    for step in (6, 9):  # as after a kill: back to step 3, where the change was made
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(step))
    again = loop.train(make_config(num_steps=9), tmp_path / "killed")
    same(straight, again)
    assert metrics(begun) == metrics(tmp_path / "killed")
    assert saved(begun).training.batch_size == 16 and saved(begun).step.ema_decay == 0.5


def test_a_kill_after_the_history_was_written_and_before_the_config_was(begun):
    config = (begun / "config.json").read_bytes()
    change = ("optimizer.learning_rate=1e-4",)
    loop.train(make_config(num_steps=3), begun, change=change)
    (begun / "config.json").write_bytes(config)
    loop.train(make_config(num_steps=3), begun, change=change)
    assert len(lines(begun)) == 1
    (begun / "config.json").write_bytes(config)
    loop.train(make_config(num_steps=4), begun)
    assert saved(begun).optimizer.learning_rate == 1e-4


def test_the_same_change_twice_is_one_change_and_another_is_two(begun):
    for value in ("1e-4", "0.0001", "1e-5", "1e-4"):
        loop.train(make_config(num_steps=3), begun, change=(f"optimizer.learning_rate={value}",))
    assert [line[2:] for line in lines(begun)] == [[1e-3, 1e-4], [1e-4, 1e-5], [1e-5, 1e-4]]
    loop.train(make_config(num_steps=4), begun)
    assert saved(begun).optimizer.learning_rate == 1e-4
    with pytest.raises(ConfigError, match=r"learning_rate is 0.0001 there and 1e-05 here"):
        loop.train(make_config(num_steps=5, optimizer__learning_rate=1e-5), begun)
    loop.train(
        make_config(num_steps=3), begun, change=("optimizer.learning_rate=1e-3",)
    )  # and back
    loop.train(make_config(num_steps=5), begun)
    assert saved(begun).optimizer.learning_rate == 1e-3


def test_a_field_that_is_named_twice_changes_once(begun):
    change = ("optimizer.learning_rate=1e-4", "optimizer.learning_rate=1e-5")
    loop.train(make_config(num_steps=3), begun, change=change)
    assert lines(begun) == [[3, "optimizer.learning_rate", 1e-3, 1e-5]]


def test_a_changed_number_of_steps_stands_for_that_of_the_config(begun):
    config = make_config(num_steps=3)
    assert int(loop.train(config, begun, change=("training.num_steps=5",)).step) == 5
    assert int(loop.train(config, begun).step) == 5
    assert (
        int(loop.train(make_config(num_steps=7), begun).step) == 7
    )  # any other is free, as before
    assert int(loop.train(config, begun, change=("training.num_steps=9",)).step) == 9


def test_another_batch_size_gives_the_batches_of_its_own_run(begun, monkeypatch):
    from ddpm_jax import data

    seen, batches = [], data.batches

    def watched(*arguments, **options):
        for batch in batches(*arguments, **options):
            seen.append(batch["image"])
            yield batch

    def images_of(step, batch_size):
        images = batches(dataset, seed=0, start=step, stop=step + 1, batch_size=batch_size)
        return next(images)["image"]

    dataset = data.load("digits", data_dir="data", image_shape=(8, 8, 1), split="train")
    monkeypatch.setattr(data, "batches", watched)
    loop.train(make_config(num_steps=5), begun, change=("training.batch_size=16",))
    np.testing.assert_array_equal(seen[-1], images_of(4, 16))
    np.testing.assert_array_equal(seen[-2], images_of(3, 16))


def test_a_config_of_your_own_may_lack_a_field(tmp_path):
    for num_steps in (1, 2):
        config = make_config(num_steps=num_steps)
        del config.optimizer["decay"]
        assert int(loop.train(config, str(tmp_path / "run")).step) == num_steps


def test_adams_moments_are_kept_under_adamw(begun):
    before = loop.train(make_config(num_steps=3), begun)
    change = ("optimizer.name=adamw", "optimizer.weight_decay=0.1")
    after = loop.train(make_config(num_steps=3), begun, change=change)
    moments, kept = jax.device_get((before.opt_state, after.opt_state))
    assert len(kept) == len(moments) + 1
    same(moments[0], kept[0])
    assert moments[0].mu["level"].any() and kept[-1].count == 3
    # Killed before a new checkpoint: the last one still has the state of adam.
    state = loop.train(make_config(num_steps=6), begun)
    assert int(state.opt_state[-1].count) == 6
    back = loop.train(
        make_config(num_steps=6), begun, change=("optimizer.weight_decay=0", "optimizer.name=adam")
    )
    same(back.opt_state[0], state.opt_state[0])


@pytest.mark.parametrize(
    "change, words",
    [
        ("optimizer.learning_rte=1e-4", "did you mean --change=optimizer.learning_rate?"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a number, got 'fast'"),
        ("optimizer.learning_rate", "FIELD=VALUE"),
        ("training.batch_size=2.5", "must be a whole number"),
        ("training.batch_size=6", "use 4 or 8"),
        ("training.batchsize=6", "cannot change in a run; did you mean 'training.batch_size'"),
        ("optimizer.learning_rate=-1", "must be positive"),
        ("step.ema_decay=2", r"\[0, 1\)"),
        ("model.channels=8", "model.channels cannot change in a run"),
        ("seed=3", "seed cannot change"),
        ("optimizer=adam", "optimizer cannot change"),
        ("optimizer.=1", "cannot change|no field"),
        ("dta", "did you mean 'data'"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(begun, change, words):

    def files():  # but the lock, which says since when it is held
        paths = (path for path in begun.iterdir() if path.is_file() and path.name != ".lock")
        return {path.name: path.read_bytes() for path in paths}

    before = files()
    with pytest.raises(ConfigError, match=words) as error:
        loop.train(make_config(num_steps=5), begun, change=(change,))
    assert "\n" not in str(error.value)
    after = files()
    assert before == after


def test_a_change_needs_a_run(tmp_path):
    words = (
        r"no checkpoint to continue from; for a new run write --config.optimizer.learning_rate=1"
    )
    with pytest.raises(ConfigError, match=words):
        loop.train(make_config(), tmp_path / "new", change=("optimizer.learning_rate=1",))
    assert not (tmp_path / "new").exists()


def test_without_change_a_difference_is_refused_and_the_change_is_named(begun):
    hint = r" --change=optimizer.learning_rate=0.01,training.batch_size=16 "
    other = {"optimizer__learning_rate": 0.01, "training__batch_size": 16}
    with pytest.raises(ConfigError, match=hint):
        loop.train(make_config(num_steps=5, **other), begun)
    with pytest.raises(ConfigError) as error:  # where a change would not be enough
        loop.train(make_config(num_steps=5, seed=3, **other), begun)
    assert "--change" not in str(error.value)
    loop.train(
        make_config(num_steps=5, **other),
        begun,
        change=("optimizer.learning_rate=0.01", "training.batch_size=16"),
    )
    assert len(lines(begun)) == 2


def test_other_commands_accept_the_config_of_a_changed_run(begun):
    loop.train(make_config(num_steps=3), begun, change=("optimizer.learning_rate=1e-4",))
    resume.refuse_another_config(make_config(num_steps=3), str(begun / "config.json"))
    with pytest.raises(ConfigError, match="another run"):
        resume.refuse_another_config(
            make_config(num_steps=3, optimizer__learning_rate=5.0), str(begun / "config.json")
        )


def test_a_field_that_the_config_lacks_changes_from_its_default(begun):
    loop.train(make_config(num_steps=3), begun, change=("optimizer.b1=0.8",))
    assert [line[1:] for line in lines(begun)] == [["optimizer.b1", 0.9, 0.8]]
    loop.train(make_config(num_steps=4), begun)
    assert saved(begun).optimizer.b1 == 0.8
    assert json.loads((begun / "config.json").read_text())["optimizer"]["b1"] == 0.8
