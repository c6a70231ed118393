"""SIGTERM and Ctrl-C while a run trains."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from typing import NoReturn

from ddpm_jax import processes
from ddpm_jax.files import console

GRACE_SECONDS = 2.0  # time for the main thread to leave by itself


def _when_saved() -> str:
    if processes.count() == 1:
        return "saving after the running step"
    return f"all processes save after the same step, within about {processes.AGREE_SECONDS} s or one step"


class Signals:
    """SIGTERM and Ctrl-C while a run trains, as a context.

    Before the first step is done there is nothing to save, and a signal raises SystemExit or KeyboardInterrupt at
    once. After it, the first signal asks the loop to save and exit; a second Ctrl-C raises KeyboardInterrupt.

    Python runs no signal handler while the main thread waits for a compilation or a step, which may never end. So a
    second thread receives each signal too. It prints what happens next; and after SIGTERM before the first step, or a
    second Ctrl-C, it ends the process if the main thread does not exit by itself.

    Signals can be caught in the main thread only; in other threads, as in some notebooks, none is caught.

    Args:
      say: prints a line.
      leave: called before the process is ended; takes the last message and returns it, extended.

    Attributes:
      begun: set by the loop when a step is done.
      caught: the signals received so far.
    """

    def __init__(self, say: Callable[[str], None], leave: Callable[[str], str]):
        self.begun = False
        self.caught: list[signal.Signals] = []
        self._say, self._leave = say, leave
        self._lines: list[str] = []  # to be printed by the second thread
        self._leaving = False
        self._awaited: threading.Event | None = None  # the process ends if it is not set in time
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
            # jax.distributed installs its own SIGTERM handler when it starts, so these are set after it.
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

    def end(self, step: int, workdir: str) -> NoReturn:
        """Ends the training after a signal, when the state is saved."""
        # Without a signal here, another process has received one.
        number = self.caught[0] if self.caught else signal.SIGTERM
        if number == signal.SIGINT and console.in_notebook():
            raise KeyboardInterrupt  # ends the cell; `train` says what is saved
        self._say(
            f"stopped by {number.name} after step {step:,}, which is saved; the same command"
            f" continues\nrun directory: {workdir}"
        )
        raise SystemExit(128 + number)

    def _hear(self) -> bool:
        """Reads the signals that have arrived, in either thread; False after the end of the context."""
        with self._lock:
            try:
                numbers = self._ear.recv(100)
            except BlockingIOError:  # the other thread has read them
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
                    more = " once more" if number == signal.SIGINT else ""
                    self._lines.append(
                        f"{number.name}: {_when_saved()}; Ctrl-C{more} aborts without saving"
                    )
                self.caught.append(number)
            return bool(numbers)

    def _handle(self, number, frame) -> None:
        """The signal handler, run in the main thread as soon as it is back in Python."""
        self._hear()
        self._mouth.send(b"\0")  # wakes the other thread, which prints the lines
        if self._leaving and not self._raised.is_set():
            self._raised.set()
            if self.caught[-1] == signal.SIGTERM:
                raise SystemExit(128 + signal.SIGTERM)
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """Runs in the second thread."""
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
