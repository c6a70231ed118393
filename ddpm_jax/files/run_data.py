"""The data of a run: found again after a move, and compared with those that it was trained on."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Any

import numpy as np
from absl import logging

from ddpm_jax import augmentation, data, options
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import writers
from ddpm_jax.method import Method
from ddpm_jax.names import find, nearest
from ddpm_jax.options import ConfigError

NO_DATA = "none"  # config.data.name of pretrained weights that came without data
OF_THE_USER = (
    "training.mirror",
    "training.logger",
    "data.data_dir",
    "init_from",
)  # never taken from a run
CLASSES_OF_DATA = -1  # config.model.num_classes: as many as the data have


class RunError(RuntimeError):
    """A request that a run cannot fulfil; one line with the reason and what to do."""


@contextlib.contextmanager
def advice_on_writing(workdir: str):
    """Adds advice to the error of a run directory that is read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise RunError(
            f"{error}; if the run directory {workdir} cannot be written, give --out=FILE in a folder that"
            " can, or a copy of the run as --workdir"
        ) from error


def load_data(config, *, split: str = "train", **changes) -> data.Dataset:
    """The data of config.data, with some fields replaced by `changes`; flip and shift are used by the Method."""
    if changes.get("name", config.data.name) == NO_DATA:
        raise ConfigError(
            "the data of these pretrained weights are not known: give --data_dir=PATH, a folder of pictures or an"
            " .npz, or for training --config.data.name"
        )
    section = {key: value for key, value in config.data.items() if key not in augmentation.FIELDS}
    return options.build(data.load, section | changes, "config.data", split=split)


def data_of(run: Any, split: str, data_dir: str | None = None) -> data.Dataset:
    """A split of the data that a run was trained on.

    Args:
      data_dir: where the data are now, if they have moved: the folder or file itself for image_folder:PATH and
        npz:PATH, otherwise as config.data.data_dir.

    Raises:
      DataError: the data are missing, or are not those of the run.
    """
    changes, name = {"image_shape": run.method.image_shape}, run.config.data.name
    if data_dir is not None:
        changes |= moved(name, data_dir)
    elif (kind_and_path := name.partition(":"))[0] in data.WITH_PATH:
        path = config_lib.path(kind_and_path[2])
        if not os.path.isabs(path):  # saved by an earlier version
            print(
                f"WARNING: the run names its data by the relative path {path}, read as"
                f" {os.path.abspath(path)}; if they are elsewhere, give --data_dir",
                flush=True,
            )
    dataset = as_numbered(run.workdir, load_data(run.config, split=split, **changes))
    for line in check_data(run.workdir, dataset):
        logging.warning(line)
    say_left_out(dataset)
    return dataset


def load_images(run: Any, path: str) -> data.Dataset:
    """Other images, from a folder of pictures or an .npz, at the size of the run's images.

    Raises:
      DataError: as `data.load`.
    """
    kind, path = "npz" if path.endswith(".npz") else "image_folder", config_lib.path(path)
    if not (os.path.isfile(path) if kind == "npz" else os.path.isdir(path)):
        what = "file" if kind == "npz" else "folder"
        raise data.DataError(f"--images: there is no {what} {path}")
    background = run.config.data.get("background", "white")
    shape = run.method.image_shape
    dataset = data.load(f"{kind}:{path}", image_shape=shape, background=background)
    say_left_out(dataset)
    return data.renumbered(dataset, run.class_names) if run.class_names else dataset


def say_left_out(dataset: data.Dataset) -> None:
    """Prints which files of a data set were left out."""
    for line in dataset.left_out:
        print(f"{dataset.name}/{dataset.split}, left out: {line}", flush=True)


def as_numbered(workdir: str, dataset: data.Dataset) -> data.Dataset:
    """A data set with its classes numbered as in the run.

    Runs without data.json numbered folders in the order of text, 10 before 2.
    """
    saved = saved_data(workdir)
    names = sorted(dataset.class_names) if saved is None else saved.get("class_names", ())
    if tuple(names) == dataset.class_names or set(names) != set(dataset.class_names):
        return dataset
    result = data.renumbered(dataset, names)
    print(f"classes have the numbers that the run began with: {class_list(result)}", flush=True)
    return result


