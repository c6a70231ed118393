"""The assembled Method with a small U-Net: its loss, its randomness, its samples, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10
from ddpm_jax import config as config_lib
from ddpm_jax import ddpm, parallel, training


def make_config(**changes):
    config = cifar10.get_config()
    config.data.image_shape = (6, 4, 2)
    config.model.channels = 8
    config.model.num_groups = 2
    config.model.channel_mults = (1,)  # levels and attention are tested with the network
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = ()
    config.schedule.num_timesteps = 20
    config.schedule.end = 0.5
    for field, value in changes.items():
        section, name = field.split("__")
        with config.ignore_type():
            config[section][name] = value
    return config


def make_batch(n=8):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (n, 6, 4, 2), np.uint8),
        "label": np.arange(n, dtype=np.int32) % 3,
        "index": np.arange(n, dtype=np.int32),
    }


def far_from_zero(params):
    """Parameters as after training, so that the near-zero layers hide nothing."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


KEY = jax.random.key(5)


def test_an_untrained_network_predicts_nothing():
    """Near-zero output: L_simple starts at E[ε²] = 1, whatever the images are."""
    method = ddpm.make_method(make_config())
    loss, metrics = jax.jit(method.loss)(method.init(KEY), KEY, make_batch(128))
    assert loss.shape == (128,) and abs(loss.mean() - 1) < 4 * np.sqrt(2 / (128 * 48))
    weights = np.stack([metrics[f"loss_t{q}"][1] for q in (1, 2, 3, 4)])
    assert (weights.sum(axis=0) == 1).all()  # every example is in exactly one quarter of t
    assert (weights.sum(axis=1) > 10).all()


def test_losses_and_masks_do_not_depend_on_the_batch():
    method = ddpm.make_method(make_config(model__dropout=0.5))
    params, batch = far_from_zero(method.init(KEY)), make_batch(8)
    loss = jax.jit(lambda *args: method.loss(*args)[0])
    whole = loss(params, KEY, batch)
    halves = [loss(params, KEY, jax.tree.map(lambda x, s=s: x[s::2], batch)) for s in (0, 1)]
    np.testing.assert_allclose(np.stack(halves, axis=1).ravel(), whole, rtol=2e-5)
    assert np.unique(whole).size == 8


def test_flips_mirror_half_of_the_images():
    images = np.arange(200 * 6 * 4, dtype=np.float32).reshape(200, 6, 4, 1)
    out = np.asarray(ddpm.mirror_at_random(jax.random.split(KEY, 200), images))
    mirrored = (out == images[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (out == images).all(axis=(1, 2, 3))
    assert (mirrored ^ kept).all() and 70 < mirrored.sum() < 130


def test_flips_are_a_choice_of_the_config():
    # Images that are bright on one side: their mirrored copies give another loss.
    images = np.zeros((16, 6, 4, 2), np.uint8)
    images[:, :, :2] = 255
    losses = []
    for flip in (True, False):
        method = ddpm.make_method(make_config(data__flip=flip, model__dropout=0.0))
        params = far_from_zero(method.init(KEY))
        losses.append(jax.jit(method.loss)(params, KEY, {**make_batch(16), "image": images})[0])
    same = np.isclose(*losses, rtol=1e-4)
    assert 2 <= same.sum() <= 14  # those that were not mirrored


@pytest.mark.parametrize("devices", [1, 4])
def test_updates_are_the_same_on_one_device_and_four(devices):
    method = ddpm.make_method(make_config())
    tx, _ = training.make_optimizer(num_steps=10, warmup_steps=0, learning_rate=1e-3)
    state = training.init_state(method, tx, KEY)
    state = state.replace(params=far_from_zero(state.params))
    if devices == 1:
        step, to_device = jax.jit(training.make_update(method, tx, KEY)), lambda batch: batch
    else:
        update = training.make_update(method, tx, KEY, axis_name=parallel.AXIS)
        state, to_device = parallel.place(state), parallel.shard
        step = parallel.compile_step(update, state, to_device(make_batch()))
    for _ in range(2):
        state, loss = step(state, to_device(make_batch()))
    RESULTS[devices] = jax.device_get((loss, state.params["conv_in"], state.ema_params["conv_out"]))
    if len(RESULTS) == 2:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=2e-5), RESULTS[1], RESULTS[4]
        )


