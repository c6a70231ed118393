"""The library: training, sampling and bounds in a few lines, on arrays, without flags."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny

import ddpm_jax as dj
from ddpm_jax.data import DataError
from ddpm_jax.options import ConfigError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 8, 8, 1), np.uint8)


def make_model(**fields):
    schedule = dj.linear_schedule(20, end=0.5)
    return dj.DDPM(schedule=schedule, network=tiny.Network(), image_shape=(8, 8, 1), **fields)


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
    with pytest.raises(DataError, match="3 classes and the labels have 0"):
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
