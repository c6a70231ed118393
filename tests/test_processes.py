"""Several processes, started by the flags of the command line."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from ddpm_jax import main, processes
from ddpm_jax.files import runs
from ddpm_jax.options import ConfigError
from ddpm_jax.processes import Processes


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


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


def test_numbers_below_zero_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.main(["--config=configs/digits.py:smoke", "--process_id=-1", f"--workdir={tmp_path}"])
    assert "--process_id must be at least 0" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_by_flags(tmp_path):
    """Both end well, and the run is saved once."""
    flags = ["training.num_steps=4", "training.log_every=2", "training.checkpoint_every=4"]
    flags += ["training.batch_size=8", "preview.every=4", "preview.steps=2"]
    line = [sys.executable, "-m", "ddpm_jax.main", "--config=configs/digits.py:smoke", "--json"]
    line += [f"--workdir={tmp_path / 'run'}", f"--coordinator=localhost:{free_port()}"]
    line += ["--num_processes=2", *(f"--config.{flag}" for flag in flags)]
    env = {**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2"}
    both = [
        subprocess.Popen([*line, f"--process_id={i}"], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=280)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    assert runs.load(str(tmp_path / "run")).step == 4
    lines = [line for line in outputs[0].splitlines() if not line.startswith("[Gloo]")]
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if row["event"] == "row"] == [2, 4]
