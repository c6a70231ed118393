"""The progress line of downloads and of decoding."""

import sys
import time


class Progress:
    """Prints the amount done, speed and time left to stderr.

    A terminal shows one line, updated twice a second. A log file gets a line every ten seconds. Work of less
    than a second prints nothing.
    """

    def __init__(self, what: str, total: float, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self.began = self.shown = time.monotonic()

    def update(self, done: float) -> None:
        now, finished = time.monotonic(), done >= self.total
        terminal = sys.stderr.isatty()
        if now - self.began < 1 or (now - self.shown < (0.5 if terminal else 10) and not finished):
            return
        self.shown, speed = now, done / (now - self.began)
        line = f"{self.what}: {done:.0f} of {self.total:.0f} {self.unit}, {speed:.1f} {self.unit}/s"
        line += ", done" if finished else f", {(self.total - done) / speed:.0f} s left"
        start, end = ("\r", "\x1b[K") if terminal else ("", "\n")
        print(start + line, end="\n" if finished else end, file=sys.stderr, flush=True)
