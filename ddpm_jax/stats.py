"""A mean and its standard error."""

from __future__ import annotations

import numpy as np


def mean_and_error(values) -> tuple[float, float | None]:
    """The mean of values [N] and its standard error, which is None for N = 1."""
    values = np.asarray(values, np.float64)
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), error


def plus_minus(mean: float, error: float | None) -> str:
    """Formats as "3.7041 ± 0.1130", or the mean only if there is no error."""
    digits = ".4f" if abs(mean) >= 1e-3 or mean == 0 else ".2g"
    return f"{mean:{digits}}" if error is None else f"{mean:{digits}} ± {error:{digits}}"
