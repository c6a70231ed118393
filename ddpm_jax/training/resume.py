"""Checks whether a config continues a run: which fields may differ from the saved ones."""

from __future__ import annotations

import contextlib
import inspect
import json
import os

from ml_collections import ConfigDict

from ddpm_jax import augmentation, data, options
from ddpm_jax.ddpm import DDPM, Sampling
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import run_data
from ddpm_jax.names import find
from ddpm_jax.networks import NETWORKS, ONCE_DEFAULT
from ddpm_jax.options import ConfigError
from ddpm_jax.process import schedules
from ddpm_jax.training import step

# Fields that may differ when a run continues: its length, its intervals, paths; never what affects the weights.
FREE_TO_CHANGE = (
    "config.data.data_dir",
    "config.data.memory_limit_gb",
    "config.training.num_steps",
    "config.training.log_every",
    "config.training.checkpoint_every",
    "config.training.checkpoint_minutes",
    "config.training.keep",
    "config.model.remat",
    "config.step.accumulate",
    "config.preview.",
)


def readers_of(section: str, config) -> tuple:
    """The functions or classes that take a section of a config as keyword arguments; empty if unknown."""
    name = config.get(section, {}).get("name") if section in ("model", "schedule") else None
    if section == "schedule":
        return find(name or "linear", schedules.SCHEDULES, "schedule"), schedules.make
    if section == "model":
        return (find(name or "unet", NETWORKS, "network"),)
    readers = {"data": (data.load, augmentation.augmented), "diffusion": (_diffusion_of(config),)}
    readers |= {"optimizer": (step.make_optimizer,), "step": (step.make_update,)}
    return (readers | {"preview": (Sampling,)}).get(section, ())


def _diffusion_of(config) -> type:
    """The class of DDPM that a config names; DDPM itself for a function that makes one."""
    named = None
    if ":" in str(config.get("method")):
        with contextlib.suppress(ValueError):  # the Method is refused where it is made
            named = find(config.method, {}, "method")
    return named if inspect.isclass(named) and issubclass(named, DDPM) else DDPM


def refuse_another_config(config, path: str, *, moved: bool = False) -> None:
    """Refuses a config that differs from the saved one beyond `FREE_TO_CHANGE`.

    Args:
      moved: the data may have another name or path; `run_data.check_data` compares the data themselves.

    An image_shape of None and a num_classes of −1 were filled in from the data, and stand for what is saved, as does
    the num_timesteps of a list of betas. A field that one of the two lacks, because it is older than the field, stands
    for its default.

    Raises:
      ConfigError: names the fields, with their saved and new values.
    """
    of_betas = config.get("schedule", {}).get("name") == "betas"
    saved_config = run_data.with_absolute_paths(config_lib.load(path))
    config, free = run_data.as_saved_where_open(config, saved_config), FREE_TO_CHANGE
    config = run_data.with_absolute_paths(config)
    if moved and run_data.saved_data(os.path.dirname(path)) is not None:
        free += ("config.data.name", "config.data.flatten", "config.data.skip_broken")
    changed = [
        f"{field} is {_shown(saved)} there and {_shown(new)} here"
        for field, (saved, new) in config_lib.differences(saved_config, config).items()
        if not field.startswith(free)
        and not (field == "config.data.image_shape" and new is None)
        and not (field == "config.model.num_classes" and new == run_data.CLASSES_OF_DATA)
        and not (field == "config.schedule.num_timesteps" and of_betas)
        and _or_default(field, saved, config) != _or_default(field, new, config)
    ]
    if changed:
        raise ConfigError(
            f"{path} belongs to another run: {'; '.join(changed)}. Give the saved values to continue"
            " it, or another --workdir to start a new run"
        )


def _shown(value) -> str:
    """A value in a message; a long list by its beginning and its length."""
    if isinstance(value, (tuple, list)) and len(value) > 8:
        return f"({', '.join(map(repr, value[:3]))}, … {len(value)} in all)"
    return repr(value)


def as_saved(config, path: str) -> None:
    """Replaces the sections that recipes digest by the saved ones, without fields of a newer version.

    They mean the same, by `refuse_another_config`, but results of the same weights must keep their digest.
    """
    saved = config_lib.load(path)
    for section in ("model", "schedule", "diffusion"):
        if section in saved and section in config:
            free = {
                name: value
                for name, value in config[section].items()
                if f"config.{section}.{name}" in FREE_TO_CHANGE and name in saved[section]
            }
            config[section] = ConfigDict({**saved[section], **free})


def _or_default(field: str, value, config):
    """The value of a config's field or, where it is missing or None, the default of what reads its section."""
    section, _, name = field.removeprefix("config.").rpartition(".")
    if value == config_lib.MISSING and section == "model" and name in ONCE_DEFAULT:
        return json.loads(json.dumps(ONCE_DEFAULT[name]))
    if value not in (config_lib.MISSING, None):
        return value
    for reader in readers_of(section, config):
        for option in options.options_of(reader):
            if option.name == name and option.default is not options.EMPTY:
                default = option.default
                default = options.name_of(default, option.choice) if option.choice else default
                return json.loads(json.dumps(default))  # as a saved config has it: lists for tuples
    return None if value == config_lib.MISSING else value
