"""experiments/one_page.py gives the same losses and samples as the library on the same keys."""

import pathlib

import jax
import numpy as np
import pytest

import ddpm_jax as dj
from ddpm_jax.experiments import one_page

pytestmark = pytest.mark.slow


def test_losses_and_samples_are_those_of_the_library():
    schedule = dj.linear_schedule(one_page.T)
    model = dj.DDPM(schedule=schedule, network=one_page.NETWORK, image_shape=one_page.SHAPE)
    params = model.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.01, params)  # whose prediction is not 0
    images = np.random.default_rng(0).integers(0, 256, (6, *one_page.SHAPE), np.uint8)
    index, key = np.arange(6), jax.random.key(3)
    batch = {"image": images, "label": index, "index": index, "position": index / np.float32(6)}
    loss, _, _ = jax.jit(model.loss_fn)(params, (), key, batch)
    np.testing.assert_allclose(
        jax.jit(one_page.losses)(params, key, images, index), loss, rtol=1e-5
    )
    x = jax.jit(one_page.sample, static_argnums=2)(params, key, 2)
    known = jax.jit(model.sample)(params, key, np.arange(2), np.zeros(2, np.int32))
    np.testing.assert_allclose(x, known, atol=1e-4)


def test_it_is_one_page_without_the_library():
    text = pathlib.Path(one_page.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100 and "import ddpm_jax" not in text
    assert "from ddpm_jax" not in text
