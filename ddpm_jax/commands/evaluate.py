"""What a trained model is worth in numbers: its bound on −log p(x_0), and what follows from the terms.

    python -m ddpm_jax.main --mode=nll --workdir=runs/digits
    python -m ddpm_jax.main --mode=rate_distortion --workdir=runs/digits
    python -m ddpm_jax.main --mode=best_steps --workdir=runs/digits --steps=50

Each writes a .json with the result and what moves it, a picture beside it as .png, and total, L_T and L_0 of
every image as .npz. While it runs, what is measured stands in FILE.partial/; the same command
goes on from there, and one with a larger --num_images from the result. Image i depends on the seed and i.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import data, likelihood, parallel, runs, schedules, training, writers
from ddpm_jax.ddpm import all_options

CURVE = "curve_"  # names of [S] in an .npz, beside the [N] of each image
DIGESTS = "images_sha256"  # uint8 [N, 16] in an .npz, of each image
INDEX = "index"  # int64 [N] in an .npz, the position of each image in its split
ERROR_IMAGES = 64  # of the training split, for the analytic variance: means over all their pixels


class Evaluation(NamedTuple):
    """The bound of N images of a split."""

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
        result |= {"recipe": self.recipe, "software": parallel.banner()}
        return result | {"curves": {"timesteps": timesteps, **curves}}


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
    """The variational bound in bits/dim of images of a split, from a run's last checkpoint.

    Args:
      workdir: the run directory; its config is the truth.
      split: "train", "test" or what else the data set has.
      num_images: how many, chosen by `data.choose`; None for all of the split. More that are there
        already count too.
      weights: "ema" or "raw".
      seed: of the noise: one draw of x_t for each image and time.
      batch_size: images at a time; it changes memory and speed, and a result by rounding at most.
      data_dir: where the data are, if not where the config says.
      out: the .json to write, with .png and .npz beside it; None names them after all that moves the
        result, in workdir/eval.
      options: of the Method's `make_bound`; None leaves the config's. With variance="analytic", the errors
        that it needs are measured first on `ERROR_IMAGES` training images, unless they are there.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    out = check_out(out, workdir)
    run = runs.load(workdir, weights)
    given = {"batch_size": batch_size, "data_dir": data_dir}
    return _report(_nll(run, split, num_images, seed, options, path=out, **given))


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
    numbers["num_images"] = len(result.scalars["total"])
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
    out = check_out(out, workdir)
    run = runs.load(workdir, weights)
    chosen, measured = runs.given(options), {"batch_size": batch_size, "data_dir": data_dir}
    without = {name: value for name, value in chosen.items() if name != "variance"}
    full, _ = _make_bound(run, without)
    variance = chosen.get("variance", all_options(run.method.make_bound, {})["variance"])
    with config_lib.errors_at("best_steps"):
        if not str(steps).isdecimal():
            raise ValueError(
                f"steps must be a number of steps to choose, such as 50; got {steps!r}"
            )
        S = int(steps)
        likelihood.check_num_steps(S, len(full))
    if variance != "analytic":  # what can be refused is, before anything is measured
        _make_bound(run, chosen | {"steps": str(S)})
    _load_data(run, split, num_images, data_dir)

    _measure_errors(run, without, **measured)
    errors, origin = (
        found["x_0_error"] for found in runs.with_errors(run, without | {"variance": "analytic"})
    )
    cost = variance if variance in ("fixed_small", "fixed_large") else "analytic"
    tau = likelihood.best_steps(full, errors, S, variance=cost)
    even = schedules.subsequence(S, len(full))
    results = {
        name: _report(
            _nll(run, split, num_images, seed, chosen | {"steps": times.tolist()}, **measured)
        )
        for name, times in (("best", tau), ("even", even))
    }
    totals = {name: result.scalars["total"] for name, result in results.items()}
    count = min(len(values) for values in totals.values())
    totals = {name: values[:count] for name, values in totals.items()}
    totals["gain"] = totals["even"] - totals["best"]

    said = {"variance": cost, "x_0_error": origin}
    summary = {"steps": tau.tolist(), "even_steps": even.tolist(), "num_timesteps": len(full)}
    summary |= {"num_images": count, "chosen_with": said}
    for name, values in totals.items():
        summary[name], summary[f"{name}_stderr"] = mean_and_error(values)
    recipes = {f"{name}_recipe": result.recipe for name, result in results.items()}
    name = run.name("best_steps", split, f"seed{seed}", **chosen | {"steps": str(S)})
    out = out or os.path.join(run.workdir, "eval", f"{name}.json")
    writers.save_json(out, summary | {"recipe": recipes, "software": parallel.banner()})
    best, even, gain = (_pm(mean_and_error(totals[name])) for name in ("best", "even", "gain"))
    print(
        f'--steps="{json.dumps(tau.tolist(), separators=(",", ":"))}"\n'
        f"best {S} of {len(full)} steps {best} bits/dim, even spacing {even}, gain {gain}"
        f" on the same {count} images\n{out}",
        flush=True,
    )
    return tau


