"""What the network is trained to predict, as coefficients at each step: F(c_t x_t, time_t) = u_t x_0 + w_t ε.

With x_t = α x_0 + σ ε it follows that x̂_0 = (w x_t − σ F)/(α w − σ u) and ε̂ = (x_t − α x̂_0)/σ.

    name       u                    w                    c                    time
    eps        0                    1                    1                    t            Ho et al. 2020
    x_0        1                    0                    1                    t
    mean       k_0 + k_t α          k_t σ                1                    t            of q(x_s | x_t, x_0), Ho et al. (7)
    v          −σ                   α                    1                    t            Salimans & Ho 2022
    velocity   α'                   σ'                   1                    t            dx/du, u = t/T; Lipman et al. 2023
    edm        s/(d √(s² + d²))     −d/√(s² + d²)        1/(α √(s² + d²))     ¼ ln s       Karras et al. 2022, Table 1

where s = σ/α, and d = 0.5 is the standard deviation of the data. A prediction is a function (trained, chain) ->
Prediction: the schedule that the network was trained on, and the chain to evaluate it on. One of your own is named
module:NAME.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Num

from ddpm_jax.names import check_takes, described, find
from ddpm_jax.options import ConfigError
from ddpm_jax.process.schedules import Schedule

DATA_STD = 0.5  # of the data, in EDM's preconditioning; Karras et al. 2022, Table 1


class Prediction(NamedTuple):
    """Coefficients for each step of a chain: F(scale x_t, time) = of_x_0 x_0 + of_eps ε."""

    of_x_0: Float64[np.ndarray, " S"]  # u
    of_eps: Float64[np.ndarray, " S"]  # w
    time: Num[np.ndarray, " S"]  # input of the network beside x
    scale: Float64[np.ndarray, " S"] | None = None  # c; None for 1

    @property
    def is_eps(self) -> bool:
        """Whether the network predicts the noise itself."""
        return not self.of_x_0.any() and (self.of_eps == 1.0).all()

    def to_x_0(
        self, chain: Schedule
    ) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
        """The coefficients of x_t and of the output in x̂_0.

        They are infinite where x_0 cannot be recovered, as from ε where α = 0.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1.0 / (chain.alpha * self.of_eps - chain.sigma * self.of_x_0)
            return self.of_eps * inverse, -chain.sigma * inverse


def eps(trained: Schedule, chain: Schedule) -> Prediction:
    """The noise ε."""
    del trained
    return Prediction(np.zeros(len(chain)), np.ones(len(chain)), chain.times)


def x_0(trained: Schedule, chain: Schedule) -> Prediction:
    """The image itself."""
    del trained
    return Prediction(np.ones(len(chain)), np.zeros(len(chain)), chain.times)


def mean(trained: Schedule, chain: Schedule) -> Prediction:
    """The mean of q(x_s | x_t, x_0) for one step of the trained chain.

    Raises:
      ValueError: the chain has times that are not in the trained one.
    """
    rows = np.searchsorted(trained.times, chain.times)
    if (trained.times[np.minimum(rows, len(trained) - 1)] != chain.times).any():
        raise ValueError(
            "prediction 'mean' is defined at the steps of the trained chain only; this sampler needs others"
        )
    variance = trained.sigma**2
    k_0 = (trained.alpha_prev * trained.step_variance / variance)[rows]
    k_t = (trained.step_alpha * trained.sigma_prev**2 / variance)[rows]
    return Prediction(k_0 + k_t * chain.alpha, k_t * chain.sigma, chain.times)


def v(trained: Schedule, chain: Schedule) -> Prediction:
    """v = α ε − σ x_0."""
    del trained
    return Prediction(-chain.sigma, chain.alpha, chain.times)


def velocity(trained: Schedule, chain: Schedule) -> Prediction:
    """dx_t/du = α' x_0 + σ' ε along the trained path, with u = t/T; for a straight path ε − x_0."""
    if len(trained) < 2:
        raise ValueError("prediction 'velocity' needs a chain of at least two steps")
    d_alpha, d_sigma = (
        np.interp(chain.times, trained.times, np.gradient(table, trained.times) * len(trained))
        for table in (trained.alpha, trained.sigma)
    )
    return Prediction(d_alpha, d_sigma, chain.times)


def edm(trained: Schedule, chain: Schedule, *, data_std: float = DATA_STD) -> Prediction:
    """EDM's preconditioned output, of unit variance for data with standard deviation `data_std`; Karras et al. 2022."""
    del trained
    if not chain.alpha[-1] > 0:
        raise ValueError("prediction 'edm' scales x_t by 1/alpha, and alpha is 0 at the last step")
    ratio, root = chain.ratio, np.hypot(chain.ratio, data_std)
    of_x_0, of_eps = ratio / (data_std * root), -data_std / root
    return Prediction(of_x_0, of_eps, 0.25 * np.log(ratio), 1.0 / (chain.alpha * root))


PREDICTIONS = {f.__name__: f for f in (eps, x_0, mean, v, velocity, edm)}


def named(prediction: str | Callable) -> Callable:
    """The prediction by its name, a key of `PREDICTIONS` or module:NAME; a function is returned as it is.

    Raises:
      ValueError: an unknown name.
    """
    return find(prediction, PREDICTIONS, "prediction")


def coefficients(prediction: str | Callable, trained: Schedule, chain: Schedule) -> Prediction:
    """The coefficients of a prediction, after a check of what a function of one's own returns.

    Raises:
      ConfigError: it is not a Prediction of one number for each step of `chain`; names the function's file.
    """
    function = named(prediction)
    result = function(trained, chain)
    for name in Prediction._fields if isinstance(result, Prediction) else ("",):
        found = getattr(result, name, result)
        if name != "scale" or found is not None:
            found = np.shape(found) if name else type(found).__name__
            if found != (len(chain),):
                raise ConfigError(
                    f"{described(function, 'prediction')} returns {f'{name} of shape ' * bool(name)}{found},"
                    " and must return a Prediction(of_x_0, of_eps, time, scale) of shape"
                    f" ({len(chain)},) each, one number for each step of the chain"
                )
    return result


def check(schedule: Schedule, prediction: str | Callable) -> None:
    """Checks that x_0 can be recovered in float32 at every step of a schedule.

    Raises:
      ValueError: a coefficient of x̂_0 exceeds 1e30, as with "eps" where α is 0, or a function of one's own has other
        arguments or results.
    """
    check_takes(named(prediction), ("trained", "chain"), "prediction")
    factors = np.abs(np.stack(coefficients(prediction, schedule, schedule).to_x_0(schedule)))
    if not factors.max() < 1e30:
        raise ValueError(
            f"prediction {prediction!r} cannot recover x_0 on this schedule, where alpha² falls to"
            f" {schedule.alpha[-1] ** 2:.3g}; use prediction 'x_0', 'v' or 'velocity', or smaller betas"
        )
