"""The network of Ho et al., "Denoising Diffusion Probabilistic Models" (2020), Appendix B.

A U-Net of residual blocks with self-attention at chosen resolutions, conditioned on an integer (time)
and, if wished, on a label. It knows no diffusion: it maps an image and a number per image to an image.
Options beyond Ho et al. follow Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic
Models" (2021), Section 3 and Appendix A: several heads, scale-shift conditioning, labels.

Images are [B, H, W, C]; parameters are always float32.
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
NEAR_ZERO = ("conv_2", "proj_out", "conv_out")  # kernels that start at (almost) zero


def variance_scaling(scale: float = 1.0):
    """Ho et al.'s kernel initialiser: uniform with variance scale / fan_avg."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def num_groups(channels: int) -> int:
    """The largest divisor of `channels` that is at most 32."""
    return max(g for g in range(1, 33) if channels % g == 0)


def time_embedding(t: jax.Array, channels: int) -> jax.Array:
    """Sinusoids of t [B] -> [B, channels] float32: all sines first, then all cosines.

    Frequencies fall geometrically from 1 to 1/10000 inclusive (Ho et al. divide by half - 1).
    """
    half = channels // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / max(half - 1, 1))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, channels % 2)))


LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel, padding, stride=1):
    """x [B, H, W, I] * kernel [k, k, I, O], zeros around the image: padding ((top, bottom), (left, right))."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT
    )


@jax.custom_vjp
def convolve_same(x, kernel):
    """A convolution with its image padded by one on every side and a backward pass fit for CPUs.

    XLA:CPU reaches a fraction of the processor's speed in the gradient of the kernel: 96 ms against 30 ms as
    the matrix product below (28 x 28 x 32, batch 128, 2 cores), 2900 ms against 54 ms in the 2 x 2
    convolution of `Upsample`. It also falls to naive loops inside `lax.scan`, as both products here do not.
    GPUs and TPUs keep their own kernels.
    """
    return convolve(x, kernel, ((1, 1), (1, 1)))


def convolve_forward(x, kernel):
    return convolve_same(x, kernel), (x, kernel)


def convolve_backward(residuals, g):
    x, kernel = residuals
    k = kernel.shape[0]
    pad = ((k - 2, k - 2), (k - 2, k - 2))
    x_bar = convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), pad)

    def as_convolution(x, g):
        return jax.vjp(lambda kernel: convolve(x, kernel, ((1, 1), (1, 1))), kernel)[1](g)[0]

    def as_product(x, g):
        # kernel_bar[i, j] = sum over b, h, w of x[b, h + i, w + j] g[b, h, w]: the j are shifts of x, the i shifts of g,
        # and all k k taps one product.
        width = g.shape[2]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jnp.concatenate([x[:, :, j : j + width] for j in range(k)], axis=-1)
        g = jnp.concatenate(
            [jnp.pad(g, ((0, 0), (i, k - 1 - i), (0, 0), (0, 0))) for i in range(k)], axis=-1
        )
        taps = jax.lax.dot_general(
            x, g, (((0, 1, 2), (0, 1, 2)), ((), ())), preferred_element_type=jnp.float32
        )
        return (
            taps.reshape(k, kernel.shape[2], k, kernel.shape[3])
            .transpose(2, 0, 1, 3)
            .astype(kernel.dtype)
        )

    return x_bar, jax.lax.platform_dependent(x, g, cpu=as_product, default=as_convolution)


convolve_same.defvjp(convolve_forward, convolve_backward)


class Conv(nn.Module):
    """A 3x3 convolution that keeps the size of the image, or halves it (rounded up)."""

    features: int
    dtype: str
    plain: bool
    stride: int = 1
    gain: float = 1.0

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", variance_scaling(self.gain), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        if self.plain or self.stride > 1:
            y = convolve(x, kernel, "SAME", self.stride)
        else:
            y = convolve_same(x, kernel)
        return y + bias[None, None, None, :]


class GroupNorm(nn.Module):
    """Group normalisation as one fused x * a + b per image and channel.

    The parameters and the function are those of nn.GroupNorm; `scale` and `shift` [B, C] are
    Improved DDPM's conditioning, normalised * (1 + scale) + shift, folded into a and b.
    """

    @nn.compact
    def __call__(self, x, scale=None, shift=None):
        channels = x.shape[-1]
        groups = num_groups(channels)
        gamma = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)[None, :]
        beta = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)[None, :]

        def over_group(v):  # [B, C] -> [B, C], each channel the mean of its group
            mean = v.reshape(-1, groups, channels // groups).mean(axis=2)
            return jnp.repeat(mean, channels // groups, axis=1)

        x = x.astype(jnp.float32)
        pivot = jax.lax.stop_gradient(x[:, :1, :1, :])
        centred = x - pivot
        mean = centred.mean(axis=(1, 2))  # [B, C]
        square = jnp.square(centred).mean(axis=(1, 2))
        pivot = pivot[:, 0, 0, :]
        mu = over_group(mean + pivot) - pivot
        variance = over_group(square - mean**2 + (mean - mu) ** 2)
        a = gamma * jax.lax.rsqrt(variance + EPSILON)
        b = beta
        if scale is not None:
            a, b = a * (1 + scale), b * (1 + scale) + shift
        b = b - mu * a
        return centred * a[:, None, None, :] + b[:, None, None, :]


def group_norm(x, name, plain, scale=None, shift=None):
    if not plain:
        return GroupNorm(name=name)(x, scale, shift)
    y = nn.GroupNorm(num_groups(x.shape[-1]), epsilon=EPSILON, dtype=jnp.float32, name=name)(x)
    return y if scale is None else y * (1 + scale)[:, None, None, :] + shift[:, None, None, :]


def drop(x: jax.Array, rate: float, keys: jax.Array, layer: int) -> jax.Array:
    """Dropout of x [B, ...] whose mask depends on the example's key, keys [B], and `layer` alone.

    The rate is rounded to 1/65536, so that one 32-bit draw serves two elements; what is kept is
    scaled by the rounded rate, hence the expectation is exact.
    """
    shape = x.shape[1:]
    size = math.prod(shape)
    threshold = round(rate * 65536)

    def mask(key):
        bits = jax.random.bits(jax.random.fold_in(key, layer), (size + size % 2) // 2)
        bits = jnp.concatenate([bits & 0xFFFF, bits >> 16])
        return (bits[:size] >= threshold).reshape(shape)

    return jnp.where(jax.vmap(mask)(keys), x / (1 - threshold / 65536), 0.0)


class Upsample(nn.Module):
    """Nearest-neighbour x 2, then a 3x3 convolution: [B, H, W, C] -> [B, 2 H, 2 W, C]."""

    dtype: str
    plain: bool

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        kernel = self.param("kernel", variance_scaling(), (3, 3, c, c), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        if self.plain:
            x = jax.image.resize(x, (b, 2 * h, 2 * w, c), "nearest")
            y = convolve(x, kernel, "SAME")
        else:
            # Of the three rows of the kernel, each output row sees only two rows of x.
            fold = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
            fold = fold.astype(self.dtype)
            kernel = jnp.einsum("pky,qlx,yxio->klipqo", fold, fold, kernel)
            y = convolve_same(x, kernel.reshape(2, 2, c, 4 * c)).reshape(b, h + 1, w + 1, 2, 2, c)
            rows = [
                jnp.stack([y[:, p : p + h, q : q + w, p, q] for q in (0, 1)], axis=3)
                for p in (0, 1)
            ]
            y = jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, c)
        return y + bias[None, None, None, :]


class ResBlock(nn.Module):
    """Residual block: norm, swish, conv, + time, norm, swish, dropout, conv, + shortcut."""

    channels: int
    dropout: float
    scale_shift: bool
    dtype: str
    plain: bool
    layer: int  # number of the block in the network, folded into the dropout keys

    @nn.compact
    def __call__(self, x, embedding, dropout_keys):
        h = nn.swish(group_norm(x, "norm_1", self.plain))
        h = Conv(self.channels, self.dtype, self.plain, name="conv_1")(h)
        width = self.channels * (2 if self.scale_shift else 1)
        e = nn.Dense(width, kernel_init=variance_scaling(), name="dense_time")(embedding)  # [B, C]
        if self.scale_shift:
            h = group_norm(h, "norm_2", self.plain, *jnp.split(e, 2, axis=1))
        else:
            h = group_norm(h + e[:, None, None, :], "norm_2", self.plain)
        h = nn.swish(h)
        if dropout_keys is not None and self.dropout > 0:
            if self.plain:
                keys = jax.vmap(lambda key: jax.random.fold_in(key, self.layer))(dropout_keys)
                keep = 1 - self.dropout
                mask = jax.vmap(lambda key: jax.random.bernoulli(key, keep, h.shape[1:]))(keys)
                h = jnp.where(mask, h / keep, 0.0)
            else:
                h = drop(h, self.dropout, dropout_keys, self.layer)
        h = Conv(self.channels, self.dtype, self.plain, gain=1e-10, name="conv_2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(
                self.channels, kernel_init=variance_scaling(), dtype=self.dtype, name="shortcut"
            )(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over the H W positions, added to x [B, H, W, C]."""

    num_heads: int
    dtype: str
    plain: bool

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        size = c // self.num_heads

        def project(y, name, scale=1.0):
            init = variance_scaling(scale)
            return nn.Dense(c, kernel_init=init, dtype=self.dtype, name=name)(y)

        y = group_norm(x, "norm", self.plain).reshape(b, h * w, c)
        q, k, v = (
            project(y, name).reshape(b, h * w, self.num_heads, size)
            for name in ("query", "key", "value")
        )
        if self.num_heads == 1 and not self.plain:
            q, k, v = (u.reshape(b, h * w, size) for u in (q, k, v))
            logits = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits * size**-0.5, axis=-1).astype(self.dtype)
            y = jnp.einsum("bqk,bkd->bqd", weights, v)
        else:
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits * size**-0.5, axis=-1).astype(self.dtype)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        y = project(y.reshape(b, h * w, c), "proj_out", 1e-10)
        return x + y.reshape(b, h, w, c)


