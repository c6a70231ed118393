"""Shortened chains: which of the T steps are visited, by number, spacing or list."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from ddpm_jax.names import check_choice
from ddpm_jax.process.schedules import Schedule

# {name of a spacing: its prefix before a number of steps}
SPACINGS = {
    "uniform": "",
    "linear": "ddim",
    "quadratic": "quad",
    "log_snr": "logsnr",
    "leading": "leading",
    "trailing": "trailing",
}

Steps = int | str | Sequence[int] | np.ndarray


def subsequence(
    steps: Steps, num_timesteps: int, *, snr: Float[np.ndarray, " T"] | None = None
) -> Int[np.ndarray, " S"]:
    """The steps τ of the full chain that a shortened one visits: [S], strictly increasing in 0 … T−1.

    Args:
      steps: one of
        50 or "50": S evenly spaced steps from 0 to T−1, rounded (Nichol & Dhariwal §4);
        "10,15,20": 10, 15 and 20 evenly spaced steps of the first, second and last third of the chain, for any number of
          parts; the first T mod 3 of them are longer by one (`space_timesteps` in Improved DDPM's code);
        "ddim50": every k-th step from 0 if some k gives exactly S of them, otherwise ⌊iT/S⌋ (Song et al. App. D.2,
          linear);
        "quad50": squares of evenly spaced numbers from 0 to √(0.8T) (Song et al.'s code);
        "logsnr50": the steps nearest to evenly spaced values of log SNR (Lu et al. 2022);
        "leading50": multiples of ⌊T/S⌋ from 0; "leading50+1": from 1 (Lin et al. 2024, Table 2; diffusers, with
          steps_offset);
        "trailing50": T−1 and down in even steps, rounded (Lin et al. 2024, Table 2);
        the list of steps itself, or that list as text: "[0,20,41]".
        Equal steps of "quad50" and "logsnr50" are moved to neighbours that are free. A single step is always T−1, where
        sampling begins.
      num_timesteps: T.
      snr: the signal-to-noise ratio of the full chain, for "logsnr50".

    Raises:
      ValueError: S outside 1 … T; steps that repeat, decrease or are out of range; text that cannot be read.
    """
    T = num_timesteps
    if isinstance(steps, (int, np.integer)):
        steps = str(int(steps))
    if isinstance(steps, str) and steps.startswith("["):
        with contextlib.suppress(
            ValueError, RecursionError
        ):  # text that cannot be read is refused below
            steps = json.loads(steps)
    if not isinstance(steps, str):
        return _listed(steps, T)
    kind = next((word for word in SPACINGS.values() if word and steps.startswith(word)), "")
    numbers, plus, offset = steps.removeprefix(kind).partition("+")
    try:
        counts = [int(part) for part in numbers.split(",")]
        first = int(offset) if plus else 0
        counts = [] if plus and kind != "leading" else counts
    except ValueError:
        counts = []
    if not counts or (kind and len(counts) > 1):
        raise ValueError(
            f"cannot read steps={steps!r}; write 50, 'ddim50', 'quad50', 'logsnr50', 'leading50',"
            " 'trailing50', '10,15,20' or '[0,20,41]'"
        )
    if counts == [1]:
        return np.array([T - 1])
    if not kind:
        return _parts(counts, T, steps)
    S = _checked(counts[0], T, steps)
    if kind == "ddim":
        strides = [k for k in range(1, T + 1) if len(range(0, T, k)) == S]
        return np.arange(S) * strides[0] if strides else np.arange(S) * T // S
    if kind == "leading":
        return _listed(np.arange(S) * (T // S) + first, T)
    if kind == "trailing":
        return np.round(T - np.arange(S) * (T / S)).astype(np.int64)[::-1] - 1
    if kind == "quad":
        squares = np.floor(np.linspace(0, np.sqrt(0.8 * T), S) ** 2 + 1e-9)
        return _distinct(squares.astype(np.int64), T)
    if snr is None or not np.min(snr) > 0:
        raise ValueError(
            f"steps={steps!r} needs a chain whose SNR stays above 0; choose another spacing"
        )
    log_snr = np.log(snr)[::-1]  # increasing
    middles = (log_snr[1:] + log_snr[:-1]) / 2
    nearest = np.searchsorted(middles, np.linspace(log_snr[0], log_snr[-1], S))
    return _distinct(T - 1 - nearest[::-1], T)


def as_text(steps: Steps) -> str:
    """Steps as text, which is the same for 5, "5" and NumPy's 5, and for a list, a tuple and an array."""
    return (steps if isinstance(steps, str) else str(np.asarray(steps).tolist())).replace(" ", "")


def _checked(count: int, available: int, steps: Steps) -> int:
    if not 1 <= count <= available:
        raise ValueError(
            f"steps={steps!r} asks for {count} of {available} steps; choose 1 to {available}"
        )
    return count


def _listed(steps, T: int) -> Int[np.ndarray, " S"]:
    """The steps of a list, after a check."""
    try:
        tau = np.asarray(steps)
    except ValueError:  # a list of lists of different lengths
        tau = np.zeros((0, 0))
    whole = np.issubdtype(tau.dtype, np.integer)
    if tau.ndim != 1 or tau.size == 0 or not whole or any(isinstance(t, bool) for t in steps):
        raise ValueError(f"steps must be whole numbers, got {steps!r}")
    if (np.diff(tau) <= 0).any() or tau[0] < 0 or tau[-1] >= T:
        raise ValueError(
            f"a list of steps must increase strictly within 0 … {T - 1}, got {tau.tolist()}"
        )
    return tau.astype(np.int64)


def _distinct(tau: Int[np.ndarray, " S"], T: int) -> Int[np.ndarray, " S"]:
    """Moves equal steps up to free ones, or down at T − 1."""
    i = np.arange(len(tau))
    tau = np.maximum.accumulate(tau - i) + i
    return np.minimum(tau, T - len(tau) + i)


def _parts(counts: list[int], T: int, steps: str) -> Int[np.ndarray, " S"]:
    """counts[i] evenly spaced steps, rounded, from the i-th of equal parts of the chain."""
    _checked(sum(counts), T, steps)
    tau: list[int] = []
    first = 0
    for part, count in enumerate(counts):
        size = T // len(counts) + (part < T % len(counts))
        if count:  # a part may have none
            _checked(count, size, steps)
        # Summed as in Improved DDPM's code: i * stride can round differently at a half.
        stride = [0.0, *(count - 1) * [(size - 1) / max(count - 1, 1)]]
        tau.extend(first + round(offset) for offset in itertools.accumulate(stride[:count]))
        first += size
    return np.asarray(tau)


def respace(schedule: Schedule, tau: Sequence[int]) -> Schedule:
    """The chain that visits only the steps `tau` of `schedule`, with their α, σ and times.

    σ²_{t|s} is that between its own neighbouring steps; for β: Nichol & Dhariwal (19).
    """
    rows = subsequence(np.asarray(tau), len(schedule))
    return Schedule(schedule.alpha[rows], schedule.sigma[rows], schedule.times[rows])


@functools.lru_cache(maxsize=256)  # schedules are compared by identity: equal chains compile once
def _respaced(schedule: Schedule, tau: tuple[int, ...]) -> Schedule:
    return respace(schedule, tau)


def shorten(
    schedule: Schedule, steps: Steps | None, *, spacing: str | None = None, last: int | None = None
) -> Schedule:
    """Shortens a chain to some of its steps, for sampling or the bound in fewer network calls.

    Args:
      steps: see `subsequence`; None for all.
      spacing: a key of `SPACINGS`, for a plain number of steps: 50 with "quadratic" is "quad50". For steps of parts, such
        as "10,15,20", only "uniform".
      last: keep only steps below `last`, and end with it: for sampling that begins from x_t with t = last.

    Raises:
      ValueError: as `subsequence`; a spacing without a number of steps; `last` outside 0 … T−1.

    >>> schedule = dj.linear_schedule(1000)
    >>> dj.shorten(schedule, 5).times.tolist()
    [0, 250, 500, 749, 999]
    >>> dj.shorten(schedule, 5, spacing="quadratic", last=600).times.tolist()
    [0, 50, 200, 450, 600]
    """
    T = len(schedule)
    if spacing is not None:
        check_choice("spacing", spacing, list(SPACINGS))
        has_parts = spacing == "uniform" and "," in str(steps) and isinstance(steps, str)
        if not (str(steps).isdecimal() or has_parts):
            raise ValueError(
                f"spacing={spacing!r} needs a number of steps, such as steps=50; got steps={steps!r}"
            )
        steps = f"{SPACINGS[spacing]}{steps}"
    tau = np.arange(T) if steps is None else subsequence(steps, T, snr=schedule.snr)
    if isinstance(steps, str) and not steps.startswith("[") and not schedule.is_variance_preserving:
        tau = np.append(tau[:-1], T - 1)  # the prior has the noise level of step T − 1
    if last is not None:
        if not 0 <= last < T:
            raise ValueError(f"from_t={last} is not a step of the chain; choose 0 to {T - 1}")
        tau = np.append(tau[tau < last], last)
    return schedule if len(tau) == T else _respaced(schedule, tuple(tau.tolist()))
