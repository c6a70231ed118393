"""Training: one visible loop, from a config to a run directory.

    ddpm_jax.training.loop.train(config, "runs/digits")

The same call again resumes at the last checkpoint. The directory holds config.json, log.txt, metrics.jsonl, loss.png,
data_preview.png, forward.png (the forward process, of a diffusion), checkpoints/, previews such as
samples/step_00000500.png, and history.jsonl if settings were changed on purpose.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ddpm_jax import augmentation, data, options, processes
from ddpm_jax.files import checkpoints, console, run_data, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.progress import Progress, duration, memory
from ddpm_jax.files.runs import ema_warning, refuse_links
from ddpm_jax.method import Method, from_config, is_diffusion
from ddpm_jax.process import terminal
from ddpm_jax.training import guards, mirror, parallel, preview, resume
from ddpm_jax.training import profile as profile_lib
from ddpm_jax.training import step as step_lib
from ddpm_jax.training.length import Length
from ddpm_jax.training.loggers import Loggers
from ddpm_jax.training.profile import Profiler
from ddpm_jax.training.signals import Signals
from ddpm_jax.training.step import TrainState

FIRST_PREVIEW_SECONDS = 20.0  # time of an early preview, before the first regular one
HEARTBEAT_SECONDS = 10.0  # maximum time between two progress lines


def check(config) -> Method:
    """The Method of a config, after a check without training; reads data only if the config leaves fields to them.

    Raises:
      ConfigError, DataError: one line that says what to do.
    """
    config, _ = run_data.planned(config, "")
    guards.check_types(config)
    length = options.build(Length, config.training, "config.training")
    run_data.fill_in(config)
    trainer = Trainer(config, "", length, print, None)
    trainer.make_parts(None)
    step_lib.check_shapes(trainer.method)
    return trainer.method


def train(
    config,
    workdir: str,
    *,
    change: resume.Change = (),
    profile: profile_lib.Steps = None,
    method: Method | None = None,
    dataset: data.Dataset | None = None,
) -> TrainState:
    """Trains the model of a ConfigDict in a run directory, from its last checkpoint if it has one.

    SIGTERM and Ctrl-C let the running step end; then everything is saved, and SystemExit is raised with 128 + the
    signal's number, or KeyboardInterrupt in a notebook, where it ends the cell. A good state is also saved when any other
    error ends the run, such as a picture that cannot be read. A failed start removes the files that it created, and the directory if it created it.

    Args:
      change: what changes in the run that is continued: "data" for other images, "FIELD=VALUE" for a setting.
      profile: "START:COUNT" traces COUNT steps from step START.
      method, dataset: the model and the training data as objects; None for those of the config.

    Returns:
      the state after the last step, on the devices.

    Raises:
      ConfigError, DataError, CheckpointError, TrainingError: one line that says what to do.
      KeyboardInterrupt: a second Ctrl-C, one before the first step, or one in a notebook; its text says what is saved.

    >>> import tempfile
    >>> from ddpm_jax.configs import digits
    >>> config = digits.get_config("smoke")
    >>> config.model.update(channels=8, num_groups=2)
    >>> config.training.num_steps = 2
    >>> state = dj.train(config, tempfile.mkdtemp())
    >>> int(state.step)
    2
    """
    workdir, leader = os.path.abspath(config_lib.path(workdir)), processes.is_first()
    refuse_links(workdir)
    mirror.restore(config.training.get("mirror"), workdir)
    config, plan = run_data.planned(config, workdir)  # a copy: the caller's config is not changed
    guards.check_types(config)
    config, changes = resume.with_changes(config, workdir, change)
    length = options.build(Length, config.training, "config.training")
    say = console.Log(os.path.join(workdir, "log.txt") if leader else None)
    with guards.run_directory(workdir) if leader else contextlib.nullcontext(lambda: None) as undo:

        def leave(words: str) -> str:
            """Undoes a failed start, and adds to the message what is saved."""
            if not signals.begun:
                undo()
            return f"{words}; {guards.what_is_saved(os.path.join(workdir, 'checkpoints'))}"

        signals = Signals(say, leave)
        try:
            with signals, guards.out_of_memory_advice(config):
                say("\n".join([f"run directory: {workdir}", *plan]))
                profiler = Profiler(profile if leader else None, workdir, length.num_steps, say)
                more = profiler, changes, "data" in change
                trainer = Trainer(config, workdir, length, say, signals, *more)
                trainer.prepare(method, dataset)
                state = trainer.run()
                say(f"run directory: {workdir}")
                return state
        except KeyboardInterrupt:
            raise KeyboardInterrupt(leave("stopped by Ctrl-C")) from None
        except BaseException as error:
            if not signals.begun:
                undo()
                if isinstance(error, SystemExit):
                    say(leave("stopped by SIGTERM"))
                    signal.raise_signal(signal.SIGTERM)  # at once, without the running step
            raise


@dataclasses.dataclass
class Trainer:
    """A training run in a directory: `prepare` checks everything, `run` is the loop."""

    config: Any
    workdir: str
    length: Length
    say: Callable
    signals: Signals | None
    profiler: Profiler | None = None
    changes: Sequence[resume.Changed] = ()  # of settings, on purpose
    data_may_change: bool = False

    def path(self, *names: str) -> str:
        return os.path.join(self.workdir, *names)

    def prepare(self, method: Method | None, dataset: data.Dataset | None) -> None:
        """Makes all parts. Whatever is wrong is reported here, before anything is computed."""
        config, self.leader = self.config, processes.is_first()
        self.say(parallel.banner())
        self.directory = self.path("checkpoints")
        continues, own_shape = os.path.isdir(self.directory), config.data.image_shape is None
        path = self.path("config.json")
        self.saved = config_lib.load(path) if continues else config  # settings so far
        if own_shape:
            config.data.image_shape = self.saved.data.image_shape
        dataset = dataset or run_data.fill_in(config)
        self.make_parts(method)
        if continues:
            resume.refuse_another_config(config, path, moved=True, changes=self.changes)
            resume.as_saved(config, path)
        self.prepare_data(dataset, continues, own_shape)
        self.prepare_state(continues)

    def make_parts(self, method: Method | None) -> None:
        """Keys, method, optimizer, update and preview."""
        config = self.config
        with options.errors_at("config.training"):
            accumulate = config.step.get("accumulate", 1)
            parallel.check_batch_size("batch_size", self.length.batch_size, accumulate)
        with options.errors_at("config.seed"):
            self.keys = step_lib.make_keys(config.seed)
        self.method = method or from_config(config)
        self.tx, self.learning_rate = step_lib.optimizer_of(config)
        self.update = options.build(
            step_lib.make_update,
            config.step,
            "config.step",
            method=self.method,
            tx=self.tx,
            key=self.keys.train,
            axis_name=parallel.AXIS,
        )
        self.loggers = Loggers(self.length.logging, self.workdir, config, self.say)
        self.preview_every, self.preview = preview.make_preview(
            config.preview, self.method, self.keys.preview
        )

    def prepare_data(self, dataset, continues: bool, own_shape: bool) -> None:
        """Loads the training data, compares them with those of the run, and logs the schedule."""
        dataset = dataset or run_data.load_data(self.config)
        if continues:
            dataset = run_data.as_numbered(self.workdir, dataset)
        self.say("\n".join([dataset.describe(), *augmentation.describe(self.config.data)]))
        for line in dataset.left_out:
            self.say(f"left out: {line}")
        if dataset.class_names:
            self.say(f"classes: {run_data.class_list(dataset)}")
        if own_shape:
            shape = ",".join(map(str, dataset.image_shape))
            self.say(f"image size taken from the data, as with --config.data.image_shape={shape}")
        run_data.check_classes(self.method, dataset)
        if continues:
            for line in run_data.check_data(self.workdir, dataset, may_change=self.data_may_change):
                self.say(f"WARNING: {line}")
        if is_diffusion(self.method):
            pixels = dataset.fetch(data.choose(len(dataset), 64)) / 127.5 - 1.0
            moment = float(np.mean(np.square(pixels)))
            self.say(terminal.describe(self.method.schedule, second_moment=moment))
        self.dataset = dataset
        self.source = functools.partial(
            data.batches,
            dataset,
            seed=self.config.seed,
            batch_size=self.length.batch_size,
            rows=parallel.local_rows(self.length.batch_size),
        )

    def prepare_state(self, continues: bool) -> None:
        """A new state, or that of the last checkpoint."""
        place = self.workdir, self.config, self.method, self.keys.init
        state, self.step = (resume.restore(*place) if continues else None) or (None, 0)
        if state is None:
            state = resume.first_state(self.config, self.method, self.tx, self.keys.init, self.say)
        else:
            if self.leader:
                with guards.os_errors_as_warnings(self.say):
                    for line in checkpoints.set_aside_damaged(self.directory, above=self.step):
                        self.say(f"WARNING: {line}")
            self.say(f"resuming at step {self.step:,}")
            resume.warn_of_decay(self.config, self.saved, self.say)
        guards.check_saving(state, self.directory, self.length, self.say)
        self.state, self.rows = parallel.place(state), []

    def begin(self) -> None:
        """Writes the first files of the run, after all checks."""
        if not self.leader:
            return
        self.say.begin()
        guards.sweep(self.workdir, self.step, self.length.keep, self.length.keep_best)
        resume.record(self.workdir, self.step, self.changes)
        for line in resume.describe(self.workdir):
            self.say(line)
        config_lib.save(self.config, self.path("config.json"))
        if self.step == 0 or run_data.saved_data(self.workdir) is None:
            run_data.save_data(self.workdir, self.dataset)
        more = self.config.seed, self.length.batch_size, self.say
        preview.save_first(self.workdir, self.method, self.dataset, self.keys, *more)
        writers.rewind_metrics(self.path("metrics.jsonl"), self.step, resume.log_every(self.saved))
        self.loggers.begin(self.step)
        self.profiler.begin(self.step)

    def compile(self) -> None:
        clock = time.perf_counter()
        example = parallel.shard(next(self.source(start=self.step, stop=self.step + 1)))
        self.train_step = parallel.compile_step(self.update, self.state, example)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(self.state.params))
        needed = parallel.memory(self.train_step)
        self.say(
            f"{count:,} parameters; compiled in {duration(time.perf_counter() - clock)};"
            f" a step needs {memory(needed)} on each device"
        )
        guards.check_memory(self.config, needed, self.state)

    def run(self) -> TrainState:
        """The loop. It waits for an earlier step, not for the one just dispatched, so that the device always has work."""
        length, self.looked, self.compiled_preview = self.length, self.step > 0, False
        copied = length.mirror, self.workdir, length.keep_best, self.say
        self.copy = functools.partial(mirror.save, *copied)
        self.progress = Progress(
            "step", length.num_steps, self.step, unit="images", per_count=length.batch_size
        )
        if self.step >= length.num_steps:
            self.begin()
            self.catch_up()
            self.loggers.close()
            self.say(f"nothing to do: {self.step:,} of {length.num_steps:,} steps are done")
            self.copy()
            return self.state
        self.compile()
        self.begin()
        self.catch_up()
        sent, self.agree = collections.deque(), processes.Agreement(self.step)
        self.started = self.saved = self.spoke = time.perf_counter()
        with (
            contextlib.closing(self.loggers),
            contextlib.closing(self.profiler),
            contextlib.closing(self.source(start=self.step, stop=length.num_steps)) as batches,
            guards.save_on_error(self.save, self.copy, self.directory, self.signals, self.say),
        ):
            for batch in batches:
                with self.profiler.step(self.step + 1):
                    self.state, loss = self.train_step(self.state, parallel.shard(batch))
                self.step += 1
                sent.append(loss)
                if len(sent) > 2 or not self.signals.begun:
                    jax.block_until_ready(sent.popleft())
                self.signals.begun = True
                self.progress.done = self.step
                self.profiler.after(self.step, loss)
                self.after_step(loss)
        if warning := ema_warning(self.config, self.step):
            self.say(f"WARNING: {warning}")
        return self.state

    def after_step(self, loss) -> None:
        """Writes the log line, checkpoint and pictures that are due; exits if a signal requested it."""
        length, end = self.length, self.step == self.length.num_steps
        if self.step % length.log_every == 0 or end:
            jax.block_until_ready(loss)
            self.log()
            self.spoke = time.perf_counter()
        elif time.perf_counter() - self.spoke > HEARTBEAT_SECONDS:
            guards.check_finite(self.state, self.directory)
            self.say.progress(self.progress)
            self.spoke = time.perf_counter()
        elif self.leader:
            self.progress.refresh()

        now, stop = time.perf_counter(), bool(self.signals.caught)
        due = stop or now - self.saved > 60 * length.checkpoint_minutes
        stop, due = self.agree(self.step, loss, stop, due)  # all processes save at the same step
        with self.progress.aside():
            if saves := due or self.step % length.checkpoint_every == 0 or end:
                self.save()
            on_time = self.step % self.preview_every == 0
            waited = now - self.started > FIRST_PREVIEW_SECONDS
            early = waited and not (self.looked or on_time or end)
            if not stop and (early or on_time or end):
                self.look(early)
                self.looked = True
            self.loggers.send(self.step)
            if saves:
                self.copy()
        if stop:
            self.signals.end(self.step, self.workdir)

    def save(self) -> None:
        guards.check_finite(self.state, self.directory)
        values, self.rows = step_lib.means_of_rows(self.rows), []
        keep = {"keep": self.length.keep, "keep_best": self.length.keep_best, "values": values}
        if best := checkpoints.save(self.directory, self.state, step=int(self.state.step), **keep):
            self.say(f"step {self.step:,} is the best checkpoint so far: {best}")
        if self.leader and self.data_may_change:
            run_data.save_data(self.workdir, self.dataset)  # now the state has seen them
        self.saved = time.perf_counter()

    def log(self) -> None:
        """Writes the means since the last log line to metrics.jsonl and clears them."""
        guards.check_finite(self.state, self.directory)
        rate, values = self.progress.rate(), step_lib.means(self.state.metrics)
        text = f"loss {values['loss']:.4f}  gradient norm {values['grad_norm']:.3g}"
        self.say.progress(self.progress, text)
        self.progress.begin()
        if self.leader:
            last = float(self.learning_rate(self.step - 1))
            row = {"step": self.step, **values, "learning_rate": last, "images_per_second": rate}
            with guards.os_errors_as_warnings(self.say):
                writers.append_line(self.path("metrics.jsonl"), row)
            self.rows.append(row)
            self.loggers.row(row)
            console.emit("row", **row)
        cleared = parallel.place(step_lib.clear(self.state.metrics))
        self.state = self.state.replace(metrics=cleared)

    def catch_up(self) -> None:
        """Makes the preview of the last checkpoint's step if it is due and a kill came before it."""
        due = self.step % self.preview_every == 0 or self.step == self.length.num_steps
        if self.step and due and not os.path.exists(preview.path_of(self.workdir, self.step)):
            self.look(early=False)
            self.loggers.send(self.step)

    def look(self, early: bool) -> None:
        """Writes preview samples and loss.png."""
        guards.check_finite(self.state, self.directory)
        if not self.leader:
            return
        if not self.compiled_preview:
            self.compiled_preview = True
            with self.progress.once():
                self.preview.compile(self.state)
        path = preview.path_of(self.workdir, self.step)
        rows, columns = self.preview(self.state, self.step)
        picture = writers.titled_grids(rows, columns)
        self.loggers.preview(picture, self.state.params)
        with guards.os_errors_as_warnings(self.say):
            writers.save_png(path, picture)
            if self.config.preview.get("nearest") and self.step == self.length.num_steps:
                self.say(preview.save_nearest(self.workdir, rows, self.dataset, self.config.data))
            if early:
                self.say(
                    f"an early preview: {path}; the next come every {self.preview_every:,} steps"
                )
        with guards.os_errors_as_warnings(self.say):
            preview.save_loss(self.workdir)
