"""The page of one run, or of several compared, as plain data."""

from __future__ import annotations

import os
import re
import time

import numpy as np
from ml_collections import ConfigDict

from ddpm_jax.commands.report import results, words
from ddpm_jax.commands.report.blocks import block, chart_block, figure, table, text
from ddpm_jax.commands.report.charts import Curve, chart
from ddpm_jax.commands.report.find import Picture, Run
from ddpm_jax.commands.report.words import is_number, number, plus_minus
from ddpm_jax.files import config as config_lib
from ddpm_jax.process import terminal
from ddpm_jax.stats import mean_and_error

PICTURES = 12  # maximum number of pictures of one kind
PARTS = 25  # training curves are averaged over 1/PARTS of their points
TITLES = {
    "grad_norm": "gradient norm",
    "param_norm": "parameter norm",
    "update_norm": "update norm",
    "learning_rate": "learning rate",
    "images_per_second": "images/s",
    "ema_decay": "EMA decay",
}
LINEAR = ("learning_rate", "images_per_second", "ema_decay")  # never drawn on a log scale
# Prefixes of the fields that change the meaning of the loss, and suffixes of the exceptions.
LOSS_FIELDS = ("config.method", "config.data.", "config.diffusion.", "config.schedule.")
OTHER_FIELDS = ("data_dir", "memory_limit_gb", "clip_x0")
PREVIEW = "samples after step {:,}: raw parameters above, their moving average (EMA) below"
GIVEN, NEAREST = "Given images", "Nearest neighbours"
# Section, title and description of each mode's pictures. Those of other modes are in "Other results".
MODES = {
    "progressive": ("Samples", "x̂_0 along the way", "predictions of x_0, left to right in time"),
    "trajectory": ("Samples", "The chain from noise to image", "x_t above, predicted x_0 below"),
    "interpolate": (GIVEN, "Interpolation", "rows of images, from one end to the other"),
    "reconstruct": (GIVEN, "Encoded and decoded", "images; below, encoded and decoded"),
    "encode": (GIVEN, "Encoded", "images; below, their latents x_T"),
    "denoise": (GIVEN, "Noise added and removed", "images, noised up to a time, denoised"),
    "inpaint": (GIVEN, "Inpainted", "images, the part that is kept, the rest inpainted"),
    "nearest": (NEAREST, "Training images nearest to samples", "a sample on the left"),
}


def page(found: list[Run]) -> dict:
    """The page of one or several runs; runs in folders of the same name are called by their paths."""
    names = [run.name for run in found]
    found = [r._replace(name=r.workdir) if names.count(r.name) > 1 else r for r in found]
    names, run, several = [run.name for run in found], found[0], len(found) > 1
    sections = {
        "Training": training(found),
        "Fields that differ": _differing(found),
        "Samples over training": _previews(found),
        "Schedule": schedule(found),
        "Likelihood": results.likelihood(found),
        **dict.fromkeys(("Samples", GIVEN, NEAREST), ()),
        "Metrics": results.metrics(found),
        "Other results": results.others(found),
    }
    for name, blocks in () if several else _of_one_run(run).items():
        sections[name] = [*sections.get(name, ()), *blocks]
    sections = {name: [block for block in blocks if block] for name, blocks in sections.items()}
    lead = "; ".join(dict.fromkeys(map(_lead, found)))
    steps = {one.name: f"step {one.rows[-1]['step']:,}" for one in found}
    together = run._replace(workdir=",".join(one.workdir for one in found))
    return {
        "title": f"{', '.join(names[:-1])} and {names[-1]}" if several else run.name,
        "lead": f"{len(found)} runs, {lead}" if several else lead,
        "facts": steps if several else _facts(run),
        "sections": {name: blocks for name, blocks in sections.items() if blocks},
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "command": together.command("report"),
    }


def _of_one_run(run: Run) -> dict[str, list]:
    """Sections that a comparison leaves out."""
    return {
        "Samples": [*_samples(run), *_pictures(run, "Samples")],
        GIVEN: _pictures(run, GIVEN),
        NEAREST: _pictures(run, NEAREST),
        "Other results": _other_pictures(run),
        "Config": _config(run),
        "Versions": _versions(run),
    }


