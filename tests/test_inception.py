"""The Inception of FID against torch-fidelity's, its parts against NumPy, and its reader of files.

Where torch-fidelity is not installed, some of its outputs stand in for it, as numbers below.
"""

import functools
import hashlib
import struct
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import data
from ddpm_jax.networks import inception

pytestmark = pytest.mark.slow

# ---- weights and images that every version of NumPy draws alike -------------------------------------


def uniform(seed, *shape):
    """float32 in [−1, 1), from raw bits: NumPy guarantees those across versions, but not its distributions."""
    bits = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(40)) * 2.0**-23 - 1).astype(np.float32).reshape(shape)


@functools.cache
def random_state():
    """A state dict {name: array} with norms far from the identity, and activations of order one."""
    state = {}
    for i, (name, shape) in enumerate(inception.parameter_shapes().items()):
        noise = uniform(i, *shape)
        if len(shape) > 1:  # variance 2 / fan-in, as ReLU wants it
            state[name] = noise * np.float32(np.sqrt(6 / np.prod(shape[1:])))
        else:
            state[name] = noise * 0.3 + float(name.endswith(("bn.weight", "var")))
    state["fc.bias"] = uniform(999, 1008)  # which logits_unbiased leaves out
    return state


def images(seed, *shape):
    return ((uniform(seed, *shape) + 1) * 128).astype(np.uint8)


# ---- a writer of PyTorch's files, from the opcodes of pickle ------------------------------------------


def text(value):
    return b"X" + struct.pack("<i", len(value.encode())) + value.encode()


