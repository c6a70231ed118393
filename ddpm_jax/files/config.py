"""Configs: read from files and command lines, checked, saved in the run directory, compared."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

import ml_collections

from ddpm_jax import options
from ddpm_jax.files import writers
from ddpm_jax.method import SHARED_SECTIONS
from ddpm_jax.names import installed, nearest
from ddpm_jax.options import ConfigError, errors_at

CHOICES = ("model.name", "preview.sampler")  # fields that decide which others their section has
DIGEST = "sha256"  # name of the digest in a config.json
FORMAT = 2  # of run directories: 1, without a number, is that of 0.1.0
MISSING = "(no such field)"  # what `differences` shows where a config has none


def path(text: str | os.PathLike) -> str:
    """A path as a user writes it, with ~ and ~NAME replaced by home directories.

    Every path from a command line or a caller goes through here once: shells do not expand ~ after the = of
    --workdir=~/runs.
    """
    if not isinstance(text, str | os.PathLike):
        raise ConfigError(f"a path must be text, got {text!r:.80}")
    return os.path.expanduser(os.fspath(text))


# ---- a config file, and what a command line changes in it --------------------------------------------


def find_file(name: str) -> str:
    """The path of a config named as FILE.py, FILE.py:VARIANT, NAME for configs/NAME.py, or a run's config.json.

    Files not found from the current folder are looked up in the installation, so `cifar10` works in any folder.

    Raises:
      ConfigError: no such file; suggests the nearest one.
    """
    file, colon, variant = path(name).partition(":")
    if file.endswith(".json") and os.path.isfile(file):
        return file
    whole = file if file.endswith(".py") else f"{file}.py"
    short = os.path.join("configs", whole)
    for choice in (file, whole, short):
        if os.path.isfile(choice):
            return choice + colon + variant
    for choice in (whole, short):
        if found := installed(choice):
            return found + colon + variant
    folder = os.path.dirname(whole)
    own = os.path.dirname(installed("configs/cifar10.py"))
    names = os.listdir(next(filter(os.path.isdir, (folder or "configs", own)), own))
    files = [os.path.join(folder or "configs", n) for n in names if n.endswith(".py")]
    raise ConfigError(
        f"there is no config file {file!r}{nearest(whole if folder else short, files)}"
    )


def run_name(name: str) -> str:
    """The default name of a run directory: NAME or NAME_VARIANT; of a variant that is a path, the last part.

    Args:
      name: see `find_file`.
    """
    file, _, variant = find_file(name).partition(":")
    if not re.fullmatch(r"[\w,=+-]*", variant):
        variant = os.path.basename(os.path.abspath(path(variant)))
        variant = re.sub(r"[^\w.,=+-]+", "_", variant).strip("_.")
    return "_".join(filter(None, [os.path.splitext(os.path.basename(file))[0], variant]))


def from_file(name: str):
    """The ConfigDict that get_config() or get_config(VARIANT) of a config file returns, or that of a config.json; locked.

    The parent of the file's folder is added to sys.path, so that configs can import one another.

    Args:
      name: see `find_file`.

    Raises:
      ConfigError: no such file or variant, no get_config in it, or it does not return a config. Other errors in the file
        are not caught.
    """
    name = find_file(name)
    file, _, variant = name.partition(":")
    if file.endswith(".json"):
        return _checked(load(file), file)
    root = os.path.dirname(os.path.dirname(os.path.abspath(file)))
    if root not in sys.path:
        sys.path.append(root)
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"{file} is not a config file: it has no get_config()")
    if variant and not inspect.signature(get_config).parameters:
        raise ConfigError(f"{file} has no variants: leave out :{variant}")
    with errors_at(name):
        config = get_config(*([variant] if variant else []))
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{file}: get_config() must return a ConfigDict, got {config!r:.80}")
    return _checked(config, file)


def _checked(config, file: str):
    """The config, locked, after a check of its sections."""
    missing = [name for name in SHARED_SECTIONS if name not in config]
    if missing:
        raise ConfigError(
            f"{file}: the config lacks {', '.join(missing)}; begin with one of ddpm_jax.configs, such as digits"
        )
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


def override(config, field: str, text: str, readers_of: Callable = lambda *_: ()) -> None:
    """Sets a field, such as "model.channels", from its text on a command line, read as the field's type.

    None is accepted for any field; empty text means an empty tuple; 1e3 is a whole number.

    Args:
      readers_of: (section, config) -> what takes the section as arguments; its options are fields too.

    Raises:
      ConfigError: an unknown field, with the nearest one, or text of the wrong type.
    """
    known = fields(config)
    section_name, _, name = field.rpartition(".")
    if field not in known:
        inner = [name for name in known if name.startswith(f"{field}.")]
        if inner:
            names = ", ".join(f"config.{name}" for name in inner)
            raise ConfigError(f"config.{field} is a section; give its fields: {names}")
        found = _options_of_section(config, section_name, readers_of)
        if name not in found and field not in CHOICES:
            known = [*known, *(f"{section_name}.{other}" for other in found)]
            raise ConfigError(f"the config has no field config.{field}{near_field(field, known)}")
        value = text
        if field not in CHOICES:
            value = options.convert(found[name], options.Text(text), f"config.{section_name}")
        with config[section_name].unlocked():
            config[section_name][name] = value
        _drop_fields_of_another(config, field, readers_of)
        return
    kind = (config[section_name] if section_name else config).get_type(name)
    try:
        value = _read(text, kind)
    except ValueError:
        expected = {int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(
            f"config.{field} must be {expected.get(kind, kind.__name__)}, got {text!r}"
        ) from None
    set_field(config, field, value)
    _drop_fields_of_another(config, field, readers_of)


def set_field(config, field: str, value) -> None:
    """Sets an existing field, such as "model.channels", also to or from None."""
    *sections, name = field.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():
        config[name] = value


FILLED_IN = {  # parameters of what takes a section that are not fields of it
    "data": ("keys", "images"),
    "diffusion": ("schedule", "network", "image_shape", "flip", "shift"),
    "model": ("parent", "name", "out_channels"),
}


def _drop_fields_of_another(config, field: str, readers_of: Callable) -> None:
    """Removes the fields of a section that a newly chosen network or sampler does not have."""
    section = field.rpartition(".")[0]
    if field not in CHOICES or not readers_of(section, config):
        return
    found = _options_of_section(config, section, readers_of)
    with config[section].unlocked():
        for other in set(config[section]) - set(found) - {"name", "every", "num_images", "nearest"}:
            del config[section][other]


def _options_of_section(config, section: str, readers_of: Callable) -> dict:
    """The options of what takes a section, by name."""
    found = {}
    with errors_at(f"config.{section}"):
        for reader in readers_of(section, config) if section in config else ():
            chosen = {k: v for k, v in config[section].items() if isinstance(v, str)}
            skip = FILLED_IN.get(section, ())
            found |= {one.name: one for one in options.flat(reader, chosen, skip=skip)}
    return found


def near_field(word: str, known: Sequence[str]) -> str:
    """The hint "; did you mean --config.training.num_steps?" for a misspelt field or last name; empty if none is near."""
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
    """Writes config.json atomically: a killed process never leaves half a file."""
    tree = {"format": FORMAT, **json.loads(to_json(config))}
    writers.save_text(path, json.dumps({**tree, DIGEST: digest(tree)}, indent=2) + "\n")


def digest(tree: dict) -> str:
    """The SHA-256 of a JSON object, which does not depend on the order of its names."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def load(path: str):
    """The ConfigDict that `save` wrote; its lists are tuples again.

    Raises:
      ConfigError: no such file, not a config, or one that has changed since it was written.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
        saved = tree.pop(DIGEST, None)  # older versions wrote none
    except FileNotFoundError:
        raise ConfigError(
            f"no config at {path}: train with this --workdir first, or check its spelling"
        ) from None
    except (
        OSError,
        ValueError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as error:  # not JSON, or not text
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    number = tree.get("format", 1)
    if type(number) is not int or number > FORMAT:  # before the digest, which may be another one
        raise ConfigError(
            f"{path} was made by a newer ddpm_jax (format {number}; this one reads up to {FORMAT}): update ddpm_jax"
        )
    if saved not in (None, digest(tree)):
        raise ConfigError(
            f'{path} has changed since it was written; restore a copy, or if the change is meant, delete "{DIGEST}" in it'
        )
    tree.pop("format", None)

    def tuples(node):
        if isinstance(node, dict):
            return {key: tuples(value) for key, value in node.items()}
        return tuple(map(tuples, node)) if isinstance(node, list) else node

    sections = [name for name in SHARED_SECTIONS if name not in ("method", "seed")]
    if any(not isinstance(tree.get(name), dict) for name in sections):
        raise ConfigError(f"{path} is not the config of a run: it lacks {', '.join(sections)}")
    if not isinstance(tree["data"].get("name"), str):
        raise ConfigError(f"{path} is not the config of a run: it lacks data.name")
    try:
        return ml_collections.ConfigDict(tuples(tree))
    except (ValueError, AttributeError) as error:  # a name that no field can have
        raise ConfigError(f"cannot read the config {path}: {error}") from None


def differences(old, new) -> dict[str, tuple]:
    """{"config.model.channels": (old value, new value), …} of the fields that differ."""

    def flat(prefix, node):
        if not isinstance(node, dict):
            return {prefix: node}
        return {k: v for key in node for k, v in flat(f"{prefix}.{key}", node[key]).items()}

    old, new = (flat("config", json.loads(to_json(config))) for config in (old, new))
    pairs = {key: (old.get(key, MISSING), new.get(key, MISSING)) for key in old | new}
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}
