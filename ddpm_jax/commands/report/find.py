"""Everything that a run directory holds, except the parameters."""

from __future__ import annotations

import os
import re
import shlex
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ddpm_jax import data
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import run_data, runs, writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.method import from_config
from ddpm_jax.options import ConfigError
from ddpm_jax.process.schedules import Schedule


class Picture(NamedTuple):
    """A picture in a run directory, with the settings that made it."""

    path: str
    kind: str  # the mode that wrote it, "sample", "trajectory", or "other" without a recipe
    recipe: dict
    numbers: dict[str, np.ndarray]  # small arrays of its .npz file


class Run(NamedTuple):
    """A run directory, without its parameters."""

    workdir: str  # as the user wrote it
    name: str
    config: ConfigDict
    chain: Schedule | None  # None if the Method has none, or cannot be imported here
    rows: list[dict]  # lines of metrics.jsonl, at least one
    log: str
    previews: list[tuple[int, str]]  # (step, path), in order
    pictures: list[Picture]
    results: dict[str, dict]  # {name: content} of the .json files in eval/
    class_names: tuple[str, ...]

    @property
    def num_timesteps(self) -> int:
        return 0 if self.chain is None else len(self.chain)

    def command(self, mode: str, *flags: str) -> str:
        """The command line of a mode on this run."""
        words = (f"--mode={mode}", f"--workdir={self.workdir}", *flags)
        return f"python -m ddpm_jax.main {shlex.join(words)}"

    def drawn_by(self, kind: str) -> list[Picture]:
        """The pictures of one kind."""
        return [picture for picture in self.pictures if picture.kind == kind]


def find(workdir: str, *, allow_code: bool = False) -> Run:
    """Reads a run directory.

    Raises:
      RunError, ConfigError: it is not a run directory, or nothing is logged yet.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise RunError(
            f"{workdir} is not a run directory: it has no config.json; train with this --workdir first, or"
            " check its spelling"
        )
    runs.refuse_links(workdir)
    config = config_lib.load(path)
    rows = writers.read_metrics(os.path.join(workdir, "metrics.jsonl"))
    if not rows:
        raise RunError(
            f"{workdir} has nothing in metrics.jsonl yet; the first line comes after"
            f" {config.training.get('log_every', 100)} steps of training"
        )
    previews, pictures, results = [], [], {}
    for path in _files(workdir, "samples", ".png"):
        step = re.fullmatch(r"step_(\d+)\.png", os.path.basename(path))
        if step:
            previews.append((int(step[1]), path))
        else:
            pictures.append(_picture(path))
    for path in _files(workdir, "eval", ".json"):
        try:
            result = writers.read_json(path)
        except ValueError:
            result = None
        name = os.path.basename(path)[:-5]
        if result is not None and _is_result(name, result):
            results[name] = result
        else:
            logging.warning("%s is damaged, or of another program, and left out", path)
    for path in _files(workdir, "eval", ".png"):
        drawn = results.get(os.path.basename(path)[:-4], {})
        if not {"curves", "rmse"} & drawn.keys():  # those are redrawn as charts
            pictures.append(Picture(path, "other", {}, {}))
    name = os.path.basename(os.path.abspath(workdir))
    log = _text(os.path.join(workdir, "log.txt"))
    class_names = tuple((run_data.saved_data(workdir) or {}).get("class_names", ()))
    chain = _chain(config, allow_code)
    return Run(workdir, name, config, chain, rows, log, previews, pictures, results, class_names)


def _is_result(name: str, result: dict) -> bool:
    """Whether a result of a command has its settings, and its curves, if it has some, are numbers and equally long."""
    if name.startswith("step_") and not {"recipe", "metrics"} & result.keys():
        return False
    curves = result.get("curves", result if "rmse" in result else {})
    if not isinstance(curves, dict):
        return False
    lists = [values for values in curves.values() if isinstance(values, list)]
    numbers = all(isinstance(x, int | float | None) for values in lists for x in values)
    return numbers and len(set(map(len, lists))) <= 1


def _chain(config, allow_code: bool) -> Schedule | None:
    """The Method's chain, which may differ from config.schedule."""
    if runs.foreign_modules(config) and not allow_code:
        return None
    try:
        return getattr(from_config(config), "schedule", None)
    except ConfigError:  # a Method of another checkout
        return None


def _files(workdir: str, folder: str, extension: str) -> list[str]:
    """The finished files of a folder with an extension, by name."""
    folder = os.path.join(workdir, folder)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = [n for n in names if n.endswith(extension) and not n.endswith(f".tmp{extension}")]
    return [os.path.join(folder, name) for name in names]


def _text(path: str) -> str:
    """The text of a file; empty if there is none."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _picture(path: str) -> Picture:
    """A picture of samples/, with the recipe and the small arrays of its .npz file."""
    root = path[:-4].removesuffix("_trajectory")
    try:
        with data.open_npz(f"{root}.npz") as arrays:  # reads members on use
            recipe = writers.parse_object(str(arrays["recipe"]))
            kind = recipe.get("mode") or ("progressive" if "x_0" in arrays else "sample")
            small = [k for k in arrays if k == "t" or k.startswith(("error_", "distance"))]
            numbers = {name: arrays[name] for name in small}
    except Exception:  # zipfile, zlib and NumPy each raise their own
        return Picture(path, "other", {}, {})
    return Picture(path, kind if root == path[:-4] else "trajectory", recipe, numbers)
