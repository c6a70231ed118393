"""The layers of the U-Net: convolutions, norms, dropout, residual blocks, attention.

Images are [B, H, W, C]. Parameters are float32, also if the computation is bfloat16. A layer whose textbook form is slow
on CPUs is written differently, with a comment that says why; `plain=True` is the textbook form with the same parameters,
for comparison.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-6  # default of what is added to the variances in group norms, as in Ho et al.'s code
NEAR_ZERO = 1e-10  # variance scale of the last layer of each block, in place of 0; Ho et al.'s code
NEAR_ZERO_LAYERS = ("conv_2", "proj_out", "conv_out")


def variance_scaling(scale: float = 1.0) -> nn.initializers.Initializer:
    """Ho et al.'s kernel initialiser: uniform with variance scale / ((fan-in + fan-out) / 2)."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


label_initializer = nn.initializers.normal(1.0)


def largest_divisor(channels: int, at_most: int) -> int:
    """The largest divisor of `channels` that is at most `at_most`."""
    below = [d for d in range(1, math.isqrt(channels) + 1) if channels % d == 0]
    return max(d for n in below for d in (n, channels // n) if d <= at_most)


def time_embedding(
    t: jax.Array, channels: int, *, frequency_shift: float = 1.0, cosine_first: bool = False
) -> jax.Array:
    """The sinusoidal embedding of t [B]: [B, channels] float32, all sines, then all cosines.

    The n frequencies are 10000^(−i/(n − frequency_shift)). With a shift of 1 they fall from 1 to 1/10000, both included,
    as in Ho et al.'s code; with 0 the last is left out, as in Improved DDPM's. If `channels` is odd, the last one is zero.

    Args:
      cosine_first: all cosines, then all sines, as in Improved DDPM's code.
    """
    half = channels // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / max(half - frequency_shift, 1))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(parts[::-1] if cosine_first else parts, axis=1)
    return jnp.pad(embedding, ((0, 0), (0, channels % 2)))


# Convolutions.


def convolve(x, kernel, padding, stride=1):
    """Convolves x [B, H, W, I] with kernel [k, k, I, O]; `padding` is an argument of lax."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def convolve_2x2(x, kernel):
    """`convolve` of a 2x2 kernel with a padding of one pixel, and a faster gradient on CPUs; reverse mode only.

    As two matrix products, the gradient of the kernel took 0.11 instead of 4 s for the convolution of
    `upsample_convolve` at 14x14x64 (two busy cores). GPUs and TPUs use XLA's.
    """
    return convolve(x, kernel, ((1, 1), (1, 1)))


def _convolve_2x2_forward(x, kernel):
    return convolve_2x2(x, kernel), (x, kernel)


def _convolve_2x2_backward(residuals, g):
    x, kernel = residuals

    def xla_gradient(x, g):
        (kernel_bar,) = jax.vjp(lambda kernel: convolve(x, kernel, ((1, 1), (1, 1))), kernel)[1](g)
        return kernel_bar

    def products(x, g):
        # kernel_bar[i, j] = sum over b, h, w of x[b, h + i, w + j] g[b, h, w]. The shifts by j are
        # blocks of rows of one matrix [2 I, B (H + 2) W], and the shift by i is a padding of g.
        width = g.shape[2]
        x = jnp.pad(x.transpose(3, 0, 1, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))
        x = jnp.concatenate([x[..., j : j + width] for j in range(2)], axis=0)
        rows = [
            jax.lax.dot_general(
                x,
                jnp.pad(g, ((0, 0), (i, 1 - i), (0, 0), (0, 0))),
                (((1, 2, 3), (0, 1, 2)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            for i in range(2)
        ]
        return jnp.stack(rows).reshape(kernel.shape).astype(kernel.dtype)

    x_bar = convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), ((0, 0), (0, 0)))
    return x_bar, jax.lax.platform_dependent(x, g, cpu=products, default=xla_gradient)


convolve_2x2.defvjp(_convolve_2x2_forward, _convolve_2x2_backward)


def upsample_convolve(x, kernel):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution: x [B, H, W, I] -> [B, 2 H, 2 W, O].

    Along an axis, the three taps of an even output fall on rows (i - 1, i, i) of x, and those of an odd
    one on (i, i, i + 1): on two rows each, so that two taps can be added. The layer is therefore a 2x2
    convolution of x with 4 O channels, one O for each phase, and an interleaving of the phases, which
    takes 2.25 times fewer operations.
    """
    b, h, w, inputs = x.shape
    outputs = kernel.shape[-1]
    fold = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [phase, row, tap]
    fold = jnp.asarray(fold, kernel.dtype)
    phases = jnp.einsum("pky,qlx,yxio->klipqo", fold, fold, kernel)  # float32, then x's type
    y = convolve_2x2(x, phases.reshape(2, 2, inputs, 4 * outputs).astype(x.dtype))
    y = y.reshape(b, h + 1, w + 1, 2, 2, outputs)
    rows = [
        jnp.stack([y[:, p : p + h, q : q + w, p, q] for q in range(2)], axis=3) for p in range(2)
    ]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, outputs)


def double(x):
    """Nearest-neighbour upsampling: x [B, H, W, C] -> [B, 2 H, 2 W, C]."""
    b, h, w, c = x.shape
    return jax.image.resize(x, (b, 2 * h, 2 * w, c), "nearest")


def halve(x):
    """Means of 2x2 pixels: x [B, H, W, C] -> [B, H/2, W/2, C], for even sizes; of odd ones the last row is its own mean."""
    count = nn.avg_pool(jnp.ones((1, *x.shape[1:3], 1)), (2, 2), (2, 2), "SAME")
    return nn.avg_pool(x, (2, 2), (2, 2), "SAME") / count.astype(x.dtype)


class Conv(nn.Module):
    """A 3x3 convolution, [B, H, W, I] -> [B, H, W, features].

    With stride 2 the image is halved, rounding up. With `upsample` it is first doubled. The padding "SAME" is TensorFlow's,
    with stride 2 (0, 1) for even sizes and (1, 1) for odd ones.
    """

    features: int
    dtype: str
    plain: bool
    scale: float = 1.0
    stride: int = 1
    upsample: bool = False
    padding: str | tuple[tuple[int, int], ...] = "SAME"

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", variance_scaling(self.scale), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, bias = x.astype(self.dtype), bias.astype(self.dtype)
        if not self.upsample or self.plain:
            kernel = kernel.astype(self.dtype)
        if self.upsample and self.plain:
            y = convolve(double(x), kernel, "SAME")
        elif self.upsample:
            y = upsample_convolve(x, kernel)
        else:
            y = convolve(x, kernel, self.padding, self.stride)
        return y + bias[None, None, None, :]


# Normalisation and dropout.


class GroupNorm(nn.Module):
    """nn.GroupNorm, then * (1 + scale) + shift with scale and shift [B, C]; returns float32.

    It is computed as x * a + b with a, b [B, C]. Sums over a channel vectorise and fuse, and those over a
    group do not: with swish, forward and backward, 5.5 instead of 16 ms at 28x28x32, batch 128.
    """

    num_groups: int
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x, scale=None, shift=None):
        channels, groups = x.shape[-1], self.num_groups
        gamma = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        beta = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

        def group_mean(v):  # [B, C] -> [B, C], each channel the mean of its group
            mean = v.reshape(-1, groups, channels // groups).mean(axis=2)
            return jnp.repeat(mean, channels // groups, axis=1)

        # E[x^2] - E[x]^2 loses digits if the mean is far from zero, so one value of each image and
        # channel is subtracted first, which does not change the result.
        x = x.astype(jnp.float32)
        pivot = jax.lax.stop_gradient(x[:, 0, 0, :])  # [B, C]
        x = x - pivot[:, None, None, :]
        mean = x.mean(axis=(1, 2))
        variance = jnp.square(x).mean(axis=(1, 2)) - jnp.square(mean)
        deviation = mean + pivot - group_mean(mean + pivot)  # channel mean minus group mean
        variance = group_mean(variance + jnp.square(deviation))

        a = gamma[None, :] * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + self.epsilon)
        b = beta[None, :] + (deviation - mean) * a
        if scale is not None:
            a, b = a * (1 + scale), b * (1 + scale) + shift
        return x * a[:, None, None, :] + b[:, None, None, :]


def group_norm(x, scale=None, shift=None, *, norm: tuple[int, float], plain: bool, name: str):
    """Group normalisation, in the fast or the plain form; for use inside a module.

    Args:
      norm: the number of groups, and the epsilon.
    """
    groups, epsilon = largest_divisor(x.shape[-1], norm[0]), norm[1]
    if not plain:
        return GroupNorm(groups, epsilon, name=name)(x, scale, shift)
    y = nn.GroupNorm(groups, epsilon=epsilon, dtype=jnp.float32, name=name)(x)
    return y if scale is None else y * (1 + scale)[:, None, None, :] + shift[:, None, None, :]


def dropout(x: jax.Array, rate: float, keys: jax.Array, layer: int) -> jax.Array:
    """Dropout of x [B, ...]; the mask of an example depends on its key, keys [B], and `layer`.

    The bits are a hash of the position (the finaliser of MurmurHash3, seeded by both words of the key). It
    fuses with the operations around it and compiles in 0.05 s per layer; jax.random takes 0.5 s, and
    the CIFAR-10 network has 22 layers.
    """
    words = jax.random.key_data(keys)  # uint32 [B, 2]
    position = jax.lax.iota(jnp.uint32, math.prod(x.shape[1:]))
    seeded = position[None, :] + _hash(words[:, :1] ^ _hash(jnp.uint32(layer + 1)))
    bits = _hash(_hash(seeded) ^ words[:, -1:]).reshape(x.shape)
    return jnp.where(bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1)), x / (1 - rate), 0.0)


