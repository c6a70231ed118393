"""config.training: the length of a run, its intervals and its loggers."""

from __future__ import annotations

import dataclasses

from ddpm_jax.training.loggers import Logging


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """The fields of config.training."""

    num_steps: int
    batch_size: int
    log_every: int = 100
    checkpoint_every: int = 5000
    checkpoint_minutes: float = 10.0
    keep: int = 3
    logging: Logging = Logging()

    def __post_init__(self):
        intervals = (self.num_steps, self.log_every, self.checkpoint_every, self.keep)
        if min(intervals) < 1 or self.checkpoint_minutes <= 0:
            raise ValueError("num_steps, the intervals and keep must all be positive")
