"""Run directories as the commands after training see them, and results that an interruption does not lose."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ddpm_jax import checkpoints, data, diffusion, parallel, schedules, training, writers
from ddpm_jax import config as config_lib
from ddpm_jax.ddpm import Method, all_options, make_method

CHOSEN = "by a fixed permutation"  # how recipes call `data.choose`
CLASSES_OF_DATA = -1  # config.model.num_classes: as many as the data have
EMA_SHARE = 0.02  # share of the random initial weights in the average that is worth a warning
RESULTS = ("eval", "samples")  # folders in a run directory that commands write to
NAME_LIMIT = 180  # of a file's name, which has 255 with all that is put behind


class RunError(RuntimeError):
    """A run cannot give what is asked of it: one line with the reason and what to do."""


class Run(NamedTuple):
    """What a run directory holds."""

    workdir: str
    config: Any
    method: Method
    params: Any  # on the host
    step: int
    weights: str  # "ema" or "raw"

    def recipe(self) -> dict:
        """Where the parameters come from, and digests of them and of the model that they belong to."""
        weights = hashlib.sha256()
        for leaf in jax.tree.leaves(self.params):
            weights.update(np.ascontiguousarray(leaf))
        settings = ("training", "step", "optimizer", "preview", "data", "seed")
        config = json.loads(config_lib.to_json(self.config))
        model = {name: value for name, value in config.items() if name not in settings}
        return {
            "workdir": self.workdir,
            "step": self.step,
            "weights": self.weights,
            "weights_sha256": weights.hexdigest(),
            "model_sha256": hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest(),
        }

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that it was trained with, by their numbers; empty if not saved."""
        return tuple((saved_data(self.workdir) or {}).get("class_names", ()))

    def name(self, *parts: str, **options) -> str:
        """A file name that says what moves a result: step, weights, the parts and the options."""
        words = [f"step_{self.step:08d}", self.weights, *parts]
        words += [f"{key}_{_short(value)}" for key, value in sorted(given(options).items())]
        name = "_".join(words)
        if len(name) <= NAME_LIMIT:
            return name
        return f"{name[:NAME_LIMIT]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def given(options: dict) -> dict:
    """The options that are not None, with `steps` always as text: 5 and "5" and lists mean the same."""
    options = {name: value for name, value in options.items() if value is not None}
    if "steps" in options and not isinstance(options["steps"], str):
        options["steps"] = str(np.asarray(options["steps"]).tolist())
    if "steps" in options:
        options["steps"] = options["steps"].replace(" ", "")
    return options


def _short(value) -> str:
    """A value as a part of a file name: 250-500-750 for a list, the last part of a path."""
    text = str(value)
    listed = "-".join(text.strip("[]()").replace(" ", "").split(","))
    if isinstance(value, str) and text.startswith("["):  # times themselves, not numbers of steps
        listed = f"t{listed}"
    if re.fullmatch(r"[\w.-]{1,24}", listed):
        return listed
    last = re.sub(r"[^\w.-]", "", os.path.basename(text.rstrip("/")).partition(".")[0])
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{last[:24]}-{digest}" if last and os.sep in text else digest


def load(workdir: str, weights: str = "ema") -> Run:
    """The last checkpoint of a run directory, whose config is the truth.

    Args:
      weights: "ema" or "raw".

    Raises:
      ConfigError, CheckpointError, RunError: no run there, no checkpoint yet, or none to be read.
    """
    workdir = os.path.abspath(config_lib.path(workdir))
    config = config_lib.load(os.path.join(workdir, "config.json"))
    method = make_method(config)
    tx, _ = training.optimizer_of(config)
    template = jax.eval_shape(lambda key: training.init_state(method, tx, key), jax.random.key(0))
    restored = checkpoints.restore(os.path.join(workdir, "checkpoints"), template)
    if restored is None:
        raise RunError(f"{workdir} has no checkpoint yet; train first, or wait for one")
    state, step = restored
    params = {"ema": state.ema_params, "raw": state.params}[weights]
    if weights == "ema" and (warning := ema_warning(config, step)):
        print(f"WARNING: {warning}", flush=True)
    return Run(workdir, config, method, params, step, weights)


