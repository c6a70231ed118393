"""Runs on data in an unfavourable order, path or size: two classes of pictures, sorted into folders."""

import contextlib
import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from running import call

from ddpm_jax import data
from ddpm_jax.commands import analytic, bound, shared
from ddpm_jax.commands.report import report
from ddpm_jax.configs import digits
from ddpm_jax.ddpm import Bounding
from ddpm_jax.files import checkpoints, progress, results, run_data, runs, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.run_data import RunError
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop, parallel, preview

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
NAMES = ("flat", "noise")  # constant pictures, which are cheap to code, and noise, which is not


def pictures(count: int, kind: str) -> np.ndarray:
    """uint8 [N, 8, 8]."""
    if kind == "flat":
        return np.broadcast_to(RNG.integers(0, 256, (count, 1, 1)), (count, 8, 8)).astype(np.uint8)
    return RNG.integers(0, 256, (count, 8, 8), dtype=np.uint8)


def paint(folder, images, names=None):
    os.makedirs(folder, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{folder}/{names[i] if names else f'{i:03d}'}.png")


def make_folder(root, *, per_class=80, labelled_test=True):
    for split in ("train", "test"):
        for kind in NAMES:
            sub = kind if split == "train" or labelled_test else ""
            names = [f"{kind}{i:03d}" for i in range(per_class)]
            paint(root / split / sub, pictures(per_class, kind), names)
    return root


def make_config(name, **changes):
    config = digits.get_config()
    config.method = "tiny"
    config.data.name = str(name)
    config.schedule.update(name="linear", num_timesteps=20, end=0.5)
    config.training.num_steps = 6
    config.training.batch_size = 8
    config.preview = ConfigDict({"every": 1000, "num_images": 4, "sampler": "ddim", "steps": "4"})
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing takes longer than computing the numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "save_panels", lambda *args: None)
        patch.setattr(writers, "save_loss_curve", lambda *args: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, folder):
    place = str(tmp_path_factory.mktemp("run"))
    loop.train(make_config(f"image_folder:{folder}"), place)
    return place


@pytest.fixture(scope="module")
def with_classes(tmp_path_factory, folder):
    place = str(tmp_path_factory.mktemp("classes"))
    loop.train(make_config(f"image_folder:{folder}", **{"model.num_classes": -1}), place)
    return place


