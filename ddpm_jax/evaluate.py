"""What a trained model is worth in numbers: its bound on −log p(x_0), and what follows from the terms.

    python -m ddpm_jax.main --mode=nll --workdir=runs/digits
    python -m ddpm_jax.main --mode=rate_distortion --workdir=runs/digits
    python -m ddpm_jax.main --mode=best_steps --workdir=runs/digits --steps=50

Each writes a .json with the result and everything that moves it, a picture beside it as .png, and the
numbers of every image as .npz. While it runs, what is measured stands in FILE.partial/; the same command
goes on from there, and one with a larger --num_images from the result. Image i depends on the seed and i.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import likelihood, parallel, runs, schedules, training, writers
from ddpm_jax.ddpm import all_options

CURVE = "curve_"  # names of [S] in an .npz, beside the [N] of each image
ERROR_IMAGES = (
    1024  # at most, for the analytic variance: a mean over pixels and images needs no more
)


class Evaluation(NamedTuple):
    """The bound of the first N images of a split."""

    path: str  # of the .npz; the .json and .png beside it
    chain: schedules.Schedule
    recipe: dict
    scalars: dict[str, np.ndarray]  # total, L_T, L_0: float64 [N] in bits/dim
    curves: dict[str, np.ndarray]  # terms, x_0_error, eps_error: float64 [S], means over images

    def summary(self) -> dict:
        """Means, standard errors over images, the curves and the recipe, for a .json."""
        result = {"num_images": len(self.scalars["total"])}
        for name, values in self.scalars.items():
            result[name], result[f"{name}_stderr"] = mean_and_error(values)
        curves = {name: values.tolist() for name, values in self.curves.items()}
        timesteps = self.chain.timesteps.tolist()
        return result | {"recipe": self.recipe, "curves": {"timesteps": timesteps, **curves}}


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """The mean and its standard error; None for a single value."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), error