def _lead(run: Run) -> str:
    """Data set, shape and Method in one line."""
    data = run.config.get("data", {})
    shape = "×".join(map(str, data.get("image_shape") or ()))
    return " · ".join(str(p) for p in (data.get("name"), shape, run.config.get("method")) if p)


def _facts(run: Run) -> dict[str, str]:
    """The numbers at the top of the page."""
    last, total = run.rows[-1], run.config.training.get("num_steps")
    of = f" of {total:,}" if total and last["step"] < total else ""
    facts = {"step": f"{last['step']:,}{of}"}
    facts |= {"loss": number(last["loss"])} if "loss" in last else {}
    parameters = re.findall(r"([\d,]+) parameters; compiled", run.log)
    facts |= {"parameters": parameters[-1]} if parameters else {}
    speed = last.get("images_per_second")
    facts |= {"images/s": number(speed)} if speed else {}
    for result in results.bounds(run)[:1]:
        facts["bits/dim"] = plus_minus(result["total"], result.get("total_stderr"))
    fid = {}
    for score in results.scores(run):
        if "fid" in score.name and score.caption == results.METRICS[0]:
            fid.setdefault(score.name, []).append(score.mean)
    return facts | {f"{k}, the best" if len(v) > 1 else k: number(min(v)) for k, v in fid.items()}


# ---- training --------------------------------------------------------------------------------------


