"""Run directories as the commands after training see them, and results that an interruption does not lose."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import checkpoints, data, training, writers
from ddpm_jax import config as config_lib
from ddpm_jax.ddpm import Method, make_method


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
        """Where the parameters come from, and what they are."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.ascontiguousarray(leaf))
        return {
            "workdir": self.workdir,
            "step": self.step,
            "weights": self.weights,
            "weights_sha256": digest.hexdigest(),
        }

    def name(self, *parts: str, **options) -> str:
        """A file name that says what moves a result: step, weights, the parts and the options."""
        options = {key: value for key, value in sorted(options.items()) if value is not None}
        words = [f"step_{self.step:08d}", self.weights, *parts]
        words += [f"{key}_{_short(value)}" for key, value in options.items()]
        return "_".join(words)


def _short(value) -> str:
    text = str(value).replace(" ", "")  # a list, and the same list as text, are the same
    plain = re.fullmatch(r"[\w.,-]{1,24}", text)
    return text if plain else hashlib.sha256(text.encode()).hexdigest()[:8]


def load(workdir: str, weights: str = "ema") -> Run:
    """The last checkpoint of a run directory, whose config is the truth.

    Args:
      weights: "ema" or "raw".

    Raises:
      ConfigError, CheckpointError, RunError: no run there, no checkpoint yet, or none to be read.
    """
    workdir = os.path.abspath(workdir)
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


def check_classes(method: Method, dataset: data.Dataset) -> None:
    """Refuses data with other classes than the model knows.

    Raises:
      ConfigError: with the number that fits.
    """
    if method.num_classes and dataset.num_classes != method.num_classes:
        raise config_lib.ConfigError(
            f"config.model.num_classes is {method.num_classes}, but {dataset.name} has"
            f" {dataset.num_classes}; set it to that, or to 0 for a model without labels"
        )


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
    with checkpoints.lock(folder):
        finished, recipe_path = None, os.path.join(folder, "recipe.json")
        if os.path.exists(out):
            try:
                with np.load(out) as file:
                    finished = dict(file)
                    check(out, json.loads(str(finished.pop("recipe"))))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                check(out, None)  # not ours
        if os.path.exists(recipe_path):
            with open(recipe_path, encoding="utf-8") as file:
                check(folder, json.load(file))
        else:
            writers.save_text(recipe_path, json.dumps(recipe))
        yield folder, finished
        shutil.rmtree(folder)


# ---- what was measured of a model, for its analytic variance ----------------------------------------


def nll_path(run: Run, split: str, seed: int, **options) -> str:
    """Where `evaluate.nll` puts its .npz unless told otherwise."""
    name = run.name("nll", split, f"seed{seed}", **options)
    return os.path.join(run.workdir, "eval", f"{name}.npz")


def errors_path(run: Run, options: dict) -> str:
    """The evaluation on the training split that the analytic variance for these options rests on."""
    kept = {name: options.get(name) for name in ("steps", "clip_x0")}
    return nll_path(run, "train", 0, **kept)


def with_errors(run: Run, options: dict) -> tuple[dict, dict]:
    """Adds what `variance="analytic"` needs to the options of a `make_sample` or `make_bound`.

    Returns:
      the options; and what a recipe says of them, the errors replaced by their origin.

    Raises:
      RunError: nothing has been measured yet; with the command that does.
    """
    if options.get("variance") != "analytic":
        return options, options
    path = errors_path(run, options)
    if not os.path.exists(path):
        flags = [f"--mode=nll --split=train --num_images=256 --workdir={run.workdir}"]
        flags += [f"--weights={run.weights}"] if run.weights != "ema" else []
        flags += [f"--steps={options['steps']}"] if options.get("steps") is not None else []
        flags += ["--noclip"] if options.get("clip_x0") is False else []
        flags += ["--clip"] if options.get("clip_x0") is True else []
        raise RunError(
            f"variance 'analytic' needs the errors of this model on training images: measure them with"
            f" python -m ddpm_jax.main {' '.join(flags)}"
        )
    with np.load(path) as file:
        errors, count = file["curve_x_0_error"], len(file["total"])
    digest = hashlib.sha256(errors.tobytes()).hexdigest()
    origin = {"split": "train", "num_images": count, "sha256": digest}
    return options | {"x_0_error": errors}, options | {"x_0_error": origin}