def nll(
    workdir: str,
    *,
    split: str = "test",
    num_images: int | None = None,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    data_dir: str | None = None,
    out: str | None = None,
    **options,
) -> Evaluation:
    """The variational bound in bits/dim over the first images of a split, from a run's last checkpoint.

    Args:
      workdir: the run directory; its config is the truth.
      split: "train", "test" or what else the data set has.
      num_images: how many; None for all of the split. More that are there already count too.
      weights: "ema" or "raw".
      seed: of the noise: one draw of x_t for each image and time.
      batch_size: images at a time; it changes memory and speed, and a result by rounding at most.
      data_dir: where the data are, if not where the config says.
      out: the .json to write, with .png and .npz beside it; None names them after all that moves the
        result, in workdir/eval.
      options: of the Method's `make_bound`; None leaves the config's. With variance="analytic", the
        errors that it needs are measured on the training split first, unless they are there.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    run = runs.load(workdir, weights)
    return _report(_bound(run, split, num_images, seed, batch_size, data_dir, out, options))


def rate_distortion(workdir: str, **options) -> Evaluation:
    """Prints Ho et al. Table 4 and draws the curves of their Figure 5; arguments as `nll`."""
    result = nll(workdir, **options)
    prior = float(np.mean(result.scalars["L_T"]))
    curves = result.curves["terms"], prior, result.curves["x_0_error"]
    rate, rmse = likelihood.rate_distortion(*curves)
    S = len(rate)
    rows = sorted({max(1, round(S * tenth / 10)) for tenth in range(1, 11)}, reverse=True)
    print("| reverse steps | rate (bits/dim) | distortion (RMSE, 0 … 255) |\n|---|---|---|")
    for n in rows:
        print(f"| {n} | {rate[n - 1]:.5f} | {rmse[n - 1]:.5f} |")
    steps, path = np.arange(1, S + 1), f"{result.path[:-4]}_rate_distortion"
    distortion = {"distortion": rmse}
    panels = [
        writers.Panel("", "reverse steps", "distortion (RMSE)", steps, distortion),
        writers.Panel("", "reverse steps", "rate (bits/dim)", steps, {"rate": rate}),
        writers.Panel("", "rate (bits/dim)", "distortion (RMSE)", rate, distortion),
    ]
    writers.save_panels(f"{path}.png", _title(result), panels)
    numbers = {"reverse_steps": steps.tolist(), "rate": rate.tolist(), "rmse": rmse.tolist()}
    writers.save_json(f"{path}.json", numbers | {"recipe": result.recipe})
    print(f"table and curves: {path}.json, .png", flush=True)
    return result


def best_steps(
    workdir: str,
    *,
    steps,
    split: str = "test",
    num_images: int | None = None,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    data_dir: str | None = None,
    out: str | None = None,
    **options,
) -> np.ndarray:
    """The S of T steps with the lowest bound (Watson et al. 2021), and what they gain over even spacing.

    They are chosen by `likelihood.best_steps` with the errors of the training split, then both chains
    are measured on the same images of `split` with the same noise. A learned variance enters the choice
    as the analytic one, which it has learned to be.

    Args:
      steps: S, at least 2.
      out: the .json to write; None names it in workdir/eval.

    Returns:
      int [S], the chosen times.

    Raises: as `nll`.
    """
    run = runs.load(workdir, weights)
    measure = _measure_errors(run, num_images, batch_size, data_dir, options)
    full, errors = measure.chain, measure.curves["x_0_error"]
    with config_lib.errors_at("best_steps"):
        S = int(str(steps)) if str(steps).isdecimal() else steps
        if not isinstance(S, int):
            raise ValueError(f"steps must be a whole number of steps to choose, got {steps!r}")
        variance = measure_variance = options.get("variance") or measure.recipe["variance"]
        if variance not in ("fixed_small", "fixed_large"):
            measure_variance = "analytic"
        tau = likelihood.best_steps(full, errors, S, variance=measure_variance)
    even = schedules.subsequence(S, len(full))
    results = {}
    for name, chosen in (("best", tau), ("even", even)):
        given = options | {"steps": chosen.tolist()}
        arguments = (split, num_images, seed, batch_size, data_dir, None, given)
        results[name] = _report(_bound(run, *arguments))
    totals = {name: result.scalars["total"] for name, result in results.items()}
    count = min(len(values) for values in totals.values())
    best, even_bits, gain = (
        mean_and_error(values[:count])
        for values in (totals["best"], totals["even"], totals["even"] - totals["best"])
    )
    name = run.name("best_steps", split, f"seed{seed}", **options | {"steps": S})
    out = out or os.path.join(run.workdir, "eval", f"{name}.json")
    summary = {"steps": tau.tolist(), "even_steps": even.tolist(), "num_images": count}
    for name, (mean, error) in (("best", best), ("even", even_bits), ("gain", gain)):
        summary |= {name: mean, f"{name}_stderr": error}
    writers.save_json(out, summary | {"recipe": results["best"].recipe})
    print(
        f'--steps="{json.dumps(tau.tolist(), separators=(",", ":"))}"\n'
        f"best {S} of {len(full)} steps {_pm(best)} bits/dim, even spacing {_pm(even_bits)},"
        f" gain {_pm(gain)} on the same {count} images\n{out}",
        flush=True,
    )
    return tau


# ---- the loop --------------------------------------------------------------------------------------


def _bound(run, split, num_images, seed, batch_size, data_dir, out, options) -> Evaluation:
    """Measures images until there are `num_images`, from where an earlier call stopped."""
    with config_lib.errors_at("evaluation"):
        key = training.make_keys(seed).evaluate
    if run.method.make_bound is None:
        raise runs.RunError(
            f"{run.config.method} (config.method) has no make_bound: there is no likelihood to measure"
        )
    if out is not None and not out.endswith(".json"):
        raise runs.RunError(f"--out must end in .json, got {out}")
    chosen = {name: value for name, value in options.items() if value is not None}
    path = os.path.abspath(f"{out[:-5]}.npz" if out else runs.nll_path(run, split, seed, **chosen))
    if chosen.get("variance") == "analytic":
        _measure_errors(run, num_images, batch_size, data_dir, chosen)
    given, said = runs.with_errors(run, chosen)
    chain, bound = config_lib.call("evaluation", run.method.make_bound, given)
    where = {"image_shape": run.method.image_shape}
    where |= {"data_dir": data_dir} if data_dir else {}
    dataset = runs.load_data(run.config, split=split, **where)
    runs.check_classes(run.method, dataset)
    if num_images is not None and num_images > len(dataset):
        raise runs.RunError(
            f"{num_images} images asked of the {len(dataset)} in {dataset.name}/{split}"
        )
    num_images = num_images or len(dataset)
    recipe = run.recipe() | {"data": dataset.name, "split": split, "seed": seed}
    recipe |= all_options(run.method.make_bound, said)

    with runs.in_progress(path, recipe) as (folder, finished):
        unfinished = os.path.join(folder, "tally.npz")
        if os.path.exists(unfinished):
            with np.load(unfinished) as file:
                finished = dict(file)
        tally = finished or {}
        count = len(tally.get("total", ()))
        print(f"evaluating {run.workdir} on {dataset.name}/{split}, {len(chain)} steps", flush=True)
        if count < num_images:
            mapped, params = parallel.map_examples(_with_rows(bound)), parallel.place(run.params)
            batch_size = min(batch_size or parallel.examples_at_once(), num_images)
            progress = writers.Progress("image", num_images, count, unit="images")
        while count < num_images:
            rows = np.minimum(count + np.arange(batch_size), num_images - 1)  # one shape for all
            parts = mapped(params, key, dataset.fetch(rows), dataset.labels[rows], rows)
            tally = _add(tally, parts, count, min(batch_size, num_images - count))
            count = progress.done = len(tally["total"])
            writers.save_npz(unfinished, **tally)
            text = f"{_pm(mean_and_error(tally['total']))} bits/dim"
            print(progress.line(text), flush=True)
        writers.save_npz(path, **tally, recipe=json.dumps(recipe))
    curves = {k.removeprefix(CURVE): v for k, v in tally.items() if k.startswith(CURVE)}
    scalars = {k: v for k, v in tally.items() if not k.startswith(CURVE)}
    return Evaluation(path, chain, recipe, scalars, curves)


def _with_rows(bound):
    """A bound as `parallel.map_examples` takes it."""

    def function(params, key, image, label, index):
        return bound(params, key, {"image": image, "label": label, "index": index})

    return function


def _add(tally: dict, parts: dict, count: int, new: int) -> dict:
    """The tally of `count` images and of the first `new` rows of the parts: [N] kept, [N, S] averaged."""
    result = {}
    for name, values in parts.items():
        values = np.asarray(values[:new], np.float64)
        if values.ndim == 1:
            result[name] = np.append(tally.get(name, ()), values)
        else:
            before = tally.get(CURVE + name, np.zeros(values.shape[1]))
            total = before * count + values.sum(axis=0)
            result[CURVE + name] = total / (count + new)
    return result


def _measure_errors(run, num_images, batch_size, data_dir, options) -> Evaluation:
    """The evaluation on the training split that `runs.errors_path` names, made if it is not there."""
    path = runs.errors_path(run, options)
    kept = {name: options.get(name) for name in ("steps", "clip_x0")}
    wanted = min(num_images or ERROR_IMAGES, ERROR_IMAGES)
    if os.path.exists(path):
        wanted = 1  # what is there counts as it is
    return _bound(run, "train", wanted, 0, batch_size, data_dir, None, kept)


# ---- what is said of it ----------------------------------------------------------------------------


def _pm(mean_and_its_error: tuple[float, float | None]) -> str:
    mean, error = mean_and_its_error
    digits = ".4f" if abs(mean) >= 1e-3 or mean == 0 else ".2g"
    return f"{mean:{digits}}" if error is None else f"{mean:{digits}} ± {error:{digits}}"


def _title(result: Evaluation) -> str:
    recipe, count = result.recipe, len(result.scalars["total"])
    return (
        f"{os.path.basename(recipe['workdir'])}, step {recipe['step']:,}, {recipe['weights']} weights:"
        f" {count:,} images of {recipe['data']}/{recipe['split']}, {len(result.chain)} steps,"
        f" variance {recipe['variance']}"
    )


def _report(result: Evaluation) -> Evaluation:
    """Prints it, and writes the .json and the picture of its curves."""
    writers.save_json(f"{result.path[:-4]}.json", result.summary())
    t, curves = result.chain.timesteps, result.curves
    rmse = 127.5 * np.sqrt(curves["x_0_error"])
    panels = [
        writers.Panel(
            *("L_t: one term each", "t + 1", "bits/dim", t + 1, {"term": curves["terms"]}),
            x_scale="log",
            y_scale="log",
        ),
        writers.Panel(
            "error of x̂_0 on the scale 0 … 255", "t", "root mean square", t, {"x̂_0": rmse}
        ),
        writers.Panel(
            *("squared error of ε̂", "t", "mean over pixels", t, {"ε̂": curves["eps_error"]}),
            y_scale="log",
        ),
    ]
    writers.save_panels(f"{result.path[:-4]}.png", _title(result), panels)
    recipe, scalars = result.recipe, result.scalars
    parts = ", ".join(
        f"{name} {_pm(mean_and_error(values))}"
        for name, values in scalars.items()
        if name != "total"
    )
    print(
        f"{_pm(mean_and_error(scalars['total']))} bits/dim, of which {parts}\n"
        f"{_title(result)}, x_0 {'clipped' if recipe['clip_x0'] else 'not clipped'},"
        f" {recipe['cdf']} cdf; one draw of x_t for each image and t, from seed {recipe['seed']};"
        f" ± is the standard error over images\n{result.path[:-4]}.json, .png, .npz",
        flush=True,
    )
    return result
