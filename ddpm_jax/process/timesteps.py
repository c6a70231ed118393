"""Shortened chains: which of the T steps are visited, by number, spacing or list."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from ddpm_jax.names import check_choice
from ddpm_jax.process.schedules import Schedule

# How S times are spread over a chain, and the prefix that stands for it in a text of steps.
SPACINGS = {"uniform": "", "linear": "ddim", "quadratic": "quad", "log_snr": "logsnr"}


def subsequence(
    steps: int | str | ArrayLike, num_timesteps: int, *, snr: np.ndarray | None = None
) -> Int[np.ndarray, " S"]:
    """The rows τ of a shortened chain: [S] int, strictly increasing in 0 … T−1, for any S ≤ T.

    Args:
      steps: one of
        50 or "50": S evenly rounded times from 0 to T−1 (Nichol & Dhariwal §4);
        "10,15,20": 10, 15 and 20 times from three equal parts of the chain, of which the first T mod 3 are longer by
          one (`space_timesteps` in their code, with its rounding);
        "ddim50": every k-th time from 0 where some k gives exactly S of them, otherwise ⌊iT/S⌋ (Song et al. App. D.2,
          linear);
        "quad50": squares of evenly spaced numbers from 0 to √(0.8T) (Song et al.'s code), each moved up or down by the
          least that keeps them distinct;
        "logsnr50": the times nearest to evenly spaced values of log SNR (Lu et al. 2022), kept distinct likewise;
        a list of the times themselves, or such a list as text: "[0,20,41]".
        A single step is T−1 with any spacing, the only time whose noise level is that of x_T.
      num_timesteps: T.
      snr: [T], the signal-to-noise ratio of the chain, for "logsnr50".

    Raises:
      ValueError: S outside 1 … T, times repeated, unordered or out of range, unreadable text.
    """
    T = num_timesteps
    if isinstance(steps, (int, np.integer)):
        steps = str(int(steps))
    if isinstance(steps, str) and steps.startswith("["):
        with contextlib.suppress(json.JSONDecodeError):  # unreadable text is refused below
            steps = json.loads(steps)
    if not isinstance(steps, str):
        return _listed(steps, T)
    kind = next((word for word in SPACINGS.values() if word and steps.startswith(word)), "")
    try:
        counts = [int(part) for part in steps.removeprefix(kind).split(",")]
    except ValueError:
        counts = []
    if not counts or (kind and len(counts) > 1):
        raise ValueError(
            f"cannot read steps={steps!r}; write 50, 'ddim50', 'quad50', 'logsnr50', '10,15,20' or"
            " '[0,20,41]'"
        )
    if counts == [1]:
        return np.array([T - 1])
    if not kind:
        return _parts(counts, T, steps)
    S = _checked(counts[0], T, steps)
    if kind == "ddim":
        strides = [k for k in range(1, T + 1) if len(range(0, T, k)) == S]
        return np.arange(S) * strides[0] if strides else np.arange(S) * T // S
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


def as_text(steps: int | str | Sequence[int]) -> str:
    """Steps as text: the same for 5, "5" and NumPy's 5, and the same for a list and a tuple."""
    return (steps if isinstance(steps, str) else str(np.asarray(steps).tolist())).replace(" ", "")


def _checked(count: int, room: int, steps) -> int:
    if not 1 <= count <= room:
        raise ValueError(f"steps={steps!r} asks for {count} of {room} steps; choose 1 to {room}")
    return count


def _listed(steps, T: int) -> np.ndarray:
    """A list of the times themselves."""
    try:
        tau = np.asarray(steps)
    except ValueError:  # lists of several lengths in it
        tau = np.zeros((0, 0))
    if tau.ndim != 1 or tau.size == 0 or not np.issubdtype(tau.dtype, np.integer):
        raise ValueError(f"a list of steps must hold whole numbers, got {list(steps)!r}")
    if (np.diff(tau) <= 0).any() or tau[0] < 0 or tau[-1] >= T:
        raise ValueError(
            f"a list of steps must increase strictly within 0 … {T - 1}, got {tau.tolist()}"
        )
    return tau.astype(np.int64)


def _distinct(tau: np.ndarray, T: int) -> np.ndarray:
    """Times moved up where two fell together, and never past T − 1."""
    i = np.arange(len(tau))
    tau = np.maximum.accumulate(tau - i) + i
    return np.minimum(tau, T - len(tau) + i)


def _parts(counts: list[int], T: int, steps: str) -> np.ndarray:
    """Evenly rounded times from equal parts of the chain, `counts` of them."""
    _checked(sum(counts), T, steps)
    tau: list[int] = []
    first = 0
    for part, count in enumerate(counts):
        size = T // len(counts) + (part < T % len(counts))
        if count:  # a part may have none
            _checked(count, size, steps)
        # Added up one by one, as their code does: i * stride can round the other way at a half.
        stride = [0.0, *(count - 1) * [(size - 1) / max(count - 1, 1)]]
        tau.extend(first + round(at) for at in itertools.accumulate(stride[:count]))
        first += size
    return np.asarray(tau)


def respace(schedule: Schedule, tau: ArrayLike) -> Schedule:
    """The chain that visits only the rows `tau` of `schedule`, with the same (α, σ) and times.

    Its σ²_{t|s} follow from its own neighbours (for β: Nichol & Dhariwal (19)).
    """
    rows = subsequence(tau, len(schedule))
    return Schedule(schedule.alpha[rows], schedule.sigma[rows], schedule.times[rows])


@functools.lru_cache(maxsize=256)  # a chain is compared by identity, and equal ones compile once
def _respaced(schedule: Schedule, tau: tuple[int, ...]) -> Schedule:
    return respace(schedule, tau)


def shorten(
    schedule: Schedule,
    steps: int | str | Sequence[int] | None,
    *,
    spacing: str | None = None,
    last: int | None = None,
) -> Schedule:
    """The chain shortened to `steps`: `respace` of `subsequence`.

    Args:
      steps: as `subsequence`; None for all of them.
      spacing: a name of `SPACINGS`, for a plain number of steps: 50 with "quadratic" is "quad50". The steps of parts,
        "10,15,20", are "uniform" in each part.
      last: the row of `schedule` at which the chain begins, if not at pure noise; steps above it are dropped.

    Raises:
      ValueError: as `subsequence`; a spacing without a plain number of steps; a row outside 0 … T−1.

    >>> from ddpm_jax.process.schedules import linear
    >>> shorten(linear(1000), 4).times.tolist()  # the network's own times
    [0, 333, 666, 999]
    """
    T = len(schedule)
    if spacing is not None:
        check_choice("spacing", spacing, list(SPACINGS))
        of_parts = spacing == "uniform" and "," in str(steps) and isinstance(steps, str)
        if not (str(steps).isdecimal() or of_parts):
            raise ValueError(
                f"spacing={spacing!r} spreads a number of steps, such as steps=50; got steps={steps!r}"
            )
        steps = f"{SPACINGS[spacing]}{steps}"
    tau = np.arange(T) if steps is None else subsequence(steps, T, snr=schedule.snr)
    if isinstance(steps, str) and not steps.startswith("[") and not schedule.is_variance_preserving:
        tau = np.append(
            tau[:-1], T - 1
        )  # elsewhere less noise than the prior would begin the chain
    if last is not None:
        if not 0 <= last < T:
            raise ValueError(f"from_t={last} is not a time of the chain; choose 0 to {T - 1}")
        tau = np.append(tau[tau < last], last)
    return schedule if len(tau) == T else _respaced(schedule, tuple(tau.tolist()))
