"""Loggers: what a training run hands to TensorBoard, Weights & Biases or a program of one's own, beside its own files.

    python -m ddpm_jax.main --config=configs/digits.py --logger=tensorboard,wandb

A logger gets what metrics.jsonl and samples/ get, step by step. A run that is resumed continues as one: loggers.json in
the run directory has the last step that each logger has received. What it has missed, such as everything before it was
added, is read from the run directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from PIL import Image

from ddpm_jax import extras, options
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import writers
from ddpm_jax.files.animations import previews
from ddpm_jax.names import check_takes, find
from ddpm_jax.options import ConfigError, option

FILE = "loggers.json"  # {logger: last step that it has received}
BINS = 64  # of a histogram


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """Where a run is logged beside its own files; fields of config.training."""

    logger: tuple[str, ...] | None = option(
        None,
        "Loggers beside metrics.jsonl: tensorboard, wandb, or module:NAME, several with commas. Default: as in the"
        " config (training.logger), or none.",
    )
    histograms: bool | None = option(
        None,
        "Loggers also get a histogram of the parameters of each layer, with every preview. Default: as in the config"
        " (training.histograms), or not.",
    )


class Start(NamedTuple):
    """Where a logger begins."""

    workdir: str
    config: Any  # the ConfigDict of the run
    step: int  # the run continues here
    sent: int  # the last step that this logger has received; later than `step` after a kill


class Logger(Protocol):
    """What a logger offers: it is made as NAME(start), by a `Start`, and called after steps that have something to log.

    Attributes:
      step: the last step that it keeps; it gets those after it, some of them perhaps again. May be missing, for
        start.sent: then no step is logged twice.
    """

    step: int

    def log(
        self,
        step: int,
        scalars: Mapping[str, float],
        pictures: Mapping[str, np.ndarray],
        histograms: Mapping[str, np.ndarray],
    ) -> None:
        """Logs a step.

        Args:
          scalars: the numbers of a line of metrics.jsonl, or none.
          pictures: uint8 [H, W, 3] each, or none.
          histograms: the values float32 [N] of each layer's parameters, or none.
        """

    def close(self) -> None:
        """Ends the logging; not called if the process is killed. May be missing."""


class TensorBoard:
    """Event files in WORKDIR/tensorboard, written without TensorFlow and complete after every step."""

    def __init__(self, start: Start):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._histogram = Event, Summary, HistogramProto
        folder = os.path.join(start.workdir, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._path = os.path.join(folder, name)
        with writers.named(self._path):
            self._records = RecordWriter(open(self._path, "wb"))  # noqa: SIM115
        self.step = min(start.step, start.sent)
        # TensorBoard drops the events of this and later steps that stand before this one.
        start_here = {"session_log": SessionLog(status=SessionLog.START)}
        self._write({"file_version": "brain.Event:2"}, {"step": self.step + 1, **start_here})

    def log(self, step, scalars, pictures, histograms):
        Value, values = self._summary.Value, []
        for name, number in scalars.items():
            values.append(Value(tag=name, simple_value=number))
        for name, picture in pictures.items():
            size = dict(zip(("height", "width", "colorspace"), picture.shape, strict=True))
            png = writers.png_bytes(picture)
            image = self._summary.Image(encoded_image_string=png, **size)
            values.append(Value(tag=name, image=image))
        for name, array in histograms.items():
            values.append(Value(tag=name, histo=self._counted(array)))
        self._write({"step": step, "summary": self._summary(value=values)})

    def _counted(self, array):
        array = np.asarray(array, np.float64)
        counts, edges = np.histogram(array, bins=BINS)
        moments = {"num": array.size, "sum": array.sum(), "sum_squares": np.square(array).sum()}
        limits = {"bucket_limit": edges[1:].tolist(), "bucket": counts.tolist()}
        return self._histogram(min=array.min(), max=array.max(), **moments, **limits)

    def _write(self, *events):
        with writers.named(self._path):
            try:
                for fields in events:
                    event = self._event(wall_time=time.time(), **fields)
                    self._records.write(event.SerializeToString())
                self._records.flush()
            except OSError:
                with contextlib.suppress(OSError):
                    self.close()
                raise

    def close(self):
        self._records.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline needs no network.

    WORKDIR/wandb_id keeps its id, and the step that it had when it was last closed. WANDB_PROJECT and WANDB_NAME name
    it; the defaults are ddpm_jax and the name of the run directory. Weights & Biases takes no step back, so it gets only
    the steps that it does not have; offline, those since it was last closed, as a killed process loses rows.
    """

    def __init__(self, start: Start):
        import wandb

        self._path, self._wandb = os.path.join(start.workdir, "wandb_id"), wandb
        self._id, self.step = uuid.uuid4().hex[:8], 0
        with contextlib.suppress(FileNotFoundError), open(self._path, encoding="utf-8") as file:
            self._id, step = file.read().split()
            self.step = int(step)
        names = {
            "project": os.environ.get("WANDB_PROJECT", "ddpm_jax"),
            "name": os.environ.get("WANDB_NAME", os.path.basename(start.workdir)),
        }
        config = json.loads(config_lib.to_json(start.config))
        names |= {"id": self._id, "resume": "allow", "dir": start.workdir}
        self._run = wandb.init(config=config, allow_val_change=True, **names)  # as by --change
        if not self._run.offline:
            self.step = max(0, self._run.step - 1)  # that of its next row
        self._last = self.step
        self._save()

    def _save(self):
        writers.save_text(self._path, f"{self._id} {self.step}\n")

    def log(self, step, scalars, pictures, histograms):
        images = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        counted = {
            name: self._wandb.Histogram(np_histogram=np.histogram(array, bins=BINS))
            for name, array in histograms.items()
        }
        self._run.log({**scalars, **images, **counted}, step=step, commit=True)
        self._last = step

    def close(self):
        self._run.finish(exit_code=int(sys.exception() is not None))
        self.step = self._last
        self._save()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}
