"""The network against an independent implementation in NumPy, and each of its properties."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.networks import init_params, layers
from ddpm_jax.networks.unet import UNet


def check(image_shape, **options):
    UNet(**options).check(image_shape)


TINY = {
    "out_channels": 2,
    "channels": 40,  # 20 groups of 2: a group of 1 would not see the bias before it
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (3,),
    "dropout": 0.5,
    "num_groups": 32,
}
RICH = {"num_heads": 2, "scale_shift": True, "num_classes": 3}
SHAPE = (7, 5, 2)

LABELS = np.array([0, 1, 2, 0])


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def inputs(shape=SHAPE, batch=4):
    x = jax.random.normal(jax.random.key(1), (batch, *shape))
    return x, 100 * jnp.arange(batch)


@functools.lru_cache
def random_params(**options):
    """Parameters far from the initial ones, whose zeros would hide errors."""
    unet = UNet(**{**TINY, **options})
    draw_shapes = functools.partial(init_params, unet, image_shape=SHAPE)
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 1
        noise = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        return jnp.asarray(noise + 0.5 * (leaf.ndim == 1), jnp.float32)

    return jax.tree.map(draw, jax.eval_shape(draw_shapes, jax.random.key(0)))


@functools.lru_cache
def compiled(**options):
    """(params, x, t, labels, keys) -> output, compiled once per choice of options."""
    unet = UNet(**{**TINY, **options})
    return jax.jit(
        lambda p, x, t, labels, keys: unet.apply({"params": p}, x, t, labels, dropout_keys=keys)
    )


def apply(params, x, t, labels=None, keys=None, **options):
    return compiled(**options)(params, x, t, labels, keys)


def relative(a, b):
    """Largest difference of two trees, relative to the largest entry of each leaf of the second."""
    a, b = jax.device_get((a, b))
    ratios = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), a, b)
    return max(float(r) for r in jax.tree.leaves(ratios))


# Parameters.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "options", "expected"),
    [
        (32, {"out_channels": 3}, 35_746_307),
        (32, {"out_channels": 6}, 35_749_766),
        (256, {"out_channels": 3, "channel_mults": (1, 1, 2, 2, 4, 4)}, 113_673_219),
        (64, {"out_channels": 3, "channel_mults": (1, 2, 2, 2, 4)}, 78_700_803),
        (
            32,
            {
                "out_channels": 6,
                "num_res_blocks": 3,
                "attention_resolutions": (16, 8),
                "num_heads": 4,
                "scale_shift": True,
            },
            52_546_438,  # Improved DDPM's CIFAR-10 network
        ),
    ],
)
def test_published_parameter_counts(side, options, expected):
    unet = UNet(**options)
    draw = functools.partial(init_params, unet, image_shape=(side, side, 3))
    assert count(jax.eval_shape(draw, jax.random.key(0))) == expected


@pytest.mark.slow
def test_init_params_equals_init():
    unet = UNet(**TINY, num_classes=5, scale_shift=True)
    x, t = inputs(batch=1)
    ours = init_params(unet, jax.random.key(0), SHAPE)
    theirs = jax.device_get(jax.jit(unet.init)(jax.random.key(0), x, t, t)["params"])
    ours = jax.device_get(ours)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    for (path, a), b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32, path
        if path[-1].key != "kernel" and path[-1].key != "embedding":
            np.testing.assert_array_equal(a, b)  # biases 0, scales 1
        elif a.size >= 100:
            # A range tells a uniform distribution from others of the same deviation.
            np.testing.assert_allclose(a.std(), b.std(), rtol=0.25, err_msg=str(path))
            np.testing.assert_allclose(np.ptp(a), np.ptp(b), rtol=0.25, err_msg=str(path))

    again = init_params(unet, jax.random.key(0), SHAPE)
    other = init_params(unet, jax.random.key(1), SHAPE)
    name = ("down_0_block_0", "conv_1", "kernel")
    first, second, third = (functools.reduce(dict.get, name, p) for p in (ours, again, other))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)
    assert not np.array_equal(first, ours["down_0_block_0"]["conv_2"]["kernel"] * 1e5)


@pytest.mark.parametrize(
    ("side", "channels", "mults", "groups", "attended"),
    [
        (32, 128, (1, 2, 2, 2), 32, (16,)),
        (256, 128, (1, 1, 2, 2, 4, 4), 32, (16,)),
        (28, 32, (1, 2, 2), 8, (14,)),
        (8, 3, (1, 2), 1, (8,)),
        (64, 128, (1, 2), 32, (32,)),  # no level of at most 16: the last
    ],
)
def test_groups_and_attention_by_default(side, channels, mults, groups, attended):
    unet = UNet(channels=channels, channel_mults=mults)
    assert unet.groups == groups and unet.attended((side, side)) == attended


@pytest.mark.slow
def test_output_is_nearly_zero_at_initialisation():
    x, t = inputs()
    y = apply(init_params(UNet(**TINY), jax.random.key(0), SHAPE), x, t)
    assert y.shape == (4, 7, 5, 2) and y.dtype == jnp.float32
    assert 0 < np.abs(y).max() < 1e-3


# The layers against NumPy.


def test_time_embedding():
    t, channels = [0, 1, 17, 999], 10
    expected = np.zeros((4, channels))
    for row, time in enumerate(t):
        for i in range(5):
            angle = time / 10000 ** (i / 4)
            expected[row, i], expected[row, 5 + i] = np.sin(angle), np.cos(angle)
    for dtype in (jnp.int32, jnp.float32):
        actual = layers.time_embedding(jnp.array(t, dtype), channels)
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert layers.time_embedding(jnp.array(t), 11).shape == (4, 11)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_group_norm(mean):
    rng = np.random.default_rng(0)
    x = mean + rng.normal(size=(2, 5, 7, 64)) * rng.uniform(0.5, 2, 64) + rng.normal(size=64)
    x = np.asarray(x, np.float32)
    gamma, beta = rng.normal(size=(2, 64))
    expected = np.empty(x.shape)
    for image in range(2):
        for group in range(32):
            part = x[image, :, :, 2 * group : 2 * group + 2].astype(np.float64)
            part = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
            expected[image, :, :, 2 * group : 2 * group + 2] = part
    params = {"scale": jnp.asarray(gamma, jnp.float32), "bias": jnp.asarray(beta, jnp.float32)}
    actual = layers.GroupNorm(32).apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected * gamma + beta, atol=1e-3 if mean else 1e-5)

    scale, shift = rng.normal(size=(2, 2, 64)).astype(np.float32)
    conditioned = layers.GroupNorm(32).apply({"params": params}, x, scale, shift)
    by_hand = actual * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(conditioned, by_hand, rtol=1e-3, atol=1e-3)


def test_groups_divide_the_channels():
    assert [layers.largest_divisor(c, 32) for c in (128, 48, 33, 8, 37)] == [32, 24, 11, 8, 1]
    assert layers.largest_divisor(2**31 - 1, 10**30) == 2**31 - 1  # at once


@pytest.mark.parametrize("heads", [1, 2])
def test_attention(heads):
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype(np.float32)
    layer = layers.Attention(heads, "float32", norm=(4, 1e-6), plain=False)
    params = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape),
        layer.init(jax.random.key(0), x)["params"],
    )
    actual = layer.apply({"params": params}, x)
    normed = nn.GroupNorm(4, epsilon=1e-6).apply({"params": params["norm"]}, x)
    normed = np.asarray(normed, np.float64).reshape(2, 6, 8)
    q, k, v = (
        normed @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
        for name in ("query", "key", "value")
    )
    mixed, size = np.zeros((2, 6, 8)), 8 // heads
    for image in range(2):
        for head in range(heads):
            part = slice(size * head, size * (head + 1))
            for position in range(6):
                weight = np.exp(k[image, :, part] @ q[image, position, part] / np.sqrt(size))
                mixed[image, position, part] = weight / weight.sum() @ v[image, :, part]
    out = mixed @ np.asarray(params["proj_out"]["kernel"]) + np.asarray(params["proj_out"]["bias"])
    np.testing.assert_allclose(actual, x + out.reshape(x.shape), atol=1e-4)


def correlate(x, kernel, pad, stride=1):
    """A convolution as six nested sums; pad is ((top, bottom), (left, right))."""
    x = np.pad(x.astype(np.float64), ((0, 0), *pad, (0, 0)))
    height, width = ((x.shape[axis] - 3) // stride + 1 for axis in (1, 2))
    y = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for h in range(height):
        for w in range(width):
            patch = x[:, stride * h : stride * h + 3, stride * w : stride * w + 3]
            y[:, h, w] = np.einsum("byxi,yxio->bo", patch, kernel)
    return y


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("options", [{}, {"upsample": True}, {"stride": 2}])
def test_convolutions(options, plain):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 6)).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    layer = layers.Conv(6, "float32", plain, **options)
    actual = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    if "upsample" in options:
        x = np.kron(x.transpose(0, 3, 1, 2), np.ones((2, 2))).transpose(0, 2, 3, 1)
    # TensorFlow's SAME with stride 2: an odd size is padded on both sides, an even one after it.
    pad = ((1, 1), (0, 1)) if "stride" in options else ((1, 1), (1, 1))
    expected = correlate(x, kernel, pad, options.get("stride", 1)) + bias
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_gradient_of_the_convolution_is_that_of_xla():
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    kernel = jax.random.normal(jax.random.key(1), (2, 2, 3, 4))

    def gradient(convolution):
        loss = lambda x, kernel: jnp.sum(jnp.sin(convolution(x, kernel)))  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)

    ours = gradient(layers.convolve_2x2)
    theirs = gradient(lambda x, kernel: layers.convolve(x, kernel, ((1, 1), (1, 1))))
    assert relative(ours, theirs) < 1e-5


def test_dropout_rate_and_scale():
    keys = jax.random.split(jax.random.key(0), 64)
    x = jnp.ones((64, 7, 9, 5))
    y = layers.dropout(x, 0.3, keys, 1)
    zero = np.mean(y == 0)
    assert abs(zero - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-4)
    assert not np.array_equal(y, layers.dropout(x, 0.3, keys, 2))


# The whole network.


@functools.lru_cache
def value_and_gradient(**options):
    """Output and gradient of a network with every option and random parameters, no dropout."""
    x, t = inputs()
    params = random_params(**RICH)
    unet = UNet(**TINY, **RICH, **options)

    def loss(params, x):
        y = unet.apply({"params": params}, x, t, LABELS)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return y, gradient


@pytest.mark.slow
def test_plain_form_is_the_same_function():
    y, gradient = value_and_gradient()
    y_plain, gradient_plain = value_and_gradient(plain=True)
    assert relative(y, y_plain) < 2e-6
    # Relative to the largest entry of the whole gradient, for some of its leaves are sums that
    # cancel to zero.
    gradient, gradient_plain = jax.device_get((gradient, gradient_plain))
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient_plain))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_plain), strict=True):
        assert float(np.abs(a - b).max()) < 2e-6 * largest


@pytest.mark.slow
def test_gradient_reaches_every_parameter():
    _, (gradient, _) = value_and_gradient()
    for path, leaf in jax.tree.leaves_with_path(gradient):
        if path[-2].key == "key" and path[-1].key == "bias":
            continue  # softmax does not see what is added to all keys alike
        assert np.abs(leaf).max() > 1e-4, path


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [{"remat": True}, {"remat_resolutions": (5,)}])
def test_remat_changes_nothing(chosen):
    y, gradient = value_and_gradient()
    y_remat, gradient_remat = value_and_gradient(**chosen)
    np.testing.assert_allclose(y, y_remat, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_close():
    x, t = inputs()
    params = random_params()
    y = apply(params, x, t)
    y_half = apply(params, x, t, dtype="bfloat16")
    assert y_half.dtype == jnp.float32 and 0 < relative(y_half, y) < 0.1

    unet = UNet(**TINY, dtype="bfloat16")
    draw = functools.partial(init_params, unet, image_shape=SHAPE)
    shapes = jax.eval_shape(draw, jax.random.key(0))
    loss = lambda params: unet.apply({"params": params}, x, t).sum()  # noqa: E731
    gradient = jax.eval_shape(jax.grad(loss), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves((shapes, gradient))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("shape", "mults", "attention"),
    [((28, 28, 1), (1, 2, 2), (7,)), ((48, 32, 3), (1, 1, 2), (8,)), ((9, 14, 3), (1, 1), ())],
)
def test_any_image_size(shape, mults, attention):
    options = {**TINY, "channel_mults": mults, "attention_resolutions": attention}
    check(shape, **options)
    unet = UNet(**options)
    params = jax.eval_shape(lambda key: init_params(unet, key, shape), jax.random.key(0))
    assert any("attention" in name for name in params) == bool(attention)
    x, t = inputs(shape)
    y = jax.eval_shape(lambda p: unet.apply({"params": p}, x, t), params)
    assert y.shape == (4, *shape[:2], 2)


def test_examples_do_not_influence_each_other():
    x, t = inputs()
    params, keys = random_params(), jax.random.split(jax.random.key(0), 4)
    for without_or_with in (None, keys):
        y = apply(params, x, t, keys=without_or_with)
        changed = apply(params, x.at[2].add(1.0), t.at[2].add(5), keys=without_or_with)
        same = np.abs(y - changed).max(axis=(1, 2, 3)) < 1e-5
        np.testing.assert_array_equal(same, [True, True, False, True])


def test_dropout_depends_on_the_keys_of_the_example_alone():
    x, t = inputs()
    params, keys = random_params(), jax.random.split(jax.random.key(0), 4)
    y = apply(params, x, t, keys=keys)
    np.testing.assert_array_equal(y, apply(params, x, t, keys=keys))
    other = keys.at[1].set(jax.random.key(9))
    same = np.abs(y - apply(params, x, t, keys=other)).max(axis=(1, 2, 3)) < 1e-5
    np.testing.assert_array_equal(same, [True, False, True, True])
    halves = [apply(params, x[s], t[s], keys=keys[s]) for s in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(np.concatenate(halves), y, rtol=1e-4, atol=1e-4)
    assert relative(apply(params, x, t), y) > 1e-2


def test_labels_and_time_matter():
    params = random_params(**RICH)
    x, t = inputs()
    y = apply(params, x, t, LABELS, **RICH)
    relabelled = apply(params, x, t, np.array([0, 0, 2, 0]), **RICH)
    changed = np.abs(y - relabelled).max(axis=(1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(changed, [False, True, False, False])
    assert relative(apply(params, x, t + 1, LABELS, **RICH), y) > 1e-3
    unet = UNet(**TINY, **RICH)
    with pytest.raises(ValueError, match="num_classes=3 was called without labels"):
        unet.apply({"params": params}, x, t)
    with pytest.raises(ValueError, match="num_classes=0 was called with labels"):
        UNet(**TINY).apply({"params": params}, x, t, LABELS)


def test_head_channels_count_the_heads():
    x, t = inputs()
    params = random_params()
    by_channels = apply(params, x, t, head_channels=20)
    np.testing.assert_allclose(by_channels, apply(params, x, t, num_heads=4), rtol=1e-6)
    assert relative(by_channels, apply(params, x, t)) > 1e-3


# Refusals.


@pytest.mark.parametrize(
    ("image_shape", "options", "message"),
    [
        ((32, 32), {}, r"image_shape=\(32, 32\) should be .* \(H, W, C\)"),
        ((4, 4, 3), {}, "image 4×4 is too small for 4 levels; the smallest side that works is 8"),
        ((32, 32, 3), {"channel_mults": ()}, r"channel_mults=\(\) should be positive numbers"),
        ((32, 32, 3), {"channel_mults": (1, 0)}, r"channel_mults=\(1, 0\) should be"),
        ((32, 32, 3), {"channel_mults": (1, 1.3)}, r"channel_mults=\(1, 1.3\) should be"),
        ((32, 32, 3), {"channel_mults": 2}, "channel_mults=2 should be"),
        ((32, 32, 3), {"num_res_blocks": 0}, "num_res_blocks=0 .* from 1 to 1,000"),
        ((32, 32, 3), {"num_res_blocks": 10**6}, "num_res_blocks=1000000 .* from 1 to 1,000"),
        ((32, 32, 3), {"channels": 2**62}, "channels=4611686018427387904 .* from 2 to 1,048,576"),
        ((32, 32, 3), {"channel_mults": (1, 2**40)}, "channel_mults="),
        ((32, 32, 3), {"num_heads": 3}, "num_heads=3 .* 256 channels .* works is [24]"),
        ((32, 32, 3), {"head_channels": 60}, "head_channels=60 .* works is 64"),
        ((32, 32, 3), {"num_heads": 2, "head_channels": 64}, "num_heads=2 and head_channels=64"),
        ((32, 32, 3), {"dropout": 1.0}, r"dropout=1.0 is outside \[0, 1\)"),
        ((32, 32, 3), {"dtype": "bfloat"}, "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
        (
            (32, 32, 3),
            {"attention_resolutions": (15,)},
            "no level has smaller side 15; levels are 32, 16, 8, 4",
        ),
    ],
)
def test_check_refuses_in_one_line(image_shape, options, message):
    with pytest.raises(ValueError, match=message) as error:
        check(image_shape, **options)
    assert "\n" not in str(error.value)


def test_check_accepts():
    check((32, 32, 3), out_channels=3)
    check((7, 5, 2), channel_mults=(1, 2, 2), attention_resolutions=(3,), channels=8)
    check((28, 28, 1), channel_mults=(1, 2, 2), attention_resolutions=())
    with pytest.raises(TypeError):
        check((32, 32, 3), chanels=3)
