"""Training: one visible loop, from a config to a run directory.

    from ddpm_jax.train import train
    train(config, "runs/digits")

The same call again resumes at the last checkpoint. The directory holds config.json, log.txt,
metrics.jsonl, loss.png, data_preview.png, forward.png (the forward process, of a diffusion),
checkpoints/ and previews such as samples/step_00000500.png.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import json
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import checkpoints, data, parallel, schedules, training, writers
from ddpm_jax import config as config_lib
from ddpm_jax.ddpm import Method, diffusion_method, fold_in_each, labels_of, make_method
from ddpm_jax.diffusion import from_uint8, q_path, to_uint8
from ddpm_jax.runs import (
    CLASSES_OF_DATA,
    as_numbered,
    check_classes,
    check_data,
    class_list,
    drawn,
    ema_warning,
    fill_in,
    load_data,
    save_data,
    saved_data,
    with_absolute_paths,
)
from ddpm_jax.unet import UNet

# What may differ when a run is continued: how long, how often, where from; never what is learned.
FREE_TO_CHANGE = (
    "config.data.data_dir",
    "config.data.memory_limit_gb",
    "config.training.num_steps",
    "config.training.log_every",
    "config.training.checkpoint_every",
    "config.training.checkpoint_minutes",
    "config.training.keep",
    "config.model.remat",
    "config.step.accumulate",
    "config.preview.",
)
CHANGES = ("data",)  # what `change` may name
FIRST_PREVIEW_SECONDS = 20.0  # something to look at before one walks away
HEARTBEAT_SECONDS = 10.0
FORWARD_ROWS, FORWARD_TIMES = 4, 10  # images and times of forward.png
FIRST_FILES = (  # that a start writes before its first step
    *("config.json", "data.json", "log.txt", "metrics.jsonl", "data_preview.png", "forward.png"),
    checkpoints.LOCK,
)
GRACE_SECONDS = 2.0  # for the main thread to leave by itself
LESS_MEMORY = (
    "Try, in this order: --config.step.accumulate=2, --config.model.remat=True, which a run may change as it"
    " continues; for a new run also --config.model.dtype=bfloat16, or a smaller"
    " --config.training.batch_size, --config.model.channels or --config.data.image_shape"
)


class TrainingError(RuntimeError):
    """Training cannot go on: one line with the step, the reason and what to do."""


def train(config, workdir: str, *, change: Sequence[str] = ()) -> training.TrainState:
    """Trains what a ConfigDict says in a directory, from its last checkpoint if it has one.

    SIGTERM and Ctrl-C let the running step end; then everything is saved, and SystemExit is raised with
    128 + the signal's number. So is a good state when anything else ends the run, such as a picture that
    cannot be read. A start that fails takes back the files that it made, and the directory if it made that.

    Args:
      change: what may differ from the run that is continued: "data" for other images at the same or at
        another place.

    Returns:
      the state after the last step, on the devices.

    Raises:
      ConfigError, DataError, CheckpointError, TrainingError: one line that says what to do.
      KeyboardInterrupt: a second Ctrl-C, or one before the first step; its text says what is saved.
    """
    given = ("config", "workdir", "say", "signals", "change")
    with config_lib.errors_at("--change"):
        for what in change:
            config_lib.check_choice("change", what, CHANGES)
    loop = config_lib.arguments("config.training", _train, config.training, given)
    check_types(config)
    config = with_absolute_paths(config)  # a copy: the caller's own is left as it is
    workdir = os.path.abspath(config_lib.path(workdir))
    leader = jax.process_index() == 0
    say = writers.Log(os.path.join(workdir, "log.txt") if leader else None)
    with run_directory(workdir) if leader else contextlib.nullcontext(lambda: None) as undo:

        def leave(words: str) -> str:
            """Undoes a start that came to nothing, and adds to the words what is saved."""
            if not signals.begun:
                undo()
            return f"{words}; {what_is_saved(os.path.join(workdir, 'checkpoints'))}"

        signals = Signals(say, leave)
        try:
            with signals, out_of_memory_advice():
                say(f"run directory: {workdir}")
                state = _train(config, workdir, say, signals, change=change, **loop)
                say(f"run directory: {workdir}")
                return state
        except KeyboardInterrupt:
            raise KeyboardInterrupt(leave("stopped by Ctrl-C")) from None
        except BaseException as error:
            if not signals.begun:
                undo()
                if isinstance(error, SystemExit):
                    say(leave("stopped by SIGTERM"))
                    # As if it had not been caught: an orderly exit would wait for a step that is running.
                    signal.raise_signal(signal.SIGTERM)
            raise


def _train(
    config,
    workdir: str,
    say: writers.Log,
    signals: Signals,
    *,
    change: Sequence[str],
    num_steps: int,
    batch_size: int,
    log_every: int = 100,
    checkpoint_every: int = 5000,
    checkpoint_minutes: float = 10.0,
    keep: int = 3,
) -> training.TrainState:
    path = functools.partial(os.path.join, workdir)
    leader = jax.process_index() == 0
    say(parallel.banner())

    # The parts. Whatever is wrong with the config is said here, before anything is computed.
    with config_lib.errors_at("config.training"):
        if min(num_steps, log_every, checkpoint_every, keep) < 1 or checkpoint_minutes <= 0:
            raise ValueError("num_steps, the intervals and keep must all be positive")
        parallel.check_batch_size("batch_size", batch_size, config.step.accumulate)
    with config_lib.errors_at("config.seed"):
        keys = training.make_keys(config.seed)
    directory = path("checkpoints")
    own_shape = config.data.image_shape is None
    if own_shape and os.path.isdir(directory):  # what a run began with holds
        config.data.image_shape = config_lib.load(path("config.json")).data.image_shape
    dataset = fill_in(config)
    method = make_method(config)
    tx, learning_rate = training.optimizer_of(config)
    given = {"method": method, "tx": tx, "key": keys.train, "axis_name": parallel.AXIS}
    update = config_lib.call("config.step", training.make_update, config.step, **given)
    preview_every, preview = make_preview(config, method, keys.preview)
    if os.path.isdir(directory):
        refuse_another_config(config, path("config.json"), moved=True)
        as_saved(config, path("config.json"))

    # The data, and a look at them.
    dataset = dataset or load_data(config)
    if os.path.isdir(directory):
        dataset = as_numbered(workdir, dataset)
    say(dataset.describe())
    for line in dataset.left_out:
        say(f"left out: {line}")
    if dataset.class_names:
        say(f"classes: {class_list(dataset)}")
    if config.data.get("flip"):
        say("training images are mirrored left to right with probability 1/2 (config.data.flip)")
    if own_shape:
        shape = ",".join(map(str, dataset.image_shape))
        say(f"image size taken from the data, as with --config.data.image_shape={shape}")
    check_classes(method, dataset)
    if os.path.isdir(directory):
        for line in check_data(workdir, dataset, may_change="data" in change):
            say(f"WARNING: {line}")
    if method.diffusion is not None:
        chosen = dataset.fetch(data.choose(len(dataset), 64))
        moment = np.mean(np.square(chosen / 127.5 - 1.0))
        say(describe_schedule(method.diffusion.schedule, second_moment=moment))
    source = functools.partial(
        data.batches,
        dataset,
        seed=config.seed,
        batch_size=batch_size,
        rows=parallel.local_rows(batch_size),
    )

    # The state: new, or from the last checkpoint of this very config.
    init_state = functools.partial(training.init_state, method, tx)
    state, step = None, 0
    if os.path.isdir(directory):
        template = jax.eval_shape(init_state, keys.init)
        state, step = checkpoints.restore(directory, template) or (None, 0)
    if state is None:
        state = init_state(keys.init)
    else:
        say(f"resuming at step {step:,}")
        if config.optimizer.decay != "none" and config_lib.differences(
            config_lib.load(path("config.json")).training, config.training
        ).get("config.num_steps"):
            say(
                "WARNING: another num_steps moves the end of the cosine: the learning rate jumps here"
            )
    state = parallel.place(state)

    def begin():
        """Writes the first files of the run, once nothing is left to be refused."""
        if leader:
            say.begin()
            config_lib.save(config, path("config.json"))
            if saved_data(workdir) is None:
                save_data(workdir, dataset)
            shown = shown_images(method, dataset, keys.train, config.seed, batch_size)
            writers.save_png(path("data_preview.png"), writers.grid(shown))
            if method.diffusion is not None:
                save_forward(path("forward.png"), method.diffusion.schedule, shown, keys.preview)
            writers.rewind_metrics(path("metrics.jsonl"), step)

    if step >= num_steps:
        begin()
        say(f"nothing to do: {step:,} of {num_steps:,} steps are done")
        return state

    # The step, compiled.
    clock = time.perf_counter()
    example = parallel.shard(next(source(start=step, stop=step + 1)))
    train_step = parallel.compile_step(update, state, example)
    say(
        f"{sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)):,} parameters; compiled in"
        f" {writers.duration(time.perf_counter() - clock)}; a step needs"
        f" {writers.memory(parallel.memory(train_step))} on each device"
    )
    check_memory(parallel.memory(train_step), state)
    begin()

    def log(state):
        """Ends a span of steps: a line of metrics.jsonl, and none of them counted twice."""
        check_finite(state, directory)
        rate, values = progress.rate(), training.means(state.metrics)
        text = f"loss {values['loss']:.4f}  gradient norm {values['grad_norm']:.3g}"
        say(progress.line(text))
        progress.begin()
        if leader:
            row = {"step": step, **values, "learning_rate": float(learning_rate(step - 1))}
            with not_worth_a_run(say):
                writers.append_metrics(path("metrics.jsonl"), {**row, "images_per_second": rate})
        return state.replace(metrics=parallel.place(training.clear(state.metrics)))

    def look(state, early):
        """Pictures of where the model is."""
        check_finite(state, directory)
        if leader:
            picture, rows = path("samples", f"step_{step:08d}.png"), preview(state, step)
            with not_worth_a_run(say):
                writers.save_grids(picture, *rows)
                if early:
                    say(f"an early look: {picture}; the others come every {preview_every:,} steps")
            with not_worth_a_run(say):
                rows = writers.read_metrics(path("metrics.jsonl"))
                writers.save_loss_curve(path("loss.png"), rows)

    # The loop. It waits for the step before the last, never for the one just sent: the device always
    # has work, and the clock still tells the truth.
    progress = writers.Progress("step", num_steps, step, unit="images", per_count=batch_size)
    sent = collections.deque()
    started = saved = spoke = time.perf_counter()
    looked = step > 0
    with (
        contextlib.closing(source(start=step, stop=num_steps)) as batches,
        save_on_error(lambda: state, directory, keep, signals, say),
    ):
        for batch in batches:
            state, loss = train_step(state, parallel.shard(batch))
            step += 1
            sent.append(loss)
            if len(sent) > 2 or not signals.begun:
                jax.block_until_ready(sent.popleft())
            signals.begun = True
            progress.done = step
            end = step == num_steps
            if step % log_every == 0 or end:
                jax.block_until_ready(loss)
                state = log(state)
                spoke = time.perf_counter()
            elif time.perf_counter() - spoke > HEARTBEAT_SECONDS:
                check_finite(state, directory)
                say(progress.line())
                spoke = time.perf_counter()

            now = time.perf_counter()
            stop = bool(signals.caught)
            due = stop or now - saved > 60 * checkpoint_minutes
            if jax.process_count() > 1:
                # They must save together, so they ask each other, at steps that all of them know.
                agree = step % log_every == 0
                stop, due = (agree and parallel.any_process(wish) for wish in (stop, due))
            with progress.pause():
                if due or step % checkpoint_every == 0 or end:
                    check_finite(state, directory)
                    checkpoints.save(directory, state, step=step, keep=keep)
                    if leader and "data" in change:
                        save_data(workdir, dataset)  # now the state has seen them
                    saved = time.perf_counter()
                early = not looked and now - started > FIRST_PREVIEW_SECONDS
                early = early and step % preview_every != 0 and not end
                if not stop and (early or step % preview_every == 0 or end):
                    look(state, early)
                    looked = True
            if stop:
                number = (
                    signals.caught[0] if signals.caught else signal.SIGTERM
                )  # of another process
                say(
                    f"stopped by {number.name} after step {step:,}, which is saved; the same command continues"
                    f"\nrun directory: {workdir}"
                )
                raise SystemExit(128 + number)
    if warning := ema_warning(config, step):
        say(f"WARNING: {warning}")
    return state


# ---- the parts of a run ----------------------------------------------------------------------------


def describe_schedule(schedule: schedules.Schedule, second_moment: float) -> str:
    """One line on the health of a chain, and a warning if it has one."""
    health = schedules.health(schedule, second_moment=float(second_moment))
    line = (
        f"schedule: {len(schedule)} steps, sum of beta {health.sum_beta:.4g}, alpha_bar_T ="
        f" {health.alpha_bar_T:.3g} (at most {health.alpha_bar_bound:.3g}),"
        f" prior term {health.prior_bits_per_dim:.3g} bits/dim"
    )
    return f"{line}\nWARNING: {health.warning}" if health.warning else line


def check_types(config) -> None:
    """Checks fields that are read before what they configure is made.

    Raises:
      ConfigError: one of another type, such as None.
    """
    given = ("method", "tx", "key", "axis_name")
    config_lib.arguments("config.step", training.make_update, config.step, given)
    section = {name: value for name, value in config.data.items() if name != "flip"}
    config_lib.arguments("config.data", data.load, section, ("split",))
    whole = {"config.seed": config.get("seed")}
    whole |= {
        f"config.preview.{name}": config.preview.get(name) for name in ("every", "num_images")
    }
    for field, value in whole.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise config_lib.ConfigError(f"{field} must be int, got {value!r}")


def shown_images(method: Method, dataset, key, seed: int, batch_size: int) -> np.ndarray:
    """The first images that the network is shown, uint8 [N, H, W, C] for at most 64: as `loss` has them."""
    count = min(len(dataset), 64)
    several = {"seed": seed, "start": 0, "stop": -(-count // batch_size), "batch_size": batch_size}
    images = []
    for step, batch in enumerate(data.batches(dataset, **several)):
        if method.shown is None:
            images.append(batch["image"])
        else:
            images.append(to_uint8(method.shown(jax.random.fold_in(key, step), batch)))
    return np.concatenate(images)[:count]


def save_forward(path: str, schedule: schedules.Schedule, images: np.ndarray, key) -> None:
    """Draws how the forward process turns images into noise: a row for each, from x_0 on the left to x_T."""
    images = images[:FORWARD_ROWS]
    last = len(schedule) - 1
    tau = np.unique(np.round(np.linspace(0, last, FORWARD_TIMES)).astype(int))
    chain = schedules.respace(schedule, tau)
    keys = fold_in_each(key, np.arange(len(images)))
    rows = to_uint8(q_path(chain, from_uint8(images), keys))
    rows = np.concatenate([images[:, None], rows], axis=1)
    title = f"data, then x_t at t = {', '.join(map(str, tau))}"
    writers.save_grids(path, [(title, rows.reshape(-1, *images.shape[1:]))], columns=len(tau) + 1)


def make_preview(config, method: Method, key) -> tuple[int, Callable]:
    """config.preview.every, and (state, step) -> (rows, columns) for `writers.save_grids`.

    Raw and EMA parameters draw from the same noise at every preview, so that rows can be compared.
    """
    options = dict(config.preview)
    every, count = options.pop("every"), options.pop("num_images")
    if every < 1 or count < 1:
        raise config_lib.ConfigError("config.preview: every and num_images must be at least 1")
    sample = config_lib.call("config.preview", method.make_sample, options)
    index = np.arange(count)
    draw = parallel.map_examples(lambda *args: drawn(sample(*args)))

    def preview(state, step):
        rows = []
        for name, params in (("raw", state.params), ("EMA", state.ema_params)):
            images, finite = draw(params, key, index, labels_of(method, index))
            bad = "" if finite.all() else f": {np.sum(~finite)} of {count} images are not finite"
            rows.append((f"step {step:,}, {name}{bad}", images))
        return rows, min(count, 8)

    return every, preview


def refuse_another_config(config, path: str, *, moved: bool = False) -> None:
    """A run keeps the config it began with, but for `FREE_TO_CHANGE`.

    Args:
      moved: the data may have another name or place: they are compared themselves, by `runs.check_data`.

    An image_shape of None and a num_classes of −1 were filled in from the data, and stand for what is
    saved, as does the num_timesteps of a list of betas. A field that one of the two lacks, because it is
    older than the field, stands for its default.

    Raises:
      ConfigError: names the fields, what is saved and what was given.
    """
    of_betas = config.get("schedule", {}).get("name") == "betas"
    saved_config, config = (with_absolute_paths(c) for c in (config_lib.load(path), config))
    free = FREE_TO_CHANGE
    if moved and saved_data(os.path.dirname(path)) is not None:
        free += ("config.data.name", "config.data.flatten", "config.data.skip_broken")
    changed = [
        f"{field} is {saved!r} there and {given!r} here"
        for field, (saved, given) in config_lib.differences(saved_config, config).items()
        if not field.startswith(free)
        and not (field == "config.data.image_shape" and given is None)
        and not (field == "config.model.num_classes" and given == CLASSES_OF_DATA)
        and not (field == "config.schedule.num_timesteps" and of_betas)
        and _or_default(field, saved) != _or_default(field, given)
    ]
    if changed:
        raise config_lib.ConfigError(
            f"{path} belongs to another run: {'; '.join(changed)}. Give the saved values to continue"
            " it, or another --workdir to begin anew"
        )


def as_saved(config, path: str) -> None:
    """Gives the sections that recipes digest the fields that the run began with, not those of a newer program.

    They mean the same, by `refuse_another_config`; but results of the same weights are to stay theirs.
    """
    saved = config_lib.load(path)
    for section in ("model", "schedule", "diffusion"):
        if section in saved and section in config:
            free = {
                name: value
                for name, value in config[section].items()
                if f"config.{section}.{name}" in FREE_TO_CHANGE and name in saved[section]
            }
            config[section] = ConfigDict({**saved[section], **free})


def _or_default(field: str, value):
    """The value of a config's field or, where it is missing, the default in the signature that reads the section."""
    readers = {
        "data": data.load,
        "model": UNet,
        "schedule": schedules.make,
        "diffusion": diffusion_method,
        "optimizer": training.make_optimizer,
        "step": training.make_update,
        "training": _train,
    }
    section, _, name = field.removeprefix("config.").rpartition(".")
    if value != config_lib.MISSING or section not in readers:
        return value
    parameter = inspect.signature(readers[section]).parameters.get(name)
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return value
    return json.loads(json.dumps(parameter.default))  # as a saved config has it: lists for tuples


