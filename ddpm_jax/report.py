"""A run on one page, from the files in its directory; several runs, beside one another.

    python -m ddpm_jax.main --mode=report --workdir=runs/digits
    python -m ddpm_jax.main --mode=report --workdir=runs/digits,runs/mine

The first writes report.html into the run directory, the second comparison.html into the current directory;
--out names another file. Either opens from disk, without a network. What is there is shown; for what is not, the
command that makes it. No checkpoint is read and no device asked for, so a run can be looked at while it trains.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
import zipfile
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax import page, runs, schedules, writers
from ddpm_jax.ddpm import make_method
from ddpm_jax.page import Curve, Markup, join, number, tag

PREVIEWS = 12  # pictures of training that are shown, spread over it
PICTURES = 12  # of each kind that a command wrote
CURVES = 6  # results in one diagram
SMOOTH = 25  # of a training curve, one part of so many is averaged
KINDS = (
    *("encode", "reconstruct", "interpolate", "denoise", "inpaint", "nearest"),
    *("progressive", "sample", "other"),
)


class Picture(NamedTuple):
    """A picture in a run directory, and what made it."""

    path: str  # of the .png
    kind: str  # of KINDS
    recipe: dict
    numbers: dict[str, np.ndarray]  # of its .npz, the small ones


class Found(NamedTuple):
    """What a run directory holds, but for its parameters."""

    workdir: str  # as it was given
    name: str
    config: ConfigDict
    chain: schedules.Schedule | None  # None if the Method is no diffusion, or not to be had here
    rows: list[dict]  # of metrics.jsonl, at least one
    log: str
    previews: list[tuple[int, str]]  # (step, path), in order
    pictures: list[Picture]
    results: dict[str, dict]  # name of a .json in eval: what it holds

    def command(self, mode: str, *words: str) -> str:
        """The command line of another mode, for this run."""
        given = (f"--mode={mode}", f"--workdir={self.workdir}", *words)
        return f"python -m ddpm_jax.main {shlex.join(given)}"

    def length(self) -> int:
        """T."""
        return 0 if self.chain is None else len(self.chain)

    def of(self, *kinds: str) -> list[Picture]:
        return [picture for picture in self.pictures if picture.kind in kinds]


def report(workdir: str, *, out: str | None = None) -> str:
    """Writes a page about a run, or one that compares several.

    Args:
      workdir: a run directory, or several with commas.
      out: the .html to write; None for report.html in the run directory, or for comparison.html of several
        in the current one.

    Returns:
      the path of the page.

    Raises:
      ConfigError, RunError: no run there, nothing logged yet, or `out` is something else; one line.
    """
    workdir = config_lib.path(workdir)
    one = os.path.isdir(workdir) or "," not in workdir
    parts = [workdir] if one else [part.strip() for part in workdir.split(",")]
    workdirs = [config_lib.path(part) for part in parts if part] or [workdir]
    for n, path in enumerate(workdirs):
        if os.path.realpath(path) in map(os.path.realpath, workdirs[:n]):
            raise runs.RunError(f"{path} is given twice; give each run once")
    if out is not None:
        out = runs.out_path(out, ".html")
    elif len(workdirs) == 1:
        out = os.path.abspath(os.path.join(workdirs[0], "report.html"))
    else:
        out = os.path.abspath("comparison.html")
    check_out(out)
    found = [find(path) for path in workdirs]
    text = of_run(found[0]) if len(found) == 1 else comparison(distinct(found))
    writers.save_text(out, text)
    print(f"{out} ({len(text.encode()) / 1e6:.1f} MB)", flush=True)
    return out


def check_out(out: str) -> None:
    """Refuses to write a page over what is none of ours."""
    if os.path.exists(out):
        with open(out, encoding="utf-8", errors="replace") as file:
            if page.GENERATOR not in file.read(1000):
                raise runs.RunError(f"{out} is no report; choose another --out")


# ---- what is there ---------------------------------------------------------------------------------


def find(workdir: str) -> Found:
    """Reads a run directory.

    Raises:
      RunError, ConfigError: it is none, or nothing is logged yet.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise runs.RunError(
            f"{workdir} is no run directory: it has no config.json; train with this --workdir first, or"
            " check its spelling"
        )
    config = config_lib.load(path)
    rows = writers.read_metrics(os.path.join(workdir, "metrics.jsonl"))
    if not rows:
        raise runs.RunError(
            f"{workdir} has nothing in metrics.jsonl yet; the first line comes after"
            f" {config.training.get('log_every', 100)} steps of training"
        )
    log = ""
    if os.path.exists(os.path.join(workdir, "log.txt")):
        with open(os.path.join(workdir, "log.txt"), encoding="utf-8", errors="replace") as file:
            log = file.read()
    folder, previews, pictures = os.path.join(workdir, "samples"), [], []
    for name in _names(folder):
        path = os.path.join(folder, name)
        preview = re.fullmatch(r"step_(\d+)\.png", name)
        if preview:
            previews.append((int(preview[1]), path))
        elif name.endswith(".png") and not name.endswith(("_trajectory.png", ".tmp.png")):
            pictures.append(_picture(path))
    results, folder = {}, os.path.join(workdir, "eval")
    for name in _names(folder):
        if name.endswith(".json"):
            try:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    results[name[:-5]] = json.load(file)
            except ValueError:  # not ours
                continue
    results = {name: result for name, result in results.items() if isinstance(result, dict)}
    for name in _names(folder):
        if name.endswith(".png") and not name.endswith(".tmp.png"):
            drawn = results.get(name[:-4], {})
            if "curves" not in drawn and "rmse" not in drawn:  # those are drawn anew
                pictures.append(Picture(os.path.join(folder, name), "other", {}, {}))
    name = os.path.basename(os.path.abspath(workdir))
    return Found(workdir, name, config, _chain(config), rows, log, previews, pictures, results)


