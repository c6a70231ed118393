"""Charts as SVG by matplotlib, in the colours of the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure  # without pyplot: no global state, no display

from ddpm_jax.commands.report.words import number
from ddpm_jax.files import writers

WIDTH, HEIGHT = 360, 230  # pixels at full size
BOX = 46 / WIDTH, 34 / HEIGHT, 302 / WIDTH, 188 / HEIGHT  # left, bottom, width, height of the axes
POINTS = 1500  # maximum number of points drawn of a curve
COLOURS = 6  # colours of curves in the style sheet; later curves repeat them, dashed
# Colours that matplotlib writes, and the variables of the style sheet that replace them.
INK = {f"#0000c{n}": f"var(--c{n})" for n in range(COLOURS)}
QUIET, LINE = "#0000f1", "#0000f2"
INK |= {QUIET: "var(--quiet)", LINE: "var(--line)"}
STYLE = {"svg.fonttype": "none", "font.size": 11, "text.color": QUIET}
NUMBERS = ("start", "¼", "½", "¾", "end", "lowest", "highest")


class Curve(NamedTuple):
    """A curve of a chart. Points that are not finite, or not positive on a log axis, are left out.

    With a spread, [N], each point has a bar from y − spread to y + spread; on a log axis only its upper half where y ≤ spread.
    """

    name: str
    x: Sequence[float]  # [N]
    y: Sequence[float]  # [N]
    window: int = 1  # number of points averaged; with more than one, the points are drawn faint
    spread: Sequence[float] | float = 0.0


def chart(title, curves, *, x_label="step", x_scale="linear", y_scale=None) -> dict | None:
    """A chart for the page, with rows of `NUMBERS`; None if there is no point to draw.

    Args:
      y_scale: "linear" or "log". The default is log if all values are positive and span a factor of five.
    """
    if y_scale is None:
        y = np.concatenate([np.asarray(curve.y, np.float64) for curve in curves] or [np.zeros(0)])
        y = y[np.isfinite(y)]
        y_scale = "log" if y.size and 0 < 5 * y.min() <= y.max() else "linear"
    drawn = [(n, _valid(curve, x_scale, y_scale)) for n, curve in enumerate(curves)]
    drawn = [(n, curve) for n, curve in drawn if len(curve.x)]
    if not drawn:
        return None
    names = [curve.name for _, curve in drawn]
    several = len(names) > 1
    rows = [(f"{title}, {c.name}" if several else title, *_numbers(c, x_scale)) for _, c in drawn]
    return {
        "title": title,
        "label": f"{title} over {x_label}: {', '.join(names)}; numbers in the table below",
        "legend": [(curve.name, n % COLOURS, n >= COLOURS) for n, curve in drawn if several],
        "svg": _svg(drawn, x_label, x_scale, y_scale),
        "size": (WIDTH, HEIGHT),
        "rows": rows,
    }


def _valid(curve: Curve, x_scale: str, y_scale: str) -> Curve:
    """The curve with the points that can be drawn."""
    x, y = np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)
    good = np.isfinite(x) & np.isfinite(y)
    good &= ((x > 0) | (x_scale != "log")) & ((y > 0) | (y_scale != "log"))
    spread = np.broadcast_to(np.asarray(curve.spread, np.float64), x.shape)
    return curve._replace(x=x[good], y=y[good], spread=spread[good])


def _numbers(curve: Curve, x_scale: str) -> list[str]:
    """Values at five points along the axis, the lowest and the highest."""
    points = (np.geomspace if x_scale == "log" else np.linspace)(curve.x[0], curve.x[-1], 5)
    at = [np.abs(curve.x - x).argmin() for x in points]
    return [number(float(y)) for y in (*curve.y[at], curve.y.min(), curve.y.max())]


def _svg(curves, x_label: str, x_scale: str, y_scale: str) -> str:
    """The elements of the chart's SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes(BOX, xscale=x_scale, yscale=y_scale)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for n, curve in curves:
            if curve.window > 1:
                _draw(axes, n, curve.x, curve.y, width=1, alpha=0.35)
            _draw(axes, n, curve.x, writers.moving_average(curve.y, curve.window))
            _draw_spread(axes, n, curve)
        axes.margins(x=0)
        axes.grid(axis="y", color=LINE, linewidth=1, clip_on=False)
        axes.spines[["left", "top", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(QUIET)
        axes.tick_params(left=False, bottom=False, labelcolor=QUIET)
        for axis, scale in ((axes.xaxis, x_scale), (axes.yaxis, y_scale)):
            axis.set_major_locator(_locator(scale, *axis.get_view_interval()))
            axis.set_minor_locator(ticker.NullLocator())
            axis.set_major_formatter(ticker.FuncFormatter(_tick))
        figure.text(348 / WIDTH, 2 / HEIGHT, x_label, ha="right", va="bottom")
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    return _inline(buffer.getvalue())


def _draw(axes, n: int, x: np.ndarray, y: np.ndarray, *, width=1.75, alpha=1.0) -> None:
    """Draws the n-th curve, with at most `POINTS` points; a single point becomes a dot."""
    space = np.geomspace if axes.get_xscale() == "log" else np.linspace
    k = np.unique(space(1, len(x), min(POINTS, len(x))).round().astype(int)) - 1
    k, width = (k, width) if len(x) > 1 else ([0, 0], 6)
    (line,) = axes.plot(x[k], y[k], color=[*INK][n % COLOURS], linewidth=width, alpha=alpha)
    line.set(clip_on=False, solid_capstyle="round", linestyle="-" if n < COLOURS else (0, (5, 4)))


def _draw_spread(axes, n: int, curve: Curve) -> None:
    barred = curve.spread > 0  # False where it is not a number: of one value there is none
    x, y, spread = curve.x[barred], curve.y[barred], curve.spread[barred]
    low = y - spread
    if axes.get_yscale() == "log":
        low = np.where(low > 0, low, y)
    axes.vlines(x, low, y + spread, colors=[*INK][n % COLOURS], linewidth=1, clip_on=False)


def _inline(svg: str) -> str:
    """The elements of an SVG file without ids and fonts, in the colours of the style sheet."""
    text = re.search(r"(?s)<svg[^>]*>(.*)</svg>", svg)[1]
    text = re.sub(r"(?s)<(defs|metadata)>.*?</\1>|<!--.*?-->|<defs/>", "", text)
    text = re.sub(r' (id|transform)="[^"]*"|font[-:][^;"]*; ?', "", text)
    text = re.sub(r"(\d\.\d\d)\d+(?=[^<>]*>)", r"\1", re.sub(r"</?g>", "", text))
    for colour, variable in INK.items():
        text = text.replace(colour, variable)
    return re.sub(r"\s+", " ", text)


def _locator(scale: str, low: float, high: float) -> ticker.Locator:
    if scale == "log" and high >= 10 * low:
        return ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6)
    return ticker.MaxNLocator(5, steps=(1, 2, 2.5, 5, 10))


def _tick(value: float, _position=None) -> str:
    """4,000, 0.05, or 2e−6."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:,.6g}").replace("-", "−")