def moved(name: str, data_dir: str) -> dict:
    """The fields of config.data for the data set `name` at `data_dir`."""
    kind, colon, path = name.partition(":")
    if name == NO_DATA:
        kind, colon = "npz" if data_dir.endswith(".npz") else "image_folder", ":"
    if not colon or kind not in data.WITH_PATH:
        return {"data_dir": data_dir}
    new_path = config_lib.path(data_dir)
    if kind == "npz" and os.path.isdir(new_path):
        new_path = os.path.join(new_path, os.path.basename(path))
    return {"name": f"{kind}:{new_path}"}


def with_absolute_paths(config):
    """A copy of a config with absolute paths to its data, valid from any folder."""
    config = config.copy_and_resolve_references()
    kind, colon, path = str(config.data.name).partition(":")
    if colon and path and kind in data.WITH_PATH:
        config.data.name = f"{kind}:{os.path.abspath(config_lib.path(path))}"
    if config.data.get("data_dir") is not None:
        config.data.data_dir = os.path.abspath(config_lib.path(config.data.data_dir))
    return config


def planned(config, workdir: str) -> tuple[Any, list[str]]:
    """A copy of a config with absolute paths, in which its plan has filled in the open fields, those that are None.

    A plan is a function named in config.plan as module:NAME, whose other fields are its options. It sets fields of the
    config that is passed to it, and returns lines that say what it decided. A run that is continued keeps its values.

    Returns:
      the config without its section plan, and the lines.

    Raises:
      ConfigError, DataError: one line that says what to do.
    """
    config = with_absolute_paths(config)
    if "plan" not in config:
        return config, []
    workdir = config_lib.path(workdir)
    if workdir and os.path.isdir(os.path.join(workdir, "checkpoints")):
        saved = config_lib.load(os.path.join(workdir, "config.json"))
        return as_saved_where_open(config, saved), []
    section = dict(config.plan)
    with config.unlocked():
        del config.plan
    with options.errors_at("config.plan"):
        plan = find(section.pop("name", None), {}, "plan")
    return config, options.build(plan, section, "config.plan", config=config)


def as_saved_where_open(config, saved):
    """A copy of a config whose plan was carried out by a run: without the section plan, and with the saved values of fields
    that are None."""
    config = config.copy_and_resolve_references()
    if "plan" in config:
        with config.unlocked():
            del config.plan
        known = config_lib.fields(saved)
        for field, value in config_lib.fields(config).items():
            if value is None and field in known and not field.startswith(OF_THE_USER):
                config_lib.set_field(config, field, known[field])
    return config


def save_data(workdir: str, dataset: data.Dataset) -> None:
    """Writes data.json, which identifies the training data of a run independently of their path."""
    identity = _identity(dataset)
    identity[config_lib.DIGEST] = config_lib.digest(identity)
    writers.save_json(os.path.join(workdir, "data.json"), identity)


def saved_data(workdir: str) -> dict | None:
    """What `save_data` wrote; None for older runs.

    Raises:
      RunError: it cannot be read, or has changed since.
    """
    path = os.path.join(workdir, "data.json")
    try:
        found = writers.read_json(path)
        digest = found.pop(config_lib.DIGEST, None)  # older versions wrote none
        names = found.get("class_names", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names must be a list of texts")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); delete it if the data are the same"
        ) from None
    if digest not in (None, config_lib.digest(found)):
        raise RunError(
            f"{path} has changed since it was written; delete it if the data are the same"
        )
    return found


def _identity(dataset: data.Dataset) -> dict:
    return {
        "name": dataset.name,
        "count": len(dataset),
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "fingerprint": dataset.fingerprint(),
    }


