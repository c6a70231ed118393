"""Checks whether a config continues a run: which fields may differ from the saved ones; changes on purpose.

    python -m ddpm_jax.main --config=configs/digits.py --change=optimizer.learning_rate=1e-4

changes a field of a started run. history.jsonl in the run directory has a line for each change: step, field, old and new
value. From then on the value that the run began with stands for the changed one, so the command without --change
continues the changed run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm_jax import augmentation, data, options
from ddpm_jax.ddpm import DDPM, Sampling
from ddpm_jax.files import checkpoints, run_data, runs, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.names import find, nearest
from ddpm_jax.networks import NETWORKS, ONCE_DEFAULT
from ddpm_jax.options import ConfigError
from ddpm_jax.process import schedules
from ddpm_jax.training import step
from ddpm_jax.training.length import Length

Change = Annotated[
    tuple[str, ...],
    "What changes in the run that is continued, several with commas: data, for other images than it began with, or"
    " FIELD=VALUE, such as optimizer.learning_rate=1e-4; of optimizer, step, training.batch_size and"
    " training.num_steps.",
]
CHANGEABLE = (
    "config.optimizer.",
    "config.step.",
    "config.training.batch_size",
    "config.training.num_steps",
)
HISTORY = "history.jsonl"

# Fields that may differ when a run continues: its length, its intervals, paths; never what affects the weights.
FREE_TO_CHANGE = (
    "config.data.data_dir",
    "config.data.memory_limit_gb",
    "config.training.num_steps",
    "config.training.log_every",
    "config.training.checkpoint_every",
    "config.training.checkpoint_minutes",
    "config.training.keep",
    "config.training.keep_best",
    "config.training.mirror",
    "config.training.logger",
    "config.training.histograms",
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
    return (readers | {"preview": (Sampling,), "training": (Length,)}).get(section, ())


def _diffusion_of(config) -> type:
    """The class of DDPM that a config names; DDPM itself for a function that makes one."""
    named = None
    if ":" in str(config.get("method")):
        with contextlib.suppress(ValueError):  # the Method is refused where it is made
            named = find(config.method, {}, "method")
    return named if inspect.isclass(named) and issubclass(named, DDPM) else DDPM


def differing(
    config, path: str, *, moved: bool = False, changes: Sequence[Changed] = ()
) -> dict[str, tuple]:
    """{"config.seed": (saved, new), …} of the fields in which a config differs from the saved one beyond `FREE_TO_CHANGE`.

    Args:
      moved: the data may have another name or path; `run_data.check_data` compares the data themselves.
      changes: those that are made now, see `with_changes`.

    An image_shape of None and a num_classes of −1 were filled in from the data, and stand for what is saved, as does
    the num_timesteps of a list of betas. A field that one of the two lacks, because it is older than the field, stands
    for its default. A field that was changed on purpose may also have the value that the run began with.
    """
    of_betas = config.get("schedule", {}).get("name") == "betas"
    folder = os.path.dirname(path)
    saved_config = run_data.with_absolute_paths(config_lib.load(path))
    config, free = run_data.as_saved_where_open(config, saved_config), FREE_TO_CHANGE
    config = run_data.with_absolute_paths(config)
    saved_config, config = (as_changed(one, folder) for one in (saved_config, config))
    if moved and run_data.saved_data(folder) is not None:
        free += ("config.data.name", "config.data.flatten", "config.data.skip_broken")
    on_purpose = {f"config.{change.field}" for change in changes}
    return {
        field: (saved, new)
        for field, (saved, new) in config_lib.differences(saved_config, config).items()
        if not field.startswith(free)
        and field not in on_purpose
        and not (field == "config.data.image_shape" and new is None)
        and not (field == "config.model.num_classes" and new == run_data.CLASSES_OF_DATA)
        and not (field == "config.schedule.num_timesteps" and of_betas)
        and _or_default(field, saved, config) != _or_default(field, new, config)
    }


def in_words(changed: dict[str, tuple]) -> str:
    """What `differing` found, in a message."""
    parts = (
        f"{field} is {_shown(saved)} there and {_shown(new)} here"
        for field, (saved, new) in changed.items()
    )
    return "; ".join(parts)


def refuse_another_config(
    config, path: str, *, moved: bool = False, changes: Sequence[Changed] = ()
) -> None:
    """Refuses a config in which fields are `differing` from the saved one; the arguments are the same.

    Raises:
      ConfigError: names the fields, with their saved and new values.
    """
    if changed := differing(config, path, moved=moved, changes=changes):
        hint = ",".join(
            f"{field.removeprefix('config.')}={new}" for field, (_, new) in changed.items()
        )
        may = moved and all(field.startswith(CHANGEABLE) for field in changed)
        raise ConfigError(
            f"{path} belongs to another run: {in_words(changed)}. Give the saved values to continue it,"
            f"{f' --change={hint} to change them from here on,' if may else ''} or another --workdir to start"
            " a new run"
        )


def _shown(value) -> str:
    """A value in a message; a long list by its beginning and its length."""
    if isinstance(value, (tuple, list)) and len(value) > 8:
        return f"({', '.join(map(repr, value[:3]))}, … {len(value)} in all)"
    return repr(value)


# ---- changes on purpose ----------------------------------------------------------------------------


class Changed(NamedTuple):
    """A change of a field, as a line of history.jsonl."""

    field: str  # such as "optimizer.learning_rate"
    old: Any
    new: Any


def history(workdir: str) -> list[dict]:
    """The changes that were made to a run, the oldest first.

    Raises:
      ConfigError: a line is damaged, or is not a change; without it the run would continue with other settings.
    """
    path = os.path.join(workdir, HISTORY)
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        count = sum(1 for _ in file)
    rows = dict(writers.read_lines(path))
    for number in range(1, count + 1):
        row = rows.get(number, {})
        field = f"config.{row.get('field')}"
        if not (
            row.keys() >= {"step", "old", "new", "time"}
            and isinstance(row["step"], int)
            and field.startswith(CHANGEABLE)
            and field.count(".") == 2
        ):
            raise ConfigError(
                f"{path}, line {number} is damaged, or is not a change that --change makes; restore a copy, or move"
                " the file away and give --change for what differs from the beginning of the run"
            )
    return list(rows.values())


def as_changed(config, workdir: str):
    """A copy of a config in which the values that the run began with are replaced by those of its history."""
    config, began, now = config.copy_and_resolve_references(), {}, {}
    for change in history(workdir):
        began.setdefault(change["field"], change["old"])
        now[change["field"]] = change["new"]
    for field, new in now.items():
        if _value(config, field) == began[field]:
            _set(config, field, new)
    return config


def _value(config, field: str) -> Any:
    """The value of a field, or its default."""
    value = config_lib.fields(config).get(field, config_lib.MISSING)
    return _or_default(f"config.{field}", value, config)


def _set(config, field: str, value: Any) -> None:
    section, _, name = field.rpartition(".")
    with config[section].ignore_type(), config[section].unlocked():
        config[section][name] = value


def with_changes(config, workdir: str, change: Sequence[str]) -> tuple[Any, list[Changed]]:
    """A config with the changes of a run's history and those of --change, and the new ones among them.

    Raises:
      ConfigError: a field that there is not (with the nearest), that must not change, or a value of another type; or
        no run that could change.
    """
    config = as_changed(config, workdir)
    fields = [part for part in change if part != "data"]
    if not fields:
        return config, []
    if not os.path.isdir(os.path.join(workdir, "checkpoints")):
        raise ConfigError(
            f"--change={','.join(fields)}: {workdir} has no checkpoint to continue from; for a new run write"
            f" --config.{fields[0]}"
        )
    saved = as_changed(config_lib.load(os.path.join(workdir, "config.json")), workdir)
    for part in fields:
        field, equals, text = part.partition("=")
        if not equals:
            raise ConfigError(
                f"--change={part}: write data, or FIELD=VALUE such as optimizer.learning_rate=1e-4"
                f"{nearest(part, ['data'])}"
            )
        if not f"config.{field}".startswith(CHANGEABLE):
            known = [
                name
                for name in config_lib.fields(config)
                if f"config.{name}".startswith(CHANGEABLE)
            ]
            raise ConfigError(
                f"--change={part}: {field} cannot change in a run{nearest(field, known)} (the fields of optimizer"
                " and step, training.batch_size and training.num_steps can)"
            )
        with _named_change(part):
            config_lib.override(config, field, text, readers_of)
    names = dict.fromkeys(part.partition("=")[0] for part in fields)
    pairs = [Changed(name, _value(saved, name), _value(config, name)) for name in names]
    return config, [change for change in pairs if change.old != change.new]


@contextlib.contextmanager
def _named_change(part: str):
    try:
        yield
    except ConfigError as error:
        line = str(error).replace("--config.", "--change=").replace("config.", "")
        raise ConfigError(f"--change={part}: {line}") from error


def record(workdir: str, step: int, changes: Sequence[Changed]) -> None:
    """Adds changes to the history of a run."""
    now, lines = time.strftime("%Y-%m-%d %H:%M:%S"), history(workdir)
    lines += [{"step": step, **change._asdict(), "time": now} for change in changes]
    if changes:
        text = "".join(map(writers.to_line, lines))
        writers.save_text(os.path.join(workdir, HISTORY), text)


def describe(workdir: str) -> list[str]:
    """The history of a run in words."""
    return [
        f"changed at step {line['step']:,}: {line['field']} from {line['old']} to {line['new']}"
        for line in history(workdir)
    ]


def warn_of_decay(config, saved, say: Callable) -> None:
    """Says that another length of the run changes the learning rate at once."""
    num_steps = _value(saved, "training.num_steps")
    if _value(config, "optimizer.decay") != "none" and num_steps != config.training.num_steps:
        say(
            "WARNING: num_steps has changed, and with it the end of the cosine decay: the learning rate jumps here"
        )


def log_every(saved) -> int:
    """The steps between two lines of metrics.jsonl, by the saved config of a run."""
    steps = _value(saved, "training.log_every")
    return steps if isinstance(steps, int) else Length.log_every


def first_state(config, method, tx, key, say: Callable) -> step.TrainState:
    """The state of a new run: with the EMA weights of config.init_from, or random ones.

    Raises:
      ConfigError, CheckpointError, RunError: init_from is not a run with this network; one line.
    """
    source = config.get("init_from")
    if not source:
        return step.init_state(method, tx, key)
    with options.errors_at("config.init_from"):
        run = runs.load(source, method=method)
    say(f"the first weights are those of {run.workdir} after {run.step:,} steps")
    for field, (theirs, ours) in config_lib.differences(run.config, config).items():
        if field in ("config.diffusion.prediction", "config.schedule.name"):
            say(
                f"WARNING: they were trained with {field} {_shown(theirs)}, and this run has {_shown(ours)}"
            )
    return step.state_of(method, tx, jax.tree.map(jnp.asarray, run.params))


def restore(workdir: str, config, method, key) -> tuple[Any, int] | None:
    """The last checkpoint of a run as a state for the optimizer of a config, and its step; None if there is none.

    If the optimizer has changed since, the parts of its state that both have, such as Adam's moments, are kept.

    Raises:
      CheckpointError: as `checkpoints.restore`.
    """
    directory, mistake = os.path.join(workdir, "checkpoints"), None
    saved = config_lib.load(os.path.join(workdir, "config.json"))
    earlier = [line["old"] for line in history(workdir) if line["field"] == "optimizer.name"]
    names = [_value(one, "optimizer.name") for one in (config, saved)]
    for name in dict.fromkeys([*names, *reversed(earlier)]):
        other = config.copy_and_resolve_references()
        if name != names[0]:
            _set(other, "optimizer.name", name)
            _set(other, "optimizer.weight_decay", 0.0)  # adam has none
        init = functools.partial(step.init_state, method, step.optimizer_of(other)[0])
        try:
            found = checkpoints.restore(directory, jax.eval_shape(init, key))
        except checkpoints.CheckpointError as error:
            mistake = mistake or error
            continue
        if found is None or name == names[0]:
            return found
        state, number = found
        parts = {type(part): part for part in state.opt_state}
        fresh = step.optimizer_of(config)[0].init(state.params)
        opt_state = tuple(parts.get(type(part), part) for part in fresh)
        return state.replace(opt_state=opt_state), number
    raise mistake


# ---- configs of older versions ---------------------------------------------------------------------


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
