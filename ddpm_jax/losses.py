"""Training losses over a Schedule and a `denoise_fn`, and how their time t is drawn.

Each loss returns one number for each example; x_0, eps are [B, H, W, C], t is int [B], a step of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion, likelihood
from ddpm_jax.schedules import Schedule

LOSSES = ("simple", "vlb", "hybrid")
T_SAMPLINGS = ("uniform", "antithetic", "importance")
HYBRID_WEIGHT = 0.001  # λ of Nichol & Dhariwal §3.1


def mean_over_pixels(x):
    """[B, H, W, C] -> [B]."""
    return jnp.mean(x, axis=(1, 2, 3))


# ---- losses ----------------------------------------------------------------------------------------


def simple(
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    t,
    eps,
    *,
    prediction: str = "eps",
    min_snr_gamma: float | None = None,
):
    """L_simple, Ho et al. (14): the squared error of what the network predicts, averaged over pixels. [B]

    Args:
      min_snr_gamma: weigh it by `min_snr_weight` with this γ.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    denoised = denoise_fn(x_t, t)
    return _simple(schedule, denoised, x_0, x_t, t, eps, prediction, min_snr_gamma)


def _simple(schedule, denoised, x_0, x_t, t, eps, prediction, min_snr_gamma):
    target = eps
    if prediction != "eps":
        target = diffusion.from_x_0(schedule, prediction, x_0, x_t, t)
    squared_error = mean_over_pixels(jnp.square(denoised.prediction - target))
    if min_snr_gamma is None:
        return squared_error
    weight = min_snr_weight(schedule, prediction, min_snr_gamma)
    return jnp.asarray(weight, jnp.float32)[t] * squared_error


def min_snr_weight(schedule: Schedule, prediction: str, gamma: float = 5.0) -> np.ndarray:
    """Min-SNR-γ, float64 [S]: whatever is predicted, ‖x_0 − x̂_0‖² weighs min(SNR_t, γ); Hang et al. 2023.

    The squared error of eps is SNR times that of x_0, of v SNR + 1 times, of the mean ᾱ_{t−1}β²/(1 − ᾱ)²
    times; the weight is divided by it.
    """
    snr = schedule.snr
    of_mean, _ = diffusion.posterior_mean_coefficients(schedule)
    relative = {"x_0": 1.0, "eps": snr, "v": snr + 1.0, "mean": of_mean**2}[prediction]
    return np.minimum(snr, gamma) / relative


def vlb(
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    t,
    eps,
    *,
    variance: str = "fixed_large",
):
    """S times one term of the bound: its mean over t is the bound less L_T, in bits/dim. [B]

    The other constant of a fixed variance, the divergence that is left when the means agree, is in it.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    denoised = denoise_fn(x_t, t)
    return len(schedule) * likelihood.term(schedule, denoised, x_0, x_t, t, variance=variance)


def weighted(schedule: Schedule, denoise_fn: Callable, x_0, t, eps, *, gamma: np.ndarray):
    """S γ_t ‖ε − ε̂(x_t, t)‖², summed over pixels: its mean over t is L_γ. [B]

    L_γ = Σ_t γ_t E‖ε − ε̂‖², Song et al. 2021 (5), Liu (2.12). With γ_t = 1/(S D) for D pixels it is Ho et
    al.'s L_simple; with `ddim_gamma` the bound of DDIM.

    Args:
      gamma: [S] of one's own.
    """
    if np.shape(gamma) != (len(schedule),):
        raise ValueError(
            f"gamma has the shape {np.shape(gamma)}, one weight for each of {len(schedule)} steps is needed"
        )
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    squared_error = jnp.sum(jnp.square(denoise_fn(x_t, t).eps - eps), axis=(1, 2, 3))
    return len(schedule) * jnp.asarray(gamma, jnp.float32)[t] * squared_error


def ddim_gamma(schedule: Schedule, eta: float) -> np.ndarray:
    """The γ_t(σ) with which `weighted` is DDIM's objective J_σ up to a constant, in nats; float64 [S].

    J_σ = E_{q_σ}[log q_σ(x_{1:T} | x_0) − log p_θ(x_{0:T})] for the σ_t of `diffusion.ddim_std`; Song et al.
    2021, Theorem 1, Liu (2.15): γ_t = ½ ((√(1−ᾱ_{t−1}−σ_t²) − √((1−ᾱ_t)/α_t))/σ_t)². The constant does not
    depend on the network. σ of the first step, which the family has at 0, is that of "fixed_small", and
    p(x_0 | x_1) the normal density.

    Args:
      eta: above 0, to 1; at 0 there is no noise that a difference of means could be compared with.
    """
    of_eps, std = diffusion.ddim_std(schedule, eta)
    if eta == "hat" or not eta > 0:
        raise ValueError(f"the objective of DDIM needs eta above 0, up to 1; got {eta!r}")
    std = np.append(np.exp(0.5 * diffusion.posterior_log_variance(schedule)[0]), std[1:])
    return 0.5 * ((of_eps - np.sqrt((1.0 - schedule.alpha_bar) / schedule.alpha)) / std) ** 2


def hybrid(
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    t,
    eps,
    *,
    prediction: str = "eps",
    variance: str = "learned_range",
    min_snr_gamma: float | None = None,
):
    """L_simple for the mean and L_vlb for the variance alone: two [B], see `simple` and `vlb`.

    L_hybrid = L_simple + λ L_vlb with λ = `HYBRID_WEIGHT`, Nichol & Dhariwal (16); in L_vlb the mean is
    a constant. Their code's factor T/1000 on a single term is the same: λ times the T terms it stands for.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    denoised = denoise_fn(x_t, t)
    of_mean = _simple(schedule, denoised, x_0, x_t, t, eps, prediction, min_snr_gamma)
    frozen = denoised._replace(x_0=jax.lax.stop_gradient(denoised.x_0))
    of_variance = likelihood.term(schedule, frozen, x_0, x_t, t, variance=variance)
    return of_mean, len(schedule) * of_variance