def check_data(workdir: str, dataset: data.Dataset, *, may_change: bool = False) -> list[str]:
    """Compares a data set with the one that the run started with; for other splits, only the classes.

    Args:
      may_change: the number of images and their classes may differ.

    Returns:
      lines for the log on what differs.

    Raises:
      DataError: the data set differs.
    """
    saved = saved_data(workdir)
    if saved is None:
        return []
    training_split, current = dataset.split == "train", _identity(dataset)
    fields = ["image_shape", "num_classes", "class_names", *(["count"] if training_split else [])]
    different = [
        f"{field} was {_brief(saved.get(field))} and is {_brief(current[field])}"
        for field in fields
        if saved.get(field) != current[field]
    ]
    if different and not may_change:
        raise data.DataError(
            f"{dataset.name}/{dataset.split} is not the data that {workdir} was trained on:"
            f" {'; '.join(different)}. Give the path of the original data, by --data_dir or, to train, by"
            " --config.data.name; or continue on the new data with --change=data"
        )
    if different:
        return [f"the data have changed: {'; '.join(different)}"]
    if training_split and saved.get("fingerprint") != current["fingerprint"]:
        return [
            f"{dataset.name} differs in names, sizes or pixels from the data that {workdir} was trained"
            " on; their number, shape and classes are the same"
        ]
    return []


def _brief(value) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def class_list(dataset: data.Dataset) -> str:
    """The number and name of each class in one line, at most fifty of them."""
    names = [f"{number} {name}" for number, name in enumerate(dataset.class_names)]
    return ", ".join(names[:50]) + (f", … {names[-1]}" if len(names) > 50 else "")


def class_numbers(run: Any, labels: str) -> str:
    """Labels as a user writes them, such as "cat,dog", with the names of classes replaced by their numbers.

    If the names are numbers themselves, as for folders 1, 2 and 3, they are read as names.
    """
    names = run.class_names
    number = {name: str(i) for i, name in enumerate(names)}
    if not isinstance(labels, str) or not number or labels in ("cycle", "random"):
        return labels
    parts = [part.strip() for part in labels.split(",")]
    all_names = all(part in number for part in parts)
    for part in parts:
        if part not in number and not part.isdecimal():
            raise RunError(
                f"--labels={labels}: there is no class {part!r}{nearest(part, names)} (the model"
                f" has {_brief(list(names))})"
            )
    chosen = [number[p] if p in number and (all_names or not p.isdecimal()) else p for p in parts]
    known = [int(p) for p in chosen if int(p) < len(names)]
    print(f"classes: {', '.join(f'{n} {names[n]}' for n in known)}", flush=True)
    return ",".join(chosen)


def fill_in(config) -> data.Dataset | None:
    """Fills in the fields that a config leaves to its data: an image_shape of None, num_classes of `CLASSES_OF_DATA`; and
    the length of a list of betas.

    Returns:
      the training split, if it had to be loaded.

    Raises:
      ConfigError: the data have no labels.
      DataError: as `data.load`.
    """
    if config.get("schedule", {}).get("name") == "betas" and config.schedule.get("betas"):
        config.schedule.num_timesteps = len(config.schedule.betas)
    classes = config.get("model", {}).get("num_classes") == CLASSES_OF_DATA
    if config.data.image_shape is not None and not classes:
        return None
    dataset = load_data(config)
    config.data.image_shape = dataset.image_shape
    if classes:
        if not dataset.num_classes:
            raise ConfigError(
                f"config.model.num_classes is {CLASSES_OF_DATA}, the number of classes of the data, but"
                f" {dataset.name} has no labels; set it to 0"
            )
        config.model.num_classes = dataset.num_classes
    return dataset


def check_classes(method: Method, dataset: data.Dataset) -> None:
    """Checks that the classes and labels of the data fit the model.

    Raises:
      ConfigError: another number of classes; says which one fits.
      DataError: images without labels, as in an unlabelled test split.
    """
    if method.num_classes and dataset.num_classes != method.num_classes:
        raise ConfigError(
            f"config.model.num_classes is {method.num_classes}, but {dataset.name} has"
            f" {dataset.num_classes}; set it to {dataset.num_classes}, or to 0 for a model without labels"
        )
    known = (dataset.labels >= 0) & (dataset.labels < method.num_classes)
    if method.num_classes and not known.all():
        raise data.DataError(
            f"{dataset.name}/{dataset.split}: {np.sum(~known)} of {len(dataset)} images have no label that"
            f" the model knows (0 … {method.num_classes - 1}), but a model with classes needs one for each"
            " image; put the images into folders named like those of train, or choose a split that has"
            " labels, such as --split=train"
        )
