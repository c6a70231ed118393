"""The network of Ho et al., "Denoising Diffusion Probabilistic Models" (2020), Appendix B.

A U-Net of residual blocks with self-attention at chosen resolutions, conditioned on the time and optionally on a label.
Several heads, scale-shift conditioning and labels follow Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic
Models" (2021), Section 3 and Appendix A. The last fields are details in which the networks of other codebases differ.
"""

from __future__ import annotations

import math
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ddpm_jax.names import check_choice
from ddpm_jax.networks.layers import (
    EPSILON,
    NEAR_ZERO,
    NEAR_ZERO_LAYERS,
    Attention,
    Conv,
    ResBlock,
    group_norm,
    label_initializer,
    time_embedding,
    variance_scaling,
)

DTYPES = ("float32", "bfloat16")
MOST = 2**20  # channels, groups, heads or classes: with more, shapes overflow before memory does
NUM_GROUPS = 32  # default number of groups of a norm, if each then has at least four channels


class UNet(nn.Module):
    """Ho et al.'s U-Net: x [B, H, W, C], t [B] -> [B, H, W, out_channels] float32.

    Attributes:
      out_channels: channels of the output, which a `DDPM` fills in.
      channels: base width; level l of the network has channels * channel_mults[l].
      channel_mults: one entry per level, a whole number, or a fraction that makes the channels whole; each level except
        the last halves the image, rounding up.
      num_res_blocks: residual blocks per level on the way down, and one more on the way up.
      attention_resolutions: levels whose smaller side is one of these have attention after each block,
        and so does the middle, unless this is empty. None for the first level of at most 16.
      num_heads: attention heads.
      head_channels: if positive, channels per head, in place of num_heads.
      dropout: rate in [0, 1), before the second convolution of each block.
      scale_shift: the embedding scales and shifts the second norm (Improved DDPM).
      num_classes: if positive, an embedding of the labels is added to that of the time.
      num_groups: groups of each norm, or the largest smaller divisor of its channels. None for 32, or
        fewer so that each group of `channels` has four. (A group of a single channel removes what the
        embedding adds to that channel.)
      dtype: "float32" or "bfloat16", for convolutions and dense layers. Embeddings, norms, softmax
        and the last convolution are always float32.
      remat: recompute each residual block in the backward pass instead of storing it.
      remat_resolutions: recompute only the blocks at levels whose smaller side is one of these, which hold the most.
      plain: the textbook form of every layer: same parameters and function, other dropout masks.
      norm_epsilon: added to the variance in each norm; 1e-6 in Ho et al.'s code, 1e-5 in Improved DDPM's.
      downsample_padding: 0 pads a convolution that halves the image at its end only, as Ho et al.'s code does; 1 on both
        sides, as Improved DDPM's.
      resample_blocks: levels are halved and doubled by residual blocks, not by convolutions (Dhariwal and Nichol 2021).
      middle_attention: whether the middle has attention. None for wherever another level has it.
      middle_groups: groups of the norm of the middle's attention; 0 for no norm. None for those of the other norms.
      time_scale: what the time is multiplied by; 1000/T in Improved DDPM's code.
      frequency_shift, cosine_first: of the time embedding, see `layers.time_embedding`; 0 and True in Improved DDPM's code.
      center_input: the network receives 2x − 1.

    >>> network = dj.UNet(channels=8, channel_mults=(1, 2), num_res_blocks=1, out_channels=1)
    >>> x, t = jnp.zeros((2, 8, 8, 1)), jnp.array([0, 999])
    >>> params = network.init_params(jax.random.key(0), (8, 8, 1))
    >>> network.apply({"params": params}, x, t).shape
    (2, 8, 8, 1)
    """

    out_channels: int = 3
    channels: int = 128
    channel_mults: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] | None = None
    num_heads: int = 1
    head_channels: int = 0
    dropout: float = 0.1
    scale_shift: bool = False
    num_classes: int = 0
    num_groups: int | None = None
    dtype: str = "float32"
    remat: bool = False
    remat_resolutions: tuple[int, ...] = ()
    plain: bool = False
    norm_epsilon: float = EPSILON
    downsample_padding: int = 0
    resample_blocks: bool = False
    middle_attention: bool | None = None
    middle_groups: int | None = None
    time_scale: float = 1.0
    frequency_shift: float = 1.0
    cosine_first: bool = False
    center_input: bool = False

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        """Applies the network.

        Args:
          x: [B, H, W, C], any float type.
          t: [B], the time, integer or float.
          labels: [B] int32 in [0, num_classes); None if num_classes is 0.
          dropout_keys: [B] typed keys; None for no dropout. The masks of an example depend on its key only.

        Returns:
          [B, H, W, out_channels] float32.
        """
        assert x.ndim == 4 and t.shape == x.shape[:1], (x.shape, t.shape)
        assert dropout_keys is None or dropout_keys.shape == t.shape, dropout_keys.shape
        if (labels is None) == (self.num_classes > 0):
            how = "without labels" if labels is None else "with labels"
            raise ValueError(f"a network of num_classes={self.num_classes} was called {how}")
        norm, attended = (self.groups, self.norm_epsilon), self.attended(x.shape[1:3])

        embedding = self.embed(t, labels)  # [B, 4 channels]
        layer = 0

        def block(h, level, name, resample=""):
            nonlocal layer
            layer += 1
            channels = self.level_channels[level]
            options = (self.dropout, self.scale_shift, self.dtype, norm, self.plain)
            remat = self.remat or min(h.shape[1:3]) in self.remat_resolutions
            make_block = nn.remat(ResBlock) if remat else ResBlock
            h = make_block(channels, *options, layer, resample, name=name)(
                h, embedding, dropout_keys
            )
            return h

        def resampled(h, level, way):
            name = f"{way}_{level}_{way}sample"
            if self.resample_blocks:
                return block(h, level, name, way)
            padding = ((1, 1), (1, 1)) if self.downsample_padding else "SAME"
            how = {"stride": 2, "padding": padding} if way == "down" else {"upsample": True}
            return Conv(h.shape[-1], self.dtype, self.plain, name=name, **how)(h)

        def attention(h, name, norm=norm):
            heads = h.shape[-1] // self.head_channels if self.head_channels else self.num_heads
            return Attention(heads, self.dtype, norm, self.plain, name=name)(h)

        def block_and_attention(h, level, name):
            h = block(h, level, name.format("block"))
            if min(h.shape[1:3]) in attended:
                h = attention(h, name.format("attention"))
            return h

        last = len(self.channel_mults) - 1

        x = 2 * x - 1 if self.center_input else x
        h = Conv(self.channels, self.dtype, self.plain, name="conv_in")(x)
        skips = [h]
        for level in range(last + 1):
            for i in range(self.num_res_blocks):
                h = block_and_attention(h, level, f"down_{level}_{{}}_{i}")
                skips.append(h)
            if level < last:
                h = resampled(h, level, "down")
                skips.append(h)

        h = block(h, last, "middle_block_0")
        if self.has_middle_attention(attended):
            groups = norm[0] if self.middle_groups is None else self.middle_groups
            h = attention(h, "middle_attention", (groups, norm[1]))
        h = block(h, last, "middle_block_1")

        for level in reversed(range(last + 1)):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block_and_attention(h, level, f"up_{level}_{{}}_{i}")
            if level > 0:
                h = resampled(h, level, "up")
                h = h[:, : skips[-1].shape[1], : skips[-1].shape[2]]  # odd sizes: 4 -> 8 -> 7
        assert not skips

        h = nn.swish(group_norm(h, norm=norm, plain=self.plain, name="norm_out"))
        conv_out = Conv(self.out_channels, "float32", self.plain, scale=NEAR_ZERO, name="conv_out")
        return conv_out(h)

    def embed(self, t, labels):
        """The embedding of time and label that every residual block uses, [B, 4 channels] float32."""
        width = 4 * self.channels
        h = time_embedding(
            t if self.time_scale == 1 else t * self.time_scale,
            self.channels,
            frequency_shift=self.frequency_shift,
            cosine_first=self.cosine_first,
        )
        h = nn.Dense(width, kernel_init=variance_scaling(), name="time_dense_1")(h)
        h = nn.Dense(width, kernel_init=variance_scaling(), name="time_dense_2")(nn.swish(h))
        if self.num_classes > 0:
            init = label_initializer
            h += nn.Embed(self.num_classes, width, embedding_init=init, name="label_emb")(labels)
        return nn.swish(h)

    @property
    def groups(self) -> int:
        """num_groups, or its default."""
        if self.num_groups is not None:
            return self.num_groups
        return max(1, min(NUM_GROUPS, self.channels // 4))

    @property
    def level_channels(self) -> list[int]:
        """The number of channels of each level."""
        return [round(self.channels * mult) for mult in self.channel_mults]

    def sides(self, image_size: tuple[int, ...]) -> list[int]:
        """The smaller side of the image at each level."""
        return [-(-min(image_size[:2]) // 2**level) for level in range(len(self.channel_mults))]

    def attended(self, image_size: tuple[int, ...]) -> tuple[int, ...]:
        """attention_resolutions, or the default for images (H, W)."""
        if self.attention_resolutions is not None:
            return tuple(self.attention_resolutions)
        sides = self.sides(image_size)
        return (next((side for side in sides if side <= 16), sides[-1]),)

    def init_params(self, key: jax.Array, image_shape: tuple[int, int, int]) -> dict:
        """Initialises the parameters, a tree of float32, for images of shape (H, W, C).

        The tree and the distributions are those of `self.init(...)["params"]`, but nothing is compiled: the CIFAR-10
        network takes 3 s instead of 17 to 34 s. A leaf depends only on `key`, its path and its shape.
        """
        x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.int32)
        labels = t if self.num_classes > 0 else None
        tree = jax.eval_shape(self.init, jax.random.key(0), x, t, labels)["params"]
        leaves, treedef = jax.tree.flatten_with_path(tree)
        paths = [tuple(entry.key for entry in path) for path, _ in leaves]
        return treedef.unflatten(
            [_draw(key, path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)]
        )

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raises ValueError, of one line, if fields are impossible or do not fit images of shape (H, W, C)."""
        self._check_numbers(image_shape)
        sides, attended = self.sides(image_shape), self.attended(image_shape)
        if min(image_shape[:2]) < 2 ** (len(sides) - 1):
            raise ValueError(
                f"image {image_shape[0]}×{image_shape[1]} is too small for {len(sides)} levels; "
                f"the smallest side that works is {2 ** (len(sides) - 1)}"
            )
        named = {"attention_resolutions": attended, "remat_resolutions": self.remat_resolutions}
        for name, resolutions in named.items():
            for resolution in resolutions:
                if resolution not in sides:
                    raise ValueError(
                        f"{name}: no level has smaller side {resolution}; "
                        f"levels are {', '.join(map(str, sides))}"
                    )
        self._check_heads(sides, attended)
        if self.groups >= self.channels and not self.scale_shift:
            logging.warning(
                "config.model: a group norm of %d channels in %d groups takes away what the time embedding"
                " adds; set num_groups=%d or less",
                *(self.channels, self.channels, max(1, self.channels // 4)),
            )

    def has_middle_attention(self, attended: tuple[int, ...]) -> bool:
        """middle_attention, or its default."""
        return bool(attended) if self.middle_attention is None else self.middle_attention

    def _check_numbers(self, image_shape) -> None:
        if len(image_shape) != 3 or not all(_is_integer(side, 1) for side in image_shape):
            raise ValueError(
                f"image_shape={image_shape} should be three positive integers, (H, W, C), "
                "such as (32, 32, 3)"
            )
        least = {"out_channels": 1, "channels": 2, "num_res_blocks": 1, "num_heads": 1}
        least |= {"head_channels": 0, "num_classes": 0}
        least |= {} if self.num_groups is None else {"num_groups": 1}
        least |= {} if self.middle_groups is None else {"middle_groups": 0}
        for name, value in least.items():
            given, most = getattr(self, name), 1000 if name == "num_res_blocks" else MOST
            if not _is_integer(given, value) or given > most:
                raise ValueError(f"{name}={given!r} should be an integer from {value} to {most:,}")
        mults, sides = self.channel_mults, self.attention_resolutions
        if not isinstance(mults, (tuple, list)) or not mults or not all(map(self._fits, mults)):
            raise ValueError(
                f"channel_mults={mults!r} should be positive numbers, such as (1, 2, 2, 2), that make whole"
                f" numbers of channels of channels={self.channels}"
            )
        is_sequence = isinstance(sides, (tuple, list))
        if sides is not None and not (is_sequence and all(_is_integer(v, 1) for v in sides)):
            raise ValueError(
                f"attention_resolutions={sides!r} should be positive integers, such as (16,), or () for none"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is outside [0, 1); Ho et al. use 0.1")
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon={self.norm_epsilon} is outside (0, 1); use 1e-6")
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding={self.downsample_padding} should be 0 or 1")
        check_choice("dtype", self.dtype, DTYPES)

    def _fits(self, mult) -> bool:
        """Whether a multiple of the base width is a positive whole number of channels."""
        number = isinstance(mult, (int, float, np.number)) and not isinstance(mult, bool)
        return number and 0 < self.channels * mult <= MOST and (self.channels * mult) % 1 == 0

    def _check_heads(self, sides, attended) -> None:
        if self.num_heads > 1 and self.head_channels > 0:
            raise ValueError(
                f"num_heads={self.num_heads} and head_channels={self.head_channels} are both set; "
                "set only one, and leave num_heads=1 or head_channels=0"
            )
        levels = self.level_channels
        widths = {width for side, width in zip(sides, levels, strict=True) if side in attended}
        if self.has_middle_attention(attended):
            widths.add(levels[-1])
        name = "head_channels" if self.head_channels else "num_heads"
        heads = getattr(self, name)
        for channels in sorted(widths):
            if channels % heads != 0:
                common = math.gcd(*widths)
                divisors = [d for d in range(1, common + 1) if common % d == 0]
                near = min(divisors, key=lambda d: abs(d - heads))
                raise ValueError(
                    f"{name}={heads} does not divide the {channels} channels of a level with "
                    f"attention; the nearest that works is {near}"
                )


def _is_integer(value, least: int) -> bool:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and value >= least


def _draw(key: jax.Array, path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Draws a parameter by the name of its leaf and layer."""
    *_, layer, name = path
    leaf_key = jax.random.fold_in(key, np.uint32(zlib.crc32("/".join(path).encode())))
    if name == "embedding":
        return label_initializer(leaf_key, leaf.shape, jnp.float32)
    if name != "kernel":
        return jnp.full(leaf.shape, float(name == "scale"), jnp.float32)
    # The count of numbers is rounded up to a power of two: nine generators to compile, not one per shape.
    fan_avg = math.prod(leaf.shape[:-2]) * sum(leaf.shape[-2:]) / 2
    bound = math.sqrt(3 * (NEAR_ZERO if layer in NEAR_ZERO_LAYERS else 1.0) / fan_avg)
    drawn = 2 ** math.ceil(math.log2(leaf.size))
    flat = jax.random.uniform(leaf_key, (drawn,), jnp.float32, -bound, bound)
    return flat[: leaf.size].reshape(leaf.shape)
