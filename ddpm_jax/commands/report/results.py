"""Sections on the results in eval/: likelihood, metrics, and results of other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ddpm_jax.commands.likelihood import tenths
from ddpm_jax.commands.report import words
from ddpm_jax.commands.report.blocks import block, chart_block, pivot, table, text
from ddpm_jax.commands.report.charts import Curve, chart
from ddpm_jax.commands.report.find import Run
from ddpm_jax.commands.report.words import is_number, number, plus_minus
from ddpm_jax.process.likelihood import rmse

CURVES = 6  # maximum number of bounds in one chart
# Names of the numbers of a result, and its caption. Other results are captioned by their file names.
CAPTIONS = {
    ("total", "L_T", "L_0"): "Bound on −log p(x_0), bits/dim, ± the standard error over images",
    ("best", "even", "gain"): "The best steps of a shortened chain against even spacing, bits/dim",
}
# Charts of the lists in a result: title, label and name of x, name of y, scales.
CHARTS = (
    ("L_t, bits/dim", "t + 1", "timesteps", "terms", "log", "log"),
    ("RMSE of x̂_0, 0 … 255", "t", "timesteps", "x_0_error", "linear", "linear"),
    ("squared error of ε̂", "t", "timesteps", "eps_error", "linear", None),
    ("distortion over rate, RMSE", "rate, bits/dim", "rate", "rmse", "linear", "linear"),
    ("distortion over steps, RMSE", "reverse steps", "reverse_steps", "rmse", "linear", "linear"),
    ("rate over steps, bits/dim", "reverse steps", "reverse_steps", "rate", "linear", "linear"),
)
METRICS = ("Metrics of samples", "Metrics of other images")


class Score(NamedTuple):
    """A number of a result, such as an FID."""

    caption: str  # caption of its table
    name: str
    settings: dict[str, str]
    mean: float
    value: str  # with its spread

    def in_run(self, run: Run) -> Score:
        """The same with the run as a setting, instead of the training step."""
        of = {k: v for k, v in self.settings.items() if k != "step"}
        return self._replace(settings={"run": run.name} | of)


def scores(run: Run) -> Iterator[Score]:
    """Every metric, and every number with a standard error, of the results."""
    for file, result in run.results.items():
        entries = result.get("metrics")
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if isinstance(entry, dict) and {"manifest", "mean", "seeds"} <= entry.keys():
                yield _metric(name, entry)
        named = {key.removesuffix("_stderr") for key in result if key.endswith("_stderr")}
        known = next((names for names in CAPTIONS if {*names} == named), None)
        settings = {} if entries else settings_of(result)
        for name in known or sorted(named):
            spread = result[f"{name}_stderr"]
            if is_number(result.get(name)) and (spread is None or is_number(spread)):
                value = plus_minus(result[name], spread)
                caption = CAPTIONS.get(known, f"{file}.json")
                yield Score(caption, name, settings, result[name], value)


def settings_of(result: dict) -> dict[str, str]:
    """The settings of a result other than metrics."""
    recipe = result["recipe"] if isinstance(result.get("recipe"), dict) else {}
    steps = recipe.get("steps") or len(result.get("curves", {}).get("timesteps", ()))
    if "even_steps" in result:
        steps = f"{len(result['steps'])} of {result['num_timesteps']:,}"
    size = {"count": f"{number(result['num_images'])} images"} if "num_images" in result else {}
    return words.settings(recipe | {"steps": steps or None}) | size


def _metric(name: str, entry: dict) -> Score:
    """A metric over seeds, with the images, features and reference of its manifest."""
    manifest = entry["manifest"]
    made = manifest.get("generated", manifest)
    seeds = ", ".join(str(seed) for seed in entry["seeds"] if seed is not None)
    of = words.settings(made | {"seed": seeds or None})
    of["count"] = f"{manifest.get('num_generated', manifest.get('num_images')):,} images"
    if manifest.get("features"):
        features = manifest["features"]
        of["features"] = f"features {features['name']} {features['sha256'][:8]}"
    if manifest.get("reference"):
        origin = manifest["reference"]
        of["reference"] = f"against {origin['num_images']:,} of {origin['data']}/{origin['split']}"
    value = plus_minus(entry["mean"], entry.get("std"))
    return Score(METRICS["steps" not in of], name, of, entry["mean"], value)


def tables(found: list[Run], captions) -> list:
    """A table for each caption. Its columns are the numbers of a result; for metrics, numbers of steps or runs."""
    blocks, several = [], len(found) > 1
    own = [(run, score) for run in found for score in scores(run)]
    own = [score.in_run(run) if several else score for run, score in own]
    for caption in captions:
        cells = [score for score in own if score.caption == caption]
        across = "run" if several else "steps"
        if caption not in METRICS:
            across = "score"
            cells = [s._replace(name="", settings=s.settings | {across: s.name}) for s in cells]
        columns = list(dict.fromkeys(score.settings.get(across) for score in cells))
        columns.sort(key=lambda steps: words.count(steps) if across == "steps" else 0)
        cells = [(score.name, score.settings, score.value) for score in cells]
        blocks += [pivot(caption, cells, across, columns)] if cells else []
    return blocks


# ---- likelihood ------------------------------------------------------------------------------------


def bounds(run: Run) -> list[dict]:
    """The results of nll, those with the most steps and images first."""
    needed = {"curves", "total", "recipe", "num_images"}
    found = [result for result in run.results.values() if needed <= result.keys()]
    return sorted(found, key=lambda r: (-len(r["curves"]["timesteps"]), -r["num_images"]))


def likelihood(found: list[Run]) -> list:
    """Bounds, best steps, rate and distortion; with several runs, one curve for each."""
    several = len(found) > 1
    terms = [(run, one) for run in found for one in bounds(run)[: 1 if several else CURVES]]
    labels = words.common([settings_of(one) for _, one in terms])[1] if terms else []
    labels = [run.name for run, _ in terms] if several else [label or "bound" for label in labels]
    pairs = ((run, one) for run in found for one in run.results.values())
    distortion = [(r.name, one) for r, one in pairs if {"rate", "rmse", "num_images"} <= one.keys()]
    distortion.sort(key=lambda pair: pair[1]["num_images"])
    blocks = tables(found, CAPTIONS.values())
    blocks += chart_block(_charts(zip(labels, (one["curves"] for _, one in terms), strict=True)))
    blocks += chart_block(_charts(dict(distortion).items()), "Rate and distortion")
    blocks += [block("fold", [_table_4(*one) for one in distortion], "As a table")]
    run, captions = found[0], {score.caption for one in found for score in scores(one)}
    half = f"--steps={min(50, -(-run.num_timesteps // 2))}"
    bound, best = CAPTIONS.values()
    absent = {
        "The bound on −log p(x_0), term by term:": (bound not in captions, "nll"),
        "Rate and distortion:": (not distortion, "rate_distortion"),
        "The best steps of a shortened chain:": (best not in captions, "best_steps", half),
    }
    for what, (is_absent, *flags) in absent.items():
        if is_absent and run.chain and not several:
            blocks.append(text(what, "missing", run.command(*flags)))
    return blocks


def _charts(named) -> list:
    """The charts in `CHARTS` for (name, result) pairs."""
    named, charts = list(named), []
    for title, x_label, x, y, x_scale, y_scale in CHARTS:
        curves = []
        for name, result in named:
            if {x, y} <= result.keys():
                at, values = (np.array(result[key], np.float64) for key in (x, y))
                at = at + 1 if x_label == "t + 1" else at
                curves.append(Curve(name, at, rmse(values) if y == "x_0_error" else values))
        charts.append(chart(title, curves, x_label=x_label, x_scale=x_scale, y_scale=y_scale))
    return charts


def _table_4(name: str, result: dict) -> dict:
    columns = zip(*(result[key] for key in ("reverse_steps", "rate", "rmse")), strict=True)
    rows = [(f"{steps:,}", f"{rate:.5f}", f"{error:.5f}") for steps, rate, error in columns]
    caption = f"{name}: {result['num_images']:,} images, as Ho et al. 2020, Table 4"
    head = ("reverse steps", "rate, bits/dim", "distortion, RMSE")
    return table(caption, head, [rows[n - 1] for n in tenths(len(rows))])


# ---- metrics ---------------------------------------------------------------------------------------


def metrics(found: list[Run]) -> list:
    """Metrics with their manifests."""
    blocks, manifests = tables(found, METRICS), []
    for run in found:
        if not any(score.caption in METRICS for score in scores(run)):
            line = run.command("eval", "--metrics=fid,is", "--num_samples=50000")
            of = f" of {run.name}" if len(found) > 1 else ""
            blocks.append(text(f"FID, Inception Score and others{of}:", "missing", line))
        for name, result in run.results.items() if len(found) == 1 else ():
            if isinstance(result.get("metrics"), dict):
                content = json.dumps(result["metrics"], indent=1, ensure_ascii=False)
                manifests.append(block("fold", [{"kind": "pre", "text": content}], f"{name}.json"))
    return [*blocks, block("fold", manifests, f"Manifests ({len(manifests)})")]


def others(found: list[Run]) -> list:
    """Numbers of results that have no caption here."""
    captions = dict.fromkeys(score.caption for run in found for score in scores(run))
    return tables(found, [c for c in captions if c not in (*METRICS, *CAPTIONS.values())])
