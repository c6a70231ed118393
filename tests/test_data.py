"""Every source of data on small real data, the message for every kind of damage, and the order of the examples."""

import functools
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import os
import socket
import sys
import tarfile
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax import data

SHARED = Path(
    os.environ.get(
        "DDPM_JAX_TEST_DATA", Path(__file__).resolve().parents[1].parent / "shared" / "data"
    )
)


def needs(folder):
    return pytest.mark.skipif(
        not (SHARED / folder).is_dir(),
        reason=f"{SHARED / folder} is not here; DDPM_JAX_TEST_DATA may name a folder that has it",
    )


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch, tmp_path):
    """Hides this machine's prepared data sets, and skips waiting times."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds-default"))
    monkeypatch.setattr(data.archives, "BACKOFF", 0.0)


def error(*args, **kwargs):
    """The one-line error message of `load`."""
    with pytest.raises(data.DataError) as info:
        data.load(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


# Order of the examples.


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (12, 4), (7, 1), (3, 8), (1, 5), (5, 5)])
def test_every_example_once_per_epoch(n, batch_size):
    draw = functools.partial(data.batch_indices, n, seed=3, batch_size=batch_size)
    steps = [draw(step=step) for step in range(4 * n)]
    assert all(batch.shape == (batch_size,) and batch.dtype == np.int64 for batch in steps)
    epochs = np.concatenate(steps).reshape(-1, n)  # 4 n batches are 4 · batch_size epochs
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (len(epochs), 1)))
    assert n < 5 or len(np.unique(epochs, axis=0)) > 1


def test_order_depends_on_seed_and_step_alone():
    draw = functools.partial(data.batch_indices, 1000, batch_size=64)
    forwards = [draw(seed=5, step=step) for step in range(40)]
    data.batching.permutation.cache_clear()
    backwards = [draw(seed=5, step=step) for step in reversed(range(40))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert (draw(seed=6, step=0) != forwards[0]).any()
    forwards[0][:] = -1  # what the caller does to a batch stays with the caller
    np.testing.assert_array_equal(draw(seed=5, step=0), backwards[0])


def test_order_is_the_same_on_every_version_of_numpy():
    # A changed order breaks the resuming of old runs: keep these numbers.
    indices = data.batch_indices(1000, seed=0, step=7, batch_size=6)
    assert indices.tolist() == [36, 817, 751, 150, 519, 986]


def test_any_step_at_once():
    began = time.monotonic()
    indices = data.batch_indices(50_000, seed=0, step=10**12, batch_size=128)
    assert time.monotonic() - began < 1
    assert indices.min() >= 0 and indices.max() < 50_000


def test_consecutive_positions_are_uncorrelated():
    """The positions of example i in two epochs are uncorrelated."""
    n = 20_000
    epochs = [data.batch_indices(n, seed=1, step=step, batch_size=n) for step in range(3)]
    epochs.append(data.batch_indices(n, seed=2, step=0, batch_size=n))
    for a, b in itertools.combinations([np.arange(n), *epochs], 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


# Batches.


def test_batches_of_images_in_memory():
    digits = data.load("digits")
    got = list(data.batches(digits, seed=1, start=3, stop=6, batch_size=32))
    assert len(got) == 3
    for step, batch in enumerate(got, start=3):
        indices = data.batch_indices(1500, seed=1, step=step, batch_size=32)
        np.testing.assert_array_equal(batch["image"], digits.images[indices])
        np.testing.assert_array_equal(batch["label"], digits.labels[indices])
        np.testing.assert_array_equal(batch["index"], np.arange(32))
        assert [batch[key].dtype for key in ("image", "label", "index")] == [
            np.uint8,
            np.int32,
            np.int32,
        ]


def test_rows_of_processes_make_up_the_global_batch(folder):
    for limit in (0, 1):
        dataset = data.load(f"image_folder:{folder}", memory_limit_gb=limit)
        draw = functools.partial(data.batches, dataset, seed=0, start=0, stop=5, batch_size=6)
        parts = [draw(rows=slice(0, 2)), draw(rows=slice(2, 6))]
        for whole, *split in zip(draw(), *parts, strict=True):
            for key, value in whole.items():
                np.testing.assert_array_equal(value, np.concatenate([part[key] for part in split]))


@pytest.mark.parametrize("prefetch", [0, 1, 4, 50])
def test_lazy_equals_in_memory(folder, prefetch):
    lazy = data.load(f"image_folder:{folder}", memory_limit_gb=0)
    eager = data.load(f"image_folder:{folder}")
    assert lazy.images is None and "on demand" in lazy.describe()
    assert eager.images is not None and "in memory" in eager.describe()
    np.testing.assert_array_equal(lazy.labels, eager.labels)
    order = dict(seed=0, start=2, stop=9, batch_size=5)
    ours = data.batches(lazy, prefetch=prefetch, **order)
    for a, b in zip(ours, data.batches(eager, **order), strict=True):
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])
            assert a[key].dtype == b[key].dtype


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("ddpm_jax-data")]


def test_threads_end_with_the_generator(folder):
    dataset = data.load(f"image_folder:{folder}", memory_limit_gb=0)
    generator = data.batches(dataset, seed=0, start=0, stop=10**9, batch_size=4)
    next(generator)
    assert threads()
    generator.close()
    assert not threads()


def test_threads_decode_ahead_and_no_further():
    asked = []

    def fetch(indices):
        asked.extend(indices)
        return np.zeros((len(indices), 2, 2, 1), np.uint8)

    dataset = data.Dataset("mine", "train", (2, 2, 1), 0, np.zeros(100, np.int32), fetch)
    generator = data.batches(dataset, seed=0, start=0, stop=100, batch_size=10, prefetch=3)
    next(generator)
    time.sleep(0.1)
    assert len(asked) == 40
    generator.close()


def test_an_error_in_a_thread_names_the_file(folder):
    dataset = data.load(f"image_folder:{folder}", memory_limit_gb=0)
    (folder / "cat" / "1.png").unlink()
    with pytest.raises(data.DataError, match=r"cat.1\.png"):
        list(data.batches(dataset, seed=0, start=0, stop=4, batch_size=8))
    assert not threads()


# Arrays.


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    train, test = data.load("digits"), data.load("digits", split="test")
    assert (len(train), len(test)) == (1500, 297)
    assert train.describe() == "digits/train: 1500 images 8×8×1, 10 classes, uint8, in memory"
    images = np.concatenate([train.images, test.images])
    labels = np.concatenate([train.labels, test.labels])
    original = load_digits()
    levels = np.rint(images[..., 0] * (16 / 255))  # 16 grey levels survive the scaling to 0..255
    ours = sorted(
        (label, *pixels) for label, pixels in zip(labels, levels.reshape(-1, 64), strict=True)
    )
    theirs = zip(original.target, original.images.reshape(-1, 64), strict=True)
    assert ours == sorted((label, *pixels) for label, pixels in theirs)
    assert images.max() == 255


def test_synthetic():
    for shape in ((32, 32, 3), (8, 12, 1)):
        train = data.load("synthetic", image_shape=shape)
        test = data.load("synthetic", image_shape=shape, split="test")
        assert train.images.shape == (1024, *shape) and test.images.shape == (256, *shape)
        assert np.bincount(train.labels).tolist() == [103] * 4 + [102] * 6
        images = np.concatenate([train.images, test.images])
        assert len(np.unique(images.reshape(1280, -1), axis=0)) == 1280
        assert 115 < images.mean() < 140 and images.std() > 25
        neighbours = np.abs(np.diff(images.astype(int), axis=2)).mean()
        assert neighbours < 25  # smooth: two neighbours are closer than two pixels at random


def test_labels_of_synthetic_images_can_be_told_from_the_pixels():
    train, test = data.load("synthetic"), data.load("synthetic", split="test")
    means = np.stack([train.images[train.labels == c].mean(0) for c in range(10)])
    distance = ((test.images[:, None].astype(float) - means) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == test.labels).mean() > 0.5  # chance is 0.1


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def test_npz_layouts(tmp_path):
    x = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
    y = np.array([0, 1, 2, 0, 1, 2], np.uint8)
    name = save(tmp_path / "a.npz", x_train=x, y_train=y[:, None], x_test=x[:2], y_test=y[:2] + 6)
    train, test = data.load(name), data.load(name, split="test")
    assert train.image_shape == (4, 5, 1) and len(test) == 2
    np.testing.assert_array_equal(train.images[..., 0], x)
    assert train.labels.tolist() == y.tolist() and train.labels.dtype == np.int32
    assert train.num_classes == test.num_classes == 3  # a class that train lacks is none
    assert test.labels.tolist() == [-1, -1]

    rgb = np.stack([x, x, x], -1)
    for arrays in (dict(images=rgb, labels=y), dict(arr_0=rgb, arr_1=y)):
        dataset = data.load(save(tmp_path / "b.npz", **arrays), image_shape=(4, 5, 3))
        assert dataset.num_classes == 3 and dataset.image_shape == (4, 5, 3)
    dataset = data.load(save(tmp_path / "c.npz", arr_0=rgb))
    assert dataset.num_classes == 0 and "no labels" in dataset.describe()


def test_npz_that_cannot_be_used(tmp_path):
    path = tmp_path / "x.npz"
    x, y = np.zeros((4, 8, 8), np.uint8), np.zeros(4, int)
    complain = lambda **arrays: error(save(path, **arrays))  # noqa: E731
    unit = np.linspace(0, 1, 256).reshape(4, 8, 8)
    assert "float64" in complain(images=unit) and "x * 255" in complain(images=unit)
    assert "(x + 1) * 127.5" in complain(images=2 * unit - 1)
    assert "rint(x)" in complain(images=255 * unit)
    assert "int64" in complain(images=x.astype(int))
    assert "[8, 8]" in complain(images=x[0])
    assert "[0, 8, 8]" in complain(images=x[:0])
    assert "channels last" in complain(images=np.zeros((4, 3, 8, 8), np.uint8))
    assert "each of the 4 images" in complain(images=x, labels=y[:3])
    assert "float64" in complain(images=x, labels=y + 0.5)
    assert "integer" in complain(images=x, labels=y - 1)
    assert "['a', 'b']" in complain(a=x, b=y)
    assert "'test'" in error(save(path, x_train=x), split="test")
    assert "it has train" in error(save(path, x_train=x), split="test")
    assert "object" in complain(images=np.array([{}], dtype=object)).lower()
    np.save(tmp_path / "y.npy", x)
    assert "y.npy" in error(f"npz:{tmp_path / 'y.npy'}")
    path.write_bytes(path.read_bytes()[:100])
    assert str(path) in error(f"npz:{path}")
    path.write_text("not an archive")
    assert str(path) in error(f"npz:{path}")
    assert "no file" in error(f"npz:{tmp_path / 'missing.npz'}")
    assert "needs a path" in error("npz:")


def test_shape_of_arrays_is_not_changed(tmp_path):
    message = error("digits", image_shape=(32, 32, 3))
    assert "8×8×1" in message and "32×32×3" in message
    assert "--config.data.image_shape=8,8,1" in message
    assert "expected (height, width, channels)" in error("digits", image_shape=(8, 8))
    assert "expected (height, width, channels)" in error("digits", image_shape=(8, 0, 1))
    assert "it has train, test" in error("digits", split="val")


# The official archives.


@needs("fashion_mnist")
def test_fashion_mnist_from_the_official_archives(tmp_path):
    train = data.load("fashion_mnist", data_dir=SHARED)
    assert train.describe() == (
        "fashion_mnist/train: 60000 images 28×28×1, 10 classes, uint8, in memory"
    )
    assert np.bincount(train.labels).tolist() == [6000] * 10
    np.testing.assert_allclose(train.images.mean() / 255, 0.2860, atol=5e-5)
    np.testing.assert_allclose(train.images.std() / 255, 0.3530, atol=5e-5)
    test = data.load("fashion_mnist", data_dir=SHARED / "fashion_mnist", split="test")
    assert np.bincount(test.labels).tolist() == [1000] * 10


@needs("fashion_mnist")
def test_archives_of_another_data_set_are_refused():
    message = error("mnist", data_dir=SHARED / "fashion_mnist")
    assert "not mnist's archive" in message and "expected 9912422 bytes, found 26421880" in message


def test_sums_are_those_of_tensorflow_datasets():
    package = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
    for name, sums in data.archives.SUMS.items():
        lines = (package / "url_checksums" / f"{name}.txt").read_text().splitlines()
        theirs = {}
        for url, size, sha256, file in (line.split("\t") for line in lines):
            theirs[file] = (int(size), sha256)
            assert url[: -len(file)] in data.archives.MIRRORS[name]
        assert sums == theirs


CIFAR = "cifar-10-binary.tar.gz"


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 archive of 10 + 2 records and its contents: (bytes, images, labels)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    planes = images.transpose(0, 3, 1, 2).reshape(12, -1)
    records = np.concatenate([labels[:, None], planes], axis=1)
    files = {f"data_batch_{i + 1}.bin": records[2 * i : 2 * i + 2] for i in (3, 0, 4, 1, 2)}
    files |= {"test_batch.bin": records[10:], "readme.html": records[:0]}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{file}")
            member.size = content.nbytes
            tar.addfile(member, io.BytesIO(content.tobytes()))
    archive = buffer.getvalue()
    register(monkeypatch, "cifar10", CIFAR, archive)
    return archive, images, labels


def register(monkeypatch, name, file, content):
    sums = (len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(data.archives.SUMS, name, data.archives.SUMS[name] | {file: sums})


@pytest.mark.parametrize("place", [".", "cifar10"])
def test_cifar10(cifar, tmp_path, place):
    archive, images, labels = cifar
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / CIFAR).write_bytes(archive)
    train = data.load("cifar10", data_dir=tmp_path)
    test = data.load("cifar10", data_dir=str(tmp_path), split="test")
    np.testing.assert_array_equal(np.concatenate([train.images, test.images]), images)
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), labels)
    assert train.images.shape == (10, 32, 32, 3) and train.num_classes == 10


def test_a_damaged_archive_is_named_and_kept(cifar, tmp_path):
    archive, _, _ = cifar
    flipped = bytearray(archive)
    flipped[len(archive) // 2] ^= 1
    path = tmp_path / CIFAR
    for damaged, told in (
        (archive[: len(archive) // 2], f"expected {len(archive)} bytes, found {len(archive) // 2}"),
        (archive + b"\0", f"found {len(archive) + 1}"),
        (b"", "found 0"),
        (bytes(flipped), "expected SHA-256"),
    ):
        path.write_bytes(damaged)
        message = error("cifar10", data_dir=tmp_path)
        assert str(path) in message and told in message and "delete it and run again" in message
        assert path.read_bytes() == damaged


def test_an_idx_archive_read_back(monkeypatch, tmp_path):
    images = np.arange(5 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(5, 28, 28)
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    (tmp_path / "mnist").mkdir()
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        content = gzip.compress(header + values.tobytes())
        register(monkeypatch, "mnist", f"t10k-{kind}-ubyte.gz", content)
        (tmp_path / "mnist" / f"t10k-{kind}-ubyte.gz").write_bytes(content)
    dataset = data.load("mnist", split="test", data_dir=tmp_path)
    np.testing.assert_array_equal(dataset.images[..., 0], images)
    assert dataset.labels.tolist() == labels.tolist()


# Downloads, from a server on this machine.


@pytest.fixture
def server(monkeypatch):
    """A server with a queue of replies (status, body); a body of None hangs up. Records the requested paths."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body, length = replies.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    replies, asked = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setitem(
            data.archives.MIRRORS, "cifar10", (f"http://127.0.0.1:{httpd.server_port}/some/",)
        )
        yield replies, asked
        httpd.shutdown()
        thread.join()


