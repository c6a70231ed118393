"""configs/folder.py: from a folder of any pictures to a run of a sensible size, and one line where there is none."""

import functools
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import main
from ddpm_jax.configs import folder
from ddpm_jax.data import DataError
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import results, run_data
from ddpm_jax.options import ConfigError
from ddpm_jax.training import resume

LAPTOP = folder.Device(40e9, 0.0, 1, "float32", "2 CPU cores")
GPU = folder.Device(10e12, 0.01, 1, "bfloat16", "1 × GPU")
COUNTED = functools.cache(folder.cost.forward_flops)
TPU = folder.Device(80e12, 0.01, 8, "bfloat16", "8 × TPU")


def save(path, width=64, height=64, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    Image.fromarray(values, "RGBA").convert(mode).save(path)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


@pytest.fixture
def planned(pictures, monkeypatch):
    """The planned config and its lines, for the pictures and fields as on a command line."""

    def plan(*fields, device=LAPTOP, workdir=""):
        monkeypatch.setattr(folder.Device, "here", staticmethod(lambda: device))
        monkeypatch.setattr(folder.cost, "forward_flops", COUNTED)
        request = main.Request([f"--config=configs/folder.py:{pictures}", *fields])
        return run_data.planned(request.config(), workdir)

    return plan


# ---- what is chosen --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, modes, expected",
    [
        ([(640, 427)], ["RGB"], (32, 32, 3)),  # one photograph
        ([(5, 7)], ["RGB"], (8, 8, 3)),  # smaller than the smallest size
        ([(33, 500)] * 3, ["RGB"], (32, 32, 3)),  # the shorter side counts
        ([(500, 31)] * 3, ["RGB"], (16, 16, 3)),
        ([(64, 64)] * 19 + [(9, 9)], ["RGB"], (32, 32, 3)),  # a few may be enlarged
        ([(64, 64)] * 7 + [(17, 40)] * 3, ["RGB"], (16, 16, 3)),  # not many
        ([(64, 64)] * 3, ["L", "1", "L"], (32, 32, 1)),
        ([(64, 64)] * 3, ["L", "RGB", "L"], (32, 32, 3)),
        ([(64, 64)] * 3, ["RGBA", "P", "LA"], (32, 32, 3)),  # transparent, with a palette
    ],
)
def test_the_size_follows_from_the_pictures(pictures, planned, sizes, modes, expected):
    for n, (width, height) in enumerate(sizes):
        save(pictures / f"{n}.png", width, height, modes[n % len(modes)], seed=n)
    config, (line, _) = planned()
    assert config.data.image_shape == expected and "plan" not in config
    count = f"{len(sizes)} picture{'s' if len(sizes) > 1 else ''} at {'×'.join(map(str, expected))}"
    assert line.startswith(count)
    smaller = np.mean([min(size) < expected[0] for size in sizes])
    assert (f"{smaller:.0%} of the pictures are smaller" in line) == bool(smaller)
    assert None not in [config_lib.fields(config)[field] for field in open_fields()]


def open_fields():
    return [f"{section}.{name}" for section, names in folder.OPEN.items() for name in names]


@pytest.mark.parametrize("device, side", [(LAPTOP, 32), (GPU, 128), (TPU, 256)])
def test_the_size_follows_from_the_device(pictures, planned, device, side):
    save(pictures / "large.jpg", 900, 700)
    config, (line, _) = planned(device=device)
    assert config.data.image_shape[0] == side and device.words in line
    assert config.training.batch_size % device.count == 0
    assert config.model.dtype == device.dtype


@pytest.mark.slow
def test_the_network_follows_from_the_number_of_pictures(pictures, planned, monkeypatch):
    """Widths, dropout and shifts; the headers of a few stand for all."""
    save(pictures / "one.png")
    survey, found = folder.data.survey, {}
    for count in (1, 200, 2000, 20_000, 200_000):
        monkeypatch.setattr(
            folder.data, "survey", lambda *a, n=count, **k: survey(*a, **k)._replace(count=n)
        )
        config, _ = planned("--config.data.image_shape=32,32,3", device=TPU)
        found[count] = (config.model.channels, config.model.dropout, config.data.shift)
    assert [found[n][0] for n in found] == [32, 32, 64, 96, 128]
    assert found[1] == (32, 0.2, 2) and found[200] == (32, 0.1, 2) and found[2000] == (64, 0.1, 0)