def check_finite(state: training.TrainState, directory: str) -> None:
    """Before anything is made of a state.

    Raises:
      TrainingError: a loss or a gradient was not finite; names the step.
    """
    bad_step = int(state.metrics.bad_step)
    if bad_step != training.NEVER:
        good = checkpoints.latest_step(directory)
        saved = "no checkpoint was saved yet" if good is None else f"the last is step {good:,}"
        raise TrainingError(
            f"the loss or its gradient is not finite at step {bad_step:,}; no checkpoint holds it"
            f" ({saved}). Begin anew, in another --workdir, with a lower config.optimizer.learning_rate"
            " or longer warmup_steps"
        )


@contextlib.contextmanager
def out_of_memory_advice():
    """Turns the device's own error into one line that says what to change, in this order."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"the device is out of memory. {LESS_MEMORY} ({str(error).splitlines()[0][:200]})"
        ) from error


def check_memory(needed: float, state: training.TrainState) -> None:
    """Refuses a step that cannot fit, before the system kills the program for it.

    Args:
      needed: bytes on each device, of which the state has its part already.

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


# ---- what a run keeps, whatever ends it --------------------------------------------------------------


@contextlib.contextmanager
def run_directory(workdir: str):
    """Makes and locks a run directory.

    Yields:
      a function that takes back what a start makes in it, and the directory itself if it was made here. What
      other programs have put there stays.

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
    """What a run continues from, in words."""
    step = checkpoints.latest_step(directory)
    if step is None:
        return "nothing is saved: the same command begins at step 0"
    return f"step {step:,} is saved, and the same command continues there"


@contextlib.contextmanager
def save_on_error(current: Callable, directory: str, keep: int, signals: Signals, say: Callable):
    """Saves the state that `current` returns if an error ends the loop that is not the state's own.

    Not one that is not finite, that went into a step which failed, or that could not be saved already; nor in a
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
    """Turns an OSError into a warning: training needs no picture and no line of numbers."""
    try:
        yield
    except OSError as error:
        say(f"WARNING: not written, and training goes on: {error}")


