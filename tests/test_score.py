"""Metrics as a command: the compared images, the names, the saved results, and the errors."""

import json
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from running import call
from test_train import make_config

from ddpm_jax import data, metrics
from ddpm_jax.commands import metrics as metrics_commands
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import results
from ddpm_jax.files.run_data import RunError
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop

pytestmark = pytest.mark.slow

TRAIN = data.load("digits").images


def features(images):
    """Pixels of every second row and column, and their mean of each half as two logits."""
    flat = images[:, ::2, ::2].reshape(len(images), -1) / 255.0
    return flat.astype(np.float32), np.stack([flat[:, :8].sum(1), flat[:, 8:].sum(1)], 1)


@pytest.fixture(scope="module", autouse=True)
def pixels():
    """A module that --features can name."""
    module = types.ModuleType("pixels")
    module.load = lambda path: metrics.Extractor("pixels", f"{path:0<64}", "none", features)
    sys.modules["pixels"] = module
    yield
    del sys.modules["pixels"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    loop.train(make_config(num_steps=3), folder)
    return str(folder)


def of(images, **options):
    return call("eval", images=str(images), features="pixels:1", **options)


def save(path, images):
    np.savez(path, images=images)
    return path


def test_the_data_are_no_distance_from_themselves_and_halves_are(workdir, tmp_path):
    same = of(save(tmp_path / "same.npz", TRAIN), workdir=workdir, metrics="fid,kid,prdc")
    assert abs(same["pixels_fid_1500"]["mean"]) < 1e-6
    assert same["pixels_precision"]["mean"] == same["pixels_coverage"]["mean"] == 1
    turned = of(save(tmp_path / "turned.npz", TRAIN[::-1]), workdir=workdir)
    assert abs(turned["pixels_fid_1500"]["mean"]) < 1e-6  # the order does not matter
    half = of(save(tmp_path / "half.npz", TRAIN[::2]), workdir=workdir)
    assert half["pixels_fid_750"]["mean"] > 1e-3


def test_numbers_are_those_of_the_features_and_carry_what_moved_them(workdir, capsys):
    given = {"features": "pixels:1", "num_samples": 40, "metrics": "fid,is"}
    found = call("eval", workdir, num_seeds=2, **given)
    entry = found["pixels_fid_40"]
    values = []
    reference = metrics.moments(features(TRAIN)[0])
    for seed in (0, 1):
        images = results.read_npz(call("sample", workdir, num_samples=40, seed=seed))["images"]
        drawn = metrics.moments(features(images)[0])
        pairs = (drawn.mean, drawn.covariance, reference.mean, reference.covariance)
        values.append(metrics.frechet_distance(*pairs))
    np.testing.assert_allclose(entry["values"], values, rtol=1e-9)
    assert entry["mean"] == pytest.approx(np.mean(values))
    assert entry["std"] == pytest.approx(np.std(values, ddof=1)) and entry["seeds"] == [0, 1]
    manifest = entry["manifest"]
    assert manifest["num_generated"] == 40 and manifest["features"]["sha256"].startswith("1")
    assert manifest["reference"]["num_images"] == 1500
    assert manifest["reference"]["split"] == "train" and "jax" in manifest["software"]
    assert manifest["generated"]["step"] == 3 and manifest["generated"]["spread"] == 0.1
    printed = capsys.readouterr().out.splitlines()
    row = next(line for line in printed if line.startswith("pixels_fid_40 "))
    assert "±" in row and "2 seeds" in row and row.endswith("[1]")
    [said] = (line for line in printed if line.startswith("["))  # one set of settings for all rows
    for words in ("40 images", "1500 of digits/train", "ema weights of step 3", "uint8"):
        assert words in said


def test_the_same_again_computes_no_features(workdir, monkeypatch):
    given = {"features": "pixels:1", "num_samples": 30}
    first = call("eval", workdir, **given)
    monkeypatch.setattr(metrics_commands, "_extract", None)
    assert call("eval", workdir, **given) == first


def test_features_continue_where_they_were_left(workdir, tmp_path, monkeypatch):
    path = save(tmp_path / "x.npz", TRAIN[:1100])
    whole = of(path, workdir=workdir)
    append, calls = results.GrowingFile.append, []

    def killed(self, rows):
        append(self, rows)
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(results.GrowingFile, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        call("eval", workdir, images=str(path), features="pixels:2")
    other = call("eval", workdir, images=str(path), features="pixels:2")
    assert calls[:2] == [250, 250] and sum(calls) == 1100 + 1500
    assert other["pixels_fid_1100"]["values"] == whole["pixels_fid_1100"]["values"]


MINE = """
import numpy as np
from ddpm_jax.metrics import Extractor

def one(generated): return {"a": 1.0}
def nothing(generated, reference): pass
def number(generated, reference): return 3.0
def words(generated, reference): return {"a": "b"}

def load(path):
    one = lambda images: np.zeros((len(images), 4))
    return None if path == "none" else Extractor("mine", "0" * 64, "none", one)
"""


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"metrics": "my_score:one"}, ConfigError, "must take .generated, reference"),
        ({"metrics": "my_score:nothing"}, ConfigError, "my_score.py. returns None, and must ret"),
        ({"metrics": "my_score:number"}, ConfigError, "returns 3.0, and must return .name: num"),
        ({"metrics": "my_score:words"}, ConfigError, "returns {'a': 'b'}, and must return"),
        ({"features": "my_score:none"}, RunError, "returns NoneType, and must return an Extr"),
        ({"features": "my_score:x"}, RunError, "must return features .B, D. and logits .B, K"),
    ],
)
def test_mistakes_in_a_metric_of_ones_own(workdir, options, error, words, tmp_path, monkeypatch):
    (tmp_path / "my_score.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(error, match=words):
        call("eval", workdir, **{"features": "pixels:1", "num_samples": 4, **options})


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"metrics": "fidd"}, ConfigError, "did you mean 'fid'"),
        ({"features": "nowhere:x"}, RunError, "no module 'nowhere'"),
        ({"features": "math"}, RunError, "with a load"),
        ({"features": "inception:nowhere.pth"}, data.DataError, "nowhere.pth"),
        ({"num_samples": 3, "metrics": "prdc"}, ConfigError, "needs at least"),
        ({"images": "nowhere.npz"}, data.DataError, "nowhere.npz"),
        ({"out": "x.txt"}, RunError, "must end in .json"),
        ({"out": "/not/there/x.json"}, RunError, "there is no folder /not/there"),
        ({"sampler": "ddim"}, ConfigError, "sampler is for diffusions"),
        ({"images": "x.npz", "spread": 0.2}, RunError, "--spread is for samples"),
        ({"metrics": "nll", "num_seeds": 2}, RunError, "num_samples|num_seeds"),
    ],
)
def test_refusals(workdir, options, error, words):
    with pytest.raises(error, match=words) as caught:
        count = {} if "images" in options else {"num_samples": 30}
        call("eval", workdir, **{"features": "pixels:1", **count, **options})
    assert "\n" not in str(caught.value)


def test_images_of_another_size(workdir, tmp_path):
    path = save(tmp_path / "large.npz", np.zeros((9, 10, 10, 1), np.uint8))
    with pytest.raises(data.DataError, match="10×10×1"):
        of(path, workdir=workdir)


def test_a_run_without_a_checkpoint(tmp_path):
    config_lib.save(make_config(), tmp_path / "config.json")
    with pytest.raises(RunError, match="no checkpoint"):
        call("eval", str(tmp_path), features="pixels:1")


def test_nll_is_among_them(tmp_path):
    config = make_config(num_steps=3, method="tiny", schedule__num_timesteps=12)
    config.schedule.update(name="linear", end=0.5)
    config.preview = ConfigDict({"every": 100, "num_images": 2, "steps": "3"})
    loop.train(config, tmp_path)
    result = call("eval", str(tmp_path), metrics="nll", num_images=5)
    (path,) = (tmp_path / "eval").glob("*nll_test*.json")
    there = json.loads(path.read_text())
    assert result["nll_bits_per_dim"]["mean"] == pytest.approx(there["total"])
    assert result["nll_bits_per_dim"]["manifest"]["num_images"] == 5
