"""Configs from outside: checked against what they configure, saved beside the run, read back, compared."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence

import ml_collections

MISSING = "(no such field)"  # what `differences` shows where a config has none


class ConfigError(ValueError):
    """One line that names the field, what was expected and what to do."""


def path(text: str | os.PathLike) -> str:
    """A path as a user writes it, with ~ and ~NAME replaced by home directories.

    Every path from a command line or a caller goes through here once; only a shell does it otherwise, and no
    shell does it behind the = of --workdir=~/runs.
    """
    return os.path.expanduser(os.fspath(text))


def nearest(word: str, words, prefix: str = "") -> str:
    """ "; did you mean 'x'?" or nothing; the prefix stands before the x."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, with the nearest choice, if `value` is none of them."""
    if value not in choices:
        raise ValueError(
            f"unknown {field} {value!r}{nearest(str(value), choices)} (choose from {', '.join(choices)})"
        )


def check_names(config: Mapping, known: Sequence[str]) -> None:
    """Raises ConfigError for a name at the top of a config that nobody reads."""
    for name in config:
        if name not in known:
            raise ConfigError(
                f"config has {name!r}, which nobody reads{nearest(name, known)} (it has {', '.join(known)})"
            )


def _fits(value, hint) -> bool:
    """Whether a config's value is of an annotated type; lists pass for tuples, ints for floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if _is_sequence(hint):
        return isinstance(value, (tuple, list)) and all(_fits(v, arguments[0]) for v in value)
    if hint is typing.Any or not inspect.isclass(hint):
        return True
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _is_sequence(hint) -> bool:
    """Whether a type is tuple[…] or Sequence[…], for which None stands for no element."""
    origin = typing.get_origin(hint)
    return inspect.isclass(origin) and issubclass(origin, Sequence)


def arguments(path: str, function: Callable, section: Mapping, given=()) -> dict:
    """The section as keyword arguments of `function`, checked against its signature and annotations.

    Args:
      path: how a user writes the section, such as "config.model".
      function: what is to be called, or a class.
      section: keyword arguments out of a config; lists become tuples, and None an empty one where the
        function takes nothing but a tuple.
      given: names of parameters that do not come from the section.

    Raises:
      ConfigError: a key that the function does not take (with the nearest that it does), one that it
        needs and the section lacks, or a value of another type than annotated.
    """
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    names = [name for name in parameters if name not in given]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(
                f"{path} has no field {key!r}{nearest(key, names)} (it has {', '.join(names)})"
            )
        hint = hints.get(key, typing.Any)
        if value is None and _is_sequence(hint):
            values[key] = value = ()
        if not _fits(value, hint):
            expected = hint.__name__ if inspect.isclass(hint) else hint
            raise ConfigError(f"{path}.{key} must be {expected}, got {value!r}")
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in values:
            raise ConfigError(f"{path} lacks the field {name!r}")
    return values


@contextlib.contextmanager
def errors_at(path: str):
    """Turns a ValueError inside into a ConfigError that begins with the path of the section.

    A subclass of ValueError says what it is about by its class, and keeps it: what is wrong with a file is
    not wrong with the config that names the file.
    """
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ConfigError(f"{path}: {error}") from error


def call(path: str, function: Callable, section: Mapping, **given):
    """function(**section, **given), where every mistake in the section ends as one line.

    Raises:
      ConfigError: as `arguments`, or a ValueError of the function itself.
    """
    values = arguments(path, function, section, given)
    with errors_at(path):
        return function(**values, **given)


# ---- a config file, and what a command line changes in it --------------------------------------------


def find_file(name: str) -> str:
    """FILE.py or FILE.py:VARIANT as a user names it; NAME alone stands for configs/NAME.py.

    Raises:
      ConfigError: no such file, with the nearest that there is.
    """
    file, colon, variant = path(name).partition(":")
    whole = file if file.endswith(".py") else f"{file}.py"
    short = os.path.join("configs", whole)
    for choice in (file, whole, short):
        if os.path.isfile(choice):
            return choice + colon + variant
    folder = os.path.dirname(whole)
    names = os.listdir(folder or "configs") if os.path.isdir(folder or "configs") else []
    files = [os.path.join(folder or "configs", n) for n in names if n.endswith(".py")]
    raise ConfigError(
        f"there is no config file {file!r}{nearest(whole if folder else short, files)}"
    )


def from_file(name: str):
    """The ConfigDict that get_config() or get_config(VARIANT) of a config file returns, locked.

    The folder above that of the file can be imported from afterwards, as configs import one another.

    Args:
      name: see `find_file`.

    Raises:
      ConfigError: no such file or variant, or no get_config in it. Other mistakes in the file come as they are.
    """
    name = find_file(name)
    file, _, variant = name.partition(":")
    root = os.path.dirname(os.path.dirname(os.path.abspath(file)))
    if root not in sys.path:
        sys.path.append(root)
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"{file} is not a config file: it has no get_config()")
    if variant and not inspect.signature(get_config).parameters:
        raise ConfigError(f"{file} has no variants: leave out :{variant}")
    with errors_at(name):
        config = get_config(*([variant] if variant else []))
    return config.lock()


def fields(config) -> dict[str, object]:
    """{"model.channels": 128, …}: every field of a config with its value."""
    result = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            result |= {f"{name}.{inner}": leaf for inner, leaf in fields(value).items()}
        else:
            result[name] = value
    return result


def override(config, field: str, text: str) -> None:
    """Sets a field, such as "model.channels", to what a command line writes, read as the field's type.

    None is written for any field; an empty text is an empty tuple; 1e3 is a whole number.

    Raises:
      ConfigError: no such field, with the nearest, or a text of another type.
    """
    known = fields(config)
    if field not in known:
        if any(name.startswith(f"{field}.") for name in known):
            inner = [name for name in known if name.startswith(f"{field}.")]
            names = ", ".join(f"config.{name}" for name in inner)
            raise ConfigError(f"config.{field} is a section; give its fields: {names}")
        raise ConfigError(f"the config has no field config.{field}{near_field(field, list(known))}")
    *sections, name = field.split(".")
    section = config
    for part in sections:
        section = section[part]
    kind = section.get_type(name)
    try:
        value = _read(text, kind)
    except ValueError:
        expected = {int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(
            f"config.{field} must be {expected.get(kind, kind.__name__)}, got {text!r}"
        ) from None
    with section.ignore_type():
        section[name] = value


def near_field(word: str, known: Sequence[str]) -> str:
    """ "; did you mean --config.training.num_steps?" or nothing, for the path of a field or its last name."""
    by_name = {}
    for field in known:
        by_name.setdefault(field.rpartition(".")[2], []).append(field)
    last = word.rpartition(".")[2]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.9) or by_name.get(last)
    if not close:
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    if not close:
        names = difflib.get_close_matches(last, list(by_name), n=1)
        close = by_name[names[0]] if names else []
    options = " or ".join(f"--config.{field}" for field in close)
    return f"; did you mean {options}?" if close else ""


def _read(text: str, kind: type):
    """A value of a type; raises ValueError."""
    if text == "None" or (text == "none" and kind is not str):
        return None
    if kind is str:
        return text
    if kind is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]
    if kind is int:
        try:
            return int(text)
        except ValueError:
            number = float(text)  # as 1e5
        if not number.is_integer():
            raise ValueError
        return int(number)
    if kind is float:
        return float(text)
    try:
        value = ast.literal_eval(text.strip() or "()")
    except (ValueError, SyntaxError):
        value = tuple(text.split(",")) if kind is tuple else text
    if kind is tuple and not isinstance(value, (tuple, list)):
        value = (value,)
    return tuple(value) if kind is tuple else value


def to_json(config) -> str:
    return json.dumps(config.to_dict(), indent=2, default=list) + "\n"


def save(config, path: str) -> None:
    """Writes config.json in one piece: never half a file, whenever the process is killed."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(to_json(config))
    os.replace(temporary, path)


def load(path: str):
    """The ConfigDict that `save` wrote; its lists are tuples again.

    Raises:
      ConfigError: no such file, or not a config.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"no config at {path}: train with this --workdir first, or check its spelling"
        ) from None
    except (OSError, ValueError) as error:  # not JSON, or not text
        raise ConfigError(f"cannot read the config {path}: {error}") from None

    def tuples(node):
        if isinstance(node, dict):
            return {key: tuples(value) for key, value in node.items()}
        return tuple(map(tuples, node)) if isinstance(node, list) else node

    return ml_collections.ConfigDict(tuples(tree))


def differences(saved, given) -> dict[str, tuple]:
    """{"config.model.channels": (saved value, given value), …} of the fields that are not the same."""

    def flat(prefix, node):
        if not isinstance(node, dict):
            return {prefix: node}
        return {k: v for key in node for k, v in flat(f"{prefix}.{key}", node[key]).items()}

    saved, given = (flat("config", json.loads(to_json(config))) for config in (saved, given))
    return {
        key: (saved.get(key, MISSING), given.get(key, MISSING))
        for key in saved | given
        if saved.get(key, MISSING) != given.get(key, MISSING)
    }
