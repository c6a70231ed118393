"""The network of Ho et al., "Denoising Diffusion Probabilistic Models" (2020), Appendix B.

A U-Net of residual blocks with self-attention at chosen resolutions, conditioned on one number per
image and, if wished, on a label. It knows no diffusion. What goes beyond Ho et al. (several heads,
scale-shift conditioning, labels) follows Nichol and Dhariwal, "Improved Denoising Diffusion
Probabilistic Models" (2021), Section 3 and Appendix A.

Images are [B, H, W, C]. Parameters are float32 whatever the type of the computation. Where the
textbook form of a layer is slow on CPUs the same function is written differently, and the comment
there says why; `UNet(plain=True)` is the textbook form of the same network, for comparison.
"""

import difflib
import math
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16")
EPSILON = 1e-6  # of the group norms, as in Ho et al.
NEAR_ZERO = 1e-10  # Ho et al.'s stand-in for a variance scale of zero, which divides by nothing
NEAR_ZERO_LAYERS = ("conv_2", "proj_out", "conv_out")


def variance_scaling(scale: float = 1.0) -> nn.initializers.Initializer:
    """Ho et al.'s kernel initialiser: uniform, of variance scale / mean of fan-in and fan-out."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


label_initializer = nn.initializers.normal(1.0)


def largest_divisor(channels: int, at_most: int) -> int:
    """The largest divisor of `channels` up to `at_most`: the number of groups of a norm."""
    return max(g for g in range(1, at_most + 1) if channels % g == 0)


def time_embedding(t: jax.Array, channels: int) -> jax.Array:
    """Sinusoids of t [B] -> [B, channels] float32: all sines, then all cosines.

    The frequencies fall geometrically from 1 to 1/10000, both included (Ho et al. divide by
    half - 1, Improved DDPM by half). An odd number of channels ends with a zero.
    """
    half = channels // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / max(half - 1, 1))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, channels % 2)))


# Convolutions.


def convolve(x, kernel, padding, stride=1):
    """x [B, H, W, I] with kernel [k, k, I, O]; the padding of zeros as lax takes it."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def convolve_padded(x, kernel):
    """`convolve` of an image padded by one pixel all around; reverse-mode only.

    On CPUs XLA's gradient of the kernel is the slowest operation of the network. As k products of
    matrices it took 105 instead of 292 ms at 28x28x32 (batch 128, one core), and 0.11 instead of
    4 s for the 2x2 convolution of `upsample_convolve` at 14x14x64 (two busy cores). Inside
    `lax.scan` XLA's own gradients fall to naive loops: a step of two 64-channel convolutions took
    481 ms, and 11 ms with these. GPUs and TPUs keep XLA's own gradient of the kernel.
    """
    return convolve(x, kernel, ((1, 1), (1, 1)))


def _convolve_padded_forward(x, kernel):
    return convolve_padded(x, kernel), (x, kernel)