EXTRAS = {"tensorboard": "tensorboard.summary.writer", "wandb": "wandb"}  # what they import


def classes(names: tuple[str, ...]) -> dict[str, Callable]:
    """{name: class} of loggers, after a check that they can be used.

    Raises:
      ConfigError: an unknown name, or a package that is not installed; one line.
    """
    found = {}
    with options.errors_at("--logger"):
        for name in names:
            found[name] = find(name, LOGGERS, "logger")
            if name not in LOGGERS:
                check_takes(found[name], ("start",), "logger")
                continue
            extras.load(EXTRAS[name], name, f"--logger={name}")
    return found


class Loggers:
    """The loggers of a run. One that fails is left out from then on, with a warning; training continues.

    Args:
      say: prints a line.
    """

    def __init__(self, chosen: Logging, workdir: str, config: Any, say: Callable[[str], None]):
        self._classes, self._histograms = classes(chosen.logger or ()), chosen.histograms
        self._workdir, self._config, self._say = workdir, config, say
        self._active: dict[str, Any] = {}
        self._sent: dict[str, int] = {}
        self._now: tuple[dict, dict, dict] = {}, {}, {}

    def begin(self, step: int) -> None:
        """Starts the loggers where the run continues, and gives each what it has missed.

        Raises:
          ConfigError: one of the built-in ones cannot start, such as without a network; one line.
        """
        if not self._classes:
            return
        self._sent = self._read_sent()
        for name, cls in self._classes.items():
            sent = self._sent.get(name, 0)
            try:
                logger = cls(Start(self._workdir, self._config, step, sent))
            except Exception as error:
                self.close()
                if name not in LOGGERS:  # its traceback names the user's own line
                    raise
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ConfigError(f"--logger={name} could not start: {line}") from error
            with options.errors_at("--logger"):
                check_takes(logger.log, ("step", "scalars", "pictures", "histograms"), "log of")
            self._active[name], self._sent[name] = logger, getattr(logger, "step", sent)
        self._catch_up(step)

    def _read_sent(self) -> dict[str, int]:
        try:
            found = writers.read_json(self._path(FILE))
            if not all(isinstance(step, int) for step in found.values()):
                raise ValueError("it must hold the step that each logger has received")
            return found
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{self._path(FILE)} cannot be read ({error}); delete it, and loggers get the whole run again"
            ) from error

    def _catch_up(self, step: int) -> None:
        """Sends what the run directory has, up to `step`, to the loggers that have not received it."""
        rows = {row["step"]: row for row in writers.read_metrics(self._path("metrics.jsonl"))}
        pictures = previews(self._workdir)
        for past in sorted(rows.keys() | pictures.keys()):
            if min(self._sent[name] for name in self._classes) < past <= step:
                shown = {}
                with contextlib.suppress(KeyError, OSError), Image.open(pictures[past]) as picture:
                    shown["samples"] = np.asarray(picture.convert("RGB"))
                self._send(past, _numbers(rows.get(past, {})), shown, {})

    def _path(self, name: str) -> str:
        return os.path.join(self._workdir, name)

    def row(self, row: Mapping[str, float | None]) -> None:
        """Adds a line of metrics.jsonl to what is logged at this step."""
        self._now[0].update(_numbers(row))

    def preview(self, picture: np.ndarray, params: Any) -> None:
        """Adds samples, and if requested the histograms of the parameters."""
        self._now[1]["samples"] = picture
        if self._histograms and self._active:
            for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                self._now[2][f"params/{name}"] = np.asarray(leaf, np.float32).ravel()

    def send(self, step: int) -> None:
        """Hands over what was added at this step."""
        now, self._now = self._now, ({}, {}, {})
        if any(now):
            self._send(step, *now)

    def _send(self, step: int, *values: dict) -> None:
        for name, logger in list(self._active.items()):
            if step <= self._sent[name]:
                continue
            try:
                logger.log(step, *values)
                self._sent[name] = step
            except Exception as error:  # of a network, a disk or the user's own code
                del self._active[name]
                line = (str(error).strip().splitlines() or [""])[0]
                self._say(
                    f"WARNING: the logger {name} failed at step {step:,} and gets nothing more; training"
                    f" continues: {type(error).__name__}: {line}"
                )
        if self._active:
            try:
                writers.save_json(self._path(FILE), self._sent)
            except OSError as error:
                self._say(f"WARNING: {FILE} could not be written; training continues: {error}")

    def close(self) -> None:
        active, self._active = self._active, {}
        for name, logger in active.items():
            try:
                getattr(logger, "close", lambda: None)()
            except Exception as error:
                self._say(f"WARNING: the logger {name} could not be closed: {error}")


def _numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    return {name: number for name, number in row.items() if name != "step" and number is not None}
