"""Noise schedules: β_t over T steps, in float64, and shortened chains of them.

A `Schedule` is an immutable table. Time runs t = 0 … T−1; x_0 is data, and ᾱ before the first step is 1.
Everything derived from β (α, ᾱ, their shifted forms) is computed here once in NumPy float64; whoever
puts a table on a device casts it to float32 at that moment and not before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(
    frozen=True, eq=False
)  # compared and hashed by identity: a static jit argument
class Schedule:
    """The coefficients of a diffusion over S steps.

    Attributes:
      beta: [S] float64 in (0, 1], the variance that step i adds.
      timesteps: [S] int32, strictly increasing: the time t that the network is given at step i. For a
        full chain this is 0 … T−1; a shortened chain remembers the times of the chain it came from.
    """

    beta: np.ndarray  # [S]
    timesteps: np.ndarray  # [S]

    def __post_init__(self):
        beta = np.array(self.beta, np.float64)
        timesteps = np.array(self.timesteps, np.int32)
        if beta.ndim != 1 or beta.size == 0:
            raise ValueError(f"betas must be a non-empty list of numbers, got shape {beta.shape}")
        bad = np.flatnonzero(~((1.0 - beta < 1.0) & (beta <= 1)))
        if bad.size:
            raise ValueError(
                f"every beta must lie in (0, 1], but beta[{bad[0]}] = {beta[bad[0]]:g}"
                f" ({bad.size} of {beta.size} are outside)"
            )
        if timesteps.shape != beta.shape or (np.diff(timesteps) <= 0).any() or timesteps[0] < 0:
            raise ValueError("timesteps must increase strictly from 0 or later, one for each beta")
        for name, value in (("beta", beta), ("timesteps", timesteps)):
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return self.beta.size

    @functools.cached_property
    def alpha(self) -> np.ndarray:  # [S]
        """α_t = 1 − β_t."""
        return 1.0 - self.beta

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:  # [S]
        """ᾱ_t = ∏_{s≤t} α_s, Ho et al. (4)."""
        return np.cumprod(self.alpha)

    @functools.cached_property
    def alpha_bar_prev(self) -> np.ndarray:  # [S]
        """ᾱ_{t−1}, with ᾱ_{−1} = 1."""
        return np.append(1.0, self.alpha_bar[:-1])

    @functools.cached_property
    def snr(self) -> np.ndarray:  # [S]
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t)."""
        return self.alpha_bar / (1.0 - self.alpha_bar)


# ---- β_t by name -----------------------------------------------------------------------------------


