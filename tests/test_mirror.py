"""The copy of a run in one file, and runs that continue from it."""

import io
import os
import shutil
import zipfile

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from test_train import make_config, metrics, same

from ddpm_jax.files import checkpoints, locks, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop


def mirrored(path, num_steps=6, **changes):
    return make_config(num_steps, training__mirror=str(path), **changes)


def test_a_run_continues_bit_for_bit_from_its_mirror(tmp_path, capsys):
    file = tmp_path / "drive" / "run.zip"
    file.parent.mkdir()
    straight = loop.train(make_config(num_steps=9), tmp_path / "straight")
    loop.train(mirrored(file), tmp_path / "lost")
    kept = {f: (tmp_path / "lost" / f).read_bytes() for f in ("config.json", "data.json")}
    previews = os.listdir(tmp_path / "lost" / "samples")
    assert os.listdir(file.parent) == ["run.zip"]
    shutil.rmtree(tmp_path / "lost")
    capsys.readouterr()
    again = loop.train(mirrored(file, 9), tmp_path / "lost")
    out = capsys.readouterr().out
    assert f"the run of {file} is unpacked, at step 6" in out and "resuming at step 6" in out
    same(straight, again)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "lost")
    assert (tmp_path / "lost" / "data.json").read_bytes() == kept["data.json"]
    assert set(previews) <= set(os.listdir(tmp_path / "lost" / "samples"))
    assert not list((tmp_path / "lost").glob(".mirror*"))


FOUND = {"warmup_steps": 2}  # what `plan` finds


def plan(config):
    config.optimizer.warmup_steps = FOUND["warmup_steps"]
    return []


def test_a_run_keeps_its_plan_on_another_machine(tmp_path, monkeypatch):
    config = mirrored(tmp_path / "run.zip")
    del config.optimizer.warmup_steps
    config.optimizer.warmup_steps = placeholder(int)
    config.plan = ConfigDict({"name": "test_mirror:plan"})
    loop.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setitem(FOUND, "warmup_steps", 5)
    config.training.num_steps = 8
    assert int(loop.train(config, tmp_path / "run").step) == 8
    assert config_lib.load(tmp_path / "run" / "config.json").optimizer.warmup_steps == 2


def test_the_mirror_holds_one_checkpoint_and_neither_drawn_images_nor_itself(tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    file = run / "copy.zip"
    loop.train(mirrored(file, 3), run)
    (run / "samples" / "many.npz").write_bytes(b"drawn")
    loop.train(mirrored(file, 6), run)
    names = zipfile.ZipFile(file).namelist()
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"6"}
    assert {"config.json", "data.json", "metrics.jsonl", "log.txt"} <= set(names)
    assert not {locks.LOCK, "samples/many.npz", "copy.zip"} & set(names)
    assert not [name for name in names if name.endswith(".zip")]


def test_the_run_directory_counts_before_its_mirror(tmp_path, capsys):
    file = tmp_path / "run.zip"
    loop.train(mirrored(file, 3), tmp_path / "run")
    loop.train(make_config(6), tmp_path / "run")
    capsys.readouterr()
    loop.train(mirrored(file, 9), tmp_path / "run")
    out = capsys.readouterr().out
    assert "unpacked" not in out and "resuming at step 6" in out


def test_a_drive_that_is_full_is_a_warning_and_keeps_the_earlier_file(
    tmp_path, monkeypatch, capsys
):
    file = tmp_path / "run.zip"
    loop.train(mirrored(file, 3), tmp_path / "run")
    before = file.read_bytes()

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "write", full)
    assert int(loop.train(mirrored(file, 6), tmp_path / "run").step) == 6
    assert "WARNING: a file could not be written; training continues" in capsys.readouterr().out
    assert file.read_bytes() == before and not list(tmp_path.glob("*.tmp*"))


def test_unpacking_deletes_nothing(tmp_path):
    """Neither results beside the previews nor the damaged checkpoint that has the step of the mirror's."""
    file, run = tmp_path / "run.zip", tmp_path / "run"
    straight = loop.train(mirrored(file, preview__every=3), run)
    (run / "samples" / "mine.npz").write_bytes(b"drawn")
    (run / "samples" / "step_00000003.png").unlink()
    shutil.rmtree(run / "checkpoints" / "3")
    (run / "checkpoints" / "6" / "meta.json").write_bytes(b"{")
    same(straight, loop.train(mirrored(file, preview__every=3), run))
    assert (run / "samples" / "mine.npz").read_bytes() == b"drawn"
    assert (run / "samples" / "step_00000003.png").exists()
    assert (run / "checkpoints" / "6.damaged" / "meta.json").read_bytes() == b"{"
    assert not list(run.glob(".mirror*"))


