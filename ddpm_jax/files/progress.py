"""The progress of long jobs in the terminal, and durations and sizes in words."""

from __future__ import annotations

import contextlib
import math
import time

from ddpm_jax.files import console

SHOW_SECONDS = 5.0  # minimum time between two progress lines
BAR_SECONDS = 0.5  # minimum time between two changes of the bar on a terminal
BAR_WIDTH = 20


class Progress:
    """The progress of a long job: how much is done, how fast, and how long it still takes.

    Args:
      what: the thing counted, such as "step".
      total, done: the count at the end and now.
      unit, per_count: the unit of the speed, such as "images", and how many of them belong to one count.
    """

    def __init__(self, what: str, total: int, done: int, *, unit: str, per_count: int = 1):
        self._what, self._unit, self._per_count = what, unit, per_count
        self.total = total
        self.done = self._first = self._last = done
        self._start = self._last_time = time.perf_counter()
        self._shown, self._text = -math.inf, ""

    @contextlib.contextmanager
    def once(self, what: str = ""):
        """Excludes the time inside the context, which will not come again, from the speed and the time left.

        Args:
          what: what is done there, such as "compiling"; it is printed.
        """
        if what:
            self.say(what)
        before = time.perf_counter()
        with self.aside():
            yield
        self._start += time.perf_counter() - before

    @contextlib.contextmanager
    def aside(self):
        """Excludes the time inside the context, such as that of a checkpoint, from the speed."""
        before, inner = time.perf_counter(), self._last_time
        yield
        self._last_time = inner + time.perf_counter() - before

    def say(self, line: str) -> None:
        console.say(line)

    def rate(self) -> float:
        """Units per second since `begin`, without what was done aside."""
        seconds = time.perf_counter() - self._last_time
        return (self.done - self._last) * self._per_count / max(seconds, 1e-9)

    def show(self, text: str = "") -> None:
        """Shows the progress if `is_due`: a bar on a terminal, a line elsewhere."""
        if self.is_due():
            left = self.seconds_left()
            numbers = {"done": self.done, "total": self.total, "per_second": self.rate()}
            console.emit("progress", what=self._what, **numbers, seconds_left=left)
            if console.is_live():
                self.show_bar(text)
            else:
                self._shown = time.perf_counter()
                self.say(self.line(text))

    def is_due(self) -> bool:
        """Whether the time of `SHOW_SECONDS`, or of `BAR_SECONDS`, has passed since the last line, or all is done."""
        return self.done >= self.total or self._is_late(SHOW_SECONDS)

    def _is_late(self, seconds: float) -> bool:
        late = BAR_SECONDS if console.is_live() else seconds
        return time.perf_counter() - self._shown >= late

    def show_bar(self, text: str | None = None) -> None:
        """Shows the bar.

        Args:
          text: as for `line`; None for the last one.
        """
        self._shown, self._text = time.perf_counter(), self._text if text is None else text
        filled = "#" * (BAR_WIDTH * self.done // max(self.total, 1))
        console.show_bar(
            f"[{filled:.<{BAR_WIDTH}}] {self.line(self._text)}", last=self.done >= self.total
        )

    def refresh(self) -> None:
        """Redraws the bar, if there is one, twice a second."""
        if console.is_live() and self._is_late(BAR_SECONDS) and self.done < self.total:
            self.show_bar()

    def seconds_left(self) -> float:
        """The time until all is done, at the average speed."""
        each = (time.perf_counter() - self._start) / max(self.done - self._first, 1)
        return (self.total - self.done) * each

    def line(self, text: str = "") -> str:
        """The progress as one line: step 1,200/20,000  6 %  TEXT  512 images/s  12m 03s left."""
        parts = [
            f"{self._what} {self.done:,}/{self.total:,}",
            f"{100 * self.done // max(self.total, 1)} %",
            text,
            f"{self.rate():.4g} {self._unit}/s",
            f"{duration(self.seconds_left())} left",
        ]
        return "  ".join(part for part in parts if part)

    def begin(self) -> None:
        """Restarts the measurement of `rate`."""
        self._last, self._last_time = self.done, time.perf_counter()


def duration(seconds: float) -> str:
    """Seconds as 3 s, 12m 03s, 2h 05m or 3d 04h."""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days:.0f}d {hours % 24:02.0f}h"
    if hours:
        return f"{hours:.0f}h {minutes % 60:02.0f}m"
    if minutes:
        return f"{minutes:.0f}m {seconds % 60:02.0f}s"
    return f"{seconds:.0f} s"


def memory(size: float) -> str:
    """Bytes as MiB or GiB."""
    if size != size:
        return "an unknown amount of memory"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