def check(loss: str, variance: str, min_snr_gamma: float | None) -> None:
    """Refuses what makes no sense together.

    Raises:
      ValueError: one line with the reason and what to choose.
    """
    if variance == "analytic":
        raise ValueError(
            "variance 'analytic' is measured on a trained model, not trained: train with fixed_large"
            " and give --variance=analytic afterwards"
        )
    learned = variance in diffusion.LEARNED
    if loss == "simple" and learned:
        raise ValueError(
            f"loss 'simple' does not train the variance {variance!r}; use 'hybrid' or 'vlb', or a"
            " variance of fixed_small or fixed_large"
        )
    if loss == "hybrid" and not learned:
        raise ValueError(
            f"loss 'hybrid' trains a learned variance, and {variance!r} is fixed; use 'simple', or"
            " variance 'learned_range'"
        )
    if min_snr_gamma is not None and (loss == "vlb" or not min_snr_gamma > 0):
        raise ValueError(
            f"min_snr_gamma={min_snr_gamma} must be positive, and weighs 'simple' and 'hybrid' only;"
            f" the loss is {loss!r}"
        )


# ---- how t is drawn --------------------------------------------------------------------------------


def uniform_t(keys, num_timesteps: int):
    """t uniform in 0 … T−1, independent for each key: int32 [B]."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_timesteps))(keys)


def antithetic_t(key, place, num_timesteps: int):
    """t at even distances around the whole range from one random start: int32 [B]; Kingma et al. 2021 §I.1.

    Each t is uniform, and a batch covers the range evenly, so the mean loss varies less.

    Args:
      key: the same for the whole batch.
      place: [B] in [0, 1), where the example stands in the batch.
    """
    u = (jax.random.uniform(key) + place) % 1.0
    return jnp.minimum((u * num_timesteps).astype(jnp.int32), num_timesteps - 1)


class LossHistory(NamedTuple):
    """The last losses seen at each t, from which importance sampling learns; part of the TrainState."""

    losses: jax.Array  # float32 [T, 10], each row a ring
    count: jax.Array  # int32 [T], losses seen at each t so far


def no_history(num_timesteps: int, size: int = 10) -> LossHistory:
    """A history that has seen nothing; Nichol & Dhariwal §3.3 keep ten losses for each t."""
    return LossHistory(
        np.zeros((num_timesteps, size), np.float32), np.zeros(num_timesteps, np.int32)
    )


def remember(history: LossHistory, t, losses) -> LossHistory:
    """The history after a batch of losses [B] at times t int [B], in the batch's order.

    Where a t occurs more often than a row is long, its last ones count.
    """
    size = history.losses.shape[1]
    same = t[:, None] == t[None, :]
    earlier = jnp.sum(jnp.tril(same, -1), axis=1)  # examples before this one with the same t
    later = jnp.sum(jnp.triu(same, 1), axis=1)
    column = jnp.where(later < size, (history.count[t] + earlier) % size, size)  # size: dropped
    rings = history.losses.at[t, column].set(losses, mode="drop")
    return LossHistory(rings, history.count.at[t].add(1))


def probabilities(history: LossHistory, *, uniform: float = 0.001):
    """p_t as whole numbers of 2⁻³²: uint32 [T] that sum to 2³², the sum understood modulo 2³².

    p_t ∝ √E[L_t²] over the history, Nichol & Dhariwal (18), mixed with a share `uniform` of the uniform
    distribution. All are equal until every t has a full row, and while the rows say nothing: all zero,
    or one not finite. Whole numbers, because a float32 distribution function has too few digits for the
    least likely t, and its sample would not follow p_t.
    """
    num_timesteps, size = history.losses.shape
    largest = jnp.max(jnp.abs(history.losses))  # of which the squares neither overflow nor vanish
    root = jnp.sqrt(jnp.mean(jnp.square(history.losses / largest), axis=1))
    total = jnp.sum(root)
    learned = (1.0 - uniform) * root / total + uniform / num_timesteps
    usable = jnp.all(history.count >= size) & (total > 0)  # no, where a loss is not finite
    p = jnp.where(usable, learned, 1.0 / num_timesteps)
    parts = (p * (2.0**32 * (1.0 - 1e-5))).astype(jnp.uint32)  # their sum stays below 2³² …
    return parts.at[0].add(0 - jnp.sum(parts))  # … and t = 0 takes the rest


def importance_t(keys, parts):
    """t drawn from `probabilities`, and the weight 1/(T p_t) that leaves the expected loss as it is.

    Returns:
      t int32 [B], weight float32 [B].
    """
    last = jnp.cumsum(parts) - np.uint32(1)  # the last word that belongs to each t
    words = jax.vmap(jax.random.bits)(keys)
    t = jnp.searchsorted(last, words, side="left").astype(jnp.int32)
    count = (parts[t] - np.uint32(1)).astype(jnp.float32) + 1.0  # all 2³² words wrap to 0
    return t, (2.0**32 / len(parts)) / count