def _hash(x):
    """A bijective hash of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def bernoulli_dropout(x: jax.Array, rate: float, keys: jax.Array, layer: int) -> jax.Array:
    """The textbook form of `dropout`, with masks of jax.random."""

    def keep(key):
        return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1 - rate), 0.0)


# Blocks.


def barrier(tree):
    """The same arrays, which XLA on CPUs writes to memory here; elsewhere it may fuse what comes before with what follows.

    On CPUs it fuses too much: it computes element-wise operations again for each operation that reads their result, and
    with strides if that one is transposed.
    """
    return jax.lax.platform_dependent(
        tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree
    )


@jax.custom_vjp
def matmul(x, kernel):
    """x [..., I] @ kernel [I, O]; reverse mode only.

    The gradient of the kernel needs a transposed copy of x, with which XLA on CPUs fuses the operations before the
    layer: 50 ms for a copy that takes 1.5 ms behind a barrier.
    """
    return x @ kernel


def _matmul_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals, g):
    x, kernel = residuals
    x, g = barrier((x, g))
    axes = tuple(range(x.ndim - 1))
    return g @ kernel.T, jax.lax.dot_general(x, g, ((axes, axes), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def store_gradient(x):
    """x, with a barrier behind its gradient; reverse mode only.

    The gradient of the input of a block is a sum over all blocks after it. With a barrier before each block a training
    step of the network of configs/fashion_mnist.py at width 32, batch 128, takes 0.8 times as long on CPUs.
    """
    return x


store_gradient.defvjp(lambda x: (x, None), lambda _, g: (barrier(g),))


def dense(features: int, dtype: str, plain: bool, *, scale: float = 1.0, name: str) -> nn.Dense:
    """A dense layer with Ho et al.'s initialiser; for use inside a module."""
    options = {} if plain else {"dot_general": lambda x, kernel, *_, **__: matmul(x, kernel)}
    return nn.Dense(
        features, kernel_init=variance_scaling(scale), dtype=dtype, name=name, **options
    )


