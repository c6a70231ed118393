"""The Inception network of 2015 by which FID and Inception Score are defined.

TensorFlow's graph of 2015-12-05, as Ho et al., StyleGAN, pytorch-fid and torch-fidelity use it: an
Inception v3 (Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision") that
differs from the one of model zoos in its poolings, its weights, its 1008 logits and its resizing.
Its weights are those that pytorch-fid publishes; PyTorch is not needed to read them.

Largest differences from torch-fidelity 0.4.0's network, both with the same random weights and running
statistics, over images of 32×32×3, 28×28×1 and 48×31×3, each of 94 convolutions and 11 blocks measured:

    resize and scaling            3.6e-07 of values up to  1.0
    Conv2d_1a … Conv2d_4a         6.2e-06                 10.4
    Mixed_5b … Mixed_5d           1.1e-05                 11.0
    Mixed_6a … Mixed_6e           1.8e-05                 16.1
    Mixed_7a … Mixed_7c           2.2e-05                 22.4
    features                      4.8e-06                 10.7
    logits                        7.2e-06                  9.0

and 5.3 images for each second of a core (AMD EPYC), where torch-fidelity with PyTorch 2.13 takes 5.2 to
5.5. In an environment that has torch-fidelity:

    JAX_DISABLE_MOST_OPTIMIZATIONS=0 taskset -c 1 pytest tests/test_inception.py -n 0 -s -k layer_by_layer
"""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ddpm_jax import data
from ddpm_jax.metrics import Extractor

SIDE = 299  # of the images that the network sees
NUM_FEATURES, NUM_LOGITS = 2048, 1008
EPSILON = 1e-3  # of the batch norms
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
    """[B, H, W, C] -> float32 [B, 299, 299, C], as TensorFlow 1.x's resize_bilinear does.

    Without half-pixel centres: output i looks at i · H/299, between two rows of the input, and beyond
    the last row at the last one. Nothing is antialiased.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        size = x.shape[axis]
        # In float32, as TensorFlow computes it: at whole places the rounding decides.
        place = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
        low = place.astype(np.int32)
        high = np.minimum(low + 1, size - 1)
        weight = (place - low.astype(np.float32)).reshape(
            [-1 if i == axis else 1 for i in range(4)]
        )
        start, end = (jnp.take(x, index, axis, mode="clip") for index in (low, high))
        x = start + (end - start) * weight
    return x


def average_pool(x):
    """The mean of the up to 3×3 pixels around each that lie inside the image."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def convolve(x, features, kernel, name, *, stride=1, padding="SAME"):
    """A convolution, its batch norm folded in, and ReLU; called inside a module."""
    conv = nn.Conv(
        features,
        (kernel, kernel) if isinstance(kernel, int) else kernel,
        (stride, stride),
        padding,
        precision=jax.lax.Precision.HIGHEST,  # GPUs and TPUs would take fewer digits than float32
        name=name,
    )
    return nn.relu(conv(x))


def chain(x, name, *layers):
    """Convolutions name_1, name_2, … one after the other, each (features, kernel)."""
    for i, (features, kernel) in enumerate(layers, 1):
        x = convolve(x, features, kernel, f"{name}_{i}")
    return x


def shrink(x, features, name):
    """The 3×3 convolution that halves an image, without padding."""
    return convolve(x, features, 3, name, stride=2, padding="VALID")


def shrink_pool(x):
    """The 3×3 maximum that halves an image, without padding."""
    return nn.max_pool(x, (3, 3), (2, 2))


def join(*branches):
    return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
    """At 35×35: 224 + pool_features channels; Szegedy et al., Figure 5."""

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
    """From 35×35 to 17×17: 480 channels more; Figure 10."""

    @nn.compact
    def __call__(self, x):
        double = chain(x, "branch3x3dbl", (64, 1), (96, 3))
        return join(
            shrink(x, 384, "branch3x3"),
            shrink(double, 96, "branch3x3dbl_3"),
            shrink_pool(x),
        )


class BlockC(nn.Module):
    """At 17×17: 768 channels, 7×7 as 1×7 and 7×1 of `width` channels; Figure 6."""

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
    """From 17×17 to 8×8: 512 channels more; Figure 10."""

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
    """At 8×8: 2048 channels, 3×3 as 1×3 beside 3×1; Figure 7.

    The last of the two takes maxima where the paper takes means; so it is in the graph of 2015.
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

    Layers are named as in the published file. Any side of at least 75 can be computed.
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
        dense = {"use_bias": False, "precision": jax.lax.Precision.HIGHEST}
        return features, nn.Dense(NUM_LOGITS, **dense, name="fc")(features)


def preprocess(images):
    """uint8 [B, H, W, 1 or 3] -> what the network sees, float32 [B, 299, 299, 3]."""
    x = (resize(images) - 128.0) / 128.0
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def extractor(params: dict, *, sha256: str) -> Extractor:
    """The network with these parameters as an Extractor, on the default device.

    It compiles for each shape of images, so give batches of one size. An image's features depend on
    it alone.

    Args:
      params: as `convert` returns them.
      sha256: of the file they came from.
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