class UNet(nn.Module):
    """The U-Net of Ho et al."""

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
    dtype: str = "float32"
    remat: bool = False
    plain: bool = False

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        dense = {"kernel_init": variance_scaling()}
        emb = time_embedding(t, self.channels)
        emb = nn.Dense(4 * self.channels, **dense, name="time_dense_1")(emb)
        emb = nn.Dense(4 * self.channels, **dense, name="time_dense_2")(nn.swish(emb))
        if self.num_classes > 0:
            emb += nn.Embed(
                self.num_classes,
                4 * self.channels,
                embedding_init=nn.initializers.normal(1.0),
                name="label_embedding",
            )(labels)
        emb = nn.swish(emb)  # [B, 4 channels]

        layer = 0
        Block = nn.remat(ResBlock) if self.remat else ResBlock

        def block(h, name, mult):
            nonlocal layer
            layer += 1
            c = self.channels * mult
            return Block(
                c, self.dropout, self.scale_shift, self.dtype, self.plain, layer, name=name
            )(h, emb, dropout_keys)

        def attention(h, name):
            heads = h.shape[-1] // self.head_channels if self.head_channels else self.num_heads
            return Attention(heads, self.dtype, self.plain, name=name)(h)

        levels = len(self.channel_mults)
        h = Conv(self.channels, self.dtype, self.plain, name="conv_in")(x)
        skips = [h]
        for level, mult in enumerate(self.channel_mults):
            for i in range(self.num_res_blocks):
                h = block(h, f"down_{level}_block_{i}", mult)
                if min(h.shape[1:3]) in self.attention_resolutions:
                    h = attention(h, f"down_{level}_attention_{i}")
                skips.append(h)
            if level < levels - 1:
                name = f"down_{level}_downsample"
                h = Conv(h.shape[-1], self.dtype, self.plain, stride=2, name=name)(h)
                skips.append(h)

        h = block(h, "middle_block_0", self.channel_mults[-1])
        h = attention(h, "middle_attention")
        h = block(h, "middle_block_1", self.channel_mults[-1])

        for level, mult in reversed(list(enumerate(self.channel_mults))):
            for i in range(self.num_res_blocks + 1):
                skip = skips.pop()
                h = h[:, : skip.shape[1], : skip.shape[2]]
                h = block(jnp.concatenate([h, skip], axis=-1), f"up_{level}_block_{i}", mult)
                if min(h.shape[1:3]) in self.attention_resolutions:
                    h = attention(h, f"up_{level}_attention_{i}")
            if level > 0:
                h = Upsample(self.dtype, self.plain, name=f"up_{level}_upsample")(h)

        h = nn.swish(group_norm(h, "norm_out", self.plain)).astype(jnp.float32)
        return Conv(self.out_channels, "float32", self.plain, gain=1e-10, name="conv_out")(h)


def init_params(unet: UNet, key: jax.Array, image_shape: tuple[int, int, int]):
    """Draws float32 parameters leaf by leaf, without compiling the network."""
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    i = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = jax.eval_shape(lambda x, i: unet.init(jax.random.key(0), x, i, i), x, i)["params"]

    def draw(path, leaf):
        *_, module, name = (p.key for p in path)
        if name in ("bias", "scale"):
            return jnp.full(leaf.shape, float(name == "scale"))
        leaf_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if name == "embedding":
            return jax.random.normal(leaf_key, leaf.shape)
        return variance_scaling(1e-10 if module in NEAR_ZERO else 1.0)(leaf_key, leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def check(image_shape, **model_kwargs) -> None:
    """Raises ValueError, in one line, for a network that cannot be."""
    UNet(**model_kwargs)
    del image_shape, difflib
