"""Guards of a training run: checks before anything is lost, and a checkpoint when an error ends it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable

import jax

from ddpm_jax import augmentation, data, options, processes
from ddpm_jax.files import checkpoints, locks, writers
from ddpm_jax.files.progress import memory
from ddpm_jax.names import check_choice
from ddpm_jax.options import ConfigError
from ddpm_jax.training import parallel
from ddpm_jax.training.length import Length
from ddpm_jax.training.signals import Signals
from ddpm_jax.training.step import NEVER, TrainState, make_update

FIRST_FILES = (  # written by a start before its first step
    *("config.json", "data.json", "log.txt", "metrics.jsonl", "data_preview.png", "forward.png"),
    *("loggers.json", "wandb_id", locks.LOCK),
)
UNPACKED = ".mirror"  # begins the names of folders in which a mirror is unpacked
FIRST_FOLDERS = ("tensorboard", "wandb")


class TrainingError(RuntimeError):
    """Training cannot continue: one line with the step, the reason and what to do."""


def check_types(config) -> None:
    """Checks the types of fields that are read directly from the config.

    Raises:
      ConfigError: a field of the wrong type, such as None.
    """
    arguments = ("method", "tx", "key", "axis_name")
    options.bind(make_update, config.step, "config.step", given=arguments)
    augmentation.of(config.data)
    section = {
        name: value for name, value in config.data.items() if name not in augmentation.FIELDS
    }
    options.bind(data.load, section, "config.data", given=("split",))
    whole = {"config.seed": config.get("seed")}
    for name in ("every", "num_images"):
        whole[f"config.preview.{name}"] = config.preview.get(name)
    for field, value in whole.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{field} must be int, got {value!r}")


def check_finite(state: TrainState, directory: str) -> None:
    """Checks a state before it is used or saved.

    Raises:
      TrainingError: a loss or a gradient was not finite; names the step.
    """
    bad_step = int(state.metrics.bad_step)
    if bad_step != NEVER:
        good = checkpoints.latest_step(directory)
        saved = "no checkpoint was saved yet" if good is None else f"the last is step {good:,}"
        raise TrainingError(
            f"the loss or its gradient is not finite at step {bad_step:,}; no checkpoint holds it"
            f" ({saved}). Start a new run, in another --workdir, with a lower"
            " config.optimizer.learning_rate or longer warmup_steps"
        )


def less_memory(config, times: float = 2.0) -> str:
    """What to change, and by how much, so that the images of a step need this many times less memory."""
    size, parts = config.training.batch_size, config.step.get("accumulate", 1)
    each = size // parts // jax.device_count()  # images that a device computes at a time
    fits = max((n for n in range(1, each + 1) if each % n == 0 and n * times <= each), default=1)
    changes = []
    if fits < each:
        changes += [f"--config.step.accumulate={parts * each // fits} (now {parts})"]
    if jax.default_backend() != "cpu" and not config.get("model", {}).get("remat", True):
        changes += ["--config.model.remat=True"]  # XLA takes it away again on a CPU
    smaller = max(1, int(size / times) // jax.device_count()) * jax.device_count()
    new = ["a smaller network or smaller images"]
    if smaller < size:
        new.insert(0, f"--config.training.batch_size={smaller} (now {size})")
    if config.get("model", {}).get("dtype") == "float32":
        new.insert(0, "--config.model.dtype=bfloat16")
    started = f"Change {' or '.join(changes)}, also of a started run; for" if changes else "For"
    return f"{started} a new run {' or '.join(new)}"


@contextlib.contextmanager
def out_of_memory_advice(config):
    """Turns the device's out-of-memory error into one line that names the settings to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"the device is out of memory. {less_memory(config)} ({str(error).splitlines()[0][:200]})"
        ) from error


def check_memory(config, needed: float, state: TrainState) -> None:
    """Refuses a step that does not fit in memory, before the system kills the program.

    Args:
      needed: bytes on each device, including the state, which is already allocated.

    Raises:
      TrainingError: names the settings to change.
    """
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = parallel.free_memory()
    if needed - held > free:
        advice = less_memory(config, (needed - held) / max(free, 1.0))
        raise TrainingError(
            f"a step needs {memory(needed)} on each device, of which the state already holds"
            f" {memory(held)}, and only {memory(free)} are free. {advice}"
        )