def _chain(config) -> schedules.Schedule | None:
    """Of the Method, which may have made another than config.schedule says."""
    try:
        diffusion = make_method(config).diffusion
    except (config_lib.ConfigError, ImportError):  # an experiment of another checkout
        return None
    return diffusion and diffusion.schedule


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _picture(path: str) -> Picture:
    """A picture of samples/, with the recipe and the small arrays of the .npz beside it."""
    try:
        with np.load(f"{path[:-4]}.npz") as arrays:  # a member is read when it is asked for
            recipe = json.loads(str(arrays["recipe"]))
            kind = recipe.get("mode") or ("progressive" if "x_0" in arrays else "sample")
            small = [k for k in arrays if k == "t" or k.startswith(("error_", "distance"))]
            numbers = {name: arrays[name] for name in small}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        kind, recipe, numbers = "other", {}, {}
    return Picture(path, kind if kind in KINDS else "other", recipe, numbers)


def distinct(found: list[Found]) -> list[Found]:
    """The same with names that tell them apart: as they were given, where folders are called alike."""
    names = [run.name for run in found]
    return [run._replace(name=run.workdir) if names.count(run.name) > 1 else run for run in found]


# ---- a run -----------------------------------------------------------------------------------------


def of_run(run: Found) -> str:
    """The page of one run."""
    sections = {
        "Training": _training(run),
        "Samples over training": _over_training(run),
        "Schedule": _schedule([run]),
        "Likelihood": _likelihood(run),
        "Samples": _drawn(run),
        "Given images": _given(run),
        "Nearest neighbours": _nearest(run),
        "Metrics": _metrics(run),
        "Other results": _others(run),
        "Config": _config(run),
        "Versions": _versions(run),
    }
    sections = {word: inside for word, inside in sections.items() if inside}
    return page.document(run.name, _lead(run), page.tiles(_facts(run)), sections, _foot(run))


def _foot(run: Found) -> Markup:
    when = f"Written {time.strftime('%Y-%m-%d %H:%M')}. The same command renews it: "
    return join([when, page.command(run.command("report"))])


def _bounds(run: Found) -> list[dict]:
    """The results of nll, the one of most steps and images first."""
    needed = {"curves", "total", "recipe", "num_images"}
    found = [result for result in run.results.values() if needed <= result.keys()]
    return sorted(found, key=lambda r: (-len(r["curves"]["timesteps"]), -r["num_images"]))


def _lead(run: Found) -> str:
    data = run.config.get("data", {})
    shape = data.get("image_shape")
    parts = [data.get("name"), shape and "×".join(map(str, shape)), run.config.get("method")]
    return " · ".join(str(part) for part in parts if part)


def _facts(run: Found) -> dict[str, str]:
    last = run.rows[-1]
    total = run.config.training.get("num_steps")
    unfinished = total and last["step"] < total
    facts = {"step": f"{last['step']:,}" + (f" of {total:,}" if unfinished else "")}
    if "loss" in last:
        facts["loss"] = number(last["loss"])
    parameters = re.findall(r"([\d,]+) parameters; compiled", run.log)
    if parameters:
        facts["parameters"] = parameters[-1]
    if "images_per_second" in last:
        facts["images/s"] = number(last["images_per_second"])
    for result in _bounds(run)[:1]:
        facts["bits/dim"] = page.plus_minus(result["total"], result.get("total_stderr"))
    for name, cells in _measured(run).items():
        own = [entry["mean"] for _, steps, entry in cells if steps]  # not of images from elsewhere
        if "fid" in name and own:
            facts[f"{name}{', the best' if len(own) > 1 else ''}"] = number(min(own))
    return facts


def _column(run: Found, name: str):
    """Steps and values of one number of metrics.jsonl, where it is finite."""
    points = [(row["step"], row[name]) for row in run.rows if _is_number(row.get(name))]
    return np.array(points, np.float64).reshape(-1, 2).T


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and np.isfinite(value)