def _convolve_padded_backward(residuals, g):
    x, kernel = residuals
    k, _, inputs, outputs = kernel.shape

    def xla_gradient(x, g):
        (kernel_bar,) = jax.vjp(lambda kernel: convolve(x, kernel, ((1, 1), (1, 1))), kernel)[1](g)
        return kernel_bar

    def products(x, g):
        # kernel_bar[i, j] = sum over b, h, w of x[b, h + i, w + j] g[b, h, w]. The shifts j are
        # laid out as rows of one matrix [k I, B (H + 2) W], the shift i is a padding of g.
        width = g.shape[2]
        x = jnp.pad(x.transpose(3, 0, 1, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))
        x = jnp.concatenate([x[..., j : j + width] for j in range(k)], axis=0)
        rows = [
            jax.lax.dot_general(
                x,
                jnp.pad(g, ((0, 0), (i, k - 1 - i), (0, 0), (0, 0))),
                (((1, 2, 3), (0, 1, 2)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            for i in range(k)
        ]
        return jnp.stack(rows).reshape(k, k, inputs, outputs).astype(kernel.dtype)

    x_bar = convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), ((k - 2, k - 2),) * 2)
    return x_bar, jax.lax.platform_dependent(x, g, cpu=products, default=xla_gradient)


convolve_padded.defvjp(_convolve_padded_forward, _convolve_padded_backward)


def upsample_convolve(x, kernel):
    """Nearest-neighbour x 2 and a 3x3 convolution: x [B, H, W, I] -> [B, 2 H, 2 W, O].

    Along an axis an even output sees rows (i - 1, i, i) of x and an odd one rows (i, i, i + 1):
    two rows, with two of the three taps added. Hence one 2x2 convolution of the small image with
    the 4 O channels of the four phases, then an interleaving: 2.25 times fewer operations.
    """
    b, h, w, inputs = x.shape
    outputs = kernel.shape[-1]
    fold = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [phase, row, tap]
    fold = jnp.asarray(fold, kernel.dtype)
    phases = jnp.einsum("pky,qlx,yxio->klipqo", fold, fold, kernel)  # float32, then x's type
    y = convolve_padded(x, phases.reshape(2, 2, inputs, 4 * outputs).astype(x.dtype))
    y = y.reshape(b, h + 1, w + 1, 2, 2, outputs)
    rows = [
        jnp.stack([y[:, p : p + h, q : q + w, p, q] for q in range(2)], axis=3) for p in range(2)
    ]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, outputs)


class Conv(nn.Module):
    """A 3x3 convolution, [B, H, W, I] -> [B, H, W, features].

    With stride 2 it halves the image, rounding up, and pads as TensorFlow's SAME does: even sizes
    by (0, 1), odd sizes by (1, 1). With `upsample` it first doubles the image.
    """

    features: int
    dtype: str
    plain: bool
    scale: float = 1.0
    stride: int = 1
    upsample: bool = False

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", variance_scaling(self.scale), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, bias = x.astype(self.dtype), bias.astype(self.dtype)
        if not self.upsample or self.plain:
            kernel = kernel.astype(self.dtype)
        if self.upsample and self.plain:
            b, h, w, c = x.shape
            y = convolve(jax.image.resize(x, (b, 2 * h, 2 * w, c), "nearest"), kernel, "SAME")
        elif self.upsample:
            y = upsample_convolve(x, kernel)
        elif self.plain or self.stride > 1:
            y = convolve(x, kernel, "SAME", self.stride)
        else:
            y = convolve_padded(x, kernel)
        return y + bias[None, None, None, :]


# Normalisation and dropout.