def ema_warning(config, step: int) -> str:
    """One line if the average of the parameters is still mostly what it began with; empty if not."""
    decay, warmup = config.step.get("ema_decay", 0.9999), config.step.get("ema_warmup", False)
    share = training.initial_share(step, ema_decay=decay, ema_warmup=warmup)
    if share < EMA_SHARE:
        return ""
    return (
        f"after {step:,} steps with ema_decay {decay} the EMA weights are still {100 * share:.0f} % the"
        " random ones that training began with: use --weights=raw, train longer, or train with"
        " --config.step.ema_warmup=True or a smaller --config.step.ema_decay"
    )


# ---- the data of a run -----------------------------------------------------------------------------


def load_data(config, *, split: str = "train", **changes) -> data.Dataset:
    """The data of config.data, whose fields `changes` replaces; `flip` is the Method's business."""
    section = {key: value for key, value in config.data.items() if key != "flip"}
    return config_lib.call("config.data", data.load, section | changes, split=split)


def data_of(run: Run, split: str, data_dir: str | None = None) -> data.Dataset:
    """A split of the data that a run was trained on.

    Args:
      data_dir: where the data are, if not where the config says: the folder or file itself for
        image_folder:PATH and npz:PATH, what data.data_dir names for all others.

    Raises:
      DataError: they are not there, or are not those of the run.
    """
    changes, name = {"image_shape": run.method.image_shape}, run.config.data.name
    if data_dir is not None:
        changes |= moved(name, data_dir)
    elif (kind_and_path := name.partition(":"))[0] in data.WITH_PATH:
        path = config_lib.path(kind_and_path[2])
        if not os.path.isabs(path):  # saved by an earlier version
            place = os.path.abspath(path)
            print(
                f"WARNING: the run names its data {path}, taken as {place}; else --data_dir",
                flush=True,
            )
    dataset = as_numbered(run.workdir, load_data(run.config, split=split, **changes))
    for line in check_data(run.workdir, dataset):
        logging.warning(line)
    say_left_out(dataset)
    return dataset