def test_a_directory_in_use_is_not_unpacked_into(tmp_path):
    file = tmp_path / "run.zip"
    loop.train(mirrored(file, 3), tmp_path / "run")
    with (
        locks.lock(tmp_path / "again"),
        pytest.raises(checkpoints.CheckpointError, match="again is in use by process"),
    ):
        loop.train(mirrored(file, 3), tmp_path / "again")
    assert os.listdir(tmp_path / "again") == [locks.LOCK]


def test_a_drive_that_fails_while_it_is_read_is_named(tmp_path, monkeypatch):
    file = tmp_path / "run.zip"
    loop.train(mirrored(file, 3), tmp_path / "run")

    class Failing(io.FileIO):
        def readinto(self, buffer):
            if self.tell() < 1000:  # the files, not the list of them at the end
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)

    monkeypatch.setattr(io, "FileIO", Failing)
    line = f"{file} cannot be read: Input/output error"
    with pytest.raises(checkpoints.CheckpointError, match=line):
        loop.train(mirrored(file, 3), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_kill_while_unpacking_leaves_a_start_that_unpacks_again(tmp_path, monkeypatch):
    file = tmp_path / "run.zip"
    straight = loop.train(mirrored(file), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        replace = os.replace

        def killed(source, target):
            if "checkpoints" in str(target):
                raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(mirrored(file), tmp_path / "again")
    same(straight, loop.train(mirrored(file), tmp_path / "again"))


@pytest.mark.parametrize(
    "name, content, error, words",
    [
        ("missing/run.zip", None, ConfigError, "in a folder that exists, .*is the drive mounted"),
        ("run.tar", None, ConfigError, "must be a .zip"),
        ("run.zip", b"PK\x03\x04 cut", checkpoints.CheckpointError, "is not a mirrored run"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(tmp_path, name, content, error, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        loop.train(mirrored(tmp_path / name), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("*"))


def archive_of(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"checkpoints": b"a file"},
        {"checkpoints/x/meta.json": b"{}"},
        {"checkpoints/3/meta.json": b"{}"},
        {"a": b"a file", "a/b": b"a file in it"},
        {"x" * 300: b""},
        {"../outside": b"", "/tmp/../outside": b""},
    ],
)
def test_other_archives_are_refused_and_write_nothing_outside(tmp_path, members):
    archive_of(tmp_path / "run.zip", members)
    with pytest.raises(checkpoints.CheckpointError, match="is not a mirrored run"):
        loop.train(mirrored(tmp_path / "run.zip"), tmp_path / "run")
    assert {p.name for p in tmp_path.iterdir()} <= {"run.zip", "run"}
    assert not list((tmp_path / "run").glob("*"))


def test_a_lock_in_an_archive_is_not_unpacked(tmp_path):
    """It would take the place of the file that a running process has locked."""
    file = tmp_path / "run.zip"
    loop.train(mirrored(file, 3), tmp_path / "run")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(locks.LOCK, "of another process")
    loop.train(mirrored(file, 3), tmp_path / "again")
    assert "of another process" not in (tmp_path / "again" / locks.LOCK).read_text()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_jax.processes.count", lambda: 2)
    with pytest.raises(ConfigError, match=r"config\.training\.mirror is for a run of one process"):
        loop.train(mirrored(tmp_path / "run.zip"), tmp_path / "run")


def test_a_flipped_byte_is_found(tmp_path):
    file = tmp_path / "run.zip"
    loop.train(mirrored(file), tmp_path / "run")
    with zipfile.ZipFile(file) as archive:
        large = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(file.read_bytes())
    content[large.header_offset + 30 + len(large.filename) + large.file_size // 2] ^= 1
    writers.save_bytes(str(file), bytes(content))
    with pytest.raises(checkpoints.CheckpointError, match="Bad CRC-32"):
        loop.train(mirrored(file), tmp_path / "again")
