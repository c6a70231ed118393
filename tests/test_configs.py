"""Every config builds at full size, without computing anything, and has the numbers of its paper."""

import importlib
import os
import pathlib
import textwrap

import jax
import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from ddpm_jax import data, options
from ddpm_jax.files import run_data
from ddpm_jax.files.config import find_file, from_file, override
from ddpm_jax.files.runs import foreign_modules
from ddpm_jax.method import from_config
from ddpm_jax.names import find
from ddpm_jax.process.samplers import SAMPLERS
from ddpm_jax.training import resume
from ddpm_jax.training import step as training

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "variants")


def get_config(name, variant=""):
    return importlib.import_module(f"configs.{name}").get_config(variant)


def trace(config):
    """eval_shape of the whole training step; once for configs that build the same one."""
    parts = {k: config[k] for k in ("model", "schedule", "diffusion", "optimizer", "step")}
    more = (config.method, config.data.image_shape, config.training.batch_size)
    key = repr((parts, more))
    if key not in TRACES:
        TRACES[key] = trace_step(config)
    return TRACES[key]


TRACES = {}


def trace_step(config):
    method = from_config(config)
    tx, _ = training.optimizer_of(config)
    key, n = jax.random.key(0), config.training.batch_size
    state = jax.eval_shape(lambda key: training.init_state(method, tx, key), key)
    batch = {
        "image": jax.ShapeDtypeStruct((n, *method.image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((n,), np.int32),
        "index": jax.ShapeDtypeStruct((n,), np.int32),
    }
    update = training.make_update(method, tx, key, **config.step)
    return state, *jax.eval_shape(update, state, batch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "smoke"])
@pytest.mark.parametrize("name", NAMES)
def test_the_training_step_of_every_config(name, variant, tmp_path):
    config = get_config(name, variant)
    if "plan" in config:  # fields follow from pictures
        PIL.Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "one.png")
        config.data.name = f"image_folder:{tmp_path}"
        config, _ = run_data.planned(config, "")
    before, after, loss = trace(config)
    assert after == before and loss.shape == () and loss.dtype == np.float32
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(before.params))
    assert config.training.batch_size % (8 * config.step.accumulate) == 0  # a TPU host's devices


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parameters",
    [
        ("cifar10", 35_746_307),
        ("celebahq256", 113_673_219),
        ("lsun_cat", 113_673_219),
        ("celeba64", 78_700_803),
        ("cifar10_iddpm", 52_546_438),
        ("imagenet64_iddpm", 121_063_942),
        ("imagenet64_iddpm_class", 273_049_350),
    ],
)
def test_the_papers_networks(name, parameters):
    state, *_ = trace(get_config(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == parameters
    assert f"{parameters:,} parameters" in importlib.import_module(f"configs.{name}").__doc__


@pytest.mark.parametrize("name", NAMES)
def test_each_docstring_says_what_to_run_and_what_came_of_it(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"--config=configs/{name}.py" in text and "Measured" in text


def test_celeba_is_cut_as_its_docstring_says(tmp_path, monkeypatch):
    """The code in its docstring, on images of the official size: the centre of the crop becomes the centre."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img_align_celeba").mkdir()
    face = np.zeros((218, 178, 3), np.uint8)
    face[121 - 64 : 121 + 64, 89 - 64 : 89 + 64] = 50
    face[121 - 2 : 121 + 2, 89 - 2 : 89 + 2] = 250
    for name in ("000001", "000002", "000003", "000004"):
        PIL.Image.fromarray(face).save(tmp_path / "img_align_celeba" / f"{name}.jpg", quality=100)
    parts = "000001.jpg 0\n000002.jpg 2\n000003.jpg 0\n000004.jpg 1\n"
    (tmp_path / "list_eval_partition.txt").write_text(parts)
    text = importlib.import_module("configs.celeba64").__doc__
    code = text[text.index("    from pathlib") : text.index("Measured")]
    exec(textwrap.dedent(code), {})
    config = get_config("celeba64")
    for split, count in (("train", 2), ("validation", 1), ("test", 1)):
        dataset = data.load(config.data.name, split=split, image_shape=config.data.image_shape)
        images = dataset.fetch(np.arange(len(dataset)))
        assert len(images) == count and images.shape[1:] == (64, 64, 3)
        assert images[:, [0, 0, 63, 63], [0, 63, 0, 63]].min() > 40  # nothing from outside the crop
        assert images[:, 31:33, 31:33].min() > 200 > 100 > images[:, 40, 40].max()


def test_an_unknown_variant():
    with pytest.raises(ValueError, match="it has smoke, cpu"):
        get_config("fashion_mnist", "smoek")


def test_configs_and_experiments_of_the_installation_are_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("cifar10:smoke") == f"{FOLDER / 'cifar10.py'}:smoke"
    assert find_file("experiments/edm.py") == str(FOLDER.parent / "experiments" / "edm.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cifar10.py").write_text("")
    assert find_file("cifar10") == os.path.join("configs", "cifar10.py")  # one's own comes first


def test_experiments_are_those_of_the_installation(tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "edm.py").write_text("raise AssertionError('imported')")
    monkeypatch.chdir(tmp_path)
    sampler = find("experiments.edm:HeunWithChurn", {}, "sampler")
    assert sampler.__module__ == "ddpm_jax.experiments.edm"
    assert (
        options.name_of(sampler, options.Choice("sampler", SAMPLERS))
        == "experiments.edm:HeunWithChurn"
    )
    foreign = ConfigDict({"method": "experiments.edm:X", "a": "experiments.other:Y"})
    assert foreign_modules(foreign) == ["experiments.other:Y"]


def test_fields_of_a_chosen_network_and_of_every_schedule_can_be_given():
    config = get_config("digits", "smoke")
    override(config, "model.name", "experiments.my_network:DiT", resume.readers_of)
    assert set(config.model) <= {"name", "num_classes", "num_heads"}  # the U-Net's fields are gone
    override(config, "model.depth", "1", resume.readers_of)
    override(config, "diffusion.prediction", "v")
    override(config, "schedule.zero_snr", "true", resume.readers_of)
    assert config.model.depth == 1 and from_config(config).schedule.alpha[-1] == 0
    with pytest.raises(options.ConfigError, match=r"did you mean --config\.schedule\.zero_snr"):
        override(config, "schedule.zero_sn", "true", resume.readers_of)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("def get_config(:\n", "line 1: "),
        ("def get_config():\n    pass\n", r"get_config\(\) must return a ConfigDict, got None"),
        (
            "from ddpm_jax.configs import digits\n"
            "def get_config():\n    config = digits.get_config()\n    del config.step\n    return config\n",
            "the config lacks step",
        ),
    ],
)
def test_a_config_file_that_is_none_is_one_line(tmp_path, text, expected):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(options.ConfigError, match=f"mine.py.*{expected}"):
        from_file(str(tmp_path / "mine.py"))
