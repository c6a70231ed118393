"""The classifier learns, its file is verified, and the features of an image do not depend on the batch."""

import json
import os
import shutil

import numpy as np
import pytest

from ddpm_jax import data, metrics
from ddpm_jax.commands import metrics as metrics_commands
from ddpm_jax.experiments import feature_classifier
from ddpm_jax.files.run_data import RunError

pytestmark = pytest.mark.slow

DIGITS = data.load("digits", split="test").images


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The result of 60 steps on digits: the file, the accuracy and the printed lines."""
    path = str(tmp_path_factory.mktemp("classifier") / "digits.npz")
    accuracy = feature_classifier.train("digits", out=path, num_steps=60, batch_size=64)
    return path, accuracy


@pytest.fixture(scope="module")
def extractor(trained):
    return feature_classifier.load(trained[0])


def test_it_learns_and_says_so(trained):
    path, accuracy = trained
    assert accuracy > 0.8  # of ten classes
    with np.load(path) as file:
        recipe = json.loads(str(file["recipe"]))
    expected = {"data": "digits", "split": "train", "seed": 0, "num_steps": 60, "batch_size": 64}
    assert expected.items() <= recipe.items() and "jax" in recipe["software"]
    assert recipe["test_accuracy"] == accuracy and recipe["image_shape"] == [8, 8, 1]


def test_the_file_gives_back_what_was_measured(trained, extractor):
    features, logits = extractor.features(DIGITS)
    assert features.dtype == logits.dtype == np.float32
    assert features.shape == (297, 64) and logits.shape == (297, 10)
    labels = data.load("digits", split="test").labels
    assert np.mean(np.argmax(logits, axis=1) == labels) == trained[1]
    assert (features.std(axis=0) > 0).all()
    assert extractor.name == "digits_classifier" and extractor.resize == "none"
    assert len(extractor.sha256) == 64 and isinstance(extractor, metrics.Extractor)
    again = feature_classifier.load(trained[0])
    assert again.sha256 == extractor.sha256
    np.testing.assert_array_equal(again.features(DIGITS)[0], features)


def test_its_features_tell_digits_from_noise(extractor):
    def frechet(a, b):
        a, b = (metrics.moments(extractor.features(images)[0]) for images in (a, b))
        return metrics.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

    noise = np.random.default_rng(0).integers(0, 256, DIGITS.shape).astype(np.uint8)
    assert frechet(DIGITS[:148], noise) > 5 * frechet(DIGITS[:148], DIGITS[148:])


def test_the_images_of_a_batch_do_not_see_each_other(extractor):
    features, logits = extractor.features(DIGITS)  # in two chunks, the second with padding
    for rows in (slice(1), slice(5, 6), slice(250, 262), slice(None, None, -1)):
        alone = extractor.features(DIGITS[rows])
        np.testing.assert_array_equal(alone[0], features[rows])
        np.testing.assert_array_equal(alone[1], logits[rows])
    changed = DIGITS.copy()
    changed[1:] = 255
    np.testing.assert_array_equal(extractor.features(changed)[0][0], features[0])
    assert (extractor.features(changed)[0][1] != features[1]).any()


def test_training_is_a_function_of_the_seed(tmp_path):
    def sha256(seed):
        path = str(tmp_path / "x.npz")
        feature_classifier.train("digits", out=path, seed=seed, num_steps=3, batch_size=16)
        return feature_classifier.load(path).sha256

    assert sha256(1) == sha256(1) != sha256(2)


# ---- what is refused -------------------------------------------------------------------------------


def refused(ask) -> str:
    with pytest.raises(RunError) as info:
        ask()
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 28, 28, 1), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        DIGITS[:0],
        DIGITS / 255,
    ],
)
def test_other_images_are_refused(images, extractor):
    line = refused(lambda: extractor.features(images))
    assert "takes uint8 [B, 8, 8, 1]" in line and str(list(images.shape)) in line


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path):
    """One flipped bit of a weight in an intact file, which only the digest detects."""
    with np.load(path) as file:
        arrays = dict(file)
    kernel = arrays["Dense_0/kernel"].copy()
    kernel.view(np.uint32)[3, 3] ^= 1
    np.savez(path, **arrays | {"Dense_0/kernel": kernel})


def drop(path):
    with np.load(path) as file:
        np.savez(path, **{name: file[name] for name in file.files if name != "Dense_1/bias"})


def other(path):
    np.savez(path, images=DIGITS)


def no_recipe(path):
    np.savez(path, recipe=json.dumps([1, 2]))


@pytest.mark.parametrize("damage", [cut, flip, drop, other, no_recipe])
def test_a_damaged_file_is_refused(damage, trained, tmp_path):
    path = tmp_path / "x.npz"
    shutil.copy(trained[0], path)
    feature_classifier.load(str(path))
    damage(path)
    line = refused(lambda: feature_classifier.load(str(path)))
    assert str(path) in line and "damaged" in line and feature_classifier.COMMAND in line


def test_a_missing_file_is_refused_with_the_command_that_makes_it(tmp_path):
    line = refused(lambda: feature_classifier.load(str(tmp_path / "no.npz")))
    assert line.endswith(f"--data=NAME --out={tmp_path}/no.npz")


def test_a_tilde_is_the_home_directory(trained, monkeypatch):
    monkeypatch.setenv("HOME", os.path.dirname(trained[0]))
    of = metrics_commands.load_extractor("experiments.feature_classifier:~/digits.npz")
    assert of.sha256 == feature_classifier.load("~/digits.npz").sha256


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--data=cifar10", "--out=x.npz"], "cifar10"),
        (["--data=digits"], "--out"),
        (["--data=digits", "--out=x.txt"], "must end in .npz, got x.txt"),
        (["--data=digits", "--out=not/there/x.npz"], "there is no folder"),
        (["--data=digits", "--out=x.npz", "--steps=0"], "got 0 and 0"),
        (["--data=digits", "--out=x.npz", "--seed=-1"], "got 4000 and -1"),
        (["--data=digits", "--out=x.npz", "--step=5"], "--step=5"),
        (["--data=digits", "--out=/dev/null/x.npz"], "/dev/null"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit:
        feature_classifier.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith("error: ") and said in line


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a fresh clone, without a folder of runs
    path = "runs/digits.npz"
    feature_classifier.main(["--data=digits", f"--out={path}", "--steps=2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits/train: 1500 images")
    assert any("step 2/2" in line and "images/s" in line and "left" in line for line in lines)
    assert lines[-1].startswith("test accuracy ") and lines[-1].endswith(path)
    assert feature_classifier.load(path).name == "digits_classifier"
