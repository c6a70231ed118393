"""The config of a model that was made from its parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import options
from ddpm_jax.ddpm import DDPM
from ddpm_jax.names import described, short_name
from ddpm_jax.networks import NETWORKS, UNet
from ddpm_jax.options import Choice, ConfigError
from ddpm_jax.process.time_sampling import TIME_SAMPLERS


def to_config(model: DDPM) -> ConfigDict:
    """The sections method, model, schedule and diffusion of a model, from which it can be made again.

    The schedule is written as its tables. Parts that are not built in are named module:NAME.
    """
    schedule, network = model.schedule, model.network
    tables = {"alpha": schedule.alpha, "sigma": schedule.sigma, "times": schedule.times}
    tables["step_variance"] = schedule.step_variance
    tables = {name: tuple(np.asarray(table, np.float64).tolist()) for name, table in tables.items()}
    fields = {
        field.name: getattr(network, field.name)
        for field in dataclasses.fields(network)
        if field.name not in ("parent", "name", "out_channels")
    }
    for field, value in fields.items():
        if callable(value):
            raise ConfigError(
                f"{described(network, 'network')} has a function as its field {field!r}, which config.json"
                " cannot hold; write the function in the class, or leave out workdir="
            )
    if isinstance(network, UNet):
        fields["num_groups"] = network.groups
        fields["attention_resolutions"] = network.attended(model.image_shape)
    parts = ("schedule", "network", "image_shape", "flip", "shift")
    diffusion = {}
    for option in options.options_of(type(model)):
        if option.name in parts:
            continue
        value = getattr(model, option.name)
        if option.choice is not None:
            diffusion |= options.describe(value)
            value = options.name_of(value, Choice("t_sampling", TIME_SAMPLERS))
        elif callable(value):
            value = full_name_of(value)
        diffusion[option.name] = value
    cls = type(model)
    method = "ddpm_jax.ddpm" if cls is DDPM else full_name_of(cls)
    name = options.name_of(network, Choice("network", NETWORKS))
    sections = {"schedule": {"name": "table", **tables}, "model": {"name": name, **fields}}
    return ConfigDict({"method": method, **sections, "diffusion": diffusion})


def full_name_of(thing: Any) -> str:
    """module:NAME of a class or function.

    Raises:
      ConfigError: it has no name, such as a functools.partial.
    """
    if not hasattr(thing, "__qualname__"):
        raise ConfigError(
            f"{thing!r} has no name that config.json could hold; define a function in a file, or leave out"
            " workdir="
        )
    return f"{short_name(thing.__module__)}:{thing.__qualname__}"