RESULTS = {}


def test_a_tiny_batch_is_overfitted():
    config = make_config(model__dropout=0.0, data__flip=False)
    method = ddpm.make_method(config)
    tx, _ = training.make_optimizer(num_steps=200, warmup_steps=10, learning_rate=5e-3)
    step = jax.jit(training.make_update(method, tx, KEY, ema_decay=0.9))
    state = training.init_state(method, tx, KEY)
    batch = jax.tree.map(lambda x: x[[0, 1] * 16], make_batch(2)) | {"index": np.arange(32)}
    losses = []
    for _ in range(200):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert np.mean(losses[-50:]) < 0.35 * np.mean(losses[:5])
    # Two images were shown: ancestral samples lie close to one or the other, pure noise does not.
    keys = (jax.random.key(3), np.arange(8), np.zeros(8, np.int32))
    x = jax.jit(method.make_sample())(state.ema_params, *keys)
    seen = np.asarray(batch["image"][:2] / 127.5 - 1)
    distance = np.sqrt(np.mean((np.asarray(x)[:, None] - seen[None]) ** 2, axis=(2, 3, 4)))
    apart = np.sqrt(np.mean((seen[0] - seen[1]) ** 2))
    assert np.median(distance.min(axis=1)) < 0.5 * apart


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_samples_depend_on_their_index_alone(sampler):
    method = ddpm.make_method(make_config(model__num_classes=3))
    params = far_from_zero(method.init(KEY))
    draw = jax.jit(method.make_sample(sampler=sampler, steps="5"))
    index, label = np.arange(6), np.arange(6) % 3
    whole = draw(params, KEY, index, label)
    part = draw(params, KEY, index[2:5], label[2:5])
    np.testing.assert_allclose(part, whole[2:5], atol=1e-5)
    other = draw(params, KEY, index, (label + 1) % 3)
    assert np.abs(other - whole).max() > 1e-3  # the label is heard


def test_bfloat16_computes_close_to_float32():
    losses = []
    for dtype in ("float32", "bfloat16"):
        method = ddpm.make_method(make_config(model__dtype=dtype))
        params = far_from_zero(method.init(KEY))
        loss, gradient = jax.jit(jax.value_and_grad(lambda *a, m=method: m.loss(*a)[0].mean()))(
            params, KEY, make_batch()
        )
        assert loss.dtype == jnp.float32
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("diffusion__prediction", "epsilon", "did you mean 'eps'"),
        ("diffusion__loss", "simpel", "did you mean 'simple'"),
        ("diffusion__variance", "fixed", "fixed_small, fixed_large"),
        ("schedule__name", "jsd", "alpha_bar falls to 0"),
        ("model__channels", "many", "config.model.channels must be int"),
        ("model__channels", True, "config.model.channels must be int"),
        ("model__channel_mults", (1, "a"), "config.model.channel_mults must be"),
        ("model__depth", 3, "no field 'depth'"),
        ("model__dropuot", 0.1, "did you mean 'dropout'"),
        ("model__attention_resolutions", (16,), "16"),
        ("data__image_shape", (2, 1, 3), "too small"),
        ("data__image_shape", (32, 32), "image_shape"),
    ],
)
def test_refusals(field, value, words):
    config = make_config(**{"model__channel_mults": (1, 2), field: value})
    if field == "schedule__name":
        config.schedule.end = None
    with pytest.raises(config_lib.ConfigError, match=words) as error:
        ddpm.make_method(config)
    assert str(error.value).startswith("config.") and "\n" not in str(error.value)
