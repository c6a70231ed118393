"""The copy of a run in one file, and runs that continue from it."""

import io
import os
import shutil
import warnings
import zipfile
from pathlib import Path

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


# ---- a directory and a mirror of different steps, or of different runs ------------------------------


def steps_in(file):
    names = zipfile.ZipFile(file).namelist()
    return sorted({int(name.split("/")[1]) for name in names if name.startswith("checkpoints/")})


def test_a_newer_mirror_is_continued_on_a_machine_with_an_older_state(tmp_path, capsys):
    """Back on the first machine, whose disk has older checkpoints: they stay, and the last image is the same."""
    file = tmp_path / "run.zip"
    straight = loop.train(make_config(9), tmp_path / "straight")
    loop.train(mirrored(file, 3), tmp_path / "a")
    loop.train(mirrored(file, 6), tmp_path / "b")
    capsys.readouterr()
    same(straight, loop.train(mirrored(file, 9), tmp_path / "a"))
    out = capsys.readouterr().out
    assert "is unpacked, at step 6" in out and "resuming at step 6" in out
    assert checkpoints.complete_steps(tmp_path / "a" / "checkpoints") == [3, 6, 9]
    assert [row["step"] for row in metrics(tmp_path / "a")] == [2, 3, 4, 6, 8, 9]
    assert steps_in(file) == [9] and not list(tmp_path.glob("*.replaced*"))


def other_seed(run):
    return mirrored(run.parent / "run.zip", 6, seed=7)


def other_data(run):
    saved = writers.read_json(str(run / "data.json"))
    saved["fingerprint"] = "of other pictures"
    del saved[config_lib.DIGEST]
    writers.save_json(str(run / "data.json"), saved)
    return mirrored(run.parent / "run.zip", 6)


def other_settings(run):
    """There and back, so that the configs are equal again."""
    for step, rate in ((4, 0.01), (5, 0.001)):
        loop.train(make_config(step), run, change=(f"optimizer.learning_rate={rate}",))
    return mirrored(run.parent / "run.zip", 6)


@pytest.mark.parametrize(
    "change, words",
    [
        (other_seed, r"config\.seed is 0 there and 7 here"),
        (other_data, r"its data are others \(data\.json\)"),
        (other_settings, r"its settings were changed \(history\.jsonl\)"),
    ],
)
def test_a_newer_mirror_of_another_run_is_refused(tmp_path, change, words):
    file, run = tmp_path / "run.zip", tmp_path / "run"
    loop.train(mirrored(file, 6), tmp_path / "first")
    loop.train(make_config(3, seed=7 if change is other_seed else 0), run)
    config, before = change(run), file.read_bytes()
    files = {path: path.read_bytes() for path in run.glob("*.json*")}
    step = checkpoints.latest_step(run / "checkpoints")
    line = f"{file} holds step 6, and {run} step {step} of another run: {words}"
    with pytest.raises(ConfigError, match=line) as caught:
        loop.train(config, run)
    assert "\n" not in str(caught.value) and file.read_bytes() == before
    assert files == {path: path.read_bytes() for path in run.glob("*.json*")}
    assert not list(run.glob(".mirror*"))


def test_a_save_replaces_no_file_of_another_run(tmp_path, capsys):
    file, run, aside = tmp_path / "run.zip", tmp_path / "run", tmp_path / "run.replaced2.zip"
    (tmp_path / "run.replaced.zip").write_bytes(b"an earlier one")
    loop.train(mirrored(file, 3, seed=7), tmp_path / "other")
    before = file.read_bytes()
    loop.train(make_config(3), run)
    loop.train(mirrored(file, 6), run)
    line = f"WARNING: {file} is now {aside}, since it is of another run: config.seed is 7 there"
    assert f"{line} and 0 here" in capsys.readouterr().out
    assert aside.read_bytes() == before and steps_in(file) == [6]
    assert (tmp_path / "run.replaced.zip").read_bytes() == b"an earlier one"
    loop.train(mirrored(file, 9), run)  # its own file is replaced
    assert "WARNING" not in capsys.readouterr().out and steps_in(file) == [9]


def test_a_save_replaces_nothing_that_is_no_mirror(tmp_path, capsys):
    file, run = tmp_path / "run.zip", tmp_path / "run"
    loop.train(make_config(3), run)
    file.write_bytes(b"of someone")
    loop.train(mirrored(file, 6), run)
    assert "since it is not a mirrored run or is damaged (File is" in capsys.readouterr().out
    assert (tmp_path / "run.replaced.zip").read_bytes() == b"of someone"