NORMS = {"grad_norm": "gradient norm", "param_norm": "parameter norm", "update_norm": "update norm"}
TITLES = NORMS | {"learning_rate": "learning rate", "images_per_second": "images/s"}
TITLES |= {"ema_decay": "EMA decay"}


def _smoothed(name: str, run: Found, column: str) -> Curve:
    x, y = _column(run, column)
    window = len(y) // SMOOTH
    return Curve(name, x, y, writers.moving_average(y, window) if window > 1 else None)


def _training(run: Found) -> Markup:
    names = dict.fromkeys(name for row in run.rows for name in row if name != "step")
    quarters = [f"loss_t{q}" for q in (1, 2, 3, 4) if f"loss_t{q}" in names]
    known = ["loss", *quarters, *TITLES]
    charts = [page.chart("loss", [_smoothed("loss", run, "loss")], x_label="step")]
    nth = {"1": "1st", "2": "2nd", "3": "3rd", "4": "4th"}
    of_t = [_smoothed(nth[name[-1]], run, name) for name in quarters]
    charts += [page.chart("loss by quarter of t", of_t, x_label="step")]
    for name in [*(n for n in names if n not in known), *(n for n in TITLES if n in names)]:
        x, y = _column(run, name)
        scale = None if name in NORMS else "linear"
        curves = [Curve(TITLES.get(name, name), x, y)]
        charts += [page.chart(TITLES.get(name, name), curves, x_label="step", y_scale=scale)]
    rows = []
    for name in names:
        x, y = _column(run, name)
        if len(y):
            rows += [(name, *(number(float(v)) for v in (y[0], y.min(), y.max(), y[-1])))]
    last = run.rows[-1]["step"]
    caption = f"metrics.jsonl, {len(run.rows):,} lines up to step {last:,}"
    head = ("", "first", "lowest", "highest", "last")
    text = f"Faint: as logged; bold: averaged over {100 // SMOOTH} % of the lines of metrics.jsonl."
    faint = len(run.rows) >= 2 * SMOOTH
    return join(
        [
            page.side_by_side(*charts, kind="charts"),
            tag("p", text, class_="quiet") if faint else None,
            page.fold("All numbers", page.table(caption, head, rows)),
        ]
    )


def _over_training(run: Found) -> Markup:
    every = run.config.get("preview", {}).get("every")
    if not run.previews:
        return page.missing(f"No picture yet; training draws one every {number(every)} steps.")
    shown = _spread(run.previews, PREVIEWS)
    cards = []
    for step, path in shown:
        alt = f"Samples after step {step:,}: raw parameters above, their moving average (EMA) below"
        cards.append(page.picture(path, f"step {step:,}", alt))
    text = "Raw parameters above, EMA below, all from the same noise."
    if len(shown) < len(run.previews):
        text += f" {len(shown)} of {len(run.previews)} pictures in samples/."
    return join([tag("p", text, class_="quiet"), page.side_by_side(*cards)])