# ---- the loop --------------------------------------------------------------------------------------


def check_out(out: str | None, workdir: str) -> str | None:
    """The path of a result, which is not written over what is none; see `runs.out_path`."""
    if out is None:
        return None
    out = runs.out_path(out, ".json", workdir)
    if os.path.exists(out):
        try:
            with open(out, encoding="utf-8") as file:
                ours = "recipe" in json.load(file)
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise runs.RunError(f"{out} is no result of an evaluation; choose another --out")
    return out


def _make_bound(run, options):
    """The chain and the bound of checked options."""
    if run.method.make_bound is None:
        name = run.config.method
        package = importlib.util.find_spec(name).submodule_search_locations is not None
        own = package and importlib.util.find_spec(f"{name}.__main__")
        advice = f"; its own command is python -m {name} --workdir={run.workdir}" if own else ""
        raise runs.RunError(
            f"{name} (config.method) has no make_bound, so there is no bound to measure here{advice}"
        )
    return config_lib.call("evaluation", run.method.make_bound, options)


def _load_data(run, split, num_images, data_dir):
    """The split, if it has as many images as are asked for."""
    dataset = runs.data_of(run, split, data_dir)
    runs.check_classes(run.method, dataset)
    if num_images is not None and num_images > len(dataset):
        raise runs.RunError(
            f"{num_images} images asked of the {len(dataset)} in {dataset.name}/{dataset.split}"
        )
    return dataset


def _measure_errors(run, options, *, batch_size, data_dir) -> None:
    """Measures what `runs.with_errors` reads, unless it is there; from noise that no result is drawn with."""
    path = runs.errors_path(run, options)
    kept = {name: options[name] for name in ("steps", "clip_x0") if name in options}
    try:
        dataset = _load_data(run, "train", None, data_dir)
    except data.DataError as error:
        if not os.path.exists(path):
            raise
        print(f"WARNING: {path} is used, and its images cannot be compared: {error}", flush=True)
        return
    count, key = min(ERROR_IMAGES, len(dataset)), training.make_keys(0).evaluate
    given = {"key": jax.random.fold_in(key, 1), "seed": "of the errors", "named": False}
    _measure(run, dataset, count, kept, path, batch_size, **given)


def _nll(run, split, num_images, seed, options, *, batch_size, data_dir, path=None) -> Evaluation:
    with config_lib.errors_at("evaluation"):
        key = training.make_keys(seed).evaluate
    chosen = runs.given(options)
    if chosen.get("variance") != "analytic":
        _make_bound(run, chosen)
    dataset = _load_data(run, split, num_images, data_dir)
    if chosen.get("variance") == "analytic":
        _make_bound(run, {name: value for name, value in chosen.items() if name != "variance"})
        _measure_errors(run, chosen, batch_size=batch_size, data_dir=data_dir)
    named = path is not None
    if not named:
        name = run.name("nll", split, f"seed{seed}", **chosen)
        path = os.path.join(run.workdir, "eval", f"{name}.json")
    path = os.path.abspath(f"{path[:-5]}.npz")
    count = num_images or len(dataset)
    given = {"key": key, "seed": seed, "named": named}
    return _measure(run, dataset, count, chosen, path, batch_size, **given)


