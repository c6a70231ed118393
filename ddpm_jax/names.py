"""Objects found by name: a built-in name or `module:NAME`, with the nearest name for a misspelt one."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ddpm_jax


def nearest(word: str, words: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean 'x'?" or nothing; the prefix stands before the x."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def check_choice(kind: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, with the nearest choice, if `value` is not one of them."""
    if value not in choices:
        raise ValueError(
            f"unknown {kind} {value!r}{nearest(str(value), choices)} (choose from {', '.join(choices)})"
        )


def find(spec: Any, built_in: Mapping[str, Any], kind: str) -> Any:
    """The object that a name stands for: an entry of `built_in`, or NAME in a module, written `module:NAME`.

    A spec that is not text is returned as it is, so that Python code may pass the object itself.

    Args:
      kind: what is looked for, for the message, such as "sampler".

    Raises:
      ValueError: one line: an unknown name, with the nearest one, an unknown module, or no such NAME in it.
    """
    if not isinstance(spec, str):
        if not callable(spec) and not dataclasses.is_dataclass(spec):
            shown = " ".join(repr(spec).split())[:80]
            raise ValueError(f"{kind} must be a name, or in Python the thing itself, got {shown}")
        return spec
    if spec in built_in:
        return built_in[spec]
    module_name, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(
            f"unknown {kind} {spec!r}{nearest(spec, built_in)} (choose from {', '.join(built_in)}, or"
            " module:NAME)"
        )
    module = import_module(module_name, kind)
    if not hasattr(module, name):
        words = [word for word in vars(module) if not word.startswith("_")]
        raise ValueError(
            f"{kind} {spec!r}: {module.__file__} has no {name!r}{nearest(name, words)}"
        )
    found = getattr(module, name)
    home = str(getattr(found, "__module__", module.__name__))
    if module.__name__.startswith("ddpm_jax.") and not f"{home}.".startswith(f"{module.__name__}."):
        raise ValueError(
            f"{kind} {spec!r} is of {home}; name it there"
        )  # what ours import is not theirs
    return found


def full_name(module: str) -> str:
    """`ddpm_jax.experiments.NAME` for `experiments.NAME` of this installation; any other name as it is."""
    own = module.startswith("experiments.") and installed(module.replace(".", "/"))
    return f"ddpm_jax.{module}" if own else module


def short_name(module: str) -> str:
    """The inverse of `full_name`: the name that configs and recipes have for a module."""
    return module.removeprefix("ddpm_jax.") if module.startswith("ddpm_jax.exp") else module


def installed(path: str) -> str | None:
    """A file of this installation by its path below the clone's folder, .py added if missing; None if there is none.

    Args:
      path: such as "configs/cifar10.py" or "experiments/vae".
    """
    for root in ddpm_jax.__path__:
        for file in (path, f"{path}.py", os.path.join(path, "__init__.py")):
            if os.path.isfile(found := os.path.join(root, file)):
                return found
    return None


def import_module(name: str, kind: str):
    """A module by its dotted name; the current folder counts, as it does for `python -m`.

    Raises:
      ValueError: one line: there is no such module, or an error in it, with file and line.
    """
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        path = os.path.basename(name) if os.path.isabs(name) else name
        near = re.sub(r"\W+", ".", path.removesuffix(".py")).strip(".")
        raise ValueError(
            f"{kind}: {name!r} is not the name of a module as `import` takes it"
            + (f", such as {near}:NAME" if near else "; write module:NAME")
        )
    name = full_name(name)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{kind}: there is no module {name!r} that can be imported from here"
            ) from error
        raise ValueError(f"{kind}: {place_of(error)}: {error}") from error
    except Exception as error:  # whatever the file of a user raises
        raise ValueError(f"{kind}: {place_of(error)}: {type(error).__name__}: {error}") from error


def place_of(error: BaseException) -> str:
    """The file and line where an error was raised, in the user's own files if any took part."""
    frames = traceback.extract_tb(error.__traceback__)
    own = foreign_frames(error)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def check_takes(
    thing: Any, arguments: Sequence[str], kind: str, keywords: Sequence[str] = ()
) -> None:
    """Checks that a function, or an object with __call__, can be called with these arguments.

    Raises:
      ValueError: it cannot; names its file, and what it takes.
    """
    if not callable(thing):
        raise ValueError(
            f"{described(thing, kind)} has no __call__({', '.join([*arguments, *keywords])})"
        )
    signature = inspect.signature(thing)
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError:
        raise ValueError(
            f"{described(thing, kind)} takes {signature}, and must take"
            f" ({', '.join([*arguments, *keywords])})"
        ) from None


def described(thing: Any, kind: str) -> str:
    """The kind, name and file of an object, for an error message."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    try:
        return f"{kind} {named.__qualname__} ({inspect.getsourcefile(named)})"
    except TypeError:  # of Python itself
        return f"{kind} {thing!r}"


def foreign_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an error in the user's own files."""
    frames = traceback.extract_tb(error.__traceback__)
    return [one for one in frames if is_foreign(one.filename) and one.filename != sys.argv[0]]


def is_foreign(path: str) -> bool:
    """Whether a source file belongs neither to this package, nor to Python, nor to an installed library."""
    ours = os.path.dirname(os.path.abspath(__file__))
    return (
        os.path.isabs(path)
        and not path.startswith(ours)
        and "site-packages" not in path
        and not path.startswith(os.path.dirname(os.__file__))
    )
