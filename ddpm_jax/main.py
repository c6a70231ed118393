"""The command line.

python -m ddpm_jax.main --config=configs/cifar10.py                  trains; the same again resumes
python -m ddpm_jax.main --mode=sample --workdir=runs/cifar10         draws images
python -m ddpm_jax.main --mode=nll --workdir=runs/cifar10            bits/dim of the test split
python -m ddpm_jax.main import SOURCE --workdir=runs/theirs           a run from pretrained weights
python -m ddpm_jax.main --help                                       all modes; --mode=nll --help its flags
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

import ddpm_jax
from ddpm_jax import data, modes, options
from ddpm_jax.commands import analytic
from ddpm_jax.ddpm import Sampling
from ddpm_jax.files import checkpoints, console, run_data, runs, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.method import Method, from_config
from ddpm_jax.names import foreign_frames, place_of
from ddpm_jax.names import nearest as nearest_name
from ddpm_jax.options import ConfigError, Text
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


# ---- what was asked ----------------------------------------------------------------------------------


class Request:
    """A parsed command line.

    Attributes:
      mode: a key of modes.COMMANDS.
      flags: {flag: Text}.
      fields: {"training.num_steps": text}, the --config.FIELD=VALUE.
    """

    def __init__(self, argv: list[str], mode: str | None = None):
        self.fields: dict[str, str] = {}
        self.flags: dict[str, Text] = {}
        self.wants_help = self.wants_version = False
        booleans = {
            flag
            for name in modes.COMMANDS
            for flag, one in modes.all_flags(name).items()
            if one.is_boolean
        }
        words, rest = list(argv), []
        while words:
            word = words.pop(0)
            name, equals, value = word.partition("=")
            if not name.startswith("-") or name in ("-", "--"):
                rest.append(word)
                continue
            name = name.lstrip("-")
            field = re.fullmatch(r"(no)?config\.(.+)", name)
            is_value = bool(words) and not words[0].startswith("--")
            name = name if field else name.replace("-", "_")
            if name in ("h", "help", "helpshort", "helpfull"):
                self.wants_help = True
            elif name == "version":
                self.wants_version = True
            elif field:
                if not equals:
                    value = "false" if field[1] else "true"
                    value = words.pop(0) if not field[1] and is_value else value
                self.fields[field[2]] = value
            elif equals:
                self.add(name, value)
            elif name in booleans:
                self.flags[name] = Text("true")
            elif name.startswith("no") and name[2:] in booleans:
                self.flags[name[2:]] = Text("false")
            elif is_value:
                self.add(name, words.pop(0))
            else:
                self.flags[name] = Text("")
        if rest and rest[0] in modes.COMMANDS and "mode" not in self.flags:
            self.flags["mode"] = Text(rest.pop(0))
        self.has_mode = "mode" in self.flags
        self.mode = str(self.flags.pop("mode", mode or "train"))
        if self.mode not in modes.COMMANDS:
            known = ", ".join(modes.COMMANDS)
            raise ConfigError(
                f"there is no --mode={self.mode}{nearest_name(self.mode, modes.COMMANDS)} (choose from {known})"
            )
        for flag in modes.WORDS.get(self.mode, ()):
            if rest and flag not in self.flags:
                self.flags[flag] = Text(rest.pop(0))
        if rest:
            raise ConfigError(f"what is {rest[0]!r}? Every option begins with --")
        self.config_file = self.flags.get("config")
        self.sampling = self.sampling_of_run()
        self.check_flags()

    def add(self, flag: str, text: str) -> None:
        """Adds a flag; --change may be given several times, and of other flags the last one holds."""
        earlier = self.flags.get(flag) if flag == "change" else None
        self.flags[flag] = Text(f"{earlier},{text}" if earlier else text)

    def sampling_of_run(self) -> type:
        """The options of `sample` of the run's Method; those of diffusions if there is no run to be read.

        Code of others is imported only with --allow_code.
        """
        self.foreign, command = [], modes.COMMANDS[self.mode]
        if not {"run", "sampling"} <= inspect.signature(command).parameters.keys():
            return Sampling
        with contextlib.suppress(ConfigError, OSError):  # loading the run says what is wrong
            config = config_lib.load(os.path.join(self.workdir(), "config.json"))
            self.foreign = runs.foreign_modules(config)
            if "allow_code" in self.flags or not self.foreign:
                return from_config(config).Sampling
        return Sampling

    def check_flags(self) -> None:
        """Refuses flags that the mode does not have."""
        known = modes.flags_of(self.mode, self.flags)
        known |= modes.flags_of(self.mode, self.flags, self.sampling)
        for flag in [flag for flag, text in self.flags.items() if not text]:
            positive = flag if flag in known else flag.removeprefix("no")
            if positive in known and known[positive].is_boolean:  # a switch of code of one's own
                del self.flags[flag]
                self.flags[positive] = Text("true" if flag == positive else "false")
        for flag in self.flags:
            if flag in known:
                continue
            for one in known.values():
                for owner, cls in one.choice.built_in.items() if one.choice else ():
                    if flag in {inner.flag for inner in options.options_of(cls)}:
                        here = self.flags.get(one.flag)
                        here = here or options.name_of(one.default, one.choice)
                        raise ConfigError(
                            f"{flag} is an option of {one.choice.kind} {owner!r}, and {str(here)!r} has none"
                        )
            others = [mode for mode in modes.COMMANDS if flag in modes.all_flags(mode)]
            if others:
                near = {"seed": "config.seed", "batch_size": "config.training.batch_size"}
                near = near.get(flag) if self.mode == "train" else None
                hint = f"; for training write --{near}" if near else ""
                raise ConfigError(
                    f"--{flag} is for --mode={', '.join(others)}, not for {self.mode}{hint}"
                )
            hint = self.near_flag(flag)
            if self.foreign and "allow_code" not in self.flags:
                hint += f" (options of the code of this run, {', '.join(self.foreign)}, need --allow_code)"
            raise ConfigError(f"there is no flag --{flag}{hint}")

    def near_flag(self, flag: str) -> str:
        """ "; did you mean …?" for an unknown flag: a field of the config, or a flag of the mode."""
        if self.config_file is not None:
            with contextlib.suppress(ConfigError):
                fields = config_lib.fields(config_lib.from_file(str(self.config_file)))
                exact = [name for name in fields if flag in (name, name.rpartition(".")[2])]
                if exact or "." in flag:
                    return config_lib.near_field(flag, list(fields))
        names = ["mode", *modes.flags_of(self.mode, self.flags, self.sampling)]
        names += modes.all_flags(self.mode)
        if self.mode == "train":
            names += [name for mode in modes.COMMANDS for name in modes.all_flags(mode)]
        whole = [name for name in dict.fromkeys(names) if name in flag.split("_")]
        return nearest_name(whole[0] if whole else flag, names, prefix="--")

    def values(self, *targets: Callable) -> dict[str, Text]:
        """The flags that the options of these targets take, by the names of the options."""
        result = {}
        for target in targets:
            found = list(options.flat(target, self.flags, skip=modes.POSITIONAL))
            if target is modes.COMMANDS[self.mode] and self.sampling is not Sampling:
                found += options.flat(self.sampling, self.flags)
            result |= {one.name: self.flags[one.flag] for one in found if one.flag in self.flags}
        return result

    def config(self):
        """The config of --config with its --config.FIELD=VALUE, or None.

        A data set other than that of the config file has its own image_shape, unless one is given.
        """
        if self.config_file is None:
            if self.fields:
                field = next(iter(self.fields))
                raise ConfigError(f"--config.{field} needs --config=configs/NAME.py beside it")
            return None
        result = config_lib.from_file(str(self.config_file))
        before = config_lib.fields(result).get("data.name")
        for field, text in sorted(
            self.fields.items(), key=lambda item: not item[0].endswith(".name")
        ):
            config_lib.override(result, field, text, resume.readers_of)
        after = config_lib.fields(result).get("data.name")
        own_data = after != before and after not in data.BUILT_IN
        if own_data and "data.image_shape" not in self.fields:
            config_lib.override(result, "data.image_shape", "None")
        return result

    def workdir(self) -> str:
        if self.flags.get("workdir"):
            return config_lib.path(str(self.flags["workdir"]))
        if self.mode == "import":
            raise ConfigError("give --workdir=DIR, the run directory to make")
        if self.config_file is None:
            raise ConfigError("give --config=configs/NAME.py, or --workdir=DIR of a run")
        return os.path.join("runs", config_lib.run_name(str(self.config_file)))


# ---- doing it ----------------------------------------------------------------------------------------


def execute(request: Request) -> Any:
    """Runs the command of a request, and returns its result."""
    mode, command = request.mode, modes.COMMANDS[request.mode]
    parallel.enable_compilation_cache()
    parameters = inspect.signature(command).parameters
    if "config" in parameters:
        workdir, settings = request.workdir(), request.config()
        if settings is None and mode != "import":
            what = "training" if mode == "train" else f"--mode={mode}"
            raise ConfigError(f"{what} needs --config=configs/NAME.py")
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
    with run_data.advice_on_writing(workdir):
        run = runs.load(
            workdir, **options.bind(modes.run_flags, request.values(modes.run_flags), "--")
        )
        return command(run, **arguments(command, run, request.values(command), "--"))


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
        return loop.check(request.config())
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
        os._exit(status)  # an orderly exit would wait for what the device is doing
    except SystemExit as error:  # of a training that a signal has stopped
        console.emit("error", error="stopped by a signal", status=error.code)
        raise
    except Exception as error:
        line = None if "--debug" in argv else explain(error)
        status = 2 if isinstance(error, ConfigError) else 1
        console.emit("error", error=line or f"{type(error).__name__}: {error}", status=status)
        if line is None and _processes() == 1 and not isinstance(error, USER_ERRORS):
            raise
        line = f"error: {line}" if line else traceback.format_exc()
    finally:
        sys.stdout = out
    print(line, file=sys.stderr, flush=True)
    if _processes() > 1:  # an orderly exit would wait for the others, and they for this one
        os._exit(status)
    sys.exit(status)


def _processes() -> int:
    """The number of processes that work together; 1 if jax cannot start."""
    try:
        return jax.process_count()
    except RuntimeError:
        return 1


def explain(error: Exception) -> str | None:
    """An error in one line; None for a mistake of this program."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    if isinstance(error, RuntimeError) and str(error).startswith("Unable to initialize backend"):
        line = str(error).partition(" (set ")[0].replace("\n", " ")
        return f"{line}; JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}: unset it, or name what is there"
    if not foreign_frames(error):
        return None
    message = str(error).strip().splitlines() or [""]
    return f"{place_of(error)}: {type(error).__name__}: {message[0]} (--debug shows more)"


if __name__ == "__main__":
    main()
