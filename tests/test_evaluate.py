"""Evaluation of run directories: the printed numbers are those of the Method, also after interruptions."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
from running import call
from test_train import make_config as affine_config

from ddpm_jax import data
from ddpm_jax.commands import bound
from ddpm_jax.configs import digits
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import run_data, runs, writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.options import ConfigError
from ddpm_jax.process import likelihood
from ddpm_jax.training import loop, parallel
from ddpm_jax.training import step as training


def make_config(**diffusion):
    config = digits.get_config("smoke")
    config.method = "tiny"
    config.data.name = "digits"
    config.schedule.update(name="linear", num_timesteps=20, end=0.5)
    config.diffusion.prediction = "eps"
    config.training.num_steps = 2
    config.training.batch_size = 8
    config.preview.num_images = 4
    config.preview.steps = "2"
    config.diffusion.update(diffusion)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    loop.train(make_config(), folder)
    return str(folder)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than computing the numbers."""
    monkeypatch.setattr(writers, "save_panels", lambda *args: None)


def test_the_result_is_the_mean_of_what_the_method_says(workdir, tmp_path, capsys):
    out = str(tmp_path / "result.json")
    result = call("nll", workdir, num_images=10, batch_size=4, out=out)
    run = runs.load(workdir, allow_code=True)
    images = data.load("digits", split="test")
    bound = run.method.bound
    index = data.choose(len(images), 10)
    batch = {"image": images.images[index], "label": images.labels[index], "index": index}
    by_hand = parallel.map_examples(
        lambda params, key, image, label, index: bound(
            params, key, {"image": image, "label": label, "index": index}
        )
    )(parallel.place(run.params), training.make_keys(0).evaluate, *batch.values())
    total = by_hand["L_T"].astype(np.float64) + by_hand["terms"].sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(result.scalars["total"], total, rtol=1e-5)

    with open(out, encoding="utf-8") as file:
        written = json.load(file)
    assert written["num_images"] == 10 and written["recipe"]["split"] == "test"
    assert written["total"] == pytest.approx(total.mean(), rel=1e-5)
    assert written["total_stderr"] == pytest.approx(total.std(ddof=1) / np.sqrt(10), rel=1e-3)
    np.testing.assert_allclose(
        written["curves"]["terms"], by_hand["terms"].mean(axis=0), rtol=1e-4, atol=1e-6
    )
    assert written["curves"]["timesteps"] == list(range(20))
    recipe = written["recipe"]
    assert recipe["variance"] == "fixed_large" and recipe["clip_x0"] is True
    assert recipe["weights"] == "ema" and recipe["step"] == 2 and recipe["cdf"] == "normal"
    assert (tmp_path / "result.png").exists() and not list(tmp_path.glob("*.partial"))
    lines = capsys.readouterr().out.splitlines()
    assert any(
        f"{written['total']:.4f} ± {written['total_stderr']:.4f} bits/dim" in x for x in lines
    )
    assert any("image 4/10" in line and "left" in line for line in lines)