@pytest.mark.parametrize("minutes", [5, 30, 300])
@pytest.mark.parametrize("device", [LAPTOP, LAPTOP._replace(operations=5e9), GPU])
def test_the_predicted_time_is_that_of_the_plan(pictures, planned, device, minutes):
    save(pictures / "large.png", 300, 300)
    config, (line, _) = planned(f"--config.plan.minutes={minutes}", device=device)
    words = re.search(r"at most about (?:(\d+)h )?(?:(\d+)m )?(?:(\d+) ?s)?", line).groups()
    hours, whole, seconds = (int(word or 0) for word in words)
    predicted = 60 * hours + whole + seconds / 60
    least = config.data.image_shape[0] == 8 and config.training.num_steps == 500
    assert predicted <= minutes + 1 or least
    assert config.training.num_steps >= 500


def test_fields_that_are_given_stay_and_the_others_follow(pictures, planned):
    save(pictures / "large.png", 300, 300)
    config, (line, _) = planned(
        *("--config.data.image_shape=48,64,3", "--config.training.num_steps=700"),
        *("--config.model.channels=40", "--config.data.flip=False", "--config.data.shift=0"),
    )
    assert config.data.image_shape == (48, 64, 3) and config.model.attention_resolutions == (12,)
    assert config.training.num_steps == 700 and config.preview.every == 175
    assert (config.model.channels, config.data.flip, config.data.shift) == (40, False, 0)
    assert "at 48×64×3" in line and "700 steps of 16" in line
    config, _ = planned("--config.training.num_steps=100", "--config.data.image_shape=5,9,1")
    assert config.model.channel_mults == (1,) and config.optimizer.warmup_steps == 5


def test_another_network_has_only_its_own_fields(pictures, planned):
    save(pictures / "one.png")
    config, (line, _) = planned("--config.model.name=experiments.my_network:DiT")
    assert set(config.model) <= {"name", "num_classes", "num_heads"} and "32×32×3" in line


def test_the_plan_is_a_function_of_pictures_and_device(pictures, planned):
    for n in range(40):
        save(pictures / f"{n}.png", 20 + n, 60, seed=n)
    first, second = planned(), planned()
    assert first == second


# ---- pictures that are none ------------------------------------------------------------------------


def test_broken_pictures_are_left_out_and_none_left_is_one_line(pictures, planned):
    (pictures / "a.jpg").write_bytes(b"not a picture")
    (pictures / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 2 pictures can be decoded"):
        planned()
    save(pictures / "c.png")
    config, _ = planned()
    dataset = run_data.load_data(config)
    assert len(dataset) == 1 and config.data.image_shape == (32, 32, 3)
    assert "2 pictures that cannot be decoded" in dataset.left_out[0]


def test_pictures_at_any_depth_and_other_files(pictures, planned):
    (pictures / "a" / "b").mkdir(parents=True)
    save(pictures / "a" / "b" / "deep.png")
    save(pictures / "top.png")
    (pictures / "notes.txt").write_text("x")
    assert planned()[1][0].startswith("2 pictures")


def test_sub_folders_are_classes_if_the_model_has_classes(pictures, planned):
    for name in ("cat", "dog", "owl"):
        (pictures / name).mkdir()
        save(pictures / name / "one.png")
    classes = ("--config.data.flatten=False", "--config.model.num_classes=-1")
    config, (line, _) = planned(*classes)
    assert config.model.num_classes == -1  # filled in where the data are read
    without = planned()[1][0]
    number, less = (
        int(re.search(r"([\d,]+) param", x)[1].replace(",", "")) for x in (line, without)
    )
    assert number == less + 3 * 4 * config.model.channels


@pytest.mark.parametrize(
    "name, said",
    [
        ("", r"which pictures\? Give their folder: --config=configs/folder\.py:PATH"),
        (":/not/there", "there is no folder /not/there"),
        (":EMPTY", "holds no picture"),
        (":FILE", "there is no folder .*one.png"),
    ],
)
def test_no_pictures_are_one_line(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "one.png")
    name = name.replace("EMPTY", str(tmp_path / "empty")).replace("FILE", f"{tmp_path}/one.png")
    config = main.Request([f"--config=configs/folder.py{name}"]).config()
    with pytest.raises((DataError, ConfigError), match=said) as error:
        run_data.planned(config, "")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, said",
    [
        ("plan.minutes=0", "minutes must be positive"),
        ("plan.name=folder_of_nobody:plan", "there is no module 'folder_of_nobody'"),
        ("data.name=digits", "is for a folder of pictures, and config.data.name is digits"),
        ("data.image_shape=32,32", r"expected \(height, width, channels\)"),
        ("data.shift=40", "shift must lie in 0 … 31"),
    ],
)
def test_fields_that_cannot_be_are_one_line(pictures, planned, field, said):
    save(pictures / "one.png")
    with pytest.raises(ConfigError, match=said):
        planned(f"--config.{field}")


