"""The library: training, sampling and bounds in a few lines, on arrays, without flags."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

import ddpm_jax as dj
from ddpm_jax.data import DataError
from ddpm_jax.options import ConfigError
from ddpm_jax.process import predictions
from ddpm_jax.process.time_sampling import Importance, TimeSampler
from ddpm_jax.training.guards import TrainingError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 8, 8, 1), np.uint8)


@dataclasses.dataclass(frozen=True)
class Late(TimeSampler):
    first: int = 10

    def draw(self, schedule, state, key, keys, position):
        return np.full(len(keys), self.first, np.int32), np.ones(len(keys), np.float32)


def make_model(**fields):
    schedule = dj.linear_schedule(20, end=0.5)
    return dj.DDPM(schedule=schedule, network=tiny.Network(), image_shape=(8, 8, 1), **fields)


@pytest.mark.slow
def test_from_images_to_samples_and_back_from_the_run(tmp_path):
    model, workdir = make_model(), str(tmp_path / "run")
    state = dj.fit(model, IMAGES, num_steps=4, batch_size=8, workdir=workdir)
    x = dj.sample(model, state.ema_params, 5, sampler=dj.DDIM(eta=0.0), steps=5, seed=3)
    assert x.shape == (5, 8, 8, 1) and x.dtype == np.uint8
    assert x._repr_png_().startswith(b"\x89PNG") and x[0]._repr_png_() is None
    bits = dj.bits_per_dim(model, state.ema_params, IMAGES[:7])
    assert bits.total.shape == (7,) and bits.mean == pytest.approx(bits.total.mean())
    assert bits.terms.sum() + bits.L_T.mean() == pytest.approx(bits.mean, rel=1e-5)
    for run in (dj.load(workdir, allow_code=True), dj.load(workdir, model=model)):
        again = run.sample(5, sampler=dj.DDIM(), steps=5, seed=3, batch_size=2)
        np.testing.assert_array_equal(again, x)
        assert run.bits_per_dim(IMAGES[:7]).mean == pytest.approx(bits.mean, rel=1e-5)
        np.testing.assert_array_equal(run.method.schedule.alpha, model.schedule.alpha)
    longer = dj.fit(model, IMAGES, num_steps=6, batch_size=8, workdir=workdir, ema_decay=0.5)
    assert int(longer.step) == 6


def test_without_a_directory_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = dj.fit(make_model(), IMAGES, num_steps=3, batch_size=8)
    assert int(state.step) == 3 and not list(tmp_path.iterdir())


def test_with_labels():
    schedule, labels = dj.linear_schedule(20, end=0.5), np.arange(50) % 3
    network = tiny.Network(num_classes=3)
    model = dj.DDPM(schedule=schedule, network=network, image_shape=(8, 8, 1), label_dropout=0.1)
    state = dj.fit(model, IMAGES, labels=labels, num_steps=2, batch_size=8)
    x = dj.sample(model, state.params, 4, labels=[2], guidance=2.0, steps=3)
    assert x.shape == (4, 8, 8, 1)
    with pytest.raises(DataError, match="has 3 classes; give labels="):
        dj.fit(model, IMAGES, num_steps=2)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"smapler": dj.DDIM()}, "did you mean 'sampler'"),
        ({"steps": 21}, "21 of 20"),
        ({"guidance": 2.0}, "label_dropout"),
        ({"seed": -1}, "seed must lie"),
        ({"sampler": "ddmi"}, "did you mean 'ddim'"),
    ],
)
def test_mistakes_are_one_line(options, words):
    model = make_model()
    with pytest.raises(ConfigError, match=words):
        dj.sample(model, None, 2, **options)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="the model is for"):
        dj.fit(make_model(), IMAGES[:, :4], num_steps=1)
    with pytest.raises(DataError, match="uint8"):
        dj.fit(make_model(), IMAGES / 255.0, num_steps=1)


def test_the_default_network_fits_any_size():
    for shape in ((28, 28, 1), (32, 32, 3), (64, 64, 3)):
        network = dj.UNet(channels=32)
        network.check(shape)
        assert network.groups == 8 and network.attended(shape)[0] <= 16


def test_every_public_name_is_there_and_nothing_heavy_is_imported_before():
    code = (
        "import sys, ddpm_jax as dj; heavy = {'jax', 'flax', 'orbax', 'numpy'} & set(sys.modules);"
        " assert not heavy, heavy; assert {'fit', 'DDPM'} < set(dir(dj));"
        " [getattr(dj, name) for name in dj.__all__];"
        " from jax._src import xla_bridge; assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
    with pytest.raises(AttributeError, match="no attribute 'DDIMM'"):
        dj.DDIMM  # noqa: B018


def tiny_model(**changes):
    network = tiny.Network(num_classes=changes.pop("classes", 0))
    settings = {"schedule": dj.linear_schedule(20), "network": network, "image_shape": (4, 4, 1)}
    return dj.DDPM(**settings | changes)


def test_a_saved_model_keeps_the_options_of_its_time_sampler(tmp_path):
    pictures = np.zeros((4, 4, 4, 1), np.uint8)
    model = tiny_model(t_sampling=Importance(size=3))
    dj.fit(model, pictures, num_steps=1, batch_size=4, workdir=str(tmp_path / "run"))
    assert dj.load(str(tmp_path / "run"), allow_code=True).method.t_sampling == Importance(size=3)
    other = tiny_model(t_sampling=Importance(size=4))
    with pytest.raises(ConfigError, match=r"diffusion\.size is 3 there and 4 here"):
        dj.fit(other, pictures, num_steps=2, batch_size=4, workdir=str(tmp_path / "run"))


def test_a_fit_can_be_continued_for_longer(tmp_path):
    pictures = np.zeros((4, 4, 4, 1), np.uint8)
    for num_steps in (2, 60):  # whose own defaults of warmup_steps and ema_decay would differ
        state = dj.fit(
            tiny_model(), pictures, num_steps=num_steps, batch_size=4, workdir=str(tmp_path / "run")
        )
        assert int(state.step) == num_steps


def test_a_refused_resume_does_not_print_whole_tables(tmp_path):
    pictures = np.zeros((4, 4, 4, 1), np.uint8)
    dj.fit(tiny_model(), pictures, num_steps=1, batch_size=4, workdir=str(tmp_path / "run"))
    other = tiny_model(schedule=dj.linear_schedule(19))
    with pytest.raises(ConfigError) as caught:
        dj.fit(other, pictures, num_steps=2, batch_size=4, workdir=str(tmp_path / "run"))
    assert "… 20 in all" in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "call, expected",
    [
        (
            lambda m, p: dj.sample(m, p, 0),
            "num_samples must be a whole number of at least 1, got 0",
        ),
        (lambda m, p: dj.sample(m, p, 2, batch_size=-1), "batch_size must be a whole number"),
        (lambda m, p: dj.bits_per_dim(m, p, ZEROS), "has 3 classes; give labels="),
        (lambda m, p: dj.bits_per_dim(m, p, ZEROS, labels=[0, 3]), "labels must be 0 to 2.*got 3"),
        (
            lambda m, p: dj.bits_per_dim(m, p, np.zeros((2, 8, 8, 1), np.uint8), labels=[0, 1]),
            r"images are \(8, 8, 1\), and the model is for \(4, 4, 1\)",
        ),
        (lambda m, p: dj.fit(m, ZEROS, num_steps=1.5), "num_steps must be a whole number"),
        (lambda m, p: dj.fit(m, ZEROS, num_steps=-1), "num_steps must be a whole number"),
        (lambda m, p: dj.sample(m, p, 2, labels=None), r"cannot read labels=\[None\]"),
        (lambda m, p: dj.sample(m, p, 2, labels=[0.5]), r"cannot read labels=\[0.5\]"),
        (lambda m, p: dj.sample(m, p, 2, seed=1.5), "seed must lie in 0 … .*, got 1.5"),
        (lambda m, p: dj.sample(m, p, 2, steps=3.0), "steps must be text or a whole number"),
        (
            lambda m, p: dj.sample(m, p, 2, sampler=dj.Ancestral(), eta=0.2),
            "eta is an option of sampler 'ddim', and 'ancestral' has none",
        ),
        (
            lambda m, p: dj.fit(m, ZEROS, labels=[0, 2], num_steps=1, batch_size=4, ema_decay=2),
            r"ema_decay must lie in \[0, 1\), got 2",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(call, expected):
    model = tiny_model(classes=3)
    with pytest.raises((ConfigError, DataError), match=expected) as caught:
        call(model, model.init(jax.random.key(0)))
    assert "\n" not in str(caught.value)


ZEROS = np.zeros((2, 4, 4, 1), np.uint8)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"schedule": "linear"}, "must be a Schedule, such as dj.linear_schedule"),
        ({"network": dj.UNet}, r"must be an instance, such as UNet\(\)"),
        ({"image_shape": (4, 4)}, r"image_shape must be \(H, W, C\)"),
        ({"image_shape": 4}, r"image_shape must be \(H, W, C\)"),
        ({"t_sampling": "importanc"}, "did you mean 'importance'"),
        ({"t_sampling": Late(first=20)}, "t, int32 .* in 0 … 19.* it returns t from 20 to 20"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(changes, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        tiny_model(**changes)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    model = tiny_model(t_sampling="importance", image_shape=tuple(np.array([4, 4, 1])))
    params = model.init(jax.random.key(0))
    expected = dj.sample(model, params, 2, sampler="ddim", eta=0.5, steps=(0, 5, 10, 15))
    for steps in (np.arange(0, 20, 5), range(0, 20, 5), [0, 5, 10, 15], "[0,5,10,15]"):
        for sampler in ({"sampler": dj.DDIM(), "eta": np.float32(0.5)}, HALF):
            x = dj.sample(model, params, 2, steps=steps, **sampler)
            np.testing.assert_array_equal(x, expected)


HALF = {"sampler": dj.DDIM(eta=np.float32(0.5))}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"prediction": functools.partial(predictions.edm, data_std=0.25)}, "has no name that"),
        ({"network": tiny.Network(act=np.tanh)}, "has a function as its field 'act'"),
    ],
)
def test_what_config_json_cannot_hold_is_refused_with_a_workdir_only(changes, expected, tmp_path):
    settings = {"num_steps": 1, "batch_size": 4}
    dj.fit(tiny_model(**changes), ZEROS, **settings)
    with pytest.raises(ConfigError, match=expected):
        dj.fit(tiny_model(**changes), ZEROS, **settings, workdir=str(tmp_path / "run"))


def test_a_loss_that_is_not_finite_ends_a_fit_without_files():
    with pytest.raises(TrainingError, match=r"loss is (nan|inf)"):
        dj.fit(tiny_model(), ZEROS, num_steps=60, batch_size=4, learning_rate=1e25, warmup_steps=0)