def linear(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """β from `start` to `end` in even steps; Ho et al. §4 (T = 1000, 1e-4 → 0.02)."""
    return np.linspace(start, end, num_timesteps, dtype=np.float64)


def quad(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """√β in even steps; an option of Ho et al.'s code."""
    return np.linspace(start**0.5, end**0.5, num_timesteps, dtype=np.float64) ** 2


def const(num_timesteps: int = 1000, *, end: float = 0.02) -> np.ndarray:
    """β = `end` at every step; an option of Ho et al.'s code."""
    return np.full(num_timesteps, end, np.float64)


def jsd(num_timesteps: int = 1000) -> np.ndarray:
    """β = 1/T, 1/(T−1), …, 1 (Sohl-Dickstein et al. 2015 §2.4.1): ᾱ falls linearly and ends at exactly 0."""
    return 1.0 / np.linspace(num_timesteps, 1, num_timesteps, dtype=np.float64)


def _warmup(num_timesteps: int, start: float, end: float, fraction: float) -> np.ndarray:
    beta = np.full(num_timesteps, end, np.float64)
    warm = int(num_timesteps * fraction)
    beta[:warm] = np.linspace(start, end, warm, dtype=np.float64)
    return beta


def warmup10(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Linear over the first tenth, then constant; an option of Ho et al.'s code."""
    return _warmup(num_timesteps, start, end, 0.1)


def warmup50(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Linear over the first half, then constant; an option of Ho et al.'s code."""
    return _warmup(num_timesteps, start, end, 0.5)


def sigmoid(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """β follows a logistic curve over [−6, 6]; an option of Song et al.'s DDIM code."""
    return start + (end - start) / (1.0 + np.exp(-np.linspace(-6, 6, num_timesteps)))


def cosine(
    num_timesteps: int = 1000, *, offset: float = 0.008, max_beta: float = 0.999
) -> np.ndarray:
    """ᾱ(u) = cos²((u + offset)/(1 + offset) · π/2), β clipped at `max_beta`; Nichol & Dhariwal (17)."""

    def log_alpha_bar(u):
        return 2.0 * np.log(np.abs(np.cos((u + offset) / (1 + offset) * np.pi / 2)))

    u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    return np.minimum(-np.expm1(np.diff(log_alpha_bar(u))), max_beta)


NAMED: dict[str, Callable[..., np.ndarray]] = {
    f.__name__: f for f in (linear, quad, const, jsd, warmup10, warmup50, sigmoid, cosine)
}


def from_betas(betas: Sequence[float]) -> Schedule:
    """The full chain of the given β_0 … β_{T−1}, each in (0, 1]."""
    return Schedule(betas, np.arange(len(betas)))


def make(
    name: str,
    num_timesteps: int | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
    betas: Sequence[float] | None = None,
) -> Schedule:
    """A full chain by the name of its β, or from a user's own list.

    Args:
      name: a key of `NAMED`, or "betas" for the list in `betas`.
      num_timesteps: T ≥ 1; None takes the schedule's default, 1000.
      start, end: first and last β where the schedule has them; None takes the default, 1e-4 and 0.02.
      betas: [T] numbers in (0, 1], for name="betas" only.

    Raises:
      ValueError: unknown name, T < 1, an option that this schedule does not have, a β outside (0, 1].
    """
    given = {"num_timesteps": num_timesteps, "start": start, "end": end, "betas": betas}
    given = {key: value for key, value in given.items() if value is not None}
    if name == "betas":
        takes = {"betas", "num_timesteps"}
    elif name in NAMED:
        function = NAMED[name]
        takes = {"num_timesteps", *(function.__kwdefaults__ or ())} & {
            "num_timesteps",
            "start",
            "end",
        }
    else:
        close = difflib.get_close_matches(name, [*NAMED, "betas"], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown schedule {name!r}; {hint}choose from {', '.join(NAMED)}, betas")
    for key in given.keys() - takes:
        raise ValueError(f"schedule {name!r} takes {', '.join(sorted(takes))}, but not {key!r}")
    if num_timesteps is not None and num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if name == "betas":
        if betas is None or len(betas) == 0:
            raise ValueError("schedule 'betas' needs the list betas=(…), T numbers in (0, 1]")
        if num_timesteps not in (None, len(betas)):
            raise ValueError(f"num_timesteps is {num_timesteps}, but {len(betas)} betas are given")
        return from_betas(betas)
    return from_betas(function(**given))


# ---- shortened chains ------------------------------------------------------------------------------


# How S times are spread over a chain, by name: what `subsequence` wants before the number.
SPACINGS = {"uniform": "", "linear": "ddim", "quadratic": "quad", "log_snr": "logsnr"}


def subsequence(
    steps: int | str | Sequence[int], num_timesteps: int, *, snr: np.ndarray | None = None
) -> np.ndarray:
    """The times τ of a shortened chain: [S] int, strictly increasing in 0 … T−1, for any S ≤ T.

    Args:
      steps: one of
        50 or "50": S evenly rounded times from 0 to T−1 (Nichol & Dhariwal §4);
        "10,15,20": so many from each of three equal parts of the chain, the first T mod 3 of which are
          longer by one; `space_timesteps` of their code, and rounded as there;
        "ddim50": every k-th time from 0 where some k gives exactly S of them, else ⌊iT/S⌋
          (Song et al. App. D.2, linear);
        "quad50": squares of evenly spaced numbers from 0 to √(0.8T) (Song et al.'s code), each moved
          up or down by the least that keeps them distinct;
        "logsnr50": the times nearest to evenly spaced values of log SNR (Lu et al. 2022), kept distinct
          in the same way;
        a list of the times themselves, or such a list as text: "[0,20,41]".
        One step, however it is spaced, is T−1: noise has only there the level that the chain begins with.
      num_timesteps: T.
      snr: [T], the signal-to-noise ratio of the chain, for "logsnr50".

    Raises:
      ValueError: S outside 1 … T, times repeated, unordered or out of range, unreadable text.
    """
    T = num_timesteps

    def distinct(tau):
        i = np.arange(len(tau))
        tau = np.maximum.accumulate(tau - i) + i  # moved up where two fell together
        return np.minimum(tau, T - len(tau) + i)  # and never past T − 1

    def check(count, room=T):
        if not 1 <= count <= room:
            raise ValueError(
                f"steps={steps!r} asks for {count} of {room} steps; choose 1 to {room}"
            )
        return count

    if isinstance(steps, (int, np.integer)):
        steps = str(int(steps))
    if isinstance(steps, str) and steps.startswith("["):
        with contextlib.suppress(json.JSONDecodeError):  # what cannot be read is refused below
            steps = json.loads(steps)
    if not isinstance(steps, str):
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
    if kind:
        S = check(counts[0])
    if kind == "ddim":
        strides = [k for k in range(1, T + 1) if len(range(0, T, k)) == S]
        return np.arange(S) * strides[0] if strides else np.arange(S) * T // S
    if kind == "quad":
        return distinct(np.floor(np.linspace(0, np.sqrt(0.8 * T), S) ** 2 + 1e-9).astype(np.int64))
    if kind == "logsnr":
        if snr is None or not np.min(snr) > 0:
            raise ValueError(
                f"steps={steps!r} needs a chain whose SNR stays above 0; choose another spacing"
            )
        log_snr = np.log(snr)[::-1]  # increasing
        middles = (log_snr[1:] + log_snr[:-1]) / 2
        nearest = np.searchsorted(middles, np.linspace(log_snr[0], log_snr[-1], S))
        return distinct(T - 1 - nearest[::-1])
    check(sum(counts))
    tau, first = [], 0
    for part, count in enumerate(counts):
        size = T // len(counts) + (part < T % len(counts))
        if count:  # a part may have none
            check(count, size)
        # Added up one by one, as their code does: i * stride can round the other way at a half.
        stride = [0.0, *(count - 1) * [(size - 1) / max(count - 1, 1)]]
        tau.extend(first + round(at) for at in itertools.accumulate(stride[:count]))
        first += size
    return np.asarray(tau)


def respace(schedule: Schedule, tau: Sequence[int]) -> Schedule:
    """The chain that visits only the steps `tau` of `schedule`, itself a Schedule.

    Its α are ratios of the original ᾱ, so its ᾱ are the original ᾱ at τ (Nichol & Dhariwal (19)), and
    it remembers the time that the network was trained with.
    """
    tau = subsequence(np.asarray(tau), len(schedule))
    alpha_bar = schedule.alpha_bar[tau]
    previous = np.append(1.0, alpha_bar[:-1])
    # 0/0 arises only after a step with β = 1; nothing is left of the signal then, so β stays 1.
    alpha = np.divide(alpha_bar, previous, out=np.zeros_like(alpha_bar), where=previous > 0)
    return Schedule(1.0 - alpha, schedule.timesteps[tau])


def shorten(
    schedule: Schedule,
    steps: int | str | Sequence[int] | None,
    *,
    spacing: str | None = None,
    last: int | None = None,
) -> Schedule:
    """The chain that a user asks for: `respace` of `subsequence`.

    Args:
      steps: as `subsequence`; None for all of them.
      spacing: a name of `SPACINGS`, for a plain number of steps: 50 with "quadratic" is "quad50". The steps
        of parts, "10,15,20", are "uniform" in each part and nothing else.
      last: the time t of `schedule` where a chain begins that does not come from pure noise: of the steps
        those below it are kept, and it is the last.

    Raises:
      ValueError: as `subsequence`; a spacing without a plain number of steps; a time outside 0 … T−1.
    """
    T = len(schedule)
    if spacing is not None:
        if spacing not in SPACINGS:
            close = difflib.get_close_matches(spacing, SPACINGS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"unknown spacing {spacing!r}; {hint}choose from {', '.join(SPACINGS)}"
            )
        of_parts = spacing == "uniform" and "," in str(steps) and isinstance(steps, str)
        if not (str(steps).isdecimal() or of_parts):
            raise ValueError(
                f"spacing={spacing!r} spreads a number of steps, such as steps=50; got steps={steps!r}"
            )
        steps = f"{SPACINGS[spacing]}{steps}"
    tau = np.arange(T) if steps is None else subsequence(steps, T, snr=schedule.snr)
    if last is not None:
        if not 0 <= last < T:
            raise ValueError(f"from_t={last} is no time of the chain; choose 0 to {T - 1}")
        tau = np.append(tau[tau < last], last)
    return schedule if len(tau) == T else respace(schedule, tau)


# ---- the health of a schedule ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Health:
    """Whether a finite chain reaches its prior N(0, I).

    Attributes:
      alpha_bar_T: the share of the data's variance that is left at the end.
      prior_bits_per_dim: L_T = KL(q(x_T | x_0) ‖ N(0, I)) in bits per dimension.
      sum_beta: Σβ_t, which for longer and longer chains must grow without end (Tang, Proposition 1.1).
      alpha_bar_bound: e^−Σβ, which ᾱ_T = ∏(1 − β_t) never exceeds.
      warning: empty, or one line that says why sampling from N(0, I) starts at the wrong place.
    """

    alpha_bar_T: float
    prior_bits_per_dim: float
    sum_beta: float
    alpha_bar_bound: float
    warning: str


def health(schedule: Schedule, *, second_moment: float = 1.0) -> Health:
    """Judges the end of a chain: Σβ_t must be large enough that ∏(1 − β_t) is nearly 0.

    For an endless chain ∏(1 − β_t) = 0 exactly if Σβ_t diverges, and then x_t tends to N(0, I) from any x_0
    (Tang, Propositions 1.1 and 1.2). Of a finite one −ln(1 − β) ≥ β leaves ᾱ_T ≤ e^−Σβ.

    Args:
      second_moment: E[x_0²] of the data scaled to [−1, 1]; the default is an upper bound.

    A chain is called short if L_T exceeds 0.001 bits/dim: the paper's has 1e-5, and a thousandth of a
    bit is the resolution at which likelihoods are compared.
    """
    alpha_bar_T = float(schedule.alpha_bar[-1])
    nats = 0.5 * (alpha_bar_T * (second_moment - 1.0) - np.log1p(-alpha_bar_T))
    bits = float(nats / np.log(2.0))
    sum_beta = float(np.sum(schedule.beta))
    warning = ""
    if bits > 1e-3:
        warning = (
            f"the chain does not reach N(0, I): alpha_bar_T = {alpha_bar_T:.3g} leaves a prior term of"
            f" {bits:.3g} bits/dim; use more steps or larger betas"
        )
    return Health(alpha_bar_T, bits, sum_beta, float(np.exp(-sum_beta)), warning)
