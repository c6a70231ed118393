"""The command line.

python -m ddpm_jax.main --config=configs/cifar10.py                  trains; the same again resumes
python -m ddpm_jax.main --mode=sample --workdir=runs/cifar10         draws images
python -m ddpm_jax.main --mode=nll --workdir=runs/cifar10            bits/dim of the test split
python -m ddpm_jax.main import SOURCE --workdir=runs/theirs           a run from pretrained weights
python -m ddpm_jax.main --help                                       all modes; --mode=nll --help its flags
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

import ddpm_jax
from ddpm_jax import data, modes, options, processes, watch
from ddpm_jax.commands import analytic
from ddpm_jax.ddpm import Sampling
from ddpm_jax.files import checkpoints, console, run_data, runs, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.method import Method
from ddpm_jax.names import foreign_frames, place_of
from ddpm_jax.options import ConfigError
from ddpm_jax.processes import Processes
from ddpm_jax.request import Request
from ddpm_jax.training import guards, loop, parallel, preview, resume

PROGRAM = "python -m ddpm_jax.main"
USER_ERRORS = (
    ConfigError,
    data.DataError,
    checkpoints.CheckpointError,
    guards.TrainingError,
    run_data.RunError,
    OSError,  # its text names the file
)


# ---- doing it ----------------------------------------------------------------------------------------


def execute(request: Request) -> Any:
    """Runs the command of a request, and returns its result."""
    mode, command = request.mode, modes.COMMANDS[request.mode]
    parallel.enable_compilation_cache()
    parameters = inspect.signature(command).parameters
    if "config" in parameters:
        workdir, settings = request.workdir(), _config_of(request)
        kwargs = options.bind(command, request.values(command), "--", given=modes.POSITIONAL)
        return command(settings, *([workdir] if "workdir" in parameters else []), **kwargs)
    workdir, settings = request.workdir(), request.config()
    if settings is not None and mode != "report":
        resume.refuse_another_config(settings, os.path.join(workdir, "config.json"))
    if "run" not in parameters:
        kwargs = options.bind(command, request.values(command), "--", given=modes.POSITIONAL)
        with run_data.advice_on_writing(workdir):
            return command(workdir, **kwargs)
    if request.sampling is Sampling:  # before files are read
        options.bind(command, request.values(command), "--", given=modes.POSITIONAL)
    loading = options.bind(modes.run_flags, request.values(modes.run_flags), "--")
    loading.pop("processes", Processes()).join()
    with run_data.advice_on_writing(workdir):
        run = runs.load(workdir, **loading)
        return command(run, **arguments(command, run, request.values(command), "--"))


def _config_of(request: Request) -> Any:
    """The config of a command that needs one; None for an import without one."""
    settings = request.config()
    if settings is None and request.mode != "import":
        what = "training" if request.mode == "train" else f"--mode={request.mode}"
        raise ConfigError(f"{what} needs --config=configs/NAME.py")
    return settings


def check(argv: list[str], method: Method | None = None) -> Method | None:
    """Checks a command line without running it: a training with its model, or a command on a run of `method`.

    Returns:
      the Method that the command line trains, or `method`.

    Raises:
      one of USER_ERRORS, or what code of the user's own raises; see `explain`.
    """
    request = Request(argv)
    command = modes.COMMANDS[request.mode]
    kwargs = options.bind(command, request.values(command), "--", given=modes.POSITIONAL)
    if request.mode == "train":
        return loop.check(_config_of(request))
    for name in ("sampling", "bounding") if method is not None else ():
        if name in kwargs and analytic.variance_of(kwargs[name]) != "analytic":  # not measured yet
            preview.check_sampling(method, kwargs[name], name)
    return method


def arguments(
    command: Callable, run: runs.Run, values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The keyword arguments of a command on a run, whose Method may have its own options of sampling.

    Raises:
      ConfigError: an option that the command, or the Method, does not have.
    """
    own = run.method.Sampling
    if own is Sampling or "sampling" not in inspect.signature(command).parameters:
        return options.bind(command, values, where, given=modes.POSITIONAL)
    names = {one.name for one in options.flat(own)}
    rest = {name: value for name, value in values.items() if name not in names}
    for one in options.flat(Sampling):
        if one.name in rest:
            raise ConfigError(
                f"{where}{one.flag} is for diffusions, and {run.config.method} (config.method) has no such"
                " option"
            )
    kwargs = options.bind(command, rest, where, given=(*modes.POSITIONAL, "sampling"))
    mine = {name: value for name, value in values.items() if name in names}
    return kwargs | {"sampling": options.build(own, mine, where)}


# ---- help ------------------------------------------------------------------------------------------