def copy_of(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def total(workdir, **options):
    return call("nll", str(workdir), steps=5, **options).scalars["total"]


# ---- order -----------------------------------------------------------------------------------------


def test_some_images_stand_for_all(workdir):
    """The first 80 in the order of the files are all flat."""
    some = call("nll", workdir, steps=5, num_images=16, seed=1)
    index = results.read_npz(some.path)["index"]
    assert len(index) == 16 and 4 <= np.sum(index < 80) <= 12  # of either class
    every = total(workdir, seed=1)
    assert abs(some.scalars["total"].mean() - every.mean()) < 3 * np.std(every) / 4


def test_errors_of_the_analytic_variance_are_of_all_classes(workdir):
    call("nll", workdir, num_images=4, steps=5, variance="analytic")
    path = analytic.path(runs.load(workdir, allow_code=True), Bounding(steps="5"))
    index = results.read_npz(path)["index"]
    labels = data.load(f"{config_lib.load(f'{workdir}/config.json').data.name}").labels
    assert set(labels[index].tolist()) == {0, 1} and len(index) == bound.ERROR_IMAGES


def test_given_images_are_of_all_classes(workdir, tmp_path):
    def given(mode, **options):
        out = str(tmp_path / "x.npz")
        return results.read_npz(call(mode, workdir, steps=4, out=out, **options))

    for command, options in (
        ("encode", {"num_images": 8}),
        ("interpolate", {"images": "data", "num_images": 8}),
        ("denoise", {"from_t": 3, "num_images": 8}),
        ("inpaint", {"num_images": 8, "resample": 1, "jump": 1}),
    ):
        arrays = given(command, **options)
        assert min(arrays["index"]) < 80 <= max(arrays["index"]), command
        (tmp_path / "x.npz").unlink()
    # All of them, and there are fewer than by default: in their own order.
    paint(tmp_path / "few", pictures(9, "noise"))
    arrays = given("encode", images=str(tmp_path / "few"))
    assert arrays["index"].tolist() == list(range(9))


def test_the_preview_shows_what_the_network_is_shown(tmp_path, capsys):
    """Pictures dark on the left, sorted by brightness: about half of them mirrored, of all levels."""
    images = np.zeros((80, 8, 8), np.uint8)
    images[:, :, 4:] = np.arange(80, 160, dtype=np.uint8)[:, None, None]
    paint(tmp_path / "bars", images)
    config = make_config(f"image_folder:{tmp_path / 'bars'}")
    config.data.flip = True
    loop.train(config, str(tmp_path / "run"))
    assert "mirrored" in capsys.readouterr().out
    with Image.open(tmp_path / "run" / "data_preview.png") as picture:
        pixels = np.asarray(picture)[:, :, 0]
    cells = [pixels[2 + 58 * i + 28, 2 + 58 * j :][:56] for i in range(8) for j in range(8)]
    mirrored = np.array([cell[10] > cell[-10] for cell in cells])
    assert 16 < mirrored.sum() < 48
    assert np.ptp([cell.max() for cell in cells]) > 60


# ---- classes ---------------------------------------------------------------------------------------


def test_a_test_split_without_labels_is_refused_by_a_model_of_classes(tmp_path):
    make_folder(tmp_path / "pictures", labelled_test=False)
    place = str(tmp_path / "run")
    name = f"image_folder:{tmp_path / 'pictures'}"
    loop.train(make_config(name, **{"model.num_classes": -1}), place)
    for command in (
        lambda: call("nll", place, num_images=4, steps=5),
        lambda: call("best_steps", place, steps=5, num_images=4),
    ):
        with pytest.raises(data.DataError, match=r"no label that the model knows.*--split=train"):
            command()
    with pytest.raises(RunError, match="no such labels; give --labels=3"):
        call("encode", place, num_images=4, steps=4)
    assert total(place, num_images=4, split="train").shape == (4,)
    call("encode", place, num_images=4, steps=4, labels="noise")


def test_classes_are_called_by_their_names(with_classes, tmp_path, capsys):
    out = call("sample", with_classes, num_samples=4, steps="4", labels="noise,flat")
    arrays = results.read_npz(out)
    assert arrays["labels"].tolist() == [1, 0, 1, 0]
    assert arrays["class_names"].tolist() == list(NAMES)
    assert "1 noise, 0 flat" in capsys.readouterr().out
    same = call("sample", with_classes, num_samples=4, steps="4", labels="1,0")
    np.testing.assert_array_equal(results.read_npz(same)["images"], arrays["images"])
    with pytest.raises(RunError, match="no class 'nois'; did you mean 'noise'"):
        call("sample", with_classes, num_samples=4, labels="nois")
    with open(f"{with_classes}/log.txt", encoding="utf-8") as file:
        assert "classes: 0 flat, 1 noise" in file.read()
    with open(report(with_classes), encoding="utf-8") as file:
        assert ">noise<" in file.read()
    with open(f"{with_classes}/data.json", encoding="utf-8") as file:
        assert json.load(file)["class_names"] == list(NAMES)


def test_names_that_are_numbers_count_as_names(tmp_path):
    for i, name in enumerate((10, 9, 2)):
        paint(tmp_path / "numbers" / str(name), np.full((4, 8, 8), i, np.uint8))
    config = make_config(f"image_folder:{tmp_path / 'numbers'}", **{"model.num_classes": -1})
    loop.train(config, str(tmp_path / "run"))
    run = runs.load(str(tmp_path / "run"), allow_code=True)
    assert run.class_names == ("2", "9", "10")
    assert run_data.class_numbers(run, "10,2") == "2,0"


def test_a_run_without_saved_names_keeps_its_numbers(tmp_path):
    """Before names were saved, folders were numbered as text: 0, 1, 10, 11, 2 …"""
    for i in range(12):
        paint(tmp_path / "p" / str(i), np.full((3, 8, 8), 20 * i, np.uint8))
    config = make_config(f"image_folder:{tmp_path / 'p'}", **{"model.num_classes": -1})
    loop.train(config, str(tmp_path / "run"))
    os.remove(tmp_path / "run" / "data.json")
    run = runs.load(str(tmp_path / "run"), allow_code=True)
    dataset = run_data.data_of(run, "train")
    assert dataset.class_names == tuple(sorted(map(str, range(12))))
    assert set(dataset.labels[dataset.images[:, 0, 0, 0] == 200].tolist()) == {2}  # folder 10
    config.training.num_steps = 8
    loop.train(config, str(tmp_path / "run"))
    assert run.class_names == dataset.class_names


def test_labels_of_other_images_are_by_name(with_classes, tmp_path):
    paint(tmp_path / "p" / "noise", pictures(2, "noise"))
    paint(tmp_path / "p" / "zebra", pictures(2, "flat"))
    given = {"images": str(tmp_path / "p"), "steps": 4, "out": str(tmp_path / "x.npz")}
    with pytest.raises(RunError, match="no such labels"):
        call("encode", with_classes, **given)
    shutil.rmtree(tmp_path / "p" / "zebra")
    assert results.read_npz(call("encode", with_classes, **given))["labels"].tolist() == [1, 1]


# ---- places ----------------------------------------------------------------------------------------


def test_pictures_may_move(workdir, folder, tmp_path):
    here = total(workdir, num_images=4)
    place, there = copy_of(workdir, tmp_path), tmp_path / "moved"
    config = config_lib.load(f"{place}/config.json")
    config.data.name = f"image_folder:{tmp_path / 'nowhere'}"
    config_lib.save(config, f"{place}/config.json")
    shutil.copytree(folder, there)
    with pytest.raises(data.DataError, match="if it has moved, give its new path: --data_dir"):
        total(place, num_images=4)
    moved = total(place, num_images=4, data_dir=str(there))
    np.testing.assert_array_equal(moved, here)
    out = str(tmp_path / "x.npz")
    call("nearest", str(place), num_samples=2, steps="4", data_dir=str(there), out=out)
    assert call("eval", str(place), metrics="nll", num_images=4, data_dir=str(there))
    assert not list((place / "eval").glob("*.replaced*"))  # the results are still theirs
    # Training goes on with the name of the new place.
    config = make_config(f"image_folder:{there}", **{"training.num_steps": 8})
    assert int(loop.train(config, str(place)).step) == 8
    # Other pictures are not those of the run.
    shutil.rmtree(there / "train" / "flat")
    with pytest.raises(
        data.DataError, match=r"num_classes was 2 and is 1.*count was 160 and is 80"
    ):
        call("nearest", str(place), num_samples=2, steps="4", data_dir=str(there), out=out)


def test_a_relative_path_means_the_same_from_any_folder(tmp_path, monkeypatch):
    make_folder(tmp_path / "a" / "pictures", per_class=8)
    make_folder(tmp_path / "b" / "pictures", per_class=8)
    monkeypatch.chdir(tmp_path / "a")
    loop.train(make_config("image_folder:pictures"), "run")
    here = total("run")
    monkeypatch.chdir(tmp_path / "b")
    os.rename(tmp_path / "a" / "run" / "eval", tmp_path / "eval")
    np.testing.assert_array_equal(total(tmp_path / "a" / "run"), here)
    monkeypatch.chdir(tmp_path / "a")
    loop.train(make_config("image_folder:pictures"), "run")  # the same run: nothing left to do


def test_other_data_at_the_same_place_are_refused_unless_admitted(tmp_path, capsys):
    place, name = str(tmp_path / "run"), f"image_folder:{tmp_path / 'p'}"
    paint(tmp_path / "p", pictures(50, "noise"))
    loop.train(make_config(name), place)
    paint(tmp_path / "p", pictures(140, "noise"))
    longer = {"training.num_steps": 8}
    with pytest.raises(data.DataError, match=r"count was 50 and is 140.*--change=data"):
        loop.train(make_config(name, **longer), place)
    assert int(loop.train(make_config(name, **longer), place, change=["data"]).step) == 8
    assert "the data have changed: count was 50 and is 140" in capsys.readouterr().out
    # Admitted once, and then they are the data of the run; other names or sizes are worth a word.
    os.rename(tmp_path / "p" / "000.png", tmp_path / "p" / "zzz.png")
    loop.train(make_config(name, **{"training.num_steps": 10}), place)
    assert "differs in names, sizes or pixels" in capsys.readouterr().out
    loop.train(make_config(name, **{"training.num_steps": 10}), place)
    assert "differs in names, sizes or pixels" in capsys.readouterr().out  # as long as it is so
    paint(tmp_path / "p", pictures(150, "noise"))
    loop.train(make_config(name, **{"training.num_steps": 10}), place, change=["data"])
    assert run_data.saved_data(place)["count"] == 140  # nothing was trained on the new ones
    with pytest.raises(ConfigError, match=r"--change=date: write data.*did you mean 'data'"):
        loop.train(make_config(name), place, change=["date"])


# ---- results belong to their data ------------------------------------------------------------------


def test_a_result_is_of_the_images_that_are_there(tmp_path, capsys):
    """Test pictures are overwritten under the same names: the old results are renamed, not repeated."""
    folder, place = make_folder(tmp_path / "p", per_class=10), str(tmp_path / "run")
    loop.train(make_config(f"image_folder:{folder}"), place)
    before = total(place, num_images=8)
    errors = analytic.path(runs.load(place, allow_code=True), Bounding(steps="5"))
    total(place, num_images=8, variance="analytic")
    old_errors = results.read_npz(errors)["images_sha256"]
    np.testing.assert_array_equal(total(place, num_images=8), before)  # nothing has changed
    assert "compiling" in capsys.readouterr().out
    total(place, num_images=8)
    assert "compiling" not in capsys.readouterr().out  # it is there
    out = str(tmp_path / "named.json")
    total(place, num_images=8, out=out)
    for split in ("train", "test"):
        for kind in NAMES:
            paint(
                folder / split / kind, pictures(10, "noise"), [f"{kind}{i:03d}" for i in range(10)]
            )
    after = total(place, num_images=8)
    assert not np.array_equal(after, before)
    assert "or from other images: it is now" in capsys.readouterr().out
    with pytest.raises(RunError, match="from other images"):
        total(place, num_images=8, out=out)  # what a user has named is not moved
    total(place, num_images=8, variance="analytic")
    assert not np.array_equal(results.read_npz(errors)["images_sha256"], old_errors)


def test_errors_of_another_chain_are_not_used(workdir):
    call("nll", workdir, num_images=4, steps=[0, 1, 2], variance="analytic")
    run = runs.load(workdir, allow_code=True)
    path = analytic.path(run, Bounding(steps="[0,1,2]"))
    assert path != analytic.path(run, Bounding(steps="0,1,2"))
    arrays = results.read_npz(path)
    old = json.loads(str(arrays["recipe"]))
    options = Bounding(variance="analytic", steps="[0,1,2]")
    errors, _ = analytic.errors_for(run, options, "analytic")
    assert len(errors) == 3
    for change in ({"steps": "[0,1,3]"}, {"chosen": None}):
        np.savez(path, **arrays | {"recipe": json.dumps(old | change)})
        with pytest.raises(RunError, match="measured with another model, with other steps"):
            analytic.errors_for(run, options, "analytic")
    os.remove(path)


def test_a_process_at_work_is_left_alone(tmp_path):
    """Another recipe under the same name, during the first command and after it."""
    out = str(tmp_path / "x.npz")
    with results.in_progress(out, {"a": 1}) as (folder, _):
        open(f"{folder}/half", "w").close()
        for named in (False, True):
            other = results.in_progress(out, {"a": 2}, named=named)
            with pytest.raises(checkpoints.CheckpointError, match="in use"), other:
                pass
        assert os.path.exists(f"{folder}/half")
        writers.save_npz(out, {"x": np.zeros(1)}, {"a": 1})
    with pytest.raises(RunError, match="other settings"), results.in_progress(out, {"a": 2}):
        pass
    assert os.listdir(tmp_path) == ["x.npz"]
    with results.in_progress(out, {"a": 2}, named=False) as (_, finished):
        assert finished is None
    assert os.listdir(tmp_path) == ["x.npz.replaced"]


def test_nearest_is_of_the_test_images_that_are_there(tmp_path):
    folder, place = make_folder(tmp_path / "p", per_class=8), str(tmp_path / "run")
    loop.train(make_config(f"image_folder:{folder}"), place)
    given = {"num_samples": 2, "steps": "4"}
    before = results.read_npz(call("nearest", place, **given))["distance_of_test"]
    shutil.rmtree(folder / "test" / "noise")
    paint(folder / "test" / "flat", pictures(8, "noise"), [f"flat{i:03d}" for i in range(8)])
    after = results.read_npz(call("nearest", place, **given))["distance_of_test"]
    assert not np.array_equal(before, after)


# ---- said, not hidden ------------------------------------------------------------------------------


def test_an_average_that_has_not_forgotten_its_start_says_so(tmp_path, capsys):
    assert runs.initial_share(600, ema_decay=0.9999, ema_warmup=False) == pytest.approx(0.9999**600)
    assert runs.initial_share(9, ema_decay=0.5, ema_warmup=True) == pytest.approx(
        np.prod([min(0.5, (1 + k) / (10 + k)) for k in range(9)])
    )
    assert runs.initial_share(5, ema_decay=0.0, ema_warmup=False) == 0
    config = make_config("digits", **{"step.ema_warmup": False, "step.ema_decay": 0.9999})
    place = str(tmp_path / "run")
    loop.train(config, place)
    assert "100 % of the EMA weights are still the random initial ones" in capsys.readouterr().out
    call("sample", place, num_samples=2, steps="4")
    assert "use --weights=raw" in capsys.readouterr().out
    call("sample", place, num_samples=2, steps="4", weights="raw")
    assert "EMA weights" not in capsys.readouterr().out


@contextlib.contextmanager
def broken_bias(workdir, value):
    """Sets one parameter of the run to this value for every command."""
    run = runs.load(workdir, allow_code=True)
    dense = {**run.params["Dense_0"], "bias": np.full(1, value, np.float32)}
    with pytest.MonkeyPatch.context() as patch:
        broken = dataclasses.replace(run, params={**run.params, "Dense_0": dense})
        patch.setattr(runs, "load", lambda *args, **options: broken)
        yield


def test_images_that_are_not_finite_are_refused(workdir, tmp_path):
    """A parameter that is infinite: rounded to uint8, its images would be black."""
    with broken_bias(workdir, np.inf):
        out = str(tmp_path / "x.npz")
        for command in (
            lambda: call("sample", workdir, num_samples=3, steps="4", clip_x0=False, out=out),
            lambda: call("progressive", workdir, num_samples=3, steps="4", clip_x0=False, out=out),
            lambda: call("encode", workdir, steps=4, clip_x0=False, out=out),
            lambda: call("reconstruct", workdir, steps="4", clip_x0=False, out=out),
            lambda: call("denoise", workdir, from_t=3, clip_x0=False, out=out),
            lambda: call("interpolate", workdir, steps=4, clip_x0=False, out=out),
            lambda: call("inpaint", workdir, steps=4, clip_x0=False, resample=1, jump=1, out=out),
        ):
            with pytest.raises(RunError, match=r"\d of \d+ images are not finite.*--clip"):
                command()
            assert not os.path.exists(out)
            shutil.rmtree(f"{out}.partial", ignore_errors=True)


def test_a_bound_that_is_not_finite_is_refused(workdir, tmp_path):
    refused = pytest.raises(RunError, match="bound is not finite for 4 of 4 images")
    with broken_bias(workdir, np.nan), refused:
        call("nll", workdir, num_images=4, steps=5, out=str(tmp_path / "x.json"))
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    "field", ["data.data_dir", "data.name", "seed", "preview.num_images", "step.accumulate"]
)
def test_none_is_answered_in_one_line(tmp_path, field):
    config = make_config("digits")
    with config.ignore_type():
        config.update_from_flattened_dict({field: None})
    with pytest.raises(ConfigError, match=f"config.{field} must be"):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_failed_start_takes_back_its_own_files_alone(tmp_path, monkeypatch):
    place = tmp_path / "run"

    def look(*args, **kwargs):  # while a start is under way, another program writes a result
        (place / "eval").mkdir()
        (place / "eval" / "hours_of_work.npz").touch()
        raise data.DataError("the data are damaged")

    monkeypatch.setattr(preview, "shown_images", look)
    with pytest.raises(data.DataError):
        loop.train(make_config("digits"), str(place))
    assert [path.name for path in place.rglob("*")] == ["eval", "hours_of_work.npz"]


