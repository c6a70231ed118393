"""Noise schedules: tables of (α_t, σ_t) in float64, with x_t = α_t x_0 + σ_t ε and ε ~ N(0, I).

A row of a `Schedule` is a step t = 0 … S−1 of the chain. Before step 0 are the data: α = 1 and σ = 0. Chains that are
variance preserving (α² + σ² = 1), variance exploding (α = 1) or straight (α + σ = 1) are the same type, so posterior,
bound, samplers and respacing are written once. Tables are float64, and become float32 only in computations on the device.

    one step   α_{t|s} = α_t / α_s,   σ²_{t|s} = σ_t² − α²_{t|s} σ_s²       s = t − 1                 Kingma et al. 2021
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Num, UInt32
from numpy.typing import ArrayLike

from ddpm_jax import options
from ddpm_jax.names import find, nearest

PRIOR_STREAM = 2**32 - 1  # noise id of x_T, different from that of every step


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static jit argument
class Schedule:
    """The coefficients of x_t = α_t x_0 + σ_t ε for a chain of S steps.

    Attributes:
      alpha: [S] float64 ≥ 0, the coefficient of x_0. It may be 0 at the end.
      sigma: [S] float64 > 0, the standard deviation of the noise. σ/α must not decrease.
      times: [S], strictly increasing: the time that the network receives at each step. int32 if all are whole numbers,
        otherwise float32. By default 0 … S−1; a shortened chain keeps the times of the full one.
      step_variance: [S] float64 > 0, σ²_{t|s}, which is β_t for a variance-preserving chain. By default it is computed
        from α and σ as a difference, which loses digits for short steps; pass it if it is known exactly.
      ends: (α_s, σ_s), [S] each: the noise levels to which the steps lead. By default those of the step before, and of the
        data for step 0.

    Raises:
      ValueError: shapes differ, or values are outside these ranges.

    >>> u = np.arange(1, 101) / 100
    >>> path = dj.Schedule(alpha=np.cos(np.pi / 2 * u), sigma=np.sin(np.pi / 2 * u))
    >>> len(path), path.is_variance_preserving, path.snr[49].round(6).item()
    (100, True, 1.0)
    """

    alpha: Float64[np.ndarray, " S"]
    sigma: Float64[np.ndarray, " S"]
    times: Num[np.ndarray, " S"] = None  # type: ignore[assignment]  # set in __post_init__
    step_variance: Float64[np.ndarray, " S"] = None  # type: ignore[assignment]
    ends: tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]] | None = None

    def __post_init__(self):
        alpha, sigma = (np.array(table, np.float64) for table in (self.alpha, self.sigma))
        if alpha.ndim != 1 or alpha.size == 0 or alpha.shape != sigma.shape:
            raise ValueError(
                f"alpha and sigma must be two lists of equal length, got shapes {alpha.shape} and"
                f" {sigma.shape}"
            )
        if not (np.isfinite(alpha) & np.isfinite(sigma) & (alpha >= 0) & (sigma > 0)).all():
            raise ValueError("alpha must be at least 0, sigma above 0, and both finite")
        times = np.arange(alpha.size) if self.times is None else np.array(self.times, np.float64)
        if not np.isfinite(times).all():
            raise ValueError("times must be finite")
        whole = (times == np.round(times)).all()
        times = times.astype(np.int32 if whole else np.float32)
        if times.shape != alpha.shape or (np.diff(times) <= 0).any() or (whole and times[0] < 0):
            raise ValueError(
                "times must increase strictly, one for each step, and whole numbers begin at 0 or later"
            )
        self._set(alpha=alpha, sigma=sigma, times=times)
        if not (self.ratio[1:] >= self.ratio[:-1]).all():
            raise ValueError("sigma / alpha must not decrease: every step adds noise")
        difference = sigma**2 - self.step_alpha**2 * self.sigma_prev**2
        if self.ends is not None:  # a step may then lead to where it begins
            difference = np.maximum(difference, np.finfo(np.float64).tiny)
        step_variance = difference if self.step_variance is None else self.step_variance
        step_variance = np.array(step_variance, np.float64)
        if step_variance.shape != alpha.shape or not (step_variance > 0).all():
            raise ValueError("every step must add noise, but the variance of one is not above 0")
        if not (abs(step_variance - difference) <= 1e-6 * sigma**2 + 1e-13).all():
            raise ValueError(
                "step_variance must be sigma² − (alpha/alpha of the step before)² sigma² of it"
            )
        self._set(step_variance=step_variance)

    def _set(self, **tables: np.ndarray) -> None:
        for name, table in tables.items():
            table.flags.writeable = False
            object.__setattr__(self, name, table)

    def __len__(self) -> int:
        return self.alpha.size

    @functools.cached_property
    def ratio(self) -> Float64[np.ndarray, " S"]:
        """σ/α, infinite where α is 0."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    @functools.cached_property
    def alpha_prev(self) -> Float64[np.ndarray, " S"]:
        """α of the previous step; 1 for step 0."""
        if self.ends is not None:
            return self.ends[0]
        return np.append(1.0, self.alpha[:-1])

    @functools.cached_property
    def sigma_prev(self) -> Float64[np.ndarray, " S"]:
        """σ of the previous step; 0 for step 0."""
        if self.ends is not None:
            return self.ends[1]
        return np.append(0.0, self.sigma[:-1])

    @functools.cached_property
    def step_alpha(self) -> Float64[np.ndarray, " S"]:
        """α_{t|s} = α_t / α_s of each step; 0 where α_s is 0."""
        before = self.alpha_prev
        return np.divide(self.alpha, before, out=np.zeros_like(before), where=before > 0)

    @functools.cached_property
    def is_variance_preserving(self) -> bool:
        """Whether α² + σ² = 1 at every step."""
        return bool(np.allclose(self.alpha**2 + self.sigma**2, 1.0, rtol=0.0, atol=1e-9))

    def _check_variance_preserving(self, what: str) -> None:
        if not self.is_variance_preserving:
            raise ValueError(
                f"only a variance-preserving chain has {what}; use alpha, sigma and step_variance"
            )

    @property
    def beta(self) -> Float64[np.ndarray, " S"]:
        """β_t of a variance-preserving chain, Ho et al. (2): the same as `step_variance`."""
        self._check_variance_preserving("beta")
        return self.step_variance

    @property
    def alpha_bar(self) -> Float64[np.ndarray, " S"]:
        """ᾱ_t = α_t² of a variance-preserving chain, Ho et al. (4)."""
        self._check_variance_preserving("alpha_bar")
        return self.alpha**2

    @functools.cached_property
    def snr(self) -> Float64[np.ndarray, " S"]:
        """The signal-to-noise ratio α²/σ²."""
        return (self.alpha / self.sigma) ** 2

    @functools.cached_property
    def prior_std(self) -> float:
        """The standard deviation of the prior: of x_T for data of unit variance; 1 if variance preserving."""
        if self.is_variance_preserving:
            return 1.0
        return float(np.hypot(self.alpha[-1], self.sigma[-1]))

    @functools.cached_property
    def noise_ids(self) -> UInt32[np.ndarray, " S"]:
        """The numbers folded into an example's key for the noise of each step, see `diffusion.noise`.

        A function of the step's time: the time itself if it is a whole number ≥ 0, otherwise the bits of its float32.
        """
        times = np.asarray(self.times, np.float32)
        whole = (times == np.round(times)) & (times >= 0)
        return np.where(whole, np.maximum(self.times, 0).astype(np.uint32), times.view(np.uint32))

    def at(self, ratio: ArrayLike) -> Schedule:
        """The chain with the noise levels σ/α = `ratio`, which need not be levels of this chain.

        The time and log α are interpolated linearly in log σ/α, so times are fractional. (α of a variance-preserving chain
        is exact.)

        Args:
          ratio: [K], strictly increasing, within the range of this chain.

        Raises:
          ValueError: a level is out of range.
        """
        levels, rows = np.asarray(ratio, np.float64), np.isfinite(self.ratio)
        known = self.ratio[rows]
        slack = 1e-9
        if levels.min() < known[0] * (1 - slack) or levels.max() > known[-1] * (1 + slack):
            raise ValueError(
                f"levels sigma/alpha must lie within {known[0]:.4g} and {known[-1]:.4g}, got"
                f" {levels.min():.4g} to {levels.max():.4g}"
            )
        log_level, known = np.log(levels), np.log(known)
        if self.is_variance_preserving:
            alpha = 1.0 / np.sqrt(1.0 + levels**2)
        else:
            alpha = np.exp(np.interp(log_level, known, np.log(self.alpha[rows])))
        return Schedule(alpha, levels * alpha, np.interp(log_level, known, self.times[rows]))


