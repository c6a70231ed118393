"""A page as one HTML file that needs no network: elements, tables, curves as SVG, pictures as data.

What is not `Markup` is text, and is escaped on its way in: no file that is shown can write a tag.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

VOID = ("br", "img", "meta", "wbr")
COLOURS = 6  # after which the lines are dashed
WIDTH, HEIGHT = 360, 230  # of a diagram, in units that are pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 36  # its margins
STOPS = 60  # places along a diagram that tell their numbers


class Markup(str):
    """HTML already; any other text is escaped."""


def tag(name: str, /, *inside, **attributes) -> Markup:
    """<name key="value">inside</name>; what is None is left out, `class_` is class, `data_x` is data-x."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            key = key.rstrip("_").replace("_", "-")
            words.append(f'{key}="{html.escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Markup(opening if name in VOID else f"{opening}{join(inside)}</{name}>")


def join(parts: Iterable) -> Markup:
    """Parts one after another, text among them escaped."""
    given = (part for part in parts if part is not None)
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in given)
    )


# ---- words and numbers -----------------------------------------------------------------------------


def number(value) -> str:
    """4,000, 0.04050, 1.3e-05 or –: four digits of what is no whole number."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if abs(value) >= 1e-3 else f"{value:.4g}"


def plus_minus(mean: float, spread: float | None) -> str:
    """3.704 ± 0.113, the mean with as many decimals as its spread has."""
    if not spread:
        return number(mean)
    if abs(mean) < 1e-3:
        return f"{mean:.3g} ± {spread:.1g}"
    decimals = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:,.{decimals}f} ± {spread:.{decimals}f}"


def command(line: str) -> Markup:
    """A command line, broken between its words where it must be."""
    words = ((" ", tag("span", word)) for word in line.split(" "))
    return tag("code", *[part for pair in words for part in pair][1:], class_="command")


def breakable(name: str) -> Markup:
    """A long name that may be broken after each underscore."""
    if isinstance(name, Markup):
        return name
    first, *rest = name.split("_")
    return join([first, *(part for word in rest for part in ("_", tag("wbr"), word))])


def missing(what: str, line: str | None = None) -> Markup:
    """One quiet line for what is not there, with the command that makes it."""
    return tag("p", what, *((" ", command(line)) if line else ()), class_="missing")


# ---- blocks ----------------------------------------------------------------------------------------


def section(name: str, title: str, *inside) -> Markup:
    return tag("section", tag("h2", title), *inside, id=name)


def fold(title: str, *inside) -> Markup:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", title), *inside)


def tiles(facts: dict[str, object]) -> Markup:
    """Names and values, the values large."""
    pairs = (tag("div", tag("dt", breakable(k)), tag("dd", v)) for k, v in facts.items())
    return tag("dl", *pairs, class_="tiles")


def fields(facts: dict[str, object]) -> Markup:
    """Names and values, a line for each."""
    pairs = (tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items())
    return tag("dl", *pairs, class_="fields")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence]) -> Markup:
    """A table whose first column names the rows; on a narrow screen it scrolls by itself."""
    first = tag("tr", *(tag("th", name, scope="col") for name in head))
    body = [
        tag("tr", tag("th", breakable(name), scope="row"), *(tag("td", cell) for cell in cells))
        for name, *cells in rows
    ]
    inside = tag(
        "table", tag("caption", tag("span", caption)), tag("thead", first), tag("tbody", *body)
    )
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption)


def picture(path: str, caption: str, alt: str, *, kind: str = "") -> Markup:
    """A file of an image as it is, in the page itself."""
    extension = path.rpartition(".")[2].lower()
    with open(path, "rb") as file:
        content = base64.b64encode(file.read()).decode()
    image = tag("img", src=f"data:image/{extension};base64,{content}", alt=alt)
    return tag("figure", image, tag("figcaption", caption), class_=f"picture {kind}".strip())


def side_by_side(*inside, kind: str = "cards") -> Markup:
    """Blocks in columns: "charts", "pairs"; "cards" and "cards large", on a phone a row to be scrolled."""
    scrolls = {"tabindex": 0, "role": "group", "aria_label": "Pictures"}
    scrolls = scrolls if kind.startswith("cards") else {}
    return tag("div", *inside, class_=kind, **scrolls)


# ---- curves ----------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """One line of a diagram."""

    name: str
    x: Sequence[float]  # [N]
    y: Sequence[
        float
    ]  # [N]; what is not finite, or not positive on a logarithmic scale, is left out
    smooth: Sequence[float] | None = None  # [N]; drawn in place of y, and y behind it, faint


class _Axis:
    """A range of values laid along a range of the diagram."""

    def __init__(self, values: np.ndarray, scale: str, start: float, end: float, margin=0.0):
        self.log = scale == "log"
        low, high = (float(f(self._map(values))) for f in (np.min, np.max))
        flat = high - low <= 1e-9 * abs(low)
        room = 0.05 * (abs(low) or 1.0) if flat else margin * (high - low)
        self._low, self._high, self._ends = low - room, high + room, (start, end)

    def _map(self, values):
        return np.log10(values) if self.log else np.asarray(values, np.float64)

    def __call__(self, values):
        start, end = self._ends
        return start + (self._map(values) - self._low) / (self._high - self._low) * (end - start)

    def ticks(self, count: int) -> list[float]:
        """Round values within the range, about `count` of them."""
        if self.log:
            powers = range(math.ceil(self._low - 1e-9), math.floor(self._high + 1e-9) + 1)
            if len(powers) >= 3:
                return [10.0**p for p in powers[:: -(-len(powers) // (count + 1))]]
            below = range(math.floor(self._low), math.ceil(self._high) + 1)
            for digits in ((1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
                fine = [d * 10.0**p for p in below for d in digits]
                fine = [v for v in fine if self._low <= math.log10(v) <= self._high]
                if len(fine) >= 3:
                    return fine[:: -(-len(fine) // (count + 1))]
        low, high = (10**self._low, 10**self._high) if self.log else (self._low, self._high)
        rough = (high - low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * (1 - 1e-9))
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [round(n * step, 12 - math.floor(math.log10(step))) for n in range(first, last + 1)]


def _tick(value: float) -> str:
    """4,000, 0.05, or 10⁻⁴."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, power = f"{value:.2e}".split("e")
        digits = digits.rstrip("0").rstrip(".")
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"10{raised}" if digits == "1" else f"{digits}·10{raised}"
    return f"{value:,.10g}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A line through the points, averaged within each unit of the width: as fine as the eye sees."""
    columns, index = np.unique(np.round(x), return_inverse=True)
    if len(columns) < len(x):
        count = np.bincount(index)
        x, y = (np.bincount(index, values) / count for values in (x, y))
    if len(x) == 1:
        x, y = np.array([x[0] - 2, x[0] + 2]), np.array([y[0], y[0]])
    return "M" + " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    x_scale: str = "linear",
    y_scale: str | None = None,
) -> Markup:
    """A diagram as SVG under its title, whose numbers show where the pointer rests.

    Args:
      y_scale: "linear" or "log"; None for log where values are positive and span a factor of five.

    Returns:
      the figure, or nothing if there is no point to draw.
    """
    every = np.concatenate([np.asarray(curve.y, np.float64) for curve in curves] or [np.zeros(0)])
    every = every[np.isfinite(every)]
    if y_scale is None:
        wide = every.size and every.min() > 0 and every.max() >= 5 * every.min()
        y_scale = "log" if wide else "linear"
    kept = []
    for number_of, curve in enumerate(curves):
        smooth = curve.y if curve.smooth is None else curve.smooth
        x, y, mean = (np.asarray(v, np.float64) for v in (curve.x, curve.y, smooth))
        good = np.isfinite(x) & np.isfinite(y) & np.isfinite(mean)
        good &= (x > 0) | (x_scale != "log")
        good &= (y > 0) | (y_scale != "log")
        if good.any():
            kept.append((number_of, curve, x[good], y[good], mean[good]))
    if not kept:
        return Markup()
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    across = _Axis(np.concatenate([x for _, _, x, _, _ in kept]), x_scale, LEFT, right)
    up = _Axis(np.concatenate([y for _, _, _, y, _ in kept]), y_scale, bottom, TOP, margin=0.04)

    parts = []
    for value in up.ticks(4):
        y = f"{float(up(value)):.1f}"
        parts.append(tag("line", x1=LEFT, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", _tick(value), x=LEFT - 6, y=y, dy="0.35em", text_anchor="end"))
    for value in across.ticks(4):
        x = float(across(value))
        anchor = "end" if x > right - 12 else "middle"
        parts.append(
            tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=bottom, y2=bottom + 4, class_="mark")
        )
        parts.append(tag("text", _tick(value), x=f"{x:.1f}", y=bottom + 16, text_anchor=anchor))
    parts.append(tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="mark"))
    parts.append(tag("text", x_label, x=right, y=HEIGHT - 4, text_anchor="end", class_="label"))

    def look(n):
        return f"c{n % COLOURS}{' dashed' if n >= COLOURS else ''}"

    for n, curve, x, y, _ in kept:
        if curve.smooth is not None:
            parts.append(tag("path", d=_path(across(x), up(y)), class_=f"{look(n)} faint"))
    for n, _, x, _, mean in kept:
        parts.append(tag("path", d=_path(across(x), up(mean)), class_=look(n)))

    width, stops = (right - LEFT) / STOPS, {}
    for n, curve, x, y, _ in kept:
        columns = np.clip((across(x) - LEFT) / width, 0, STOPS - 1).astype(int)
        for column, one_x, one_y in zip(columns, x, y, strict=True):
            stops.setdefault(int(column), {})[n] = (curve.name, one_x, one_y)  # its last point
    for column, told in sorted(stops.items()):
        at = max(x for _, x, _ in told.values())
        lines = [f"{x_label} {number(float(at))}"]
        lines += [f"{name} {number(float(y))}" for name, _, y in told.values()]
        middle = f"{float(across(at)):.1f}"
        dots = (
            tag(
                "circle",
                cx=f"{float(across(x)):.1f}",
                cy=f"{float(up(y)):.1f}",
                r=3,
                class_=f"c{n % COLOURS}",
            )
            for n, (_, x, y) in told.items()
        )
        box = {"x": f"{LEFT + column * width:.1f}", "width": f"{width:.1f}", "y": TOP}
        parts.append(
            tag(
                "g",
                tag("title", "\n".join(lines)),
                tag("rect", **box, height=bottom - TOP),
                tag("line", x1=middle, x2=middle, y1=TOP, y2=bottom),
                *dots,
                class_="stop",
            )
        )

    said = []
    for _, curve, x, y, _ in kept:
        low = int(np.argmin(y))
        ends = (f"{number(float(y[k]))} at {number(float(x[k]))}" for k in (0, -1, low))
        said.append("{}: from {} to {}, lowest {}".format(curve.name, *ends))
    size = f"0 0 {WIDTH} {HEIGHT}"
    label = f"{title} over {x_label}. {'; '.join(said)}."
    svg = tag("svg", *parts, viewBox=size, role="img", aria_label=label)
    names = [tag("span", curve.name, class_=look(n)) for n, curve, _, _, _ in kept]
    legend = tag("span", *names, class_="legend") if len(curves) > 1 else None
    return tag("figure", tag("figcaption", tag("b", title), legend), svg, class_="chart")


