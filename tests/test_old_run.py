"""A run directory of every released format can be read, gives the same numbers, and its results can be continued.

tests/old_run was made by version 0.1.0, of format 1; tests/run_of_format_2 by the first version that numbers its formats.
Both: digits, a network of four channels, T = 20, four steps; without their pictures.
"""

import json
import os
import shutil

import numpy as np
import pytest
from running import call

from ddpm_jax import main
from ddpm_jax.configs import digits
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import results, runs
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop

pytestmark = pytest.mark.slow

HERE = os.path.dirname(os.path.abspath(__file__))
DIGESTS = {  # directory: the first digits of SHA-256 of its parameters, and of its model
    "old_run": ("46d687ba86f0fdba", "ce4278302edf9c97"),
    "run_of_format_2": ("26c17fdea8bda123", "ce4278302edf9c97"),
}
SAMPLES = {
    "step_00000004_raw_seed0": {"num_samples": 2},
    "step_00000004_raw_seed0_eta_0.5_sampler_ddim_steps_5": {
        **{"num_samples": 4, "sampler": "ddim", "eta": 0.5, "steps": "5"}
    },
}


@pytest.fixture(params=DIGESTS)
def name_of_run(request):
    return request.param


@pytest.fixture
def workdir(name_of_run, tmp_path):
    shutil.copytree(os.path.join(HERE, name_of_run), tmp_path / "run")
    return str(tmp_path / "run")


def test_every_format_has_a_directory():
    found = set()
    for name in DIGESTS:
        with open(os.path.join(HERE, name, "config.json"), encoding="utf-8") as file:
            found.add(json.load(file).get("format", 1))
    assert found == set(range(1, config_lib.FORMAT + 1))


def test_what_is_loaded_is_the_same_to_the_last_bit(name_of_run, workdir):
    run = runs.load(workdir, weights="raw")
    recipe = run.recipe()
    assert run.step == 4
    assert (recipe["weights_sha256"][:16], recipe["model_sha256"][:16]) == DIGESTS[name_of_run]


@pytest.mark.parametrize("number", [config_lib.FORMAT + 1, 99, "2", 2.0, True, None])
def test_a_newer_format_is_refused_in_one_line(workdir, number, tmp_path, capsys):
    """Whatever its digest, by every command, and nothing is written."""
    path = os.path.join(workdir, "config.json")
    with open(path, encoding="utf-8") as file:
        tree = json.load(file) | {"format": number, "sha256": "of another kind"}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(tree, file)
    before = sorted(os.listdir(workdir))
    words = f"{path} was made by a newer ddpm_jax (format {number}; this one reads up to 2): update"
    for command in (
        ["sample", f"--workdir={workdir}"],
        ["report", f"--workdir={workdir}"],
        ["--config=digits", f"--workdir={workdir}"],
        [f"--config={path}", f"--workdir={tmp_path}/new"],
    ):
        with pytest.raises(SystemExit) as caught:
            main.main(command)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line and caught.value.code == 2
    assert sorted(os.listdir(workdir)) == before and not (tmp_path / "new").exists()


def test_the_number_is_part_of_what_is_checked(tmp_path):
    """It is in the file and not in the config; a changed one is noticed."""
    path = tmp_path / "config.json"
    config_lib.save(digits.get_config(), str(path))
    assert json.loads(path.read_text())["format"] == config_lib.FORMAT
    assert "format" not in config_lib.load(str(path))
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(ConfigError, match="has changed since it was written"):
        config_lib.load(str(path))


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
