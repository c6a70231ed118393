"""Values and annotated types: whether a value fits a type, reading one from text, and describing a type in words."""

from __future__ import annotations

import contextlib
import inspect
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal


def fields(values: Any) -> dict[str, Any]:
    """The fields of a dict, or of a section of a config; raises ValueError for anything else."""
    if not hasattr(values, "items"):
        raise ValueError(f"it must hold fields, got {values!r:.80}")
    return dict(values)


def alternatives(hint: Any) -> tuple:
    """The types of a union, or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def is_sequence(hint: Any) -> bool:
    """Whether a type is tuple[…] or Sequence[…], for which None means empty."""
    origin = typing.get_origin(hint)
    return inspect.isclass(origin) and issubclass(origin, Sequence)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; lists pass for tuples, ints for floats."""
    kinds = alternatives(hint)
    if len(kinds) > 1:
        return any(fits(value, each) for each in kinds)
    if hint in (None, type(None)):
        return value is None
    if typing.get_origin(hint) is Literal:
        return any(value == each and type(value) is type(each) for each in typing.get_args(hint))
    if is_sequence(hint):
        return isinstance(value, (tuple, list)) and all(
            fits(inner, typing.get_args(hint)[0]) for inner in value
        )
    if hint is Any or not inspect.isclass(hint):
        return True
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def read(text: str, hint: Any) -> Any:
    """Parses a text as a value of a type; raises ValueError. "1e3" is a whole number, and "" an empty tuple."""
    for each in alternatives(hint):
        with contextlib.suppress(ValueError):
            return _read(text, each)
    raise ValueError(text)


def _read(text: str, hint: Any) -> Any:
    if hint is type(None):
        if text in ("None", "none"):
            return None
        raise ValueError(text)
    if typing.get_origin(hint) is Literal:
        for value in typing.get_args(hint):
            if str(value) == text:
                return value
        _refuse(text)
    if hint is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        return words[text.lower()] if text.lower() in words else _refuse(text)
    if hint is int:
        with contextlib.suppress(ValueError):
            return int(text)
        number = float(text)  # as 1e5
        return int(number) if number.is_integer() else _refuse(text)
    if hint is float:
        return float(text)
    if is_sequence(hint):
        words = [word.strip() for word in text.strip().strip("()[]").split(",")]
        return tuple(read(word, typing.get_args(hint)[0]) for word in words if word)
    return text


def _refuse(text: str):
    raise ValueError(text)


def literals(hint: Any) -> list[str]:
    """The values of a Literal type, as text; empty for other types."""
    found = []
    for each in alternatives(hint):
        if typing.get_origin(each) is Literal:
            found += [str(value) for value in typing.get_args(each)]
        elif each is not type(None):
            return []
    return found


def expected(hint: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    parts = []
    for each in alternatives(hint):
        if typing.get_origin(each) is Literal:
            parts += [str(value) for value in typing.get_args(each)]
        elif is_sequence(each):
            parts.append(f"several of {expected(typing.get_args(each)[0])} with commas")
        elif each is not type(None):
            parts.append(words.get(each, getattr(each, "__name__", str(each))))
    return " or ".join(parts) or "None"