class GroupNorm(nn.Module):
    """nn.GroupNorm as one x * a + b per image and channel, then (1 + scale) and shift [B, C].

    Sums per channel vectorise and fuse where sums per group do not: with swish, forward and
    backward, 16 -> 5.5 ms at 28x28x32, batch 128. Returns float32.
    """

    num_groups: int

    @nn.compact
    def __call__(self, x, scale=None, shift=None):
        channels, groups = x.shape[-1], self.num_groups
        gamma = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        beta = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

        def group_mean(v):  # [B, C] -> [B, C], each channel the mean of its group
            mean = v.reshape(-1, groups, channels // groups).mean(axis=2)
            return jnp.repeat(mean, channels // groups, axis=1)

        # E[x^2] - E[x]^2 loses its digits when the mean is far from zero, so x is first moved by
        # one of its own values, a constant per image and channel that the result does not see.
        x = x.astype(jnp.float32)
        pivot = jax.lax.stop_gradient(x[:, 0, 0, :])  # [B, C]
        x = x - pivot[:, None, None, :]
        mean = x.mean(axis=(1, 2))
        variance = jnp.square(x).mean(axis=(1, 2)) - jnp.square(mean)
        deviation = (
            mean + pivot - group_mean(mean + pivot)
        )  # of the channel's mean from the group's
        variance = group_mean(variance + jnp.square(deviation))

        a = gamma[None, :] * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + EPSILON)
        b = beta[None, :] + (deviation - mean) * a
        if scale is not None:
            a, b = a * (1 + scale), b * (1 + scale) + shift
        return x * a[:, None, None, :] + b[:, None, None, :]


def group_norm(x, scale=None, shift=None, *, num_groups: int, plain: bool, name: str):
    """Group normalisation in either form, with the same parameters; called inside a module."""
    groups = largest_divisor(x.shape[-1], num_groups)
    if not plain:
        return GroupNorm(groups, name=name)(x, scale, shift)
    y = nn.GroupNorm(groups, epsilon=EPSILON, dtype=jnp.float32, name=name)(x)
    return y if scale is None else y * (1 + scale)[:, None, None, :] + shift[:, None, None, :]


def dropout(x: jax.Array, rate: float, keys: jax.Array, layer: int) -> jax.Array:
    """Dropout of x [B, ...]; the mask of an example depends on its key, keys [B], and `layer`.

    A hash of the position (the finaliser of MurmurHash3, seeded by both words of the key) in place of
    jax.random: it fuses with what is around it, and compiles in 0.05 s a layer against 0.5 s. The
    CIFAR-10 network has 22 layers.
    """
    words = jax.random.key_data(keys)  # uint32 [B, 2]
    position = jax.lax.iota(jnp.uint32, math.prod(x.shape[1:]))
    seeded = position[None, :] + _hash(words[:, :1] ^ _hash(jnp.uint32(layer + 1)))
    bits = _hash(_hash(seeded) ^ words[:, -1:]).reshape(x.shape)
    return jnp.where(bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1)), x / (1 - rate), 0.0)


def _hash(x):
    """Scrambles uint32, one to one."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def bernoulli_dropout(x: jax.Array, rate: float, keys: jax.Array, layer: int) -> jax.Array:
    """`dropout` of the textbook: one draw and other masks for each element."""

    def keep(key):
        return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1 - rate), 0.0)


# Blocks.


class ResBlock(nn.Module):
    """Norm, swish, conv; add the embedding; norm, swish, dropout, conv; add the input.

    x [B, H, W, C], embedding [B, E] -> [B, H, W, channels]. With `scale_shift` the embedding
    scales and shifts the second norm instead (Improved DDPM, Appendix A).
    """

    channels: int
    dropout: float
    scale_shift: bool
    dtype: str
    num_groups: int
    plain: bool
    layer: int  # number of the block in the network, folded into the dropout keys

    @nn.compact
    def __call__(self, x, embedding, dropout_keys):
        conv = {"features": self.channels, "dtype": self.dtype, "plain": self.plain}
        norm = {"num_groups": self.num_groups, "plain": self.plain}
        h = nn.swish(group_norm(x, **norm, name="norm_1"))
        h = Conv(**conv, name="conv_1")(h)

        width = self.channels * (2 if self.scale_shift else 1)
        e = nn.Dense(width, kernel_init=variance_scaling(), name="dense_emb")(embedding)
        if self.scale_shift:
            h = group_norm(h, *jnp.split(e, 2, axis=1), **norm, name="norm_2")
        else:
            h = group_norm(h + e[:, None, None, :], **norm, name="norm_2")
        h = nn.swish(h)
        if dropout_keys is not None and self.dropout > 0:
            drop = bernoulli_dropout if self.plain else dropout
            h = drop(h, self.dropout, dropout_keys, self.layer)
        h = Conv(**conv, scale=NEAR_ZERO, name="conv_2")(h)

        if x.shape[-1] != self.channels:
            dense = {"kernel_init": variance_scaling(), "dtype": self.dtype}
            x = nn.Dense(self.channels, **dense, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over the H W positions of x [B, H, W, C], added to x."""

    num_heads: int
    dtype: str
    num_groups: int
    plain: bool

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        size = c // self.num_heads

        def project(y, name, scale=1.0):
            dense = {"kernel_init": variance_scaling(scale), "dtype": self.dtype}
            return nn.Dense(c, **dense, name=name)(y)

        y = group_norm(x, num_groups=self.num_groups, plain=self.plain, name="norm")
        y = y.reshape(b, h * w, c)
        heads = (b, h * w, self.num_heads, size)
        q, k, v = (project(y, name).reshape(heads) for name in ("query", "key", "value"))
        if self.plain:
            y = nn.dot_product_attention(q, k, v, force_fp32_for_softmax=True)
        else:
            # Without a head axis between positions and channels, [B heads, H W, size], the layer
            # took 213 instead of 246 ms forward and backward on CPUs (14x14x64, batch 128).
            q, k, v = (u.swapaxes(1, 2).reshape(-1, h * w, size) for u in (q, k, v))
            logits = jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits * size**-0.5, axis=-1).astype(self.dtype)
            y = jnp.einsum("nqk,nkd->nqd", weights, v)
            y = y.reshape(b, self.num_heads, h * w, size).swapaxes(1, 2)
        y = project(y.reshape(b, h * w, c), "proj_out", NEAR_ZERO)
        return x + y.reshape(b, h, w, c)