# ---- names of run directories ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, name",
    [
        ("", "folder"),
        (":smoke", "folder_smoke"),
        (":./smoke", "folder_smoke"),
        (":/home/me/Holiday 2024", "folder_Holiday_2024"),
        (":/home/me/a: b/", "folder_a_b"),
        (":~/pictures", "folder_pictures"),
        (":pictures/../other//", "folder_other"),
        (":cats.and.dogs", "folder_cats.and.dogs"),
        (":/", "folder"),
        (":/home/me/Fotos für Oma", "folder_Fotos_für_Oma"),
    ],
)
def test_the_run_directory_has_the_last_part_of_the_path(variant, name):
    request = main.Request([f"--config=configs/folder.py{variant}"])
    assert request.workdir() == os.path.join("runs", name)


def test_the_folder_of_pictures_is_named_by_its_path_here(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    request = main.Request(["--config=folder:."])
    assert request.workdir() == os.path.join("runs", "folder_pictures")
    assert main.Request(["--config=fashion_mnist:cpu"]).workdir() == "runs/fashion_mnist_cpu"


def test_a_path_with_colons_and_a_tilde_is_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "my pictures: 2024"
    place.mkdir()
    save(place / "one.png")
    config = main.Request(["--config=configs/folder.py:~/my pictures: 2024"]).config()
    config, (line, _) = run_data.planned(config, "")
    assert line.startswith("1 picture at") and config.data.name == f"image_folder:{place}"


# ---- runs ------------------------------------------------------------------------------------------


def test_a_run_keeps_its_plan_on_another_device(pictures, planned, tmp_path):
    save(pictures / "large.png", 300, 300)
    first, _ = planned()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = str(tmp_path / "run" / "config.json")
    config_lib.save(first, path)
    again, lines = planned("--config.training.num_steps=9000", device=GPU, workdir=tmp_path / "run")
    assert lines == [] and again.training.num_steps == 9000 and again.model == first.model
    resume.refuse_another_config(again, path)
    request = main.Request([f"--config=configs/folder.py:{pictures}"])
    resume.refuse_another_config(request.config(), path)  # as --mode=sample does
    other = main.Request([f"--config=folder:{pictures}", "--config.data.image_shape=16,16,3"])
    with pytest.raises(ConfigError, match=r"image_shape is \[32, 32, 3\] there and \[16, 16, 3\]"):
        resume.refuse_another_config(other.config(), path)


@pytest.mark.slow
def test_three_commands_from_a_folder_to_samples(tmp_path, monkeypatch, capsys):
    """With a broken, a grey, a transparent and a tiny picture; and the same command continues."""
    pictures = tmp_path / "Holiday: 2024"
    pictures.mkdir()
    save(pictures / "photo.jpg", 90, 60)
    save(pictures / "grey.png", 20, 30, "L")
    save(pictures / "transparent.png", 30, 20, "RGBA")
    save(pictures / "tiny.png", 5, 3)
    (pictures / "broken.png").write_bytes(b"\x89PNG broken")
    monkeypatch.chdir(tmp_path)
    config = f"--config=folder:{pictures}"
    shrunk = ["--config.training.batch_size=4", "--config.model.channels=8"]
    shrunk += ["--config.preview.steps=2", "--config.data.image_shape=8,8,3"]
    main.main([config, *shrunk, "--config.training.num_steps=2"])
    said = capsys.readouterr().out
    assert said.index("5 pictures at 8×8×3") < said.index("compiled in")
    assert "1 pictures that cannot be decoded" in said and "on average" in said
    run = os.path.join("runs", "folder_Holiday_2024")
    assert {"nearest.png", "loss.png", "data_preview.png"} <= set(os.listdir(run))
    with open(os.path.join(run, "config.json"), encoding="utf-8") as file:
        assert "plan" not in json.load(file)
    main.main([config, "--config.training.num_steps=3", "--config.preview.steps=2"])
    said = capsys.readouterr().out
    assert "resuming at step 2" in said and "predicted" not in said
    main.main([config, "--mode=sample", "--num_samples=3", "--steps=2"])
    main.main(["--mode=nearest", f"--workdir={run}", "--num_samples=2", "--steps=2"])
    said = capsys.readouterr().out
    found = results.read_npz(re.search(r"^(\S+\.npz),", said, re.MULTILINE)[1])
    assert found["neighbours"].shape == (2, 4, 8, 8, 3)  # all four, as there are fewer than seven
    assert json.loads(str(found["recipe"]))["changes"] == {"flip": True, "shift": 0}


@pytest.mark.slow
def test_other_configs_write_no_nearest_picture(tmp_path):
    from test_edit import make_config

    from ddpm_jax.training import loop

    config = make_config()
    config.training.num_steps = 1
    loop.train(config, tmp_path / "off")
    assert "nearest.png" not in os.listdir(tmp_path / "off")
    config.preview.nearest = True
    loop.train(config, tmp_path / "on")
    assert "nearest.png" in os.listdir(tmp_path / "on")
