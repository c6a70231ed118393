"""Several processes that work as one program, on one machine or on many: all compute, and the first one writes.

All of them run the same command on a shared file system, and call the functions below in the same order.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from ddpm_jax import watch
from ddpm_jax.options import ConfigError, option

CONNECT_SECONDS = 60  # how long a process waits for the first one
HEARTBEAT_SECONDS = 30  # how long jax waits for a process that answers no more

AGREE_SECONDS = 10  # the time between two steps at which processes agree

Result = TypeVar("Result")


# ---- working together ------------------------------------------------------------------------------


def count() -> int:
    """The number of processes. It starts no device: a report needs none."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process writes the files."""
    return index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(np.any(gather(np.array([flag])))) if count() > 1 else flag


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(tree: Any) -> Any:
    """Arrays [N, …] of each process, with the same N, as NumPy [number of processes · N, …] in all of them."""
    return multihost_utils.process_allgather(tree, tiled=True) if count() > 1 else tree


def from_first(function: Callable[[], Result]) -> Result:
    """Runs function() in the first process, and returns its result, which JSON can hold, in all.

    An error ends the first process, and with it the others; see `watch`.
    """
    if count() == 1:
        return function()
    text = json.dumps(function()).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text.ljust(size, b" "), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())


class Agreement:
    """What any of several processes wishes, agreed on at steps that all of them know.

    These steps are at most `AGREE_SECONDS` apart, or one step if a step takes longer; all processes choose them together.

    Args:
      step: the number of steps that are done.
    """

    def __init__(self, step: int):
        self._step, self._next, self._time = step, step + 1, time.monotonic()

    def __call__(self, step: int, done: Any, *wishes: bool) -> list[bool]:
        """For each wish, whether a process has it; to be called after each step. False between the agreed steps.

        Args:
          done: what the step computes; waited for where processes agree, since the time between is measured.
        """
        if count() == 1:
            return list(wishes)
        if step < self._next:
            return [False] * len(wishes)
        jax.block_until_ready(done)
        steps, seconds = step - self._step, time.monotonic() - self._time
        fits = int(steps * AGREE_SECONDS / max(seconds, 1e-3))
        row = np.array([[max(1, min(fits, 2 * steps)), *wishes]], np.int32)
        rows = gather(row)
        self._step, self._next, self._time = step, step + int(rows[:, 0].min()), time.monotonic()
        return [bool(wished) for wished in rows[:, 1:].any(axis=0)]


# ---- joining ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others."""

    distributed: bool = option(
        False,
        "This process is one of several that work together. Cloud TPU, SLURM, Open MPI and Kubernetes are detected;"
        " elsewhere give --coordinator, --num_processes and --process_id.",
    )
    coordinator: str | None = option(
        None, "HOST:PORT of the process with --process_id=0, a free port that the others reach."
    )
    num_processes: int | None = option(None, "The number of processes.", least=1)
    process_id: int | None = option(
        None,
        "The number of this process, from 0; the same command otherwise on each machine.",
        least=0,
    )

    def join(self) -> None:
        """Connects this process with the others, if there are any; to be called before jax uses a device.

        Raises:
          ConfigError: flags that are missing or contradict each other, no cluster, or no answer; one line.
        """
        given = {
            name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")
        }
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < 3:
            raise ConfigError(
                f"--{missing[0]} is missing: --coordinator, --num_processes and --process_id belong together"
            )
        if not missing:
            self._connect(*given.values())
        elif self.distributed:
            self._initialize()

    def _connect(self, coordinator: str, num_processes: int, process_id: int) -> None:
        if process_id >= num_processes:
            raise ConfigError(
                f"--process_id={process_id} must be below --num_processes={num_processes}"
            )
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(
                f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.1:1234"
            )
        if process_id > 0:
            wait_for(host, int(port))
        self._initialize(coordinator, num_processes, process_id)

    def _initialize(self, *where) -> None:
        alarm = threading.Timer(CONNECT_SECONDS, _give_up)  # before jax, which would abort
        alarm.daemon = True
        alarm.start()
        try:
            jax.distributed.initialize(
                *where,
                local_device_ids=_local_device_ids(),
                initialization_timeout=2 * CONNECT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            line = " ".join(str(error).split())[:300]
            if where:
                what = (
                    f"the processes did not connect ({line}); start all within {CONNECT_SECONDS} s"
                )
            else:
                what = f"no cluster was found ({line}); give --coordinator, --num_processes and --process_id"
            raise ConfigError(what) from error
        finally:
            alarm.cancel()
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, signal.SIG_DFL
            )  # jax has caught it; training catches it again
        _connect_devices()
        watch.begin(jax.process_index(), count(), from_first)
        if not is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the lines of the first process are enough


def _local_device_ids() -> list[int] | None:
    """For jax.distributed: an empty list for all devices of the machine, None for what jax detects.

    In SLURM and Open MPI jax gives each process a single GPU, also to one that is alone on its machine.
    """
    names = (
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "SLURM_STEP_TASKS_PER_NODE",
    )  # mpirun runs inside a step of SLURM
    names += ("SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    tasks = next((os.environ[name] for name in names if name in os.environ), "")  # such as 1(x2)
    alone = re.fullmatch(r"1(\(x\d+\))?", tasks) and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    return [] if alone else None


def _give_up() -> None:
    line = f"error: the other processes did not come; start all of them within {CONNECT_SECONDS} s"
    print(line, file=sys.stderr, flush=True)
    os._exit(2)


def _connect_devices() -> None:
    """Connects the devices of all processes now, when all are here.

    On CPUs, a process whose first step is compiled half a minute before that of another would give up, and the library
    that connects them, Gloo, prints to standard output, where it would disturb --json.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",))
    ones = np.ones(jax.local_device_count(), np.float32)
    output = os.dup(1)
    try:
        os.dup2(2, 1)
        ones = multihost_utils.host_local_array_to_global_array(ones, mesh, PartitionSpec("all"))
        jax.block_until_ready(jax.jit(jnp.sum)(ones))
        gather(np.ones(1))
        from_first(lambda: None)
    finally:
        os.dup2(output, 1)
        os.close(output)


def wait_for(host: str, port: int) -> None:
    """Waits until the first process listens; jax itself would end this process without a word.

    Raises:
      ConfigError: it did not within `CONNECT_SECONDS`.
    """
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=5).close()  # [::1]
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"no process answers at --coordinator={host}:{port} ({error.strerror or error}): start the one with"
                    " --process_id=0 there, and check the address and the firewall"
                ) from error
            time.sleep(0.5)
