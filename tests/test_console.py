"""What a terminal, a file and a program see: one rewritten line, plain lines, JSON lines."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from typing import NamedTuple

import numpy as np
import pytest
from test_main import command  # noqa: F401  a fixture
from test_train import make_config

from ddpm_jax.files import console, writers
from ddpm_jax.files.progress import Progress
from ddpm_jax.training import loop

HERE = os.path.dirname(os.path.abspath(__file__))


class Terminal:
    """A stream that says that it is a terminal, and the lines that one would show."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True

    def lines(self):
        return shown(self.text)


def shown(text):
    """The lines of a screen after a text: \\r returns to the beginning of the line, and what follows overwrites it."""
    rows, column = [""], 0
    for character in text:
        if character == "\n":
            rows.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            rows[-1] = rows[-1][:column] + character + rows[-1][column + 1 :]
            column += 1
    return [row.rstrip() for row in rows]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "_bar", "")
    return Terminal()


def count_to(total, stream, monkeypatch, between=lambda done: None):
    clock = [0.0]
    monkeypatch.setattr(sys, "stdout", stream)  # here: pytest replaces it after the fixtures
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    progress = Progress("image", total, 0, unit="images")
    for done in range(1, total + 1):
        clock[0] += 1.0
        progress.done = done
        progress.show(f"loss {done}")
        between(done)


def test_a_terminal_shows_one_line_that_stays_at_the_end(terminal, monkeypatch):
    count_to(12, terminal, monkeypatch)
    lines = terminal.lines()
    assert len(lines) == 2 and lines[1] == ""
    assert lines[0].startswith("[####################] image 12/12  100 %  loss 12")
    assert terminal.text.count("\n") == 1


