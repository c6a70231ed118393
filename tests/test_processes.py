"""Two processes of two devices each, started by the flags of the command line."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ddpm_jax import main
from ddpm_jax.files import checkpoints, runs, writers


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def python(*arguments, **variables):
    """A process of Python with these variables of its environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(*argv, count=2, devices=2):
    """The same command line in each of several processes."""
    line = ["-m", "ddpm_jax.main", *argv]
    line += [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={devices}")
    variables = {"XLA_FLAGS": flags, "PYTHONPATH": os.path.dirname(__file__)}
    return [python(*line, f"--process_id={i}", **variables) for i in range(count)]


def finish(started):
    """The exit statuses, and what was written to standard output and to standard error."""
    try:
        texts = [process.communicate(timeout=280) for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            process.kill()
        raise AssertionError([process.communicate() for process in started]) from None
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], *zip(*texts, strict=True)


def train_flags(workdir, num_steps):
    fields = {"training.num_steps": num_steps, "training.batch_size": 8, "training.log_every": 2}
    fields |= {"training.checkpoint_every": 4, "preview.every": 100, "preview.steps": 2}
    fields |= {"model.channels": 8, "model.num_groups": 2, "model.attention_resolutions": ""}
    flags = (f"--config.{name}={value}" for name, value in fields.items())
    return ["--config=configs/digits.py:smoke", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps by two processes, which then makes two more."""
    workdir = tmp_path_factory.mktemp("processes") / "run"
    rows = []
    for num_steps in (4, 6):
        statuses, (output, silent), _ = finish(start(*train_flags(workdir, num_steps), "--json"))
        assert statuses == [0, 0] and not silent.strip()
        rows += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [row["step"] for row in rows if row["event"] == "row"] == [2, 4, 6]
    return workdir


def losses(workdir):
    return [row["loss"] for row in writers.read_metrics(str(workdir / "metrics.jsonl"))]


@pytest.mark.slow
def test_two_processes_train_what_one_does(trained, tmp_path):
    """Resumed, too, and saved once; 2e-6 is six units in the last place."""
    main.main(train_flags(tmp_path / "one", 6))
    np.testing.assert_allclose(losses(trained), losses(tmp_path / "one"), rtol=7e-7)
    run, one = runs.load(str(trained)), runs.load(str(tmp_path / "one"))
    assert run.step == 6
    for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, flags",
    [
        ("sample", ["--num_samples=70", "--steps=2", "--png"]),
        ("encode", ["--num_images=70", "--steps=2"]),
        ("nll", ["--num_images=70", "--steps=4"]),
        (
            "eval",
            ["--features=process_features:x", "--metrics=fid", "--num_samples=70", "--steps=2"],
        ),
    ],
)
def test_commands_of_two_processes_give_what_one_gives(trained, tmp_path, mode, flags, monkeypatch):
    """70 examples: two batches, the second not full. Numbers of images are equal to the last bit."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    extension, results = ("json" if mode in ("nll", "eval") else "npz"), []
    for name in ("two", "one"):
        shutil.copytree(trained, tmp_path / name)
        line = [f"--mode={mode}", f"--workdir={tmp_path / name}", *flags]
        line += [f"--out={tmp_path / name / 'samples' / f'x.{extension}'}"]
        if name == "one":
            main.main(line)
        else:
            statuses, (output, silent), _ = finish(start(*line))
            assert statuses == [0, 0] and output and not silent.strip()
        assert not list((tmp_path / name).glob("**/*.partial"))
        results.append({})
        for path in sorted((tmp_path / name).glob("**/*.npz")):
            with np.load(path) as arrays:
                results[-1] |= {(path.name, key): arrays[key] for key in arrays if key != "recipe"}
    two, one = results
    assert two.keys() == one.keys() and two
    for (name, key), values in two.items():
        rtol = 1e-12 if key.startswith("curve_") else 0  # a mean in float64, summed by batches
        np.testing.assert_allclose(values, one[name, key], rtol=rtol, atol=0, err_msg=key)
    names = [{path.name for path in tmp_path.glob(f"{name}/**/*.png")} for name in ("two", "one")]
    assert names[0] == names[1] and (mode != "sample" or "000069.png" in names[0])


@pytest.mark.slow
@pytest.mark.parametrize("killed, number", [(0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_whoever_is_left_says_so_at_once_and_the_work_goes_on(trained, tmp_path, killed, number):
    shutil.copytree(trained, tmp_path / "run")
    line = ["--mode=sample", f"--workdir={tmp_path / 'run'}", "--num_samples=100000", "--steps=50"]
    started, rows = start(*line), []
    while not rows or rows[0].stat().st_size < 64 * 68:  # the rows of the first batch
        assert all(process.poll() is None for process in started)
        rows = list((tmp_path / "run").glob("samples/*.partial/images"))
        time.sleep(0.1)
    started[killed].send_signal(number)
    begin = time.monotonic()
    statuses, _, errors = finish(started)
    assert time.monotonic() - begin < 20
    assert statuses[killed] == -number and statuses[1 - killed] == 1
    lines = [line for line in errors[1 - killed].splitlines() if line.startswith("error")]
    said = f"error: process {killed} of 2 has ended without a word"
    assert [line.startswith(said) for line in lines] == [True]
    assert "Traceback" not in errors[1 - killed]
    kept = rows[0].stat().st_size // 68
    main.main([*line[:2], f"--num_samples={kept + 1}", "--steps=50"])
    assert len(np.load(next((tmp_path / "run").glob("samples/*.npz")))["images"]) == kept + 1


@pytest.mark.slow
@pytest.mark.parametrize("word", ["", "the disk is full"])
def test_the_line_is_said_also_by_a_slow_process(word):
    """It hears of the end two seconds later than jax's own threads, as may happen on a busy machine."""
    code = f"""if True:
        import os, signal, sys, time
        from ddpm_jax import processes, watch
        end = watch._Watch._end
        watch._Watch._end = lambda self, line: (time.sleep(2), end(self, line))
        number = int(sys.argv[1])
        processes.Processes(coordinator="localhost:{free_port()}", num_processes=2, process_id=number).join()
        if number == 0:
            if {word!r}:
                watch.leave({word!r})
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """
    statuses, _, errors = finish([python("-c", code, i) for i in range(2)])
    assert statuses == [-signal.SIGKILL, 1], errors
    said = f"error: process 0 of 2 has ended{f': {word}' if word else ' without a word'}"
    assert errors[1].splitlines()[-1].startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_an_error_that_nobody_catches_ends_all(number):
    """In a program of one's own, with text that is not UTF-8, its output on a full disk; an orderly exit would wait."""
    code = f"""if True:
        import os, sys
        from ddpm_jax import processes
        number = int(sys.argv[1])
        processes.Processes(coordinator="localhost:{free_port()}", num_processes=2, process_id=number).join()
        class Full:
            def flush(self):
                raise OSError(28, "No space left on device")
        if number == {number}:
            sys.stdout = Full()
            raise LookupError(os.fsdecode(b"no x\\xff.png"))
        processes.barrier("never")
    """
    statuses, _, errors = finish([python("-c", code, i) for i in range(2)])
    assert statuses == [1, 1], errors
    assert "Traceback" in errors[number] and "LookupError: no x" in errors[number]
    said = f"error: process {number} of 2 has ended: LookupError: no x\\udcff.png; start all"
    assert said in errors[1 - number]


@pytest.mark.slow
def test_the_first_process_leaves_no_child_and_needs_none():
    """Its child ends with it; where none can start, the job goes on."""
    code = f"""if True:
        import sys
        from ddpm_jax import processes, watch
        number = int(sys.argv[1])
        if sys.argv[2] == "none":
            def fail(*arguments, **options):
                raise BlockingIOError(11, "Resource temporarily unavailable")
            watch.subprocess.Popen = fail
        processes.Processes(coordinator="localhost:{free_port()}", num_processes=2, process_id=number).join()
        processes.barrier("met")
        print(watch._watch.child and watch._watch.child.pid)
    """
    for how in ("child", "none"):
        statuses, (first, _), errors = finish([python("-c", code, i, how) for i in range(2)])
        assert statuses == [0, 0], errors
        if how == "none" or sys.platform != "linux":
            assert first.strip() == "None"
        else:
            assert not os.path.exists(f"/proc/{int(first)}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_to_one_of_two_is_agreed_and_all_save(trained, tmp_path, number):
    """In seconds, although the next log line is hours away."""
    shutil.copytree(trained, tmp_path / "run")
    started = start(
        *train_flags(tmp_path / "run", 10**7),
        *("--config.training.log_every=1000000", "--config.training.checkpoint_every=20"),
    )
    while not (tmp_path / "run" / "checkpoints" / "40").exists():
        assert all(process.poll() is None for process in started)
        time.sleep(0.1)
    started[number].send_signal(signal.SIGTERM)
    begin = time.monotonic()
    statuses, (output, _), errors = finish(started)
    assert time.monotonic() - begin < 40  # 10 s, on a busy machine
    assert statuses == [143, 143], errors
    said = "SIGTERM: all processes save after the same step, within about 10 s or one step; Ctrl-C"
    assert (said in output) == (number == 0)  # only the first prints
    step = runs.load(str(tmp_path / "run")).step
    assert f"stopped by SIGTERM after step {step:,}, which is saved" in output


@pytest.mark.slow
def test_the_best_checkpoint_of_two_processes(tmp_path):
    """It stays, is named, and both processes load it."""
    keep = ["--config.training.keep=1", "--config.training.keep_best=-learning_rate"]
    keep += ["--config.optimizer.warmup_steps=4", "--config.optimizer.decay=cosine"]
    flags = [*train_flags(tmp_path / "run", 12), *keep]
    statuses, (output, silent), errors = finish(start(*flags))
    assert statuses == [0, 0] and not silent.strip(), errors
    directory = tmp_path / "run" / "checkpoints"
    best, value = checkpoints.best_of(directory, "-learning_rate")
    assert sorted(os.listdir(directory)) == ["12", f"{best}"]
    assert f"step {best} is the best checkpoint so far: learning_rate {value:.6g}" in output
    line = ["--mode=sample", f"--workdir={tmp_path / 'run'}", "--num_samples=2", "--steps=2"]
    statuses, (output, _), errors = finish(start(*line, "--checkpoint=best"))
    assert statuses == [0, 0] and f"step_{best:08d}" in output, errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(tmp_path, number):
    """And one that only the first process finds changed is written again by it; nobody waits for ever."""
    code = f"""if True:
        import sys, numpy as np
        from ddpm_jax import processes
        from ddpm_jax.files import checkpoints
        number = int(sys.argv[1])
        processes.Processes(coordinator="localhost:{free_port()}", num_processes=2, process_id=number).join()
        state = lambda step: {{"step": np.int32(step), "x": np.full(3, step, np.float32)}}
        for step in (1, 2, 3):
            checkpoints.save("{tmp_path}", state(step), step=step)
        files = checkpoints._sha256_files
        def damaged(path):
            return {{}} if path.name == "3" else files(path)
        if number == {number}:
            checkpoints._sha256_files = damaged
        found, step = checkpoints.restore("{tmp_path}", state(0))
        assert step == 2 and (found["x"] == 2).all(), step
        checkpoints.save("{tmp_path}", state(3), step=3)
    """
    statuses, _, errors = finish([python("-c", code, i) for i in range(2)])
    assert statuses == [0, 0], errors
    assert "3 is damaged and passed over: another process could not" in errors[1 - number]
    expected = ["1", "2", "3"] + (["3.damaged"] if number == 0 else [])
    assert sorted(os.listdir(tmp_path)) == expected


@pytest.mark.slow
def test_an_error_of_one_process_is_told_to_the_others(trained, tmp_path):
    """The .npz exists with other settings: the first process refuses it, and only it looks."""
    out = tmp_path / "x.npz"
    line = ["--mode=sample", f"--workdir={trained}", "--steps=2", f"--out={out}"]
    main.main([*line, "--num_samples=2", "--seed=1"])
    before = out.read_bytes()
    statuses, _, errors = finish(start(*line, "--num_samples=2"))
    assert statuses == [1, 1]
    assert errors[0].splitlines()[-1].startswith(f"error: {out} was made with other settings")
    assert errors[1].splitlines()[-1].startswith(f"error: process 0 of 2 has ended: {out} was made")
    assert out.read_bytes() == before
