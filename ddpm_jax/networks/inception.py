"""The Inception network of 2015, whose features define FID and Inception Score.

TensorFlow's graph of 2015-12-05, as used by Ho et al., StyleGAN, pytorch-fid and torch-fidelity: an
Inception v3 (Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision") that
differs from that of model zoos in its pooling, weights, 1008 logits and resizing. The weights are those
that pytorch-fid publishes; PyTorch is not needed to read them.

Largest differences from the network of torch-fidelity 0.4.0 with the same random weights and running
statistics, over images of 32×32×3, 28×28×1 and 48×31×3 and the outputs of 94 convolutions and 11 blocks:

    resize and scaling            3.6e-07 of values up to  1.0
    Conv2d_1a … Conv2d_4a         6.2e-06                 10.4
    Mixed_5b … Mixed_5d           1.1e-05                 11.0
    Mixed_6a … Mixed_6e           1.8e-05                 16.1
    Mixed_7a … Mixed_7c           2.2e-05                 22.4
    features                      4.8e-06                 10.7
    logits                        7.2e-06                  9.0

It computes 5.3 images per second on one core (AMD EPYC), and torch-fidelity with PyTorch 2.13 5.2 to 5.5.
Measured, in an environment with torch-fidelity, by

    JAX_DISABLE_MOST_OPTIMIZATIONS=0 taskset -c 1 pytest tests/test_inception.py -n 0 -s -k layer_by_layer
"""

from __future__ import annotations

import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ddpm_jax import data
from ddpm_jax.metrics import Extractor
from ddpm_jax.networks.pytorch_files import read_state_dict

SIDE = 299  # height and width of the network's input
NUM_FEATURES, NUM_LOGITS = 2048, 1008
EPSILON = 1e-3  # added to the variances in batch norms
URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
)
SIZE = 95_628_359  # bytes
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


# The network.


def resize(images):
    """Resizes [B, H, W, C] to float32 [B, 299, 299, C] as TensorFlow 1.x's resize_bilinear does.

    Output row i interpolates the input at i · H/299 (no half-pixel centres), and beyond the last row it is
    the last row. There is no antialiasing.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        size = x.shape[axis]
        # In float32, as in TensorFlow: near whole numbers the rounding decides which row is below.
        position = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
        low = position.astype(np.int32)
        high = np.minimum(low + 1, size - 1)
        weight = np.expand_dims(position - low.astype(np.float32), tuple({0, 1, 2, 3} - {axis}))
        start, end = (jnp.take(x, index, axis, mode="clip") for index in (low, high))
        x = start + (end - start) * weight
    return x


def average_pool(x):
    """The mean of the 3×3 pixels around each pixel, without those outside the image."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def convolve(x, features, kernel, name, *, stride=1, padding="SAME"):
    """A convolution, with its batch norm folded in, and a ReLU; for use inside a module."""
    conv = nn.Conv(
        features,
        (kernel, kernel) if isinstance(kernel, int) else kernel,
        (stride, stride),
        padding,
        precision=jax.lax.Precision.HIGHEST,  # full float32 on GPUs and TPUs too
        name=name,
    )
    return nn.relu(conv(x))


def chain(x, name, *layers):
    """A sequence of convolutions name_1, name_2, …, each (features, kernel)."""
    for i, (features, kernel) in enumerate(layers, 1):
        x = convolve(x, features, kernel, f"{name}_{i}")
    return x


def shrink(x, features, name):
    """A 3×3 convolution with stride 2 and no padding."""
    return convolve(x, features, 3, name, stride=2, padding="VALID")


def shrink_pool(x):
    """The maximum over 3×3 pixels with stride 2 and no padding."""
    return nn.max_pool(x, (3, 3), (2, 2))


def join(*branches):
    return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
    """A block at 35×35 with 224 + pool_features output channels; Szegedy et al., Figure 5."""

    pool_features: int

    @nn.compact
    def __call__(self, x):
        return join(
            convolve(x, 64, 1, "branch1x1"),
            chain(x, "branch5x5", (48, 1), (64, 5)),
            chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            convolve(average_pool(x), self.pool_features, 1, "branch_pool"),
        )