def _spread(items: list, count: int) -> list:
    """At most `count` of them, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[k] for k in np.round(np.linspace(0, len(items) - 1, count)).astype(int)]


def _schedule(found: list[Found]) -> Markup | None:
    """The chains of one run or of several, in one diagram each of β, ᾱ and SNR."""
    found = [run for run in found if run.chain is not None]
    if not found:
        return None
    alone = len(found) == 1
    if all(np.array_equal(run.chain.beta, found[0].chain.beta) for run in found):
        found = found[:1]
    charts = []
    for title, name, scale in (
        ("β", "beta", "linear"),
        ("ᾱ", "alpha_bar", "linear"),
        ("SNR = ᾱ / (1 − ᾱ)", "snr", "log"),
    ):
        names = [run.name for run in found] if len(found) > 1 else [title[:3]]
        curves = [
            Curve(label, range(run.length()), getattr(run.chain, name))
            for label, run in zip(names, found, strict=True)
        ]
        charts.append(page.chart(title, curves, x_label="t", y_scale=scale))
    lines = []
    for run in found:
        health = schedules.health(run.chain)
        text = (
            f"T = {run.length():,}; ᾱ at the end {health.alpha_bar_T:.3g} (Σβ = {health.sum_beta:.4g} bounds"
            f" it by {health.alpha_bar_bound:.3g}), which leaves a prior term of at most {health.prior_bits_per_dim:.2g} bits/dim."
        )
        lines.append(tag("p", f"{run.name}: {text}" if len(found) > 1 else text))
    forward, picture = os.path.join(found[0].workdir, "forward.png"), None
    if alone and os.path.exists(forward):
        title = "The forward process: data on the left, then x_t up to t = T − 1"
        picture = page.picture(forward, title, title, kind="strip")
    return join([*lines, page.side_by_side(*charts, kind="charts"), picture])


# ---- likelihood ------------------------------------------------------------------------------------


def _likelihood(run: Found) -> Markup:
    bounds, results = _bounds(run), run.results.values()
    curves = [result for result in results if {"rate", "rmse", "num_images"} <= result.keys()]
    best = [result for result in results if "even_steps" in result]
    steps = f"--steps={min(50, -(-run.length() // 2))}"
    nothing = {
        "The bound on −log p(x_0), term by term:": not bounds and run.command("nll"),
        "Rate and distortion:": not curves and run.command("rate_distortion"),
        "The best steps of a shortened chain:": not best and run.command("best_steps", steps),
    }
    return join(
        [
            _bound(bounds) if bounds else None,
            _rate_distortion(curves) if curves else None,
            _best(best) if best else None,
            *(page.missing(what, line) for what, line in nothing.items() if line and run.chain),
        ]
    )


def _best(results: list[dict]) -> Markup:
    rows = []
    for result in results:
        name = f"{len(result['steps'])} of {result['num_timesteps']:,}"
        names = ("best", "even", "gain")
        cells = (page.plus_minus(result[n], result.get(f"{n}_stderr")) for n in names)
        rows.append((name, *cells, number(result["num_images"])))
    head = ("steps", "chosen", "evenly spaced", "gain", "images")
    return page.table("The best steps of a shortened chain, bits/dim", head, rows)


def _bound(results: list[dict], names: list[str] | None = None) -> Markup:
    """The bound of several chains or variances, or of runs with names: a table, and its terms over t."""
    said = [_said_of_bound(result) for result in results]
    if names:
        said = [{"run": name} | words for name, words in zip(names, said, strict=True)]
    common, labels = _labels(said)
    rows, curves = [], {"terms": [], "x_0_error": [], "eps_error": []}
    for label, result in zip(labels, results, strict=True):
        cells = [
            page.plus_minus(result[name], result.get(f"{name}_stderr")) if name in result else "–"
            for name in ("total", "L_T", "L_0")
        ]
        rows.append((label, *cells))
        t = np.asarray(result["curves"]["timesteps"])
        for name, lines in curves.items():
            if name in result["curves"] and len(lines) < CURVES:
                y = np.array([np.nan if v is None else v for v in result["curves"][name]])
                y = 127.5 * np.sqrt(y) if name == "x_0_error" else y
                lines.append(Curve(label, t + (name == "terms"), y))
    scales = {"x_scale": "log", "y_scale": "log"}
    charts = [
        page.chart("L_t, bits/dim", curves["terms"], x_label="t + 1", **scales),
        page.chart("RMSE of x̂_0, 0 … 255", curves["x_0_error"], x_label="t", y_scale="linear"),
        page.chart("squared error of ε̂", curves["eps_error"], x_label="t"),
    ]
    caption = "Bound on −log p(x_0), bits/dim, ± the standard error over images"
    caption += f": {common}" if common else ""
    head = ("", "total", "L_T", "L_0")
    return join([page.table(caption, head, rows), page.side_by_side(*charts, kind="charts")])


def _said_of_bound(result: dict) -> dict[str, str]:
    steps = {"steps": result["recipe"].get("steps") or len(result["curves"]["timesteps"])}
    return _settings(result["recipe"] | steps) | {"count": f"{result['num_images']:,} images"}


def _rate_distortion(results: list[dict]) -> Markup:
    result = max(results, key=lambda one: one["num_images"])
    steps, rate, rmse = (result[name] for name in ("reverse_steps", "rate", "rmse"))
    charts = [
        page.chart(title, [Curve(title, x, y)], x_label=x_label, y_scale="linear")
        for title, x_label, x, y in (
            ("distortion, RMSE", "rate, bits/dim", rate, rmse),
            ("distortion, RMSE", "reverse steps", steps, rmse),
            ("rate, bits/dim", "reverse steps", steps, rate),
        )
    ]
    S = len(steps)
    rows = sorted({max(1, round(S * tenth / 10)) for tenth in range(1, 11)}, reverse=True)
    cells = [(f"{steps[n - 1]:,}", f"{rate[n - 1]:.5f}", f"{rmse[n - 1]:.5f}") for n in rows]
    head = ("reverse steps", "rate, bits/dim", "distortion, RMSE")
    caption = f"Rate and distortion of {result['num_images']:,} images, as Ho et al. 2020, Table 4"
    return join(
        [
            tag("h3", "Rate and distortion"),
            page.side_by_side(*charts, kind="charts"),
            page.fold("As a table", page.table(caption, head, cells)),
        ]
    )


# ---- pictures --------------------------------------------------------------------------------------


def _drawn(run: Found) -> Markup:
    drawn = run.of("sample")
    parts = []
    if drawn:
        parts.append(_cards(drawn, "Samples"))
    else:
        parts.append(page.missing("Samples of the last checkpoint:", run.command("sample")))
    on_the_way, chains = [], []
    for one in run.of("progressive")[-PICTURES:]:
        t = ", ".join(str(v) for v in one.numbers.get("t", ()))
        alt = f"What the model takes each of its images for, from left to right at t = {t}"
        on_the_way.append(_strip(one, alt, f"t = {t}"))
    trajectories = [one for one in drawn if os.path.exists(f"{one.path[:-4]}_trajectory.png")]
    for one in trajectories[-PICTURES:]:
        path = f"{one.path[:-4]}_trajectory"
        alt = "The chain of samples from noise to image: x_t above, the x̂_0 seen from it below"
        chains.append(_strip(one._replace(path=f"{path}.png"), alt, "x_t above, x̂_0 below"))
        if os.path.exists(f"{path}.gif"):
            alt = "The same chain, animated: x_t on the left, x̂_0 on the right"
            chains.append(page.fold("Animation", _strip(one._replace(path=f"{path}.gif"), alt)))
    steps = f"--steps={min(50, run.length())}"
    line = run.command("sample", "--sampler=ddim", steps, "--trajectory")
    wanted = {
        "x̂_0 as seen on the way": (on_the_way, run.command("progressive")),
        "The chain, as a strip and an animation": (chains, line),
    }
    return join([*parts, _pairs(run, wanted)])


def _pairs(run: Found, wanted: dict[str, tuple[list, str]]) -> Markup:
    """{title: (what is shown of it, its command)}: in columns, and below what a diffusion misses."""
    blocks = [tag("div", tag("h3", title), *shown) for title, (shown, _) in wanted.items() if shown]
    quiet = [page.missing(f"{k}:", line) for k, (shown, line) in wanted.items() if not shown]
    blocks = [page.side_by_side(*blocks, kind="pairs")] if blocks else []
    return join(blocks + (quiet if run.chain else []))


def _cards(pictures: list[Picture], what: str) -> Markup:
    """Pictures beside one another, each with what makes it different; below, what they have in common."""
    pictures = sorted(pictures, key=_order)
    common, labels = _labels([_settings(one.recipe) for one in pictures])
    shown = _spread(list(zip(labels, pictures, strict=True)), PICTURES)
    cards = [page.picture(one.path, label, f"{what}: {label}") for label, one in shown]
    text = f"All: {common}." if common else ""
    if len(shown) < len(pictures):
        text += f" {len(shown)} of {len(pictures)} pictures in samples/."
    return join([page.side_by_side(*cards), tag("p", text, class_="quiet") if text else None])


def _order(picture: Picture):
    """By step, then sampler and its settings, then the number of steps."""
    recipe = picture.recipe
    words = [str(recipe.get(name)) for name in ("sampler", "order", "spacing", "eta")]
    return int(recipe.get("step", 0)), words, _count(recipe.get("steps")), picture.path


def _count(steps) -> float:
    """A number of steps to sort by; what is no plain number comes last."""
    first = str(steps).split(" ")[0]
    return int(first) if first.isdecimal() else float("inf")


def _strip(picture: Picture, alt: str, *about: str) -> Markup:
    text = "; ".join([*about, ", ".join(_settings(picture.recipe).values())])
    return page.picture(picture.path, text, alt, kind="strip")


# Of each command on given images: its title, and what its picture shows.
GIVEN = {
    "interpolate": (
        "Interpolation",
        "Rows of images, from one on the left to another on the right",
    ),
    "reconstruct": ("Encoded and decoded", "Images, below them the same encoded and decoded"),
    "encode": ("Encoded", "Images above, below them the latents x_T that they are encoded to"),
    "denoise": (
        "Noise added and taken away",
        "Images, with noise up to a time, denoised from there",
    ),
    "inpaint": ("Filled in", "Images; what is kept of them; the rest filled in"),
}


def _given(run: Found) -> Markup:
    T, wanted = run.length(), {}
    steps = ",".join(str(S) for S in (10, 20, 50, 100) if S <= T) or str(T)
    times = f"--from_t={','.join(str(t) for t in sorted({T // 4, T // 2}))}"
    needs = {"reconstruct": [f"--steps={steps}"], "denoise": [times], "inpaint": ["--mask=left"]}
    for kind, (title, alt) in GIVEN.items():
        shown = []
        for one in run.of(kind)[-PICTURES:]:
            shown += [_strip(one, alt), _reconstruction(one) if kind == "reconstruct" else None]
        wanted[title] = shown, run.command(kind, *needs.get(kind, ()))
    return _pairs(run, wanted)


def _reconstruction(picture: Picture) -> Markup | None:
    """Song et al. 2021, Table 2: the error of encoding and decoding in S steps."""
    errors = {
        name.removeprefix("error_"): values.astype(np.float64)
        for name, values in picture.numbers.items()
        if name.startswith("error_")
    }
    if not errors:
        return None
    cells = []
    for values in errors.values():
        spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
        cells.append(page.plus_minus(float(values.mean()), spread))
    count = len(next(iter(errors.values())))
    caption = f"Mean squared error of a pixel on 0 … 1, ± the standard error over {count} images"
    return page.table(caption, ("S", *errors), [("error", *cells)])


def _nearest(run: Found) -> Markup:
    pictures = run.of("nearest")
    if not pictures:
        return page.missing("The training images nearest to samples:", run.command("nearest"))
    parts = []
    for one in pictures[-PICTURES:]:
        text = []
        for name, what in (("distance", "samples"), ("distance_of_test", "test images")):
            if name in one.numbers:
                values = np.asarray(one.numbers[name], np.float64)
                values = values[:, 0] if values.ndim == 2 else values
                text.append(f"of {what} {number(float(values.mean()))}")
        text = f"distance to the nearest (RMSE on 0 … 255, mean): {', '.join(text)}"
        alt = "A sample on the left of each row, then the training images nearest to it"
        settings = one._replace(recipe=one.recipe.get("of", {}))
        parts.append(_strip(settings, alt, text))
    return join(parts)


def _others(run: Found) -> Markup | None:
    """Pictures and results of commands that are not this program's own."""
    parts = []
    for name, result in run.results.items():
        errors = [key for key in result if key.endswith("_stderr")]
        names = [key[: -len("_stderr")] for key in errors]
        if {"curves", "even_steps", "metrics"} & result.keys() or not names:
            continue
        rows = [
            (key, page.plus_minus(result[key], result[f"{key}_stderr"]))
            for key in names
            if _is_number(result.get(key))
        ]
        parts.append(page.table(f"{name}.json", ("", "mean ± standard error"), rows))
    for one in run.of("other")[:PICTURES]:
        name = os.path.basename(one.path)
        parts.append(page.picture(one.path, name, f"The picture {name}", kind="strip"))
    return join(parts) if parts else None