def load_images(run: Run, path: str) -> data.Dataset:
    """Images from elsewhere, a folder of pictures or an .npz, as large as those of a run.

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
    """Prints what was not read of the files of a data set."""
    for line in dataset.left_out:
        print(f"{dataset.name}/{dataset.split}, left out: {line}", flush=True)


def as_numbered(workdir: str, dataset: data.Dataset) -> data.Dataset:
    """A data set with the numbers that its classes have in a run.

    A run that is older than data.json numbered folders in the order of text, 10 before 2.
    """
    saved = saved_data(workdir)
    names = sorted(dataset.class_names) if saved is None else saved.get("class_names", ())
    if tuple(names) == dataset.class_names or set(names) != set(dataset.class_names):
        return dataset
    result = data.renumbered(dataset, names)
    print(f"classes have the numbers that the run began with: {class_list(result)}", flush=True)
    return result


def moved(name: str, data_dir: str) -> dict:
    """The fields of config.data that say that the data set `name` is at `data_dir`."""
    kind, colon, path = name.partition(":")
    if not colon or kind not in data.WITH_PATH:
        return {"data_dir": data_dir}
    place = config_lib.path(data_dir)
    if kind == "npz" and os.path.isdir(place):
        place = os.path.join(place, os.path.basename(path))
    return {"name": f"{kind}:{place}"}


def with_absolute_paths(config):
    """A copy of a config whose data are named by absolute paths: they stay the same from any folder."""
    config = config.copy_and_resolve_references()
    kind, colon, path = config.data.name.partition(":")
    if colon and path and kind in data.WITH_PATH:
        config.data.name = f"{kind}:{os.path.abspath(config_lib.path(path))}"
    if "data_dir" in config.data:
        config.data.data_dir = os.path.abspath(config_lib.path(config.data.data_dir))
    return config


def save_data(workdir: str, dataset: data.Dataset) -> None:
    """Writes data.json: what identifies the training data of a run, wherever they lie."""
    writers.save_json(os.path.join(workdir, "data.json"), _identity(dataset))


def saved_data(workdir: str) -> dict | None:
    """What `save_data` wrote; None for a run that is older than that."""
    try:
        with open(os.path.join(workdir, "data.json"), encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        path = os.path.join(workdir, "data.json")
        raise RunError(
            f"{path} cannot be read ({error}); delete it if the data are the same"
        ) from None
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
    """Compares a data set with the one that a run began with; of other splits, the classes alone.

    Args:
      may_change: the number of images and their classes may differ.

    Returns:
      lines for the log on what differs.

    Raises:
      DataError: it is another data set.
    """
    saved = saved_data(workdir)
    if saved is None:
        return []
    training_split, there = dataset.split == "train", _identity(dataset)
    fields = ["image_shape", "num_classes", "class_names", *(["count"] if training_split else [])]
    different = [
        f"{field} was {_brief(saved.get(field))} and is {_brief(there[field])}"
        for field in fields
        if saved.get(field) != there[field]
    ]
    if different and not may_change:
        raise data.DataError(
            f"{dataset.name}/{dataset.split} is not the data that {workdir} was trained on:"
            f" {'; '.join(different)}. Give the place of those, by --data_dir or, to train, by"
            " --config.data.name; or train on these by --change=data"
        )
    if different:
        return [f"the data have changed: {'; '.join(different)}"]
    if training_split and saved.get("fingerprint") != there["fingerprint"]:
        return [
            f"{dataset.name} differs in names, sizes or pixels from the data that {workdir} was trained"
            " on; their number, shape and classes are the same"
        ]
    return []


def _brief(value) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def class_list(dataset: data.Dataset) -> str:
    """The number and name of each class in one line, of at most fifty of them."""
    names = [f"{number} {name}" for number, name in enumerate(dataset.class_names)]
    return ", ".join(names[:50]) + (f", … {names[-1]}" if len(names) > 50 else "")


def class_numbers(run: Run, labels: str) -> str:
    """Labels as a user writes them, such as "cat,dog", with the names of classes replaced by their numbers.

    Where the names are numbers themselves, as of the folders 1, 2 and 3, the names count.
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
                f"--labels={labels}: there is no class {part!r}{config_lib.nearest(part, names)} (the model"
                f" has {_brief(list(names))})"
            )
    chosen = [number[p] if p in number and (all_names or not p.isdecimal()) else p for p in parts]
    known = [int(p) for p in chosen if int(p) < len(names)]
    print(f"classes: {', '.join(f'{n} {names[n]}' for n in known)}", flush=True)
    return ",".join(chosen)


