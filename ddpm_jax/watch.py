"""What each of several processes knows of the others: who has ended, and why.

Without it jax ends the others by an abort after half a minute, with a hundred lines of its own. Here each process keeps
a connection to the first one, which the system closes when a process dies. Whoever is left prints one line and ends.

Before jax 0.9.2 the line may be jax's own ("… another task died …") when the first process dies with all its children,
as in a container that is killed, or on systems other than Linux.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax
from jax._src import distributed  # the address of the first process has no public name

CONNECT_SECONDS = 30.0
HELLO_SECONDS = 5.0  # how long a connection may take to say its number
GOODBYE_SECONDS = (
    3600.0  # how long a process that is done waits for the first, which may still write
)
# How long the first process waits for the others to end before it does, and jax's connections to it last when it is killed.
LEAVE_SECONDS = 5.0
FINISH_SECONDS = 600.0  # how long this process may finish writing; jax itself may end it earlier
# A machine that vanishes closes nothing: after ten silent seconds the system asks four times, five seconds apart.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}

GOODBYE = "done"

_watch: _Watch | None = None
# What is written under this lock is finished before the process ends because another has ended.
finishing = threading.Lock()


def begin(process: int, count: int, from_first: Callable) -> None:
    """Begins to watch; all processes must call it.

    Args:
      process, count: the number of this process, and of all.
      from_first: function -> its result in the first process; see `processes.from_first`.
    """
    global _watch
    if count == 1:
        return
    listening = None
    if process == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listening = socket.create_server(("", 0), family=family, backlog=count, dualstack_ipv6=both)
    port = from_first(lambda: listening.getsockname()[1])
    peers: dict[int, socket.socket] = {}
    try:
        if listening is None:
            host = distributed.global_state.coordinator_address.rpartition(":")[0].strip("[]")
            peer = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            peer.sendall(f"{process}\n".encode())
            peers[0] = peer
        else:
            _accept(listening, count, peers)
    except OSError as error:  # jax's own watch remains
        print(f"WARNING: the processes cannot watch each other: {error}", file=sys.stderr)
        for peer in peers.values():
            _dismiss(peer)
        return
    _slow_abort()
    _watch = _Watch(process, count, peers)
    atexit.register(_watch.goodbye)  # before jax's own, which was registered earlier
    if not (hasattr(sys, "ps1") or sys.flags.interactive):  # an interactive session goes on
        sys.excepthook = functools.partial(_leave_by, sys.excepthook)
    _watch.child = _outlive() if process == 0 else None


def _leave_by(hook: Callable, kind: type[BaseException], error: BaseException, trace) -> None:
    """Ends this process by an error that nobody catches: an orderly exit would wait for the others, and they for this one.

    Nothing else runs on, such as other threads or functions of `atexit`.
    """
    try:
        hook(kind, error, trace)
        if issubclass(kind, jax.errors.JaxRuntimeError):
            wait_for_word()
    finally:
        try:
            leave(f"{kind.__name__}: {error}")
            sys.stdout.flush()
        finally:  # whatever the lines above raise, as on a full disk
            os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _slow_abort() -> None:
    """Delays the abort by which jax ends this process when the first one dies, until `_Watch` has printed its line.

    The handler of SIGABRT becomes the C library's sleep, whose argument is then the number of the signal: six seconds. An
    abort from inside still ends the process after them; SIGABRT from outside no longer does.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # as on Windows
        library = ctypes.CDLL(None)
        library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _outlive() -> subprocess.Popen | None:
    """Starts a child that keeps jax's connections for `LEAVE_SECONDS` after this first process has died. On Linux only.

    So the others hear of it here, and not from jax, which before 0.9.2 would end them at once.

    Returns:
      the child, which lasts as long as its standard input; None where it cannot start.
    """
    if not os.path.isdir("/proc/self/fd"):
        return None
    port = int(distributed.global_state.coordinator_address.rpartition(":")[2])
    code = f"import sys, time; sys.stdin.read(); time.sleep({LEAVE_SECONDS})"
    with contextlib.suppress(OSError, ValueError):
        kept = [number for number in map(int, os.listdir("/proc/self/fd")) if _port(number) == port]
        return subprocess.Popen(
            [sys.executable, "-S", "-c", code],
            stdin=subprocess.PIPE,
            pass_fds=kept,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return None


def _port(number: int) -> int | None:
    """This side's port of a connection over a network, by its file descriptor; None for what is none."""
    try:
        one = socket.socket(fileno=number)
    except OSError:
        return None
    try:
        one.getpeername()
        return None if one.family == socket.AF_UNIX else one.getsockname()[1]
    except OSError:  # it listens
        return None
    finally:
        one.detach()


def _accept(listening: socket.socket, count: int, peers: dict[int, socket.socket]) -> None:
    """Adds the connections of the other processes, by their numbers. Others, as of a port scanner, are dismissed.

    Raises:
      OSError: some process did not come in time.
    """
    end = time.monotonic() + CONNECT_SECONDS
    with listening:
        while len(peers) < count - 1:
            listening.settimeout(max(0.01, end - time.monotonic()))
            peer, _ = listening.accept()
            peer.settimeout(HELLO_SECONDS)
            said = b""
            with contextlib.suppress(OSError):
                while not said.endswith(b"\n") and len(said) < 20:
                    said += peer.recv(1) or b"?\n"
            number = int(said) if said.strip().isdigit() else 0
            if 0 < number < count and number not in peers:
                peers[number] = peer
            else:
                _dismiss(peer)


def _dismiss(peer: socket.socket) -> None:
    """Ends a connection; a process at the other end no longer watches this one."""
    with contextlib.suppress(OSError), peer:
        peer.sendall(f"{GOODBYE}\n".encode())


def leave(line: str) -> None:
    """Tells the other processes why this one ends."""
    if _watch is not None:
        _watch.leave(line)


def wait_for_word(seconds: float = 10.0) -> None:
    """Waits for the line about another process that has ended, which then ends this one.

    To be called after an error that may come from a connection to it.
    """
    if _watch is not None:
        time.sleep(seconds)


class _Watch:
    """The connections of this process: of the first one to all others, of the others to the first one."""

    def __init__(self, process: int, count: int, peers: dict[int, socket.socket]):
        self._process, self._count, self._peers = process, count, peers
        self._rest = {number: b"" for number in peers}  # the begin of a message
        self._all_done = threading.Event()
        self._leaving = False  # this process has said why it ends
        self.child: subprocess.Popen | None = None  # see `_outlive`
        for peer in peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEP_ALIVE.items():
                with contextlib.suppress(AttributeError, OSError):  # other systems
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
        self._all_done.set()

    def _hear(self, number: int) -> bool:
        """Reads what a process says; False if it says no more."""
        try:
            content = self._peers[number].recv(65536)
        except OSError:
            content = b""
        *lines, self._rest[number] = (self._rest[number] + content).split(b"\n")
        for line in lines:
            if (said := line.decode(errors="replace")) == GOODBYE:
                return False
            self._end(said)
        if not content:
            self._end(f"{self._name(number)} without a word: it was killed, or its machine is gone")
        return bool(content)

    def _name(self, number: int) -> str:
        return f"process {number} of {self._count} has ended"

    def _end(self, line: str) -> None:
        """Prints the line, tells the other processes, and ends this one, unless it ends already."""
        if not self._leaving:
            said = f"error: {line}; start all processes again to continue"
            self._tell(line)
            finishing.acquire(timeout=FINISH_SECONDS)
            with contextlib.suppress(OSError, ValueError):  # a full disk, or nobody reads
                print(said, file=sys.stderr, flush=True)
            self._wait_for_others()
            os._exit(1)

    def _tell(self, line: str) -> None:
        content = line.encode(errors="backslashreplace")  # names of files need not be UTF-8
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(content + b"\n")

    def leave(self, line: str) -> None:
        self._leaving = True
        self._tell(f"{self._name(self._process)}: {line}".replace("\n", " "))
        self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Lets the others end first: once the first process is gone, jax ends them, perhaps before they print the line."""
        end = time.monotonic() + LEAVE_SECONDS
        for peer in self._peers.values() if self._process == 0 else ():
            with contextlib.suppress(OSError):  # of the time, too
                peer.settimeout(max(0.01, end - time.monotonic()))
                while peer.recv(65536):
                    pass

    def goodbye(self) -> None:
        """Says that this process is done; then waits until the first one is, which may still write files."""
        self._tell(GOODBYE)
        if self._process > 0:
            self._all_done.wait(GOODBYE_SECONDS)
        elif self.child is not None:
            self.child.kill()
            self.child.wait()
