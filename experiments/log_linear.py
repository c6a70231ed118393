"""A new schedule from idea to result, in one file: log SNR decreases in even steps.

Idea: the linear schedule was chosen for T = 1000. What if log SNR decreases evenly from `config.schedule.start` to
`config.schedule.end`, for any T?

    python -m experiments.sweep experiments/log_linear.py --size=smoke --run     in minutes, without data
    python -m experiments.sweep experiments/log_linear.py --size=cpu --run --table

    row          schedule
    linear       Ho et al. 2020, for comparison
    log_linear   the idea

Both predict ε with the network of configs/digits.py.

The columns are bits/dim of the test split with the analytic variance: for the whole chain, 50 steps and 10 steps.

Expected: a similar bound on the full chain, and a better one for few steps, since no step is large.
Measured by these commands, one by one, on an AMD EPYC server, jax 0.10.2; EMA weights, 2000 steps of training each:

    steps             linear           log-linear
    1000 (64 images)  4.735 ± 0.050    4.357 ± 0.056
    50 (297)          5.543 ± 0.026    4.514 ± 0.027
    10 (297)          6.431 ± 0.024    5.505 ± 0.028

± is the standard error over images; each was trained once. The difference is 4 to 30 times that error: log-linear is
better with few steps, as expected, and on the full chain too (0.14 of it in L_0), since more of the training is spent on
the times that contribute most bits. The spread between trainings was not measured (--seeds=3), nor the quality of
samples. L_simple cannot be compared, since it averages over other times.
"""

import numpy as np

from ddpm_jax.configs import digits
from ddpm_jax.process.schedules import Schedule, from_betas


def get_config(variant: str = ""):
    config = digits.get_config(variant)
    config.schedule.name = "experiments.log_linear:log_linear"
    config.schedule.start = 9.2  # log SNR at both ends, those of the linear schedule
    config.schedule.end = -10.1
    return config


def log_linear(num_timesteps: int = 1000, *, start: float, end: float) -> Schedule:
    """The variance-preserving chain whose log SNR falls from `start` to `end` in even steps."""
    alpha_bar = 1.0 / (1.0 + np.exp(-np.linspace(start, end, num_timesteps)))
    return from_betas(1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1]))


def rows(size: str) -> dict[str, dict]:
    """The rows of the table, for `experiments.sweep`."""
    del size  # the same for every size
    eps = {"config.diffusion.prediction": "eps"}
    linear = {"config": "configs/digits.py", "config.schedule.name": "linear"}
    return {"linear": linear | eps, "log_linear": eps}


def evaluations(size: str, row: str) -> dict[str, list[str]]:
    """The measurements of each row, for `experiments.sweep`."""
    del row  # the same for both
    if size == "smoke":
        return {"steps_10": ["--mode=nll", "--num_images=8", "--steps=10"]}
    bound = ["--mode=nll", "--variance=analytic"]
    return {
        "whole": [*bound, "--num_images=64"],
        "steps_50": [*bound, "--steps=50"],
        "steps_10": [*bound, "--steps=10"],
    }