class BlockB(nn.Module):
    """The block from 35×35 to 17×17, which adds 480 channels; Figure 10."""

    @nn.compact
    def __call__(self, x):
        double = chain(x, "branch3x3dbl", (64, 1), (96, 3))
        return join(
            shrink(x, 384, "branch3x3"),
            shrink(double, 96, "branch3x3dbl_3"),
            shrink_pool(x),
        )


class BlockC(nn.Module):
    """A block at 17×17 with 768 output channels; 7×7 is factored into 1×7 and 7×1 of `width` channels; Figure 6."""

    width: int

    @nn.compact
    def __call__(self, x):
        c, row, column = self.width, (1, 7), (7, 1)
        double = [(c, 1), (c, column), (c, row), (c, column), (192, row)]
        return join(
            convolve(x, 192, 1, "branch1x1"),
            chain(x, "branch7x7", (c, 1), (c, row), (192, column)),
            chain(x, "branch7x7dbl", *double),
            convolve(average_pool(x), 192, 1, "branch_pool"),
        )


class BlockD(nn.Module):
    """The block from 17×17 to 8×8, which adds 512 channels; Figure 10."""

    @nn.compact
    def __call__(self, x):
        single = chain(x, "branch3x3", (192, 1))
        seven = chain(x, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)))
        return join(
            shrink(single, 320, "branch3x3_2"),
            shrink(seven, 192, "branch7x7x3_4"),
            shrink_pool(x),
        )


class BlockE(nn.Module):
    """A block at 8×8 with 2048 output channels; 3×3 is replaced by 1×3 and 3×1 in parallel; Figure 7.

    The second of the two such blocks has `max_pool`, as in the graph of 2015; the paper has average pooling.
    """

    max_pool: bool

    @nn.compact
    def __call__(self, x):
        single = chain(x, "branch3x3", (384, 1))
        double = chain(x, "branch3x3dbl", (448, 1), (384, 3))
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.max_pool else average_pool(x)
        return join(
            convolve(x, 320, 1, "branch1x1"),
            convolve(single, 384, (1, 3), "branch3x3_2a"),
            convolve(single, 384, (3, 1), "branch3x3_2b"),
            convolve(double, 384, (1, 3), "branch3x3dbl_3a"),
            convolve(double, 384, (3, 1), "branch3x3dbl_3b"),
            convolve(pooled, 192, 1, "branch_pool"),
        )


class Inception(nn.Module):
    """x [B, 299, 299, 3] in [−1, 1] -> (features [B, 2048], logits without bias [B, 1008]), float32.

    Layers have the names of the published file. Other sizes from 75×75 work too.
    """

    @nn.compact
    def __call__(self, x):
        x = shrink(x, 32, "Conv2d_1a_3x3")  # 149×149
        x = convolve(x, 32, 3, "Conv2d_2a_3x3", padding="VALID")
        x = convolve(x, 64, 3, "Conv2d_2b_3x3")
        x = shrink_pool(x)  # 73×73
        x = convolve(x, 80, 1, "Conv2d_3b_1x1")
        x = convolve(x, 192, 3, "Conv2d_4a_3x3", padding="VALID")
        x = shrink_pool(x)  # 35×35
        for letter, pool_features in (("b", 32), ("c", 64), ("d", 64)):
            x = BlockA(pool_features, name=f"Mixed_5{letter}")(x)
        x = BlockB(name="Mixed_6a")(x)  # 17×17
        for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = BlockC(width, name=f"Mixed_6{letter}")(x)
        x = BlockD(name="Mixed_7a")(x)  # 8×8
        x = BlockE(max_pool=False, name="Mixed_7b")(x)
        x = BlockE(max_pool=True, name="Mixed_7c")(x)
        features = x.mean(axis=(1, 2))
        dense = nn.Dense(NUM_LOGITS, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")
        return features, dense(features)


def preprocess(images):
    """Converts uint8 [B, H, W, 1 or 3] to the network's input, float32 [B, 299, 299, 3]."""
    x = (resize(images) - 128.0) / 128.0
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def extractor(params: dict, *, sha256: str) -> Extractor:
    """The network as an Extractor, on the default device. It compiles once for each shape of a batch.

    Args:
      params: as `convert` returns them.
      sha256: that of their file.
    """
    network = Inception()
    params = jax.device_put(params)

    @jax.jit
    def apply(params, images):
        return network.apply({"params": params}, preprocess(images))

    def features(images):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, H, W, 1 or 3]"
            )
        return apply(params, images)

    return Extractor(
        name="inception-v3-compat",
        sha256=sha256,
        resize=f"TensorFlow 1.x bilinear to {SIDE}×{SIDE}",
        features=features,
    )


