"""Protection of a run: errors before anything is lost, and states saved on errors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import jax

from ddpm_jax.files import checkpoints, writers
from ddpm_jax.training import parallel
from ddpm_jax.training.signals import Signals
from ddpm_jax.training.step import NEVER, TrainState

FIRST_FILES = (  # written by a start before its first step
    *("config.json", "data.json", "log.txt", "metrics.jsonl", "data_preview.png", "forward.png"),
    checkpoints.LOCK,
)
LESS_MEMORY = (
    "Try, in this order: --config.step.accumulate=2, --config.model.remat=True, which a run may change as it"
    " continues; for a new run also --config.model.dtype=bfloat16, or a smaller"
    " --config.training.batch_size, --config.model.channels or --config.data.image_shape"
)


class TrainingError(RuntimeError):
    """Training cannot go on: one line with the step, the reason and what to do."""


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
            f" ({saved}). Begin anew, in another --workdir, with a lower config.optimizer.learning_rate"
            " or longer warmup_steps"
        )


@contextlib.contextmanager
def out_of_memory_advice():
    """Turns the device's out-of-memory error into one line that says what to change, in order."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"the device is out of memory. {LESS_MEMORY} ({str(error).splitlines()[0][:200]})"
        ) from error


def check_memory(needed: float, state: TrainState) -> None:
    """Refuses a step that does not fit in memory, before the system kills the program.

    Args:
      needed: bytes on each device, including the state, which is already allocated.

    Raises:
      TrainingError: names the settings to change.
    """
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = parallel.free_memory()
    if needed - held > free:
        raise TrainingError(
            f"a step needs {writers.memory(needed)} on each device, {writers.memory(held)} of it for the"
            f" state, which is there already, and only {writers.memory(free)} are free. {LESS_MEMORY}"
        )


@contextlib.contextmanager
def run_directory(workdir: str):
    """Makes and locks a run directory.

    Yields:
      a function that removes what a failed start created, and the directory itself if it was created here. Files of
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
        for name in set(FIRST_FILES) & set(os.listdir(workdir)) - set(before):
            os.remove(os.path.join(workdir, name))
        for folder in made:
            os.rmdir(folder)

    def undo_quietly():
        with contextlib.suppress(OSError):  # there is an error to be told already
            undo()

    with checkpoints.lock(workdir):
        yield undo_quietly


def what_is_saved(directory: str) -> str:
    """Describes the checkpoint that a run would continue from."""
    step = checkpoints.latest_step(directory)
    if step is None:
        return "nothing is saved: the same command begins at step 0"
    return f"step {step:,} is saved, and the same command continues there"


@contextlib.contextmanager
def save_on_error(current: Callable, directory: str, keep: int, signals: Signals, say: Callable):
    """Saves the state that `current` returns if an error not caused by the state ends the loop.

    A state is not saved if it is not finite, was donated to a step that failed, or could not be saved before; nor in a
    job of several processes, which can only save together.
    """
    try:
        yield
    except (TrainingError, checkpoints.CheckpointError):
        raise
    except Exception:
        if signals.begun and jax.process_count() == 1:
            with contextlib.suppress(
                Exception
            ):  # the error that is being handled is the one to tell
                state = current()
                check_finite(state, directory)
                checkpoints.save(directory, state, step=int(state.step), keep=keep)
            say(f"stopped by an error; {what_is_saved(directory)}")
        raise


@contextlib.contextmanager
def not_worth_a_run(say: Callable[[str], None]):
    """Turns an OSError into a warning: training continues without a picture or a log line."""
    try:
        yield
    except OSError as error:
        say(f"WARNING: not written, and training goes on: {error}")