# ---- variance-preserving chains ----------------------------------------------------------------------


def from_betas(betas: ArrayLike) -> Schedule:
    """The variance-preserving chain with variances β_0 … β_{T−1}, each in (0, 1]; Ho et al. (2)."""
    beta = np.array(betas, np.float64)
    if beta.ndim != 1 or beta.size == 0:
        raise ValueError(f"betas must be a non-empty list of numbers, got shape {beta.shape}")
    bad = np.flatnonzero(~((1.0 - beta < 1.0) & (beta <= 1)))
    if bad.size:
        raise ValueError(
            f"every beta must lie in (0, 1], but beta[{bad[0]}] = {beta[bad[0]]:g}"
            f" ({bad.size} of {beta.size} are outside)"
        )
    alpha_bar = np.cumprod(1.0 - beta)
    return Schedule(np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar), step_variance=beta)


def linear(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """β from `start` to `end` in even steps; Ho et al. §4 (T = 1000, 1e-4 to 0.02).

    >>> schedule = dj.linear_schedule(1000)
    >>> schedule.beta[[0, -1]].tolist(), f"{schedule.alpha_bar[-1]:.1e}"
    ([0.0001, 0.02], '4.0e-05')
    """
    return from_betas(np.linspace(start, end, num_timesteps))


def quadratic(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """√β in even steps; an option of Ho et al.'s code."""
    return from_betas(np.linspace(start**0.5, end**0.5, num_timesteps) ** 2)


def constant(num_timesteps: int = 1000, *, end: float = 0.02) -> Schedule:
    """β = `end` at every step; an option of Ho et al.'s code."""
    return from_betas(np.full(num_timesteps, end))


def jsd(num_timesteps: int = 1000) -> Schedule:
    """β = 1/T, 1/(T−1), …, 1: ᾱ falls linearly to exactly 0; Sohl-Dickstein et al. 2015 §2.4.1."""
    return from_betas(1.0 / np.linspace(num_timesteps, 1, num_timesteps))


def warmup(
    num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02, fraction: float = 0.1
) -> Schedule:
    """β linear over the first `fraction` of the chain, then constant; an option of Ho et al.'s code."""
    beta = np.full(num_timesteps, end, np.float64)
    warm = int(num_timesteps * fraction)
    beta[:warm] = np.linspace(start, end, warm)
    return from_betas(beta)


def warmup50(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """`warmup` over the first half."""
    return warmup(num_timesteps, start=start, end=end, fraction=0.5)


def sigmoid(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """β follows a logistic curve over [−6, 6]; an option of Song et al.'s DDIM code."""
    return from_betas(start + (end - start) / (1.0 + np.exp(-np.linspace(-6, 6, num_timesteps))))


def cosine(
    num_timesteps: int = 1000, *, offset: float = 0.008, max_beta: float = 0.999
) -> Schedule:
    """ᾱ(u) = cos²((u + offset)/(1 + offset) · π/2), β clipped at `max_beta`; Nichol & Dhariwal 2021 (17).

    >>> dj.cosine_schedule(1000).alpha_bar[499].round(2).item()
    0.49
    """
    u = np.arange(num_timesteps + 1) / num_timesteps
    log_alpha_bar = 2.0 * np.log(np.abs(np.cos((u + offset) / (1 + offset) * np.pi / 2)))
    return from_betas(np.minimum(-np.expm1(np.diff(log_alpha_bar)), max_beta))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Rescales a variance-preserving chain so that its last α is 0 and its first α is unchanged; Lin et al. 2024, Alg. 1.

    Use prediction "v" or "x_0" with it: at α = 0, x_0 cannot be recovered from ε.

    Raises:
      ValueError: the chain is not variance preserving, or has one step.

    >>> dj.zero_terminal_snr(dj.linear_schedule(1000)).snr[-1].item()
    0.0
    """
    alpha = schedule.alpha
    if not schedule.is_variance_preserving or len(schedule) < 2:
        raise ValueError(
            "zero_terminal_snr needs a variance-preserving chain of at least two steps"
        )
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    # At the beginning α is nearly 1, where 1 − α² would lose digits.
    return Schedule(alpha, np.sqrt((1.0 - alpha) * (1.0 + alpha)), schedule.times)


# ---- other paths -------------------------------------------------------------------------------------


def exploding(
    num_timesteps: int = 1000,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Schedule:
    """The variance-exploding chain: α = 1, and σ^(1/ρ) in even steps; Karras et al. 2022 (5).

    A uniformly shortened chain has the same spacing, up to rounding to steps of this chain.

    >>> dj.exploding_schedule(1000, sigma_max=50.0).sigma[[0, -1]].round(3).tolist()
    [0.002, 50.0]
    """
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(
            f"expected 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max} and {rho}"
        )
    ends = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return Schedule(np.ones(num_timesteps), np.linspace(*ends, num_timesteps) ** rho)


def straight(num_timesteps: int = 1000) -> Schedule:
    """The straight path of flow matching: α = 1 − u, σ = u with u = 1/T, 2/T, …, 1; Lipman et al. 2023 (22).

    >>> path = dj.straight_schedule(4)
    >>> path.alpha.tolist(), path.sigma.tolist()
    ([0.75, 0.5, 0.25, 0.0], [0.25, 0.5, 0.75, 1.0])
    """
    u = np.arange(1, num_timesteps + 1) / num_timesteps
    return Schedule(1.0 - u, u)


def betas(num_timesteps: int | None = None, *, betas: tuple[float, ...] = ()) -> Schedule:
    """The chain of a list of betas, see `from_betas`; num_timesteps is its length, or None."""
    if not len(betas):
        raise ValueError("schedule 'betas' needs the list betas=(…), T numbers in (0, 1]")
    if num_timesteps not in (None, len(betas)):
        raise ValueError(f"num_timesteps is {num_timesteps}, but the list has {len(betas)} betas")
    return from_betas(betas)


def table(
    num_timesteps: int | None = None,
    *,
    alpha: tuple[float, ...],
    sigma: tuple[float, ...],
    times: tuple[float, ...] | None = None,
    step_variance: tuple[float, ...] | None = None,
) -> Schedule:
    """The chain of these tables, see `Schedule`. num_timesteps is not used."""
    del num_timesteps
    return Schedule(alpha, sigma, times, step_variance)  # type: ignore[arg-type]  # it converts them


SCHEDULES = {
    "linear": linear,
    "quadratic": quadratic,
    "constant": constant,
    "jsd": jsd,
    "warmup10": warmup,
    "warmup50": warmup50,
    "sigmoid": sigmoid,
    "cosine": cosine,
    "exploding": exploding,
    "straight": straight,
    "betas": betas,
    "table": table,
    "quad": quadratic,  # names in older configs
    "const": constant,
}


def make(
    name: str | Callable[..., Schedule],
    num_timesteps: int | None = None,
    *,
    zero_snr: bool | None = None,
    **keywords,
) -> Schedule:
    """A full chain by name, from the fields of config.schedule.

    Args:
      name: a key of `SCHEDULES`, or module:NAME of a function (num_timesteps, **keywords) -> Schedule.
      num_timesteps: T ≥ 1; None for the default of the schedule, 1000.
      zero_snr: rescale the chain with `zero_terminal_snr`.
      keywords: arguments of the function; those that are None are left out.

    Raises:
      ValueError: an unknown name, T < 1, an argument that the schedule does not have, or a β outside (0, 1].
    """
    function = find(name, SCHEDULES, "schedule")
    keywords = {**keywords, "num_timesteps": num_timesteps}
    keywords = {key: value for key, value in keywords.items() if value is not None}
    takes = sorted(option.name for option in options.options_of(function))
    for key in keywords.keys() - set(takes):
        line = f"schedule {name!r} takes {', '.join(takes)}, but not {key!r}"
        raise ValueError(f"{line}{nearest(key, takes)}")
    keywords = options.bind(function, keywords, f"schedule {name!r}")
    if not 1 <= keywords.get("num_timesteps", 1) <= 10**6:
        raise ValueError(f"num_timesteps must be at least 1, at most 1e6, got {num_timesteps}")
    schedule = function(**keywords)
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule {name!r} must return a Schedule, got {type(schedule).__name__}")
    return zero_terminal_snr(schedule) if zero_snr else schedule