@pytest.mark.usefixtures("no_pictures")
def test_an_interruption_loses_nothing_and_more_images_go_on(workdir, tmp_path, monkeypatch):
    def measure(name, num_images):
        out = str(tmp_path / f"{name}.json")
        return call("nll", workdir, num_images=num_images, batch_size=4, steps=5, out=out)

    whole, calls = measure("whole", 12), []
    add = bound._Tally.add

    def killed_at_the_third(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return add(*args)

    monkeypatch.setattr(bound._Tally, "add", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        measure("killed", 12)
    assert not (tmp_path / "killed.json").exists()
    calls.clear()
    again = measure("killed", 12)
    assert len(calls) == 1  # only what was missing
    calls.clear()
    measure("grown", 8)
    monkeypatch.setattr(bound._Tally, "add", add)
    for other in (again, measure("grown", 12)):
        for name in whole.scalars:
            np.testing.assert_array_equal(other.scalars[name], whole.scalars[name])
        for name in whole.curves:
            np.testing.assert_array_equal(other.curves[name], whole.curves[name])


@pytest.mark.usefixtures("no_pictures")
def test_image_i_depends_on_the_seed_and_i_alone(workdir, tmp_path):
    def total(name, **options):
        out = str(tmp_path / f"{name}.json")
        return call("nll", workdir, steps=5, out=out, **options).scalars["total"]

    whole = total("a", num_images=8, batch_size=8)
    np.testing.assert_allclose(total("b", num_images=5, batch_size=3), whole[:5], rtol=1e-5)
    assert (total("c", num_images=8, seed=1) != whole).all()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_the_analytic_variance_is_measured_once_and_serves_sampling_too(workdir, capsys):
    with pytest.raises(RunError, match=r"--variance=analytic .*--steps=5") as error:
        call("sample", workdir, num_samples=2, variance="analytic", steps="5")
    assert workdir in str(error.value)
    analytic = call("nll", workdir, num_images=8, steps="5", variance="analytic")
    origin = analytic.recipe["x_0_error"]
    assert origin["split"] == "train" and origin["num_images"] == bound.ERROR_IMAGES
    assert "(errors measured on 64 training images)" in capsys.readouterr().out
    there = {"num_images": 64, "steps": 5, "split": "train"}  # the images that it was measured on
    others = [call("nll", workdir, variance=v, **there) for v in ("fixed_small", "fixed_large")]
    best = call("nll", workdir, variance="analytic", **there)
    for other in others:
        assert best.curves["terms"][1:].sum() < other.curves["terms"][1:].sum()
    capsys.readouterr()
    call("nll", workdir, num_images=12, steps=5, variance="analytic")  # more images, same errors
    assert "compiling" not in capsys.readouterr().out.partition("digits/test")[0]

    with np.load(call("sample", workdir, num_samples=2, variance="analytic", steps="5")) as file:
        recipe = json.loads(str(file["recipe"]))
    assert recipe["x_0_error"] == origin
    for other in ({"clip_x0": "dynamic"}, {"guidance": 2.0}):  # errors of another model
        with pytest.raises(RunError, match="leave out --guidance and --clip=dynamic"):
            call("sample", workdir, num_samples=2, variance="analytic", steps="5", **other)


def test_rate_and_distortion_of_the_measured_curves(workdir, tmp_path, capsys):
    out = str(tmp_path / "x.json")
    result = call("rate_distortion", workdir, num_images=4, out=out)
    rate, rmse = likelihood.rate_distortion(
        result.curves["terms"], result.scalars["L_T"].mean(), result.curves["x_0_error"]
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {n}" for n in range(20, 0, -2)]
    assert rows[0] == f"| 20 | {rate[19]:.5f} | {rmse[19]:.5f} |"
    total = result.scalars["total"].mean()
    assert rate[-1] + result.curves["terms"][0] == pytest.approx(total, rel=1e-5)
    assert (tmp_path / "x_rate_distortion.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_the_best_steps_beat_even_spacing(workdir, tmp_path, capsys):
    out = tmp_path / "best.json"
    tau = call("best_steps", workdir, steps="4", num_images=16, out=str(out))
    assert len(tau) == 4 and tau[0] == 0 and tau[-1] == 19
    summary = json.loads(out.read_text())
    assert summary["gain"] == pytest.approx(summary["even"] - summary["best"], abs=1e-9)
    assert summary["gain"] > 0 and summary["num_images"] == 16
    capsys.readouterr()
    text = json.dumps(summary["steps"])  # as it is typed on the command line: nothing is left to do
    again = call("nll", workdir, steps=text, num_images=16)
    assert "image 16/16" not in capsys.readouterr().out
    assert again.chain.times.tolist() == tau.tolist()
    assert again.scalars["total"].mean() == pytest.approx(summary["best"], abs=1e-9)


def test_the_progressive_strip_ends_at_the_sample(workdir, tmp_path):
    out = str(tmp_path / "strip.npz")
    with np.load(call("progressive", workdir, num_samples=3, out=out)) as file:
        strip = dict(file)
    with np.load(call("sample", workdir, num_samples=3, out=str(tmp_path / "images.npz"))) as file:
        images = file["images"]
    np.testing.assert_array_equal(strip["images"], images)
    assert strip["t"].tolist() == np.round(np.linspace(19, 0, 12)).tolist()
    assert strip["x_0"].shape == strip["x_t"].shape == (3, 12, 8, 8, 1)
    np.testing.assert_array_equal(strip["x_0"][:, -1], images)  # μ̃ at the last step is x̂_0
    assert 0.8 < strip["x_t"][:, 0].std() < 1.2  # it began as noise
    assert (tmp_path / "strip.png").exists()
    with pytest.raises(RunError, match="other settings"):
        call("progressive", workdir, num_samples=3, out=str(tmp_path / "images.npz"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": "21"}, "21 of 20 steps"),
        ({"steps": "[0,3,3]"}, "increase strictly"),
        ({"steps": "[0,3"}, "cannot read"),
        ({"steps": "[[0,1],[3]]"}, "whole numbers"),
        ({"steps": "0"}, "choose 1 to 20"),
        ({"variance": "learned_range"}, "trained with 'fixed_large'"),
        ({"variance": "analytik"}, "did you mean 'analytic'"),
        ({"cdf": "logistic"}, "normal or tanh"),
        ({"split": "validation"}, "it has train, test"),
        ({"num_images": 298}, "298 images requested, but .* has 297"),
        ({"out": "x.npz"}, "must end in .json"),
        ({"out": "/not/there/x.json"}, "there is no folder /not/there"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_refusals(workdir, options, words):
    errors = (ConfigError, data.DataError, RunError)
    with pytest.raises(errors, match=words) as error:
        call("nll", workdir, **({"num_images": 4} | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", ["1", "21", "ddim5", "five"])
def test_best_steps_needs_a_number_of_steps(workdir, steps):
    with pytest.raises(ConfigError, match=r"choose"):
        call("best_steps", workdir, steps=steps, num_images=4)


@pytest.mark.usefixtures("no_pictures")
def test_another_recipe_does_not_overwrite(workdir, tmp_path):
    out = str(tmp_path / "x.json")
    call("nll", workdir, num_images=4, steps=5, out=out)
    before = (tmp_path / "x.json").read_text()
    with pytest.raises(RunError, match="other settings"):
        call("nll", workdir, num_images=4, steps=4, out=out)
    assert (tmp_path / "x.json").read_text() == before


@pytest.mark.parametrize("mode", ["nll", "best_steps"])
def test_only_a_result_is_overwritten(workdir, mode):
    config = f"{workdir}/config.json"
    with open(config, encoding="utf-8") as file:
        before = file.read()
    with pytest.raises(RunError, match="not the result of an evaluation"):
        call(mode, workdir, num_images=4, steps=5, out=config)
    with open(config, encoding="utf-8") as file:
        assert file.read() == before


@pytest.mark.parametrize("name", ["x.npz", "x.npz.partial/tally.npz", "x.npz.partial/recipe.json"])
def test_damaged_files_are_one_line(workdir, tmp_path, name):
    if name.endswith("tally.npz"):  # beside the recipe of an interrupted measurement
        add = bound._Tally.add

        def killed_after_the_first(*args):
            add(*args)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(bound._Tally, "add", killed_after_the_first)
            call("nll", workdir, num_images=4, steps=5, out=str(tmp_path / "x.json"))
    for content in (b"", b"PK\x03\x04 cut"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RunError, match="cannot be read") as error:
            call("nll", workdir, num_images=4, steps=5, out=str(tmp_path / "x.json"))
        assert "\n" not in str(error.value)


def test_another_model_with_the_same_weights_is_another_recipe(workdir, tmp_path):
    out = str(tmp_path / "x.json")
    call("nll", workdir, num_images=4, steps=5, out=out)
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    call("nll", str(copy), num_images=4, steps=5, out=out)  # where a run lies changes nothing
    config = config_lib.load(copy / "config.json")
    config.schedule.end = 0.4
    config_lib.save(config, copy / "config.json")
    with pytest.raises(RunError, match="other settings"):
        call("nll", str(copy), num_images=4, steps=5, out=out)


def test_labels_that_the_model_does_not_know_are_refused(workdir):
    dataset = data.load("digits", split="test")
    method = types.SimpleNamespace(num_classes=10)
    run_data.check_classes(method, dataset)
    unlabelled = dataclasses.replace(dataset, labels=np.full(len(dataset), -1))
    with pytest.raises(data.DataError, match=r"297 of 297 images have no label"):
        run_data.check_classes(method, unlabelled)


def test_a_method_without_a_bound_says_so(tmp_path):
    loop.train(affine_config(num_steps=1), tmp_path)
    with pytest.raises(RunError, match=r"affine .* no method `bound`"):
        call("nll", str(tmp_path))
    with pytest.raises(RunError, match=r"affine .* no method `bound`"):
        call("best_steps", str(tmp_path), steps=5)


def test_streams_of_a_seed_do_not_move_when_one_is_added():
    old = jax.random.key_data(jax.random.split(jax.random.key(3), 4))
    keys = jax.random.key_data(jax.numpy.stack(training.make_keys(3)))
    np.testing.assert_array_equal(keys[:4], old)
