"""Files of a run directory that are damaged, doubled or renamed are refused by name or repaired, never used silently."""

import json
import os
import random
import re
import shutil

import numpy as np
import pytest
from absl import logging

from ddpm_jax import data, main
from ddpm_jax.configs import digits
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import results, run_data, writers
from ddpm_jax.method import from_config
from ddpm_jax.options import ConfigError
from ddpm_jax.training import guards, resume
from ddpm_jax.training.loop import train


@pytest.fixture
def warned(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


# ---- metrics.jsonl -----------------------------------------------------------------------------------


@pytest.fixture
def metrics(tmp_path):
    """A file of four lines with steps 10 … 40."""
    path = tmp_path / "metrics.jsonl"
    for step in (10, 20, 30, 40):
        writers.append_line(str(path), {"step": step, "loss": 1 / step, "vlb": None})
    return path


def steps(path):
    return [row["step"] for row in writers.read_metrics(str(path))]


def test_every_changed_byte_of_a_line_is_noticed(metrics, warned):
    """The line is left out with a warning, and later lines stay."""
    lines = metrics.read_bytes().splitlines(keepends=True)
    rows = writers.read_metrics(str(metrics))
    assert rows[1] == {"step": 20, "loss": 0.05, "vlb": None}
    for at in range(len(lines[1]) - 1):
        changed = bytearray(lines[1])
        changed[at] ^= 1
        metrics.write_bytes(b"".join([lines[0], bytes(changed), *lines[2:]]))
        found = writers.read_metrics(str(metrics))
        assert found in (rows, [rows[0], *rows[2:]])  # a space may be another blank
        assert found == rows or "line 2 is damaged and left out" in warned[-1]


def test_lines_that_are_doubled_cut_or_empty(metrics, warned):
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([*lines[:3], lines[1], lines[3]]))
    assert steps(metrics) == [10, 20, 30, 40]
    assert "line 4 repeats step 20" in warned.pop()
    metrics.write_bytes(b"".join(lines)[:-5])  # as a kill leaves it
    assert steps(metrics) == [10, 20, 30] and not warned
    metrics.write_bytes(b"".join([lines[0], b"\n[]\n\xff\n3\n", lines[3]]))
    assert steps(metrics) == [10, 40] and len(warned) == 4
    metrics.write_bytes(b'{"step": 5, "loss": 1.0}\n{"step": true}\n')  # of an older version
    assert steps(metrics) == [5] and "line 2 has no step" in warned[-1]


def test_numbers_that_json_does_not_know_come_back(tmp_path):
    path = str(tmp_path / "m.jsonl")
    row = {"step": 1, "loss": float("inf"), "tiny": 5e-324, "third": 1 / 3, "ε": 0}
    writers.append_line(path, row)
    assert writers.read_metrics(path) == [row]


def test_missing_lines_are_noticed_when_a_run_continues(metrics, warned):
    for step in (9, 19, 29, 40, 49):
        content = metrics.read_bytes()
        writers.rewind_metrics(str(metrics), step, 10)
        assert not warned and steps(metrics) == [one for one in (10, 20, 30, 40) if one <= step]
        metrics.write_bytes(content)
    writers.rewind_metrics(str(metrics), 50, 10)
    assert "metrics.jsonl has no line from step 41 to step 50" in warned.pop()
    for content in (b"", b"[]", b"\0" * 9):
        metrics.write_bytes(content)
        writers.rewind_metrics(str(metrics), 20, 10)
        assert "metrics.jsonl has no line from step 1 to step 20" in warned.pop()
        assert metrics.read_bytes() == b""
    metrics.unlink()
    writers.rewind_metrics(str(metrics), 20, 10)
    assert "has no line from step 1 to step 20" in warned.pop()


def test_a_row_holds_numbers_only(tmp_path, warned):
    path = str(tmp_path / "metrics.jsonl")
    for loss in ("low", [1.0], {"mean": 1.0}, True, None, 2.0):
        writers.append_line(path, {"step": 1, "loss": loss})
        writers.append_line(path, {"step": 2})
    assert [row["step"] for row in writers.read_metrics(path)] == [2]
    assert "line 1 holds more than numbers" in warned[0]