# ---- the page --------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--ground:#f7f7f5;--paper:#fff;--ink:#1c1d20;--quiet:#5c6069;--line:#dfdfd9;
--accent:#0b57a4;--c0:#1d5fc4;--c1:#c2410c;--c2:#0c7a5c;--c3:#8a3db6;--c4:#946200;--c5:#be185d}
@media (prefers-color-scheme:dark){:root{--ground:#111215;--paper:#1a1c20;--ink:#e9e9e6;--quiet:#a6abb5;
--line:#33363d;--accent:#84bbff;--c0:#79aef8;--c1:#fb9347;--c2:#4fc9a4;--c3:#cc9df3;--c4:#e3b341;--c5:#f585bb}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,"Noto Sans",sans-serif;overflow-wrap:anywhere}
header,main,footer{max-width:74rem;margin:0 auto;padding:0 1rem}
header{padding-top:2.5rem}
h1{font-size:clamp(1.6rem,1.2rem + 1.8vw,2.3rem);line-height:1.2;letter-spacing:-.015em;margin:0}
h2{font-size:1.35rem;line-height:1.3;letter-spacing:-.01em;margin:0 0 1rem}
h3{font-size:1rem;line-height:1.4;margin:1.75rem 0 .6rem}
p{margin:.5rem 0;max-width:48rem}
.lead,.quiet,.missing,footer,figcaption,caption,dt,summary{color:var(--quiet)}
.lead{margin:.35rem 0 0}
.missing,.quiet,footer{font-size:.875rem}.missing{max-width:none}
a{color:var(--accent)}
nav{position:sticky;top:0;z-index:1;background:var(--ground);border-bottom:1px solid var(--line);
margin-top:1.5rem}
nav ul{display:flex;gap:1.25rem;overflow-x:auto;max-width:74rem;margin:0 auto;padding:0 1rem;list-style:none;
scrollbar-width:none}
nav a{display:block;padding:.7rem 0;white-space:nowrap;font-size:.9rem;text-decoration:none}
nav a:hover{text-decoration:underline}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
section{padding:2.25rem 0 .25rem;scroll-margin-top:2rem}
section+section{border-top:1px solid var(--line);margin-top:2.25rem}
figure{margin:0;min-width:0}
.cards,.charts{display:grid;gap:1rem;margin:1rem 0}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.cards{grid-template-columns:repeat(auto-fill,minmax(13rem,1fr))}
.cards.large{grid-template-columns:repeat(auto-fill,minmax(20rem,1fr))}
.pairs{columns:32rem;column-gap:1.5rem}.pairs>div{break-inside:avoid;padding-top:1.5rem}.pairs h3{margin-top:0}
@media (max-width:40rem){.cards{display:flex;overflow-x:auto;scroll-snap-type:x proximity;padding-bottom:.25rem}
.cards>*{flex:0 0 84%;scroll-snap-align:start}.cards>:only-child{flex-basis:100%}}
.chart,.picture,.tiles>div{background:var(--paper);border:1px solid var(--line);border-radius:.6rem}
.chart{padding:.75rem .75rem .5rem;display:flex;flex-direction:column;justify-content:space-between}
.chart figcaption{font-size:.85rem;min-height:1.5rem;margin-bottom:.35rem}
.chart b{color:var(--ink);margin-right:.6rem}
.legend span{display:inline-block;margin-right:.6rem}
.legend span::before{content:"";display:inline-block;width:.9rem;border-top:3px solid var(--c);
vertical-align:middle;margin-right:.3rem}
.legend .dashed::before{border-top-style:dashed}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:11px;fill:var(--quiet);font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--line)}svg .mark{stroke:var(--quiet)}
svg path{fill:none;stroke:var(--c);stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round}
svg path.faint{stroke-width:1;opacity:.35}svg path.dashed{stroke-dasharray:5 4}
.stop rect{fill:none;pointer-events:all}.stop line,.stop circle{opacity:0;pointer-events:none}
.stop line{stroke:var(--quiet);stroke-width:1}
.stop circle{fill:var(--c);stroke:var(--paper);stroke-width:1.5}
.stop:hover line,.stop:hover circle{opacity:1}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.picture{padding:.5rem;align-self:start}
.picture.strip{margin:0 0 1rem;width:fit-content;max-width:100%}.picture.strip figcaption{width:0;min-width:100%}
.picture img{display:block;max-width:100%;height:auto;margin:0 auto;border-radius:.3rem;background:#fff}
.picture figcaption{font-size:.85rem;line-height:1.4;padding:.5rem .25rem .1rem}
.tiles{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fill,minmax(10rem,1fr));margin:1.5rem 0 0}
.tiles>div{padding:.6rem .8rem}
dt{font-size:.8rem}dd{margin:0;font-variant-numeric:tabular-nums}
.tiles dd{font-size:1.1rem;font-weight:600;line-height:1.35}
.groups{columns:17rem;column-gap:2.5rem}.groups>div{break-inside:avoid;padding-bottom:1.1rem}
.groups h3{margin:0 0 .3rem}
.fields{margin:0;font-size:.9rem}
.fields>div{display:flex;justify-content:space-between;gap:1rem;border-top:1px solid var(--line);padding:.22rem 0}
.fields dt{font-size:inherit}.fields dd{text-align:right}
.scroll{overflow-x:auto;margin:1rem 0;width:fit-content;min-width:min(100%,36rem);max-width:100%}
table{width:100%;border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{text-align:left;padding-bottom:.4rem;overflow-wrap:anywhere}
caption span{position:sticky;left:0;display:inline-block;max-width:calc(100vw - 2rem)}
th,td{padding:.36rem .9rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child{text-align:left;padding-left:0;font-weight:500;min-width:9rem}
thead th{font-weight:600;border-bottom-color:var(--quiet);white-space:nowrap}
td{white-space:nowrap}td:last-child,thead th:last-child{padding-right:.25rem}
details{margin:.75rem 0}summary{cursor:pointer;font-size:.9rem;padding:.2rem 0}
details details{margin-left:1.1rem}
code,pre{font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.command{background:var(--paper);border:1px solid var(--line);border-radius:.3rem;padding:.08rem .35rem;
color:var(--ink);-webkit-box-decoration-break:clone;box-decoration-break:clone}.command span{display:inline-block}
pre{overflow-x:auto;background:var(--paper);border:1px solid var(--line);border-radius:.6rem;padding:.75rem;
overflow-wrap:normal}
.warning{border-left:3px solid var(--c1);padding:.1rem 0 .1rem .75rem}
footer{padding-bottom:3rem}
footer::before{content:"";display:block;border-top:1px solid var(--line);margin:2.5rem 0 1rem}
@media print{nav{display:none}.chart,.picture{break-inside:avoid}}
"""
GENERATOR = "ddpm_jax report"


def document(
    title: str, lead: str, facts: Markup, sections: dict[str, Markup], foot: Markup
) -> str:
    """A whole page.

    Args:
      sections: {the word of it in the list of contents: the section, whose id is that word in small}.
    """
    links = (tag("li", tag("a", word, href=f"#{anchor(word)}")) for word in sections)
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=GENERATOR),
        tag("title", title),
        tag("style", Markup(STYLE)),
    ]
    body = [
        tag("header", tag("h1", title), tag("p", lead, class_="lead"), facts),
        tag("nav", tag("ul", *links), aria_label="Contents"),
        tag("main", *(section(anchor(w), w, inside) for w, inside in sections.items())),
        tag("footer", foot),
    ]
    page = tag("html", tag("head", *head), tag("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def anchor(word: str) -> str:
    """A word as the id of a section."""
    return word.lower().replace(" ", "-")
