"""Checkpoints under every known kind of damage and interruption."""

import errno
import fcntl
import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.files import checkpoints
from ddpm_jax.files.checkpoints import CheckpointError, latest_step, prune, restore, save
from ddpm_jax.files.locks import lock


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: Any


@functools.cache
def make_state(step: int, width: int = 3) -> State:
    """Leaves of every kind: scalars, bfloat16, size 0, None, nested and empty optax states."""
    key = jax.random.fold_in(jax.random.key(0), step)
    params = {
        "conv_in": {"kernel": jax.random.normal(key, (4, width)), "bias": None},
        "half": jax.random.normal(key, (5,), jnp.bfloat16),
        "empty": jnp.zeros((0, 2)),
    }
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(schedule), {"conv_in": True, "half": True, "empty": False}),
    )
    opt_state = optimiser.init(params)
    _, opt_state = optimiser.update(params, opt_state, params)  # moments that are not zero
    return State(jnp.int32(step), params, opt_state)


def abstract_state(width: int = 3) -> State:
    return jax.eval_shape(lambda: make_state.__wrapped__(0, width))  # a cache would keep tracers


TEMPLATE = abstract_state()


def assert_restores(directory, expected, **kwargs):
    """`restore` returns exactly the state of step `expected`."""
    wanted_state = jax.device_get(make_state(expected))
    state, step = restore(directory, TEMPLATE, **kwargs)
    assert step == expected
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(wanted_state), strict=True):
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()


def save_steps(directory, *steps, **kwargs):
    for step in steps:
        save(directory, make_state(step), step=step, **kwargs)


