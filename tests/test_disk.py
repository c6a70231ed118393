"""Disks that are full or read-only: one line names the file and the reason, nothing is lost, nothing half is left."""

import contextlib
import functools
import os
import re
import resource
import shutil
import signal
import subprocess

import numpy as np
import pytest
from running import call
from test_train import make_config, make_diffusion, metrics, same

from ddpm_jax import data, main, pretrained
from ddpm_jax.configs import digits
from ddpm_jax.files import animations, checkpoints, results, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.training import guards, loggers, loop

HERE = os.path.dirname(os.path.abspath(__file__))
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)


@contextlib.contextmanager
def no_file_larger_than(size):
    """A limit on the size of files stands for a full disk: both are errors of write()."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def tensorboard(folder):
    pytest.importorskip("tensorboard")
    logger = loggers.TensorBoard(loggers.Start(folder, None, 0, 0))
    logger.log(1, {}, {"samples": IMAGES[0]}, {})


def mp4(folder):
    pytest.importorskip("imageio_ffmpeg")
    animations.save(f"{folder}/a", IMAGES, ("mp4",))


@functools.cache
def weights():
    return pretrained.read(os.path.join(HERE, "pretrained", "pipeline"))


def export(folder):
    found = weights()
    pretrained.write_folder(found.method, found.params, f"{folder}/new", "a card")


def rows(folder):
    results.GrowingFile(f"{folder}/rows", IMAGES.shape[1:], np.uint8).append(IMAGES)


ROWS = [{"step": step, "loss": 1.0 / step, "grad_norm": 1.0} for step in range(1, 30)]
PANEL = writers.Panel("", "x", "y", np.arange(9), {"y": np.arange(9)})
WRITERS = {  # file: what writes it in a folder
    "config.json": lambda to: config_lib.save(digits.get_config(), f"{to}/config.json"),
    "data.json": lambda to: writers.save_json(f"{to}/data.json", list(range(99))),
    "history.jsonl": lambda to: writers.save_text(f"{to}/history.jsonl", "x" * 999),
    "metrics.jsonl": lambda to: writers.append_line(f"{to}/metrics.jsonl", {"loss": [0.0] * 99}),
    "loss.png": lambda to: writers.save_loss_curve(f"{to}/loss.png", ROWS),
    "samples/a.png": lambda to: writers.save_png(f"{to}/samples/a.png", writers.grid(IMAGES)),
    "eval/a.png": lambda to: writers.save_panels(f"{to}/eval/a.png", "", [PANEL]),
    "samples/a.npz": lambda to: writers.save_npz(f"{to}/samples/a.npz", {"x": IMAGES}, {"a": 1}),
    "rows": rows,
    "000000.png": lambda to: results._save_png(f"{to}/000000.png", IMAGES[0]),
    "a.gif": lambda to: animations.save(f"{to}/a", IMAGES, ("gif",)),
    "a.mp4": mp4,
    "new/unet/diffusion_pytorch_model.safetensors": export,
    "tensorboard/events": tensorboard,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_is_named_with_the_reason(name, tmp_path):
    if name.endswith("safetensors"):
        weights()  # which compiles, and keeps what is compiled
    with no_file_larger_than(60), pytest.raises(OSError) as caught:
        WRITERS[name](str(tmp_path))
    line = str(caught.value)
    assert "\n" not in line and line.count("could not be written") == 1
    assert line.startswith(f"{tmp_path}/{name}") and ".tmp" not in line.replace("ffmpeg", ""), line
    assert "ffmpeg says" in line if name == "a.mp4" else "File too large; it is larger" in line
    assert not list(tmp_path.rglob("*.tmp*"))


# ---- real disks ------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder, *options):
    """A disk of its own at a folder, where this process may mount one."""
    folder.mkdir(exist_ok=True)
    words = ["mount", *options, str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one MiB."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "none") as folder:
        yield folder


def fill(folder, free=0):
    """Leaves this many bytes of a disk."""
    path = folder / "filler"
    path.write_bytes(b"")
    path.write_bytes(bytes(shutil.disk_usage(folder).free - free))
    return path


def one_line(capsys, *words):
    """The error of a command that has ended with status 1."""
    with pytest.raises(SystemExit) as caught:
        main.main(list(words))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 1
    return line


def digests(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_training_whose_checkpoint_has_no_room_is_refused_before_it_begins(
    tmp_path, monkeypatch, capsys
):
    config = make_config()
    monkeypatch.setattr(writers, "free_space", lambda folder: 3)
    with pytest.raises(
        guards.TrainingError, match=r"a checkpoint takes .*0 MiB of free disk space"
    ):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(writers, "free_space", lambda folder: 10_000)
    monkeypatch.setattr(checkpoints, "size_of", lambda state: 3_000)
    loop.train(config, tmp_path / "run")
    assert re.search(
        "WARNING: a checkpoint takes .*; 3 are kept.* too little", capsys.readouterr().out
    )
    monkeypatch.setattr(writers, "free_space", lambda folder: 4_000)  # three of four are there
    loop.train(make_config(9, training__checkpoint_every=1), tmp_path / "run")
    assert "too little" in capsys.readouterr().out
    loop.train(make_config(12), tmp_path / "run")
    out = capsys.readouterr().out
    assert "a checkpoint takes 0 MiB; 3 are kept" in out and "too little" not in out


@pytest.mark.slow
def test_a_training_goes_on_where_the_disk_became_full(small_disk, tmp_path, monkeypatch, capsys):
    """Pictures are lost with a warning each, a checkpoint ends the run; with space the same command continues."""
    straight = loop.train(make_config(9), tmp_path / "straight")
    run, config = small_disk / "run", make_config(9, preview__every=2)
    real = data.batches

    def batches(*args, **kwargs):
        for batch in real(*args, **kwargs):
            if (run / "checkpoints" / "3").exists() and not (small_disk / "filler").exists():
                fill(small_disk)
            yield batch

    monkeypatch.setattr(data, "batches", batches)
    with pytest.raises(checkpoints.CheckpointError) as caught:
        loop.train(config, run)
    assert str(caught.value).startswith(f"{run}/checkpoints/6: not saved (")
    assert "earlier checkpoints are untouched: free space" in str(caught.value)
    assert checkpoints.latest_step(run / "checkpoints") == 3
    said = capsys.readouterr().out
    for name in ("samples/step_00000004.png", "loss.png"):  # the last pages of logs have room
        assert f"training continues: {run}/{name} could not be written: No space left" in said
    monkeypatch.setattr(data, "batches", real)
    (small_disk / "filler").unlink()
    same(straight, loop.train(config, run))
    assert metrics(tmp_path / "straight") == metrics(run)


COMMANDS = {
    "sample": {"num_samples": 3, "steps": "2", "png": True},
    "progressive": {"num_samples": 2, "steps": "2", "animation": ("gif",)},
    "encode": {"num_images": 2, "steps": 2},
    "denoise": {"num_images": 2, "from_t": 3},
    "nll": {"num_images": 3, "steps": 2, "variance": "analytic"},
    "rate_distortion": {"num_images": 3, "steps": 2},
    "nearest": {"num_samples": 2, "steps": "2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMMANDS)
def test_a_command_on_a_full_disk_names_the_file_and_repeats(mode, small_disk, tmp_path):
    """However much fits: the same command with space gives the files that it gives on an empty disk."""
    loop.train(make_diffusion(), tmp_path / "run")
    shutil.copytree(tmp_path / "run", small_disk / "run")
    call(mode, str(tmp_path / "run"), **COMMANDS[mode])
    failed = []
    for free in (0, 4, 8, 12, 16, 24, 32, 48, 64):
        filler = fill(small_disk, 1024 * free)
        try:
            call(mode, str(small_disk / "run"), **COMMANDS[mode])
        except OSError as error:
            failed.append(str(error))
        filler.unlink()
    for line in failed:
        assert "\n" not in line
        assert re.match(rf"{small_disk}/run/\S+ could not be written: No space left on de", line)
        assert "free some space, then run the same command again" in line and ".tmp" not in line
    assert len(set(failed)) > 1  # several files did not fit
    call(mode, str(small_disk / "run"), **COMMANDS[mode])
    left, right = (set(digests(place / "run")) for place in (small_disk, tmp_path))
    assert left == right


@pytest.mark.slow
def test_a_run_that_is_read_only(tmp_path, capsys):
    """Training and commands name the file; with --out a command works."""
    run = tmp_path / "run"
    loop.train(make_diffusion(), run)
    before = digests(run)
    with mounted(run, "--bind", "-o", "ro", str(run)):
        words = f"--workdir={run}", "--allow_code", "--num_samples=2", "--steps=2"
        line = one_line(capsys, "sample", *words)
        assert (
            f"{run}/samples/step_00000002_ema_seed0_steps_2.npz.partial/.lock could not be " in line
        )
        assert "Read-only file system" in line and "give --out=FILE in a folder that can" in line
        main.main(["sample", *words, f"--out={tmp_path}/x.npz"])
        with pytest.raises(OSError, match=rf"{run}/.lock could not be written: Read-only"):
            loop.train(make_diffusion(), run)
        line = one_line(capsys, "report", f"--workdir={run}")
        assert f"{run}/report.html could not be written: Read-only file system" in line
        line = one_line(capsys, "animate", f"--workdir={run}")
        assert f"{run}/previews.gif could not be written: Read-only file system" in line
    assert digests(run) == before and (tmp_path / "x.npz").exists()


@pytest.mark.slow
def test_a_mirror_on_a_full_drive_is_named(small_disk, tmp_path, capsys):
    fill(small_disk, 4096)
    file = small_disk / "run.zip"
    state = loop.train(make_config(training__mirror=str(file)), tmp_path / "run")
    assert int(state.step) == 6
    assert f"training continues: {file} could not be written: No space" in capsys.readouterr().out
    assert not list(small_disk.glob("*.zip"))


# ---- on the disk, not only in memory ---------------------------------------------------------------


def test_what_is_promised_is_synced_before_its_name_appears(tmp_path, monkeypatch):
    """Every file and folder of a checkpoint, then its rename, then the folder above; so are single files."""
    events, inode = [], lambda path: os.stat(path).st_ino
    real = os.fsync, os.rename, os.replace

    def fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        real[0](descriptor)

    def moved(function, source, target, **more):
        events.append(str(target))
        function(source, target, **more)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", functools.partial(moved, real[1]))
    monkeypatch.setattr(os, "replace", functools.partial(moved, real[2]))
    checkpoints.save(tmp_path, {"x": np.arange(9.0)}, step=5)
    here = events.index(str(tmp_path / "5"))
    parts = [tmp_path / "5", *(tmp_path / "5").rglob("*")]
    assert {inode(path) for path in parts} <= set(events[:here]) and len(parts) > 6
    assert inode(tmp_path) in events[here:]
    for name, write in (
        ("config.json", lambda path: config_lib.save(digits.get_config(), path)),
        ("a.npz", lambda path: writers.save_npz(path, {"x": np.arange(9)})),
    ):
        del events[:]
        write(str(tmp_path / name))
        assert events == [inode(tmp_path / name), str(tmp_path / name), inode(tmp_path)]
    del events[:]
    with results.png_folder(str(tmp_path / "many.npz"), {}, named=True) as save:
        save(0, np.zeros((3, 8, 8, 1), np.uint8))
    named = max(at for at, event in enumerate(events) if str(event).endswith(".png"))
    pictures = {inode(path) for path in (tmp_path / "many").glob("*.png")}
    assert len(pictures) == 3 and pictures | {inode(tmp_path / "many")} <= set(events[named:])
    del events[:]
    writers.append_line(str(tmp_path / "metrics.jsonl"), {"step": 1})
    assert not events  # a line each second is not promised
