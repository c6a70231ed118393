"""What a trained model is worth in numbers: its bound on −log p(x_0), and what follows from the terms.

    python -m ddpm_jax.main --mode=nll --workdir=runs/digits
    python -m ddpm_jax.main --mode=rate_distortion --workdir=runs/digits
    python -m ddpm_jax.main --mode=best_steps --workdir=runs/digits --steps=50

Each writes a .json with the result and the settings that affect it, a picture beside it as .png, and total, L_T and L_0
of every image as .npz. While it runs, what is measured stands in FILE.partial/; the same command goes on from there, and
one with a larger --num_images from the result. Image i depends on the seed and i.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
from typing import Annotated, NamedTuple

import jax
import numpy as np

from ddpm_jax import data, options
from ddpm_jax.commands import analytic, shared
from ddpm_jax.commands.shared import DataDir, Output, Seed
from ddpm_jax.ddpm import Bounding
from ddpm_jax.files import results, run_data, writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.options import AtLeast
from ddpm_jax.process import budget, timesteps
from ddpm_jax.process.likelihood import rate_distortion as rate_and_distortion
from ddpm_jax.process.likelihood import rmse as root_mean_square
from ddpm_jax.process.schedules import Schedule
from ddpm_jax.stats import mean_and_error, plus_minus
from ddpm_jax.training import parallel
from ddpm_jax.training.step import make_keys

CURVE = "curve_"  # names of [S] in an .npz, beside the [N] of each image
DIGESTS = "images_sha256"  # uint8 [N, 16] in an .npz, of each image
INDEX = "index"  # int64 [N] in an .npz, the position of each image in its split
ERROR_IMAGES = (
    64  # images of the training split for the analytic variance: means over all their pixels
)

Split = Annotated[str, "The split of the data, such as train or test."]
NumImages = Annotated[int | None, "How many images to use. Default: all.", AtLeast(1)]


class Evaluation(NamedTuple):
    """The bound of N images of a split."""

    path: str  # of the .npz; the .json and .png beside it
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


def nll(
    run: Run,
    *,
    bounding: Bounding = Bounding(),
    split: Split = "test",
    num_images: NumImages = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    output: Output = Output(),
) -> Evaluation:
    """Measures the variational bound of images in bits/dim, term by term.

    Args:
      bounding: with variance="analytic", the errors that it needs are measured first on `ERROR_IMAGES` training images,
        unless they are there.
      num_images: chosen by `data.choose`; more that are measured already count too.
      seed: of the noise: one draw of x_t for each image and time.
      output: the .json, with .png and .npz beside it.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    request = _Request(run, split, num_images, data_dir, seed, output)
    return _report(request.measure(bounding, check_out(output.out, run.workdir)))


def rate_distortion(
    run: Run,
    *,
    bounding: Bounding = Bounding(),
    split: Split = "test",
    num_images: NumImages = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    output: Output = Output(),
) -> Evaluation:
    """Measures rate and distortion along the reverse chain: Ho et al. 2020, Table 4 and Figure 5."""
    request = _Request(run, split, num_images, data_dir, seed, output)
    result = _report(request.measure(bounding, check_out(output.out, run.workdir)))
    prior = float(np.mean(result.scalars["L_T"]))
    rate, rmse = rate_and_distortion(result.curves["terms"], prior, result.curves["x_0_error"])
    print("| reverse steps | rate (bits/dim) | distortion (RMSE, 0 … 255) |\n|---|---|---|")
    for n in tenths(len(rate)):
        print(f"| {n} | {rate[n - 1]:.5f} | {rmse[n - 1]:.5f} |")
    steps, path = np.arange(1, len(rate) + 1), f"{result.path[:-4]}_rate_distortion"
    distortion = {"distortion": rmse}
    panels = [
        writers.Panel("", "reverse steps", "distortion (RMSE)", steps, distortion),
        writers.Panel("", "reverse steps", "rate (bits/dim)", steps, {"rate": rate}),
        writers.Panel("", "rate (bits/dim)", "distortion (RMSE)", rate, distortion),
    ]
    writers.save_panels(f"{path}.png", _title(result), panels)
    curves = {"reverse_steps": steps.tolist(), "rate": rate.tolist(), "rmse": rmse.tolist()}
    writers.save_json(
        f"{path}.json", curves | {"num_images": result.count, "recipe": result.recipe}
    )
    print(f"table and curves: {path}.json, .png", flush=True)
    return result


def tenths(S: int) -> list[int]:
    """The numbers of reverse steps in the rows of Ho et al.'s Table 4: S and its tenths, the largest first."""
    return sorted({max(1, round(S * tenth / 10)) for tenth in range(1, 11)}, reverse=True)