def test_download_tries_again(server, cifar, tmp_path):
    (replies, asked), (archive, images, _) = server, cifar
    replies += [(500, b"", 0), (200, archive[:100], len(archive)), (200, archive, len(archive))]
    dataset = data.load("cifar10", data_dir=tmp_path / "new")
    np.testing.assert_array_equal(dataset.images, images[:10])
    assert asked == [f"/some/{CIFAR}"] * 3
    assert [path.name for path in (tmp_path / "new" / "cifar10").iterdir()] == [CIFAR]
    data.load("cifar10", data_dir=tmp_path / "new")
    assert len(asked) == 3  # found on disk


def test_hosts_that_share_a_disk_download_to_files_of_their_own(tmp_path, monkeypatch):
    """In containers, every process has the number 1."""
    parts = []

    def copy(url, path, size):
        parts.append(path)
        path.write_bytes(b"x")

    monkeypatch.setattr(data.archives, "_copy", copy)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for host in ("a", "b"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        data.archives.download(["x"], tmp_path / "x", 1, hashlib.sha256(b"x").hexdigest())
    assert len(set(parts)) == 2 and os.listdir(tmp_path) == ["x"]


def test_a_wrong_download_is_not_kept(server, cifar, tmp_path):
    (replies, asked), (archive, _, _) = server, cifar
    wrong = bytes(len(archive))
    replies += [(200, wrong, len(wrong)), (404, b"", 0), (200, archive * 2, 2 * len(archive))]
    message = error("cifar10", data_dir=tmp_path)
    assert (
        f"http://127.0.0.1:{message.split('127.0.0.1:')[1].split('/')[0]}/some/{CIFAR}" in message
    )
    assert f"expected {len(archive)} bytes" in message and len(asked) == 3
    assert f"put {CIFAR} into {tmp_path / 'cifar10'} by hand" in message
    assert not list((tmp_path / "cifar10").iterdir())


def test_the_next_mirror_is_tried(server, cifar, tmp_path, monkeypatch):
    (replies, asked), (archive, _, _) = server, cifar
    closed = "http://127.0.0.1:9/"  # nothing listens to the discard port
    monkeypatch.setitem(
        data.archives.MIRRORS, "cifar10", (closed, *data.archives.MIRRORS["cifar10"])
    )
    replies += [(200, archive, len(archive))]
    assert len(data.load("cifar10", data_dir=tmp_path)) == 10
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_a_failure_names_every_place_it_was_looked_for(name, tmp_path, monkeypatch):
    asked = []

    def refuse(url, path, size):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(data.archives, "_copy", refuse)
    message = error(name, data_dir=tmp_path)
    hosts = {urllib.parse.urlsplit(url).hostname for url in asked}
    assert len(hosts) >= 2 and len(asked) == 3 * len(set(asked))
    assert all(f"{url} (OSError: no route to host)" in message for url in asked)


def test_without_a_network(cifar, tmp_path, monkeypatch):
    monkeypatch.setitem(data.archives.MIRRORS, "cifar10", ("http://127.0.0.1:9/",))
    message = error("cifar10", data_dir=tmp_path)
    assert f"http://127.0.0.1:9/{CIFAR}" in message and str(tmp_path / "cifar10") in message


def test_a_data_dir_that_cannot_be_written(cifar, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in error("cifar10", data_dir=tmp_path / "file")


# Folders of pictures.


@pytest.fixture
def folder(tmp_path):
    """Two classes, cat and dog, of four random 6×5 colour pictures each."""
    rng = np.random.default_rng(0)
    for name in ("dog", "cat"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(4):
            paint(tmp_path / "pets" / name / f"{i}.png", rng.integers(0, 256, (6, 5, 3)))
    return tmp_path / "pets"


def paint(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def only(path, **options):
    """Loads the only picture of a folder."""
    [pixels] = data.load(f"image_folder:{path}", **options).images
    return pixels


def test_image_folder(folder):
    (folder / "notes.txt").write_text("not a picture")
    (folder / "cat" / "._0.png").write_text("not a picture")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "empty").mkdir()
    paint(folder / "cat" / "deep" / "x.PNG", np.zeros((6, 5, 3)))
    dataset = data.load(f"image_folder:{folder}")
    assert dataset.describe().endswith("train: 9 images 6×5×3, 2 classes, uint8, in memory")
    assert dataset.labels.tolist() == [0] * 5 + [1] * 4
    paths = [folder / "cat" / f"{i}.png" for i in range(4)] + [folder / "cat" / "deep" / "x.PNG"]
    paths += [folder / "dog" / f"{i}.png" for i in range(4)]
    np.testing.assert_array_equal(dataset.images, [np.asarray(Image.open(p)) for p in paths])


def test_flat_folder_has_no_labels(folder):
    dataset = data.load(f"image_folder:{folder / 'cat'}")
    assert len(dataset) == 4 and dataset.num_classes == 0 and not dataset.labels.any()


def test_splits_of_a_folder(folder, tmp_path):
    assert "has no split 'test'" in error(f"image_folder:{folder}", split="test")
    folder.rename(tmp_path / "train")
    paint(tmp_path / "test" / "dog" / "a.png", np.zeros((6, 5, 3)))
    train = data.load(f"image_folder:{tmp_path}")
    test = data.load(f"image_folder:{tmp_path}", split="test")
    assert len(train) == 8 and test.labels.tolist() == [1]  # dog is class 1 in both
    assert train.num_classes == test.num_classes == 2
    assert "it has train, test" in error(f"image_folder:{tmp_path}", split="val")


def test_train_may_be_a_class(tmp_path):
    for name in ("bus", "train"):
        paint(tmp_path / name / "a.png", np.zeros((6, 5, 3)))
    assert data.load(f"image_folder:{tmp_path}").labels.tolist() == [0, 1]
    (tmp_path / "bus").rename(tmp_path / "test")  # beside `test` it is a split
    assert data.load(f"image_folder:{tmp_path}").num_classes == 0


def test_a_split_without_labels_has_none(folder, tmp_path):
    """train/cat, train/dog and pictures right in test/: cat is not the class of the latter."""
    folder.rename(tmp_path / "train")
    for i in range(3):
        paint(tmp_path / "test" / f"{i}.png", np.zeros((6, 5, 3)))
    test = data.load(f"image_folder:{tmp_path}", split="test")
    assert test.labels.tolist() == [-1] * 3
    assert test.num_classes == 2 and test.class_names == ("cat", "dog")
    # The other way round: labels of the test split alone do not make a model of classes.
    (tmp_path / "train").rename(tmp_path / "t")
    (tmp_path / "test").rename(tmp_path / "train")
    (tmp_path / "t").rename(tmp_path / "test")
    for split in ("train", "test"):
        dataset = data.load(f"image_folder:{tmp_path}", split=split)
        assert dataset.num_classes == 0 and not dataset.labels.any()
    x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 0])
    name = save(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x)
    assert data.load(name, split="test").labels.tolist() == [-1] * 4
    assert data.load(name, split="test").num_classes == 3
    name = save(tmp_path / "b.npz", x_train=x, x_test=x, y_test=y)
    assert [data.load(name, split=split).num_classes for split in ("train", "test")] == [0, 0]


def test_a_folder_that_only_test_has_is_not_a_class(folder, tmp_path):
    folder.rename(tmp_path / "train")
    for name in ("ant", "dog"):
        paint(tmp_path / "test" / name / "a.png", np.zeros((6, 5, 3)))
    train = data.load(f"image_folder:{tmp_path}")
    test = data.load(f"image_folder:{tmp_path}", split="test")
    assert train.class_names == test.class_names == ("cat", "dog")
    assert sorted(set(train.labels.tolist())) == [0, 1] and test.labels.tolist() == [-1, 1]
    assert any("ant" in line for line in test.left_out)


def test_numbers_are_classes_in_their_order(tmp_path):
    for name in range(12):
        paint(tmp_path / str(name) / "a.png", np.full((2, 2), name))
    dataset = data.load(f"image_folder:{tmp_path}")
    assert dataset.class_names == tuple(map(str, range(12)))
    np.testing.assert_array_equal(dataset.images[:, 0, 0, 0], dataset.labels)


def test_names_of_classes(tmp_path):
    assert data.load("digits").class_names == tuple("0123456789")
    x, y = np.zeros((2, 2, 2), np.uint8), np.arange(2)
    name = save(tmp_path / "a.npz", images=x, labels=y, class_names=np.array(["ant", "bee"]))
    assert data.load(name).class_names == ("ant", "bee")
    few = save(tmp_path / "b.npz", images=x, labels=y, class_names=np.array(["ant"]))
    assert "1 class_names for 2 classes" in error(few)


def test_chosen_images_are_of_all_classes():
    """100 images of each of 10 classes, sorted: the first ones would all be of one class."""
    labels = np.repeat(np.arange(10), 100)
    assert len(set(labels[data.choose(1000, 64)])) == 10
    np.testing.assert_array_equal(np.sort(data.choose(1000)), np.arange(1000))
    np.testing.assert_array_equal(data.choose(1000, 64), data.choose(1000, 200)[:64])
    chosen = data.choose(7, 3)
    chosen[:] = -1  # what the caller does to it stays with the caller
    assert (data.choose(7, 3) >= 0).all()
    # Not the order in which a training of any seed sees its first epoch.
    first = data.batch_indices(1000, seed=0, step=0, batch_size=64)
    assert (first != data.choose(1000, 64)).any()


def test_what_pillow_reads_is_read_and_the_rest_is_counted(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for i, ending in enumerate(("tif", "TIFF", "ppm", "tga")):
        paint(tmp_path / f"{i}.{ending}", pixels)
    paint(tmp_path / "4.jfif", pixels, format="JPEG")
    paint(tmp_path / "5.pgm", pixels[..., 0])
    for name in ("a.heic", "b.HEIC", "notes.txt", "README"):
        (tmp_path / name).write_bytes(b"not decoded")
    dataset = data.load(f"image_folder:{tmp_path}")
    assert len(dataset) == 6
    np.testing.assert_array_equal(dataset.images[:4], [pixels] * 4)
    [line] = dataset.left_out
    assert "2 .heic, 1 .txt, 1 without an ending" in line and "pillow-heif" in line
    for i in range(6):
        next(tmp_path.glob(f"{i}.*")).unlink()
    message = error(f"image_folder:{tmp_path}")
    assert "holds no picture" in message and "2 .heic" in message


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    from PIL import PngImagePlugin

    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"eXIf", bytes([0, 8, 0, 2, 1, 0x12, 0, 3]))
    paint(tmp_path / "x.png", pixels, pnginfo=chunks)
    np.testing.assert_array_equal(only(tmp_path), pixels)


@pytest.mark.parametrize("limit", [0, 1])
def test_broken_pictures_can_be_left_out(folder, limit):
    whole = data.load(f"image_folder:{folder}")
    for name in ("cat/0.png", "dog/3.png"):  # the very first, and the last
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    message = error(f"image_folder:{folder}")
    assert "0.png" in message and "--config.data.skip_broken=True" in message
    dataset = data.load(f"image_folder:{folder}", skip_broken=True, memory_limit_gb=limit)
    assert (dataset.images is None) == (limit == 0)
    np.testing.assert_array_equal(dataset.fetch(np.arange(6)), whole.images[1:7])
    np.testing.assert_array_equal(dataset.labels, whole.labels[1:7])
    [line] = dataset.left_out
    assert line.startswith("2 pictures") and "0.png" in line and "3.png" in line
    assert "skip_broken=True is for image_folder" in error("digits", skip_broken=True)
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"")
    assert "none of its 8 pictures" in error(f"image_folder:{folder}", skip_broken=True)