class ResBlock(nn.Module):
    """A residual block: norm, swish, conv; add the embedding; norm, swish, dropout, conv; add the input.

    x [B, H, W, C], embedding [B, E] -> [B, H, W, channels]. With `scale_shift` the embedding is not added,
    but scales and shifts the output of the second norm (Improved DDPM, Appendix A). With `resample` "down" or "up"
    both branches are halved or doubled, before the first convolution (Dhariwal and Nichol 2021, Section 3).
    """

    channels: int
    dropout: float
    scale_shift: bool
    dtype: str
    norm: tuple[int, float]  # see group_norm
    plain: bool
    layer: int  # number of the block in the network, folded into the dropout keys
    resample: str = ""

    @nn.compact
    def __call__(self, x, embedding, dropout_keys):
        norm = functools.partial(group_norm, norm=self.norm, plain=self.plain)
        x = x if self.plain else store_gradient(x)
        h, up = nn.swish(norm(x, name="norm_1")), self.resample == "up"
        if self.resample:
            x, h = (double(x), h) if up else (halve(x), halve(h))
        h = Conv(self.channels, self.dtype, self.plain, upsample=up, name="conv_1")(h)

        width = self.channels * (2 if self.scale_shift else 1)
        e = nn.Dense(width, kernel_init=variance_scaling(), name="dense_emb")(embedding)
        if self.scale_shift:
            h = norm(h, *jnp.split(e, 2, axis=1), name="norm_2")
        else:
            h = norm(h + e[:, None, None, :], name="norm_2")
        h = nn.swish(h)
        if dropout_keys is not None and self.dropout > 0:
            drop = bernoulli_dropout if self.plain else dropout
            h = drop(h, self.dropout, dropout_keys, self.layer)
        h = Conv(self.channels, self.dtype, self.plain, scale=NEAR_ZERO, name="conv_2")(h)

        if x.shape[-1] != self.channels:
            x = dense(self.channels, self.dtype, self.plain, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over the H W positions of x [B, H, W, C], added to x."""

    num_heads: int
    dtype: str
    norm: tuple[int, float]  # see group_norm; 0 groups for none
    plain: bool

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        size = c // self.num_heads
        x = x if self.plain else store_gradient(x)

        y = x
        if self.norm[0]:
            y = group_norm(x, norm=self.norm, plain=self.plain, name="norm")
        y = y.reshape(b, h * w, c)
        heads = (b, h * w, self.num_heads, size)
        q, k, v = (
            dense(c, self.dtype, self.plain, name=name)(y).reshape(heads)
            for name in ("query", "key", "value")
        )
        if self.plain:
            y = nn.dot_product_attention(q, k, v, force_fp32_for_softmax=True)
        else:
            # Heads are merged with the batch, [B heads, H W, size]: the layer took 213 instead of
            # 246 ms forward and backward on CPUs (14x14x64, batch 128).
            q, k, v = (u.swapaxes(1, 2).reshape(-1, h * w, size) for u in (q, k, v))
            logits = jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits * size**-0.5, axis=-1).astype(self.dtype)
            y = jnp.einsum("nqk,nkd->nqd", weights, v)
            y = y.reshape(b, self.num_heads, h * w, size).swapaxes(1, 2)
        y = dense(c, self.dtype, self.plain, scale=NEAR_ZERO, name="proj_out")(
            y.reshape(b, h * w, c)
        )
        return x + y.reshape(b, h, w, c)
