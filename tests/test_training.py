"""The step: optimiser, averages and clipping against their formulas; many devices and parts against one."""

import functools
import types

import affine
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm_jax.training import parallel
from ddpm_jax.training import step as training

CONFIG = types.SimpleNamespace(
    data=types.SimpleNamespace(image_shape=(2, 2, 3)), affine=types.SimpleNamespace(scale=1.0)
)
METHOD = affine.make(CONFIG)
KEY = jax.random.key(7)
SGD = optax.sgd(0.1)


def make_batch(n=8, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, *METHOD.image_shape), np.uint8)
    return {"image": images, "label": np.zeros(n, np.int32), "index": np.arange(n, dtype=np.int32)}


def run(steps, *, devices=0, tx=SGD, method=METHOD, **options):
    """The state after some steps of `make_update`, under pmap over all four devices if `devices`."""
    state = training.init_state(method, tx, jax.random.key(0))
    axis = parallel.AXIS if devices else None
    update = training.make_update(method, tx, KEY, axis_name=axis, **options)
    if devices:
        state = parallel.place(state)
        step = parallel.compile_step(update, state, parallel.shard(make_batch()))
    else:
        step = jax.jit(update)
    states = [jax.device_get(state)]
    for k in range(steps):
        batch = make_batch(seed=k)
        state, _ = step(state, parallel.shard(batch) if devices else batch)
        states.append(jax.device_get(state))
    return states


def close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


def test_four_devices_equal_one():
    one, four = run(4)[-1], run(4, devices=4)[-1]
    close(one.params, four.params, atol=1e-6)
    close(one.ema_params, four.ema_params, atol=1e-6)
    one, four = training.means(one.metrics), training.means(four.metrics)
    assert one.keys() == four.keys() and one["never"] is None and four["never"] is None
    close(*({k: v for k, v in m.items() if v is not None} for m in (one, four)), rtol=1e-5)


@pytest.mark.parametrize("devices", [0, 4])
def test_accumulation_equals_the_whole_batch(devices):
    options = {"devices": devices, "max_grad_norm": 0.05}
    close(run(3, **options)[-1].params, run(3, accumulate=2, **options)[-1].params, atol=1e-6)


@pytest.mark.parametrize("devices, accumulate", [(0, 1), (0, 2), (4, 1), (4, 2)])
def test_the_method_remembers_the_whole_batch_in_its_order(devices, accumulate):
    states = run(2, devices=devices, accumulate=accumulate)
    for k in (0, 1):
        losses = METHOD.loss_fn(
            states[k].params, (), jax.random.fold_in(KEY, k), make_batch(seed=k)
        )[0]
        np.testing.assert_allclose(states[k + 1].loss_state, losses, rtol=1e-6)


@pytest.mark.parametrize("devices, accumulate", [(0, 1), (0, 2), (4, 1), (4, 2)])
def test_each_example_knows_its_place_in_the_whole_batch(devices, accumulate):
    class Positions(affine.Affine):
        def loss_fn(self, params, loss_state, key, batch):
            values, metrics, _ = super().loss_fn(params, loss_state, key, batch)
            return values, metrics, batch["position"]

    method = Positions(image_shape=METHOD.image_shape, scale=METHOD.scale)
    state = run(1, devices=devices, accumulate=accumulate, method=method)[-1]
    assert state.loss_state.tolist() == [k / 8 for k in range(8)]


def test_the_same_compiled_step_serves_every_state():
    state = parallel.place(training.init_state(METHOD, SGD, jax.random.key(0)))
    update = training.make_update(METHOD, SGD, KEY, axis_name=parallel.AXIS)
    batch = parallel.shard(make_batch())
    step = parallel.compile_step(update, state, batch)
    first = state.params["level"]
    state, _ = step(state, batch)
    with pytest.raises(RuntimeError, match=r"deleted|donated"):
        first + 1  # the old state is gone: its memory was given to the new one
    state, loss = step(state, batch)  # an executable cannot recompile: other shapes would raise
    assert int(state.step) == 2 and np.isfinite(loss)