def help_text(request: Request) -> str:
    """What --help prints: the modes, or the flags of the --mode that is given, or a config's fields."""
    settings = request.config()
    if not request.has_mode and settings is None:
        listed = "\n".join(
            f"  {name:16} {modes.about(command)}" for name, command in modes.COMMANDS.items()
        )
        return (
            f"{PROGRAM} --config=configs/NAME.py [--workdir=DIR] [--config.FIELD=VALUE …]\n"
            f"{PROGRAM} --mode=MODE --workdir=DIR [--FLAG=VALUE …]\n\n"
            f"Modes (default: train):\n\n{listed}\n\n"
            f"{PROGRAM} --mode=MODE --help                lists the flags of a mode.\n"
            f"{PROGRAM} --config=configs/NAME.py --help   lists the fields of a config.\n"
            f"{PROGRAM} --version                         prints the version.\n"
        )
    command = modes.COMMANDS[request.mode]
    text = f"{PROGRAM} --mode={request.mode}\n\n{modes.about(command)}\n\n"
    known = modes.flags_of(request.mode, request.flags, request.sampling)
    text += "".join(modes.help_line(one) for one in known.values())
    for one in known.values():
        for name, cls in (
            one.choice.built_in.items() if one.choice and one.flag not in request.flags else ()
        ):
            own = [inner for inner in options.flat(cls) if inner.flag not in known]
            if own:
                text += f"\nWith --{one.flag}={name}:\n\n" + "".join(map(modes.help_line, own))
    if settings is not None:
        text += f"\nThe fields of {request.config_file}, with their values:\n\n"
        for field, value in config_lib.fields(settings).items():
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            text += f"  --config.{field}={value}\n"
    return text


# ---- the command line ------------------------------------------------------------------------------


def main(argv: list[str] | None = None, *, mode: str | None = None) -> None:
    """Runs a command line. User errors are printed as one line, program errors as a traceback.

    Exit status 2: the command or its config is wrong; 1: the data, files or the run are; 130: Ctrl-C.

    Args:
      argv: the arguments; None for those of the process.
      mode: the default mode.
    """
    sys.stdout, sys.stderr = (console.Heedless(stream) for stream in (sys.stdout, sys.stderr))
    logging.set_verbosity(logging.WARNING)  # jax, orbax and matplotlib have much to say
    argv = sys.argv[1:] if argv is None else argv
    as_json = "--json" in argv and "--help" not in argv
    out = sys.stdout
    console.json_lines(out if as_json else None)
    sys.stdout = sys.stderr if as_json else out
    try:
        request = Request(argv, mode)
        if request.wants_version:
            print(f"ddpm_jax {ddpm_jax.__version__}")
        elif request.wants_help:
            print(help_text(request), end="")
        else:
            result = execute(request)
            files = [path for path in writers.written if os.path.exists(path)]
            console.emit("result", mode=request.mode, result=result, files=files)
        return
    except KeyboardInterrupt as error:
        line, status = str(error) or "stopped by Ctrl-C", 130
        console.emit("error", error=line, status=status)
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        watch.leave(line)
        os._exit(status)  # an orderly exit would wait for what the device is doing
    except SystemExit as error:  # of a training that a signal has stopped
        console.emit("error", error="stopped by a signal", status=error.code)
        raise
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            watch.wait_for_word()  # it may be the end of another process
        line = None if "--debug" in argv else explain(error)
        status = 2 if isinstance(error, ConfigError) else 1
        console.emit("error", error=line or f"{type(error).__name__}: {error}", status=status)
        if line is None and processes.count() == 1 and not isinstance(error, USER_ERRORS):
            raise
        line = f"error: {line}" if line else traceback.format_exc()
    finally:
        sys.stdout = out
    print(line, file=sys.stderr, flush=True)
    if processes.count() > 1:  # an orderly exit would wait for the others, and they for this one
        watch.leave(line.strip().splitlines()[-1].removeprefix("error: "))
        os._exit(status)
    sys.exit(status)


def explain(error: Exception) -> str | None:
    """An error in one line; None for a mistake of this program."""
    if isinstance(error, USER_ERRORS):
        return " ".join(str(error).splitlines())  # what a user has written may have several
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}"
    if isinstance(error, RuntimeError) and str(error).startswith("Unable to initialize backend"):
        line = str(error).partition(" (set ")[0].replace("\n", " ")
        return f"{line}; JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}: unset it, or name what is there"
    if not foreign_frames(error):
        return None
    message = str(error).strip().splitlines() or [""]
    return f"{place_of(error)}: {type(error).__name__}: {message[0]} (--debug shows more)"


if __name__ == "__main__":
    main()
