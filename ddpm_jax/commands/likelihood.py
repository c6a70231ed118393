"""Likelihood: the variational bound on −log p(x_0), and what follows from its terms.

    python -m ddpm_jax.main --mode=nll --workdir=runs/digits
    python -m ddpm_jax.main --mode=rate_distortion --workdir=runs/digits
    python -m ddpm_jax.main --mode=best_steps --workdir=runs/digits --steps=50

Each command writes a .json with the result and the settings that affect it, a picture of the curves (.png), and total,
L_T and L_0 of every image (.npz). An interrupted command keeps its results in FILE.partial/, and the same command
continues from there. A larger --num_images extends a result. The noise of image i depends only on the seed and on i.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from absl import logging

from ddpm_jax import options
from ddpm_jax.commands import analytic
from ddpm_jax.commands.bound import Evaluation, Measured, Request, bounded, check_out
from ddpm_jax.commands.shared import Output
from ddpm_jax.ddpm import Bounding
from ddpm_jax.files import writers
from ddpm_jax.files.runs import Run
from ddpm_jax.process import budget, timesteps
from ddpm_jax.process.likelihood import rate_distortion as rate_and_distortion
from ddpm_jax.process.likelihood import rmse as root_mean_square
from ddpm_jax.stats import mean_and_error, plus_minus
from ddpm_jax.training import parallel


def nll(
    run: Run,
    *,
    bounding: Bounding = Bounding(),
    measured: Measured = Measured(),
    output: Output = Output(),
) -> Evaluation:
    """Measures the variational bound of images in bits/dim, term by term.

    Args:
      bounding: with variance="analytic", the errors that it needs are measured first on `bound.ERROR_IMAGES` training
        images, unless they were measured before.
      measured: the images, and the seed of the noise.
      output: the path of the .json; the .png and the .npz get the same name.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    request = Request(run, measured, output)
    return _report(request.measure(bounding, check_out(output.out, run.workdir)))


def rate_distortion(
    run: Run,
    *,
    bounding: Bounding = Bounding(),
    measured: Measured = Measured(),
    output: Output = Output(),
) -> Evaluation:
    """Measures rate and distortion along the reverse chain: Ho et al. 2020, Table 4 and Figure 5."""
    request = Request(run, measured, output)
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
    found = {**curves, "num_images": result.count, "recipe": result.recipe}
    writers.save_result(f"{path}.json", found)
    print(f"table and curves: {path}.json, .png", flush=True)
    return result


def tenths(S: int) -> list[int]:
    """The numbers of reverse steps in the rows of Ho et al.'s Table 4: S and its tenths, the largest first."""
    return sorted({max(1, round(S * tenth / 10)) for tenth in range(1, 11)}, reverse=True)


def best_steps(
    run: Run,
    *,
    bounding: Bounding = Bounding(),
    measured: Measured = Measured(),
    output: Output = Output(),
) -> np.ndarray:
    """Chooses the S steps, set by --steps=S, with the lowest bound (Watson et al. 2021), and measures their gain.

    `budget.best_steps` chooses the steps from errors measured on training images. Then the bounds of the chosen steps and
    of S evenly spaced steps are measured on the same images of `split` with the same noise. For a model with a learned
    variance the steps are chosen with the analytic variance, which the learned variance approximates.

    Returns:
      int [S], the chosen times.

    Raises: as `nll`.
    """
    out, model = check_out(output.out, run.workdir), bounded(run)
    S = bounding.steps
    if S is None or not str(S).isdecimal():
        raise options.ConfigError(
            f"best_steps: --steps must be the number of steps to choose, such as --steps=50; got {S!r}"
        )
    S, full = int(S), model.schedule
    variance = model.resolve(bounding).variance
    with options.errors_at("best_steps"):
        budget.check_num_steps(S, len(full))
        if variance != "analytic":  # check the options before anything is measured
            model.bound_chain(dataclasses.replace(bounding, steps=str(S)))
    request = Request(run, measured, dataclasses.replace(output, out=None))
    request.dataset()
    whole = dataclasses.replace(bounding, steps=None, variance="analytic")
    request.measure_errors(whole)
    errors, origin = analytic.errors_for(run, whole, "analytic")
    cost = variance if variance in ("fixed_small", "fixed_large") else "analytic"
    tau = budget.best_steps(full, errors, S, variance=cost)
    even = timesteps.subsequence(S, len(full))
    results, totals = {}, {}
    for name, times in (("best", tau), ("even", even)):
        steps = timesteps.as_text(times)
        chosen = dataclasses.replace(bounding, steps=steps)
        results[name] = _report(request.measure(chosen, None))
        totals[name] = results[name].scalars["total"]
    count = min(map(len, totals.values()))
    totals = {name: values[:count] for name, values in totals.items()}
    totals["gain"] = totals["even"] - totals["best"]
    settings = options.changed(dataclasses.replace(bounding, steps=str(S)))
    name = run.name("best_steps", measured.split, f"seed{measured.seed}", settings=settings)
    summary = {
        "steps": tau.tolist(),
        "even_steps": even.tolist(),
        "num_timesteps": len(full),
        "num_images": count,
        "chosen_with": {"variance": cost, "x_0_error": origin},
        "recipe": {f"{name}_recipe": result.recipe for name, result in results.items()},
        "software": parallel.banner(),
    }
    out = out or os.path.join(run.workdir, "eval", f"{name}.json")
    _report_gain(summary, totals, out)
    return tau


