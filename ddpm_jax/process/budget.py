"""The S of T steps with the lowest bound, found by dynamic programming; Watson et al. 2021."""

from __future__ import annotations

import numpy as np
from jaxtyping import ArrayLike, Float64, Int

from ddpm_jax.process.schedules import Schedule


def jump_bits(
    schedule: Schedule, x_0_error: ArrayLike, variance: str
) -> Float64[np.ndarray, "T T"]:
    """The KL term of the bound for a single step from t to s, in bits/dim, at [t, s]; inf where s ≥ t.

    With a fixed or analytic variance it depends on the model only through E‖x_0 − x̂_0(x_t, t)‖².

    Args:
      schedule: the full chain.
      x_0_error: [T], mean squared error of x̂_0 per dimension at each step.
      variance: "fixed_small", "fixed_large" or "analytic".

    Raises:
      ValueError: any other variance.
    """
    if variance not in ("fixed_small", "fixed_large", "analytic"):
        raise ValueError(
            f"the best steps are not defined for variance {variance!r}; use fixed_small, fixed_large or"
            " analytic"
        )
    error = np.asarray(x_0_error, np.float64)[:, None]
    alpha_t, sigma_t = schedule.alpha[:, None], schedule.sigma[:, None]
    alpha_s, sigma_s = schedule.alpha[None, :], schedule.sigma[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        step = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        posterior = step * sigma_s**2 / sigma_t**2
        squared = (alpha_s * step / sigma_t**2) ** 2 * error
        total = 1.0
        if not schedule.is_variance_preserving:
            total = (alpha_s**2 + sigma_s**2) / (alpha_t**2 + sigma_t**2)
        model = {
            "fixed_small": posterior,
            "fixed_large": step * total,
            "analytic": posterior + squared,
        }[variance]
        ratio = posterior / model
        nats = 0.5 * (squared / model + ratio - 1.0 - np.log(ratio))
    return np.where(np.tri(len(schedule), k=-1, dtype=bool), nats / np.log(2.0), np.inf)


def check_num_steps(num_steps: int, T: int) -> None:
    """Raises ValueError unless 2 ≤ num_steps ≤ T, since chosen chains contain the first and the last step."""
    if T < 2:
        raise ValueError(f"a chain of {T} step leaves nothing to choose")
    if not 2 <= num_steps <= T:
        raise ValueError(f"the best {num_steps} of {T} steps: choose 2 to {T}")


def best_steps(
    schedule: Schedule, x_0_error: ArrayLike, num_steps: int, *, variance: str
) -> Int[np.ndarray, " S"]:
    """The S steps with the lowest bound, by dynamic programming over `jump_bits`; Watson et al. 2021.

    Steps 0 and T − 1 are always among them, so L_0 and L_T are the same for all choices (except that a fixed variance at
    step 0 is that of the second chosen step).

    Args:
      schedule, x_0_error, variance: see `jump_bits`.
      num_steps: S in 2 … T.

    Returns:
      [S], strictly increasing from 0 to T − 1.

    Raises:
      ValueError: S is out of range.
    """
    T = len(schedule)
    check_num_steps(num_steps, T)
    bits = jump_bits(schedule, x_0_error, variance)
    cost = np.where(np.arange(T) == 0, 0.0, np.inf)  # of the best chain from 0 to each step
    came_from = []
    for _ in range(num_steps - 1):
        through = bits + cost
        came_from.append(np.argmin(through, axis=1))
        cost = np.min(through, axis=1)
    tau = [T - 1]
    for previous in reversed(came_from):
        tau.append(previous[tau[-1]])
    return np.array(tau[::-1])
