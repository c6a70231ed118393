"""What an erratum is: two formulas, and the numbers or the words that decide between them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Numbers(NamedTuple):
    """One quantity three times, a float or float64 [N] each; the first of N is the one that is
    shown.
    """

    truth: np.ndarray | float
    printed: np.ndarray | float
    right: np.ndarray | float


class Erratum(NamedTuple):
    """A line of the table.

    Attributes:
      place: in the document.
      printed, right: the formulas.
      decide: () -> Numbers, whose docstring says what is computed; or words, where nothing can be.
      tolerance: how far from the truth, relatively, a formula may be that agrees with it.
      ours: () -> what ddpm_jax has for the same quantity, or None.
      ours_tolerance: the same for it, most of which is float32.
      is_one: False where the printed formula turns out to be right, or where, in words, the slip is one of
        notation from which nothing follows.
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
        """One word, or two."""
        if self.is_one:
            return "erratum"
        return "notation" if isinstance(self.decide, str) else "**no erratum**"

    def reason(self) -> str:
        """What decides, in a sentence."""
        text = self.decide if isinstance(self.decide, str) else inspect.getdoc(self.decide)
        return " ".join(text.split())


def error(value, truth) -> float:
    """The largest relative deviation from the truth; absolute where the truth is zero."""
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    assert value.shape == truth.shape, (value.shape, truth.shape)
    scale = np.where(truth == 0, 1.0, np.abs(truth))
    return float(np.max(np.abs(value - truth) / scale))
