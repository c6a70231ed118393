"""Long jobs: batches that overlap, their default size, and the time left that is shown."""

import contextlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.files.progress import Progress, duration
from ddpm_jax.files.run_data import RunError
from ddpm_jax.networks import cost
from ddpm_jax.training import jobs, parallel


def square(params, key, x):
    return {"square": params * x**2, "sum": jnp.sum(x, axis=1)}


@pytest.mark.parametrize(
    "count, done, batch_size", [(37, 0, 8), (37, 30, 8), (3, 0, None), (5, 5, 4)]
)
def test_results_come_in_order_and_once(count, done, batch_size):
    data = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    progress = Progress("image", count, done, unit="images")
    found = list(
        jobs.in_batches(square, np.float32(3), None, lambda at: (data[at],), progress, batch_size)
    )
    rows = np.concatenate([np.zeros(0, int), *(rows for rows, _ in found)])
    np.testing.assert_array_equal(rows, np.arange(done, count))
    for name, values in {"square": 3 * data**2, "sum": data.sum(axis=1)}.items():
        for at, result in found:
            np.testing.assert_allclose(result[name], values[at], rtol=1e-6)
    assert progress.done == count


def test_a_batch_is_sent_before_the_one_before_is_fetched(monkeypatch):
    events = []

    class Recorded(parallel.map_examples):
        def send(self, params, key, *examples):
            events.append("send")
            return super().send(params, key, *examples)

        def fetch(self, sent):
            events.append("fetch")
            return super().fetch(sent)

    monkeypatch.setattr(parallel, "map_examples", Recorded)
    progress = Progress("image", 24, 0, unit="images")
    examples = jobs.in_batches(
        square, np.float32(1), None, lambda at: (np.ones((len(at), 2)),), progress, 8
    )
    for _ in examples:
        events.append("use")
    sent = ["send", "send", "fetch", "use", "send", "fetch", "use", "fetch", "use"]
    assert events == sent


def test_out_of_memory_is_one_line_that_names_a_smaller_batch(monkeypatch):
    class Full(parallel.map_examples):
        def fetch(self, sent):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")

    monkeypatch.setattr(parallel, "map_examples", Full)
    progress = Progress("image", 24, 0, unit="images")
    examples = jobs.in_batches(
        square, np.float32(1), None, lambda at: (np.ones((len(at), 2)),), progress, 8
    )
    with pytest.raises(RunError, match="with 8 images at a time; give --batch_size=4") as caught:
        next(examples)
    assert "\n" not in str(caught.value)


def test_live_bytes_are_those_of_the_arrays_that_are_needed_later():
    def function(x):  # 4 KiB each
        a = jnp.sin(x)
        b = jnp.cos(a)
        c = jnp.tan(b)  # a is needed below, b is not: a, b and c live
        d = jnp.exp(c)
        return a + d

    x = np.zeros(1024, np.float32)
    assert cost.live_bytes(jax.make_jaxpr(function)(x).jaxpr) == 3 * 4096

    def loop(x):
        return jax.lax.fori_loop(0, 5, lambda i, x: function(x), x)

    inside = cost.live_bytes(jax.make_jaxpr(loop)(x).jaxpr)
    assert 4 * 4096 <= inside <= 5 * 4096


@pytest.mark.parametrize("free, expected", [(1e9, 512), (1e5, 8), (10.0, 1)])
def test_the_default_batch_fills_at_most_half_of_an_accelerator(free, expected, monkeypatch):
    monkeypatch.setattr(parallel, "free_memory", lambda: free)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def function(params, key, x):
        return jnp.sin(jnp.cos(x))  # two arrays of 2 KiB for each example

    size = jobs.default_batch_size(
        function, None, None, lambda at: (np.ones((1, 512), np.float32),)
    )
    assert size == expected * jax.local_device_count()


def shown(capsys, pattern):
    """(done, seconds left) of each line of progress."""
    lines = re.findall(pattern, capsys.readouterr().out)
    seconds = {"s": 1, "m": 60, "h": 3600}
    for done, left in lines:
        parts = re.findall(r"(\d+) ?([smh])", left)
        yield int(done.replace(",", "")), sum(int(n) * seconds[unit] for n, unit in parts)


@pytest.mark.parametrize("step, aside, every", [(0.1, 0.0, 50), (0.1, 2.0, 50), (0.02, 9.0, 200)])
def test_the_time_left_of_a_training_counts_checkpoints_and_not_compiling(
    step, aside, every, monkeypatch, capsys
):
    """The clock of a training: 40 s of compiling, steps, and something else every so often."""
    clock, count = [0.0], 1000
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress, ends = Progress("step", count, 0, unit="images"), {}
    with progress.once("compiling"):
        clock[0] += 40.0
    for done in range(1, count + 1):
        clock[0] += step
        progress.done = done
        progress.say(progress.line())
        ends[done] = clock[0]
        if done % every == 0:
            with progress.aside():
                clock[0] += aside
                with progress.once():
                    clock[0] += 30.0 * (done == every)  # compiles, the first time
    for done, left in shown(capsys, r"step ([\d,]+)/.*?([\dhms ]+) left"):
        truth = ends[count] - ends[done]
        if done >= 0.1 * count and done >= 2 * every and truth > 5 * max(aside, 1):
            assert left == pytest.approx(truth, rel=0.2), (done, left, truth)


def test_the_rate_leaves_out_what_is_done_aside(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = Progress("step", 100, 0, unit="images", per_count=8)
    for context in (progress.once, progress.aside, contextlib.nullcontext):
        with context():
            clock[0] += 5.0
    progress.done = 10
    assert progress.rate() == pytest.approx(10 * 8 / 5)


@pytest.mark.parametrize(
    "seconds, words",
    [(3.4, "3 s"), (59.7, "1m 00s"), (119.7, "2m 00s"), (7500, "2h 05m"), (273_600, "3d 04h")],
)
def test_a_duration_is_rounded_once(seconds, words):
    assert duration(seconds) == words
