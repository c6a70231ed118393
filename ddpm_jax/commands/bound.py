"""The bound of a run on images, measured image by image; an interrupted measurement continues."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax import data, options, processes
from ddpm_jax.commands import analytic, shared
from ddpm_jax.commands.shared import Output
from ddpm_jax.ddpm import Bounding
from ddpm_jax.files import results, run_data, writers
from ddpm_jax.files.progress import Progress
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.names import full_name
from ddpm_jax.options import option
from ddpm_jax.process.schedules import Schedule
from ddpm_jax.stats import mean_and_error, plus_minus
from ddpm_jax.training import jobs, parallel
from ddpm_jax.training.step import make_keys

CURVE = "curve_"  # begins the names of means over images, arrays [S] in the .npz
DIGESTS = "images_sha256"  # names the digests of the images, uint8 [N, 16] in the .npz
INDEX = "index"  # names the positions of the images in the split, int64 [N] in the .npz
ERROR_IMAGES = 64  # number of training images for the analytic variance, a mean over their pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The images whose bound is measured, and the seed of the noise.

    The images are chosen by `data.choose`. If an earlier result has more images, all of them count. One x_t is drawn for
    each image and time.
    """

    split: str = option("test", "The split of the data, such as train or test.")
    num_images: int | None = option(None, "How many images to use. Default: all.", least=1)
    data_dir: str | None = option(None, shared.DATA_DIR_HELP)
    seed: int = option(0, shared.SEED_HELP, least=0)


class Evaluation(NamedTuple):
    """The bound of N images of a split."""

    path: str  # the .npz; the .json and the .png have the same name
    chain: Schedule
    recipe: dict
    scalars: dict[str, np.ndarray]  # total, L_T, L_0: float64 [N] in bits/dim
    curves: dict[str, np.ndarray]  # terms, x_0_error, eps_error: float64 [S], means over images

    @property
    def count(self) -> int:
        return len(self.scalars["total"])

    def summary(self) -> dict:
        """Means, standard errors over images, the curves and the recipe, for a .json."""
        result = {"num_images": self.count}
        for name, values in self.scalars.items():
            result[name], result[f"{name}_stderr"] = mean_and_error(values)
        curves = {name: values.tolist() for name, values in self.curves.items()}
        result |= {"recipe": self.recipe, "software": parallel.banner()}
        return result | {"curves": {"timesteps": self.chain.times.tolist(), **curves}}


def check_out(out: str | None, workdir: str) -> str | None:
    """The path of a result, by `results.out_path`; refuses to overwrite a file that is not a result."""
    if out is None:
        return None
    out = results.out_path(out, ".json", workdir)
    if os.path.exists(out):
        try:
            with open(out, encoding="utf-8") as file:
                ours = "recipe" in writers.parse_object(file.read())  # it may be damaged
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise RunError(f"{out} is not the result of an evaluation; choose another --out")
    return out


