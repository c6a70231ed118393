"""Training losses over a Schedule and its `denoise_fn(x_t, t)`.

Each returns one number for each example; x_0 and eps are [B, H, W, C], t is int [B], a step of the schedule. A user's
own loss has the signature of `vlb` and is named `module:NAME` in config.diffusion.loss.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from ddpm_jax.process import diffusion, likelihood, predictions
from ddpm_jax.process.diffusion import Denoised, DenoiseFn, Images
from ddpm_jax.process.schedules import Schedule

LOSSES = ("simple", "vlb", "hybrid")
HYBRID_WEIGHT = 0.001  # λ of Nichol & Dhariwal §3.1

Times = Int[Array, " B"]
PerExample = Float[Array, " B"]


def mean_over_pixels(x: Images) -> PerExample:
    """[B, H, W, C] -> [B]."""
    return jnp.mean(x, axis=(1, 2, 3))


def target(
    schedule: Schedule, prediction: str | Callable, x_0: Images, t: Times, eps: Images
) -> Images:
    """The target of the network's output at x_t: u_t x_0 + w_t ε, see `predictions`."""
    tables = predictions.named(prediction)(schedule, schedule)
    if tables.is_eps:
        return eps
    return diffusion.at(tables.of_x_0, t, x_0) * x_0 + diffusion.at(tables.of_eps, t, x_0) * eps


def simple(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Images,
    t: Times,
    eps: Images,
    *,
    prediction: str | Callable = "eps",
    min_snr_gamma: float | None = None,
) -> PerExample:
    """L_simple, Ho et al. (14): the squared error of what the network predicts, averaged over pixels.

    Args:
      min_snr_gamma: γ of `min_snr_weight`; None for no weight.
    """
    denoised = denoise_fn(diffusion.q_sample(schedule, x_0, t, eps), t)
    return _simple(schedule, denoised, x_0, t, eps, prediction, min_snr_gamma)


def _simple(schedule, denoised: Denoised, x_0, t, eps, prediction, min_snr_gamma):
    error = denoised.prediction - target(schedule, prediction, x_0, t, eps)
    squared_error = mean_over_pixels(jnp.square(error))
    if min_snr_gamma is None:
        return squared_error
    weight = min_snr_weight(schedule, prediction, min_snr_gamma)
    return jnp.asarray(weight, jnp.float32)[t] * squared_error


def min_snr_weight(
    schedule: Schedule, prediction: str | Callable, gamma: float = 5.0
) -> Float64[np.ndarray, " S"]:
    """Min-SNR-γ: for any prediction, ‖x_0 − x̂_0‖² has the weight min(SNR_t, γ); Hang et al. 2023.

    An error of the output is that of x̂_0 divided by its factor there, so the weight is multiplied by the factor
    squared.
    """
    tables = predictions.named(prediction)(schedule, schedule)
    _, of_output = tables.to_x_0(schedule)
    with np.errstate(invalid="ignore"):
        weight = np.minimum(schedule.snr, gamma) * of_output**2
    return np.where(np.isfinite(weight), weight, 1.0)  # eps where nothing of x_0 is left


def vlb(
    schedule: Schedule, denoise_fn: DenoiseFn, x_0: Images, t: Times, eps: Images
) -> PerExample:
    """S times one term of the bound: its mean over t is the bound less L_T, in bits/dim.

    It includes the constant of a fixed variance, the divergence that is left when the means agree. The denoise_fn must
    return a log_variance.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    return len(schedule) * likelihood.term(schedule, denoise_fn(x_t, t), x_0, x_t, t)


def hybrid(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Images,
    t: Times,
    eps: Images,
    *,
    prediction: str | Callable = "eps",
    min_snr_gamma: float | None = None,
) -> tuple[PerExample, PerExample]:
    """L_simple for the mean and L_vlb for the variance alone; see `simple` and `vlb`.

    L_hybrid = L_simple + λ L_vlb with λ = `HYBRID_WEIGHT`, Nichol & Dhariwal (16); in L_vlb the mean is a constant. The
    factor T/1000 of their code on a single term is the same: λ times the T terms that it stands for.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    denoised = denoise_fn(x_t, t)
    of_mean = _simple(schedule, denoised, x_0, t, eps, prediction, min_snr_gamma)
    frozen = denoised._replace(x_0=jax.lax.stop_gradient(denoised.x_0))
    return of_mean, len(schedule) * likelihood.term(schedule, frozen, x_0, x_t, t)


def weighted(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Images,
    t: Times,
    eps: Images,
    *,
    gamma: Float64[np.ndarray, " S"],
) -> PerExample:
    """S γ_t ‖ε − ε̂(x_t, t)‖², summed over pixels: its mean over t is L_γ.

    L_γ = Σ_t γ_t E‖ε − ε̂‖², Song et al. 2021 (5), Liu (2.12). With γ_t = 1/(S D) for D pixels it is Ho et al.'s
    L_simple; with `ddim_gamma` the bound of DDIM.
    """
    if np.shape(gamma) != (len(schedule),):
        raise ValueError(
            f"gamma has the shape {np.shape(gamma)}, one weight for each of {len(schedule)} steps is needed"
        )
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    squared_error = jnp.sum(jnp.square(denoise_fn(x_t, t).eps - eps), axis=(1, 2, 3))
    return len(schedule) * jnp.asarray(gamma, jnp.float32)[t] * squared_error


def ddim_gamma(schedule: Schedule, eta: float) -> Float64[np.ndarray, " S"]:
    """The γ_t(σ) with which `weighted` is DDIM's objective J_σ up to a constant, in nats.

    J_σ = E_{q_σ}[log q_σ(x_{1:T} | x_0) − log p_θ(x_{0:T})] for the noise of `diffusion.ddim_std`; Song et al. 2021,
    Theorem 1, Liu (2.15): γ_t = ½ ((√(1−ᾱ_{t−1}−σ_t²) − √((1−ᾱ_t)/α_t))/σ_t)². The constant does not depend on the
    network. The noise of the first step, which the family has at 0, is that of "fixed_small", and p(x_0 | x_1) the
    normal density.

    Args:
      eta: in (0, 1]; at 0 there is no noise to measure a difference of means by.
    """
    of_eps, std = diffusion.ddim_std(schedule, eta)
    if eta == "hat" or not eta > 0:
        raise ValueError(f"the objective of DDIM needs eta above 0, up to 1; got {eta!r}")
    first = np.exp(0.5 * diffusion.fixed_log_variance(schedule, "fixed_small")[0])
    std = np.append(first, std[1:])
    return 0.5 * ((of_eps - schedule.sigma / schedule.step_alpha) / std) ** 2


def check(loss: str | Callable, variance: str, min_snr_gamma: float | None) -> None:
    """Checks that loss, variance and weight fit together.

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
    if min_snr_gamma is not None and (loss not in ("simple", "hybrid") or not min_snr_gamma > 0):
        raise ValueError(
            f"min_snr_gamma={min_snr_gamma} must be positive, and weighs 'simple' and 'hybrid' only;"
            f" the loss is {loss!r}"
        )