def listing(directory):
    """A snapshot of a directory, which any change alters."""
    return {path: path.stat().st_mtime_ns for path in [directory, *directory.rglob("*")]}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def flip_byte(path: Path, at: float = 0.5):
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def data_files(checkpoint: Path):
    """The files with arrays in them, the largest first."""
    files = [path for path in (checkpoint / "state").rglob("d/*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


@pytest.fixture
def warned():
    """The lines that are logged."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    absl.logging.get_absl_logger().addHandler(handler)
    yield lines
    absl.logging.get_absl_logger().removeHandler(handler)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints 1, 2 and 3, which tests must not change."""
    directory = tmp_path_factory.mktemp("saved")
    save_steps(directory, 1, 2, 3)
    return directory


@pytest.fixture
def run(saved, tmp_path):
    """A copy of `saved`."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_round_trip(saved, warned):
    assert latest_step(saved) == 3
    assert_restores(saved, 3)
    assert_restores(saved, 1, step=1)
    assert not warned


def test_a_kill_before_the_old_ones_are_deleted(run):
    """The next start deletes them; not if the newest are newer than the step from which it continues, or damaged."""
    prune(run, step=3, keep=3)
    assert names(run) == ["1", "2", "3"]
    (run / "2" / "meta.json").unlink()
    prune(run, step=2, keep=1)
    assert names(run) == ["1", "2", "3"]
    prune(run, step=3, keep=2)
    assert names(run) == ["1", "2", "3"]
    prune(run, step=3, keep=1)
    assert names(run) == ["3"]
    prune(run / "none", step=3, keep=1)
    prune(run, step=0, keep=1)
    assert names(run) == ["3"]


def test_device_arrays_and_python_numbers(tmp_path):
    save(tmp_path, {"a": [jnp.arange(3), (np.float64(2), 7)]}, step=0)
    state, step = restore(
        tmp_path, {"a": [np.arange(3, dtype=np.int32), (np.ones(()), np.int64(0))]}
    )
    assert step == 0 and state["a"][0].tolist() == [0, 1, 2] and state["a"][1] == (2.0, 7)


def test_nothing_there(tmp_path):
    assert restore(tmp_path, TEMPLATE) is None
    assert restore(tmp_path / "none", TEMPLATE) is None
    assert latest_step(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are: none"):
        restore(tmp_path, TEMPLATE, step=5)
    assert not names(tmp_path)


def test_other_files_are_no_checkpoints(run):
    (run / "notes.txt").touch()
    (run / "7").touch()
    for name in ("3.bak", "08", "backup", "9.tmp"):
        (run / name).mkdir()
    assert latest_step(run) == 3
    assert_restores(run, 3)


def test_missing_step_names_those_there_are(saved):
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are: 1, 2, 3"):
        restore(saved, TEMPLATE, step=7)


def test_saving_again_is_a_no_op(run, warned):
    before = listing(run)
    save_steps(run, 3)
    assert listing(run) == before and not warned


def test_saving_other_values_loses_neither(run, warned):
    other = make_state(5)._replace(step=jnp.int32(3))
    save(run, other, step=3)
    assert names(run) == ["1", "2", "3", "3.replaced"]
    np.testing.assert_array_equal(restore(run, TEMPLATE)[0].params["half"], other.params["half"])
    (run / "3").rename(run / "other")
    (run / "3.replaced").rename(run / "3")
    assert_restores(run, 3)
    assert len(warned) == 1 and "3.replaced" in warned[0]


def test_a_renamed_checkpoint_is_passed_over(run, warned):
    """Its digests are valid, but the step inside is another one."""
    (run / "2").rename(run / "7")
    assert_restores(run, 3)
    assert len(warned) == 1 and "it holds step 2: the directory was renamed" in warned[0]
    with pytest.raises(CheckpointError, match=r"no good checkpoint.*7 \(.*it holds step 2"):
        restore(run, TEMPLATE, step=7)


def test_keep(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["3", "4"]
    save_steps(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["5"]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save_steps(tmp_path, 6, keep=0)


def test_one_flipped_byte_anywhere_is_never_wrong_numbers(run, saved, warned):
    """Any byte of any file may be flipped."""
    files = [path for path in (run / "3").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    for file in files:
        for at in (0.0, 0.5, 0.97):
            flip_byte(file, at)
            assert_restores(run, 2)
            shutil.copy(saved / file.relative_to(run), file)
    assert len(warned) == 3 * len(files)
    assert_restores(run, 3)


def test_what_orbax_returns_is_verified_too(run, monkeypatch, warned):
    """The files are intact, but orbax returns a wrong array."""
    real = checkpoints.ocp.Checkpointer.restore

    def wrong(self, path, **kwargs):
        arrays = real(self, path, **kwargs)
        if path.parent.name == "3":
            arrays["params/conv_in/kernel"][0, 0] += 1
        return arrays

    monkeypatch.setattr(checkpoints.ocp.Checkpointer, "restore", wrong)
    assert_restores(run, 2)
    assert "params/conv_in/kernel does not have its saved SHA-256" in warned[0]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "flipped byte in the data": lambda c: [flip_byte(path) for path in data_files(c)],
    "data cut": lambda c: [cut(path) for path in data_files(c)],
    "data gone": lambda c: [path.unlink() for path in data_files(c)],
    "manifest gone": lambda c: (c / "state" / "manifest.ocdbt").unlink(),
    "arrays gone": lambda c: shutil.rmtree(c / "state"),
    "metadata cut": lambda c: cut(c / "meta.json"),
    "metadata gone": lambda c: (c / "meta.json").unlink(),
    "metadata of another shape": lambda c: (c / "meta.json").write_text("[1]"),
    "empty": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_newest_is_passed_over_then_saved_again(run, damage, warned):
    damage(run / "3")
    before = listing(run)
    assert_restores(run, 2)
    assert listing(run) == before, "a reader changes nothing"
    assert len(warned) == 1 and f"{run / '3'} is damaged" in warned[0] and "\n" not in warned[0]

    save_steps(run, 3)
    assert names(run) == ["1", "2", "3", "3.damaged"]
    assert len(warned) == 2 and "3.damaged" in warned[1]
    assert_restores(run, 3)
    assert latest_step(run) == 3


def test_fallback_goes_back_step_by_step(run, warned):
    flip_byte(data_files(run / "3")[0])
    shutil.rmtree(run / "2" / "state")
    assert_restores(run, 1)
    assert ["/3 is" in line for line in warned] == [True, False]


def test_asking_for_a_damaged_step_does_not_fall_back(run, warned):
    shutil.rmtree(run / "2" / "state")
    with pytest.raises(CheckpointError, match="damaged: 2"):
        restore(run, TEMPLATE, step=2)
    assert_restores(run, 3)


def test_all_damaged_is_no_silent_restart(run, warned):
    for step in (1, 2, 3):
        flip_byte(data_files(run / str(step))[0])
    with pytest.raises(CheckpointError, match=r"no good checkpoint, damaged: 3 \(.*; 2 \(.*; 1 \("):
        restore(run, TEMPLATE)


def test_stray_later_directory_blocks_nothing(run, warned):
    (run / "9").mkdir()
    assert latest_step(run) == 3
    assert_restores(run, 3)
    save_steps(run, 4, 5, keep=1)
    assert latest_step(run) == 5
    assert_restores(run, 5)
    save_steps(run, 9)
    assert_restores(run, 9)
    assert names(run) == ["5", "9", "9.damaged"]


def test_half_deleted_old_checkpoint(run, warned):
    (run / "1" / "meta.json").unlink()
    save_steps(run, 4)
    assert names(run) == ["2", "3", "4"], "1 does not count as one of the three to keep"


def test_checkpoints_deleted_while_read(run, monkeypatch, warned):
    """A sampler reads 3 while training saves 4, 5 and 6, and deletes it."""
    real = checkpoints._read_arrays

    def slow(path, meta):
        if path.name == "3":
            save_steps(run, 4, 5, 6)
        return real(path, meta)

    monkeypatch.setattr(checkpoints, "_read_arrays", slow)
    assert_restores(run, 6)
    assert not warned


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            abstract_state(width=7),
            r"3: params/conv_in/kernel is saved as float32\[4, 3\] and expected as float32\[4, 7\]",
        ),
        (
            TEMPLATE._replace(step=jax.ShapeDtypeStruct((), jnp.float32)),
            r"3: step is saved as int32\[\] and expected as float32\[\]",
        ),
        (
            TEMPLATE._replace(params=TEMPLATE.params | {"new": TEMPLATE.step}),
            r"3: params/new is saved as nothing and expected as int32\[\]",
        ),
        (
            TEMPLATE._replace(params=TEMPLATE.params | {"half": None}),
            r"3: params/half is saved as bfloat16\[5\] and expected as nothing",
        ),
    ],
    ids=["shape", "dtype", "missing", "extra"],
)
def test_mismatch_is_the_config_not_damage(saved, template, message, monkeypatch, warned):
    monkeypatch.delattr(checkpoints, "_read_arrays")  # told before the arrays are read
    with pytest.raises(CheckpointError, match=message + ": the config differs"):
        restore(saved, template)
    assert not warned


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("leaf", ["kernel", "half"])
def test_not_finite_is_not_saved(run, value, leaf):
    state = jax.tree.map(np.array, make_state(4))
    if leaf == "half":
        state.params["half"][2] = value
    else:
        state.params["conv_in"]["kernel"][1, 2] = value
    before = listing(run)
    with pytest.raises(CheckpointError, match=f"4: not saved, since params/.*{leaf} is not finite"):
        save(run, state, step=4)
    assert listing(run) == before


def test_two_leaves_of_one_path(tmp_path):
    with pytest.raises(ValueError, match="same path"):
        save(tmp_path, {"a/b": np.ones(1), "a": {"b": np.ones(1)}}, step=1)


def start(code: str, directory: Path) -> subprocess.Popen:
    """A second process that works on `directory`."""
    imports = "import sys, time, pathlib, numpy as np\nfrom ddpm_jax.files.checkpoints import *\nfrom ddpm_jax.files.locks import lock\n"
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            imports + "directory = pathlib.Path(sys.argv[1])\n" + code,
            directory,
        ],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_disk_full(run):
    """A file-size limit stands for a full disk; orbax reports both in the same way."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(directory, {"x": np.random.default_rng(0).normal(size=50_000)}, step=4)
except CheckpointError as error:
    print("refused:", error)
save(directory, {"x": np.ones(3)}, step=5)
"""
    before = listing(run / "3")
    output, _ = start(code, run).communicate(timeout=60)
    assert output.startswith(f"refused: {run / '4'}: not saved ("), output
    assert output.count("\n") == 1 and "File too large" in output, "one line, with the cause"
    assert "earlier checkpoints are untouched: free space" in output
    assert listing(run / "3") == before
    assert names(run) == ["2", "3", "5"], "the failed save left nothing; the next one worked"


def test_disk_too_full_to_begin(run, monkeypatch):
    before = listing(run)
    usage = shutil.disk_usage(run)._replace(free=7)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"4: not saved .*it takes 186 bytes, and 7 are free"):
        save_steps(run, 4)
    assert listing(run) == before


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"not saved \(NotADirectoryError.*permissions"):
        save_steps(tmp_path / "file" / "checkpoints", 1)


@pytest.mark.slow
def test_kill_9_while_saving(tmp_path):
    """No save that returned is lost, and what the kill left behind is gone after the next one."""
    code = """
for step in range(latest_step(directory) + 1, 10**6):
    save(directory, {"x": np.full(300_000, step, np.float32)}, step=step, keep=2)
    print(step, flush=True)
"""
    template = {"x": jax.ShapeDtypeStruct((300_000,), np.float32)}
    save(tmp_path, {"x": np.zeros(300_000, np.float32)}, step=0)
    for wait in (0.01, 0.05, 0.09):
        process = start(code, tmp_path)
        process.stdout.readline()
        time.sleep(wait)
        process.kill()
        returned = [int(line) for line in process.communicate()[0].split()]
        state, step = restore(tmp_path, template)
        assert step >= max(returned, default=0)
        assert (state["x"] == step).all()
    save(tmp_path, {"x": np.zeros(300_000, np.float32)}, step=step + 1, keep=2)
    assert names(tmp_path) == sorted([str(step), str(step + 1)])


def test_lock(tmp_path):
    process = start("with lock(directory):\n print('held', flush=True)\n time.sleep(60)", tmp_path)
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(CheckpointError, match=f"in use by process {process.pid} on host "),
        lock(tmp_path),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on host")
        with pytest.raises(CheckpointError, match="in use"), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass


def test_lock_without_support_warns(tmp_path, monkeypatch, warned):
    def flock(*_):
        raise OSError("Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    with lock(tmp_path / "run"):
        assert len(warned) == 1 and "cannot be locked (Operation not supported)" in warned[0]


def test_the_lock_of_a_removed_directory_is_taken_again(tmp_path, monkeypatch):
    """Its file is opened, and another process removes the directory before it is locked."""
    directory, real, calls = tmp_path / "x.npz.partial", fcntl.flock, []

    def flock(file, how):
        if not calls:
            shutil.rmtree(directory)
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(directory), pytest.raises(CheckpointError, match="in use"), lock(directory):
        pass
    assert (directory / ".lock").exists()


def test_a_locked_directory_is_removed_on_nfs(tmp_path, monkeypatch):
    """There a file that is open when it is removed has another name until it is closed."""
    directory, hidden = tmp_path / "x.npz.partial", tmp_path / "x.npz.partial" / ".nfs0001"
    rmdir, tried = Path.rmdir, []

    def remove_directory(path):
        if tried:  # the file has been closed
            os.remove(hidden)
        tried.append(path)
        rmdir(path)

    monkeypatch.setattr(Path, "unlink", lambda path: os.rename(path, hidden))
    monkeypatch.setattr(Path, "rmdir", remove_directory)
    with lock(directory) as remove:
        remove()
        assert hidden.exists()
    assert not directory.exists() and len(tried) == 2


def test_a_lock_leaves_an_empty_directory_alone(tmp_path):
    with lock(tmp_path):
        (tmp_path / ".lock").unlink()
    assert tmp_path.is_dir()


def test_ctrl_c_in_a_save_spares_what_was_there(tmp_path, monkeypatch):
    """This includes a checkpoint of the same step, which the new one would have replaced."""
    save(tmp_path, make_state(1), step=1)
    save(tmp_path, make_state(2), step=2)

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_sha256_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, make_state(7), step=2)
    assert names(tmp_path) == ["1", "2"]
    assert_restores(tmp_path, 2)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE, errno.EIO])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(number, tmp_path, monkeypatch):
    """Skipping it for an older checkpoint would repeat its training steps."""
    save(tmp_path, make_state(1), step=1)
    save(tmp_path, make_state(2), step=2)
    read = Path.read_text

    def refused(path, *arguments, **given):
        if path.parent.name == "2":
            raise OSError(number, os.strerror(number), str(path))
        return read(path, *arguments, **given)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(CheckpointError, match=rf"2 cannot be read: .*{os.strerror(number)}.*; run"):
        restore(tmp_path, TEMPLATE)


def test_a_damaged_checkpoint_of_another_optimizer_is_passed_over(tmp_path, warned):
    """Refused as one that does not fit, it would block the way back to the older one."""
    save(tmp_path, make_state(1), step=1)
    save(tmp_path, make_state(2, width=4), step=2)
    with pytest.raises(CheckpointError, match=r"2: .*the config differs"):
        restore(tmp_path, TEMPLATE)
    files = filter(Path.is_file, (tmp_path / "2" / "state").rglob("*"))
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert_restores(tmp_path, 1)
    assert "2 is damaged and passed over" in warned[0]
