"""Data sets: from files, the network or a function of one's own to uint8 batches.

Everything here is NumPy: no TensorFlow, no JAX, no worker processes. An image stays uint8 in
0..255 with shape [H, W, C] until the training step scales it, and the order of the examples is a
pure function of (seed, step), so a run resumes without any iterator state.

`load` turns a name into a `Dataset`, `Dataset.from_arrays` turns arrays into one, and `batches`
turns a `Dataset` into batches.
"""

from ddpm_jax.data.archives import damage, download
from ddpm_jax.data.batching import batch_indices, batches, choose
from ddpm_jax.data.dataset import NO_LABEL, DataError, Dataset, image_digests, renumbered
from ddpm_jax.data.loading import BUILT_IN, WITH_PATH, Loader, load
from ddpm_jax.data.pictures import CannotDecode, picture, picture_endings

__all__ = [
    "BUILT_IN",
    "NO_LABEL",
    "WITH_PATH",
    "CannotDecode",
    "DataError",
    "Dataset",
    "Loader",
    "batch_indices",
    "batches",
    "choose",
    "damage",
    "download",
    "image_digests",
    "load",
    "picture",
    "picture_endings",
    "renumbered",
]