class UNet(nn.Module):
    """Ho et al.'s U-Net: x [B, H, W, C], t [B] -> [B, H, W, out_channels] float32.

    Attributes:
      out_channels: channels of the output; twice those of the image for a learned variance.
      channels: width; level l of the network has channels * channel_mults[l].
      channel_mults: one entry per level; each level but the last halves the image, rounding up.
      num_res_blocks: residual blocks per level on the way down, and one more on the way up.
      attention_resolutions: a level has attention after each block if its smaller side is one of
        these. The middle has attention too, unless this is empty.
      num_heads: attention heads.
      head_channels: if positive, channels per head; num_heads then stays 1 and does not count.
      dropout: rate, in [0, 1), before the second convolution of each block.
      scale_shift: let the embedding scale and shift the second norm (Improved DDPM).
      num_classes: if positive, an embedding of the labels is added to that of the time.
      num_groups: of each norm: its largest divisor of the channels. A group of one channel takes away
        what the embedding adds to that channel: below 64 channels choose fewer groups, or scale_shift.
      dtype: "float32" or "bfloat16", the type of convolutions and dense layers. Embeddings,
        statistics of the norms, softmax and the last convolution stay float32.
      remat: recompute each residual block in the backward pass instead of storing it.
      plain: textbook form of every layer: same parameters, same function, other dropout masks.
    """

    out_channels: int
    channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    num_heads: int = 1
    head_channels: int = 0
    dropout: float = 0.1
    scale_shift: bool = False
    num_classes: int = 0
    num_groups: int = 32
    dtype: str = "float32"
    remat: bool = False
    plain: bool = False

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        """Applies the network.

        Args:
          x: [B, H, W, C], any float type.
          t: [B], the time, integer or float.
          labels: [B] int32 in [0, num_classes); required if and only if num_classes > 0.
          dropout_keys: None for no dropout, or [B] typed keys, one per example. The masks of an
            example depend on its key alone, not on its place in the batch.

        Returns:
          [B, H, W, out_channels] float32.
        """
        assert x.ndim == 4 and t.shape == x.shape[:1], (x.shape, t.shape)
        assert dropout_keys is None or dropout_keys.shape == t.shape, dropout_keys.shape
        if (labels is None) == (self.num_classes > 0):
            given = "without labels" if labels is None else "with labels"
            raise ValueError(f"a network of num_classes={self.num_classes} was called {given}")

        embedding = self.embed(t, labels)  # [B, 4 channels]
        make_block = nn.remat(ResBlock) if self.remat else ResBlock
        layer = 0

        def block(h, level, name):
            nonlocal layer
            layer += 1
            channels = self.channels * self.channel_mults[level]
            options = (self.dropout, self.scale_shift, self.dtype, self.num_groups, self.plain)
            return make_block(channels, *options, layer, name=name)(h, embedding, dropout_keys)

        def attention(h, name):
            heads = h.shape[-1] // self.head_channels if self.head_channels else self.num_heads
            return Attention(heads, self.dtype, self.num_groups, self.plain, name=name)(h)

        def block_and_attention(h, level, name):
            h = block(h, level, name.format("block"))
            if min(h.shape[1:3]) in self.attention_resolutions:
                h = attention(h, name.format("attention"))
            return h

        conv = {"dtype": self.dtype, "plain": self.plain}
        last = len(self.channel_mults) - 1

        h = Conv(self.channels, **conv, name="conv_in")(x)
        skips = [h]
        for level in range(last + 1):
            for i in range(self.num_res_blocks):
                h = block_and_attention(h, level, f"down_{level}_{{}}_{i}")
                skips.append(h)
            if level < last:
                h = Conv(h.shape[-1], **conv, stride=2, name=f"down_{level}_downsample")(h)
                skips.append(h)

        h = block(h, last, "middle_block_0")
        if self.attention_resolutions:
            h = attention(h, "middle_attention")
        h = block(h, last, "middle_block_1")

        for level in reversed(range(last + 1)):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block_and_attention(h, level, f"up_{level}_{{}}_{i}")
            if level > 0:
                h = Conv(h.shape[-1], **conv, upsample=True, name=f"up_{level}_upsample")(h)
                h = h[:, : skips[-1].shape[1], : skips[-1].shape[2]]  # odd sizes: 4 -> 8 -> 7
        assert not skips

        norm = {"num_groups": self.num_groups, "plain": self.plain}
        h = nn.swish(group_norm(h, **norm, name="norm_out"))
        conv_out = Conv(self.out_channels, "float32", self.plain, scale=NEAR_ZERO, name="conv_out")
        return conv_out(h)

    def embed(self, t, labels):
        """The vector that every residual block sees, [B, 4 channels] float32."""
        width = 4 * self.channels
        h = time_embedding(t, self.channels)
        h = nn.Dense(width, kernel_init=variance_scaling(), name="time_dense_1")(h)
        h = nn.Dense(width, kernel_init=variance_scaling(), name="time_dense_2")(nn.swish(h))
        if self.num_classes > 0:
            init = label_initializer
            h += nn.Embed(self.num_classes, width, embedding_init=init, name="label_emb")(labels)
        return nn.swish(h)


