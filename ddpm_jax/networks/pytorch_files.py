"""Reading state dicts of PyTorch without PyTorch."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from typing import NamedTuple

import numpy as np

from ddpm_jax.data import DataError

STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "LongStorage": "<i8"}
LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # the first two numbers of a file before PyTorch 1.6


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads {name: array} from a state dict written by torch.save, in the zip format or that before PyTorch 1.6.

    The arrays are read-only views of the file's bytes.

    Raises:
      DataError: the file is not a state dict, is damaged, or holds more than tensors.
    """
    try:
        with open(path, "rb") as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            tensors, raw = read(file)
        return {name: tensor.array(raw) for name, tensor in tensors.items()}
    except Exception as error:  # pickle, zipfile and NumPy each raise their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path} cannot be read as a PyTorch state dict: {reason}") from error


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides are in elements."""

    storage: tuple[str, str]  # key, dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, raw):
        """The values, from {key: bytes of the storage}; NumPy checks that they lie inside."""
        key, dtype = self.storage
        size = np.dtype(dtype).itemsize
        strides = [stride * size for stride in self.strides]
        return np.ndarray(self.shape, dtype, raw[key], self.offset * size, strides)


class _Unpickler(pickle.Unpickler):
    """Unpickles tensors of three types and the dict that holds them, and refuses everything else."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}  # {key: dtype} of the storages found so far

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
            raise pickle.UnpicklingError("it holds a view of a storage, which is not supported")
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
    """Reads consecutive pickles: two numbers, the machine, the state dict, keys; then the storages."""
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