@pytest.mark.parametrize("columns", [10, 40, 60, 200])
def test_no_line_is_wider_than_the_terminal(terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    count_to(12, terminal, monkeypatch)
    pieces = re.split(r"[\r\n]", terminal.text)
    assert max(map(len, pieces)) <= columns - 1
    assert columns < 200 or max(map(len, pieces)) > 60


def test_other_lines_stand_above_the_bar(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", console.Heedless(terminal))

    def between(done):
        if done == 3:
            print("a warning")  # shorter than the bar
        if done == 6:
            print("an error", file=sys.stderr)

    count_to(9, console.Heedless(terminal), monkeypatch, between)
    lines = terminal.lines()
    assert lines[:2] == ["a warning", "an error"] and "image 9/9" in lines[2] and lines[3:] == [""]


def test_a_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    count_to(12, terminal, monkeypatch)
    assert "\r" not in terminal.text and len(terminal.lines()) == 5  # at 1, 6, 11 and 12 s
    assert terminal.lines()[0].startswith("image 1/12  8 %  loss 1")


def test_a_notebook_gets_one_line(monkeypatch, terminal):
    class OutStream(Terminal):
        def isatty(self):
            return False

    OutStream.__module__ = "ipykernel.iostream"
    stream = OutStream()
    count_to(5, stream, monkeypatch)
    assert len(stream.lines()) == 2 and "\x1b" not in stream.text


@pytest.mark.parametrize("stream", [None, "closed"])
def test_no_stream_is_no_terminal(monkeypatch, stream):
    if stream:
        stream = io.StringIO()
        stream.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        live = console.is_live()
    assert not live


def test_training_on_a_terminal_has_one_line_and_all_of_them_in_the_log(terminal, tmp_path):
    with contextlib.redirect_stdout(terminal):
        loop.train(make_config(num_steps=8), tmp_path)
    rows = [line for line in terminal.lines() if re.search(r"step \d/8", line)]
    assert len(rows) == 1 and "] step 8/8" in rows[0]
    log = (tmp_path / "log.txt").read_text()
    assert [int(n) for n in re.findall(r"step (\d)/8", log)] == [2, 4, 6, 8]
    assert "\r" not in log and "####" not in log


@pytest.mark.slow
def test_a_real_terminal(tmp_path):
    """A training in a pseudo-terminal of 50 columns."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_train\n"
        "test_train.loop.train(test_train.make_config(num_steps=60), sys.argv[3])"
    )
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    output = bytearray()

    def read():
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(leader, 4096):
                output.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    words = [sys.executable, "-c", code, HERE, os.path.dirname(HERE), str(tmp_path)]
    process = subprocess.Popen(
        words, stdout=follower, stderr=subprocess.PIPE, env=environment | {"TERM": "xterm"}
    )
    _, errors = process.communicate(timeout=120)
    os.close(follower)
    thread.join(timeout=10)
    os.close(leader)
    assert process.returncode == 0, errors
    lines = output.decode().replace("\r\n", "\n").split("\n")
    bars = [piece for line in lines for piece in line.split("\r") if piece.startswith("[")]
    assert bars and max(map(len, bars)) <= 49
    assert sum("step 60/60" in line for line in lines) == 1


# ---- JSON lines ------------------------------------------------------------------------------------


def run_json(command, *arguments):  # noqa: F811
    status, out, err = command(*arguments, "--json")
    return status, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture(autouse=True)
def reset():
    yield
    console.json_lines(None)


def test_a_mistake_is_a_line_of_json_with_the_same_status(command):  # noqa: F811
    arguments = ("--config=configs/digits.py:smoke", "--config.optimzer.name=adam")
    plain_status, _, plain = command(*arguments)
    status, (line,), err = run_json(command, *arguments)
    assert status == plain_status == 2 and err == plain
    assert line["event"] == "error" and line["status"] == 2
    assert f"error: {line['error']}" == plain[0]
    status, (line,), _ = run_json(command, "--mode=smaple")
    assert status == 2 and "did you mean 'sample'" in line["error"]


def test_an_error_of_the_program_is_a_line_too(command, monkeypatch, capfd):  # noqa: F811
    from ddpm_jax import modes

    def report(workdir):
        """Fails."""
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("ddpm_jax.main.foreign_frames", lambda error: [])  # as if it were ours
    monkeypatch.setitem(modes.COMMANDS, "report", report)
    with pytest.raises(ZeroDivisionError):
        run_json(command, "--mode=report", "--workdir=x")
    line = json.loads(capfd.readouterr().out)
    assert line == {"event": "error", "error": "ZeroDivisionError: by zero", "status": 1}


def test_training_prints_its_rows_and_its_result(command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("ddpm_jax.files.config.from_file", lambda name: make_config().lock())
    workdir = tmp_path / "run"
    arguments = "--config=x.py", f"--workdir={workdir}"
    status, lines, err = run_json(command, *arguments)
    assert status == 0
    assert [line["event"] for line in lines] == ["row", "row", "row", "result"]
    assert [line["step"] for line in lines[:-1]] == [2, 4, 6]
    written = writers.read_metrics(str(workdir / "metrics.jsonl"))
    assert [{"event": "row", **row} for row in written] == lines[:-1]
    result = lines[-1]
    assert result["mode"] == "train" and result["result"] == {"workdir": str(workdir), "step": 6}
    assert str(workdir / "samples" / "step_00000006.png") in result["files"]
    assert any("step 6/6" in line for line in err)  # lines for people, on the other stream

    status, lines, _ = run_json(
        command, "--mode=sample", f"--workdir={workdir}", "--allow_code", "--num_samples=5"
    )
    assert status == 0 and {line["event"] for line in lines} == {"progress", "result"}
    assert lines[0]["total"] == 5 and lines[-2]["done"] == 5
    out = lines[-1]["result"]
    assert out.endswith(".npz") and {out, f"{out[:-4]}.png"} <= set(lines[-1]["files"])
    assert all(os.path.exists(path) for path in lines[-1]["files"])


def test_help_is_for_people(command):  # noqa: F811
    status, out, _ = command("--mode=sample", "--help", "--json")
    assert status == 0 and "--num_samples" in out and not out.startswith("{")


def test_numbers_that_are_not_finite_and_arrays_are_json(capsys):
    class Pair(NamedTuple):
        one: int
        two: object

    class Bound(NamedTuple):
        terms: object

        def summary(self):
            return {"total": np.float64(self.terms.sum())}

    console.json_lines(sys.stdout)
    values = {"a": float("nan"), "b": np.arange(2), "c": {3: (np.float32(0.5), float("inf"))}}
    console.emit(
        "result", **values, d=Pair(1, None), e=Bound(np.ones(3)), f=[True, ValueError("x")]
    )
    line = json.loads(capsys.readouterr().out)
    assert line == {
        **{"event": "result", "a": None, "b": [0, 1], "c": {"3": [0.5, None]}},
        **{"d": {"one": 1, "two": None}, "e": {"total": 3.0}, "f": [True, "x"]},
    }