def test_a_folder_can_be_flattened(folder):
    paint(folder / "top.png", np.zeros((6, 5, 3)))
    paint(folder / "cat" / "album" / "deep.png", np.zeros((6, 5, 3)))
    assert "--config.data.flatten=True" in error(f"image_folder:{folder}")
    dataset = data.load(f"image_folder:{folder}", flatten=True)
    assert len(dataset) == 10 and dataset.num_classes == 0


def test_hidden_folders_and_capitals_do_not_turn_splits_into_classes(folder, tmp_path):
    folder.rename(tmp_path / "Training")
    paint(tmp_path / "Test" / "dog" / "a.png", np.zeros((6, 5, 3)))
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    train, test = (
        data.load(f"image_folder:{tmp_path}", split=split) for split in ("train", "test")
    )
    assert train.class_names == ("cat", "dog") and len(test) == 1
    (tmp_path / "Test").rename(tmp_path / "away")
    (tmp_path / "away" / "dog" / "a.png").unlink()
    (tmp_path / "away" / "dog").rmdir()
    (tmp_path / "away").rmdir()
    assert data.load(f"image_folder:{tmp_path}").class_names == ("cat", "dog")


def test_a_link_to_nowhere_is_a_picture_that_cannot_be_decoded(folder):
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere.png")
    assert "gone.png cannot be decoded" in error(f"image_folder:{folder}")
    assert len(data.load(f"image_folder:{folder}", skip_broken=True)) == 8


