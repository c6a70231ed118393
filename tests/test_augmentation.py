"""Random changes of training images: what they show, and that old runs do not notice them."""

import json

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from ddpm_jax import augmentation, data
from ddpm_jax.configs import digits
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import neighbours
from ddpm_jax.method import from_config
from ddpm_jax.options import ConfigError
from ddpm_jax.process.diffusion import from_uint8
from ddpm_jax.training import resume

KEYS = jax.random.split(jax.random.key(0), 300)
IMAGE = np.random.default_rng(0).random((5, 7, 2)).astype(np.float32)  # no symmetry
IMAGES = np.broadcast_to(IMAGE, (300, *IMAGE.shape))


def make_config(**fields):
    config = digits.get_config()
    config.method = "tiny"
    config.data.update(fields)
    return config


def moved(image, down, right, pixels):
    wide = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    top, left = pixels - down, pixels - right
    return wide[top : top + image.shape[0], left : left + image.shape[1]]


@pytest.mark.parametrize("pixels", [1, 2, 3])
def test_every_shift_occurs_and_the_border_is_a_reflection(pixels):
    found = np.asarray(augmentation.augmented(KEYS, IMAGES, shift=pixels))
    steps = range(-pixels, pixels + 1)
    possible = np.array([moved(IMAGE, down, right, pixels) for down in steps for right in steps])
    equal = (found[:, None] == possible[None]).all((2, 3, 4))
    assert (equal.sum(1) == 1).all()  # each image is one of them, exactly
    assert equal.any(0).sum() > 0.95 * len(possible)


def test_a_shift_does_not_change_who_is_mirrored():
    mirrored = np.asarray(augmentation.augmented(KEYS, IMAGES, flip=True))
    both = np.asarray(augmentation.augmented(KEYS, IMAGES, flip=True, shift=2))
    alone = np.asarray(augmentation.augmented(KEYS, IMAGES, shift=2))
    turned = (mirrored != IMAGES).any((1, 2, 3))
    np.testing.assert_array_equal(both[~turned], alone[~turned])
    assert 100 < turned.sum() < 200 and not (both[turned] == alone[turned]).all((1, 2, 3)).any()


def test_an_image_depends_on_its_own_key_only():
    whole = augmentation.augmented(KEYS, IMAGES, flip=True, shift=3)
    some = np.array([250, 3, 77])
    part = augmentation.augmented(KEYS[some], IMAGES[some], flip=True, shift=3)
    np.testing.assert_array_equal(np.asarray(whole)[some], part)


@pytest.mark.parametrize("flip", [True, False])
def test_without_a_shift_the_batch_is_bit_for_bit_that_of_the_flip(flip):
    key, image = (
        jax.random.key(1),
        np.random.default_rng(1).integers(0, 256, (6, 8, 8, 1), np.uint8),
    )
    batch = {"image": image, "label": np.zeros(6, np.int32), "index": np.arange(6, dtype=np.int32)}
    method = from_config(make_config(flip=flip, shift=0))
    expected = from_uint8(image)
    if flip:
        keys = method.example_keys(key, batch)[3]
        expected = augmentation.mirror_at_random(keys, expected)
    np.testing.assert_array_equal(method.shown(key, batch), expected)
    shifted = from_config(make_config(flip=flip, shift=2)).shown(key, batch)
    assert (np.asarray(shifted) != np.asarray(expected)).any()


@pytest.mark.parametrize(
    "shift, said",
    [
        (8, r"config\.data.*shift must lie in 0 … 7 for images 8×8, got 8"),
        (-1, "shift.*at least 0"),
        (1.5, "shift.*whole number"),
    ],
)
def test_an_impossible_shift_is_one_line(shift, said):
    config = make_config()
    with config.data.ignore_type():
        config.data.shift = shift
    with pytest.raises(ConfigError, match=said):
        from_config(config)


def test_runs_older_than_the_field_continue_and_a_shift_is_another_run(tmp_path):
    config = make_config()
    saved = json.loads(config_lib.to_json(config))
    del saved["data"]["shift"], saved["preview"]["nearest"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(saved))
    resume.refuse_another_config(config, str(path))
    with pytest.raises(ConfigError, match=r"config\.data\.shift is .* and 2 here"):
        resume.refuse_another_config(make_config(shift=2), str(path))


def test_the_shift_of_a_config_without_the_field_can_be_given():
    config = make_config()
    with config.data.unlocked():
        del config.data["shift"]
    config_lib.override(config, "data.shift", "2", resume.readers_of)
    assert config.data.shift == 2
    with pytest.raises(ConfigError, match=r"no field config\.data\.keys"):
        config_lib.override(config, "data.keys", "2", resume.readers_of)


# ---- nearest training images -----------------------------------------------------------------------


def test_a_mirrored_and_moved_copy_is_found_only_if_training_made_them():
    images = np.random.default_rng(3).integers(0, 256, (900, 8, 8, 3), np.uint8)
    dataset, original = data.Dataset.from_arrays(images), images[[5, 700]]
    copies = np.array([moved(image[:, ::-1], 1, -2, 2) for image in original])
    _, far = neighbours.nearest_of(copies, dataset, 1)
    index, near = neighbours.nearest_of(copies, dataset, 1, flip=True, shift=2)
    assert index[:, 0].tolist() == [5, 700] and (near < 0.75 * far).all()
    mirrored, upside_down = original[:, :, ::-1], original[:, ::-1]
    assert (neighbours.nearest_of(mirrored, dataset, 1, flip=True)[1] == 0).all()
    assert (neighbours.nearest_of(upside_down, dataset, 1, flip=True)[1] > 50).all()


def test_the_least_distance_is_that_over_all_changes():
    dataset = data.load("synthetic", image_shape=(4, 6, 1))
    queries = np.random.default_rng(2).integers(0, 256, (3, 4, 6, 1), np.uint8)
    changes = [
        moved(image, down, right, 1)
        for query in queries
        for image in (query, query[:, ::-1])
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    ]
    changes = np.array(changes, float).reshape(3, 18, 1, 4, 6, 1)
    expected = np.sqrt(np.mean((changes - dataset.images) ** 2, (3, 4, 5))).min(1)  # [3, N]
    index, distance = neighbours.nearest_of(queries, dataset, 4, flip=True, shift=1)
    np.testing.assert_allclose(distance, np.sort(expected, axis=1)[:, :4], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, index, 1), distance, rtol=1e-5)


def test_the_picture_of_one_training_image(tmp_path):
    """Fewer images than columns: a row has what there is."""
    dataset = data.Dataset.from_arrays(np.full((1, 8, 8, 3), 100, np.uint8))
    samples = np.full((30, 8, 8, 3), 90, np.uint8)
    line = neighbours.save_beside(str(tmp_path / "nearest.png"), samples, dataset, flip=True)
    assert "10.00 on average" in line and (tmp_path / "nearest.png").exists()


def test_a_preview_that_is_neither_on_nor_off():
    from ddpm_jax.training import preview

    method = tiny.make(make_config())
    section = ConfigDict({"every": 1, "num_images": 1, "nearest": "yes"})
    with pytest.raises(ConfigError, match="nearest must be True or False"):
        preview.make_preview(section, method, jax.random.key(0))
