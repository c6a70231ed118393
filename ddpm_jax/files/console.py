"""The console: lines for people, one progress bar on a terminal, and JSON lines for programs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from typing import Any

from ddpm_jax import processes

NOTEBOOK_WIDTH = 110  # characters; a notebook has no terminal that could be asked

_bar = ""  # the progress bar in the last line of the terminal; empty if there is none
_json_lines: Any = None  # the stream of JSON lines


# ---- the progress bar ------------------------------------------------------------------------------


def is_live() -> bool:
    """Whether the last line can be rewritten: on a terminal and in a notebook, not in a file or a pipe."""
    stream = sys.stdout
    with contextlib.suppress(AttributeError, ValueError):  # no stream at all, or a closed one
        terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        return terminal or in_notebook()
    return False


def in_notebook() -> bool:
    """Whether this is a cell of a notebook."""
    return type(sys.stdout).__module__.startswith("ipykernel")


def show_bar(line: str, *, last: bool = False) -> None:
    """Rewrites the last line of the terminal, never wider than the terminal.

    Args:
      last: the line stays, and what follows begins below it.
    """
    global _bar
    width = NOTEBOOK_WIDTH if in_notebook() else max(1, shutil.get_terminal_size().columns - 1)
    line, before = line[:width], _bar[:width]
    _bar = ""  # so that the write below does not erase it
    with contextlib.suppress(BrokenPipeError):
        print("\r" + line + " " * (len(before) - len(line)), end="\n" if last else "", flush=True)
    _bar = "" if last else line


def erase_bar() -> None:
    """Removes the progress bar, so that a line can be printed in its place."""
    global _bar
    if _bar:
        width, _bar = len(_bar), ""
        with contextlib.suppress(BrokenPipeError):
            print("\r" + " " * width + "\r", end="", flush=True)


def say(line: str) -> None:
    """Prints a line."""
    erase_bar()
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


# ---- JSON lines ------------------------------------------------------------------------------------


def json_lines(stream: Any) -> None:
    """Sends what `emit` gets to a stream; None to none."""
    global _json_lines
    _json_lines = stream


def emit(event: str, **values: Any) -> None:
    """Prints {"event": …, …} as a line of JSON if JSON lines are on; numbers that are not finite become null.

    Of several processes the first one does.
    """
    if _json_lines is not None and processes.is_first():
        _json_lines.write(json.dumps(_tree({"event": event, **values}), ensure_ascii=False) + "\n")
        _json_lines.flush()


def _tree(value: Any) -> Any:
    """A value as JSON has it: a dict for a NamedTuple, or what its `summary` says; lists for arrays; text for the rest."""
    if hasattr(value, "summary"):
        return _tree(value.summary())
    if hasattr(value, "_asdict"):
        return _tree(value._asdict())
    if hasattr(value, "tolist"):  # of NumPy
        return _tree(value.tolist())
    if isinstance(value, dict):
        return {str(key): _tree(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tree(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float)) or value is None else str(value)


# ---- streams and logs ------------------------------------------------------------------------------


class Heedless:
    """A stream that drops text after its reader has exited, as in `… | head`, and erases the progress bar before a text."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        if text:
            erase_bar()
        with self._heedless():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._heedless():
            self._stream.flush()

    @contextlib.contextmanager
    def _heedless(self):
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class Log:
    """A log: log("line") prints a line and, after `begin`, appends it to a file.

    Neither a closed output nor a full disk stops the program.

    Args:
      path: path of the file; None for a log that drops all lines, in processes other than the first.
    """

    def __init__(self, path: str | None):
        self._path = path
        self._waiting: list[str] | None = []  # lines for the file, until `begin`
        self._complained = False

    def begin(self) -> None:
        """Writes the earlier lines to the file, and from now on every line."""
        lines, self._waiting = self._waiting, None
        self._append("".join(lines or ()))

    def __call__(self, line: str, *, shown: bool = True) -> None:
        """Adds a line.

        Args:
          shown: print it, too.
        """
        if self._path is None:
            return
        if shown:
            say(line)
        line = time.strftime("%Y-%m-%d %H:%M:%S  ") + line + "\n"
        if self._waiting is None:
            self._append(line)
        else:
            self._waiting.append(line)

    def progress(self, progress: Any, text: str = "") -> None:
        """Shows a `Progress` as a bar on a terminal and as a line elsewhere; the file gets the line."""
        live = is_live() and self._path is not None
        if live:
            progress.show_bar(text)
        self(progress.line(text), shown=not live)

    def _append(self, text: str) -> None:
        if self._path is None:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(text)
        except FileNotFoundError:  # the run directory is gone, as after a start that failed
            pass
        except OSError as error:
            if not self._complained:
                print(f"WARNING: {self._path} cannot be written: {error}", file=sys.stderr)
            self._complained = True