def fill_in(config) -> data.Dataset | None:
    """Fills in what a config leaves to its data: an image_shape of None, num_classes of `CLASSES_OF_DATA`; and
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
            raise config_lib.ConfigError(
                f"config.model.num_classes is {CLASSES_OF_DATA}, for those of the data, but {dataset.name}"
                " has no labels; set it to 0"
            )
        config.model.num_classes = dataset.num_classes
    return dataset


class Drawn(NamedTuple):
    """Images as they are saved."""

    images: jax.Array  # uint8 [B, H, W, C]
    finite: jax.Array  # bool [B], whether all its values were numbers before they were rounded


def drawn(x) -> Drawn:
    """What a mapped function returns for images x [B, H, W, C] in [−1, 1] or beyond."""
    return Drawn(diffusion.to_uint8(x), jnp.all(jnp.isfinite(x), axis=(1, 2, 3)))


def check_finite(finite: np.ndarray, options: dict) -> None:
    """Refuses images that are not finite: rounded, they would be saved as black ones.

    Args:
      finite: bool [N].
      options: that they were made with, for the advice.

    Raises:
      RunError: with how many they are, and the options that are likely at fault.
    """
    if np.all(finite):
        return
    suspects = []
    if (options.get("guidance") or 1.0) not in (0.0, 1.0):
        suspects.append(f"a --guidance nearer to 1 than {options['guidance']}")
    if options.get("clip_x0") is False:
        suspects.append("--clip")
    if options.get("sampler") in ("dpm_solver", "heun") or options.get("eta") == "hat":
        suspects.append("--sampler=ddim")
    suspects.append("the other weights (--weights), or an earlier checkpoint: see loss.png")
    raise RunError(
        f"{np.sum(~finite)} of {len(finite)} images are not finite (NaN or infinite), so they are not"
        f" saved; try {', '.join(suspects)}"
    )


def compiled(function: Callable, progress: writers.Progress, params, key, *examples) -> Callable:
    """`parallel.map_examples` of a function, compiled for examples of these shapes before the clock runs."""
    mapped = parallel.map_examples(function)
    with progress.pause():
        print("compiling", flush=True)
        mapped.compile(params, key, *examples)
    return mapped


def map_images(
    run: Run,
    function: Callable,
    key,
    *examples,
    batch_size: int | None = None,
    options: dict | None = None,
):
    """function(params, key, *examples) over all examples, some at a time, with lines of progress.

    Args:
      function: what it returns as `Drawn` is refused if it is not finite.
      examples: arrays [N, …].
      batch_size: how many at a time; None for what suits the device.
      options: that the images are made with, for that refusal.

    Returns:
      its tree of arrays, NumPy [N, …], with the images alone of each `Drawn`.
    """
    count = len(examples[0])
    batch_size = min(batch_size or parallel.examples_at_once(), count)
    progress, parts = writers.Progress("image", count, 0, unit="images"), []
    params, mapped = parallel.place(run.params), None
    for first in range(0, count, batch_size):
        rows = np.minimum(first + np.arange(batch_size), count - 1)  # one shape for all
        batch = [np.asarray(values)[rows] for values in examples]
        mapped = mapped or compiled(function, progress, params, key, *batch)
        parts.append(mapped(params, key, *batch))
        progress.done = min(first + batch_size, count)
        progress.show()

    def images(node):
        if isinstance(node, Drawn):
            check_finite(node.finite, options or {})
            return node.images
        return node

    whole = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)
    return jax.tree.map(images, whole, is_leaf=lambda node: isinstance(node, Drawn))


def check_classes(method: Method, dataset: data.Dataset) -> None:
    """Refuses data with other classes than the model knows, or without labels where it needs them.

    Raises:
      ConfigError: with the number that fits.
      DataError: images without a label, as of a test split that has none.
    """
    if method.num_classes and dataset.num_classes != method.num_classes:
        raise config_lib.ConfigError(
            f"config.model.num_classes is {method.num_classes}, but {dataset.name} has"
            f" {dataset.num_classes}; set it to that, or to 0 for a model without labels"
        )
    known = (dataset.labels >= 0) & (dataset.labels < method.num_classes)
    if method.num_classes and not known.all():
        raise data.DataError(
            f"{dataset.name}/{dataset.split}: {np.sum(~known)} of {len(dataset)} images have no label that"
            f" the model knows (0 … {method.num_classes - 1}), and a model with classes needs the label of"
            " each; put the images into folders named like those of train, or choose a split that has"
            " labels, such as --split=train"
        )


def out_path(out: str, extension: str, workdir: str | None = None) -> str:
    """The absolute path of a file that is to be written.

    Args:
      out: as a user writes it.
      workdir: a run directory, whose folders of results are made when they are needed.

    Raises:
      RunError: another extension, or a folder that does not exist.
    """
    path = os.path.abspath(config_lib.path(out))
    if not path.endswith(extension):
        raise RunError(f"--out must end in {extension}, got {out}")
    folder = os.path.dirname(path)
    made = [os.path.join(os.path.abspath(config_lib.path(workdir or "")), name) for name in RESULTS]
    if not os.path.isdir(folder) and not (workdir and folder in made):
        raise RunError(
            f"there is no folder {folder} to write {path} in; make it first, or choose another --out"
        )
    return path


def read_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz that this program wrote.

    Raises:
      RunError: there is none, or it cannot be opened or read.
    """
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise RunError(f"there is no file {path}") from None
    except (PermissionError, IsADirectoryError) as error:
        raise RunError(f"{path} cannot be opened: {error.strerror}") from None
    except (OSError, ValueError, TypeError, EOFError, zlib.error, zipfile.BadZipFile):
        line = f"{path} cannot be read as an .npz; move it away, or choose another --out"
        raise RunError(line) from None


