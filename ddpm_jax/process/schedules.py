"""Noise schedules: tables of (α_t, σ_t) in float64, with x_t = α_t x_0 + σ_t ε and ε ~ N(0, I).

A row of a `Schedule` is a step of the chain. Before the first row x is data: α = 1 and σ = 0. A variance-preserving
chain (α² + σ² = 1), an exploding one (α = 1) and a straight path (α + σ = 1) are the same type, so posterior, bound,
samplers and respacing are written once. Every table is float64 and is cast to float32 only where it enters a
computation on the device.

    one step   α_{t|s} = α_t / α_s,   σ²_{t|s} = σ_t² − α²_{t|s} σ_s²       for neighbours s < t     Kingma et al. 2021
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, UInt32
from numpy.typing import ArrayLike

from ddpm_jax import options
from ddpm_jax.names import find, nearest

PRIOR_STREAM = 2**32 - 1  # noise id of x_T, which no step of a chain has


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static jit argument
class Schedule:
    """The coefficients of a diffusion over S steps.

    Attributes:
      alpha: [S] float64 ≥ 0, the factor of x_0. It may be 0 at the end, where nothing of x_0 is left.
      sigma: [S] float64 > 0, the standard deviation of the noise. σ/α increases.
      times: [S], strictly increasing: the time that the network is given at each step. int32 where all are whole
        numbers, otherwise float32. None stands for 0 … S−1; a shortened chain keeps the times of the full one.
      step_variance: [S] float64 > 0, σ²_{t|s} of each step: β_t of a variance-preserving chain. None computes it as a
        difference, which loses digits where a step is short; pass it where it is known exactly.

    Raises:
      ValueError: shapes that differ, values outside these ranges.

    >>> chain = Schedule(alpha=[0.8, 0.6], sigma=[0.6, 0.8])
    >>> chain.is_variance_preserving, chain.snr.round(3).tolist()
    (True, [1.778, 0.562])
    """

    alpha: Float64[np.ndarray, " S"]
    sigma: Float64[np.ndarray, " S"]
    times: np.ndarray = None  # type: ignore[assignment]  # never None afterwards
    step_variance: Float64[np.ndarray, " S"] = None  # type: ignore[assignment]

    def __post_init__(self):
        alpha, sigma = (np.array(table, np.float64) for table in (self.alpha, self.sigma))
        if alpha.ndim != 1 or alpha.size == 0 or alpha.shape != sigma.shape:
            raise ValueError(
                f"alpha and sigma must be two lists of equal length, got {alpha.shape} and {sigma.shape}"
            )
        if not (np.isfinite(alpha) & np.isfinite(sigma) & (alpha >= 0) & (sigma > 0)).all():
            raise ValueError("alpha must be at least 0, sigma above 0, and both finite")
        times = np.arange(alpha.size) if self.times is None else np.array(self.times, np.float64)
        whole = (times == np.round(times)).all()
        times = times.astype(np.int32 if whole else np.float32)
        if times.shape != alpha.shape or (np.diff(times) <= 0).any() or (whole and times[0] < 0):
            raise ValueError(
                "times must increase strictly, one for each step; whole ones from 0 or later"
            )
        ratio = _ratio(alpha, sigma)
        if not (ratio[1:] >= ratio[:-1]).all():
            raise ValueError(
                "sigma / alpha must increase: each step adds noise, and none takes it away"
            )
        step_variance = self.step_variance
        if step_variance is None:
            before = np.append(1.0, alpha[:-1])
            share = np.divide(alpha, before, out=np.zeros_like(alpha), where=before > 0)
            step_variance = sigma**2 - share**2 * np.append(0.0, sigma[:-1]) ** 2
        step_variance = np.array(step_variance, np.float64)
        if step_variance.shape != alpha.shape or not (step_variance > 0).all():
            raise ValueError("every step must add noise: two steps are too near each other")
        tables = {"alpha": alpha, "sigma": sigma, "times": times, "step_variance": step_variance}
        for name, table in tables.items():
            table.flags.writeable = False
            object.__setattr__(self, name, table)

    def __len__(self) -> int:
        return self.alpha.size

    @functools.cached_property
    def ratio(self) -> Float64[np.ndarray, " S"]:
        """σ/α of each step, infinite where α is 0."""
        return _ratio(self.alpha, self.sigma)

    @functools.cached_property
    def alpha_prev(self) -> Float64[np.ndarray, " S"]:
        """α of the step before; 1 before the first."""
        return np.append(1.0, self.alpha[:-1])

    @functools.cached_property
    def sigma_prev(self) -> Float64[np.ndarray, " S"]:
        """σ of the step before; 0 before the first."""
        return np.append(0.0, self.sigma[:-1])

    @functools.cached_property
    def step_alpha(self) -> Float64[np.ndarray, " S"]:
        """α_{t|s} = α_t / α_s of each step; 0 once nothing of x_0 is left."""
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
        """β_t of a variance-preserving chain, Ho et al. (2), where it equals `step_variance`."""
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
        """The standard deviation of x_T for data of unit variance, which sampling begins with; 1 if variance-preserving."""
        return (
            1.0 if self.is_variance_preserving else float(np.hypot(self.alpha[-1], self.sigma[-1]))
        )

    @functools.cached_property
    def noise_ids(self) -> UInt32[np.ndarray, " S"]:
        """The number folded into an example's key for the noise of each step.

        It is the time, if that is a whole number, so that a shortened chain draws the same noise at the same time;
        otherwise the bits of the float32 time.
        """
        times = np.asarray(self.times, np.float32)
        whole = (times == np.round(times)) & (times >= 0)
        return np.where(whole, np.maximum(self.times, 0).astype(np.uint32), times.view(np.uint32))

    def at(self, ratio: ArrayLike) -> Schedule:
        """The chain with the levels σ/α = `ratio`, which need not be rows of this one.

        The time and log α are interpolated linearly in log σ/α, so times are fractional; in a variance-preserving chain
        α follows from σ/α.

        Args:
          ratio: [K], strictly increasing, within the range of this chain.

        Raises:
          ValueError: a level outside the chain.
        """
        levels, rows = np.asarray(ratio, np.float64), np.isfinite(self.ratio)
        known = self.ratio[rows]
        slack = 1e-9
        if levels.min() < known[0] * (1 - slack) or levels.max() > known[-1] * (1 + slack):
            raise ValueError(
                f"levels sigma/alpha must lie within {known[0]:.4g} and {known[-1]:.4g}, got"
                f" {levels.min():.4g} to {levels.max():.4g}"
            )
        level, known = np.log(levels), np.log(known)
        if self.is_variance_preserving:
            alpha = 1.0 / np.sqrt(1.0 + levels**2)
        else:
            alpha = np.exp(np.interp(level, known, np.log(self.alpha[rows])))
        return Schedule(alpha, levels * alpha, np.interp(level, known, self.times[rows]))


# ---- variance-preserving chains ----------------------------------------------------------------------


def _ratio(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return sigma / alpha


def from_betas(betas: ArrayLike) -> Schedule:
    """The variance-preserving chain of β_0 … β_{T−1}, each in (0, 1]; Ho et al. (2)."""
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

    >>> schedule = linear(1000)
    >>> len(schedule), schedule.beta[[0, -1]].tolist()
    (1000, [0.0001, 0.02])
    """
    return from_betas(np.linspace(start, end, num_timesteps))


