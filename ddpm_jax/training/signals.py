"""SIGTERM and Ctrl-C while a run trains."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable

GRACE_SECONDS = 2.0  # time for the main thread to leave by itself


class Signals:
    """SIGTERM and Ctrl-C while a run trains, as a context.

    Until a step is done there is nothing to save, and a signal raises SystemExit or KeyboardInterrupt at once.
    From then on the first asks the loop to save and leave; a second Ctrl-C raises KeyboardInterrupt.

    Python runs no handler while the main thread waits inside a compilation or a step, which may never end. So a
    thread of its own hears of each signal too. It tells the user what happens now; and after SIGTERM before the
    first step, or a second Ctrl-C, it ends the process if the main thread does not leave by itself.

    Only a main thread can catch signals; elsewhere, as in some notebooks, nothing is caught.

    Args:
      say: for what happens now.
      leave: what to do before the process ends; takes and returns the last words.

    Attributes:
      begun: to be set when a step is done.
      caught: the signals so far.
    """

    def __init__(self, say: Callable[[str], None], leave: Callable[[str], str]):
        self.begun = False
        self.caught: list[signal.Signals] = []
        self._say, self._leave = say, leave
        self._lines: list[str] = []  # to be said
        self._leaving = False
        self._awaited: threading.Event | None = None  # or the process ends
        self._raised, self._done = threading.Event(), threading.Event()
        self._lock = threading.RLock()

    def __enter__(self) -> Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._ear, self._mouth = socket.socketpair()
            self._ear.setblocking(False)
            self._mouth.setblocking(False)
            # Python writes the number of each signal there at once, whatever the main thread does.
            self._fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            # jax.distributed takes SIGTERM for itself when it starts: handlers are set after it, here.
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._fd)
            self._done.set()
            self._mouth.close()
            self._thread.join()
            self._ear.close()

    def _hear(self) -> bool:
        """Takes in signals that have arrived, in either thread; False once there can be no more."""
        with self._lock:
            try:
                numbers = self._ear.recv(100)
            except BlockingIOError:  # the other thread has taken them
                return True
            for number in numbers:
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                number = signal.Signals(number)
                again = number == signal.SIGINT and bool(self.caught)
                self._leaving |= again or not self.begun
                if again or (number == signal.SIGTERM and self._leaving):
                    self._awaited = self._done if self._raised.is_set() else self._raised
                if again:
                    self._lines.append("Ctrl-C again: leaving without saving")
                elif self._leaving:
                    self._lines.append(
                        f"{number.name}: leaving; Ctrl-C again ends the program at once"
                    )
                elif not self.caught:
                    self._lines.append(
                        f"{number.name}: saving after the running step; Ctrl-C"
                        f"{' once more' if number == signal.SIGINT else ''} aborts without saving"
                    )
                self.caught.append(number)
            return bool(numbers)

    def _handle(self, number, frame) -> None:
        """In the main thread, as soon as it is back in Python."""
        self._hear()
        self._mouth.send(b"\0")  # the other thread has something to say
        if self._leaving and not self._raised.is_set():
            self._raised.set()
            if self.caught[-1] == signal.SIGTERM:
                raise SystemExit(128 + signal.SIGTERM)
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """In a thread of its own."""
        while True:
            select.select([self._ear], [], [])
            if not self._hear():
                return
            while self._lines:
                self._say(self._lines.pop(0))
            awaited, self._awaited = self._awaited, None
            if awaited is not None and not awaited.wait(GRACE_SECONDS):
                number = self.caught[-1]
                self._say(self._leave(f"stopped by {number.name}"))
                os._exit(128 + number)
