"""The official archives of MNIST, Fashion-MNIST and CIFAR-10, and downloads with a check of the file."""

import gzip
import hashlib
import http.client
import os
import re
import socket
import tarfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddpm_jax.data.dataset import DataError, Dataset, one_line
from ddpm_jax.data.progress import Progress

BACKOFF = 1.0  # seconds before the second try of a download, doubled for the third

# Mirrors, then files with their bytes and SHA-256 sums from tensorflow-datasets
# (tensorflow_datasets/url_checksums/<name>.txt). The sums make any mirror safe, also over http.
# The second mirror of CIFAR-10 is that of MindSpore's tutorials.
_ARCHIVES = {
    "mnist": """
https://storage.googleapis.com/cvdf-datasets/mnist/
https://ossci-datasets.s3.amazonaws.com/mnist/
train-images-idx3-ubyte.gz 9912422 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
train-labels-idx1-ubyte.gz 28881 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
t10k-images-idx3-ubyte.gz 1648877 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
t10k-labels-idx1-ubyte.gz 4542 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
""",
    "fashion_mnist": """
https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/
http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/
train-images-idx3-ubyte.gz 26421880 3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84
train-labels-idx1-ubyte.gz 29515 a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845
t10k-images-idx3-ubyte.gz 4422102 346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073
t10k-labels-idx1-ubyte.gz 5148 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5
""",
    "cifar10": """
https://www.cs.toronto.edu/~kriz/
https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/
cifar-10-binary.tar.gz 170052171 c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
""",
}
_GARMENTS = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_OBJECTS = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": tuple(_GARMENTS.split(",")),
    "cifar10": tuple(_OBJECTS.split(",")),
}
MIRRORS = {name: re.findall(r"^(\S+/)$", text, re.M) for name, text in _ARCHIVES.items()}
SUMS = {  # {data set: {file: (bytes, SHA-256)}}
    name: {
        file: (int(size), sha256)
        for file, size, sha256 in re.findall(r"^(\S+) (\d+) (\w+)$", text, re.M)
    }
    for name, text in _ARCHIVES.items()
}


def are_here(name: str, split: str, root: Path) -> bool:
    """Whether all files of a split exist in `root/name` or `root`."""
    return all(_local(name, file, root) for file in _files(name, split))


def official(name: str, split: str, root: Path) -> Dataset:
    """Reads a split of mnist, fashion_mnist or cifar10 from its archives, which are downloaded if missing."""
    paths = []
    for file in _files(name, split):
        path, sums = _local(name, file, root), SUMS[name][file]
        if path is None:
            urls = [mirror + file for mirror in MIRRORS[name]]
            path = download(urls, root / name / file, *sums)
        if fault := damage(path, *sums):
            raise DataError(
                f"{path} is not {name}'s archive or is damaged: {fault}; delete it and run again "
                f"to download it, or put the right file into {root / name}"
            )
        paths.append(path)
    images, labels = _cifar10(paths[0], split) if name == "cifar10" else map(_idx, paths)
    return Dataset.from_arrays(
        images, labels, name=name, split=split, class_names=CLASS_NAMES[name]
    )


def _files(name, split):
    if name == "cifar10":
        return ("cifar-10-binary.tar.gz",)
    part = {"train": "train", "test": "t10k"}[split]
    return (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")


def _local(name, file, root):
    return next((path for path in (root / name / file, root / file) if path.is_file()), None)


def _idx(path):
    """Reads IDX: bytes 0, 0, 8 (for uint8) and the rank, then big-endian int32 sizes, then the values."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _cifar10(path, split):
    """Reads records of 3,073 bytes: the class, then the red, green and blue planes, 32×32 each."""
    wanted = "data_batch_" if split == "train" else "test_batch"
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:  # in the order of the archive, since gzip cannot seek back
            if member.isfile() and os.path.basename(member.name).startswith(wanted):
                found[member.name] = tar.extractfile(member).read()
    records = np.frombuffer(b"".join(found[file] for file in sorted(found)), np.uint8)
    records = records.reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0]


# Downloads.


def damage(path: Path, size: int, sha256: str) -> str | None:
    """How a file differs from the expected size in bytes and SHA-256 sum; None if it does not."""
    found = path.stat().st_size
    if found != size:
        return f"expected {size} bytes, found {found}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == sha256 else f"expected SHA-256 {sha256}, found {digest}"


def download(urls: Sequence[str], path: Path, size: int, sha256: str) -> Path:
    """Downloads a file to `path`, where it appears only when it is complete and correct.

    Args:
        urls: addresses of the same file; each is tried three times.
        size, sha256: its expected bytes and SHA-256 sum.

    Raises:
        DataError: no address has the right file.
        OSError: the folder of `path` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    process = f"{socket.gethostname()}.{os.getpid()}"  # several may download it, on several hosts
    part = path.with_name(f"{path.name}.{process}.part")
    failures = {}
    try:
        for wait in (0, BACKOFF, 2 * BACKOFF):
            time.sleep(wait)
            for url in urls:
                try:
                    _copy(url, part, size)
                except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                    failures[url] = one_line(error)
                    continue
                fault = damage(part, size, sha256)
                if fault is None:
                    os.replace(part, path)
                    return path
                failures[url] = fault
    finally:
        part.unlink(missing_ok=True)
    tried = "; ".join(f"{url} ({why})" for url, why in failures.items())
    raise DataError(
        f"cannot download {path.name}: {tried}; put {path.name} into {path.parent} by hand"
    )


def _copy(url, path, size):
    progress = Progress(f"downloading {url}", size / 1e6, "MB")
    with urllib.request.urlopen(url, timeout=20) as response, open(path, "wb", buffering=0) as out:
        while out.tell() <= size and (chunk := response.read(1 << 16)):
            try:
                out.write(chunk)
            except OSError as error:  # another address does not help
                raise DataError(f"{path} could not be written: {error.strerror}") from error
            progress.update(out.tell() / 1e6)
