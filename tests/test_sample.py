"""Sampling from run directories: restartable, one recipe per file, and image i is always the same."""

import json

import numpy as np
import pytest
from running import call
from test_train import make_config

from ddpm_jax.files import config as config_lib
from ddpm_jax.files import results, runs
from ddpm_jax.files.run_data import RunError
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    loop.train(make_config(num_steps=3), folder)
    return str(folder)


def images(path):
    with np.load(path) as file:
        return file["images"]


def test_images_depend_on_seed_and_index_alone(workdir, tmp_path):
    def draw(name, **options):
        return images(call("sample", workdir, out=str(tmp_path / f"{name}.npz"), **options))

    whole = draw("a", num_samples=10)
    assert whole.shape == (10, 8, 8, 1) and whole.dtype == np.uint8
    assert (tmp_path / "a.png").exists() and not list(tmp_path.glob("*.partial"))
    np.testing.assert_array_equal(draw("b", num_samples=10, batch_size=3), whole)
    np.testing.assert_array_equal(draw("c", num_samples=4), whole[:4])
    assert (draw("d", num_samples=10, seed=1) != whole).any(axis=(1, 2, 3)).all()
    assert (draw("e", num_samples=10, weights="raw") != whole).any()


def test_an_interrupted_command_draws_only_what_is_missing(workdir, tmp_path, monkeypatch):
    whole = images(call("sample", workdir, num_samples=12, out=str(tmp_path / "whole.npz")))
    out = str(tmp_path / "killed.npz")

    class Killed(Exception):
        pass

    append = results.GrowingFile.append

    def killed_after_two(self, new):
        append(self, new)
        if self.count >= 8:
            with open(f"{out}.partial/images", "ab") as file:
                file.write(b"half an image")
            raise Killed

    monkeypatch.setattr(results.GrowingFile, "append", killed_after_two)
    with pytest.raises(Killed):
        call("sample", workdir, num_samples=12, batch_size=4, out=out)
    drawn = []
    monkeypatch.setattr(
        results.GrowingFile, "append", lambda self, new: (drawn.append(len(new)), append(self, new))
    )
    np.testing.assert_array_equal(
        images(call("sample", workdir, num_samples=12, batch_size=4, out=out)), whole
    )
    assert drawn == [4]


def test_more_images_of_the_same_recipe_are_added(workdir, tmp_path):
    out = str(tmp_path / "some.npz")
    few = images(call("sample", workdir, num_samples=3, out=out))
    more = images(call("sample", workdir, num_samples=9, out=out))
    np.testing.assert_array_equal(more[:3], few)
    np.testing.assert_array_equal(images(call("sample", workdir, num_samples=2, out=out)), more)
    with np.load(out) as file:
        recipe = json.loads(str(file["recipe"]))
    assert recipe["step"] == 3 and recipe["weights"] == "ema" and recipe["spread"] == 0.1
    assert len(recipe["weights_sha256"]) == 64


def test_another_recipe_does_not_overwrite(workdir, tmp_path):
    out = str(tmp_path / "x.npz")
    before = images(call("sample", workdir, num_samples=3, out=out))
    with pytest.raises(RunError, match="other settings"):
        call("sample", workdir, num_samples=3, seed=5, out=out)
    (tmp_path / "y.npz").write_bytes(b"not ours")
    with pytest.raises(RunError, match="another --out"):
        call("sample", workdir, num_samples=3, out=str(tmp_path / "y.npz"))
    np.testing.assert_array_equal(images(out), before)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"out": "x.png"}, "must end in .npz"),
        ({"varaince": "fixed_small"}, "no option varaince"),
        ({"spread": "wide"}, "spread must be a number"),
    ],
)
def test_refusals(workdir, options, words):
    with pytest.raises((RunError, ConfigError), match=words):
        call("sample", workdir, **options)


def test_a_run_without_a_checkpoint(tmp_path):
    config_lib.save(make_config(), tmp_path / "config.json")
    with pytest.raises(RunError, match="no checkpoint"):
        call("sample", str(tmp_path))


def test_file_names_are_short_and_tell_every_option_apart():
    run = runs.Run(workdir="run", config=None, method=None, params=None, step=7, weights="ema")
    times = list(range(0, 1000, 3))
    options = [
        {"steps": times},
        {"steps": times[:-1]},
        {"steps": times, "seed": 1},
        {"steps": 50},
        {"images": "a/" * 200},
        {f"option_{n}": "x" * 20 for n in range(20)},
        {f"option_{n}": "x" * (20 - (n == 19)) for n in range(20)},
        {"images": "../../tmp"},
    ]
    names = [run.name("metrics", settings=one) for one in options]
    assert len(set(names)) == len(names) and max(map(len, names)) < 200
    assert all(name.startswith("step_00000007_ema_metrics") and "/" not in name for name in names)
    same = [run.name(settings={"steps": steps}) for steps in ("[0, 3]", [0, 3], np.array([0, 3]))]
    assert len(set(same)) == 1
    assert run.name(settings={"steps": 50, "eta": None}) == "step_00000007_ema_steps_50"