def test_what_lies_beside_the_splits_is_said(folder, tmp_path):
    folder.rename(tmp_path / "train")
    paint(tmp_path / "test" / "dog" / "a.png", np.zeros((6, 5, 3)))
    paint(tmp_path / "bird" / "a.png", np.zeros((6, 5, 3)))
    assert data.load(f"image_folder:{tmp_path}").left_out == ("bird/ beside train and test",)


def test_a_path_without_its_kind_is_answered_with_it(folder, tmp_path):
    assert f"did you mean image_folder:{folder}?" in error(str(folder))
    save(tmp_path / "a.npz", images=np.zeros((1, 2, 2), np.uint8))
    assert f"did you mean npz:{tmp_path / 'a.npz'}?" in error(str(tmp_path / "a.npz"))
    assert "there is no /nowhere" in error("/nowhere")
    assert "there is no folder ~no_such_user/at" in error("image_folder:~no_such_user/at")


def test_what_lies_under_transparency_can_be_chosen(tmp_path):
    paint(tmp_path / "x.png", np.array([[[255, 0, 0, 255], [9, 9, 9, 0]]], np.uint8))
    assert only(tmp_path, background="black")[0, 1].tolist() == [0, 0, 0]
    assert only(tmp_path, background="#102030")[0, 1].tolist() == [16, 32, 48]
    assert "expected a colour" in error(f"image_folder:{tmp_path}", background="whit")


