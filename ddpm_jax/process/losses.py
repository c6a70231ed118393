"""Training losses: functions (schedule, denoise_fn, x_0, t, eps) that return the loss of each example, [B].

x_0 and eps are [B, H, W, C], and t is a step of the schedule, int [B] or a scalar. A loss of your own has the signature of
`vlb`; config.diffusion.loss names it, as module:NAME.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Key

from ddpm_jax.names import find
from ddpm_jax.process import diffusion, likelihood, predictions
from ddpm_jax.process.diffusion import Denoised, DenoiseFn, Images
from ddpm_jax.process.schedules import Schedule

HYBRID_WEIGHT = 0.001  # λ of Nichol & Dhariwal §3.1

Times = Int[Array, " B"]
PerExample = Float[Array, " B"]


class Drawn(NamedTuple):
    """The images of a batch, and what is drawn for each."""

    x_0: Images
    label: Int[Array, " B"]
    t: Times  # step of the schedule
    weight: PerExample  # of the loss
    eps: Images
    dropout_keys: Key[Array, " B"]


def mean_over_pixels(x: Images) -> PerExample:
    """Averages [B, H, W, C] to [B]."""
    return jnp.mean(x, axis=(1, 2, 3))


def target(
    schedule: Schedule, prediction: str | Callable, x_0: Images, t: Times, eps: Images
) -> Images:
    """The training target of the network at x_t: u_t x_0 + w_t ε, see `predictions`."""
    tables = predictions.coefficients(prediction, schedule, schedule)
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
    """L_simple: the squared error of the network's output, averaged over pixels; Ho et al. (14).

    Args:
      prediction: what the network predicts, which sets the target.
      min_snr_gamma: γ of `min_snr_weight`; None for no weights.
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
    """Min-SNR-γ weights of the output's squared error: ‖x_0 − x̂_0‖² has the weight min(SNR_t, γ); Hang et al. 2023.

    x̂_0 contains the output times `from_output`, so the weight of the output's error is min(SNR_t, γ) from_output².
    """
    tables = predictions.coefficients(prediction, schedule, schedule)
    _, from_output = tables.to_x_0(schedule)
    with np.errstate(invalid="ignore"):
        weight = np.minimum(schedule.snr, gamma) * from_output**2
    return np.where(np.isfinite(weight), weight, 1.0)  # not finite for eps where α = 0


def vlb(
    schedule: Schedule, denoise_fn: DenoiseFn, x_0: Images, t: Times, eps: Images
) -> PerExample:
    """L_vlb: S times the bound's term of step t, in bits/dim. The mean over t is the bound minus L_T.

    It includes the constant KL that a fixed variance leaves when the means agree. `denoise_fn` must return a
    log_variance.
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
    """The two parts of L_hybrid: L_simple, and L_vlb with no gradient through the mean; see `simple` and `vlb`.

    L_hybrid = L_simple + λ L_vlb with λ = `HYBRID_WEIGHT`; Nichol & Dhariwal (16). Their code multiplies a single term by
    T/1000, which is the same as λ L_vlb with λ = 0.001.
    """
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    denoised = denoise_fn(x_t, t)
    loss_simple = _simple(schedule, denoised, x_0, t, eps, prediction, min_snr_gamma)
    frozen = denoised._replace(x_0=jax.lax.stop_gradient(denoised.x_0))
    return loss_simple, len(schedule) * likelihood.term(schedule, frozen, x_0, x_t, t)


def weighted(
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Images,
    t: Times,
    eps: Images,
    *,
    gamma: Float64[np.ndarray, " S"],
) -> PerExample:
    """L_γ: S γ_t ‖ε − ε̂(x_t, t)‖², summed over dimensions.

    The mean over t is L_γ = Σ_t γ_t E‖ε − ε̂‖², Song et al. 2021 (5), Liu (2.12). With γ_t = 1/(S D) for D dimensions it is
    Ho et al.'s L_simple, with `ddim_gamma` the bound of DDIM.
    """
    if np.shape(gamma) != (len(schedule),):
        raise ValueError(
            f"gamma must hold one weight for each of the {len(schedule)} steps, got shape {np.shape(gamma)}"
        )
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    squared_error = jnp.sum(jnp.square(denoise_fn(x_t, t).eps - eps), axis=(1, 2, 3))
    return len(schedule) * jnp.asarray(gamma, jnp.float32)[t] * squared_error


def ddim_gamma(schedule: Schedule, eta: float) -> Float64[np.ndarray, " S"]:
    """Weights γ_t for which `weighted` is DDIM's objective J_σ, in nats, up to a constant independent of the network.

    J_σ = E_{q_σ}[log q_σ(x_{1:T} | x_0) − log p_θ(x_{0:T})] with the noise σ_t of `diffusion.ddim_std`, and
    γ_t = ½ ((√(1−ᾱ_{t−1}−σ_t²) − √((1−ᾱ_t)/α_t))/σ_t)²; Song et al. 2021, Theorem 1, Liu (2.15). p(x_0 | x_1) is a normal
    density. At step 0, where DDIM adds no noise, σ is that of "fixed_small".

    Args:
      eta: in (0, 1]. At 0 the objective is infinite: both distributions of a step have variance 0.

    Raises:
      ValueError: eta is another one, or α is 0 at the last step, where ε does not determine the mean.
    """
    if not schedule.alpha[-1] > 0:
        raise ValueError("DDIM's objective needs alpha above 0 at every step")
    from_eps, std = diffusion.ddim_std(schedule, eta)
    if eta == "hat" or not eta > 0:
        raise ValueError(f"DDIM's objective needs eta in (0, 1], got {eta!r}")
    first = np.exp(0.5 * diffusion.fixed_log_variance(schedule, "fixed_small")[0])
    std = np.append(first, std[1:])
    return 0.5 * ((from_eps - schedule.sigma / schedule.step_alpha) / std) ** 2


def evaluate(
    loss: str | Callable,
    schedule: Schedule,
    denoise_fn: DenoiseFn,
    x_0: Images,
    t: Times,
    eps: Images,
    **weights,
) -> tuple[PerExample, dict[str, PerExample]]:
    """A loss by its name, and its parts by theirs.

    Args:
      loss: a key of `LOSSES`, module:NAME or a function.
      weights: `prediction` and `min_snr_gamma` of "simple" and "hybrid".
    """
    if loss not in ("simple", "hybrid"):
        return named(loss)(schedule, denoise_fn, x_0, t, eps), {}
    values = named(loss)(schedule, denoise_fn, x_0, t, eps, **weights)
    if loss == "simple":
        return values, {}
    return values[0] + HYBRID_WEIGHT * values[1], dict(zip(("simple", "vlb"), values, strict=True))


LOSSES: dict[str, Callable] = {"simple": simple, "vlb": vlb, "hybrid": hybrid}


def named(loss: str | Callable) -> Callable:
    """The loss by its name, a key of `LOSSES` or module:NAME; a function is returned as it is.

    Raises:
      ValueError: an unknown name.
    """
    return find(loss, LOSSES, "loss")


def check(loss: str | Callable, variance: str, min_snr_gamma: float | None) -> None:
    """Raises ValueError, with the reason and what to choose, if loss, variance and weight are incompatible."""
    if variance == "analytic":
        raise ValueError(
            "variance 'analytic' is measured on a trained model, not trained: train with fixed_large,"
            " then sample or evaluate with --variance=analytic"
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
            f"min_snr_gamma must be positive and needs loss 'simple' or 'hybrid'; got {min_snr_gamma} and"
            f" loss {loss!r}"
        )
