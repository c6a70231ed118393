"""An erratum: two formulas, and the numbers or the argument that decide between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Numbers(NamedTuple):
    """One quantity computed three times, each a float or float64 [N]; the table shows the first of N."""

    truth: np.ndarray | float
    printed: np.ndarray | float
    right: np.ndarray | float


class Erratum(NamedTuple):
    """A line of the table.

    Attributes:
      place: position in the document.
      printed, right: the formulas.
      decide: () -> Numbers, whose docstring says what is computed; or an argument in words, without numbers.
      tolerance: maximum relative distance of a formula that agrees with the truth.
      ours: () -> the result of ddpm_jax for the same quantity, or None.
      ours_tolerance: the tolerance of `ours`, which is mostly computed in float32.
      is_one: whether this is an erratum. False if the printed formula is correct or, with an argument in words, if
        only the notation is wrong, without consequences.
    """

    place: str
    printed: str
    right: str
    decide: Callable[[], Numbers] | str
    tolerance: float = 1e-9
    ours: Callable | None = None
    ours_tolerance: float = 1e-4
    is_one: bool = True

    def verdict(self) -> str:
        """The verdict: erratum, notation or no erratum."""
        if self.is_one:
            return "erratum"
        return "notation" if isinstance(self.decide, str) else "**no erratum**"

    def reason(self) -> str:
        """The last cell of the line, as one paragraph."""
        text = self.decide if isinstance(self.decide, str) else inspect.getdoc(self.decide)
        return " ".join(text.split())


def error(value, truth) -> float:
    """The largest relative deviation from the truth; absolute where the truth is zero."""
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    assert value.shape == truth.shape, (value.shape, truth.shape)
    scale = np.where(truth == 0, 1.0, np.abs(truth))
    return float(np.max(np.abs(value - truth) / scale))