def _logged(run: Run, name: str, label: str) -> Curve:
    """A column of metrics.jsonl over steps."""
    points = [(row["step"], row[name]) for row in run.rows if is_number(row.get(name))]
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return Curve(label, x, y, max(1, len(y) // PARTS) if name.startswith("loss") else 1)


def training(found: list[Run]) -> list:
    """Charts of everything logged. The loss by quarter of t is one chart for one run."""
    names = list(dict.fromkeys(name for run in found for row in run.rows for name in row))
    quarters = [name for name in names if name.startswith("loss_t")]
    others = [name for name in names if name not in ("step", "loss", *quarters, *TITLES)]
    charts = [chart("loss", [_logged(run, "loss", run.name) for run in found])]
    if len(found) == 1:
        curves = [_logged(found[0], name, f"quarter {name[-1]}") for name in quarters]
        charts.append(chart("loss by quarter of t", curves))
        quarters = []
    for name in (*quarters, *others, *(name for name in TITLES if name in names)):
        title = f"loss, quarter {name[-1]} of t" if name in quarters else TITLES.get(name, name)
        curves = [_logged(run, name, run.name) for run in found]
        charts.append(chart(title, curves, y_scale="linear" if name in LINEAR else None))
    note = f"Faint: as logged; bold: averaged over {100 // PARTS} % of the lines of metrics.jsonl."
    faint = any(len(run.rows) >= 2 * PARTS for run in found)
    lines = ", ".join(f"{len(run.rows):,} to step {run.rows[-1]['step']:,}" for run in found)
    numbers = chart_block(charts, caption=f"Lines of metrics.jsonl: {lines}")
    fields = [name for name in _differences(found) if name.startswith(LOSS_FIELDS)]
    fields = [name for name in fields if not name.endswith(OTHER_FIELDS)]
    differ = ", ".join(fields[:3]) + (f" and {len(fields) - 3} others" if fields[3:] else "")
    warning = f"The losses may not be comparable: the runs differ in {differ}." if fields else ""
    return [text(warning, "warning"), *numbers, text(note if faint else "")]


def _previews(found: list[Run]) -> list:
    """Pictures over the training of one run, or the last picture of each of several."""
    cards, several = [], len(found) > 1
    for run in found:
        for step, path in run.previews[-1:] if several else _spread(run.previews):
            name = f"{run.name}, step {step:,}" if several else f"step {step:,}"
            cards.append(figure(path, name, PREVIEW.format(step)))
        if not run.previews:
            every = number(run.config.get("preview", {}).get("every"))
            line = f"No picture of {run.name} yet; training draws one every {every} steps."
            cards.append(text(line, "missing"))
    note = "Raw parameters above, EMA below, all from the same noise."
    note = "The last picture of training: raw parameters above, EMA below." if several else note
    count = "" if several else _of_all(cards, run.previews)
    return [text(note + count), block("large cards" if several else "cards", cards)]


def _spread(items: list) -> list:
    """At most `PICTURES` items, evenly spaced, with the first and the last."""
    kept = np.linspace(0, len(items) - 1, min(PICTURES, len(items)))
    return [items[k] for k in np.round(kept).astype(int)]


def _of_all(shown: list, every: list) -> str:
    fewer = len(shown) < len(every)
    return f" {len(shown)} of {len(every)} pictures in samples/." if fewer else ""


def schedule(found: list[Run]) -> list:
    """The chains; one that all runs share is drawn once."""
    forward = [os.path.join(run.workdir, "forward.png") for run in found]
    forward = [path for path in forward if len(found) == 1 and os.path.exists(path)]
    found = [run for run in found if run.chain is not None]
    if all(np.array_equal(run.chain.ratio, found[0].chain.ratio) for run in found):
        found = found[:1]
    if all(run.chain.is_variance_preserving for run in found):
        tables = [("β", "beta", "linear"), ("ᾱ", "alpha_bar", "linear")]
    else:
        tables = [("α", "alpha", "linear"), ("σ", "sigma", "linear")]
    charts, lines = [], []
    for title, name, scale in (*tables, ("SNR = α²/σ²", "snr", "log")):
        chains = [(run.name, range(len(run.chain)), getattr(run.chain, name)) for run in found]
        curves = [Curve(*chain) for chain in chains]
        charts.append(chart(title, curves, x_label="t", y_scale=scale))
    for run in found:
        health = terminal.health(run.chain)
        line = f"T = {len(run.chain):,}; α² at the end {health.alpha_T**2:.3g}"
        if health.sum_beta is not None:
            line += f" (Σβ = {health.sum_beta:.4g} bounds it by {health.alpha_bar_bound:.3g})"
        line += f"; prior term at most {health.prior_bits_per_dim:.2g} bits/dim."
        lines.append(text(f"{run.name}: {line}" if len(found) > 1 else line, ""))
    title = "The forward process: data on the left, then x_t up to t = T − 1"
    return [*lines, *chart_block(charts), *(figure(path, title, title) for path in forward)]


# ---- pictures --------------------------------------------------------------------------------------


def _samples(run: Run) -> list:
    """Samples side by side: under each the settings that differ, below all the settings they share."""
    drawn = run.drawn_by("sample")
    if not drawn:
        return [text("Samples of the last checkpoint:", "missing", run.command("sample"))]
    drawn = sorted(drawn, key=_order)
    shared, labels = words.common([words.settings(one.recipe) for one in drawn])
    pairs = list(zip(drawn, labels, strict=True))
    shown = _spread(pairs)
    cards = [figure(one.path, label, f"samples: {label or shared}") for one, label in shown]
    note = (f"All: {shared}." if shared else "") + _of_all(shown, pairs)
    return [block("cards", cards), text(note)]


def _order(picture: Picture):
    """By step, then by the other settings, then by the number of steps of the chain."""
    others = {k: v for k, v in words.settings(picture.recipe).items() if k not in ("step", "steps")}
    step, steps = picture.recipe.get("step", 0), picture.recipe.get("steps")
    return int(step), [*others.values()], words.count(steps), picture.path


def _pictures(run: Run, section: str) -> list:
    """The pictures of the modes of a section, and the commands for those that are missing."""
    T, shown, absent = run.num_timesteps, [], []
    counts = ",".join(str(S) for S in (10, 20, 50, 100) if S <= T) or str(T)
    flags = {
        "reconstruct": (f"--steps={counts}",),
        "denoise": (f"--from_t={','.join(map(str, sorted({T // 4, T // 2})))}",),
        "inpaint": ("--mask=left",),
        "trajectory": ("--sampler=ddim", f"--steps={min(50, T)}", "--trajectory"),
    }
    for mode, (where, title, alt) in MODES.items():
        figures = [part for one in run.drawn_by(mode)[-PICTURES:] for part in _strip(one, alt)]
        if where == section and figures:
            shown.append(block("group", figures, title))
        elif where == section and run.chain:
            command = "sample" if mode == "trajectory" else mode
            line = run.command(command, *flags.get(mode, ()))
            absent.append(text(f"{title}:", "missing", line))
    return [block("pairs", shown), *absent]


def _strip(picture: Picture, alt: str) -> list:
    """A picture with its numbers and settings, its table and its animation."""
    numbers, about, after = picture.numbers, [alt], []
    if "t" in numbers:
        about.append(f"t = {', '.join(map(str, numbers['t']))}")
    for name, what in (("distance", "samples"), ("distance_of_test", "test images")):
        if name in numbers:
            nearest = numbers[name].reshape(len(numbers[name]), -1)[:, 0]
            mean = number(float(nearest.mean(dtype=np.float64)))
            about.append(f"mean distance of {what} to the nearest {mean} (RMSE, 0 … 255)")
    errors = {k.removeprefix("error_"): v for k, v in numbers.items() if k.startswith("error_")}
    if errors:  # as Song et al. 2021, Table 2
        cells = [plus_minus(*mean_and_error(v.astype(np.float64))) for v in errors.values()]
        N = len(next(iter(errors.values())))
        caption = f"Mean squared error of a pixel on 0 … 1, ± the standard error over {N} images"
        after.append(table(caption, ("S", *errors), [("error", *cells)]))
    animation = f"{picture.path[:-4]}.gif"
    if os.path.exists(animation):
        moving = figure(animation, "x_t on the left, x̂_0 on the right", f"animation: {alt}")
        after.append(block("fold", [moving], "Animation"))
    settings = ", ".join(words.settings(picture.recipe.get("of", picture.recipe)).values())
    return [figure(picture.path, "; ".join([*about, settings]), f"{alt}; {settings}"), *after]


def _other_pictures(run: Run) -> list:
    """Pictures without a section, each under its file name and settings."""
    figures = []
    for one in [p for p in run.pictures if p.kind not in ("sample", *MODES)][:PICTURES]:
        about = [os.path.basename(one.path), *words.settings(one.recipe).values()]
        figures.append(figure(one.path, ", ".join(about), f"the picture {about[0]}"))
    return figures


# ---- config and versions ---------------------------------------------------------------------------


def _differences(found: list[Run]) -> dict[str, list]:
    """{"config.model.channels": [value of each run], …} of the fields that differ."""
    pairs = [config_lib.differences(found[0].config, run.config) for run in found]
    values = {}
    for name in sorted({field for pair in pairs for field in pair}):
        first = next(pair[name][0] for pair in pairs if name in pair)
        values[name] = [pair[name][1] if name in pair else first for pair in pairs]
    return values


def _shown(value) -> str:
    """A value of a config in words."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {None: "none", config_lib.MISSING: "–"}.get(value, str(value))


def _differing(found: list[Run]) -> list:
    if len(found) == 1:
        return []
    rows = [(name, *map(_shown, row)) for name, row in _differences(found).items()]
    head = ("field", *(run.name for run in found))
    return [table("Fields of the config", head, rows) if rows else text("The configs are equal.")]


def _config(run: Run) -> list:
    groups = {}
    for field, (_, value) in sorted(config_lib.differences(ConfigDict(), run.config).items()):
        section, _, name = field.removeprefix("config.").rpartition(".")
        groups.setdefault(section or "config", {})[name] = _shown(value)
    blocks = [block("groups", [block("fields", fields, name) for name, fields in groups.items()])]
    preview = os.path.join(run.workdir, "data_preview.png")
    if os.path.exists(preview):
        lines = re.findall(r"  (\S+/\S+: \d+ images .*)", run.log) or ["training images"]
        alt = "the first training images, as the network receives them"
        blocks.append(block("group", [figure(preview, lines[-1], alt)], "The data"))
    return [*blocks, block("fields", {str(n): c for n, c in enumerate(run.class_names)}, "Classes")]


def _versions(run: Run) -> list:
    first = {}
    for when, banner in re.findall(r"(?m)^(\d{4}-\d\d-\d\d \d\d:\d\d):\d\d  (Python .*)$", run.log):
        first.setdefault(banner, when)
    lines = [text(f"From {when}: {banner}", "") for banner, when in first.items()]
    lines = lines or [text("No log.txt with the versions that trained this run.", "missing")]
    warnings = dict.fromkeys(re.findall(r"WARNING: .*", run.log))
    return [*lines, *(text(line, "warning") for line in warnings)]