def best_steps(
    run: Run,
    *,
    bounding: Bounding = Bounding(),
    split: Split = "test",
    num_images: NumImages = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    output: Output = Output(),
) -> np.ndarray:
    """Chooses the --steps=S of the T steps with the lowest bound (Watson et al. 2021), and says what they gain.

    They are chosen by `budget.best_steps` with the errors of the training split, then both chains, chosen and evenly
    spaced, are measured on the same images of `split` with the same noise. A learned variance enters the choice as the
    analytic one, which it has learned to be.

    Returns:
      int [S], the chosen times.

    Raises: as `nll`.
    """
    out, model = check_out(output.out, run.workdir), bounded(run)
    S = bounding.steps
    if S is None or not str(S).isdecimal():
        raise options.ConfigError(
            f"best_steps: steps must be a number of steps to choose, such as --steps=50; got {S!r}"
        )
    S, full = int(S), model.schedule
    variance = model.resolve(bounding).variance
    with options.errors_at("best_steps"):
        budget.check_num_steps(S, len(full))
        if variance != "analytic":  # what can be refused is, before anything is measured
            model.bound_chain(dataclasses.replace(bounding, steps=str(S)))
    request = _Request(
        run, split, num_images, data_dir, seed, dataclasses.replace(output, out=None)
    )
    request.dataset()
    whole = dataclasses.replace(bounding, steps=None, variance="analytic")
    request.measure_errors(whole)
    errors, origin = analytic.errors_for(run, whole, "analytic")
    cost = variance if variance in ("fixed_small", "fixed_large") else "analytic"
    tau = budget.best_steps(full, errors, S, variance=cost)
    even = timesteps.subsequence(S, len(full))
    totals = {}
    recipes = {}
    for name, times in (("best", tau), ("even", even)):
        steps = timesteps.as_text(times)
        result = _report(request.measure(dataclasses.replace(bounding, steps=steps), None))
        totals[name], recipes[f"{name}_recipe"] = result.scalars["total"], result.recipe
    count = min(len(values) for values in totals.values())
    totals = {name: values[:count] for name, values in totals.items()}
    totals["gain"] = totals["even"] - totals["best"]
    summary = {"steps": tau.tolist(), "even_steps": even.tolist(), "num_timesteps": len(full)}
    chosen = {"variance": cost, "x_0_error": origin}
    summary |= {"num_images": count, "chosen_with": chosen}
    for name, values in totals.items():
        summary[name], summary[f"{name}_stderr"] = mean_and_error(values)
    settings = options.changed(dataclasses.replace(bounding, steps=str(S)))
    name = run.name("best_steps", split, f"seed{seed}", **settings)
    out = out or os.path.join(run.workdir, "eval", f"{name}.json")
    writers.save_json(out, summary | {"recipe": recipes, "software": parallel.banner()})
    best, evenly, gain = (
        plus_minus(*mean_and_error(totals[name])) for name in ("best", "even", "gain")
    )
    print(
        f'--steps="{timesteps.as_text(tau)}"\n'
        f"best {S} of {len(full)} steps {best} bits/dim, even spacing {evenly}, gain {gain}"
        f" on the same {count} images\n{out}",
        flush=True,
    )
    return tau


# ---- measuring -------------------------------------------------------------------------------------


def check_out(out: str | None, workdir: str) -> str | None:
    """The path of a result, which is not written over what is none; see `results.out_path`."""
    if out is None:
        return None
    out = results.out_path(out, ".json", workdir)
    if os.path.exists(out):
        try:
            with open(out, encoding="utf-8") as file:
                ours = "recipe" in json.load(file)
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise RunError(f"{out} is not the result of an evaluation; choose another --out")
    return out


def bounded(run: Run):
    """The Method of a run, which must have a bound."""
    if hasattr(run.method, "bound"):
        return run.method
    name = run.config.method.partition(":")[0]
    package = importlib.util.find_spec(name).submodule_search_locations is not None
    own = package and importlib.util.find_spec(f"{name}.__main__")
    advice = f"; its own command is python -m {name} --workdir={run.workdir}" if own else ""
    raise RunError(
        f"{name} (config.method) has no bound, so there is nothing to measure here{advice}"
    )