# The weights.

NORM = ("weight", "bias", "running_mean", "running_var")  # arrays of a batch norm in PyTorch


def load(path: str | os.PathLike = "") -> Extractor:
    """The network with the published weights, after a check of the file's size and SHA-256 sum.

    Args:
      path: the file. By default a copy in the caches of ddpm_jax or PyTorch, or else a download (96 MB) into
        ~/.cache/ddpm_jax.

    Raises:
      DataError: one line: the file does not exist, is another one or is damaged.
    """
    try:
        path = Path(os.path.expanduser(path)) if path else _cached()
        if not path.is_file():
            raise data.DataError(
                f"no Inception weights at {path}: put {URLS[0]} there, or leave out the path to download it"
            )
        if fault := data.damage(path, SIZE, SHA256):
            raise data.DataError(
                f"{path} is not the Inception of 2015-12-05, or is damaged: {fault}; "
                f"replace it with {URLS[0]}"
            )
    except OSError as error:
        raise data.DataError(f"Inception weights: {error}") from error
    return extractor(convert(path), sha256=SHA256)


def _cached():
    """The first copy in the caches of ddpm_jax, pytorch-fid and torch-fidelity, or a downloaded one."""
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    ours, torch = cache / "ddpm_jax", Path(os.environ.get("TORCH_HOME") or cache / "torch")
    names = [url.rpartition("/")[2] for url in URLS]
    paths = [folder / name for folder in (ours, torch / "hub/checkpoints") for name in names]
    found = next((path for path in paths if path.is_file()), None)
    return found or data.download(URLS, ours / names[0], SIZE, SHA256)


def fold(kernel, scale, bias, mean, variance) -> dict:
    """Folds a batch norm into the convolution before it, in float64.

    Args:
      kernel: [h, w, I, O] of the convolution, which has no bias.
      scale, bias, mean, variance: [O] of the norm, with its running mean and variance.

    Returns:
      float32 {"kernel": [h, w, I, O], "bias": [O]}.
    """
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + EPSILON)
    return {"kernel": np.float32(kernel * factor), "bias": np.float32(bias - mean * factor)}


def convert(path: str | os.PathLike) -> dict:
    """The parameters of `Inception` from a state dict of pytorch-fid or torch-fidelity, with any weights.

    Returns:
      a tree of float32 NumPy arrays, with batch norms folded in.

    Raises:
      DataError: the file cannot be read, or parameters are missing or of the wrong shape.
    """
    state = read_state_dict(path)
    needed = parameter_shapes()
    missing = [name for name in needed if name not in state]
    if missing:
        raise data.DataError(
            f"{path} lacks {len(missing)} of {len(needed)} parameters, such as {missing[0]}: "
            f"it is not the network of {URLS[0]}"
        )
    for name, shape in needed.items():
        if state[name].shape != shape:
            raise data.DataError(
                f"{path}: {name} is {list(state[name].shape)}, expected {list(shape)}: "
                f"it is not the network of {URLS[0]}"
            )
    params = {("fc", "kernel"): np.float32(state["fc.weight"].T)}
    for name in needed:
        layer, is_convolution, _ = name.partition(".conv.weight")
        if is_convolution:
            norm = [state[f"{layer}.bn.{key}"] for key in NORM]
            for key, value in fold(state[name].transpose(2, 3, 1, 0), *norm).items():
                params[*layer.split("."), key] = value
    return traverse_util.unflatten_dict(params)


def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """{name: shape} of the arrays that `convert` needs in a state dict; kernels are [O, I, h, w], as in PyTorch."""
    x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    tree = jax.eval_shape(Inception().init, jax.random.key(0), x)["params"]
    shapes = {"fc.weight": (NUM_LOGITS, NUM_FEATURES)}
    for (*layer, leaf), value in traverse_util.flatten_dict(tree).items():
        if leaf == "kernel" and layer != ["fc"]:
            layer = ".".join(layer)
            height, width, inputs, outputs = value.shape
            shapes[f"{layer}.conv.weight"] = (outputs, inputs, height, width)
            for key in NORM:
                shapes[f"{layer}.bn.{key}"] = (outputs,)
    return shapes