def init_params(unet: UNet, key: jax.Array, image_shape: tuple[int, int, int]) -> dict:
    """Draws the parameters, a tree of float32, for images of `image_shape` (H, W, C).

    Structure, shapes and distribution are those of `unet.init(...)["params"]`, but the network is
    only traced and never compiled: CIFAR-10's network takes 3 s instead of 17 to 34 s. A leaf
    depends on `key`, its path and its shape only.
    """
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    labels = t if unet.num_classes > 0 else None
    tree = jax.eval_shape(unet.init, jax.random.key(0), x, t, labels)["params"]
    leaves, treedef = jax.tree.flatten_with_path(tree)

    def draw(path, leaf):
        *_, layer, name = path
        leaf_key = jax.random.fold_in(key, np.uint32(zlib.crc32("/".join(path).encode())))
        if name == "embedding":
            return label_initializer(leaf_key, leaf.shape, jnp.float32)
        if name != "kernel":
            return jnp.full(leaf.shape, float(name == "scale"), jnp.float32)
        # Drawn flat, in a power of two of numbers: nine generators to compile, not one per shape.
        fan_avg = math.prod(leaf.shape[:-2]) * sum(leaf.shape[-2:]) / 2
        bound = math.sqrt(3 * (NEAR_ZERO if layer in NEAR_ZERO_LAYERS else 1.0) / fan_avg)
        drawn = 2 ** math.ceil(math.log2(leaf.size))
        flat = jax.random.uniform(leaf_key, (drawn,), jnp.float32, -bound, bound)
        return flat[: leaf.size].reshape(leaf.shape)

    paths = [tuple(entry.key for entry in path) for path, _ in leaves]
    return treedef.unflatten(
        [draw(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)]
    )