def test_a_broken_picture_names_the_option(tmp_path):
    paint(tmp_path / "p", pictures(4, "noise"))
    (tmp_path / "p" / "001.png").write_bytes(b"")
    config = make_config(f"image_folder:{tmp_path / 'p'}")
    with pytest.raises(data.DataError, match=r"001.png.*--config\.data\.skip_broken=True"):
        loop.train(config, str(tmp_path / "run"))
    config.data.skip_broken = True
    loop.train(config, str(tmp_path / "run"))
    assert "1 pictures that cannot be decoded" in (tmp_path / "run" / "log.txt").read_text()


def test_a_repeated_command_says_that_nothing_is_drawn(workdir, tmp_path, capsys):
    out = str(tmp_path / "x.npz")
    call("sample", workdir, num_samples=3, steps="4", out=out)
    capsys.readouterr()
    call("sample", workdir, num_samples=3, steps="4", out=out)
    said = capsys.readouterr().out
    assert "3 images with this recipe exist already" in said and "recipe:" not in said


def test_time_left_does_not_count_compiling(workdir, monkeypatch, capsys):
    """A clock that only moves when something compiles, 100 s, or computes, 2 s for each four images."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(progress, "SHOW_SECONDS", 0.0)

    class FakeExamples:
        def __init__(self, function):
            self.busy = 0.0

        def compile(self, params, key, x):
            clock[0] += 100.0

        def send(self, params, key, x):
            self.busy = max(self.busy, clock[0]) + 2.0
            return self.busy, x

        def fetch(self, sent):
            clock[0] = max(clock[0], sent[0])
            return sent[1]

    monkeypatch.setattr(parallel, "map_examples", FakeExamples)
    run = runs.load(workdir, allow_code=True)
    shared.map_images(run, lambda params, key, x: x, None, np.arange(40), batch_size=4, settings={})
    first, *lines = (line for line in capsys.readouterr().out.splitlines() if "EMA" not in line)
    assert first == "compiling"
    assert lines[0] == "image 4/40  10 %  2 images/s  18 s left"
    assert lines[4] == "image 20/40  50 %  2 images/s  10 s left"


def test_names_of_results_can_be_read(workdir):
    run = runs.load(workdir, allow_code=True)
    settings = {"from_t": [250, 500, 750], "images": "/somewhere/my pictures", "steps": "5,10"}
    name = run.name("denoise", settings=settings)
    assert "from_t_250-500-750" in name and "images_mypictures-" in name and "steps_5-10" in name


def test_nearest_needs_no_test_split(tmp_path, capsys):
    paint(tmp_path / "p", pictures(12, "noise"))
    loop.train(make_config(f"image_folder:{tmp_path / 'p'}"), str(tmp_path / "run"))
    call("nearest", str(tmp_path / "run"), num_samples=2, steps="4")
    assert "no test images to compare with" in capsys.readouterr().out
    with pytest.raises(data.DataError, match=r"no split 'test'.*--split=train"):
        call("nll", str(tmp_path / "run"), num_images=2, steps=5)


def test_a_number_is_said_with_what_it_means(workdir, capsys):
    call("nll", workdir, num_images=4, steps=5)
    said = capsys.readouterr().out
    assert "uniform noise costs 8 bits/dim" in said and "--split=train" in said
    assert "the loss in training at step 6 was" in said
    call("nll", workdir, num_images=4, steps=5, split="train")
    capsys.readouterr()
    call("nll", workdir, num_images=4, steps=5)
    assert "4 training images" in capsys.readouterr().out
