"""Numbers and settings in words."""

from __future__ import annotations

import math

# Words for the settings of a recipe, in the order in which they are shown. A setting without an entry
# follows as "name value".
WORDS = {
    **dict.fromkeys(("run", "images", "data", "split", "sampler"), "{}"),
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
    "step": "step {}",
    "seed": "seed {}",
}
# Words for single values; an empty text hides a default.
VALUES = {
    **dict.fromkeys(("guidance 1.0", "guidance 1", "clip_x0 True", "singlestep False"), ""),
    "clip_x0 False": "x̂_0 not clipped",
    "eta hat": "σ̂",
}
# Keys of a recipe that are not settings. Digests and nested dictionaries are not settings either.
BOOKKEEPING = ("workdir", "mode", "chosen", "frames", "last")
BOOKKEEPING += ("num_images", "num_samples", "software")


def is_number(value) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value) -> str:
    """A number as 4,000, 0.04050, 1.3e-05 or –: four digits if it is not whole."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if abs(value) >= 1e-3 else f"{value:.4g}"


def plus_minus(mean: float, spread: float | None = None) -> str:
    """A mean as 3.704 ± 0.113: two digits of the spread, and as many decimals of the mean."""
    if not spread:
        return number(mean)
    if abs(mean) < 1e-3:
        return f"{mean:.3g} ± {spread:.1g}"
    decimals = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:,.{decimals}f} ± {spread:.{decimals}f}"


def settings(recipe: dict) -> dict[str, str]:
    """{name: words} of the settings in a recipe."""
    if "sampler" in recipe and recipe.get("steps") is None:
        recipe = recipe | {"steps": "all"}
    result = {}
    for name in dict.fromkeys([*WORDS, *recipe]):
        value = recipe.get(name)
        bookkeeping = name in BOOKKEEPING or name.endswith("_sha256") or isinstance(value, dict)
        if not bookkeeping and value not in (None, [None]):
            text = _text(name, value)
            words = WORDS[name].replace("{}", text) if name in WORDS else f"{name} {text}"
            result[name] = VALUES.get(f"{name} {text}", words)
    return {name: words for name, words in result.items() if words}


def _text(name: str, value) -> str:
    """A value; a list of times given as text is 50 (0, 20, 41 …)."""
    if name == "steps" and isinstance(value, str) and value.startswith("["):
        times = value.strip("[]").split(",")
        return f"{len(times)} ({', '.join(times[:3])} …)"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return number(value) if name in ("step", "steps") else str(value)


def common(described: list[dict[str, str]]) -> tuple[str, list[str]]:
    """The settings that all share, and the remaining settings of each."""
    first = described[0] if len(described) > 1 else {}
    shared = {k: v for k, v in first.items() if all(other.get(k) == v for other in described)}
    rest = [", ".join(v for k, v in each.items() if k not in shared) for each in described]
    return ", ".join(shared.values()), rest


def count(steps) -> float:
    """The number of steps for sorting; other words come last."""
    first = str(steps).split(" ")[0].replace(",", "")
    return int(first) if first.isdecimal() else math.inf