def test_several_cpu_devices_take_one_step_at_a_time():
    """Steps in a queue can wait for each other for ever there; XLA then aborts the process."""
    state, loaded = training.init_state(METHOD, SGD, KEY), parallel.shard(make_batch())

    def slow(state, batch):
        x = jax.lax.fori_loop(0, 200_000, lambda _, x: jnp.sin(x) + 1.0, batch["image"].mean())
        return state, jax.lax.pmean(x, parallel.AXIS)

    step = parallel.compile_step(jax.tree_util.Partial(slow), parallel.place(state), loaded)
    assert jax.local_device_count() > 1
    assert all(x.is_ready() for x in jax.tree.leaves(step(parallel.place(state), loaded)))


def test_the_seed_is_no_constant_of_the_program():
    """A run with another seed finds the program of the first in the compilation cache."""
    state, batch = training.init_state(METHOD, SGD, KEY), parallel.shard(make_batch())

    def program(key):
        update = training.make_update(METHOD, SGD, key, axis_name=parallel.AXIS)
        return parallel.compile_step(update, parallel.place(state), batch)

    one, other = (program(jax.random.key(seed)) for seed in (7, 8))
    assert one.func.as_text() == other.func.as_text()
    losses = [float(run(parallel.place(state), batch)[1]) for run in (one, other)]
    assert losses[0] != losses[1]


def test_randomness_is_of_the_key_the_step_and_the_index():
    params = METHOD.init(jax.random.key(0))
    batch = make_batch()
    whole = METHOD.loss_fn(params, (), KEY, batch)[0]
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(8)]
    np.testing.assert_allclose(
        np.concatenate([METHOD.loss_fn(params, (), KEY, row)[0] for row in rows]), whole, rtol=1e-6
    )
    other = METHOD.loss_fn(params, (), jax.random.fold_in(KEY, 1), batch)[0]
    assert np.abs(other - whole).min() > 0


def test_ema_is_the_weighted_sum_of_the_parameters():
    decay = 0.7
    states = run(5, ema_decay=decay)
    p = [s.params["level"] for s in states]
    expected = decay**5 * p[0] + sum((1 - decay) * decay ** (5 - k) * p[k] for k in range(1, 6))
    np.testing.assert_allclose(states[-1].ema_params["level"], expected, rtol=1e-5)


def test_ema_warmup_forgets_the_beginning():
    states = run(3, ema_decay=0.9999, ema_warmup=True)
    ema = states[0].params["level"]
    for k, state in enumerate(states[1:]):
        decay = min(0.9999, (1 + k) / (10 + k))
        ema = decay * ema + (1 - decay) * state.params["level"]
    np.testing.assert_allclose(states[-1].ema_params["level"], ema, rtol=1e-5)
    assert training.means(states[1].metrics)["ema_decay"] == pytest.approx(0.1)


def test_global_clip_bounds_the_norm_and_keeps_the_direction():
    free, clipped = (run(1, clip=c, max_grad_norm=0.1) for c in ("none", "global"))
    move = [s[1].params["level"] - s[0].params["level"] for s in (free, clipped)]
    np.testing.assert_allclose(np.linalg.norm(move[1]), 0.1 * 0.1, rtol=1e-5)
    np.testing.assert_allclose(move[1] / 1e-2, move[0] / np.linalg.norm(move[0]), rtol=1e-4)


def test_per_replica_clip_is_the_mean_of_clipped_gradients():
    states = run(1, devices=4, clip="per_replica", max_grad_norm=0.01)
    params, batch, step_key = states[0].params, make_batch(), jax.random.fold_in(KEY, 0)
    grads = []
    for d in range(4):
        part = jax.tree.map(lambda x, d=d: x[2 * d : 2 * d + 2], batch)
        gradient = jax.grad(lambda p, b=part: METHOD.loss_fn(p, (), step_key, b)[0].mean())
        grads.append(gradient(params)["level"])
    expected = np.mean([g * min(1, 0.01 / np.linalg.norm(g)) for g in grads], axis=0)
    moved = states[1].params["level"] - states[0].params["level"]
    np.testing.assert_allclose(moved, -0.1 * expected, rtol=1e-3, atol=1e-7)


