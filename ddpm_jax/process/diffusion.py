"""The equations of a diffusion over a Schedule: forward process, posterior, reverse variances, denoising.

Shapes: B images in a batch, S steps in the schedule, H W C of an image. Images are float32 [B, H, W, C]. Everywhere t is
a step of the schedule, an integer in 0 … S−1: a scalar for the whole batch, or [B], one for each image. s is the step
before t. The number that the network receives at step t is `schedule.times[t]`; on a full chain it is t itself.

    q(x_t | x_s)      = N(α_{t|s} x_s, σ²_{t|s} I)                                         Ho et al. (2)
    q(x_t | x_0)      = N(α_t x_0, σ_t² I)                                                 Ho et al. (4)
    q(x_s | x_t, x_0) = N(k_0 x_0 + k_t x_t, σ²_{t|s} σ_s²/σ_t² I)                         Ho et al. (6), (7)
                        k_0 = α_s σ²_{t|s}/σ_t²,   k_t = α_{t|s} σ_s²/σ_t²

With α = √ᾱ and σ = √(1 − ᾱ) these are Ho et al.'s formulas; for any other path they are the same product of Gaussians
(Kingma et al. 2021, Appendix A). Functions draw no noise of their own: ε is an argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float64, Int, Key, UInt8, UInt32

from ddpm_jax.names import check_choice
from ddpm_jax.process.predictions import coefficients
from ddpm_jax.process.schedules import PRIOR_STREAM, Schedule

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range", "analytic")
LEARNED = ("learned", "learned_range")  # the network has 2C output channels, the last C for these

Images = Float[Array, "B H W C"]
Step = Int[Array, "*B"]  # a step of a schedule: a scalar, or [B]


def from_uint8(images: UInt8[Array, "B H W C"]) -> Images:
    """uint8 0 … 255 to float32 −1 … 1, exactly x/127.5 − 1 (Ho et al. §3.3)."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: Images) -> UInt8[Array, "B H W C"]:
    """The inverse of `from_uint8`: clips to [−1, 1] and rounds to the nearest of the 256 levels."""
    return jnp.round(jnp.clip((x + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def at(table: Float64[np.ndarray, " S"], t: Step, x: Images) -> Float[Array, ...]:
    """table[t] as float32, with trailing axes of length 1 so that it broadcasts over the images `x`."""
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


# ---- forward process -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def q_step(schedule: Schedule, x_prev: Images, t: Step, eps: Images) -> Images:
    """Adds one step of noise: x_t ~ q(x_t | x_s) for eps ~ N(0, I) [B, H, W, C]; Ho et al. (2)."""
    scale, std = schedule.step_alpha, np.sqrt(schedule.step_variance)
    return at(scale, t, x_prev) * x_prev + at(std, t, x_prev) * eps


@functools.partial(jax.jit, static_argnums=0)
def q_sample(schedule: Schedule, x_0: Images, t: Step, eps: Images) -> Images:
    """Noises images in one go: x_t = α_t x_0 + σ_t ε ~ q(x_t | x_0); Ho et al. (4).

    Args:
      x_0: [B, H, W, C], in [−1, 1] (see `from_uint8`).
      t: step of the schedule, an integer for all images or [B].
      eps: [B, H, W, C], drawn from N(0, I).

    >>> schedule = dj.linear_schedule(1000)
    >>> eps = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    >>> dj.q_sample(schedule, jnp.ones((2, 8, 8, 1)), 500, eps).shape
    (2, 8, 8, 1)
    >>> x_t = dj.q_sample(schedule, jnp.ones((2, 8, 8, 1)), jnp.array([0, 999]), 0 * eps)
    >>> x_t[:, 0, 0, 0].round(4).tolist() == np.float32(schedule.alpha[[0, 999]]).round(4).tolist()
    True
    """
    return at(schedule.alpha, t, x_0) * x_0 + at(schedule.sigma, t, x_0) * eps


def q_path(schedule: Schedule, x_0: Images, keys: Key[Array, " B"]) -> Float[Array, "B S H W C"]:
    """One draw of the whole path x_1 … x_S of the forward process, by repeated `q_step`.

    Args:
      x_0: [B, H, W, C] in [−1, 1].
      keys: one for each image; the noise is `step_noise`.
    """

    def body(x, t):
        x = q_step(schedule, x, t, step_noise(schedule, keys, t, x.shape[1:]))
        return x, x

    _, path = jax.lax.scan(body, x_0, jnp.arange(len(schedule)))
    return jnp.moveaxis(path, 0, 1)


def noise(
    keys: Key[Array, " B"], noise_id: UInt32[ArrayLike, "*B"], image_shape: tuple[int, ...]
) -> Images:
    """Draws N(0, I), [B, H, W, C], from the key of each image and a number folded into it.

    Args:
      noise_id: integer in 0 … 2³²−1, a scalar for all images or [B].
    """
    noise_id = jnp.broadcast_to(jnp.asarray(noise_id, jnp.uint32), keys.shape)
    keys = jax.vmap(jax.random.fold_in)(keys, noise_id)
    return jax.vmap(lambda key: jax.random.normal(key, image_shape))(keys)


def step_noise(
    schedule: Schedule, keys: Key[Array, " B"], t: Step, image_shape: tuple[int, ...]
) -> Images:
    """Draws the noise ε ~ N(0, I) of step t, [B, H, W, C].

    It depends only on the image's key and on `schedule.times[t]`, so a shortened chain draws the same noise as the full
    one at the times that they share.
    """
    return noise(keys, jnp.asarray(schedule.noise_ids)[t], image_shape)


def prior(schedule: Schedule, keys: Key[Array, " B"], image_shape: tuple[int, ...]) -> Images:
    """Draws x_T ~ N(0, prior_std² I), one image for each key; the keys can still be used for `step_noise`."""
    x_T = noise(keys, PRIOR_STREAM, image_shape)
    return x_T if schedule.prior_std == 1.0 else schedule.prior_std * x_T


# ---- posterior and reverse variances ---------------------------------------------------------------


def posterior_mean_coefficients(
    schedule: Schedule,
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """k_0 and k_t, the coefficients of x_0 and x_t in the mean of q(x_s | x_t, x_0); Ho et al. (7)."""
    variance = schedule.sigma**2
    k_0 = schedule.alpha_prev * schedule.step_variance / variance
    k_t = schedule.step_alpha * schedule.sigma_prev**2 / variance
    return k_0, k_t


def posterior_mean(schedule: Schedule, x_0: Images, x_t: Images, t: Step) -> Images:
    """The mean of q(x_s | x_t, x_0), Ho et al. (7)."""
    k_0, k_t = posterior_mean_coefficients(schedule)
    return at(k_0, t, x_t) * x_0 + at(k_t, t, x_t) * x_t


def posterior_variance(schedule: Schedule) -> Float64[np.ndarray, " S"]:
    """β̃_t = σ²_{t|s} σ_s²/σ_t², which is 0 at the first step; Ho et al. (7)."""
    return schedule.step_variance * schedule.sigma_prev**2 / schedule.sigma**2


def large_variance(schedule: Schedule) -> Float64[np.ndarray, " S"]:
    """The variance of q(x_s | x_t) for data N(0, I); β_t for a variance-preserving chain, Ho et al. §3.2."""
    if schedule.is_variance_preserving:
        return schedule.step_variance
    total = schedule.alpha**2 + schedule.sigma**2
    return schedule.step_variance * np.append(1.0, total[:-1]) / total


def fixed_log_variance(schedule: Schedule, variance: str) -> Float64[np.ndarray, " S"]:
    """log σ² of p(x_s | x_t) for "fixed_small" or "fixed_large"; Ho et al. §3.2.

    "fixed_small" is the posterior variance β̃_t, optimal if the data are a single point. "fixed_large" is optimal for data
    N(0, I): σ²_{t|s} (α_s² + σ_s²)/(α_t² + σ_t²), which is β_t for a variance-preserving chain. At step 0, where β̃ is 0,
    both use β̃ of step 1, as in Ho et al.'s code.

    Raises:
      ValueError: `variance` is another one.
    """
    small = posterior_variance(schedule)
    first = small[1] if len(schedule) > 1 else schedule.step_variance[0]
    if variance == "fixed_small":
        return np.log(np.append(first, small[1:]))
    if variance == "fixed_large":
        return np.log(np.append(first, large_variance(schedule)[1:]))
    raise ValueError(f"variance {variance!r} is not fixed; expected fixed_small or fixed_large")


def analytic_log_variance(schedule: Schedule, x_0_error) -> Float64[np.ndarray, " S"]:
    """log σ² of p(x_s | x_t) that minimises each KL term of the bound, for the network's mean as it is.

    σ² = β̃_t + k_0² E‖x_0 − x̂_0(x_t, t)‖²/d, with the error measured. For the optimal network this is Bao et al. 2022
    (Analytic-DPM), Theorem 1. At step 0 it is the optimal variance of a normal density of x_0; for the density integrated
    over bins of width Δ = 2/255, as in L_0, the optimum is lower by about Δ²/12.

    Args:
      x_0_error: [S], mean squared error of x̂_0 per dimension, as measured by `likelihood.bound`.
    """
    k_0, _ = posterior_mean_coefficients(schedule)
    variance = posterior_variance(schedule) + k_0**2 * np.asarray(x_0_error, np.float64)
    return np.log(np.maximum(variance, 1e-20))  # at step 0 it is 0 if the error is


def model_log_variance(
    schedule: Schedule, variance: str | np.ndarray, values: Images | None, x_t: Images, t: Step
) -> Float[Array, ...]:
    """log σ² of p(x_s | x_t), of a shape that broadcasts over the images `x_t`.

    "learned" is the output of the network. "learned_range" interpolates between log β̃_t and log β_t by an output in
    −1 … 1, Nichol & Dhariwal (15); both ends come from `fixed_log_variance`, so they coincide at step 0, where Improved
    DDPM's code has log β_0 as the upper end.

    Args:
      variance: one of `VARIANCES` except "analytic", or a table of log σ² [S].
      values: [B, H, W, C], the output of the network for a learned variance; otherwise not used.
    """
    if not isinstance(variance, str):
        return at(variance, t, x_t)
    if variance in LEARNED:
        assert values is not None
        if variance == "learned":
            return values
        large = 0.5 * (values + 1.0)
        low, high = (fixed_log_variance(schedule, end) for end in ("fixed_small", "fixed_large"))
        return large * at(high, t, x_t) + (1.0 - large) * at(low, t, x_t)
    return at(fixed_log_variance(schedule, variance), t, x_t)


def reverse_variance(
    variance: str | np.ndarray,
    chain: Schedule,
    trained: Schedule,
    learned: str,
    x_0_error: np.ndarray | None = None,
) -> str | np.ndarray:
    """A variance as an argument of `model_log_variance`, after a check that a model has it on a chain.

    Args:
      variance: one of `VARIANCES`, or a table, which is returned as it is.
      trained, learned: the schedule and the variance that the model was trained with.
      x_0_error: [S], for "analytic"; see `analytic_log_variance`.

    Raises:
      ValueError: one line: the model has no such variance on this chain.
    """
    if not isinstance(variance, str):
        return variance
    check_choice("variance", variance, VARIANCES)
    if variance in LEARNED and variance != learned:
        raise ValueError(
            f"variance {variance!r} needs outputs that this network does not have: it was trained with"
            f" {learned!r}; use that, fixed_small, fixed_large or analytic"
        )
    if variance == "learned" and (chain.times != trained.times[: len(chain)]).any():
        raise ValueError(
            "variance 'learned' is that of single steps of the full chain; in fewer steps use"
            " fixed_small, fixed_large or analytic, or train with learned_range"
        )
    if variance != "analytic":
        return variance
    if x_0_error is None or len(x_0_error) != len(chain):
        raise ValueError(
            "variance 'analytic' needs x_0_error, the mean squared error of x̂_0 measured at each"
            f" of the {len(chain)} steps of the chain"
        )
    return analytic_log_variance(chain, x_0_error)


# ---- DDIM's family of processes --------------------------------------------------------------------


def ddim_std(
    schedule: Schedule, eta: float | str
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """The coefficient of ε̂ and the standard deviation of the noise in a DDIM step; Song et al. 2021 (12) and (16).

    They are √(σ_s² − η² β̃_t) and η √β̃_t, where β̃_t is that of the shortened chain.

    Args:
      eta: 0 (deterministic) to 1 (ancestral with β̃_t); or "hat" for Song et al.'s σ̂: the coefficient of η = 1 with the
        larger noise σ_{t|s} = √β_t, and no noise at step 0, which is ancestral sampling with "fixed_large".

    Raises:
      ValueError: eta is neither.
    """
    if eta != "hat" and not (isinstance(eta, (int, float, np.floating)) and 0 <= eta <= 1):
        raise ValueError(
            f"eta must lie in 0 … 1, or be 'hat' for Song et al.'s larger σ̂; got {eta!r}"
        )
    share = (1.0 if eta == "hat" else float(eta)) ** 2
    # σ_s² − η² β̃_t with σ_s² factored out, so that rounding cannot make it negative.
    from_eps = schedule.sigma_prev**2 * (1.0 - share * (schedule.step_variance / schedule.sigma**2))
    variance = share * posterior_variance(schedule)
    if eta == "hat":
        variance = np.append(0.0, large_variance(schedule)[1:])
    return sqrt(from_eps), sqrt(variance)


def sqrt(square: np.ndarray) -> np.ndarray:
    """√ of a table of variances. A negative value is an error, not clamped: the formula is then wrong."""
    assert (square >= 0).all(), square.min()
    return np.sqrt(square)


def ddim_forward(
    schedule: Schedule, eta: float
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """The coefficients c_t and s_t of DDIM's forward process q_σ(x_t | x_s, x_0); Song et al. 2021 §3.1.

    Bayes' rule on DDIM's posterior gives N(α_t x_0 + c_t (x_s − α_s x_0), s_t² I), and q(x_t | x_0) is the same for every
    η; Liu (2.13). η = 1 is the Markov chain, c_t = α_{t|s}. With η = 0 only step 0 adds noise. c_0 = 0.

    Args:
      eta: in 0 … 1.
    """
    if eta == "hat":
        raise ValueError(
            "eta 'hat' has no forward process, since its steps change q(x_t | x_0); use 0 to 1"
        )
    from_eps, std = ddim_std(schedule, eta)
    sigma, before = schedule.sigma[1:], schedule.sigma_prev[1:]
    from_x_prev = np.append(0.0, from_eps[1:] * sigma / before**2)
    return from_x_prev, np.append(schedule.sigma[0], std[1:] * sigma / before)


@functools.partial(jax.jit, static_argnames=("schedule", "eta"))
def q_step_ddim(
    schedule: Schedule, x_prev: Images, x_0: Images, t: Step, eps: Images, *, eta: float
) -> Images:
    """Adds one step of noise, x_t ~ q_σ(x_t | x_s, x_0) for eps ~ N(0, I); see `ddim_forward`."""
    from_x_prev, std = ddim_forward(schedule, eta)
    mean = at(schedule.alpha, t, x_0) * x_0
    noise_prev = x_prev - at(schedule.alpha_prev, t, x_0) * x_0
    return mean + at(from_x_prev, t, x_0) * noise_prev + at(std, t, x_0) * eps


# ---- denoising -------------------------------------------------------------------------------------


class Denoised(NamedTuple):
    """The output of the model for x_t, as the network gives it, as x̂_0 and as ε̂."""

    prediction: Images  # the output of the network, which a loss compares with its target
    x_0: Images  # x̂_0, not clipped
    eps: Images  # ε̂ = (x_t − α_t x̂_0)/σ_t
    log_variance: Float[Array, ...] | None = None  # log σ² of p(x_s | x_t); None if not requested


DenoiseFn = Callable[[Images, Step], Denoised]
Denoiser = Callable[
    [Schedule], DenoiseFn
]  # for any chain; losses and samplers get no other network


def noise_of(schedule: Schedule, x_0: Images, x_t: Images, t: Step) -> Images:
    """ε = (x_t − α_t x_0)/σ_t."""
    return at(1.0 / schedule.sigma, t, x_t) * (x_t - at(schedule.alpha, t, x_t) * x_0)


def denoiser(
    trained: Schedule,
    network_fn: Callable,
    *,
    prediction: str | Callable = "eps",
    learned_variance: bool = False,
    variance: str | np.ndarray | None = None,
) -> Denoiser:
    """Turns a network into a `Denoiser`: a function that returns denoise_fn(x_t, t) for any chain.

    Args:
      trained: the full chain on which the network was trained.
      network_fn: (x [B, H, W, C], time [B]) -> [B, H, W, C], or [B, H, W, 2C] with a learned variance.
      prediction: what the network predicts; see `predictions`.
      learned_variance: whether the last C output channels parametrise the variance.
      variance: of p(x_s | x_t), see `model_log_variance`; None leaves `Denoised.log_variance` at None.
    """

    def on(chain: Schedule) -> DenoiseFn:
        tables = coefficients(prediction, trained, chain)
        from_x_t, from_output = tables.to_x_0(chain)
        times = jnp.asarray(tables.time)

        def denoise_fn(x_t, t):
            time = jnp.broadcast_to(times[t], x_t.shape[:1])
            x = x_t if tables.scale is None else at(tables.scale, t, x_t) * x_t
            value, values = network_fn(x, time), None
            if learned_variance:
                value, values = jnp.split(value, 2, axis=-1)
            x_0 = at(from_output, t, x_t) * value
            if from_x_t.any():
                x_0 = at(from_x_t, t, x_t) * x_t + x_0
            eps = value if tables.is_eps else noise_of(chain, x_0, x_t, t)
            log_variance = None
            if variance is not None:
                log_variance = model_log_variance(chain, variance, values, x_t, t)
            return Denoised(value, x_0, eps, log_variance)

        return denoise_fn

    return on