# ---- metrics ---------------------------------------------------------------------------------------

# What moved a result, in the order and the words in which it is said.
SAID = {
    "images": "{}",
    "data": "{}",
    "split": "{}",
    "sampler": "{}",
    "order": "order {}",
    "steps": "{} steps",
    "spacing": "{} spacing",
    "eta": "η\u00a0=\u00a0{}",
    "variance": "variance {}",
    "cdf": "{} cdf",
    "guidance": "guidance {}",
    "labels": "labels {}",
    "from_t": "from t = {}",
    "neighbours": "{} neighbours",
    "weights": "{} weights",
    "step": "step {:,}",
    "seed": "seed {}",
}


def _settings(recipe: dict) -> dict[str, str]:
    """{name: words} of what moved a result."""
    result = {}
    for name, words in SAID.items():
        value = recipe.get(name)
        if name == "steps":
            value = _steps(recipe)
        if value is None or (name == "guidance" and value == 1) or value == [None]:
            continue
        if name == "eta" and value == "hat":
            words = "σ̂"
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if not isinstance(value, int):
            words = words.replace(":,", "")
        result[name] = words.format(value)
    if recipe.get("clip_x0") is False:
        result["clip_x0"] = "x̂_0 not clipped"
    return result


def _steps(recipe: dict) -> str | None:
    """50, "50 (0, 20, 41 …)" of a list of times, "all", or None where there is no chain."""
    steps = recipe.get("steps")
    if isinstance(steps, str) and steps.startswith("["):
        times = steps.strip("[]").split(",")
        return f"{len(times)} ({', '.join(times[:3])} …)"
    if isinstance(steps, list):
        return ", ".join(map(str, steps))
    return str(steps) if steps is not None else "all" if "sampler" in recipe else None