@contextlib.contextmanager
def in_progress(
    out: str, recipe: dict, *, named: bool = True, check: Callable | None = None
) -> Iterator[tuple[str, dict | None]]:
    """A folder OUT.partial/ for what is not finished, held for this process, and gone after a good end.

    Args:
      out: the .npz that will be written, with its recipe as the JSON string `recipe`.
      recipe: the settings that affect the result. A folder or an .npz that is there already must have the
        same, but for where the run lies.
      named: the user has named `out`: what is there by another recipe is refused. Otherwise it is renamed
        to OUT.replaced, and the result is made anew.
      check: arrays of an .npz that is there, finished or as OUT.partial/tally.npz -> whether they are
        still right.

    Yields:
      the folder, and the arrays of an .npz that is there already, or None.

    Raises:
      RunError: they were made in another way.
      CheckpointError: another process is at it.
    """
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    folder = f"{out}.partial"

    def matches(there) -> bool:
        return isinstance(there, dict) and _without_places(there) == _without_places(recipe)

    def set_aside(path):
        line = f"{path} was made with other settings or from other images"
        if named:
            raise RunError(f"{line}; move it, or choose another --out")
        aside = free_name(f"{path}.replaced")
        print(f"{line}: it is now {aside}", flush=True)
        if path == out:
            os.rename(out, aside)
            return
        os.mkdir(aside)  # the folder itself holds the lock
        for name in set(os.listdir(folder)) - {checkpoints.LOCK}:
            os.rename(os.path.join(folder, name), os.path.join(aside, name))

    recipe_path = os.path.join(folder, "recipe.json")
    with checkpoints.lock(folder):  # before a look at what is there: another process may be at it
        try:
            finished = None
            if os.path.exists(out):
                finished = read_npz(out)
                there = json.loads(str(finished.pop("recipe", "null")))
                if not matches(there) or (check and not check(finished)):
                    set_aside(out)
                    finished = None
            if os.path.exists(recipe_path):
                try:
                    with open(recipe_path, encoding="utf-8") as file:
                        there = json.load(file)
                except ValueError:
                    line = f"{recipe_path} cannot be read; delete {folder} and run again"
                    raise RunError(line) from None
                tally = os.path.join(folder, "tally.npz")
                right = not check or not os.path.exists(tally) or check(read_npz(tally))
                if not matches(there) or not right:
                    set_aside(folder)
            writers.save_text(recipe_path, json.dumps(recipe))
        finally:
            if os.listdir(folder) == [checkpoints.LOCK]:  # refused, and nothing was there
                shutil.rmtree(folder)
        yield folder, finished
        shutil.rmtree(folder)


def _without_places(recipe: dict) -> dict:
    """A recipe without what may change while it stays the same: where the run and the data lie."""
    result = {}
    for name, value in recipe.items():
        kind = value.partition(":")[0] if isinstance(value, str) else None
        if isinstance(value, dict):
            value = _without_places(value)
        elif kind in data.WITH_PATH:
            value = kind
        result[name] = "" if name == "workdir" else value
    return result


