"""A command line, parsed and checked against the options of its command."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable

from ddpm_jax import data, modes, options
from ddpm_jax.ddpm import Sampling
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import runs
from ddpm_jax.method import from_config
from ddpm_jax.names import nearest as nearest_name
from ddpm_jax.options import ConfigError, Text
from ddpm_jax.training import resume


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
        foreign = (
            runs.foreign_modules(result, to_train=True)
            if str(self.config_file).endswith(".json")
            else ()
        )
        if foreign and "allow_code" not in self.flags:
            raise ConfigError(
                f"{self.config_file} imports code from outside ddpm_jax, {', '.join(foreign)}; if you trust it, give"
                " --allow_code"
            )
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
