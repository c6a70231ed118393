"""The equations of a diffusion over a Schedule: forward process, posterior, reverse variances, denoising.

Dimension key: B batch, S steps of the schedule, H W C image. Images are float32 [B, H, W, C]. A row i of a schedule is
an int: [B], or a scalar for all. On the full chain of T steps rows and times are the same numbers, written t.

    q(x_t | x_s)      = N(α_{t|s} x_s, σ²_{t|s} I)                                         Ho et al. (2)
    q(x_t | x_0)      = N(α_t x_0, σ_t² I)                                                 Ho et al. (4)
    q(x_s | x_t, x_0) = N(k_0 x_0 + k_t x_t, σ²_{t|s} σ_s²/σ_t² I)                         Ho et al. (6), (7)
                        k_0 = α_s σ²_{t|s}/σ_t²,   k_t = α_{t|s} σ_s²/σ_t²

With α = √ᾱ and σ = √(1 − ᾱ) these are Ho et al.'s formulas; for any other path they are the same product of Gaussians
(Kingma et al. 2021, Appendix A).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Key, UInt8

from ddpm_jax.process.predictions import named as named_prediction
from ddpm_jax.process.schedules import PRIOR_STREAM, Schedule

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range", "analytic")
LEARNED = ("learned", "learned_range")  # the last C channels of the network carry these

Images = Float[Array, "B H W C"]
Row = Int[Array, "*B"]


def from_uint8(images: UInt8[Array, "B H W C"]) -> Images:
    """uint8 0 … 255 to float32 −1 … 1, exactly x/127.5 − 1 (Ho et al. §3.3)."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: Images) -> UInt8[Array, "B H W C"]:
    """The inverse of `from_uint8`: rounds to the nearest level, and clips what lies outside [−1, 1]."""
    return jnp.round(jnp.clip((x + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def at(table: Float64[np.ndarray, " S"], row: Row, x: Images) -> Float[Array, ...]:
    """table[row], cast to float32, shaped to broadcast over the images `x`."""
    values = jnp.asarray(table, jnp.float32)[row]
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


# ---- forward process -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def q_step(schedule: Schedule, x_prev: Images, row: Row, eps: Images) -> Images:
    """One step x_t ~ q(x_t | x_s) from the noise eps ~ N(0, I), Ho et al. (2)."""
    scale, std = schedule.step_alpha, np.sqrt(schedule.step_variance)
    return at(scale, row, x_prev) * x_prev + at(std, row, x_prev) * eps


@functools.partial(jax.jit, static_argnums=0)
def q_sample(schedule: Schedule, x_0: Images, row: Row, eps: Images) -> Images:
    """x_t ~ q(x_t | x_0) in closed form from the noise eps ~ N(0, I), Ho et al. (4).

    >>> from ddpm_jax.process.schedules import linear
    >>> x_0, eps = jnp.ones((2, 8, 8, 3)), jnp.zeros((2, 8, 8, 3))
    >>> x_t = q_sample(linear(1000), x_0, jnp.array([0, 999]), eps)
    >>> print(x_t[:, 0, 0, 0].round(4))
    [1.     0.0064]
    """
    return at(schedule.alpha, row, x_0) * x_0 + at(schedule.sigma, row, x_0) * eps


def q_path(schedule: Schedule, x_0: Images, keys: Key[Array, " B"]) -> Float[Array, "B S H W C"]:
    """One path x_1 … x_S of the forward process, by `q_step` from x_0."""

    def body(x, i):
        x = q_step(schedule, x, i, step_noise(schedule, keys, i, x.shape[1:]))
        return x, x

    _, path = jax.lax.scan(body, x_0, jnp.arange(len(schedule)))
    return jnp.moveaxis(path, 0, 1)


def noise(keys: Key[Array, " B"], noise_id, image_shape: tuple[int, ...]) -> Images:
    """N(0, I) from the key of each example and a number (uint32), a scalar for all or [B]."""
    noise_id = jnp.broadcast_to(jnp.asarray(noise_id, jnp.uint32), keys.shape)
    keys = jax.vmap(jax.random.fold_in)(keys, noise_id)
    return jax.vmap(lambda key: jax.random.normal(key, image_shape))(keys)


def step_noise(schedule: Schedule, keys, row: Row, image_shape: tuple[int, ...]) -> Images:
    """The noise of a step of the chain: a function of the example's key and the step's time alone."""
    return noise(keys, jnp.asarray(schedule.noise_ids)[row], image_shape)


def prior(schedule: Schedule, keys: Key[Array, " B"], image_shape: tuple[int, ...]) -> Images:
    """x_T ~ N(0, prior_std² I), one image for each key; the keys are not consumed."""
    x_T = noise(keys, PRIOR_STREAM, image_shape)
    return x_T if schedule.prior_std == 1.0 else schedule.prior_std * x_T


# ---- posterior and reverse variances ---------------------------------------------------------------


def posterior_mean_coefficients(
    schedule: Schedule,
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """k_0 and k_t, the factors of x_0 and x_t in the mean of q(x_s | x_t, x_0); Ho et al. (7)."""
    variance = schedule.sigma**2
    of_x_0 = schedule.alpha_prev * schedule.step_variance / variance
    of_x_t = schedule.step_alpha * schedule.sigma_prev**2 / variance
    return of_x_0, of_x_t


def posterior_mean(schedule: Schedule, x_0: Images, x_t: Images, row: Row) -> Images:
    """The mean of q(x_s | x_t, x_0), Ho et al. (7)."""
    of_x_0, of_x_t = posterior_mean_coefficients(schedule)
    return at(of_x_0, row, x_t) * x_0 + at(of_x_t, row, x_t) * x_t


def posterior_variance(schedule: Schedule) -> Float64[np.ndarray, " S"]:
    """β̃_t = σ²_{t|s} σ_s²/σ_t², which is 0 at the first step; Ho et al. (7)."""
    return schedule.step_variance * schedule.sigma_prev**2 / schedule.sigma**2


def large_variance(schedule: Schedule) -> Float64[np.ndarray, " S"]:
    """The variance of q(x_s | x_t) for data N(0, I): β_t of a variance-preserving chain, Ho et al. §3.2."""
    if schedule.is_variance_preserving:
        return schedule.step_variance
    total = schedule.alpha**2 + schedule.sigma**2
    return schedule.step_variance * np.append(1.0, total[:-1]) / total


def fixed_log_variance(schedule: Schedule, variance: str) -> Float64[np.ndarray, " S"]:
    """log σ² of p(x_s | x_t) for "fixed_small" or "fixed_large"; Ho et al. §3.2.

    "fixed_small" is the posterior's variance β̃_t, best for data that are one point; "fixed_large" is best for N(0, I):
    σ²_{t|s} (α_s² + σ_s²)/(α_t² + σ_t²), which is β_t of a variance-preserving chain. At the first step, where β̃_0 = 0
    has no logarithm, both use the value of the second step (as Ho et al.'s code).
    """
    small = posterior_variance(schedule)
    first = small[1] if len(schedule) > 1 else schedule.step_variance[0]
    if variance == "fixed_small":
        return np.log(np.append(first, small[1:]))
    if variance == "fixed_large":
        return np.log(np.append(first, large_variance(schedule)[1:]))
    raise ValueError(f"variance {variance!r} has no table: only fixed_small and fixed_large have")


def analytic_log_variance(schedule: Schedule, x_0_error) -> Float64[np.ndarray, " S"]:
    """log σ² that minimises every divergence of the bound for the mean that the network predicts.

    σ² = β̃_t + k_0² E‖x_0 − x̂_0(x_t, t)‖²/d. For a perfect network this is Bao et al. 2022 (Analytic-DPM), Theorem 1;
    for a trained one the measured error is what the bound itself contains. At the first step it is the best normal
    density of x_0; integrated over bins of width Δ = 2/255, as in L_0, the best is smaller by about Δ²/12.

    Args:
      x_0_error: [S], the mean squared error of x̂_0 per pixel, as `likelihood.bound` measures it.
    """
    of_x_0, _ = posterior_mean_coefficients(schedule)
    variance = posterior_variance(schedule) + of_x_0**2 * np.asarray(x_0_error, np.float64)
    return np.log(np.maximum(variance, 1e-20))  # a first step without any error would have none


def model_log_variance(schedule: Schedule, variance, values, x_t: Images, row: Row):
    """log σ² of p(x_s | x_t), to be broadcast over the images `x_t`.

    "learned" is the output of the network; "learned_range" interpolates log β̃_t … log β_t by an output of −1 … 1,
    Nichol & Dhariwal (15). Both ends are those of `fixed_log_variance`; at the first step they coincide, whereas
    Improved DDPM's code lets that range end at log β_0.

    Args:
      variance: one of `VARIANCES` but "analytic", or a table of log σ² [S].
      values: [B, H, W, C], the output of the network for a learned variance.
    """
    if not isinstance(variance, str):
        return at(variance, row, x_t)
    if variance == "learned":
        return values
    if variance == "learned_range":
        large = 0.5 * (values + 1.0)
        low, high = (fixed_log_variance(schedule, end) for end in ("fixed_small", "fixed_large"))
        return large * at(high, row, x_t) + (1.0 - large) * at(low, row, x_t)
    return at(fixed_log_variance(schedule, variance), row, x_t)


# ---- DDIM's family of processes --------------------------------------------------------------------


def ddim_std(
    schedule: Schedule, eta: float | str
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """The factor of ε̂ and the standard deviation of the noise of a DDIM step; Song et al. 2021 (12) and (16).

    The noise is η √β̃_t, with the neighbours of the shortened chain; the factor is √(σ_s² − η² β̃_t).

    Args:
      eta: 0 (deterministic) to 1 (ancestral with β̃_t); or "hat", Song et al.'s σ̂: the factor of η = 1 with the larger
        noise σ_{t|s} = √β_t, and none at the last step, which is ancestral sampling with "fixed_large".

    Raises:
      ValueError: any other eta.
    """
    if eta != "hat" and not (isinstance(eta, (int, float)) and 0 <= eta <= 1):
        raise ValueError(
            f"eta must lie in 0 … 1, or be 'hat' for Song et al.'s larger σ̂; got {eta!r}"
        )
    share = (1.0 if eta == "hat" else float(eta)) ** 2
    # σ_s² − η² β̃_t with the common factor outside: what is left cannot cancel to below zero.
    of_eps = schedule.sigma_prev**2 * (1.0 - share * (schedule.step_variance / schedule.sigma**2))
    variance = share * posterior_variance(schedule)
    if eta == "hat":
        variance = np.append(0.0, large_variance(schedule)[1:])
    return sqrt(of_eps), sqrt(variance)


def sqrt(square: np.ndarray) -> np.ndarray:
    """√ of a table, which raises an error for a negative value instead of clamping it: that would be a wrong formula."""
    assert (square >= 0).all(), square.min()
    return np.sqrt(square)


def ddim_forward(
    schedule: Schedule, eta: float
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """DDIM's forward process q_σ(x_t | x_s, x_0): c_t, which is 0 at the first step, and s_t; Song et al. 2021 §3.1.

    By Bayes' rule on DDIM's posterior it is N(α_t x_0 + c_t (x_s − α_s x_0), s_t² I), with the same q(x_t | x_0) for
    every η; Liu (2.13). η = 1 is the Markov chain, with c_t = α_{t|s}; with η = 0 only the first step draws noise.
    """
    if eta == "hat":
        raise ValueError("eta 'hat' has no forward process: its steps do not keep q(x_t | x_0)")
    of_eps, std = ddim_std(schedule, eta)
    sigma, before = schedule.sigma[1:], schedule.sigma_prev[1:]
    of_x_prev = np.append(0.0, of_eps[1:] * sigma / before**2)
    return of_x_prev, np.append(schedule.sigma[0], std[1:] * sigma / before)


@functools.partial(jax.jit, static_argnames=("schedule", "eta"))
def q_step_ddim(
    schedule: Schedule, x_prev: Images, x_0: Images, row: Row, eps: Images, *, eta: float
) -> Images:
    """One step x_t ~ q_σ(x_t | x_s, x_0) from the noise eps ~ N(0, I); see `ddim_forward`."""
    of_x_prev, std = ddim_forward(schedule, eta)
    mean = at(schedule.alpha, row, x_0) * x_0
    from_line = x_prev - at(schedule.alpha_prev, row, x_0) * x_0
    return mean + at(of_x_prev, row, x_0) * from_line + at(std, row, x_0) * eps


# ---- denoising -------------------------------------------------------------------------------------


class Denoised(NamedTuple):
    """What the model computes from x_t."""

    prediction: Images  # the output of the network: what a loss compares
    x_0: Images  # the same as an image, not clipped
    eps: Images  # the same as noise
    log_variance: Float[Array, ...] | None = (
        None  # log σ² of p(x_s | x_t), if a variance was asked for
    )


DenoiseFn = Callable[[Images, Row], Denoised]
Denoiser = Callable[[Schedule], DenoiseFn]  # losses and samplers see only this, never a network


def noise_of(schedule: Schedule, x_0: Images, x_t: Images, row: Row) -> Images:
    """ε of x_t = α x_0 + σ ε."""
    return at(1.0 / schedule.sigma, row, x_t) * (x_t - at(schedule.alpha, row, x_t) * x_0)


def denoiser(
    trained: Schedule,
    network_fn: Callable,
    *,
    prediction: str | Callable = "eps",
    learned_variance: bool = False,
    variance: str | np.ndarray | None = None,
) -> Denoiser:
    """Makes a network into a denoiser: a function from any chain to its denoise_fn(x_t, row).

    Args:
      trained: the full chain that the network was trained on.
      network_fn: (x [B, H, W, C], t [B]) -> [B, H, W, C], or twice as many channels with a learned variance.
      prediction: what the network predicts; see `predictions`.
      learned_variance: whether the last C channels of the network are the values of a learned variance.
      variance: of p(x_s | x_t), see `model_log_variance`; None if it is not needed.
    """
    predict = named_prediction(prediction)

    def on(chain: Schedule) -> DenoiseFn:
        tables = predict(trained, chain)
        of_x_t, of_output = tables.to_x_0(chain)
        times = jnp.asarray(tables.time)

        def denoise_fn(x_t, row):
            t = jnp.broadcast_to(times[row], x_t.shape[:1])
            x = x_t if tables.scale is None else at(tables.scale, row, x_t) * x_t
            value, values = network_fn(x, t), None
            if learned_variance:
                value, values = jnp.split(value, 2, axis=-1)
            x_0 = at(of_output, row, x_t) * value
            if of_x_t.any():
                x_0 = at(of_x_t, row, x_t) * x_t + x_0
            eps = value if tables.is_eps else noise_of(chain, x_0, x_t, row)
            log_variance = None
            if variance is not None:
                log_variance = model_log_variance(chain, variance, values, x_t, row)
            return Denoised(value, x_0, eps, log_variance)

        return denoise_fn

    return on