def _labels(said: list[dict[str, str]]) -> tuple[str, list[str]]:
    """What all have in common, and what is left of each."""
    common = {
        name: words
        for name, words in said[0].items()
        if len(said) > 1 and all(other.get(name) == words for other in said)
    }
    rest = [", ".join(w for name, w in one.items() if name not in common) for one in said]
    return ", ".join(common.values()), [words or "the same" for words in rest]


def _measured(run: Found) -> dict[str, list[tuple[dict, object, dict]]]:
    """{metric: [(settings but for the steps, steps, entry), …]} of all manifests in eval.

    The steps are None of images that were made elsewhere.
    """
    measured = {}
    for result in run.results.values():
        entries = result.get("metrics")
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if "manifest" not in entry:
                continue
            manifest = entry["manifest"]
            made = manifest.get("generated", manifest)
            seeds = [str(seed) for seed in entry["seeds"] if seed is not None]
            settings = _settings(made | {"seed": ", ".join(seeds) or None})
            settings.pop("steps", None)
            steps = _steps(made)
            count = manifest.get("num_generated", manifest.get("num_images"))
            settings["count"] = f"{count:,} images"
            if manifest.get("features"):
                features = manifest["features"]
                settings["features"] = f"features {features['name']} {features['sha256'][:8]}"
            if manifest.get("reference"):
                origin = manifest["reference"]
                against = f"{origin['num_images']:,} of {origin['data']}/{origin['split']}"
                settings["reference"] = f"against {against}"
            measured.setdefault(name, []).append((settings, steps, entry))
    return measured


