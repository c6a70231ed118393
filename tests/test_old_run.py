"""A run directory of version 0.1.0 can be read, gives the same numbers, and its results can be continued.

tests/old_run was made by that version: digits, a network of four channels, T = 20, four steps; without its pictures.
"""

import os
import shutil

import numpy as np
import pytest
from running import call

from ddpm_jax.configs import digits
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import results, runs
from ddpm_jax.training import loop

pytestmark = pytest.mark.slow

OLD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "old_run")
SAMPLES = {
    "step_00000004_raw_seed0": {"num_samples": 2},
    "step_00000004_raw_seed0_eta_0.5_sampler_ddim_steps_5": {
        **{"num_samples": 4, "sampler": "ddim", "eta": 0.5, "steps": "5"}
    },
}


@pytest.fixture
def workdir(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    return str(tmp_path / "run")


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_the_same(name, workdir, tmp_path, capsys):
    path = os.path.join(workdir, "samples", f"{name}.npz")
    before = results.read_npz(path)["images"]
    assert (
        call("sample", workdir, weights="raw", **SAMPLES[name]) == path
    )  # continued, not made anew
    assert f"{len(before)} images with this recipe exist already" in capsys.readouterr().out
    assert not [file for file in os.listdir(os.path.dirname(path)) if "replaced" in file]
    anew = call("sample", workdir, weights="raw", out=str(tmp_path / "x.npz"), **SAMPLES[name])
    difference = results.read_npz(anew)["images"].astype(int) - before.astype(int)
    assert np.abs(difference).max() <= 1  # rounding; equal where jax is compiled as it was then


def test_the_bound_is_the_same(workdir, tmp_path):
    path = os.path.join(workdir, "eval", "step_00000004_raw_nll_test_seed0.npz")
    before = results.read_npz(path)
    assert call("nll", workdir, weights="raw", num_images=3).path == path
    anew = call("nll", workdir, weights="raw", num_images=3, out=str(tmp_path / "x.json"))
    np.testing.assert_allclose(anew.scalars["total"], before["total"], rtol=1e-5)
    np.testing.assert_allclose(anew.curves["terms"], before["curve_terms"], rtol=1e-4, atol=1e-6)


def test_training_goes_on(workdir, capsys):
    config = config_lib.load(os.path.join(workdir, "config.json"))
    assert set(digits.get_config().diffusion) == set(config.diffusion)
    config.training.num_steps = 6
    state = loop.train(config, workdir)
    assert int(state.step) == 6 and "resuming at step 4" in capsys.readouterr().out
    assert runs.load(workdir).step == 6
