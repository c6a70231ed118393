"""Data sets: `load` makes a `Dataset` from a name, `Dataset.from_arrays` from arrays, and `batches` makes batches of it.

Everything here is NumPy, without TensorFlow, JAX or worker processes. Images are uint8 [H, W, C] in 0..255 until the
training step scales them. The order of the examples is a pure function of (seed, step), so a run resumes without any
iterator state.
"""

from ddpm_jax.data.archives import damage, download
from ddpm_jax.data.arrays import open_npz
from ddpm_jax.data.batching import batch_indices, batches, choose
from ddpm_jax.data.dataset import NO_LABEL, DataError, Dataset, image_digests, renumbered
from ddpm_jax.data.loading import (
    BUILT_IN,
    WITH_PATH,
    Loader,
    check_image_shape,
    load,
    survey,
)
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
    "check_image_shape",
    "choose",
    "damage",
    "download",
    "image_digests",
    "load",
    "open_npz",
    "picture",
    "picture_endings",
    "renumbered",
    "survey",
]