def _evaluate(run: Found) -> str:
    return run.command("eval", "--metrics=fid,is", "--num_samples=50000")


def _value(entry: dict) -> str:
    return page.plus_minus(entry["mean"], entry.get("std"))


def _metrics(run: Found) -> Markup:
    measured = _measured(run)
    if not measured:
        return page.missing("FID, Inception Score, others, with their manifests:", _evaluate(run))
    parts, single, elsewhere = [], [], []
    for name, cells in measured.items():
        own = [(name, *cell) for cell in cells if cell[1] is not None]
        elsewhere += [(name, *cell) for cell in cells if cell[1] is None]
        if len(own) > 1:
            parts.append(_by_steps(name, [cell for _, *cell in own]))
        else:
            single += own
    parts += [_list("Metrics of samples", single), _list("Metrics of other images", elsewhere)]
    manifests = []
    for name, result in run.results.items():
        if isinstance(result.get("metrics"), dict):
            told = {key: entry.get("manifest") for key, entry in result["metrics"].items()}
            text = json.dumps(told, indent=1, ensure_ascii=False)
            manifests.append(page.fold(f"{name}.json", tag("pre", text, tabindex="0")))
    parts.append(page.fold(f"Manifests ({len(manifests)})", *manifests))
    return join(parts)


def _list(caption: str, cells) -> Markup | None:
    """A metric in each row."""
    if not cells:
        return None
    said = [of | ({"steps": f"{steps} steps"} if steps else {}) for _, of, steps, _ in cells]
    common, labels = _labels(said)
    alike = set(labels) == {"the same"}
    rows = [
        (name, _value(entry), *(() if alike else (label,)))
        for (name, _, _, entry), label in zip(cells, labels, strict=True)
    ]
    head = ("", "value") if alike else ("", "value", "of")
    return page.table(f"{caption}: {common}" if common else caption, head, rows)


def _by_steps(name: str, cells) -> Markup:
    """A metric with the number of steps across and what else differs down, as Song et al. 2021, Table 1."""
    common, labels = _labels([settings for settings, _, _ in cells])
    columns = sorted({steps for _, steps, _ in cells}, key=lambda s: (_count(s), str(s)))
    rows = {}
    for label, (_, steps, entry) in zip(labels, cells, strict=True):
        row = rows.setdefault(label, {})
        row[steps] = f"{row[steps]}; {_value(entry)}" if steps in row else _value(entry)
    label = "number of steps"
    head = (label if len(columns) > 1 else "", *map(str, columns))
    body = [(label, *(row.get(steps, "") for steps in columns)) for label, row in rows.items()]
    if list(rows) == ["the same"]:
        body = [(name, *body[0][1:])]
    return page.table(f"{name}: {common}" if common else name, head, body)


# ---- config and versions ---------------------------------------------------------------------------


def _config(run: Found) -> Markup:
    groups = {}
    for field, (_, value) in config_lib.differences(ConfigDict(), run.config).items():
        section, _, name = field.removeprefix("config.").rpartition(".")
        groups.setdefault(section, {})[name] = _shown(value)
    blocks = [
        tag("div", tag("h3", section or "config"), page.fields(values))
        for section, values in sorted(groups.items())
    ]
    preview = os.path.join(run.workdir, "data_preview.png")
    text = re.findall(r"  (\S+/\S+: \d+ images .*)", run.log)
    parts = [tag("div", *blocks, class_="groups")]
    if os.path.exists(preview):
        alt = "The first training images, as the network is shown them"
        picture = page.picture(preview, text[-1] if text else "training images", alt, kind="strip")
        parts += [tag("h3", "The data"), picture]
    return join(parts)


def _shown(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {None: "none", config_lib.MISSING: "–"}.get(value, str(value))


def _versions(run: Found) -> Markup:
    banners = re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d):\d\d  (Python .*)$", run.log, re.MULTILINE)
    first = {}
    for when, banner in banners:
        first.setdefault(banner, when)
    lines = [tag("p", f"From {when}: {banner}") for banner, when in first.items()]
    if not lines:
        lines = [page.missing("No log.txt with the versions that trained this run.")]
    warnings = dict.fromkeys(re.findall(r"WARNING: .*", run.log))
    lines += [tag("p", line, class_="warning") for line in warnings]
    return join(lines)


# ---- several runs ----------------------------------------------------------------------------------


def comparison(found: list[Found]) -> str:
    """The page of several runs."""
    sections = {
        "Training": _losses(found),
        "Config": _differing(found),
        "Schedule": _schedule(found),
        "Likelihood": _best_bounds(found),
        "Metrics": _metrics_of(found),
        "Samples": _last_pictures(found),
        "Numbers": _last_rows(found),
    }
    sections = {word: inside for word, inside in sections.items() if inside}
    foot = _foot(found[0]._replace(workdir=",".join(run.workdir for run in found)))
    names = [run.name for run in found]
    facts = page.tiles({run.name: f"step {run.rows[-1]['step']:,}" for run in found})
    lead = f"{len(found)} runs, {'; '.join(dict.fromkeys(map(_lead, found)))}"
    return page.document(f"{', '.join(names[:-1])} and {names[-1]}", lead, facts, sections, foot)