def free_name(path: str) -> str:
    """The path, or PATH2, PATH3, … if it is taken."""
    names = (f"{path}{n}" for n in ("", *range(2, 10_000)))
    return next(name for name in names if not os.path.exists(name))


class GrowingFile:
    """Rows that are kept while further ones are made: raw bytes in one file, of which after a kill all that
    is whole is good.

    Attributes:
      count: how many rows there are.
    """

    def __init__(self, path: str, row_shape: tuple[int, ...], dtype):
        self._path, self._shape, self._dtype = path, tuple(row_shape), np.dtype(dtype)
        size = math.prod(row_shape) * self._dtype.itemsize
        with open(path, "ab") as file:
            self.count = file.tell() // size
            file.truncate(self.count * size)

    def append(self, rows: np.ndarray) -> None:
        with open(self._path, "ab") as file:
            file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self.count += len(rows)

    def rows(self) -> np.ndarray:
        """All of them, [count, …]."""
        return np.fromfile(self._path, self._dtype).reshape(-1, *self._shape)


# ---- what was measured of a model, for its analytic variance ----------------------------------------


def errors_path(run: Run, options: dict) -> str:
    """Where `evaluate` keeps the errors that the analytic variance for these options rests on."""
    kept = {"steps": _spaced(options), "clip_x0": options.get("clip_x0")}
    return os.path.join(run.workdir, "eval", f"{run.name('x_0_error', **kept)}.npz")


def _spaced(options: dict) -> str | None:
    """The steps with their spacing in one word: errors of one chain are not those of another."""
    prefix = schedules.SPACINGS.get(options.get("spacing"), "")
    return f"{prefix}{options['steps']}" if "steps" in options else None


def with_errors(run: Run, options: dict) -> tuple[dict, dict]:
    """Adds what `variance="analytic"` needs to the options of a `make_sample` or `make_bound`.

    Returns:
      the options; and what a recipe says of them, the errors replaced by their origin.

    Raises:
      RunError: nothing has been measured yet, with the command that does; or of another model.
    """
    if options.get("variance") != "analytic":
        return options, options
    if options.get("guidance", 1.0) != 1 or options.get("clip_x0") == "dynamic":
        raise RunError(
            "variance 'analytic' is measured of the model as it is: leave out --guidance and --clip=dynamic,"
            " or choose fixed_small or fixed_large"
        )
    path = errors_path(run, options)
    words = ["--mode=nll", f"--workdir={run.workdir}", "--variance=analytic", "--num_images=8"]
    words += [f"--weights={run.weights}"] if run.weights != "ema" else []
    words += [f"--steps={_spaced(options)}"] if "steps" in options else []
    words += [f"--{'' if options['clip_x0'] else 'no'}clip"] if "clip_x0" in options else []
    command = f"python -m ddpm_jax.main {shlex.join(words)}"
    if not os.path.exists(path):
        raise RunError(
            "variance 'analytic' needs the errors of this model on training images: measure them with"
            f" {command}"
        )
    file = read_npz(path)
    there, wanted = json.loads(str(file.get("recipe", "{}"))), run.recipe()
    kept = {"steps": _spaced(options)} | {k: v for k, v in options.items() if k == "clip_x0"}
    wanted |= {k: v for k, v in all_options(run.method.make_bound, kept).items() if k in kept}
    wanted |= {"chosen": CHOSEN}
    names = ("weights_sha256", "model_sha256", "chosen", *kept)
    if "curve_x_0_error" not in file or any(there.get(name) != wanted[name] for name in names):
        raise RunError(
            f"{path} was measured with another model, with other steps or, by an earlier version, on the"
            f" first images of the files; measure it anew with {command}"
        )
    errors, count = file["curve_x_0_error"], len(file["total"])
    digest = hashlib.sha256(errors.tobytes()).hexdigest()
    origin = {"split": "train", "num_images": count, "sha256": digest}
    return options | {"x_0_error": errors}, options | {"x_0_error": origin}
