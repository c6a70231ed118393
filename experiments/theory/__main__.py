"""Errors in five texts on diffusion, checked numerically.

    python -m experiments.theory                                        prints the page
    python -m experiments.theory --out=experiments/theory/README.md     writes it

It takes ten seconds on one CPU core, half of them to start jax, and uses no randomness.
"""

import argparse
import os
import re

import numpy as np

from ddpm_jax.experiments.theory import liu, sedykh, tang, tavares, vilhes
from ddpm_jax.experiments.theory.erratum import Erratum, error

DOCUMENTS = {
    "Vilhes": (vilhes, "2024, “The Theory behinds Denoising Diffusion Probabilistic Models”"),
    "Sedykh": (
        sedykh,
        "2024, “Diffusion Models in Depth: From a Theoretical and a Practical Perspective”",
    ),
    "Tang": (
        tang,
        "2024, “A Collection of Frequently Asked Questions about Denoising Diffusion Probabilistic Models”",
    ),
    "Tavares": (tavares, "2025, “Denoising Diffusion Probabilistic Models”, slides with code"),
    "Liu": (liu, "2023, “Notes on Diffusion Models”"),
}

INTRODUCTION = """\
# Errors in five texts on diffusion

Five good introductions to diffusion models contain {count} errors, often a bar over an α too many or too few. Each line
below is a small function in float64 ([vilhes.py](vilhes.py), [sedykh.py](sedykh.py), [tang.py](tang.py),
[tavares.py](tavares.py), [liu.py](liu.py)) that computes one quantity three times: from the definition, by the printed
formula, and by the correct one. The definition is the one-step kernel q(x_t | x_{{t−1}}) = N(√α_t x_{{t−1}}, β_t) with Ho
et al.'s linear schedule, composed step by step or integrated on a grid ([chain.py](chain.py)). It shares no code with
ddpm_jax, whose error is in a column of its own. {right} lines are about formulas that looked wrong but are correct, and
{notation} about wrong notation without consequences; {words} are decided by an argument instead of numbers.

The last column describes the cases; the numbers are those of the first case. Brackets contain the largest relative distance
from the truth over all cases, or the absolute distance where the truth is 0. The documents count t = 1 … T, and ᾱ_0 = 1.
We read transcriptions of the documents, in which a bar may have been lost or added.

    python -m experiments.theory        prints this page; tests/test_theory.py checks every line of it
"""

COLUMNS = (
    *("place", "printed", "correct", "truth", "value of printed", "value of correct"),
    *("error of ddpm_jax", "verdict", "what is computed"),
)


def number(value, digits: int = 5) -> str:
    """The first of the values as text; a rounding error around 0 becomes 0."""
    first = np.ravel(value)[0]
    text = f"{float(f'{first:.{digits}g}') if abs(first) > 1e-12 else 0.0:g}"
    return re.sub(r"e\+?(-?)0?", r"e\1", text).replace("-", "−")


def distance(value, truth, tolerance: float) -> str:
    """The distance of a value from the truth, or "< tolerance" where they agree."""
    far = error(value, truth)
    return f"< {number(tolerance)}" if far < tolerance else number(far, digits=2)


def line(erratum: Erratum) -> tuple[str, ...]:
    """The cells of the row of an erratum."""
    verdict = erratum.verdict()
    words = erratum.place, erratum.printed, erratum.right
    if isinstance(erratum.decide, str):
        return *words, *4 * ("—",), verdict, erratum.reason()
    truth, printed, right = erratum.decide()
    both = (f"{number(v)} ({distance(v, truth, erratum.tolerance)})" for v in (printed, right))
    ours = "—"
    if erratum.ours is not None:
        ours = distance(erratum.ours(), truth, erratum.ours_tolerance)
    return *words, number(truth), *both, ours, verdict, erratum.reason()


def table(rows) -> str:
    """The table in Markdown, from rows of cells."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "∣") for cell in row) + " |" for row in lines
    )


def page() -> str:
    """The whole page in Markdown."""
    every = [erratum for module, _ in DOCUMENTS.values() for erratum in module.ERRATA]
    verdicts = [erratum.verdict() for erratum in every]
    count, notation = verdicts.count("erratum"), verdicts.count("notation")
    words = sum(isinstance(erratum.decide, str) for erratum in every)
    right = len(every) - count - notation
    parts = [INTRODUCTION.format(count=count, right=right, notation=notation, words=words)]
    for name, (module, title) in DOCUMENTS.items():
        parts.append(f"## {name}\n\n{title}\n\n{table(map(line, module.ERRATA))}\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.theory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", help="the Markdown file to write (default: prints it)")
    out = parser.parse_args(argv).out
    if out is None:
        print(page(), end="")
        return
    text = page()
    try:
        with open(os.path.expanduser(out), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