def _report_gain(summary: dict, totals: dict[str, np.ndarray], out: str) -> None:
    """Prints the gain of the best steps over even spacing, and writes the .json."""
    texts = {}
    for name, values in totals.items():
        mean, error = mean_and_error(values)
        summary |= {name: mean, f"{name}_stderr": error}
        texts[name] = plus_minus(mean, error)
    writers.save_result(out, summary)
    steps = summary["steps"]
    print(
        f'--steps="{timesteps.as_text(steps)}"\n'
        f"best {len(steps)} of {summary['num_timesteps']} steps {texts['best']} bits/dim, even spacing"
        f" {texts['even']}, gain {texts['gain']} on the same {summary['num_images']} images\n{out}",
        flush=True,
    )


# ---- reports -------------------------------------------------------------------------------------------


def _title(result: Evaluation) -> str:
    recipe = result.recipe
    return (
        f"{os.path.basename(recipe['workdir'])}, step {recipe['step']:,}, {recipe['weights']} weights:"
        f" {result.count:,} images of {recipe['data']}/{recipe['split']}, {len(result.chain)} steps,"
        f" variance {recipe['variance']}"
    )


def _in_context(result: Evaluation) -> str:
    """Values to compare a bound with: uniform noise, and the training loss."""
    parts, recipe = ["for comparison, uniform noise costs 8 bits/dim"], result.recipe
    own = f"_nll_{recipe['split']}_"
    folder, name = os.path.split(f"{result.path[:-4]}.json")
    of_train, value = os.path.join(folder, name.replace(own, "_nll_train_")), ""
    if recipe["split"] != "train" and os.path.exists(of_train):
        try:
            found = writers.read_json(of_train)
            if all(found["recipe"][name] == recipe[name] for name in ("weights_sha256", "chosen")):
                value = plus_minus(found["total"], found["total_stderr"])
                value = f"{found['num_images']} training images {value}"
        except (ValueError, LookupError, TypeError):
            logging.warning("%s is damaged and not compared with", of_train)
    if value:
        parts.append(value)
    elif recipe["split"] != "train":
        parts.append("for the bound of training images, use --split=train")
    rows = writers.read_metrics(os.path.join(recipe["workdir"], "metrics.jsonl"))
    rows = [row for row in rows if row["step"] <= recipe["step"] and row.get("loss") is not None]
    if rows:
        name = "loss" if rows[-1].get("vlb") is None else "vlb"
        what = {"loss": "the loss", "vlb": "the bound"}[name]
        parts.append(f"{what} in training at step {rows[-1]['step']:,} was {rows[-1][name]:.4f}")
    return ", ".join(parts)


def _report(result: Evaluation) -> Evaluation:
    """Prints the result, and writes the .json and a picture of its curves."""
    writers.save_result(f"{result.path[:-4]}.json", result.summary())
    t, curves = result.chain.times, result.curves
    terms = writers.Panel(
        *("L_t, the terms of the bound", "t + 1", "bits/dim", t + 1, {"term": curves["terms"]}),
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
    errors = f" (errors measured on {origin['num_images']} training images)" if origin else ""
    print(
        f"{total} bits/dim, of which {', '.join(f'{k} {v}' for k, v in values.items())}\n"
        f"{_title(result)}, x_0 {'clipped' if recipe['clip_x0'] else 'not clipped'},"
        f" {recipe['cdf']} cdf{errors}; one draw of x_t for each image and t, from seed {recipe['seed']};"
        f" ± is the standard error over images\n{_in_context(result)}\n{result.path[:-4]}.json, .png, .npz",
        flush=True,
    )
    return result
