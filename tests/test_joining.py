"""How processes find each other, watch each other and agree; what two of them compute is in test_processes.py."""

import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_processes import finish, free_port, python

from ddpm_jax import main, processes, watch
from ddpm_jax.files import results
from ddpm_jax.options import ConfigError
from ddpm_jax.processes import Processes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "localhost:1234"}, "--num_processes is missing: .* belong together"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator is missing"),
        ({"coordinator": "localhost", "num_processes": 2, "process_id": 1}, "must be HOST:PORT"),
        ({"coordinator": "a:b:c", "num_processes": 2, "process_id": 1}, "must be HOST:PORT"),
        ({"coordinator": "a:99999", "num_processes": 2, "process_id": 1}, "must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "must be below"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(ConfigError, match=message):
        Processes(**flags).join()


def test_a_first_process_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(processes, "CONNECT_SECONDS", 1)
    port, begin = free_port(), time.monotonic()
    chosen = Processes(coordinator=f"localhost:{port}", num_processes=2, process_id=1)
    with pytest.raises(ConfigError, match=f"no process answers at --coordinator=localhost:{port}"):
        chosen.join()
    assert time.monotonic() - begin < 10


def test_other_processes_that_do_not_come():
    code = f"""if True:
        from ddpm_jax import processes
        processes.CONNECT_SECONDS = 1
        processes.Processes(
            coordinator="localhost:{free_port()}", num_processes=2, process_id=0
        ).join()
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: the other processes did not come")


def test_numbers_below_zero_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(["--config=configs/digits.py:smoke", "--process_id=-1", f"--workdir={tmp_path}"])
    assert "--process_id must be at least 0" in capsys.readouterr().err


def test_writing_a_file_starts_no_device(tmp_path):
    """A report is written while a training holds the memory of the devices."""
    code = f"""if True:
        from ddpm_jax.files import writers
        from jax._src import xla_bridge
        writers.save_text(r"{tmp_path / "x"}", "x")
        assert not xla_bridge.backends_are_initialized()
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert (tmp_path / "x").read_text() == "x"


@pytest.mark.parametrize("tasks, gpus", [("1(x2)", "all"), ("2", "0")])
def test_slurm_is_detected(tasks, gpus):
    """Its variables alone connect two processes, which then share a value of the first."""
    code = """if True:
        from jax._src import xla_bridge
        from ddpm_jax import processes
        processes.Processes(distributed=True).join()
        found = processes.from_first(lambda: f"of {processes.index()}")
        print(processes.count(), found, xla_bridge.CUDA_VISIBLE_DEVICES.value)
    """
    job = {"SLURM_JOB_ID": f"{os.getpid()}", "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": tasks}
    both = [python("-c", code, **job, SLURM_PROCID=f"{i}") for i in range(2)]
    statuses, outputs, errors = finish(both)
    assert statuses == [0, 0], errors
    assert outputs == (f"2 of 0 {gpus}\n", "")  # only the first prints


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x16)"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NTASKS_PER_NODE": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        ({"SLURM_NTASKS_PER_NODE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
    ],
)
def test_the_only_process_of_a_machine_has_all_its_devices(monkeypatch, variables, expected):
    """Otherwise jax gives each one GPU."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_LOCAL")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes._local_device_ids() == expected


def test_an_address_of_ipv6(monkeypatch):
    monkeypatch.setattr(processes, "CONNECT_SECONDS", 0.1)
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        processes.wait_for("[::1]", server.getsockname()[1])


def test_strangers_do_not_end_the_watch(monkeypatch):
    """Connections that say nothing, or anything but the number of a process, are dismissed."""
    monkeypatch.setattr(watch, "HELLO_SECONDS", 0.2)
    with socket.create_server(("localhost", 0)) as listening:
        port, peers = listening.getsockname()[1], {}
        said = [b"", b"GET / HTTP/1.1\r\n", b"x" * 99, b"3\n", b"-1\n", b"1\n", b"1\n", b"2\n"]
        clients = [socket.create_connection(("localhost", port)) for _ in said]
        for client, words in zip(clients, said, strict=True):
            client.sendall(words)
        watch._accept(listening, 3, peers)
    assert {n: peer.getpeername() for n, peer in peers.items()} == {
        1: clients[5].getsockname(),
        2: clients[7].getsockname(),
    }
    for end in (*clients, *peers.values()):
        end.close()


def test_what_is_being_written_is_finished_before_the_end(monkeypatch, capsys):
    """The first machine that a preemption takes must not cost the checkpoint that the leader writes."""
    monkeypatch.setattr(watch, "finishing", threading.Lock())
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    one = watch._Watch(0, 2, {})
    with watch.finishing:
        thread = threading.Thread(target=one._end, args=("process 1 of 2 has ended",))
        thread.start()
        assert not ended.wait(0.3)
    thread.join()
    assert ended.is_set() and "process 1 of 2 has ended; start all" in capsys.readouterr().err


def test_a_line_that_cannot_be_printed_delays_no_end(monkeypatch):
    """Its log is on a full disk."""

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(watch, "finishing", threading.Lock())
    watch._Watch(0, 2, {})._end("process 1 of 2 has ended")
    assert ended == [1]


def test_a_process_that_cannot_be_watched_ends_no_other(monkeypatch, capsys):
    """The first process waits for two, and only one comes, which then watches no more."""
    monkeypatch.setattr(watch, "CONNECT_SECONDS", 0.5)
    clients = []

    def port_of(function):
        clients.append(socket.create_connection(("localhost", function())))
        clients[0].sendall(b"1\n")
        return function()

    watch.begin(0, 3, port_of)
    assert "WARNING: the processes cannot watch each other" in capsys.readouterr().err
    with clients[0] as client:
        client.settimeout(5)
        assert client.recv(99) == f"{watch.GOODBYE}\n".encode()


def test_the_folder_of_unfinished_results_stays_until_all_have_read_it(tmp_path, monkeypatch):
    """A process that no longer finds it computes everything again, alone."""
    there = []
    folder = tmp_path / "x.npz.partial"
    monkeypatch.setattr(processes, "barrier", lambda name: there.append(folder.exists()))
    with results.in_progress(str(tmp_path / "x.npz"), {}):
        pass
    assert there == [True] and not folder.exists()


@pytest.mark.parametrize("seconds", [0.003, 1.7, 30.0])
def test_processes_agree_often_enough(monkeypatch, seconds):
    """At steps that all choose together: the other process would let three times as many pass."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda row: np.concatenate([row, row * [3, 1, 0]]))
    agreement, begun, longest, agreed = processes.Agreement(100), 0.0, 0.0, 0
    for step in range(101, 101 + int(600 / seconds)):
        clock[0] += seconds
        found = agreement(step, None, True, False)
        assert found in ([True, False], [False, False])
        if found[0]:
            longest, begun, agreed = max(longest, clock[0] - begun), clock[0], agreed + 1
    assert longest <= max(processes.AGREE_SECONDS, seconds) + 1e-6
    assert agreed <= 100  # and not more often than needed


def test_one_process_agrees_with_itself():
    assert processes.Agreement(0)(1, None, True, False) == [True, False]
