"""A trace of some training steps by jax.profiler: --profile=START:COUNT."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from typing import Annotated, Any

import jax

from ddpm_jax.options import ConfigError

Steps = Annotated[
    str | None,
    "START:COUNT writes a profiler trace of COUNT training steps, the first of them step START, to profile/ in the run"
    " directory.",
]


class Profiler:
    """Writes a trace of some steps to WORKDIR/profile; does nothing if `steps` is None.

    Args:
      steps: START:COUNT, both at least 1.
      num_steps: the length of the run.
      say: prints a line.

    Raises:
      ConfigError: `steps` is something else, or goes beyond the run.
    """

    def __init__(self, steps: str | None, workdir: str, num_steps: int, say: Callable[[str], None]):
        self._folder, self._say = os.path.join(workdir, "profile"), say
        self._first, self._last, self._tracing = -1, -1, False
        if steps is None:
            return
        found = re.fullmatch(r"(\d+):(\d+)", steps)
        first, count = map(int, found.groups()) if found else (0, 0)
        if first < 1 or count < 1:
            raise ConfigError(
                f"--profile must be START:COUNT, such as 20:5 for five steps from step 20, got {steps!r}"
            )
        self._first, self._last = first, first + count - 1
        if self._last > num_steps:
            raise ConfigError(
                f"--profile={steps} ends at step {self._last:,}, but the run has {num_steps:,} steps"
            )

    def begin(self, step: int) -> None:
        """Says that there is nothing to trace, in a run that continues after it."""
        if -1 < self._first <= step:
            self._say(
                f"WARNING: no profile: step {self._first:,} is done, and the run continues after step {step:,}"
            )

    def step(self, number: int):
        """A context for a step, counted from 1; the first starts the trace."""
        if number == self._first:
            with self._warning():
                jax.profiler.start_trace(self._folder)
                self._tracing = True
        if not self._tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, result: Any) -> None:
        """Ends the trace after its last step, once the step is computed."""
        if self._tracing and number >= self._last:
            jax.block_until_ready(result)
            self.close()
            self._say(
                f"profile of steps {self._first:,} to {number:,}: {self._folder}; open it with `xprof"
                f" {self._folder}` (pip install xprof), or its .trace.json.gz at ui.perfetto.dev"
            )

    def close(self) -> None:
        """Ends a trace that an error or a signal has cut short."""
        if self._tracing:
            self._tracing = False
            with self._warning():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _warning(self):
        try:
            yield
        except Exception as error:  # such as another profiler that is running
            self._say(f"WARNING: no profile; training continues: {error}")