def check(image_shape: tuple[int, ...], **model_kwargs) -> None:
    """Raises ValueError, in one line, if no `UNet(**model_kwargs)` exists for such images.

    Args:
      image_shape: (H, W, C).
      **model_kwargs: fields of UNet; out_channels may be missing.
    """
    unet = UNet(**{"out_channels": 1, **model_kwargs})

    def is_integer(value, least):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        return whole and value >= least

    if len(image_shape) != 3 or not all(is_integer(side, 1) for side in image_shape):
        raise ValueError(
            f"image_shape={image_shape} should be three positive integers, (H, W, C), "
            "such as (32, 32, 3)"
        )
    least = {"out_channels": 1, "channels": 2, "num_res_blocks": 1, "num_heads": 1, "num_groups": 1}
    least |= {"head_channels": 0, "num_classes": 0}
    for name, value in least.items():
        if not is_integer(getattr(unet, name), value):
            raise ValueError(
                f"{name}={getattr(unet, name)!r} should be an integer of at least {value}"
            )
    for name, empty in (("channel_mults", False), ("attention_resolutions", True)):
        values = getattr(unet, name)
        is_sequence = isinstance(values, (tuple, list))
        if not (is_sequence and (values or empty) and all(is_integer(v, 1) for v in values)):
            example = "(1, 2, 2, 2)" if name == "channel_mults" else "(16,), or () for none"
            raise ValueError(f"{name}={values!r} should be positive integers, such as {example}")
    if not 0 <= unet.dropout < 1:
        raise ValueError(f"dropout={unet.dropout} is outside [0, 1); Ho et al. use 0.1")
    if unet.dtype not in DTYPES:
        (nearest,) = difflib.get_close_matches(str(unet.dtype), DTYPES, n=1, cutoff=0.0)
        raise ValueError(
            f"dtype={unet.dtype!r} is none of {', '.join(DTYPES)}; did you mean {nearest!r}?"
        )

    height, width, _ = image_shape
    levels = len(unet.channel_mults)
    if min(height, width) < 2 ** (levels - 1):
        raise ValueError(
            f"image {height}×{width} is too small for {levels} levels; "
            f"the smallest side that works is {2 ** (levels - 1)}"
        )
    sides = [-(-min(height, width) // 2**level) for level in range(levels)]
    for resolution in unet.attention_resolutions:
        if resolution not in sides:
            raise ValueError(
                f"attention_resolutions: no level has smaller side {resolution}; "
                f"levels are {', '.join(map(str, sides))}"
            )

    if unet.num_heads > 1 and unet.head_channels > 0:
        raise ValueError(
            f"num_heads={unet.num_heads} and head_channels={unet.head_channels} are both set; "
            "give one, and leave num_heads=1 or head_channels=0"
        )
    attended = {
        unet.channels * mult
        for side, mult in zip(sides, unet.channel_mults, strict=True)
        if side in unet.attention_resolutions
    }
    if unet.attention_resolutions:
        attended.add(unet.channels * unet.channel_mults[-1])  # the middle
    name = "head_channels" if unet.head_channels else "num_heads"
    heads = getattr(unet, name)
    for channels in sorted(attended):
        if channels % heads != 0:
            common = math.gcd(*attended)
            divisors = [d for d in range(1, common + 1) if common % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - heads))
            raise ValueError(
                f"{name}={heads} does not divide the {channels} channels of a level with "
                f"attention; the nearest that works is {nearest}"
            )