class Signals:
    """SIGTERM and Ctrl-C while a run trains, as a context.

    Until a step is done there is nothing to save, and a signal raises SystemExit or KeyboardInterrupt at once.
    From then on the first asks the loop to save and leave; a second Ctrl-C raises KeyboardInterrupt.

    Python runs no handler while the main thread waits inside a compilation or a step, which may never end. So a
    thread of its own hears of each signal too. It tells the user what happens now; and after SIGTERM before the
    first step, or a second Ctrl-C, it ends the process if the main thread does not leave by itself.

    Only a main thread can catch signals; elsewhere, as in some notebooks, nothing is caught.

    Args:
      say: for what happens now.
      leave: what to do before the process ends; takes and returns the last words.

    Attributes:
      begun: to be set when a step is done.
      caught: the signals so far.
    """

    def __init__(self, say: Callable[[str], None], leave: Callable[[str], str]):
        self.begun = False
        self.caught: list[signal.Signals] = []
        self._say, self._leave = say, leave
        self._lines: list[str] = []  # to be said
        self._leaving = False
        self._awaited: threading.Event | None = None  # or the process ends
        self._raised, self._done = threading.Event(), threading.Event()
        self._lock = threading.RLock()

    def __enter__(self) -> Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._ear, self._mouth = socket.socketpair()
            self._ear.setblocking(False)
            self._mouth.setblocking(False)
            # Python writes the number of each signal there at once, whatever the main thread does.
            self._fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            # jax.distributed takes SIGTERM for itself when it starts: handlers are set after it, here.
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._fd)
            self._done.set()
            self._mouth.close()
            self._thread.join()
            self._ear.close()

    def _hear(self) -> bool:
        """Takes in signals that have arrived, in either thread; False once there can be no more."""
        with self._lock:
            try:
                numbers = self._ear.recv(100)
            except BlockingIOError:  # the other thread has taken them
                return True
            for number in numbers:
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                number = signal.Signals(number)
                again = number == signal.SIGINT and bool(self.caught)
                self._leaving |= again or not self.begun
                if again or (number == signal.SIGTERM and self._leaving):
                    self._awaited = self._done if self._raised.is_set() else self._raised
                if again:
                    self._lines.append("Ctrl-C again: leaving without saving")
                elif self._leaving:
                    self._lines.append(
                        f"{number.name}: leaving; Ctrl-C again ends the program at once"
                    )
                elif not self.caught:
                    self._lines.append(
                        f"{number.name}: saving after the running step; Ctrl-C"
                        f"{' once more' if number == signal.SIGINT else ''} aborts without saving"
                    )
                self.caught.append(number)
            return bool(numbers)

    def _handle(self, number, frame) -> None:
        """In the main thread, as soon as it is back in Python."""
        self._hear()
        self._mouth.send(b"\0")  # the other thread has something to say
        if self._leaving and not self._raised.is_set():
            self._raised.set()
            if self.caught[-1] == signal.SIGTERM:
                raise SystemExit(128 + signal.SIGTERM)
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """In a thread of its own."""
        while True:
            select.select([self._ear], [], [])
            if not self._hear():
                return
            while self._lines:
                self._say(self._lines.pop(0))
            awaited, self._awaited = self._awaited, None
            if awaited is not None and not awaited.wait(GRACE_SECONDS):
                number = self.caught[-1]
                self._say(self._leave(f"stopped by {number.name}"))
                os._exit(128 + number)
