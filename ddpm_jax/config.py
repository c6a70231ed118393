"""Configs from outside: checked against what they configure, saved beside the run, read back, compared."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence

import ml_collections

MISSING = "(no such field)"  # what `differences` shows where a config has none


class ConfigError(ValueError):
    """One line that names the field, what was expected and what to do."""


def nearest(word: str, words) -> str:
    """ "; did you mean 'x'?" or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


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
    if origin is tuple or (inspect.isclass(origin) and issubclass(origin, Sequence)):
        return isinstance(value, (tuple, list)) and all(_fits(v, arguments[0]) for v in value)
    if hint is typing.Any or not inspect.isclass(hint):
        return True
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def arguments(path: str, function: Callable, section: Mapping, given=()) -> dict:
    """The section as keyword arguments of `function`, checked against its signature and annotations.

    Args:
      path: how a user writes the section, such as "config.model".
      function: what is to be called, or a class.
      section: keyword arguments out of a config; lists become tuples.
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
        if not _fits(value, hint):
            expected = hint.__name__ if inspect.isclass(hint) else hint
            raise ConfigError(f"{path}.{key} must be {expected}, got {value!r}")
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in values:
            raise ConfigError(f"{path} lacks the field {name!r}")
    return values


@contextlib.contextmanager
def errors_at(path: str):
    """Turns a ValueError inside into a ConfigError that begins with the path of the section."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def call(path: str, function: Callable, section: Mapping, **given):
    """function(**section, **given), where every mistake in the section ends as one line.

    Raises:
      ConfigError: as `arguments`, or a ValueError of the function itself.
    """
    values = arguments(path, function, section, given)
    with errors_at(path):
        return function(**values, **given)


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
    except (OSError, json.JSONDecodeError) as error:
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