KIND_OF_LOSS = ("config.method", "config.data.", "config.diffusion.", "config.schedule.")


def differing(found: list[Found]) -> dict[str, list]:
    """{"config.model.channels": [value of each run], …} of the fields that are not the same in all."""
    pairs = [config_lib.differences(found[0].config, run.config) for run in found]
    names = sorted({field for pair in pairs for field in pair})
    values = {}
    for name in names:
        own = next(pair[name][0] for pair in pairs if name in pair)
        values[name] = [pair[name][1] if name in pair else own for pair in pairs]
    return values


def _losses(found: list[Found]) -> Markup:
    charts = []
    for column in ("loss", "grad_norm", *(f"loss_t{q}" for q in (1, 2, 3, 4)), "images_per_second"):
        holders = [run for run in found if any(column in row for row in run.rows)]
        curves = [_smoothed(run.name, run, column) for run in holders]
        title = f"loss, quarter {column[-1]} of t" if column.startswith("loss_t") else column
        charts.append(page.chart(TITLES.get(column, title), curves, x_label="step"))
    moved = [name for name in differing(found) if name.startswith(KIND_OF_LOSS)]
    moved = [
        name for name in moved if not name.endswith(("data_dir", "memory_limit_gb", "clip_x0"))
    ]
    names = ", ".join(moved[:3]) + (f" and {len(moved) - 3} others" if len(moved) > 3 else "")
    text = f"The losses need not mean the same: the runs differ in {names}."
    note = tag("p", text, class_="warning") if moved else None
    return join([note, page.side_by_side(*charts, kind="charts")])


def _differing(found: list[Found]) -> Markup:
    values = differing(found)
    if not values:
        return page.missing("The configs are the same.")
    rows = [(name, *map(_shown, row)) for name, row in values.items()]
    return page.table("Fields that differ", ("field", *(run.name for run in found)), rows)


def _best_bounds(found: list[Found]) -> Markup | None:
    """Of each run the bound of most steps and images."""
    bounds = {run.name: _bounds(run)[0] for run in found if _bounds(run)}
    return _bound(list(bounds.values()), list(bounds)) if bounds else None


def _metrics_of(found: list[Found]) -> Markup:
    rows = {}  # (name, settings, steps): {which run: value}
    for n, run in enumerate(found):
        cells = [
            (name, settings, steps and f"{steps} steps", entry)
            for name, cells in _measured(run).items()
            for settings, steps, entry in cells
        ]
        for result in _bounds(run):
            mean, spread = result["total"], result.get("total_stderr")
            said = _said_of_bound(result)
            cells.append(("bits/dim", said, said.pop("steps"), {"mean": mean, "std": spread}))
        for name, settings, steps, entry in cells:
            words = ", ".join(words for key, words in settings.items() if key != "step")
            rows.setdefault((name, words, steps), {})[n] = _value(entry)
    rows = dict(sorted(rows.items(), key=lambda row: (*row[0][:2], _count(row[0][2]))))

    def table(caption, which):
        body = []
        for (name, words, steps), row in which.items():
            words = f"{words}, {steps}" if steps else words
            about = tag("span", words, class_="quiet")
            cells = (row.get(n, "–") for n in range(len(found)))
            body.append((join([name, tag("br"), about]), *cells))
        return page.table(caption, ("", *(run.name for run in found)), body)

    shared, alone = ({k: r for k, r in rows.items() if (len(r) > 1) == b} for b in (True, False))
    parts = [table("Measured in the same way", shared)] if shared else []
    if alone:
        title = f"Measured of one run only ({len(alone)})"
        parts.append(page.fold(title, table(title, alone)))
    for run in found:
        if not _measured(run):
            parts.append(page.missing(f"Metrics of samples of {run.name}:", _evaluate(run)))
    return join(parts)


def _last_pictures(found: list[Found]) -> Markup:
    parts = []
    for run in found:
        if run.previews:
            step, path = run.previews[-1]
            alt = f"Samples of {run.name} after step {step:,}: raw parameters above, EMA below"
            parts.append(page.picture(path, f"{run.name}, step {step:,}", alt))
        else:
            parts.append(page.missing(f"{run.name} has drawn no picture yet."))
    text = "The last picture of training: raw parameters above, EMA below."
    return join([tag("p", text, class_="quiet"), page.side_by_side(*parts, kind="cards large")])


def _last_rows(found: list[Found]) -> Markup:
    names = dict.fromkeys(name for run in found for name in run.rows[-1])
    rows = [(name, *(number(run.rows[-1].get(name)) for run in found)) for name in names]
    head = ("", *(run.name for run in found))
    return page.table("The last line of each metrics.jsonl", head, rows)
