"""config.training: the length of a run, its intervals and its loggers."""

from __future__ import annotations

import dataclasses

from ddpm_jax.training.loggers import Logging


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """The fields of config.training.

    Attributes:
      keep: the number of newest checkpoints that stay.
      keep_best: a number of metrics.jsonl, such as "loss": the checkpoint with its lowest mean since the checkpoint before
        stays too; of "-NAME", the highest.
      mirror: a .zip that gets a copy of the run after each checkpoint, and from which a run continues whose directory is gone or older.
    """

    num_steps: int
    batch_size: int
    log_every: int = 100
    checkpoint_every: int = 5000
    checkpoint_minutes: float = 10.0
    keep: int = 3
    keep_best: str | None = None
    mirror: str | None = None
    logging: Logging = Logging()

    def __post_init__(self):
        intervals = (self.num_steps, self.log_every, self.checkpoint_every, self.keep)
        if min(intervals) < 1 or self.checkpoint_minutes <= 0:
            raise ValueError("num_steps, the intervals and keep must all be positive")
