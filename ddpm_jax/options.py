"""Options, each declared once: at the parameter or field that uses it, with its type, default and line of help.

A target is a function or a class, usually a frozen dataclass. Its parameters are options. What they are follows from
the annotation:

    steps: Annotated[int | None, "How many."] = None      an option with its help
    eta: float = option(0.0, "The noise.")                the same as a field of a dataclass
    output: Output = Output()                             a group: the fields of the dataclass `Output` are options
    sampler: Annotated[Sampler, Choice("sampler", SAMPLERS)] = Ancestral()
                                                          a choice by name: the fields of what is chosen are options too

From these declarations follow flags, --help, config sections, keyword arguments in Python, recipes, did-you-mean, and
the refusal of an option that belongs to another choice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ddpm_jax import hints
from ddpm_jax.names import described, find, nearest, short_name

EMPTY = inspect.Parameter.empty


class ConfigError(ValueError):
    """One line that names the option or the config field, what was expected and what to do."""


class Choice(NamedTuple):
    """Marks a parameter whose value is chosen by name."""

    kind: str  # in words, such as "sampler"
    built_in: Mapping[str, Any]


class AtLeast(NamedTuple):
    """Marks the smallest number that a parameter takes."""

    least: int


class Text(str):
    """A value as a command line has it: to be read as the type of its option."""


class Option(NamedTuple):
    """A parameter of a target."""

    name: str
    hint: Any
    default: Any  # EMPTY if it must be given
    help: str
    flag: str  # how it is called on the command line
    choice: Choice | None = None
    group: type | None = None
    least: int | None = None
    quiet: bool = False

    @property
    def is_boolean(self) -> bool:
        return bool in hints.alternatives(self.hint)


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    least: int | None = None,
    quiet: bool = False,
) -> Any:
    """A field of a dataclass with its line of help.

    Args:
      flag: its name on the command line, where that differs.
      least: the smallest number that it takes.
      quiet: descriptions and recipes name it only if it differs from its default. So an option can be added to a sampler
        whose results exist already.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Euler:
    ...     churn: float = dj.option(0.0, "Noise added in each step; 0 is deterministic.")
    >>> Euler(churn=0.3)  # also --sampler=my_file:Euler --churn=0.3
    Euler(churn=0.3)
    """
    metadata = {"help": help, "flag": flag, "least": least, "quiet": quiet}
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def options_of(target: Callable) -> tuple[Option, ...]:
    """The options of a function or class, in the order of its signature; positional parameters are not options."""
    is_class = inspect.isclass(target)
    hinted = target.__init__ if is_class and not dataclasses.is_dataclass(target) else target
    try:
        annotations = typing.get_type_hints(hinted, include_extras=True)
    except NameError as error:
        raise ConfigError(f"{described(target, 'annotations of')}: {error}") from error
    fields = (
        {f.name: f for f in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else {}
    )
    result = []
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        hint, notes = annotations.get(name, Any), ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *notes = typing.get_args(hint)
        metadata = fields[name].metadata if name in fields else {}
        default = parameter.default
        if name in fields and fields[name].default_factory is not dataclasses.MISSING:
            default = fields[name].default_factory()
        text = next((note for note in notes if isinstance(note, str)), metadata.get("help") or "")
        least = next((n.least for n in notes if isinstance(n, AtLeast)), metadata.get("least"))
        choice = next((note for note in notes if isinstance(note, Choice)), None)
        group = hint if choice is None and _is_group(hint) else None
        flag = metadata.get("flag") or name
        quiet = bool(metadata.get("quiet"))
        result.append(Option(name, hint, default, text, flag, choice, group, least, quiet))
    return tuple(result)


def _is_group(hint: Any) -> bool:
    return inspect.isclass(hint) and dataclasses.is_dataclass(hint)


def flat(target: Callable, chosen: Mapping[str, Any] | None = None, skip=()) -> Iterator[Option]:
    """The options of a target with those of its groups and of what is chosen in it.

    Args:
      chosen: {name of a choice: name of what is chosen}; by default the choice's default.
      skip: names of parameters that are not options.

    Yields:
      each with the default that holds there.
    """
    for one in options_of(target):
        if one.name in skip:
            continue
        if one.group is not None:
            for inner in flat(one.group, chosen):
                default = inner.default
                if one.default not in (EMPTY, None) and hasattr(one.default, inner.name):
                    default = getattr(one.default, inner.name)
                yield inner._replace(default=default)
            continue
        yield one
        if one.choice is not None:
            with _at(""):
                cls, default = _chosen(one, (chosen or {}).get(one.name))
            for inner in flat(cls) if cls else ():
                if inner.name in {other.name for other in options_of(target)}:
                    raise ConfigError(_clash(cls, one.choice, [inner.name]))
                yield inner._replace(default=getattr(default, inner.name, inner.default))


def _clash(cls: type, choice: Choice, names) -> str:
    return (
        f"{choice.kind} {cls.__module__}:{cls.__qualname__}: its field {', '.join(sorted(names))} is an option"
        " of the command already; rename it"
    )


def _chosen(one: Option, name: Any) -> tuple[type | None, Any]:
    """The class of a choice, and an instance of it whose fields are the defaults."""
    default = None if one.default is EMPTY else one.default
    if name is None:
        return (None if default is None else type(default)), default
    name = str(name) if isinstance(name, Text) else name
    found = find(name, one.choice.built_in, one.choice.kind)
    if inspect.isclass(found):
        return found, (default if type(default) is found else None)
    if not dataclasses.is_dataclass(found):
        kind = one.choice.kind
        raise ValueError(
            f"{described(found, kind)} must be a dataclass, with its options as fields"
        )
    return type(found), found


# ---- from flat values to arguments -----------------------------------------------------------------


def bind(target: Callable, values: Mapping[str, Any], where: str, *, given=()) -> dict[str, Any]:
    """Keyword arguments of a target from flat values by name, checked against its declarations.

    Args:
      values: of Python, of a config (lists become tuples) or `Text` of a command line.
      where: how a user writes them, such as "config.model"; "--" for flags, "" for keyword arguments.
      given: names of parameters that do not come from `values`.

    Raises:
      ConfigError: a name that the target does not take (with the nearest that it does), one that it needs and is not
        there, or a value of another type.
    """
    with _at(where):
        left = hints.fields(values)
        kwargs = _bind(target, left, where, frozenset(given))
    if left:
        raise ConfigError(_unknown(target, next(iter(left)), values, where, given))
    return kwargs


def build(target: Callable, values: Mapping[str, Any], where: str, **given) -> Any:
    """target(**values, **given), where every mistake in the values ends as one line.

    Raises:
      ConfigError: as `bind`, or a ValueError of the target itself.
    """
    kwargs = bind(target, values, where, given=given)
    with _at(where):
        return target(**kwargs, **given)


def _bind(target, left: dict, where: str, given=frozenset(), base=None) -> dict[str, Any]:
    kwargs = {}
    for one in options_of(target):
        if one.name in given:
            continue
        default = getattr(base, one.name, one.default)
        if one.group is not None:
            if isinstance(left.get(one.name), one.group):  # the whole group, from Python
                kwargs[one.name] = left.pop(one.name)
                continue
            inner = _bind(one.group, left, where, base=default)
            if inner:
                kwargs[one.name] = dataclasses.replace(default, **inner)
        elif one.choice is not None:
            value = left.pop(one.name, None)
            if value is not None and not isinstance(value, str) and not inspect.isclass(value):
                inner = _bind(type(value), left, where, base=value)  # an instance, from Python
                kwargs[one.name] = dataclasses.replace(value, **inner) if inner else value
                continue
            cls, default = _chosen(one._replace(default=default), value)
            if cls is None:
                continue
            inner = _bind(cls, left, where, base=default)
            if value is not None or inner:
                kwargs[one.name] = (
                    dataclasses.replace(default, **inner) if default else cls(**inner)
                )
        elif one.name in left:
            kwargs[one.name] = convert(one, left.pop(one.name), where)
        elif one.default is EMPTY and base is None:
            raise ConfigError(
                f"{where} lacks the field {one.name!r}"
                if _is_field(where)
                else f"give {_called(one, where)}"
            )
    return kwargs


def _is_field(where: str) -> bool:
    return where not in ("", "--")


def _called(one: Option, where: str) -> str:
    return (
        f"{where}.{one.name}" if _is_field(where) else f"{where}{one.flag if where else one.name}"
    )


def _unknown(target, name: str, values, where: str, given) -> str:
    """The line for a name that a target does not take."""
    chosen = {k: str(v) for k, v in values.items() if isinstance(v, str)}
    names = []
    for one in flat(target, chosen, skip=given):
        names.append(one.flag if where == "--" else one.name)
        if one.choice is None:
            continue
        current, _ = _chosen(one, chosen.get(one.name))
        for owner, cls in one.choice.built_in.items():
            if inspect.isclass(cls) and name in {inner.name for inner in options_of(cls)}:
                here = "none" if current is None else name_of(current, one.choice)
                return f"{name} is an option of {one.choice.kind} {owner!r}, and {here!r} has none"
    if _is_field(where):
        return f"{where} has no field {name!r}{nearest(name, names)} (it has {', '.join(names)})"
    prefix = "--" if where == "--" else ""
    return f"there is no option {prefix}{name}{nearest(name, names, prefix)} (there are {', '.join(names)})"


@contextlib.contextmanager
def _at(where: str):
    """Turns a ValueError inside into a ConfigError that begins with the name of a section."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        if type(error) is not ValueError:  # its class says what it is about, such as a damaged file
            raise
        raise ConfigError(f"{where}: {error}" if _is_field(where) else str(error)) from error