def check_saving(state: TrainState, directory: str, length: Length, say: Callable) -> None:
    """Checks that checkpoints can be saved, and says how much disk space they take.

    Raises:
      ConfigError: config.training.keep_best is not the name of a number of metrics.jsonl.
      TrainingError: the disk has no room for a checkpoint.
    """
    if length.keep_best is not None:
        known = [*state.metrics.sums, "learning_rate", "images_per_second"]
        with options.errors_at("config.training.keep_best"):
            check_choice("number of metrics.jsonl", length.keep_best.removeprefix("-"), known)
    if int(state.step) >= length.num_steps:
        return
    size, saved = checkpoints.size_of(state), len(checkpoints.complete_steps(directory))
    kept, free = length.keep + bool(length.keep_best), writers.free_space(directory)
    if free < size:
        raise TrainingError(
            f"a checkpoint takes {memory(size)}, and {directory} has {memory(free)} of free disk space; free some,"
            " or choose another --workdir"
        )
    line = f"a checkpoint takes {memory(size)}; {kept} are kept, with one more while it is written:"
    line += f" {memory((kept + 1) * size)}; {memory(free)} of the disk are free"
    missing = (kept + 1 - saved) * size - free
    say(f"WARNING: {line}, {memory(missing)} too little" if missing > 0 else line)


@contextlib.contextmanager
def run_directory(workdir: str):
    """Creates and locks a run directory.

    Yields:
      a function that removes the files of a failed start, and the directory itself if it was created here. Files of
      other programs stay.

    Raises:
      CheckpointError: another process trains there.
    """
    made, folder = [], workdir
    while not os.path.lexists(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    before = () if made else os.listdir(workdir)

    def undo():
        with contextlib.suppress(OSError):  # the error that ended the start is the one to report
            for name in set(FIRST_FILES) & set(os.listdir(workdir)) - set(before):
                os.remove(os.path.join(workdir, name))
            for name in set(FIRST_FOLDERS) & set(os.listdir(workdir)) - set(before):
                shutil.rmtree(os.path.join(workdir, name))
            for folder in made:
                os.rmdir(folder)

    with locks.lock(workdir):
        yield undo


def sweep(workdir: str, step: int = 0, keep: int = 1, keep_best: str | None = None) -> None:
    """Removes what a killed training left in its run directory: unfinished files, and checkpoints that a save deletes."""
    leftovers = ("*.tmp", f"{UNPACKED}*", "samples/step_*.tmp.png", "checkpoints/[0-9]*.tmp")
    leftovers += ("*.tmp.png", "*.tmp.json", "*.tmp.jsonl")
    for path in (found for pattern in leftovers for found in pathlib.Path(workdir).glob(pattern)):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpoints.prune(
        os.path.join(workdir, "checkpoints"), step=step, keep=keep, keep_best=keep_best
    )


def what_is_saved(directory: str) -> str:
    """Describes the checkpoint that a run would continue from."""
    step = checkpoints.latest_step(directory)
    if step is None:
        return "nothing is saved: the same command begins at step 0"
    return f"step {step:,} is saved, and the same command continues there"


@contextlib.contextmanager
def save_on_error(save: Callable, copy: Callable, directory: str, signals: Signals, say: Callable):
    """Calls `save`, and then `copy`, if an error not caused by the state ends the loop.

    A state is not saved if it is not finite, was donated to a step that failed, or could not be saved before; nor in a
    job of several processes, which can only save together.
    """
    try:
        yield
    except (TrainingError, checkpoints.CheckpointError):
        raise
    except Exception:
        if signals.begun and processes.count() == 1:
            with contextlib.suppress(Exception):  # the error being handled is the one to report
                save()
                copy()
            say(f"stopped by an error; {what_is_saved(directory)}")
        raise


@contextlib.contextmanager
def os_errors_as_warnings(say: Callable[[str], None], errors: type[Exception] = OSError):
    """Turns an OSError into a warning: training continues without a picture or a log line."""
    try:
        yield
    except errors as error:
        line = " ".join(str(error).split())
        say(f"WARNING: a file could not be written; training continues: {line}")