def test_a_mirror_stays_where_the_newest_checkpoint_is_damaged(tmp_path, capsys):
    """The run goes back to an older one, and saves a step below that of the mirror."""
    file, run = tmp_path / "run.zip", tmp_path / "run"
    loop.train(mirrored(file, 6), run)
    before = file.read_bytes()
    state = (run / "checkpoints" / "6" / "state").rglob("*")
    max(filter(Path.is_file, state), key=os.path.getsize).write_bytes(b"damaged")
    loop.train(mirrored(file, 6, training__checkpoint_every=4), run)
    assert f"since it holds step 6, and {run} only step 4" in capsys.readouterr().out
    assert (tmp_path / "run.replaced.zip").read_bytes() == before and steps_in(file) == [6]


def test_a_change_on_purpose_keeps_the_mirror_of_the_run(tmp_path, capsys):
    file, run = tmp_path / "run.zip", tmp_path / "run"
    loop.train(mirrored(file, 3), run)
    loop.train(mirrored(file, 6), run, change=("optimizer.learning_rate=0.01",))
    assert "replaced" not in capsys.readouterr().out and steps_in(file) == [6]


def test_code_in_a_mirror_is_not_imported_to_compare_it(tmp_path):
    file, run = tmp_path / "run.zip", tmp_path / "run"
    loop.train(mirrored(file, 3), tmp_path / "first")
    config = config_lib.load(str(tmp_path / "first" / "config.json"))
    config.method = "stranger:Method"  # an error if it is imported
    config_lib.save(config, str(tmp_path / "config.json"))
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of the same name
        archive.write(tmp_path / "config.json", "config.json")
        archive.writestr("checkpoints/8/meta.json", "{}")
    loop.train(make_config(3), run)
    with pytest.raises(ConfigError, match=r"it names other code \(stranger:Method\)"):
        loop.train(mirrored(file, 6), run)


# ---- interruptions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_between_two_checkpoints_of_a_mirror(tmp_path, monkeypatch, at):
    """The best is there and the newest is not, or none is: the same command unpacks the mirror again."""
    file, run = tmp_path / "run.zip", tmp_path / "run"
    best = {"training__keep_best": "learning_rate", "training__keep": 1}  # the first has it
    straight = loop.train(mirrored(file, 9, **best), tmp_path / "straight")
    assert steps_in(file) == [3, 9]
    replace, moved = os.replace, []

    def interrupted(source, target):
        moved.extend([target] if Path(target).parent.name == "checkpoints" else [])
        if len(moved) == at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(mirrored(file, 9, **best), run)
    assert (run / "config.json").exists()
    same(straight, loop.train(mirrored(file, 9, **best), run))
    assert sorted(os.listdir(run / "checkpoints")) == ["3", "9"]  # nothing twice


def test_a_finished_run_gets_the_mirror_that_it_lacks(tmp_path):
    file, run = tmp_path / "run.zip", tmp_path / "run"
    loop.train(make_config(3), run)
    loop.train(mirrored(file, 3), run)
    assert steps_in(file) == [3]
    loop.train(make_config(6), run)  # as a kill between checkpoint and mirror
    loop.train(mirrored(file, 6), run)
    before = file.stat()
    loop.train(mirrored(file, 6), run)
    after = file.stat()  # its time of access may change
    assert steps_in(file) == [6]
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # not written


def test_what_an_error_saves_is_in_the_mirror(tmp_path, monkeypatch):
    file = tmp_path / "run.zip"

    def failing(self):
        raise OSError("the picture cannot be read")

    monkeypatch.setattr(loop.Trainer, "log", failing)
    with pytest.raises(OSError, match="the picture"):
        loop.train(mirrored(file), tmp_path / "run")
    assert steps_in(file) == [2]


@pytest.mark.parametrize("date", [0, 5_000_000_000])  # 1970 and 2128
def test_a_file_with_a_date_that_zip_has_not(tmp_path, date):
    file, run = tmp_path / "run.zip", tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    os.utime(run / "notes.txt", (date, date))
    loop.train(mirrored(file, 3), run)
    assert zipfile.ZipFile(file).read("notes.txt") == b"mine"


def test_a_name_that_is_not_utf_8_is_left_out(tmp_path, capsys):
    file, run = tmp_path / "run.zip", tmp_path / "run"
    run.mkdir()
    with open(os.fsencode(run) + b"/caf\xe9.txt", "wb"):
        pass
    assert int(loop.train(mirrored(file, 3), run).step) == 3
    assert "/caf\\udce9.txt' is not in the mirror: 'utf-8' codec" in capsys.readouterr().out
    assert steps_in(file) == [3]


def test_any_error_of_a_mirror_is_a_warning(tmp_path, monkeypatch, capsys):
    def failing(*_, **__):
        raise zipfile.LargeZipFile("too\nlarge")

    monkeypatch.setattr(zipfile.ZipFile, "write", failing)
    assert int(loop.train(mirrored(tmp_path / "run.zip", 3), tmp_path / "run").step) == 3
    assert "training continues: too large\n" in capsys.readouterr().out