def quadratic(num_timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """√β in even steps; an option of Ho et al.'s code."""
    return from_betas(np.linspace(start**0.5, end**0.5, num_timesteps) ** 2)


def constant(num_timesteps: int = 1000, *, end: float = 0.02) -> Schedule:
    """β = `end` at every step; an option of Ho et al.'s code."""
    return from_betas(np.full(num_timesteps, end))


def jsd(num_timesteps: int = 1000) -> Schedule:
    """β = 1/T, 1/(T−1), …, 1 (Sohl-Dickstein et al. 2015 §2.4.1): ᾱ falls linearly and ends at exactly 0."""
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
    """ᾱ(u) = cos²((u + offset)/(1 + offset) · π/2), β clipped at `max_beta`; Nichol & Dhariwal (17).

    >>> cosine(1000).alpha_bar[499].round(2)  # half of the chain, half of the signal
    np.float64(0.49)
    """
    u = np.arange(num_timesteps + 1) / num_timesteps
    log_alpha_bar = 2.0 * np.log(np.abs(np.cos((u + offset) / (1 + offset) * np.pi / 2)))
    return from_betas(np.minimum(-np.expm1(np.diff(log_alpha_bar)), max_beta))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """A variance-preserving chain rescaled to α_T = 0; Lin et al. 2024, Algorithm 1.

    α is shifted and stretched, so that its last value is 0 and its first stays. Predict v or x_0 with it: at α = 0 the
    noise says nothing of x_0.

    Raises:
      ValueError: a chain that is not variance preserving, or of one step.

    >>> zero_terminal_snr(linear(1000)).alpha[-1]
    np.float64(0.0)
    """
    alpha = schedule.alpha
    if not schedule.is_variance_preserving or len(schedule) < 2:
        raise ValueError(
            "zero_terminal_snr needs a variance-preserving chain of at least two steps"
        )
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    # The beginning of a chain is almost noiseless: 1 − α² as a product keeps its digits.
    return Schedule(alpha, np.sqrt((1.0 - alpha) * (1.0 + alpha)), schedule.times)


# ---- other paths -------------------------------------------------------------------------------------


def exploding(
    num_timesteps: int = 1000,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Schedule:
    """The variance-exploding chain α = 1 with σ^(1/ρ) in even steps; Karras et al. 2022 (5).

    A uniformly shortened chain has Karras et al.'s spacing again, up to the rounding of its rows.

    >>> exploding(1000).sigma[[0, -1]].round(6).tolist()
    [0.002, 80.0]
    """
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(
            f"sigma_min and sigma_max must be positive and in this order, and rho positive; got {sigma_min},"
            f" {sigma_max} and {rho}"
        )
    ends = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return Schedule(np.ones(num_timesteps), np.linspace(*ends, num_timesteps) ** rho)


def straight(num_timesteps: int = 1000) -> Schedule:
    """The straight path α = 1 − u, σ = u with u = 1/T, 2/T, …, 1, as in flow matching; Lipman et al. 2023 (22).

    >>> straight(4).sigma.tolist()
    [0.25, 0.5, 0.75, 1.0]
    """
    u = np.arange(1, num_timesteps + 1) / num_timesteps
    return Schedule(1.0 - u, u)


def betas(num_timesteps: int | None = None, *, betas: tuple[float, ...] = ()) -> Schedule:
    """A user's own list of β, see `from_betas`; num_timesteps, if given, must be its length."""
    if not len(betas):
        raise ValueError("schedule 'betas' needs the list betas=(…), T numbers in (0, 1]")
    if num_timesteps not in (None, len(betas)):
        raise ValueError(f"num_timesteps is {num_timesteps}, but {len(betas)} betas are given")
    return from_betas(betas)


def table(
    num_timesteps: int | None = None,
    *,
    alpha: tuple[float, ...],
    sigma: tuple[float, ...],
    times: tuple[float, ...] | None = None,
    step_variance: tuple[float, ...] | None = None,
) -> Schedule:
    """A chain given by its tables, see `Schedule`; T is their length."""
    del num_timesteps
    tables = (None if table is None else np.asarray(table) for table in (times, step_variance))
    return Schedule(np.asarray(alpha), np.asarray(sigma), *tables)  # type: ignore[arg-type]


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
    """A full chain by name, as config.schedule has it.

    Args:
      name: a key of `SCHEDULES`, or module:NAME of a function (num_timesteps, **keywords) -> Schedule.
      num_timesteps: T ≥ 1; None takes the default of the schedule, 1000.
      zero_snr: rescale it by `zero_terminal_snr`.
      keywords: of the named function; None takes its default.

    Raises:
      ValueError: unknown name, T < 1, an option that this schedule does not have, a β outside (0, 1].
    """
    function = find(name, SCHEDULES, "schedule")
    if num_timesteps is not None and num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    keywords |= {"num_timesteps": num_timesteps}
    keywords = {key: value for key, value in keywords.items() if value is not None}
    takes = [one.name for one in options.options_of(function)]
    for key in keywords.keys() - set(takes):
        raise ValueError(
            f"schedule {name!r} takes {', '.join(sorted(takes))}, but not {key!r}{nearest(key, takes)}"
        )
    schedule = function(**options.bind(function, keywords, f"schedule {name!r}"))
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule {name!r} must return a Schedule, got {type(schedule).__name__}")
    return zero_terminal_snr(schedule) if zero_snr else schedule


# ---- does a chain reach its prior? --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Health:
    """Whether a finite chain reaches its prior N(0, prior_std² I).

    Attributes:
      alpha_T: α at the end.
      prior_bits_per_dim: L_T = KL(q(x_T | x_0) ‖ prior) in bits per dimension.
      sum_beta: Σβ_t of a variance-preserving chain, which must diverge as chains get longer (Tang,
        Proposition 1.1); None for other chains.
      alpha_bar_bound: e^−Σβ, which ᾱ_T = ∏(1 − β_t) never exceeds; None for other chains.
      warning: empty, or one line that says why sampling from the prior begins in the wrong place.
    """

    alpha_T: float
    prior_bits_per_dim: float
    sum_beta: float | None
    alpha_bar_bound: float | None
    warning: str


def health(schedule: Schedule, *, second_moment: float = 1.0) -> Health:
    """Measures whether a chain ends at its prior; a variance-preserving one does if ∏(1 − β_t) is nearly 0.

    In an infinite chain, ∏(1 − β_t) = 0 exactly if Σβ_t diverges, and then x_t tends to N(0, I) from any x_0
    (Tang, Propositions 1.1 and 1.2). In a finite chain, −ln(1 − β) ≥ β gives ᾱ_T ≤ e^−Σβ.

    Args:
      second_moment: E[x_0²] of the data scaled to [−1, 1]; the default is an upper bound.

    A chain is called short if L_T exceeds 0.001 bits/dim: that of Ho et al. has 1e-5, and a thousandth of a bit is the
    resolution at which likelihoods are compared.
    """
    alpha, scale, sum_beta, bound = float(schedule.alpha[-1]), schedule.prior_std**2, None, None
    advice = "begin sampling with more noise, or lead the path nearer to alpha = 0"
    if schedule.is_variance_preserving:
        nats = 0.5 * (alpha**2 * (second_moment - 1.0) - np.log1p(-(alpha**2)))
        sum_beta = float(np.sum(schedule.step_variance))
        bound, advice = float(np.exp(-sum_beta)), "use more steps or larger betas"
    else:
        share = schedule.sigma[-1] ** 2 / scale
        nats = 0.5 * (alpha**2 * second_moment / scale + share - 1.0 - np.log(share))
    bits, warning = float(nats / np.log(2.0)), ""
    if bits > 1e-3:
        warning = (
            f"the chain does not reach its prior: alpha_T = {alpha:.3g} leaves a prior term of {bits:.3g}"
            f" bits/dim; {advice}"
        )
    return Health(alpha, bits, sum_beta, bound, warning)