def numbers(values):
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def pickled(state, storage_of=None):
    """A dict of tensors; storage_of(name, array) gives key, elements, offset and strides of a view."""
    out = b"\x80\x02}"
    for name, array in state.items():
        kind = {"f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage"}[
            array.dtype.str[1:]
        ]
        whole = name, array.size, 0, [stride // array.itemsize for stride in array.strides]
        key, size, offset, strides = storage_of(name, array) if storage_of else whole
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
        out += b"J" + struct.pack("<i", size) + b"tQ" + b"J" + struct.pack("<i", offset)
        out += numbers(array.shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtRs"
    return out + b"."


def as_zip(path, pickle, raw):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("any_name/data.pkl", pickle)
        for key, content in raw.items():
            archive.writestr(f"any_name/data/{key}", content)
    return path


def as_legacy(path, pickle, raw):
    with open(path, "wb") as file:
        file.write(b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b".")
        file.write(b"\x80\x02M\xe9\x03." + b"\x80\x02}." + pickle)
        file.write(b"\x80\x02](" + b"".join(text(key) for key in raw) + b"e.")
        for content, size in raw.values():
            file.write(struct.pack("<q", len(content) // size) + content)
    return path


def write(path, state, layout="legacy"):
    if layout == "zip":
        return as_zip(path, pickled(state), {key: array.tobytes() for key, array in state.items()})
    raw = {key: (array.tobytes(), array.itemsize) for key, array in state.items()}
    return as_legacy(path, pickled(state), raw)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of 96 MB like the published one, with random weights."""
    return write(tmp_path_factory.mktemp("inception") / "weights.pth", random_state())


@pytest.fixture(scope="module")
def random_extractor(published):
    return inception.extractor(inception.convert(published), sha256="0")


def error(call, *args):
    with pytest.raises(data.DataError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the resize --------------------------------------------------------------------------------------


def resize_matrix(size):
    """float64 [299, size]: output i is at i · size/299 and sees pixel j by 1 − its distance."""
    place = np.minimum(np.arange(299) * size / 299, size - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size)))


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (1, 28, 28, 1), (1, 48, 31, 3), (1, 400, 1, 3)])
def test_resize(shape):
    pictures = images(1, *shape)
    rows, columns = resize_matrix(shape[1]), resize_matrix(shape[2])
    expected = np.einsum("yh,xw,bhwc->byxc", rows, columns, pictures, optimize=True)
    found = jax.jit(inception.resize)(pictures)
    assert found.dtype == jnp.float32
    # Places are float32, right to 4e-5 of a pixel where there are 400, and neighbours differ by 255.
    np.testing.assert_allclose(found, expected, atol=2e-2)


def test_resize_changes_nothing_at_its_own_size():
    pictures = images(1, 1, 299, 299, 1)
    np.testing.assert_array_equal(inception.resize(jnp.asarray(pictures)), pictures)


def test_preprocess_scales_and_repeats_grey():
    levels = np.array([0, 64, 128, 255], np.uint8).reshape(4, 1, 1, 1)
    preprocess = jax.jit(inception.preprocess)
    x = preprocess(levels)
    assert x.shape == (4, 299, 299, 3)
    np.testing.assert_array_equal(x[:, 7, 9, 2], [-1, -0.5, 0, 127 / 128])
    grey = images(7, 1, 28, 28, 1)
    in_colour = preprocess(grey.repeat(3, axis=-1))
    np.testing.assert_allclose(preprocess(grey), in_colour, rtol=0, atol=1e-6)


# ---- the network -------------------------------------------------------------------------------------


def test_published_parameter_count():
    """Keras's Inception v3 of 1000 classes has 23,851,784 numbers, three for each normed channel."""
    shapes = inception.parameter_shapes().items()
    kernels = sum(np.prod(shape) for name, shape in shapes if name.endswith("conv.weight"))
    channels = sum(np.prod(shape) for name, shape in shapes if name.endswith("bn.bias"))
    assert kernels + 3 * channels + (2048 + 1) * 1000 == 23_851_784
    assert len(shapes) == 94 * 5 + 1
    assert dict(shapes)["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)


@pytest.mark.parametrize(
    ("block", "is_max"),
    [
        (inception.BlockA(8), False),
        (inception.BlockC(2), False),
        (inception.BlockE(max_pool=False), False),
        (inception.BlockE(max_pool=True), True),
    ],
    ids=["A", "C", "E_1", "E_2"],
)
@pytest.mark.parametrize("side", [1, 2, 5])
def test_pools_of_the_branches_see_no_padding(block, is_max, side):
    """All branches but the last are zero, and the last returns the pooled input."""
    x = np.abs(uniform(2, 2, side, 4, 8))
    tree = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree)
    kernel = params["branch_pool"]["kernel"]
    kernel[0, 0] = np.eye(*kernel.shape[2:])
    y = np.asarray(jax.jit(block.apply)({"params": params}, x))
    assert not y[..., : -kernel.shape[-1]].any()
    for row in range(side):
        for column in range(4):
            seen = x[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            expected = seen.max((1, 2)) if is_max else seen.mean((1, 2))
            found = y[:, row, column, -kernel.shape[-1] :][:, :8]
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_fold_is_the_batch_norm():
    kernel, (scale, bias, mean) = uniform(3, 1, 1, 4, 5), uniform(4, 3, 5)
    variance = uniform(5, 5) + 1  # among them one that EPSILON tells from zero
    variance[0] = 0
    x = uniform(6, 7, 4)
    y = x.astype(np.float64) @ kernel[0, 0]
    expected = scale * (y - mean) / np.sqrt(variance.astype(np.float64) + 0.001) + bias
    folded = inception.fold(kernel, scale, bias, mean, variance)
    assert folded["kernel"].dtype == folded["bias"].dtype == np.float32
    np.testing.assert_allclose(x @ folded["kernel"][0, 0] + folded["bias"], expected, atol=3e-5)


# What torch-fidelity 0.4.0 (PyTorch 2.13) makes of random_state and these images: every 300th feature,
# every 150th of logits_unbiased. Printed by the last test of this file.
GOLDEN_IMAGES = images(0, 2, 48, 31, 3)
GOLDEN_FEATURES = [
    [0.7207065, 0.0, 0.0, 1.7470168, 1.7566967, 0.0, 0.0],
    [0.72405857, 0.0, 0.0, 1.7445545, 1.7937478, 0.0, 0.0],
]
GOLDEN_LOGITS = [
    [0.13049304, 0.47196198, 0.9321456, -2.8259506, -2.5657284, 1.6165686, -0.34155053],
    [0.06244206, 0.54688644, 0.95819753, -2.8549132, -2.6608086, 1.6119025, -0.31109184],
]


def test_features_are_those_of_torch_fidelity(random_extractor):
    features, logits = random_extractor.features(GOLDEN_IMAGES)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert features.dtype == logits.dtype == jnp.float32
    np.testing.assert_allclose(features[:, ::300], GOLDEN_FEATURES, atol=1e-4)
    np.testing.assert_allclose(logits[:, ::150], GOLDEN_LOGITS, atol=1e-4)


def test_an_image_does_not_see_its_neighbours(random_extractor):
    first, second = GOLDEN_IMAGES
    black = np.zeros_like(first)
    in_company = random_extractor.features(np.stack([first, second]))
    elsewhere = random_extractor.features(np.stack([black, first]))
    for a, b in zip(in_company, elsewhere, strict=True):
        np.testing.assert_allclose(a[0], b[1], atol=2e-5)
        assert np.abs(a[1] - b[0]).max() > 0.1


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 8, 8, 3), np.float32), ((8, 8, 3), np.uint8), ((1, 3, 8, 8), np.uint8)],
)
def test_other_images_are_refused(shape, dtype, random_extractor):
    with pytest.raises(ValueError, match=r"expected uint8 \[B, H, W, 1 or 3\]"):
        random_extractor.features(np.zeros(shape, dtype))


# ---- files -------------------------------------------------------------------------------------------

SMALL = {
    "a.weight": uniform(8, 3, 2, 1, 4),
    "b": uniform(9, 5).astype(np.float64),
    "c": np.array(-7),
    "ü": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_reader(layout, tmp_path):
    found = inception.read_state_dict(write(tmp_path / "w.pth", SMALL, layout))
    assert found.keys() == SMALL.keys()
    for name, array in SMALL.items():
        assert found[name].dtype == array.dtype and not found[name].flags.writeable
        np.testing.assert_array_equal(found[name], array)


def test_reader_of_views_of_one_storage(tmp_path):
    storage = np.arange(24, dtype=np.float32)
    views = {"rows": storage[12:].reshape(3, 4), "columns": storage.reshape(4, 6).T[1:4]}
    offsets = {"rows": 12, "columns": 1}

    def storage_of(name, array):
        return "all", 24, offsets[name], [stride // 4 for stride in array.strides]

    path = as_zip(tmp_path / "w", pickled(views, storage_of), {"all": storage.tobytes()})
    found = inception.read_state_dict(path)
    for name, array in views.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_is_no_state_dict_is_one_line(tmp_path):
    path, marker = tmp_path / "w.pth", tmp_path / "marker"
    read = functools.partial(error, inception.read_state_dict, path)
    assert "No such file" in read()

    raw = {key: array.tobytes() for key, array in SMALL.items()}
    for layout in ("zip", "legacy"):
        whole = write(path, SMALL, layout).read_bytes()
        for part in (b"", b"text", whole[:20], whole[: len(whole) // 2], whole[:-60]):
            path.write_bytes(part)
            assert f"{path} cannot be read as a PyTorch state dict" in read()
    path.write_bytes(b"\x80\x02}." * 5)
    assert "not those of torch.save" in read()
    write(path, SMALL, "zip")
    flipped = path.read_bytes().replace(raw["b"], raw["b"][:-1] + b"\0")
    path.write_bytes(flipped)
    assert "Bad CRC-32" in read()

    # Code in a pickle does not run: neither its functions nor what hides behind known modules.
    for module, name in (("posix", "system"), ("builtins", "eval"), ("torch", "load")):
        call = f"c{module}\n{name}\n".encode() + text(f"touch {marker}") + b"\x85R."
        as_zip(path, b"\x80\x02" + call, {})
        assert f"it holds a {module}.{name}, which no state dict needs" in read()
    assert not marker.exists()

    for view in (("b", 5, 3, [1]), ("b", 5, -1, [1]), ("b", 5, 0, [9]), ("b", 5, 0, [-1])):
        outside = pickled({"b": SMALL["b"]}, lambda name, array, view=view: view)
        as_zip(path, outside, {"b": raw["b"]})
        assert "cannot be read" in read()


def test_other_networks_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    shapes = inception.parameter_shapes()
    monkeypatch.setattr(inception, "parameter_shapes", lambda: shapes)
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    def refused(state):
        monkeypatch.setattr(inception, "read_state_dict", lambda path: state)
        return error(inception.convert, path)

    gone = {name: array for name, array in state.items() if "Mixed_7c.branch_pool.bn" not in name}
    message = refused(gone)
    assert f"{path} lacks 4 of 471 parameters, such as Mixed_7c.branch_pool.bn.weight" in message
    message = refused(state | {"fc.weight": np.zeros((1000, 2048), np.float32)})
    assert f"{path}: fc.weight is [1000, 2048], expected [1008, 2048]" in message
    assert inception.URLS[0] in message
    message = refused(state | {"Mixed_5b.branch1x1.bn.bias": np.zeros((), np.float32)})
    assert "Mixed_5b.branch1x1.bn.bias is [], expected [64]" in message


# ---- finding the weights -----------------------------------------------------------------------------


@pytest.fixture
def as_published(published, tmp_path, monkeypatch):
    """The path of the random file, which replaces the published one; all caches are empty."""
    with open(published, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    monkeypatch.setattr(inception, "SIZE", published.stat().st_size)
    monkeypatch.setattr(inception, "SHA256", digest)
    monkeypatch.setattr(inception, "URLS", (published.as_uri(),))
    monkeypatch.setattr(data.archives, "BACKOFF", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    return published


def test_load(as_published, tmp_path, monkeypatch, random_extractor):
    extractor = inception.load(str(as_published))
    assert extractor.name == "inception-v3-compat" and "299" in extractor.resize
    assert extractor.sha256 == inception.SHA256
    monkeypatch.setattr(inception, "convert", lambda path: {"path": path})
    monkeypatch.setattr(inception, "extractor", lambda params, *, sha256: params["path"])
    assert not (tmp_path / "cache").exists()

    ours = tmp_path / "cache" / "ddpm_jax" / as_published.name
    assert inception.load() == ours  # downloaded
    assert [path.name for path in ours.parent.iterdir()] == [ours.name]
    monkeypatch.setattr(inception, "URLS", ((tmp_path / "gone" / ours.name).as_uri(),))
    assert inception.load() == ours  # found
    for torch in ("cache/torch", "elsewhere"):
        theirs = tmp_path / torch / "hub" / "checkpoints" / ours.name
        theirs.parent.mkdir(parents=True)
        ours.rename(theirs)
        assert inception.load() == theirs
        theirs.rename(ours)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "elsewhere"))
    ours.unlink()
    message = error(inception.load)
    assert "cannot download" in message and f"put {ours.name} into {ours.parent} by hand" in message


def test_what_load_refuses(as_published, tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    message = error(inception.load, path)
    assert f"no Inception weights at {path}: put {inception.URLS[0]} there" in message
    path.write_bytes(b"short")
    message = error(inception.load, path)
    assert f"expected {inception.SIZE} bytes, found 5" in message and inception.URLS[0] in message
    monkeypatch.setattr(inception, "SIZE", 5)
    assert f"expected SHA-256 {inception.SHA256}" in error(inception.load, path)
    (tmp_path / "cache").write_text("no folder")
    assert "Inception weights: " in error(inception.load)


def test_the_published_names_tell_the_sum():
    for url in inception.URLS:
        assert url.endswith(f"inception-2015-12-05-{inception.SHA256[:8]}.pth")


# ---- torch-fidelity itself ---------------------------------------------------------------------------


def torch_state():
    """random_state with the other entries that PyTorch saves for a norm."""
    import torch

    state = {name: torch.tensor(array) for name, array in random_state().items()}
    norms = [name.removesuffix("running_var") for name in state if name.endswith("running_var")]
    return state | {f"{name}num_batches_tracked": torch.tensor(7) for name in norms}


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_files_of_torch_itself(layout, tmp_path):
    pytest.importorskip("torch_fidelity")
    import torch

    path = tmp_path / "weights.pth"
    torch.save(torch_state(), path, _use_new_zipfile_serialization=layout == "zip")
    found = inception.read_state_dict(path)
    for name, array in random_state().items():
        np.testing.assert_array_equal(found[name], array)


def test_layer_by_layer_against_torch_fidelity(tmp_path):
    """Every convolution with its norm, every block, the resize and both ends; -s prints differences."""
    pytest.importorskip("torch_fidelity")
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as their_resize,
    )

    torch.set_num_threads(1)
    path = tmp_path / "weights.pth"
    torch.save(torch_state(), path)
    ends = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("", ends, feature_extractor_weights_path=path)
    params = inception.convert(path)
    ours = inception.extractor(params, sha256="0").features
    outputs = {}

    def keep(name):
        def hook(module, inputs, output):  # copies, since the ReLU behind a norm writes into it
            outputs[name] = output.numpy().transpose(0, 2, 3, 1).copy()

        return hook

    for name, module in theirs.named_modules():
        if name.endswith(".bn") or (name.startswith("Mixed") and "." not in name):
            module.register_forward_hook(keep(name.removesuffix(".bn")))

    @jax.jit
    def layers_of(params, x):
        apply = functools.partial(inception.Inception().apply, capture_intermediates=True)
        return apply({"params": params}, x)[1]["intermediates"]

    for pictures in (images(0, 2, 32, 32, 3), images(0, 2, 28, 28, 1), GOLDEN_IMAGES):
        in_colour = np.repeat(pictures, 3 // pictures.shape[-1], axis=-1)
        in_torch = torch.tensor(in_colour.transpose(0, 3, 1, 2))
        resized = their_resize(in_torch.float(), size=(299, 299), align_corners=False)
        expected = {"resize": resized.numpy().transpose(0, 2, 3, 1) / 128 - 1}
        expected |= dict(zip(ends, (end.numpy() for end in theirs(in_torch)), strict=True))
        x = jax.jit(inception.preprocess)(pictures)
        found = {"resize": x, **dict(zip(ends, ours(pictures), strict=True))}
        layers = layers_of(params, x)
        for name, output in outputs.items():
            (found[name],) = functools.reduce(dict.get, name.split("."), layers)["__call__"]
            expected[name] = output

        assert len(expected) == 3 + 94 + 11
        print(f"\n{pictures.shape}: largest difference, of largest value")
        for name, value in expected.items():
            assert value.std() > 0.1, name  # otherwise agreement would say little
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4, err_msg=name)
            print(f"  {name:28} {np.abs(found[name] - value).max():.1e}  {np.abs(value).max():.1f}")
        if pictures is GOLDEN_IMAGES:
            print(repr(expected["2048"][:, ::300]), repr(expected["logits_unbiased"][:, ::150]))

    pictures = images(0, 8, 32, 32, 3)
    in_torch = torch.tensor(pictures.transpose(0, 3, 1, 2))
    calls = {
        "torch-fidelity": lambda: theirs(in_torch),
        "ddpm_jax": lambda: jax.block_until_ready(ours(pictures)),
    }
    for name, call in calls.items():
        call()
        seconds = []
        for _ in range(5):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
        print(
            f"{name}: {8 / min(seconds):.1f} images for each second of a core, in batches of 8, the best of 5"
        )
