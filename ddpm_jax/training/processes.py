"""Several processes that train together, on one machine or on many."""

from __future__ import annotations

import dataclasses
import socket
import time

import jax

from ddpm_jax.options import ConfigError, option

CONNECT_SECONDS = 60  # how long a process waits for the first one
HEARTBEAT_SECONDS = 30  # how long the others wait for a process that no longer answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others."""

    distributed: bool = option(
        False,
        "This process is one of several that train together. Cloud TPU, SLURM, Open MPI and Kubernetes are detected; elsewhere"
        " give --coordinator, --num_processes and --process_id.",
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
        try:
            jax.distributed.initialize(
                *where,
                initialization_timeout=CONNECT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            line = " ".join(str(error).split())[:300]
            what = "the other processes did not come" if where else "no cluster was found"
            raise ConfigError(
                f"{what} ({line}); start all processes within {CONNECT_SECONDS} s, and see --help for --coordinator"
            ) from error


def wait_for(host: str, port: int) -> None:
    """Waits until the first process listens; jax itself would end this process without a word.

    Raises:
      ConfigError: it did not within `CONNECT_SECONDS`.
    """
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"no process answers at --coordinator={host}:{port} ({error.strerror or error}): start the one with"
                    " --process_id=0 there, and check the address and the firewall"
                ) from error
            time.sleep(0.5)
