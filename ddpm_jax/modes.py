"""The modes of the command line, and their flags, which are the options of the functions."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from ddpm_jax import hints, options
from ddpm_jax.commands import (
    animate,
    inversion,
    likelihood,
    metrics,
    nearest,
    pretrained,
    repair,
    sampling,
)
from ddpm_jax.commands import benchmark as benchmark_lib
from ddpm_jax.commands.report import report
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import runs
from ddpm_jax.options import Option
from ddpm_jax.processes import Processes
from ddpm_jax.settings import Sampling
from ddpm_jax.training import loop, resume
from ddpm_jax.training.loggers import Logging
from ddpm_jax.training.profile import Steps


def train(
    config,
    workdir: str,
    *,
    change: resume.Change = (),
    logging: Logging = Logging(),
    profile: Steps = None,
    allow_code: Annotated[
        bool,
        "Imports modules outside ddpm_jax and experiments that a config.json given as --config names.",
    ] = False,
    processes: Processes = Processes(),
) -> dict:
    """Trains what --config says; the same command again resumes."""
    del allow_code  # read where the config is
    processes.join()
    with config.training.unlocked(), config.training.ignore_type():
        config.training.update(options.changed(logging))
    state = loop.train(config, workdir, change=change, profile=profile)
    return {"workdir": os.path.abspath(config_lib.path(workdir)), "step": int(state.step)}


COMMANDS: dict[str, Callable] = {
    "train": train,
    "sample": sampling.sample,
    "progressive": sampling.progressive,
    "nearest": nearest.nearest,
    "encode": inversion.encode,
    "reconstruct": inversion.reconstruct,
    "interpolate": inversion.interpolate,
    "denoise": repair.denoise,
    "inpaint": repair.inpaint,
    "eval": metrics.evaluate,
    "nll": likelihood.nll,
    "rate_distortion": likelihood.rate_distortion,
    "best_steps": likelihood.best_steps,
    "animate": animate.animate,
    "import": pretrained.import_weights,
    "export": pretrained.export,
    "report": report,
    "benchmark": benchmark_lib.benchmark,
}
WORDS = {
    "import": ("source",),
    "export": ("workdir", "out"),
}  # flags that need no --, in their order
POSITIONAL = ("run", "config", "workdir")  # parameters of a command that main hands over


def shared_flags(
    *,
    config: Annotated[
        str | None,
        "The config file, as FILE.py or FILE.py:VARIANT; NAME stands for configs/NAME.py. Every field of it can be"
        " changed, as with --config.training.num_steps=5000.",
    ] = None,
    workdir: Annotated[
        str | None, "The run directory. Default: runs/ and the name of the config."
    ] = None,
    debug: Annotated[bool, "Shows the traceback of an error."] = False,
    json: Annotated[
        bool,
        "Prints a JSON object on each line of standard output, for programs: progress, rows of training, the result or"
        " the error. Lines for people go to standard error.",
    ] = False,
) -> None:
    """Flags of every mode."""


def run_flags(
    *,
    weights: Annotated[
        Literal["ema", "raw"],
        "The parameters to use: ema, their moving average, or raw, the last ones.",
    ] = "ema",
    checkpoint: Annotated[
        runs.Checkpoint,
        "The checkpoint to use: newest; best, by config.training.keep_best; or the step of one that is there.",
    ] = "newest",
    allow_code: Annotated[
        bool, "Imports modules outside ddpm_jax and experiments that the run names."
    ] = False,
    processes: Processes = Processes(),
) -> None:
    """Flags of every mode that loads a run."""


def flags_of(
    mode: str, chosen: Mapping[str, Any] | None = None, sampling: type = Sampling
) -> dict[str, Option]:
    """{flag: option} of a mode, including those of its choices.

    Args:
      sampling: the options of `sample` of the run's Method, where it has its own.
    """
    command = COMMANDS[mode]
    parameters = inspect.signature(command).parameters
    found = list(options.flat(shared_flags))
    if "run" in parameters:
        found += options.flat(run_flags)
    own = sampling is not Sampling and "sampling" in parameters
    found += options.flat(command, chosen, skip=(*POSITIONAL, "sampling") if own else POSITIONAL)
    if own:
        found += options.flat(sampling, chosen)
    return {one.flag: one for one in found}


def all_flags(mode: str) -> dict[str, Option]:
    """The flags of a mode with those of every built-in choice."""
    found = flags_of(mode)
    for one in list(found.values()):
        for cls in one.choice.built_in.values() if one.choice else ():
            found |= {inner.flag: inner for inner in options.flat(cls)}
    return found


def about(command: Callable) -> str:
    """The first sentence of a docstring."""
    return " ".join(inspect.getdoc(command).split("\n\n")[0].split())


def help_line(one: Option) -> str:
    """A flag with its help and default."""
    default = ",".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
    if one.choice is not None and default is not None:
        default = options.name_of(default, one.choice)
    text = one.help
    if default is options.EMPTY:
        text += " It must be given."
    elif default not in (None, "") and "Default:" not in text:
        text += f" Default: {str(default).lower() if isinstance(default, bool) else default}."
    words = hints.literals(one.hint) or (list(one.choice.built_in) if one.choice else [])
    is_switch = one.is_boolean
    word = f"--[no]{one.flag}" if is_switch else f"--{one.flag}={'|'.join(words) or 'VALUE'}"
    return f"  {word}\n" + textwrap.indent(textwrap.fill(text, 92), " " * 6) + "\n"