def bounded(run: Run):
    """The Method of a run, which must have a bound.

    Raises:
      RunError: it has none.
    """
    if hasattr(run.method, "bound"):
        return run.method
    name = run.config.method.partition(":")[0]
    package = importlib.util.find_spec(full_name(name)).submodule_search_locations is not None
    own = package and importlib.util.find_spec(f"{full_name(name)}.__main__")
    advice = f"; its own command is python -m {name} --workdir={run.workdir}" if own else ""
    raise RunError(
        f"{name} (config.method) has no method `bound`, which this command needs{advice}"
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """A measurement: the run, the images, and how it is computed."""

    run: Run
    measured: Measured
    output: Output

    def dataset(self, split: str | None = None) -> data.Dataset:
        """The split, after a check that it has enough images."""
        measured = self.measured
        count = measured.num_images if split is None else None
        dataset = run_data.data_of(self.run, split or measured.split, measured.data_dir)
        run_data.check_classes(self.run.method, dataset)
        if count is not None and count > len(dataset):
            raise RunError(
                f"{count} images requested, but {dataset.name}/{dataset.split} has {len(dataset)}; choose a smaller"
                " --num_images"
            )
        return dataset

    def key(self):
        with options.errors_at("evaluation"):
            return make_keys(self.measured.seed).evaluate

    def measure(self, bounding: Bounding, path: str | None) -> Evaluation:
        """Measures the bound of the images; `path` is the .json that the user has named, or None."""
        run, model, key = self.run, bounded(self.run), self.key()
        is_analytic = bounding.variance == "analytic"
        with options.errors_at("evaluation"):
            checked = dataclasses.replace(bounding, variance=None) if is_analytic else bounding
            model.bound_chain(checked)
        dataset = self.dataset()
        if is_analytic:
            self.measure_errors(bounding)
        named = path is not None
        if not named:
            parts = ("nll", self.measured.split, f"seed{self.measured.seed}")
            name = run.name(*parts, settings=options.changed(bounding))
            path = os.path.join(run.workdir, "eval", f"{name}.json")
        path = os.path.abspath(f"{path[:-5]}.npz")
        count = self.measured.num_images or len(dataset)
        return self._measure(dataset, count, bounding, path, key, self.measured.seed, named)

    def measure_errors(self, bounding: Bounding) -> None:
        """Measures the errors that `analytic` reads, unless they exist.

        Their noise is independent of the noise of every result.
        """
        kept = analytic.measured(bounding)
        path = analytic.path(self.run, kept)
        try:
            dataset = self.dataset("train")
        except data.DataError as error:
            if not os.path.exists(path):
                raise
            print(f"WARNING: {path} is used without a check of its images: {error}", flush=True)
            return
        count = min(ERROR_IMAGES, len(dataset))
        key = jax.random.fold_in(make_keys(0).evaluate, 1)
        self._measure(dataset, count, kept, path, key, "of the errors", False)

    def _measure(self, dataset, num_images, bounding, path, key, seed, named) -> Evaluation:
        """Measures images until there are `num_images`, from where an earlier call stopped.

        Args:
          named: whether the user has named the path. If so, an existing result of other images is an error; otherwise
            it is renamed.
        """
        run, chosen = self.run, self.run.method.resolve(bounding)
        errors, origin = analytic.errors_for(run, bounding, bounding.variance)
        with options.errors_at("evaluation"):
            chain = run.method.bound_chain(chosen, x_0_error=errors)
        recipe = run.recipe() | {"data": dataset.name, "split": dataset.split, "seed": seed}
        recipe |= {"chosen": results.CHOSEN} | options.describe(chosen) | {"x_0_error": origin}
        rows = data.choose(len(dataset))
        check = functools.partial(_same_images, dataset, rows)
        with results.in_progress(path, recipe, check=check, named=named) as (folder, finished):
            unfinished = os.path.join(folder, "tally.npz")
            begun = processes.from_first(lambda: os.path.exists(unfinished))
            found = results.read_npz(unfinished) if begun else finished
            tally = _Tally(found or {}, unfinished)
            where = f"{dataset.name}/{dataset.split}"
            print(f"evaluating {run.workdir} on {where}, {len(chain)} steps", flush=True)
            self._fill(tally, dataset, rows, num_images, chosen, errors, key)
            tally.arrays[INDEX] = rows[: tally.count]
            writers.save_npz(path, tally.arrays, recipe)
        digest = hashlib.sha256(tally.arrays[DIGESTS].tobytes()).hexdigest()
        return Evaluation(path, chain, recipe | {DIGESTS: digest}, tally.scalars(), tally.curves())

    def _fill(self, tally, dataset, rows, num_images, chosen, errors, key) -> None:
        """Measures image by image and saves the results so far."""

        def function(params, key, image, label, index, digest):
            batch = {"image": image, "label": label, "index": index}
            return self.run.method.bound(params, key, batch, chosen, x_0_error=errors), digest

        def examples(at):
            images = dataset.fetch(rows[at])
            return images, dataset.labels[rows[at]], rows[at], data.image_digests(images)

        progress = Progress("image", num_images, tally.count, unit="images")
        for at, (parts, digests) in jobs.in_batches(
            function, self.run.params, key, examples, progress, self.output.batch_size
        ):
            finite = np.isfinite(parts["total"])
            if not finite.all():
                raise RunError(
                    f"the bound is not finite for {np.sum(~finite)} of {len(at)} images; try the other"
                    " weights (--weights), or an earlier checkpoint: see loss.png"
                )
            tally.add(parts, digests)
            progress.show(f"{plus_minus(*mean_and_error(tally.arrays['total']))} bits/dim")


@dataclasses.dataclass
class _Tally:
    """The results so far: numbers [N] of the images, means [S] over them, and digests of the images."""

    arrays: dict[str, np.ndarray]
    path: str

    @property
    def count(self) -> int:
        return len(self.arrays.get("total", ()))

    def add(self, parts: dict[str, np.ndarray], digests: np.ndarray) -> None:
        """Adds parts of further images, each [B] or [B, S], and saves the tally."""
        count, new, result = self.count, len(digests), {}
        for name, values in parts.items():
            values = np.asarray(values, np.float64)
            if values.ndim == 1:
                result[name] = np.append(self.arrays.get(name, ()), values)
            else:
                before = self.arrays.get(CURVE + name, np.zeros(values.shape[1]))
                result[CURVE + name] = (before * count + values.sum(axis=0)) / (count + new)
        result[DIGESTS] = np.concatenate([self.arrays.get(DIGESTS, digests[:0]), digests])
        self.arrays = result
        writers.save_npz(self.path, result)

    def scalars(self) -> dict[str, np.ndarray]:
        kept = (DIGESTS, INDEX)
        return {k: v for k, v in self.arrays.items() if not k.startswith(CURVE) and k not in kept}

    def curves(self) -> dict[str, np.ndarray]:
        return {k.removeprefix(CURVE): v for k, v in self.arrays.items() if k.startswith(CURVE)}


def _same_images(dataset, rows, tally: dict) -> bool:
    """Whether the images of the tally are those that the data set has now."""
    measured = tally.get(DIGESTS, np.zeros((0, 0), np.uint8))
    count = len(tally.get("total", ()))
    if not len(measured) == count <= len(dataset):
        return False
    for first in range(0, count, 1000):
        part = slice(first, min(first + 1000, count))
        if (data.image_digests(dataset.fetch(rows[part])) != measured[part]).any():
            return False
    return True