def load(path: str | os.PathLike = "") -> Extractor:
    """The network with the published weights, whose size and SHA-256 sum are checked every time.

    Args:
      path: of the file. Without one a copy is taken from the caches of ddpm_jax and of PyTorch, or
        downloaded (96 MB) into the former, ~/.cache/ddpm_jax.

    Raises:
      DataError: there is no such file, or it is another or damaged, in one line.
    """
    try:
        path = Path(os.path.expanduser(path)) if path else _cached()
        if not path.is_file():
            raise data.DataError(
                f"no Inception weights at {path}: put {URLS[0]} there, or give no path to download it"
            )
        if fault := data.damage(path, SIZE, SHA256):
            raise data.DataError(
                f"{path} is not the Inception of 2015-12-05 or is damaged: {fault}; "
                f"replace it by {URLS[0]}"
            )
    except OSError as error:
        raise data.DataError(f"Inception weights: {error}") from error
    return extractor(convert(path), sha256=SHA256)


def _cached():
    """The first copy in a cache, of pytorch-fid and torch-fidelity too; else it is downloaded."""
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    ours, torch = cache / "ddpm_jax", Path(os.environ.get("TORCH_HOME") or cache / "torch")
    names = [url.rpartition("/")[2] for url in URLS]
    places = [folder / name for folder in (ours, torch / "hub/checkpoints") for name in names]
    found = next((path for path in places if path.is_file()), None)
    return found or data.download(URLS, ours / names[0], SIZE, SHA256)


def fold(kernel, scale, bias, mean, variance) -> dict:
    """A convolution and the batch norm behind it as one convolution, computed in float64.

    Args:
      kernel: [h, w, I, O] of the convolution, which has no bias.
      scale, bias, mean, variance: [O], of the norm; the last two are its running statistics.

    Returns:
      float32 `kernel` [h, w, I, O] and `bias` [O].
    """
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + EPSILON)
    return {"kernel": np.float32(kernel * factor), "bias": np.float32(bias - mean * factor)}


def convert(path: str | os.PathLike) -> dict:
    """Parameters of `Inception` from a state dict of pytorch-fid's or torch-fidelity's network.

    The sum of the file is not checked: it may hold other weights of the same network.

    Returns:
      a tree of float32 NumPy arrays, batch norms folded.

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
            of_norm = ("weight", "bias", "running_mean", "running_var")
            norm = [state[f"{layer}.bn.{key}"] for key in of_norm]
            for key, value in fold(state[name].transpose(2, 3, 1, 0), *norm).items():
                params[*layer.split("."), key] = value
    return traverse_util.unflatten_dict(params)


def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """What `convert` needs of a state dict: {name: shape}, kernels as PyTorch has them, [O, I, h, w]."""
    x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    tree = jax.eval_shape(Inception().init, jax.random.key(0), x)["params"]
    shapes = {"fc.weight": (NUM_LOGITS, NUM_FEATURES)}
    for (*layer, leaf), value in traverse_util.flatten_dict(tree).items():
        if leaf == "kernel" and layer != ["fc"]:
            layer = ".".join(layer)
            height, width, inputs, outputs = value.shape
            shapes[f"{layer}.conv.weight"] = (outputs, inputs, height, width)
            for key in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{layer}.bn.{key}"] = (outputs,)
    return shapes


# Files of PyTorch, without PyTorch.

STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "LongStorage": "<i8"}
LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # the first two numbers of the older format


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a state dict that torch.save wrote, without copies and not to be written to.

    Both formats: the zip since PyTorch 1.6, and the one before, of the time of the published file.

    Raises:
      DataError: it is no such file, damaged, or would call for more than tensors.
    """
    try:
        with open(path, "rb") as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            tensors, raw = read(file)
        return {name: tensor.array(raw) for name, tensor in tensors.items()}
    except Exception as error:  # pickle, zipfile and NumPy each have their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise data.DataError(f"{path} cannot be read as a PyTorch state dict: {reason}") from error


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: tuple[str, str]  # key, dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, raw):
        """The values, given the bytes of every storage by key; NumPy sees that they lie inside."""
        key, dtype = self.storage
        size = np.dtype(dtype).itemsize
        strides = [stride * size for stride in self.strides]
        return np.ndarray(self.shape, dtype, raw[key], self.offset * size, strides)


class _Unpickler(pickle.Unpickler):
    """Knows tensors of three types and the dict that holds them; no file can make it call anything else."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}  # {key: dtype}, of those met so far

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _Tensor(*args[:4])  # then requires_grad and hooks
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which no state dict needs")

    def persistent_load(self, saved_id):
        _, dtype, key, _device, _size, *view = saved_id
        if view not in ([], [None]):
            raise pickle.UnpicklingError("it holds a view of a storage, which is not read here")
        self.storages[key] = dtype
        return key, dtype


def _read_zip(file):
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        unpickler = _Unpickler(archive.open(name))
        tensors = unpickler.load()
        folder = name.removesuffix("data.pkl") + "data"
        return tensors, {key: archive.read(f"{folder}/{key}") for key in unpickler.storages}


def _read_legacy(file):
    """Pickles one after the other: two numbers, the machine, the state dict, keys; then the storages."""
    magic, version, _ = (_Unpickler(file).load() for _ in range(3))
    if (magic, version) != LEGACY:
        raise ValueError("its first numbers are not those of torch.save")
    unpickler = _Unpickler(file)
    tensors = unpickler.load()
    raw = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        raw[key] = file.read(count * np.dtype(unpickler.storages[key]).itemsize)
    return tensors, raw