def _measure(
    run, dataset, num_images, options, path, batch_size, *, key, seed, named
) -> Evaluation:
    """Measures images until there are `num_images`, from where an earlier call stopped.

    Args:
      named: the user has named the path: what is there of other images is then refused, not set aside.
    """
    given, said = runs.with_errors(run, options)
    chain, bound = _make_bound(run, given)
    recipe = run.recipe() | {"data": dataset.name, "split": dataset.split, "seed": seed}
    recipe |= {"chosen": runs.CHOSEN}
    recipe |= all_options(run.method.make_bound, said)
    rows = data.choose(len(dataset))
    check = functools.partial(_same_images, dataset, rows)
    with runs.in_progress(path, recipe, check=check, named=named) as (folder, finished):
        unfinished = os.path.join(folder, "tally.npz")
        tally = runs.read_npz(unfinished) if os.path.exists(unfinished) else finished or {}
        count = len(tally.get("total", ()))
        where = f"{dataset.name}/{dataset.split}"
        print(f"evaluating {run.workdir} on {where}, {len(chain)} steps", flush=True)
        batch_size = min(batch_size or parallel.examples_at_once(), num_images)
        progress = writers.Progress("image", num_images, count, unit="images")
        params, mapped = None, None
        while count < num_images:
            batch = rows[np.minimum(count + np.arange(batch_size), num_images - 1)]  # one shape
            images, new = dataset.fetch(batch), min(batch_size, num_images - count)
            examples = (images, dataset.labels[batch], batch)
            if mapped is None:
                params = parallel.place(run.params)
                mapped = runs.compiled(_with_rows(bound), progress, params, key, *examples)
            digests = data.image_digests(images[:new])
            digests = np.concatenate([tally.get(DIGESTS, digests[:0]), digests])
            parts = mapped(params, key, *examples)
            if not np.isfinite(parts["total"][:new]).all():
                raise runs.RunError(
                    f"the bound is not finite for {np.sum(~np.isfinite(parts['total'][:new]))} of {new}"
                    " images; try the other weights (--weights), or an earlier checkpoint: see loss.png"
                )
            tally = _add(tally, parts, count, new)
            tally[DIGESTS] = digests
            count = progress.done = len(tally["total"])
            writers.save_npz(unfinished, **tally)
            progress.show(f"{_pm(mean_and_error(tally['total']))} bits/dim")
        tally[INDEX] = rows[:count]
        writers.save_npz(path, **tally, recipe=json.dumps(recipe))
    curves = {k.removeprefix(CURVE): v for k, v in tally.items() if k.startswith(CURVE)}
    scalars = {
        k: v for k, v in tally.items() if not k.startswith(CURVE) and k not in (DIGESTS, INDEX)
    }
    recipe |= {"images_sha256": hashlib.sha256(tally[DIGESTS].tobytes()).hexdigest()}
    return Evaluation(path, chain, recipe, scalars, curves)


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


# ---- what is said of it ----------------------------------------------------------------------------


def _pm(mean_and_its_error: tuple[float, float | None]) -> str:
    mean, error = mean_and_its_error
    digits = ".4f" if abs(mean) >= 1e-3 or mean == 0 else ".2g"
    return f"{mean:{digits}}" if error is None else f"{mean:{digits}} ± {error:{digits}}"


def _errors_of(recipe: dict) -> str:
    origin = recipe["x_0_error"]
    return f" (errors of {origin['num_images']} training images)" if origin else ""


def _title(result: Evaluation) -> str:
    recipe, count = result.recipe, len(result.scalars["total"])
    return (
        f"{os.path.basename(recipe['workdir'])}, step {recipe['step']:,}, {recipe['weights']} weights:"
        f" {count:,} images of {recipe['data']}/{recipe['split']}, {len(result.chain)} steps,"
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
        value = _pm((found["total"], found["total_stderr"]))
        parts.append(f"{found['num_images']} training images {value}")
    elif recipe["split"] != "train":
        parts.append("for training images, run --split=train")
    rows = writers.read_metrics(os.path.join(recipe["workdir"], "metrics.jsonl"))
    rows = [row for row in rows if row["step"] <= recipe["step"] and row.get("loss") is not None]
    if rows and rows[-1].get("vlb") is not None:
        parts.append(
            f"the bound in training at step {rows[-1]['step']:,} was {rows[-1]['vlb']:.4f}"
        )
    elif rows:
        parts.append(
            f"the loss in training at step {rows[-1]['step']:,} was {rows[-1]['loss']:.4f}"
        )
    return ", ".join(parts)


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
        f" {recipe['cdf']} cdf{_errors_of(recipe)}; one draw of x_t for each image and t, from seed {recipe['seed']};"
        f" ± is the standard error over images\n{_in_context(result)}\n{result.path[:-4]}.json, .png, .npz",
        flush=True,
    )
    return result
