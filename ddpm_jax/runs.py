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
import numpy as np

from ddpm_jax import checkpoints, data, parallel, schedules, training, writers
from ddpm_jax import config as config_lib
from ddpm_jax.ddpm import Method, make_method

CLASSES_OF_DATA = -1  # config.model.num_classes: as many as the data have
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
    text = str(value)
    plain = re.fullmatch(r"[\w.,-]{1,24}", text)
    return text if plain else hashlib.sha256(text.encode()).hexdigest()[:8]


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
    return Run(workdir, config, method, params, step, weights)


def load_data(config, *, split: str = "train", **changes) -> data.Dataset:
    """The data of config.data, whose fields `changes` replaces; `flip` is the Method's business."""
    section = {key: value for key, value in config.data.items() if key != "flip"}
    return config_lib.call("config.data", data.load, section | changes, split=split)


def fill_in(config) -> data.Dataset | None:
    """Fills in what a config leaves to its data: an image_shape of None, num_classes of `CLASSES_OF_DATA`.

    Returns:
      the training split, if it had to be loaded.

    Raises:
      ConfigError: the data have no labels.
      DataError: as `data.load`.
    """
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


def map_images(run: Run, function: Callable, key, *examples, batch_size: int | None = None):
    """function(params, key, *examples) over all examples, some at a time, with a line of progress for each.

    Args:
      examples: arrays [N, …].
      batch_size: how many at a time; None for what suits the device.

    Returns:
      its tree of arrays, NumPy [N, …].
    """
    count = len(examples[0])
    batch_size = min(batch_size or parallel.examples_at_once(), count)
    mapped, params = parallel.map_examples(function), parallel.place(run.params)
    progress, parts = writers.Progress("image", count, 0, unit="images"), []
    for first in range(0, count, batch_size):
        rows = np.minimum(first + np.arange(batch_size), count - 1)  # one shape for all
        parts.append(mapped(params, key, *(np.asarray(values)[rows] for values in examples)))
        progress.done = min(first + batch_size, count)
        print(progress.line(), flush=True)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)


def check_classes(method: Method, dataset: data.Dataset) -> None:
    """Refuses data with other classes than the model knows.

    Raises:
      ConfigError: with the number that fits.
      DataError: labels outside, as of test images that tensorflow-datasets labels −1.
    """
    if method.num_classes and dataset.num_classes != method.num_classes:
        raise config_lib.ConfigError(
            f"config.model.num_classes is {method.num_classes}, but {dataset.name} has"
            f" {dataset.num_classes}; set it to that, or to 0 for a model without labels"
        )
    if method.num_classes and not (
        0 <= dataset.labels.min() <= dataset.labels.max() < method.num_classes
    ):
        raise data.DataError(
            f"{dataset.name}/{dataset.split} has labels {dataset.labels.min()} … {dataset.labels.max()},"
            f" and the model knows 0 … {method.num_classes - 1}; choose another split"
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
def in_progress(out: str, recipe: dict) -> Iterator[tuple[str, dict | None]]:
    """A folder OUT.partial/ for what is not finished, held for this process, and gone after a good end.

    Args:
      out: the .npz that will be written, with its recipe as the JSON string `recipe`.
      recipe: what moves the result. A folder or an .npz that is there already must have the same, but
        for where the run lies.

    Yields:
      the folder, and the arrays of an .npz that is there already, or None.

    Raises:
      RunError: they were made in another way.
      CheckpointError: another process is at it.
    """
    recipe = json.loads(json.dumps(recipe))  # as it will be read back

    def check(path, there):
        if not isinstance(there, dict) or there | {"workdir": ""} != recipe | {"workdir": ""}:
            raise RunError(f"{path} was made in another way; move it, or choose another --out")

    folder = f"{out}.partial"
    finished, recipe_path = None, os.path.join(folder, "recipe.json")
    if os.path.exists(out):
        finished = read_npz(out)
        check(out, json.loads(str(finished.pop("recipe", "null"))))
    if os.path.exists(recipe_path):
        try:
            with open(recipe_path, encoding="utf-8") as file:
                there = json.load(file)
        except ValueError:
            raise RunError(f"{recipe_path} cannot be read; delete {folder} and run again") from None
        check(folder, there)
    with checkpoints.lock(folder):
        writers.save_text(recipe_path, json.dumps(recipe))
        yield folder, finished
        shutil.rmtree(folder)


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
    if not os.path.exists(path):
        words = ["--mode=nll", f"--workdir={run.workdir}", "--variance=analytic", "--num_images=8"]
        words += [f"--weights={run.weights}"] if run.weights != "ema" else []
        words += [f"--steps={_spaced(options)}"] if "steps" in options else []
        words += [f"--{'' if options['clip_x0'] else 'no'}clip"] if "clip_x0" in options else []
        raise RunError(
            "variance 'analytic' needs the errors of this model on training images: measure them with"
            f" python -m ddpm_jax.main {shlex.join(words)}"
        )
    file = read_npz(path)
    there, recipe = json.loads(str(file.get("recipe", "{}"))), run.recipe()
    if "curve_x_0_error" not in file or any(
        there.get(name) != recipe[name] for name in ("weights_sha256", "model_sha256")
    ):
        raise RunError(f"{path} is of another model; move it away and run again")
    errors, count = file["curve_x_0_error"], len(file["total"])
    digest = hashlib.sha256(errors.tobytes()).hexdigest()
    origin = {"split": "train", "num_images": count, "sha256": digest}
    return options | {"x_0_error": errors}, options | {"x_0_error": origin}