def test_fingerprint_stays_where_data_move_and_changes_with_them(folder, tmp_path):
    before = data.load(f"image_folder:{folder}").fingerprint()
    moved = folder.rename(tmp_path / "elsewhere")
    assert data.load(f"image_folder:{moved}").fingerprint() == before
    (moved / "cat" / "0.png").rename(moved / "cat" / "00.png")
    assert data.load(f"image_folder:{moved}").fingerprint() != before
    x = np.zeros((2, 2, 2), np.uint8)
    one, same, other = (
        data.load(save(tmp_path / f"{i}.npz", images=x + (i == 2))) for i in range(3)
    )
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_modes_of_pictures(tmp_path):
    rgb = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]] * 2, np.uint8)
    palette = Image.fromarray(rgb).quantize(4)
    for place in ("p", "gif"):
        (tmp_path / place).mkdir()
    palette.save(tmp_path / "p" / "x.png")
    np.testing.assert_array_equal(only(tmp_path / "p"), rgb)
    palette.save(tmp_path / "gif" / "x.gif", save_all=True, append_images=[palette.rotate(180)])
    np.testing.assert_array_equal(only(tmp_path / "gif"), rgb)

    rgba = np.array([[[255, 0, 0, 255], [9, 9, 9, 0], [0, 0, 255, 128]]], np.uint8)
    paint(tmp_path / "rgba" / "x.png", rgba)
    expected = [[[255, 0, 0], [255, 255, 255], [127, 127, 255]]]  # over white
    np.testing.assert_array_equal(only(tmp_path / "rgba"), expected)
    paint(tmp_path / "la" / "x.png", rgba[..., 2:])
    np.testing.assert_array_equal(only(tmp_path / "la")[..., 0], [[0, 255, 255]])

    deep = np.array([[0, 100 * 257, 100 * 257 + 100, 65535]], np.uint16)
    (tmp_path / "16").mkdir()
    Image.fromarray(deep).save(tmp_path / "16" / "x.png")
    np.testing.assert_array_equal(only(tmp_path / "16")[..., 0], [[0, 100, 100, 255]])
    assert only(tmp_path / "16", image_shape=(1, 4, 3)).tolist() == [
        [[0] * 3, [100] * 3, [100] * 3, [255] * 3]
    ]

    grey = np.array([[0, 50, 255]], np.uint8)
    paint(tmp_path / "l" / "x.png", grey)
    np.testing.assert_array_equal(only(tmp_path / "l"), grey[..., None])
    (tmp_path / "1").mkdir()
    Image.fromarray(grey > 40).save(tmp_path / "1" / "x.png")
    np.testing.assert_array_equal(only(tmp_path / "1")[..., 0], [[0, 255, 255]])
    luma = only(tmp_path / "p", image_shape=(2, 3, 1))[0, :, 0]
    np.testing.assert_allclose(luma, np.array([0.299, 0.587, 0.114]) * 255, atol=1)  # BT.601


def test_formats(tmp_path):
    smooth = np.add.outer(np.arange(16) * 4, np.arange(16) * 8)[..., None] + [0, 20, 40]
    for suffix in (".jpg", ".JPEG", ".webp", ".bmp"):
        paint(tmp_path / suffix[1:] / f"x{suffix}", smooth)
        np.testing.assert_allclose(only(tmp_path / suffix[1:]), smooth, atol=12)