@dataclasses.dataclass(frozen=True)
class _Request:
    """Which images are measured, and how they are computed."""

    run: Run
    split: str
    num_images: int | None
    data_dir: str | None
    seed: int
    output: Output

    def dataset(self, split: str | None = None) -> data.Dataset:
        """The split, if it has as many images as are asked for."""
        count = self.num_images if split is None else None
        dataset = run_data.data_of(self.run, split or self.split, self.data_dir)
        run_data.check_classes(self.run.method, dataset)
        if count is not None and count > len(dataset):
            raise RunError(
                f"{count} images asked of the {len(dataset)} in {dataset.name}/{dataset.split}"
            )
        return dataset

    def key(self):
        with options.errors_at("evaluation"):
            return make_keys(self.seed).evaluate

    def measure(self, bounding: Bounding, path: str | None) -> Evaluation:
        """The bound of the images; `path` is the .json that a user has named."""
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
            name = run.name("nll", self.split, f"seed{self.seed}", **options.changed(bounding))
            path = os.path.join(run.workdir, "eval", f"{name}.json")
        path = os.path.abspath(f"{path[:-5]}.npz")
        count = self.num_images or len(dataset)
        return self._measure(dataset, count, bounding, path, key, self.seed, named)

    def measure_errors(self, bounding: Bounding) -> None:
        """Measures what `analytic` reads, unless it is there; from noise that no result is drawn with."""
        kept = analytic.measured(bounding)
        path = analytic.path(self.run, kept)
        try:
            dataset = self.dataset("train")
        except data.DataError as error:
            if not os.path.exists(path):
                raise
            print(
                f"WARNING: {path} is used, and its images cannot be compared: {error}", flush=True
            )
            return
        count = min(ERROR_IMAGES, len(dataset))
        key = jax.random.fold_in(make_keys(0).evaluate, 1)
        self._measure(dataset, count, kept, path, key, "of the errors", False)

    def _measure(self, dataset, num_images, bounding, path, key, seed, named) -> Evaluation:
        """Measures images until there are `num_images`, from where an earlier call stopped.

        Args:
          named: the user has named the path: what is there of other images is then refused, not set aside.
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
            found = results.read_npz(unfinished) if os.path.exists(unfinished) else finished
            tally = _Tally(found or {}, unfinished)
            where = f"{dataset.name}/{dataset.split}"
            print(f"evaluating {run.workdir} on {where}, {len(chain)} steps", flush=True)
            self._fill(tally, dataset, rows, num_images, chosen, errors, key)
            tally.arrays[INDEX] = rows[: tally.count]
            writers.save_npz(path, **tally.arrays, recipe=json.dumps(recipe))
        digest = hashlib.sha256(tally.arrays[DIGESTS].tobytes()).hexdigest()
        return Evaluation(path, chain, recipe | {DIGESTS: digest}, tally.scalars(), tally.curves())

    def _fill(self, tally, dataset, rows, num_images, chosen, errors, key) -> None:
        """Measures image by image, and keeps what is measured."""

        def function(params, key, image, label, index):
            batch = {"image": image, "label": label, "index": index}
            return self.run.method.bound(params, key, batch, chosen, x_0_error=errors)

        batch_size = min(self.output.batch_size or parallel.examples_at_once(), num_images)
        progress = writers.Progress("image", num_images, tally.count, unit="images")
        params, mapped = None, None
        while tally.count < num_images:
            at = np.minimum(tally.count + np.arange(batch_size), num_images - 1)  # one shape
            images, new = dataset.fetch(rows[at]), min(batch_size, num_images - tally.count)
            examples = (images, dataset.labels[rows[at]], rows[at])
            if mapped is None:
                params = parallel.place(self.run.params)
                mapped = shared.compiled(function, progress, params, key, *examples)
            parts = mapped(params, key, *examples)
            finite = np.isfinite(parts["total"][:new])
            if not finite.all():
                raise RunError(
                    f"the bound is not finite for {np.sum(~finite)} of {new} images; try the other"
                    " weights (--weights), or an earlier checkpoint: see loss.png"
                )
            tally.add(parts, new, data.image_digests(images[:new]))
            progress.done = tally.count
            progress.show(f"{plus_minus(*mean_and_error(tally.arrays['total']))} bits/dim")


@dataclasses.dataclass
class _Tally:
    """What is measured so far: [N] of each number, means [S] of each curve, digests of the images."""

    arrays: dict[str, np.ndarray]
    path: str

    @property
    def count(self) -> int:
        return len(self.arrays.get("total", ()))

    def add(self, parts: dict[str, np.ndarray], new: int, digests: np.ndarray) -> None:
        """Adds the first `new` rows of the parts, [B] or [B, S], and saves."""
        count, result = self.count, {}
        for name, values in parts.items():
            values = np.asarray(values[:new], np.float64)
            if values.ndim == 1:
                result[name] = np.append(self.arrays.get(name, ()), values)
            else:
                before = self.arrays.get(CURVE + name, np.zeros(values.shape[1]))
                result[CURVE + name] = (before * count + values.sum(axis=0)) / (count + new)
        result[DIGESTS] = np.concatenate([self.arrays.get(DIGESTS, digests[:0]), digests])
        self.arrays = result
        writers.save_npz(self.path, **result)

    def scalars(self) -> dict[str, np.ndarray]:
        kept = (DIGESTS, INDEX)
        return {k: v for k, v in self.arrays.items() if not k.startswith(CURVE) and k not in kept}

    def curves(self) -> dict[str, np.ndarray]:
        return {k.removeprefix(CURVE): v for k, v in self.arrays.items() if k.startswith(CURVE)}


def _same_images(dataset, rows, tally: dict) -> bool:
    """Whether a tally is of the images that the data set has today."""
    measured = tally.get(DIGESTS, np.zeros((0, 0), np.uint8))
    count = len(tally.get("total", ()))
    if not len(measured) == count <= len(dataset):
        return False
    for first in range(0, count, 1000):
        part = slice(first, min(first + 1000, count))
        if (data.image_digests(dataset.fetch(rows[part])) != measured[part]).any():
            return False
    return True


# ---- what is reported --------------------------------------------------------------------------------


def _title(result: Evaluation) -> str:
    recipe = result.recipe
    return (
        f"{os.path.basename(recipe['workdir'])}, step {recipe['step']:,}, {recipe['weights']} weights:"
        f" {result.count:,} images of {recipe['data']}/{recipe['split']}, {len(result.chain)} steps,"
        f" variance {recipe['variance']}"
    )


def _in_context(result: Evaluation) -> str:
    """What a bound is to be compared with: chance, and what training saw."""
    parts, recipe = ["for comparison, uniform noise costs 8 bits/dim"], result.recipe
    own = f"_nll_{recipe['split']}_"
    folder, name = os.path.split(f"{result.path[:-4]}.json")
    of_train, found = os.path.join(folder, name.replace(own, "_nll_train_")), {}
    if recipe["split"] != "train" and os.path.exists(of_train):
        with open(of_train, encoding="utf-8") as file:
            found = json.load(file)
    same = ("weights_sha256", "chosen")
    if found and all(found["recipe"].get(name) == recipe[name] for name in same):
        value = plus_minus(found["total"], found["total_stderr"])
        parts.append(f"{found['num_images']} training images {value}")
    elif recipe["split"] != "train":
        parts.append("for training images, run --split=train")
    rows = writers.read_metrics(os.path.join(recipe["workdir"], "metrics.jsonl"))
    rows = [row for row in rows if row["step"] <= recipe["step"] and row.get("loss") is not None]
    if rows:
        name = "loss" if rows[-1].get("vlb") is None else "vlb"
        what = {"loss": "the loss", "vlb": "the bound"}[name]
        parts.append(f"{what} in training at step {rows[-1]['step']:,} was {rows[-1][name]:.4f}")
    return ", ".join(parts)


def _report(result: Evaluation) -> Evaluation:
    """Prints it, and writes the .json and the picture of its curves."""
    writers.save_json(f"{result.path[:-4]}.json", result.summary())
    t, curves = result.chain.times, result.curves
    terms = writers.Panel(
        *("L_t: one term each", "t + 1", "bits/dim", t + 1, {"term": curves["terms"]}),
        x_scale="log",
        y_scale="log",
    )
    x_0 = {"x̂_0": root_mean_square(curves["x_0_error"])}
    distortion = writers.Panel("error of x̂_0 on the scale 0 … 255", "t", "root mean square", t, x_0)
    eps = writers.Panel(
        *("squared error of ε̂", "t", "mean over pixels", t, {"ε̂": curves["eps_error"]}),
        y_scale="log",
    )
    panels = [terms, distortion, eps]
    writers.save_panels(f"{result.path[:-4]}.png", _title(result), panels)
    recipe, values = result.recipe, {}
    for name, scalars in result.scalars.items():
        values[name] = plus_minus(*mean_and_error(scalars))
    total, origin = values.pop("total"), recipe["x_0_error"]
    errors = f" (errors of {origin['num_images']} training images)" if origin else ""
    print(
        f"{total} bits/dim, of which {', '.join(f'{k} {v}' for k, v in values.items())}\n"
        f"{_title(result)}, x_0 {'clipped' if recipe['clip_x0'] else 'not clipped'},"
        f" {recipe['cdf']} cdf{errors}; one draw of x_t for each image and t, from seed {recipe['seed']};"
        f" ± is the standard error over images\n{_in_context(result)}\n{result.path[:-4]}.json, .png, .npz",
        flush=True,
    )
    return result