def test_an_error_of_writing_names_the_file(tmp_path):
    """A file that is full; the error of an open file has no name."""
    (tmp_path / "full").symlink_to("/dev/full")
    path = str(tmp_path / "full")
    rows = results.GrowingFile(str(tmp_path / "rows"), (2,), np.uint8)
    rows._path = path

    def write(temporary):
        with open(path, "w") as file:
            file.write("x")

    for save in (
        lambda: writers.append_line(path, {"step": 1}),
        lambda: rows.append(np.ones((1, 2))),
        lambda: writers.replace(path, write),
    ):
        with pytest.raises(OSError, match=f"{path} could not be written: No space left"):
            save()


# ---- config.json -------------------------------------------------------------------------------------


def test_every_changed_byte_of_a_config_is_refused(tmp_path):
    """Unless the values are the same, as with another blank."""
    path = tmp_path / "config.json"
    saved = digits.get_config("smoke")
    config_lib.save(saved, str(path))
    content, draw = path.read_bytes(), random.Random(0)
    before = config_lib.to_json(config_lib.load(str(path)))
    for _ in range(300):
        changed = bytearray(content)
        at = draw.randrange(len(content))
        changed[at] ^= 1 << draw.randrange(8)
        if b'"sha256"' not in changed:
            continue  # from_config refuses the unknown name
        path.write_bytes(changed)
        try:
            assert config_lib.to_json(config_lib.load(str(path))) == before
        except ConfigError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_config_that_is_changed_on_purpose(tmp_path):
    """Without its digest it is read, as those of older versions are."""
    path = tmp_path / "config.json"
    config_lib.save(digits.get_config("smoke"), str(path))
    tree = json.loads(path.read_text()) | {"seed": 5}
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r'has changed since .* delete "sha256" in it'):
        config_lib.load(str(path))
    del tree["sha256"]
    path.write_text(json.dumps(tree))
    assert config_lib.load(str(path)).seed == 5
    for content in ("[]", "3", "null", "", "{", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ConfigError, match="cannot read the config"):
            config_lib.load(str(path))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data": None}, "is not the config of a run"),
        ({"data": {}}, "lacks data.name"),
        ({"optimizer": [1]}, "is not the config of a run"),
        ({"params/a.b": 1}, "cannot read the config"),
        ({"__class__": 1}, "cannot read the config"),
        ({"diffusion": True}, "config.diffusion: it must hold fields, got True"),
        ({"schedule": [1, 2]}, "config.schedule: it must hold fields"),
        ({"schedule": {"end": 0.5}}, "config.schedule: schedule must be a name"),
        ({"schedule": {"name": {"a": 1}}}, "config.schedule: schedule must be a name"),
        ({"schedule": {"name": "linear", "num_timesteps": "9"}}, "num_timesteps must be a whole"),
        ({"schedule": {"name": "linear", "num_timesteps": 10**15}}, "at least 1, at most 1e6"),
        ({"model": {"num_classes": 10**30}}, "num_classes must be at least 0 and below 2"),
        ({"model": {"num_classes": -2}}, "num_classes must be at least 0 and below 2"),
        ({"model": None}, "config.model: it must hold fields, got None"),
        ({"method": 3}, "config.method must be a module"),
    ],
)
def test_a_config_of_the_wrong_structure(change, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(digits.get_config("smoke").to_dict() | change, default=list))
    with pytest.raises(ConfigError, match=words) as caught:
        from_config(config_lib.load(str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [[8, 8], [8, 8, 0], 8, "8,8,1", [8, 8, True, 1], [8.0, 8, 1], []])
def test_an_image_shape_that_is_none(shape):
    config = digits.get_config("smoke")
    with config.data.ignore_type():
        config.data.image_shape = shape
    with pytest.raises(ConfigError, match=r"config.data: image_shape is .*, expected"):
        from_config(config)


# ---- data.json and history.jsonl ----------------------------------------------------------------------


def test_every_changed_byte_of_data_json_is_refused(tmp_path):
    path = tmp_path / "data.json"
    run_data.save_data(str(tmp_path), data.load("digits"))
    content, before, draw = path.read_bytes(), run_data.saved_data(str(tmp_path)), random.Random(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        if b'"sha256"' not in changed:
            continue  # an unknown name, as in a newer version
        path.write_bytes(changed)
        try:
            assert run_data.saved_data(str(tmp_path)) == before
        except run_data.RunError as error:
            assert str(path) in str(error)
    for text in ("[]", "3", "null", "", '{"class_names": [1]}', '{"class_names": 3}', "[" * 99_999):
        path.write_text(text)
        with pytest.raises(run_data.RunError, match="cannot be read"):
            run_data.saved_data(str(tmp_path))


def test_a_damaged_history_is_refused(tmp_path):
    """A change that was left out would continue the run with other settings."""
    path = tmp_path / "history.jsonl"
    changes = [resume.Changed("optimizer.learning_rate", 1e-3, 1e-4)]
    resume.record(str(tmp_path), 5, changes[:1])
    resume.record(str(tmp_path), 6, changes[:1])
    assert len(resume.history(str(tmp_path))) == 2
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [writers.to_line(row).encode() for row in ({"step": 1}, {"field": "optimizer.x"})]
    whole = {"step": 1, "old": 1, "new": 2, "time": ""}
    for field in ("seed", 3, None, "optimizer.a.b", "data.name"):
        bad.append(writers.to_line(whole | {"field": field}).encode())
    for line in (*bad, b"\n", lines[0][:-9], lines[0][:-9] + b"\n", b"[]\n"):
        path.write_bytes(lines[0] + line)
        with pytest.raises(ConfigError, match=f"{path}, line 2 is damaged"):
            resume.history(str(tmp_path))


# ---- unfinished results ------------------------------------------------------------------------------


def test_unfinished_rows_are_checked(tmp_path, capsys):
    """A damaged, moved or cut row and all after it are computed again; those before it stay."""
    path, rows = str(tmp_path / "rows"), np.arange(60, dtype=np.uint8).reshape(5, 3, 4)
    results.GrowingFile(path, (3, 4), np.uint8).append(rows)
    with open(path, "rb") as file:
        content = file.read()
    size = len(content) // 5

    def left(changed):
        with open(path, "wb") as file:
            file.write(changed)
        growing = results.GrowingFile(path, (3, 4), np.uint8)
        np.testing.assert_array_equal(growing.rows(), rows[: growing.count])
        growing.append(rows[growing.count :])
        np.testing.assert_array_equal(results.GrowingFile(path, (3, 4), np.uint8).rows(), rows)
        return 5 - (len(rows) - growing.count), "damaged" in capsys.readouterr().out

    def kept(changed):
        with open(path, "wb") as file:
            file.write(changed)
        return results.GrowingFile(path, (3, 4), np.uint8).count

    assert left(content) == (5, False)
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 16
        assert kept(bytes(changed)) == at // size
    assert kept(content[:-1]) == 4 and kept(content[: size + 3]) == 1 and kept(b"") == 0
    swapped = (
        content[:size]
        + content[2 * size : 3 * size]
        + content[size : 2 * size]
        + content[3 * size :]
    )
    capsys.readouterr()
    assert kept(swapped) == 1
    assert "4 of 5 rows are computed again" in capsys.readouterr().out
    left(swapped)


def test_rows_without_a_recipe_are_not_used(tmp_path, capsys):
    out = str(tmp_path / "x.npz")
    with pytest.raises(KeyboardInterrupt), results.in_progress(out, {"a": 1}) as (folder, _):
        results.GrowingFile(f"{folder}/images", (2,), np.uint8).append(np.ones((3, 2), np.uint8))
        raise KeyboardInterrupt
    recipe = tmp_path / "x.npz.partial" / "recipe.json"
    for text in ("", "{", "[" * 99_999):
        recipe.write_text(text)
        with pytest.raises(run_data.RunError, match=f"{recipe} cannot be read; delete"):
            results.in_progress(out, {"a": 1}).__enter__()
    recipe.rename(recipe.with_name("recipe.tmp.json"))
    with results.in_progress(out, {"a": 1}, named=False) as (folder, _):
        assert results.GrowingFile(f"{folder}/images", (2,), np.uint8).count == 0
    assert "was made with other settings" in capsys.readouterr().out


def test_a_kill_while_unfinished_rows_are_deleted_leaves_the_result(tmp_path, monkeypatch):
    """Whichever file is deleted first: the same command finds its result, and deletes the rest."""
    out, recipe = str(tmp_path / "x.npz"), {"a": 1}

    def interrupted(function, name):
        def killed(path, *_, **__):
            if name is not None:
                os.unlink(os.path.join(f"{out}.partial", name))
            raise KeyboardInterrupt

        with (
            monkeypatch.context() as patch,
            pytest.raises(KeyboardInterrupt),
            results.in_progress(out, recipe) as (folder, _),
        ):
            for rows in ("images", "labels"):
                results.GrowingFile(f"{folder}/{rows}", (), np.int8).append(np.ones(3))
            writers.save_npz(out, {"x": np.ones(3)}, recipe)
            patch.setattr(*function, killed)
        with results.in_progress(out, recipe) as (_, finished):
            assert finished["x"].tolist() == [1, 1, 1]
        assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]

    interrupted((os, "rmdir"), None)
    interrupted((os, "remove"), "images")


def test_an_empty_picture_is_written_again(tmp_path):
    """As a power failure leaves it, when the name of a file is on the disk before its content."""
    images = np.zeros((3, 8, 8, 1), np.uint8)
    for _ in range(2):
        with results.png_folder(str(tmp_path / "x.npz"), {"a": 1}, named=True) as save:
            save(0, images)
        pictures = sorted((tmp_path / "x").glob("*.png"))
        assert len(pictures) == 3 and all(path.stat().st_size for path in pictures)
        pictures[1].write_bytes(b"")


# ---- training ----------------------------------------------------------------------------------------


def test_a_kill_before_the_recipe_is_written_sets_nothing_aside(tmp_path, capsys):
    out = tmp_path / "x.npz"
    (tmp_path / "x.npz.partial").mkdir()
    (tmp_path / "x.npz.partial" / "recipe.tmp.json").write_text("{")
    with results.in_progress(str(out), {"a": 1}, named=False):
        pass
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_sweep_removes_what_a_killed_training_left(tmp_path):
    for name in ("samples", "checkpoints/5", "checkpoints/6.tmp/state"):
        (tmp_path / name).mkdir(parents=True)
    left = (
        "config.json.tmp",
        "data.tmp.json",
        "history.tmp.jsonl",
        "loss.tmp.png",
        "samples/step_00000010.tmp.png",
    )
    stay = ("config.json", "samples/mine.tmp.png", "report.tmp.html", "samples/step_00000010.png")
    for name in (*left, *stay):
        (tmp_path / name).touch()
    guards.sweep(str(tmp_path))
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names == set(stay)
    assert not (tmp_path / "checkpoints" / "6.tmp").exists()
    assert (tmp_path / "checkpoints" / "5").exists()


@pytest.mark.slow
def test_previews_that_a_kill_prevented_are_made(tmp_path):
    """Those of the last checkpoint's step, in the middle of a run and at its end."""
    config = digits.get_config("smoke")
    config.training.num_steps = 20
    train(config, str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    expected = (tmp_path / "whole" / "samples" / "step_00000020.png").read_bytes()
    (tmp_path / "killed" / "samples" / "step_00000020.png").unlink()
    (tmp_path / "killed" / "loss.png").unlink()
    train(config, str(tmp_path / "killed"))
    assert (tmp_path / "killed" / "samples" / "step_00000020.png").read_bytes() == expected
    assert (tmp_path / "killed" / "loss.png").exists()
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "20")
    expected = (tmp_path / "whole" / "samples" / "step_00000010.png").read_bytes()
    (tmp_path / "killed" / "samples" / "step_00000010.png").unlink()
    train(config, str(tmp_path / "killed"))
    assert (tmp_path / "killed" / "samples" / "step_00000010.png").read_bytes() == expected


@pytest.mark.parametrize("value", ["inf", "nan", "True", "0", "-1"])
def test_learning_rates_that_make_no_sense(value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(
            [
                "--config=configs/digits.py:smoke",
                f"--config.optimizer.learning_rate={value}",
                f"--workdir={tmp_path / 'x'}",
            ]
        )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search("learning_rate", line) and not (tmp_path / "x").exists()


def test_a_changed_number_in_a_result_is_noticed(tmp_path):
    """Every digit of a saved result, one after another; a result of an older version has no checksum and is read."""
    path = tmp_path / "nll.json"
    terms = (1.5, float("nan"))
    result = {"total": 3.25, "curves": {"terms": terms}, "recipe": {"step": 20}}
    writers.save_result(str(path), result)
    expected = {**result, "curves": {"terms": [1.5, None]}}
    assert writers.read_json(str(path)) == expected
    text = path.read_text()
    places = [
        i
        for i, letter in enumerate(text)
        if letter.isdigit() and "crc32" not in text[i - 9 : i + 2]
    ]
    assert len(places) > 6
    for i in places:
        path.write_text(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
        with pytest.raises(ValueError, match="not as it was written"):
            writers.read_json(str(path))
    writers.save_json(str(path), result)
    assert writers.read_json(str(path)) == expected
