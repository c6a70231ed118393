"""The equations of Ho et al. 2020 over a Schedule: forward process, posterior, parameterisations, variances.

Dimension key: B batch, S steps of the schedule, H W C image. A step i is a row of the schedule; a time t
is what the network is given, `schedule.timesteps[i]`; on a full chain they are the same number, and this
file writes t for it. Arrays of images are float32 [B, H, W, C]; t is int [B], or a scalar for all.

    q(x_t | x_{t−1})      = N(√α_t x_{t−1}, β_t I)                                       Ho et al. (2)
    q(x_t | x_0)          = N(√ᾱ_t x_0, (1 − ᾱ_t) I)                                     Ho et al. (4)
    q(x_{t−1} | x_t, x_0) = N(μ̃_t(x_t, x_0), β̃_t I)                                      Ho et al. (6)
    μ̃_t = √ᾱ_{t−1} β_t/(1 − ᾱ_t) x_0 + √α_t (1 − ᾱ_{t−1})/(1 − ᾱ_t) x_t                  Ho et al. (7)
    β̃_t = (1 − ᾱ_{t−1})/(1 − ᾱ_t) β_t                                                    Ho et al. (7)
    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε,    v = √ᾱ_t ε − √(1 − ᾱ_t) x_0    Ho et al. §3.2; Salimans & Ho 2022
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.schedules import Schedule

PREDICTIONS = ("eps", "x_0", "mean", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range", "analytic")
LEARNED = ("learned", "learned_range")  # a second half of the network's channels says them


def from_uint8(images):
    """uint8 0 … 255 to float32 −1 … 1, exactly x/127.5 − 1 (Ho et al. §3.3)."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x):
    """The inverse of `from_uint8`: rounds to the nearest level, and clips what lies outside [−1, 1]."""
    return jnp.round(jnp.clip((x + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def at(table: np.ndarray, t, x):
    """table[t], float64 [S] cast to float32, shaped to broadcast over the images `x`."""
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


# ---- forward process -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def q_step(schedule: Schedule, x_prev, t, eps):
    """One step x_t ~ q(x_t | x_{t−1}) from the noise eps ~ N(0, I), Ho et al. (2)."""
    return (
        at(np.sqrt(schedule.alpha), t, x_prev) * x_prev
        + at(np.sqrt(schedule.beta), t, x_prev) * eps
    )


@functools.partial(jax.jit, static_argnums=0)
def q_sample(schedule: Schedule, x_0, t, eps):
    """x_t ~ q(x_t | x_0) in closed form from the noise eps ~ N(0, I), Ho et al. (4)."""
    return (
        at(np.sqrt(schedule.alpha_bar), t, x_0) * x_0
        + at(np.sqrt(1.0 - schedule.alpha_bar), t, x_0) * eps
    )


def q_path(schedule: Schedule, x_0, keys):
    """One path x_1 … x_S of the forward process: [B, S, H, W, C], by `q_step` from x_0 [B, H, W, C] and keys [B]."""

    def body(x, i):
        t = jnp.asarray(schedule.timesteps)[i]
        x = q_step(schedule, x, i, noise(keys, t, x.shape[1:]))
        return x, x

    _, path = jax.lax.scan(body, x_0, jnp.arange(len(schedule)))
    return jnp.moveaxis(path, 0, 1)


def noise(keys, t, image_shape):
    """N(0, I) from each example's key and the time t, which is the same for all: [B, H, W, C]."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), image_shape))(keys)


# ---- posterior and reverse variances ---------------------------------------------------------------


def posterior_mean_coefficients(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """The factors of x_0 and of x_t in μ̃_t: two float64 [S], Ho et al. (7)."""
    of_x_0 = np.sqrt(schedule.alpha_bar_prev) * schedule.beta / (1.0 - schedule.alpha_bar)
    of_x_t = np.sqrt(schedule.alpha) * (1.0 - schedule.alpha_bar_prev) / (1.0 - schedule.alpha_bar)
    return of_x_0, of_x_t


def posterior_mean(schedule: Schedule, x_0, x_t, t):
    """μ̃_t(x_t, x_0), Ho et al. (7)."""
    of_x_0, of_x_t = posterior_mean_coefficients(schedule)
    return at(of_x_0, t, x_t) * x_0 + at(of_x_t, t, x_t) * x_t


def posterior_variance(schedule: Schedule) -> np.ndarray:
    """β̃_t: float64 [S], 0 at the first step, Ho et al. (7)."""
    return schedule.beta * (1.0 - schedule.alpha_bar_prev) / (1.0 - schedule.alpha_bar)


def posterior_log_variance(schedule: Schedule) -> np.ndarray:
    """log β̃_t: float64 [S]; β̃_0 = 0 has none, and takes that of the step above, as Ho et al.'s code."""
    variance = posterior_variance(schedule)
    first = (
        variance[1] if len(schedule) > 1 else schedule.beta[0]
    )  # a chain of one step has only β_0
    return np.log(np.append(first, variance[1:]))


def reverse_log_variance(schedule: Schedule, variance: str) -> np.ndarray:
    """log σ_t² of p(x_{t−1} | x_t): float64 [S]; Ho et al. §3.2.

    "fixed_small" is β̃_t, best for data that are one point; "fixed_large" is β_t, best for N(0, I). Both
    have log β̃ of the step above at the first step, where β̃_0 = 0 (Ho et al.'s code).
    """
    small = posterior_log_variance(schedule)
    if variance == "fixed_small":
        return small
    if variance == "fixed_large":
        return np.append(small[0], np.log(schedule.beta[1:]))
    raise ValueError(f"variance {variance!r} is no table: only fixed_small and fixed_large are")


def analytic_log_variance(schedule: Schedule, x_0_error) -> np.ndarray:
    """log σ_t² that minimises every divergence of the bound for the mean a network has: float64 [S].

    σ_t² = β̃_t + (√ᾱ_{t−1} β_t/(1 − ᾱ_t))² E‖x_0 − x̂_0(x_t, t)‖²/d. For a perfect network the error is
    (1 − ᾱ_t)/ᾱ_t · (1 − E‖ε̂‖²/d), and this is Bao et al. 2022 (Analytic-DPM), Theorem 1; for a trained
    one the measured error is what the bound itself contains. At the first step it is the best normal
    density of x_0; integrated over bins of width Δ = 2/255, as in L_0, the best is smaller by about Δ²/12.

    Args:
      x_0_error: [S], the mean squared error of x̂_0 for each pixel, as `likelihood.bound` measures it.
    """
    of_x_0, _ = posterior_mean_coefficients(schedule)
    variance = posterior_variance(schedule) + of_x_0**2 * np.asarray(x_0_error, np.float64)
    return np.log(np.maximum(variance, 1e-20))  # a first step without any error would have none


def model_log_variance(schedule: Schedule, variance, denoised: Denoised, x_t, t):
    """log σ_t² of p(x_{t−1} | x_t), to be broadcast over the images `x_t`.

    "learned" is what the network says; "learned_range" moves in log β̃_t … log β_t as it says −1 … 1,
    Nichol & Dhariwal (15). Both ends are those of `reverse_log_variance`, so that an output of −1 is
    exactly "fixed_small" and one of 1 exactly "fixed_large"; at t = 0 they coincide, whereas Improved
    DDPM's code lets that range end at log β_0.

    Args:
      variance: one of `VARIANCES` but "analytic", or a table of log σ², float64 [S].
      t: step of `schedule`, int [B] or scalar.
    """
    if not isinstance(variance, str):
        return at(variance, t, x_t)
    if variance == "learned":
        return denoised.variance_values
    if variance == "learned_range":
        large = 0.5 * (denoised.variance_values + 1.0)
        low, high = (reverse_log_variance(schedule, end) for end in ("fixed_small", "fixed_large"))
        return large * at(high, t, x_t) + (1.0 - large) * at(low, t, x_t)
    return at(reverse_log_variance(schedule, variance), t, x_t)


# ---- DDIM's family of processes --------------------------------------------------------------------


def ddim_std(schedule: Schedule, eta: float | str) -> tuple[np.ndarray, np.ndarray]:
    """The factor of ε̂ and σ_t of a DDIM step: two float64 [S]; Song et al. 2021 (12) and (16).

    σ_t = η √((1−ᾱ_{t−1})/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_{t−1}) with the neighbours of the shortened chain, which is
    η √β̃_t; the factor is √(1−ᾱ_{t−1}−σ_t²).

    Args:
      eta: 0 (deterministic) to 1 (ancestral with β̃_t); or "hat", Song et al.'s σ̂: the factor of η = 1
        with the larger noise √(1−ᾱ_t/ᾱ_{t−1}) = √β_t, and none at the last step, which is ancestral
        sampling with "fixed_large".

    Raises:
      ValueError: eta is something else.
    """
    if eta != "hat" and not (isinstance(eta, (int, float)) and 0 <= eta <= 1):
        raise ValueError(
            f"eta must lie in 0 … 1, or be 'hat' for Song et al.'s larger σ̂; got {eta!r}"
        )
    share = (1.0 if eta == "hat" else float(eta)) ** 2
    # 1 − ᾱ_{t−1} − σ_t², with the common factor outside: what is left cannot cancel to below zero.
    of_eps = (1.0 - schedule.alpha_bar_prev) * (
        1.0 - share * (schedule.beta / (1.0 - schedule.alpha_bar))
    )
    variance = share * posterior_variance(schedule)
    if eta == "hat":
        variance = np.append(0.0, schedule.beta[1:])
    assert (of_eps >= 0).all()  # never clamped: a negative one is a wrong formula
    return np.sqrt(of_eps), np.sqrt(variance)


def ddim_forward(schedule: Schedule, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """DDIM's forward process q_σ(x_t | x_{t−1}, x_0): two float64 [S]; Song et al. 2021 §3.1, Liu (2.13).

    By Bayes' rule on its posterior N(√ᾱ_{t−1} x_0 + √((1−ᾱ_{t−1}−σ_t²)/(1−ᾱ_t)) (x_t − √ᾱ_t x_0), σ_t² I),
    it is N(√ᾱ_t x_0 + c_t (x_{t−1} − √ᾱ_{t−1} x_0), s_t² I), with the same q(x_t | x_0) for every η:
    c_t = √((1−ᾱ_{t−1}−σ_t²)(1−ᾱ_t))/(1−ᾱ_{t−1}) and s_t = σ_t √((1−ᾱ_t)/(1−ᾱ_{t−1})). η = 1 is the Markov
    chain, with c_t = √α_t; with η = 0 only the first step draws noise.

    Returns:
      c_t, which is 0 at the first step, and s_t.
    """
    if eta == "hat":
        raise ValueError("eta 'hat' has no forward process: its steps do not keep q(x_t | x_0)")
    of_eps, std = ddim_std(schedule, eta)
    variance, before = 1.0 - schedule.alpha_bar, 1.0 - schedule.alpha_bar_prev
    of_x_prev = of_eps[1:] * np.sqrt(variance[1:]) / before[1:]
    spread = std[1:] * np.sqrt(variance[1:] / before[1:])
    return np.append(0.0, of_x_prev), np.append(np.sqrt(variance[0]), spread)


@functools.partial(jax.jit, static_argnames=("schedule", "eta"))
def q_step_ddim(schedule: Schedule, x_prev, x_0, t, eps, *, eta: float):
    """One step x_t ~ q_σ(x_t | x_{t−1}, x_0) from the noise eps ~ N(0, I); see `ddim_forward`."""
    of_x_prev, std = ddim_forward(schedule, eta)
    mean = at(np.sqrt(schedule.alpha_bar), t, x_0) * x_0
    from_line = x_prev - at(np.sqrt(schedule.alpha_bar_prev), t, x_0) * x_0
    return mean + at(of_x_prev, t, x_0) * from_line + at(std, t, x_0) * eps


# ---- what the network predicts ---------------------------------------------------------------------


def to_x_0(schedule: Schedule, kind: str, value, x_t, t):
    """x_0 from the noise, the image itself, the posterior mean or the velocity.

    Args:
      kind: one of `PREDICTIONS`; says what `value` is.
      value, x_t: [B, H, W, C].
      t: step of `schedule`, int [B] or scalar.

    With kind="eps" and ᾱ_t = 0 there is no answer and the result is not finite: x_t holds nothing of x_0.
    """
    alpha_bar = schedule.alpha_bar
    if kind == "x_0":
        return value
    if kind == "eps":
        with np.errstate(divide="ignore"):
            of_x_t, of_eps = np.sqrt(1.0 / alpha_bar), np.sqrt(1.0 / alpha_bar - 1.0)
        return at(of_x_t, t, x_t) * x_t - at(of_eps, t, x_t) * value
    if kind == "mean":
        of_x_0, of_x_t = posterior_mean_coefficients(schedule)
        return at(1.0 / of_x_0, t, x_t) * value - at(of_x_t / of_x_0, t, x_t) * x_t
    if kind == "v":
        return at(np.sqrt(alpha_bar), t, x_t) * x_t - at(np.sqrt(1.0 - alpha_bar), t, x_t) * value
    raise ValueError(f"unknown prediction {kind!r}; choose from {', '.join(PREDICTIONS)}")


def from_x_0(schedule: Schedule, kind: str, x_0, x_t, t):
    """The inverse of `to_x_0`: noise, image, posterior mean or velocity from x_0; same arguments."""
    alpha_bar = schedule.alpha_bar
    if kind == "x_0":
        return x_0
    if kind == "eps":
        scaled = x_t - at(np.sqrt(alpha_bar), t, x_t) * x_0
        return at(1.0 / np.sqrt(1.0 - alpha_bar), t, x_t) * scaled
    if kind == "mean":
        return posterior_mean(schedule, x_0, x_t, t)
    if kind == "v":
        of_x_t = np.sqrt(alpha_bar / (1.0 - alpha_bar))
        of_x_0 = 1.0 / np.sqrt(1.0 - alpha_bar)
        return at(of_x_t, t, x_t) * x_t - at(of_x_0, t, x_t) * x_0
    raise ValueError(f"unknown prediction {kind!r}; choose from {', '.join(PREDICTIONS)}")


def check_invertible(schedule: Schedule, kind: str) -> None:
    """Refuses a schedule whose last steps leave too little in x_t to compute x_0 in float32.

    Raises:
      ValueError: a factor of `to_x_0` is beyond 1e30, as with "eps" where ᾱ_t is 0 or below 1e-60.
    """
    factors = {
        "eps": np.sqrt(schedule.alpha_bar),
        "mean": posterior_mean_coefficients(schedule)[0],
    }.get(kind, np.ones(1))
    if factors.min() < 1e-30:
        raise ValueError(
            f"prediction {kind!r} cannot recover x_0 on this schedule, where alpha_bar falls to"
            f" {schedule.alpha_bar[-1]:.3g}; use prediction 'x_0' or 'v', or smaller betas"
        )


class Denoised(NamedTuple):
    """What a `denoise_fn(x_t, t)` says of x_t, by name."""

    prediction: jax.Array  # [B, H, W, C] as the network gave it: what a loss compares
    x_0: jax.Array  # [B, H, W, C] the same as an image, not clipped
    eps: jax.Array  # [B, H, W, C] the same as noise
    variance_values: jax.Array | None = None  # [B, H, W, C] what a learned variance is made of


def denoiser(
    schedule: Schedule,
    network_fn: Callable,
    *,
    prediction: str = "eps",
    learned_variance: bool = False,
) -> Callable:
    """Makes `denoise_fn(x_t, t) -> Denoised` of a network.

    Losses and samplers see only this function. The conversion uses the full chain that the network was
    trained on, so a shortened chain may ask it at its own times.

    Args:
      schedule: the full chain; t is one of its steps.
      network_fn: (x_t [B, H, W, C], t int [B]) -> [B, H, W, C], or twice as many channels.
      prediction: one of `PREDICTIONS`; what the network gives.
      learned_variance: whether it gives the values of a learned variance too, as its last C channels.
    """

    def denoise_fn(x_t, t):
        value, variance_values = network_fn(x_t, t), None
        if learned_variance:
            value, variance_values = jnp.split(value, 2, axis=-1)
        x_0 = to_x_0(schedule, prediction, value, x_t, t)
        eps = value if prediction == "eps" else from_x_0(schedule, "eps", x_0, x_t, t)
        return Denoised(value, x_0, eps, variance_values)

    return denoise_fn
