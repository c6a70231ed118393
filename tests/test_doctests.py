"""Every public name has an example in its docstring, and the example is right."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax as dj
from ddpm_jax.files import console
from ddpm_jax.files.progress import Progress

pytestmark = pytest.mark.slow

NAMES = [name for name in dj.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The names that examples may use: a model of 10 steps, trained on images for two steps, in a run directory."""
    network = dj.UNet(channels=8, channel_mults=(1,), num_res_blocks=1, dropout=0.0)
    schedule = dj.linear_schedule(10, end=0.5)
    model = dj.DDPM(schedule=schedule, network=network, image_shape=(8, 8, 1))
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    workdir = str(tmp_path_factory.mktemp("run"))
    state = dj.fit(model, images, num_steps=2, batch_size=4, workdir=workdir)
    values = {"model": model, "images": images, "params": state.ema_params, "workdir": workdir}
    return values | {"dj": dj, "jax": jax, "jnp": jnp, "np": np, "dataclasses": dataclasses}


def run(docstring, name, namespace):
    """The number of examples, and a report on those that fail."""
    example = doctest.DocTestParser().get_doctest(docstring, dict(namespace), name, None, 0)
    report = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
    return len(example.examples), "".join(report)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of(name, shared, monkeypatch):
    monkeypatch.setattr(Progress, "say", lambda *args: None)  # rates differ
    monkeypatch.setattr(console.Log, "__call__", lambda *args, **kwargs: None)
    count, report = run(getattr(dj, name).__doc__, name, shared)
    assert count, f"{name} has no example"
    assert not report, report


def test_a_wrong_output_is_reported():
    assert run(">>> 1 + 1\n2\n", "right", {}) == (1, "")
    assert "Expected:" in run(">>> 1 + 1\n3\n", "wrong", {})[1]
    assert "ZeroDivisionError" in run(">>> 1 / 0\n", "raises", {})[1]