def errors_at(where: str):
    """A context that turns a plain ValueError into a ConfigError that begins with `where`."""
    return _at(where)


# ---- values and types ------------------------------------------------------------------------------


def convert(one: Option, value: Any, where: str) -> Any:
    """A value converted to the type of its option.

    Raises:
      ConfigError: the type is wrong, or the number too small.
    """
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, Text):
        try:
            value = hints.read(str(value), one.hint)
        except ValueError:
            raise ConfigError(
                f"{_called(one, where)} must be {hints.expected(one.hint)}, got"
                f" {str(value)!r}{nearest(str(value), hints.literals(one.hint))}"
            ) from None
    if value is None and hints.is_sequence(one.hint):
        value = ()
    if not hints.fits(value, one.hint):
        value = _plain(value)
    if not hints.fits(value, one.hint):
        hint = nearest(value, hints.literals(one.hint)) if isinstance(value, str) else ""
        raise ConfigError(
            f"{_called(one, where)} must be {hints.expected(one.hint)}, got {value!r}{hint}"
        )
    if one.least is not None and isinstance(value, int) and value < one.least:
        raise ConfigError(f"{_called(one, where)} must be at least {one.least}, got {value}")
    return value


def _plain(value: Any) -> Any:
    """A number of NumPy as Python's; an array or a range as a tuple."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, (list, range)) else value


# ---- from things to flat values --------------------------------------------------------------------


def name_of(thing: Any, choice: Choice) -> str:
    """The name that a choice has for a thing or its class: a built-in one, or module:NAME."""
    cls = thing if inspect.isclass(thing) else type(thing)
    for name, one in choice.built_in.items():
        if one is cls or one is thing:
            return name
    return f"{short_name(cls.__module__)}:{cls.__qualname__}"


def describe(group: Any) -> dict[str, Any]:
    """The flat values of a dataclass, from which `build` makes it again: {"sampler": "ddim", "eta": 0.5, …}."""
    result = {}
    for one in options_of(type(group)):
        if not hasattr(group, one.name):
            raise ConfigError(
                f"{described(group, 'class')} takes {one.name!r} and has no attribute of this name; make it a"
                " dataclass"
            )
        value = getattr(group, one.name)
        if one.choice is not None and value is not None:
            inner = describe(value)
            if clash := inner.keys() & (
                {other.name for other in options_of(type(group))} | {one.name}
            ):
                raise ConfigError(_clash(type(value), one.choice, clash))
            result |= {one.name: name_of(value, one.choice)} | inner
        elif one.group is not None:
            result |= describe(value)
        elif not (one.quiet and value == one.default):
            result[one.name] = value
    return result


def changed(group: Any) -> dict[str, Any]:
    """The flat values in which a dataclass differs from its own defaults."""
    values, default = describe(group), describe(type(group)())
    inner = [one for one in options_of(type(group)) if one.choice is not None]
    for one in inner:  # the defaults of what is chosen, not of the default choice
        with contextlib.suppress(TypeError):
            default |= describe(type(getattr(group, one.name))())
    return {
        name: value
        for name, value in values.items()
        if name not in default or value != default[name]
    }