def test_orientation_of_photographs(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    paint(tmp_path / "x.png", pixels, exif=exif)
    np.testing.assert_array_equal(only(tmp_path), np.rot90(pixels, -1))


def test_resize_and_crop(tmp_path):
    stripes = np.zeros((20, 40, 3), np.uint8)  # red | green | blue, 10, 20 and 10 wide
    stripes[:, :10, 0] = stripes[:, 10:30, 1] = stripes[:, 30:, 2] = 255
    paint(tmp_path / "wide" / "x.png", stripes)
    paint(tmp_path / "tall" / "x.png", stripes.transpose(1, 0, 2))
    green = np.broadcast_to([0, 255, 0], (20, 20, 3))
    for place in ("wide", "tall"):
        np.testing.assert_array_equal(only(tmp_path / place, image_shape=(20, 20, 3)), green)
        half = only(tmp_path / place, image_shape=(10, 10, 3))  # its filter looks past the crop
        np.testing.assert_array_equal(half[1:-1, 1:-1], green[:8, :8])
        np.testing.assert_allclose(half, green[:10, :10], atol=20)
    # Twice as wide as high: the whole picture at half its size.
    half = only(tmp_path / "wide", image_shape=(10, 20, 3))
    np.testing.assert_array_equal(half[5, [0, 3, 7, 12, 16, 19]].argmax(-1), [0, 0, 1, 1, 2, 2])
    # Upwards as well, and the same size changes nothing.
    assert only(tmp_path / "wide", image_shape=(60, 120, 3)).shape == (60, 120, 3)
    np.testing.assert_array_equal(only(tmp_path / "wide", image_shape=(20, 40, 3)), stripes)


def test_resizing_is_antialiased(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255  # all detail is above the new Nyquist frequency
    paint(tmp_path / "x.png", board)
    pixels = only(tmp_path, image_shape=(8, 8, 1))
    assert pixels.min() >= 126 and pixels.max() <= 129


def test_large_jpegs_are_resized_right(tmp_path):
    """Decoding JPEG at a reduced size changes the result by at most a few grey levels."""
    y, x = np.mgrid[0:600, 0:800]
    photo = (
        127 + 60 * np.sin(x / 30 + y / 50)[..., None] * [1, 0.5, -1] + 30 * np.cos(y / 9)[..., None]
    )
    paint(tmp_path / "jpg" / "x.jpg", photo, quality=98)
    paint(tmp_path / "png" / "x.png", photo)
    a, b = (only(tmp_path / kind, image_shape=(64, 64, 3)).astype(int) for kind in ("jpg", "png"))
    assert np.abs(a - b).max() <= 8 and np.abs(a - b).mean() < 1


def test_grey_and_colour_in_one_folder(tmp_path):
    paint(tmp_path / "a.png", np.zeros((4, 4, 3)))
    paint(tmp_path / "b.png", np.full((4, 4), 7))
    assert data.load(f"image_folder:{tmp_path}").images[1].tolist() == [[[7] * 3] * 4] * 4
    paint(tmp_path / "0.png", np.full((4, 4), 7))  # now the first is grey, which colour is not
    message = error(f"image_folder:{tmp_path}")
    assert "a.png is 4×4×3" in message and "0.png is 4×4×1" in message


@pytest.mark.parametrize("limit", [0, 1])
def test_pictures_of_different_sizes(folder, limit):
    paint(folder / "dog" / "2.png", np.zeros((5, 6, 3)))

    def read(**options):
        dataset = data.load(f"image_folder:{folder}", memory_limit_gb=limit, **options)
        return dataset.fetch(np.arange(8))

    with pytest.raises(data.DataError, match=r"2\.png is 5×6×3, but .*0\.png is 6×5×3"):
        read()
    assert read(image_shape=(4, 4, 1)).shape == (8, 4, 4, 1)


def test_a_broken_picture_is_named(folder, tmp_path):
    broken = folder / "dog" / "3.png"
    for content in (broken.read_bytes()[:60], b"", b"text", broken.read_bytes()[:30] + bytes(99)):
        broken.write_bytes(content)
        message = error(f"image_folder:{folder}")
        assert str(broken) in message and "repair or remove it" in message
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    photo = paint(tmp_path / "j" / "x.jpg", noise)
    photo.write_bytes(photo.read_bytes()[:-500])
    assert str(photo) in error(f"image_folder:{tmp_path / 'j'}")


def test_folders_that_cannot_be_used(folder, tmp_path):
    assert "no folder" in error(f"image_folder:{tmp_path / 'missing'}")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    assert "holds no picture" in error(f"image_folder:{tmp_path / 'empty'}")
    assert "needs a path" in error("image_folder:") and "needs a path" in error("image_folder")
    assert "1 or 3 channels" in error(f"image_folder:{folder}", image_shape=(6, 5, 4))
    paint(folder / "stray.png", np.zeros((6, 5, 3)))
    message = error(f"image_folder:{folder}")
    assert "stray.png" in message and "dog/" in message


# Data of one's own: arrays, and functions named module:NAME.


def test_dataset_from_arrays():
    x = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
    plain = data.Dataset.from_arrays(x)
    assert plain.describe() == "arrays/train: 6 images 4×5×1, no labels, uint8, in memory"
    assert plain.labels.tolist() == [0] * 6 and np.shares_memory(plain.images, x)
    labels = np.array([[2], [0], [1], [2], [0], [1]], np.uint8)
    given = dict(name="mine", split="test", class_names=["ant", "bee", "cow", "dog"])
    named = data.Dataset.from_arrays(np.stack([x] * 3, -1), labels, **given)
    assert (named.name, named.split, named.image_shape) == ("mine", "test", (4, 5, 3))
    assert named.num_classes == 4 and named.class_names == ("ant", "bee", "cow", "dog")
    assert named.labels.tolist() == labels[:, 0].tolist() and named.labels.dtype == np.int32
    unlabelled = data.Dataset.from_arrays(x, **given)
    assert unlabelled.labels.tolist() == [-1] * 6 and unlabelled.num_classes == 4
    of_two = data.Dataset.from_arrays(x, labels, num_classes=2)  # a class that train lacks is none
    assert of_two.labels.tolist() == [-1, 0, 1, -1, 0, 1] and of_two.num_classes == 2
    [batch] = data.batches(named, seed=0, start=0, stop=1, batch_size=6)
    assert np.bincount(batch["label"]).tolist() == [2, 2, 2]


UINT8 = "np.zeros((4, 8, 8, 1), np.uint8)"
HOSTILE = [  # images, labels, part of the message
    ("np.linspace(-1, 1, 256).reshape(4, 8, 8)", "None", "(x + 1) * 127.5"),
    ("np.linspace(0, 1, 256).reshape(4, 8, 8)", "None", "pass numpy.rint(x * 255)"),
    ("np.zeros((4, 8, 8), bool)", "None", "is bool [4, 8, 8] in 0..0, expected uint8"),
    ("np.zeros((8, 8), np.uint8)", "None", "uint8 [8, 8], expected [N, H, W] or [N, H, W, C]"),
    ("np.zeros((0, 8, 8), np.uint8)", "None", "at least one image"),
    ("np.zeros((4, 3, 8, 8), np.uint8)", "None", "channels last"),
    ("np.full((4, 8, 8), 'x')", "None", "<U1 [4, 8, 8], expected uint8"),
    ("[[1, 2], [3]]", "None", "is not an array: ValueError"),
    ("None", "None", "object [], expected [N, H, W]"),
    (UINT8, "np.arange(3)", "int64 [3], expected one class 0, 1, … (an integer) for each of the 4"),
    (UINT8, "np.arange(5)", "for each of the 4 images"),
    (UINT8, "[]", "float64 [0], expected one class"),
    (UINT8, "np.arange(4) / 2", "float64 [4]"),
    (UINT8, "np.arange(4) - 1", "int64 [4], expected one class 0, 1"),
    (UINT8, "['a', 'b', 'c', 'd']", "<U1 [4]"),
]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module in a folder that Python searches: module(text) is its (name, path)."""
    monkeypatch.syspath_prepend(tmp_path)
    numbers = itertools.count()

    def write(text):
        path = tmp_path / f"own_data_{next(numbers)}.py"
        path.write_text(f"import numpy as np\nfrom ddpm_jax.data import *\n{text}\n")
        importlib.invalidate_caches()
        return path.stem, str(path)

    return write


def returning(value):
    return f"def make(*, split, image_shape, data_dir):\n    return {value}"


@pytest.mark.parametrize(("images", "labels", "words"), HOSTILE)
def test_arrays_that_cannot_be_used(images, labels, words, module):
    values = [eval(text, {"np": np}) for text in (images, labels)]
    with pytest.raises(data.DataError) as info:
        data.Dataset.from_arrays(*values, name="mine")
    kind = "images" if labels == "None" else "labels"
    assert words in str(info.value) and str(info.value).startswith(f"mine: {kind} is ")
    name, path = module(returning(f"{images}, {labels}"))
    message = error(f"{name}:make")
    assert words in message and message.startswith(f"{path}: make: {kind} is ")


def test_fewer_names_than_classes():
    with pytest.raises(data.DataError, match="mine: 1 class_names for 2 classes"):
        data.Dataset.from_arrays(
            np.zeros((2, 2, 2), np.uint8), [0, 1], name="mine", class_names="a"
        )


def test_a_data_set_of_ones_own(module, tmp_path):
    text = """
def make(*, split, image_shape, data_dir):
    height, width, channels = image_shape or (4, 5, 1)
    number = len(str(data_dir)) if split == "train" else 3
    images = np.zeros((number, height, width, channels), np.uint8)
    images[:] = np.arange(number)[:, None, None, None]
    return images, (np.arange(number) % 3 if split == "train" else np.array([0, 3, 1]))
def unlabelled_test(**options):
    images, labels = make(**options)
    return images, labels if options["split"] == "train" else None
def names(*, split, **options):
    images, labels = make(split="train", **options)
    part = slice(None) if split == "train" else slice(1)
    return Dataset.from_arrays(images[part], labels[part], class_names=["ant", "bee", "cow"])
"""
    name, _ = module(text)
    place = "~/" + "x" * 5
    train = data.load(f"{name}:make", data_dir=place)
    length = len(os.path.expanduser(place))
    assert train.name == f"{name}:make" and train.split == "train" and len(train) == length
    assert train.image_shape == (4, 5, 1) and train.num_classes == 3
    assert train.images[:, 0, 0, 0].tolist() == list(range(length))
    test = data.load(f"{name}:make", split="test", image_shape=[2, 2, 3])
    assert test.split == "test" and test.image_shape == (2, 2, 3)
    assert test.num_classes == 3 and test.labels.tolist() == [0, -1, 1]  # the classes of train
    test = data.load(f"{name}:unlabelled_test", split="test")
    assert test.num_classes == 3 and test.labels.tolist() == [-1] * 3
    test = data.load(f"{name}:names", split="test")
    assert (test.name, test.split) == (f"{name}:names", "test")
    assert test.num_classes == 3 and test.class_names == ("ant", "bee", "cow")
    assert "flatten=True is for image_folder" in error(f"{name}:make", flatten=True)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            UINT8,
            "make returns uint8 [4, 8, 8, 1], expected a Dataset or (images uint8 [N, H, W, C]",
        ),
        (f"[{UINT8}, None]", "make returns list of 2, expected"),
        (f"{UINT8}, None, None", "make returns tuple of 3, expected"),
        ("None", "make returns NoneType, expected"),
        ("1 / 0", ", line 4: ZeroDivisionError: division by zero"),
        ("open('/nowhere')", ", line 4: FileNotFoundError"),
        (
            "Dataset('x', 'train', (8, 8, 1), 0, np.zeros(4), None)",
            "labels is float64 [4], expected",
        ),
        ("Dataset('x', 'train', (8, 8, 1), 0, np.zeros(0, np.int32), None)", "int32 [0], expected"),
        (
            "Dataset('x', 'train', (8, 8, 1), 0, np.zeros(4, np.int32), lambda i: np.zeros((1, 8, 8)))",
            "make: fetch returns float64 [1, 8, 8] for one, expected uint8 [1, 8, 8, 1]",
        ),
        ("Dataset('x', 'train', (8, 8, 1), 0, np.zeros(4, np.int32), None)", "fetch: TypeError"),
    ],
)
def test_wrong_results_of_ones_own_function(value, words, module):
    name, path = module(returning(value))
    message = error(f"{name}:make")
    assert words in message and ("fetch: TypeError" in message or message.startswith(path))


def test_mistakes_in_a_module_of_ones_own(module, tmp_path):
    name, path = module(returning(f"{UINT8}, None"))
    expected = "make(*, split, image_shape, data_dir)"
    message = error(f"{name}:mke")
    assert f"{path} has no 'mke'; did you mean 'make'?" in message
    assert "expected a function mke(*, split, image_shape, data_dir)" in message
    message = error(f"{name}:make", image_shape=(4, 4, 1))
    assert message.startswith(f"{path}: make holds images 8×8×1, but the config asks for 4×4×1")
    message = error("no_such_module_of_mine:make")
    assert "there is no module 'no_such_module_of_mine'" in message and expected in message
    assert "did you mean 'image_folder:'?" in error("imagefolder:pictures", data_dir=tmp_path)
    for text, words in (
        ("def make(*, split): return 1", f"expected a function {expected}"),
        ("make = 3", f"expected a function {expected}"),
        ("import no_such_package", "line 3: No module named 'no_such_package'"),
        ("def make(:", "line 3: SyntaxError"),
        ("raise ValueError('a\\nb')", "line 3: ValueError: a b"),
    ):
        name, path = module(text)
        message = error(f"{name}:make")
        assert path in message and words in message
    name, _ = module("def make(**options): raise DataError('no split of mine')")
    assert error(f"{name}:make") == "no split of mine"


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("mine:make", True),
        ("mine.deeper:make", True),
        ("mnist:3.0.1", False),
        ("lsun/church", False),
        ("lsun/church:1.0.0", False),
        ("mine:", False),
        (":make", False),
        ("mine:make:x", False),
        ("a-b:make", False),
        ("mine:/make", False),
    ],
)
def test_names_of_modules(name, own, tmp_path):
    message = error(name, data_dir=tmp_path)
    assert ("there is no module" in message) == own == ("tensorflow-datasets" not in message)


def test_kinds_with_a_path_are_not_modules(module, monkeypatch, tmp_path):
    for kind in data.WITH_PATH:
        assert "there is no f" in error(f"{kind}:make")
        assert not data.loading._is_module_name(kind)


# tensorflow-datasets.


@pytest.mark.slow
@needs("tfds")
def test_mnist_as_prepared_by_tensorflow_datasets():
    imported = "tensorflow" in sys.modules
    train = data.load("mnist", data_dir=SHARED, memory_limit_gb=0)
    assert train.describe() == (
        "mnist/train: 60000 images 28×28×1, 10 classes, uint8, decoded on demand"
    )
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # of the original
    assert np.bincount(train.labels).tolist() == counts
    sample = np.concatenate(
        [b["image"] for b in data.batches(train, seed=0, start=0, stop=40, batch_size=128)]
    )
    np.testing.assert_allclose(sample.mean() / 255, 0.13066, atol=0.002)
    np.testing.assert_allclose(sample.std() / 255, 0.30811, atol=0.002)
    assert ("tensorflow" in sys.modules) == imported  # reading alone never imports it


@needs("tfds")
def test_prepared_data_in_memory_and_resized():
    eager = data.load("mnist", split="test", data_dir=SHARED)
    lazy = data.load("mnist", split="test", data_dir=SHARED, memory_limit_gb=0)
    some = np.array([9999, 0, 5000])
    np.testing.assert_array_equal(eager.fetch(some), lazy.fetch(some))
    np.testing.assert_array_equal(eager.labels, lazy.labels)
    np.testing.assert_allclose(eager.images.mean() / 255, 0.13251, atol=1e-5)  # as known
    small = data.load(
        "mnist", split="test", data_dir=SHARED, memory_limit_gb=0, image_shape=(14, 14, 3)
    )
    blocks = eager.images[:1].reshape(1, 14, 2, 14, 2, 1).mean((2, 4))
    np.testing.assert_allclose(small.fetch(np.array([0])), blocks.repeat(3, -1), atol=40)


@pytest.fixture
def prepared(tmp_path):
    """Links MNIST under other names: (root, link), where link(place, **changes to its info)."""

    def link(place, **changes):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for path in (SHARED / "tfds" / "mnist" / "3.0.1").iterdir():
            if path.name != "dataset_info.json":
                (folder / path.name).symlink_to(path)
        info = json.loads((SHARED / "tfds/mnist/3.0.1/dataset_info.json").read_text())
        (folder / "dataset_info.json").write_text(json.dumps(info | changes))

    return tmp_path, link


@needs("tfds")
@pytest.mark.parametrize("place", ["tfds", ".", "tfds-default"])
def test_places_and_versions_of_prepared_data(prepared, place):
    root, link = prepared
    link(f"{place}/mine/2.0.0", fileFormat="tfrecord")
    link(f"{place}/mine/1.10.0")
    link(f"{place}/mine/1.9.0")
    link(f"{place}/mine/large/1.0.0")
    assert data.prepared.find("mine", root).name == "1.10.0"
    assert data.prepared.find("mine:1.9.0", root).name == "1.9.0"
    assert data.prepared.find("mine/large", root).name == "1.0.0"
    load = functools.partial(data.load, data_dir=root, memory_limit_gb=0)
    assert len(load("mine/large", split="test")) == 10000
    assert len(load("mine", split="train[:1%]")) == 600
    assert "no split 'val'; it has train, test" in error("mine", split="val", data_dir=root)
    assert "did you mean mine/large" in error("mine/larg", data_dir=root)
    link(f"{place}/mine/nightly")  # a version that is an identifier: prepared, so not module:NAME
    assert len(load("mine:nightly", split="test")) == 10000


@needs("tfds")
def test_prepared_as_tfrecord(prepared):
    root, link = prepared
    link("tfds/mine/1.0.0", fileFormat="tfrecord")
    message = error("mine", data_dir=root)
    assert "prepared as tfrecord" in message and "file_format='array_record'" in message


@needs("tfds")
def test_damaged_prepared_data(prepared):
    root, link = prepared
    link("mine/1.0.0")
    records = root / "mine" / "1.0.0" / "mnist-test.array_record-00000-of-00001"
    content = records.read_bytes()
    records.unlink()
    assert str(records.parent) in error("mine", split="test", data_dir=root)
    records.write_bytes(content[: len(content) // 2])
    assert str(records.parent) in error("mine", split="test", data_dir=root)
    (records.parent / "dataset_info.json").write_text("{")
    assert "mine" in error("mine", split="test", data_dir=root)


def test_a_name_that_is_not_here(tmp_path):
    began = time.monotonic()
    assert "did you mean mnist" in error("minst", data_dir=tmp_path)
    assert "cifar10" in error("cifar_10", data_dir=tmp_path)
    assert "image_folder:" in error("imagefolder:/my/pictures", data_dir=tmp_path)
    message = error("celeb_a", data_dir=tmp_path)
    assert "Google Drive" in message and "pip install tensorflow" in message
    assert f"tfds.builder('celeb_a', data_dir='{tmp_path / 'tfds'}'" in message
    assert "tensorflow_io" in error("lsun/bedroom", data_dir=tmp_path)
    assert "fashion_mnist" in error("qqqqqq", data_dir=tmp_path)  # nothing is near: all are named
    assert time.monotonic() - began < 5


# The progress line.


def test_progress_line(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = data.progress.Progress("reading", 100, "MB")
    for now[0], done in ((0.5, 5), (9, 30), (10, 40), (11, 50), (20, 100)):
        progress.update(done)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 40 of 100 MB, 4.0 MB/s, 15 s left",
        "reading: 100 of 100 MB, 5.0 MB/s, done",
    ]