def test_learning_rate():
    _, warm = training.make_optimizer(num_steps=100, learning_rate=2.0, warmup_steps=10)
    np.testing.assert_allclose([warm(k) for k in (0, 5, 10, 99)], [0, 1, 2, 2])
    _, cosine = training.make_optimizer(
        num_steps=110, learning_rate=2.0, warmup_steps=10, decay="cosine"
    )
    np.testing.assert_allclose([cosine(k) for k in (0, 5, 10, 60, 110)], [0, 1, 2, 1, 0], atol=1e-6)


def test_adamw_decays_and_adam_does_not():
    zero = {"w": jnp.zeros(3)}
    for name, decay in (("adam", 0.0), ("adamw", 0.1)):
        tx, _ = training.make_optimizer(
            num_steps=9, name=name, learning_rate=0.5, warmup_steps=0, weight_decay=decay
        )
        params = {"w": jnp.ones(3)}
        updates, _ = tx.update(zero, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.5 * decay, rtol=1e-6)


@pytest.mark.parametrize(
    "function, options, words",
    [
        (training.make_optimizer, {"name": "adma"}, "did you mean 'adam'"),
        (training.make_optimizer, {"decay": "linear"}, "none, cosine"),
        (training.make_optimizer, {"learning_rate": 0.0}, "positive"),
        (training.make_optimizer, {"weight_decay": 0.1}, "adamw"),
        (training.make_update, {"clip": "globl"}, "did you mean 'global'"),
        (training.make_update, {"ema_decay": 1.0}, r"\[0, 1\)"),
        (training.make_update, {"accumulate": 0}, "at least 1"),
    ],
)
def test_refusals(function, options, words):
    given = {"num_steps": 1} if function is training.make_optimizer else {}
    args = () if function is training.make_optimizer else (METHOD, SGD, KEY)
    with pytest.raises(ValueError, match=words):
        function(*args, **given, **options)


def test_a_value_that_is_not_finite_names_its_first_step():
    bad = affine.make(
        types.SimpleNamespace(data=CONFIG.data, affine=types.SimpleNamespace(scale=float("nan")))
    )
    state = run(3, method=bad)[-1]
    assert int(state.metrics.bad_step) == 0
    assert int(run(3)[-1].metrics.bad_step) == training.NEVER


@pytest.mark.parametrize("size, words", [(6, "use 4 or 8"), (0, "use 4"), (3, "use 4")])
def test_batches_must_divide_over_the_devices(size, words):
    with pytest.raises(ValueError, match=words):
        parallel.check_batch_size("batch_size", size)


def test_batches_must_divide_over_devices_and_parts():
    parallel.check_batch_size("batch_size", 24, 3)
    with pytest.raises(ValueError, match="use 12 or 24"):
        parallel.check_batch_size("batch_size", 20, 3)


def test_examples_are_the_same_for_any_number_of_them():
    params = parallel.place(METHOD.init(jax.random.key(0)))
    draw = parallel.map_examples(METHOD.sample)
    whole = draw(params, KEY, np.arange(7), np.zeros(7))
    part = draw(params, KEY, np.arange(5, 7), np.zeros(2))
    assert whole.shape == (7, 2, 2, 3)
    np.testing.assert_allclose(part, whole[5:], rtol=1e-6)


def test_compiled_programs_are_kept_by_version_and_processor(monkeypatch, tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        parallel.enable_compilation_cache()
        folder = jax.config.jax_compilation_cache_dir
        assert folder.startswith(f"{tmp_path}/ddpm_jax/jaxlib-{jax.lib.__version__}-")
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        parallel.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
