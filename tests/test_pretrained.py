"""Pretrained weights: numbers of diffusers and of OpenAI's code, both directions, and everything that is refused.

tests/pretrained_oracle.py wrote what these tests compare with; here neither PyTorch nor diffusers is needed.
"""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_oracle as oracle
import pytest

import ddpm_jax as dj
from ddpm_jax import extras, main, options, pretrained
from ddpm_jax.commands import pretrained as commands
from ddpm_jax.data import DataError
from ddpm_jax.ddpm import Sampling
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.run_data import RunError
from ddpm_jax.networks import UNet, init_params
from ddpm_jax.options import ConfigError
from ddpm_jax.pretrained import diffusers, names
from ddpm_jax.process import diffusion, schedules

PIPELINE = oracle.FOLDER / "pipeline"
safetensors = pytest.importorskip("safetensors.numpy")


@pytest.fixture(scope="module")
def stored():
    with np.load(oracle.FOLDER / "diffusers.npz") as file:
        return dict(file)


def seeded(shapes) -> dict:
    """The arrays whose names and shapes are stored."""
    shapes = json.loads(str(shapes))
    return {name: oracle.weights(name, tuple(shape)) for name, shape in shapes.items()}


def network_of(config: dict, shapes):
    """Our network with the weights of one of diffusers, (network, parameters, image shape, places)."""
    model, shape = diffusers.read_unet(config, "unet")
    network = UNet(**model, out_channels=config["out_channels"])
    network.check(shape)
    template = jax.eval_shape(lambda key: init_params(network, key, shape), jax.random.key(0))
    where = names.places(names.DIFFUSERS, network, shape, template)
    return network, names.read(where, seeded(shapes), "weights"), shape, where


def relative(found, expected) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ---- numbers -----------------------------------------------------------------------------------------


def some(cases, quick):
    """All cases, of which those that are not quick are marked as slow."""
    return [pytest.param(c, marks=[] if c in quick else [pytest.mark.slow]) for c in cases]


@pytest.mark.parametrize("name", some(oracle.NETWORKS, ["ho2020"]))
def test_network_of_diffusers(stored, name):
    config = json.loads(str(stored[f"{name}/config"]))
    network, params, shape, where = network_of(config, stored[f"{name}/shapes"])
    x, t, labels = oracle.inputs(shape, config["num_class_embeds"] or 0)
    for one in (network, network.clone(plain=True)):
        found = jax.jit(one.apply)({"params": params}, jnp.asarray(x), jnp.asarray(t), labels)
        assert relative(found, stored[f"{name}/output"]) < 1e-5

    back = names.write(where, params)
    for key, array in seeded(stored[f"{name}/shapes"]).items():
        np.testing.assert_array_equal(back.pop(key), array)
    assert not back
    fields, shape_again = diffusers.read_unet(diffusers.write_unet(network, shape), "unet")
    assert shape_again == shape and UNet(**fields, out_channels=network.out_channels) == network


def sampled(stored, i, monkeypatch, without=()):
    """Images of the sampler that case i is read as, with the noise of the oracle."""
    name, _, num_steps, eta = oracle.SCHEDULERS[i]
    fields = json.loads(str(stored[f"{i}/config"]))
    network = "learned" if fields.get("variance_type") == "learned_range" else "defaults"
    config = json.loads(str(stored[f"{network}/config"]))
    _, params, shape, _ = network_of(config, stored[f"{network}/shapes"])
    schedule, section, sampling = diffusers.read_scheduler(fields, name)
    model, _ = diffusers.read_unet(config, "unet")
    parts = {"schedule": schedules.make(**schedule), "network": UNet(**model)}
    method = options.build(dj.DDPM, section, "config.diffusion", **parts, image_shape=shape)
    sampling["steps"] = sampling["steps"].replace("50", str(num_steps))
    sampling = {key: value for key, value in sampling.items() if key not in without}
    sampling |= {} if eta is None else {"eta": eta}
    chosen = options.build(Sampling, sampling, "config.sampling")
    drawn = jnp.asarray(oracle.noise(num_steps, shape))
    monkeypatch.setattr(diffusion, "prior", lambda *args: drawn[-1])
    monkeypatch.setattr(diffusion, "step_noise", lambda chain, keys, t, shape: drawn[t])
    draw = jax.jit(lambda p: method.sample(p, jax.random.key(0), np.arange(2), None, chosen))
    return draw(params)


@pytest.mark.parametrize("i", some(range(len(oracle.SCHEDULERS)), [12, 15]))
def test_samples_of_diffusers(stored, i, monkeypatch):
    """Steps with the same noise.

    Rounding in the network grows by 1/α_T = 157 in the first x̂_0: between the fast and the plain form of our own network
    the images differ by up to 6e-5. The largest difference here was 1.3e-4.
    """
    assert relative(sampled(stored, i, monkeypatch), stored[f"{i}/output"]) < 3e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("i", "option"), [(11, "last_noise"), (14, "stride"), (13, "clipped_eps"), (18, "to_first")]
)
def test_options_that_agree_with_diffusers_matter(stored, i, option, monkeypatch):
    found = sampled(stored, i, monkeypatch, without=[option])
    assert relative(found, stored[f"{i}/output"]) > 3e-3


@pytest.mark.parametrize("name", some(oracle.OPENAI, ["improved"]))
def test_network_of_openai(name):
    with np.load(oracle.FOLDER / "openai.npz") as file:
        arrays, expected = seeded(file[f"{name}/shapes"]), file[f"{name}/output"]
    given = oracle.OPENAI[name]
    classes = given.get("num_classes", 0)
    network = UNet(
        channels=32,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_heads=given.get("num_heads", 1),
        head_channels=given.get("num_head_channels", 0),
        scale_shift=given.get("use_scale_shift_norm", False),
        num_classes=classes,
        num_groups=32,
        out_channels=given["out_channels"],
        resample_blocks=given.get("resblock_updown", False),
        time_scale=1000 / 4000,
        **pretrained.OF_OPENAI,
    )
    template = jax.eval_shape(lambda key: init_params(network, key, (8, 8, 3)), jax.random.key(0))
    where = names.places(names.OPENAI, network, (8, 8, 3), template)
    params = names.read(where, arrays, "weights")
    x, t, labels = oracle.inputs((8, 8, 3), classes)
    found = jax.jit(network.apply)({"params": params}, jnp.asarray(x), jnp.asarray(t), labels)
    assert relative(found, expected) < 1e-5


def test_openai_needs_a_config_and_takes_its_schedule(tmp_path, monkeypatch):
    with np.load(oracle.FOLDER / "openai.npz") as file:
        arrays = seeded(file["improved/shapes"])
    path = str(tmp_path / "model.pt")
    monkeypatch.setattr(pretrained, "read_state_dict", lambda name: arrays)
    (tmp_path / "model.pt").touch()
    with pytest.raises(ConfigError, match=r"holds weights only: give the --config"):
        pretrained.read(path)
    config = config_lib.from_file("cifar10_iddpm").copy_and_resolve_references().unlock()
    config.data.image_shape = (8, 8, 3)
    small = {"channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1}
    config.model.update(**small, attention_resolutions=(4,))
    found = pretrained.read(path, config)
    assert found.method.network.time_scale == 0.25 and found.method.network.cosine_first
    config.model.channels = 64
    with pytest.raises(DataError, match=r"has the shape .* and the network needs"):
        pretrained.read(path, config)


def test_variables_of_ho2020(tmp_path):
    """Their names, as their code makes them; the moving averages are taken, optimizer slots left out."""
    config = config_lib.from_file("cifar10").copy_and_resolve_references().unlock()
    config.data.image_shape = (8, 8, 3)
    small = {"channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1, "num_groups": 4}
    config.model.update(**small, attention_resolutions=(4,))
    method = dj.DDPM.from_config(config)
    params = method.init(jax.random.key(1))
    where = names.places(names.HO2020, method.sized_network, (8, 8, 3), params)
    arrays = {f"model/{name}": array for name, array in names.write(where, params).items()}
    for name in (
        "model/temb/dense0/W",
        "model/conv_in/b",
        "model/down_0/block_0/norm1/gamma",
        "model/down_0/block_0/temb_proj/W",
        "model/down_0/downsample/conv/W",
        "model/down_1/block_0/nin_shortcut/W",
        "model/down_1/attn_0/q/W",
        "model/mid/attn_1/proj_out/b",
        "model/mid/block_2/conv2/W",
        "model/up_1/upsample/conv/b",
        "model/up_0/block_1/norm2/beta",
        "model/norm_out/gamma",
        "model/conv_out/W",
    ):
        assert name in arrays, name
    average = "ExponentialMovingAverage"
    file = {f"{name}/{average}": array for name, array in arrays.items()}
    file |= {name: array + 1 for name, array in arrays.items()}
    file |= {f"{name}/Adam_1": array for name, array in arrays.items()}
    np.savez(tmp_path / "ho.npz", global_step=np.int64(3), **file)
    found = pretrained.read(str(tmp_path / "ho.npz"), config)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


# ---- run directories ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_import_sample_tune_export(tmp_path, capsys):
    """A pipeline becomes a run that is sampled, fine-tuned and exported; the bytes of the weights come back."""
    work = str(tmp_path / "run")
    main.main(["import", str(PIPELINE), f"--workdir={work}"])
    assert "parameters for images of 8×8×3" in capsys.readouterr().out
    main.main(["sample", f"--workdir={work}", "--num_samples=2", "--steps=leading5"])
    main.main(["report", f"--workdir={work}"])
    with pytest.raises(SystemExit):
        main.main(["nll", f"--workdir={work}", "--steps=5"])
    assert "the data of these pretrained weights are not known" in capsys.readouterr().err

    main.main(["export", work, str(tmp_path / "out"), "--licence=mit"])
    weights = "unet/diffusion_pytorch_model.safetensors"
    before, after = (safetensors.load_file(f / weights) for f in (PIPELINE, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    main.main(["import", str(tmp_path / "out"), f"--workdir={tmp_path / 'again'}"])
    main.main(["export", str(tmp_path / "again"), str(tmp_path / "out2")])
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "out2" / weights).read_bytes()

    first = dj.load(work).params
    flags = ["data.name=synthetic", "training.num_steps=1", "training.batch_size=4"]
    flags += ["preview.steps=2", f"init_from={work}", "optimizer.learning_rate=1e-9"]
    config = [f"--config={work}/config.json", *(f"--config.{flag}" for flag in flags)]
    main.main([*config, f"--workdir={tmp_path / 'tuned'}"])
    tuned = dj.load(str(tmp_path / "tuned")).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), tuned, first)


def test_load_pretrained():
    run = dj.load_pretrained(str(PIPELINE))
    assert run.method.variance == "fixed_large" and len(run.method.schedule) == 100
    assert run.config.init_from == str(PIPELINE)


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("time_embedding_type", "fourier", "expected 'positional'"),
        ("act_fn", "mish", "expected 'silu' or 'swish'"),
        ("class_embed_type", "timestep", "expected None"),
        ("mid_block_scale_factor", 1.4, "expected 1"),
        ("down_block_types", ["SkipDownBlock2D", "AttnDownBlock2D"], "down_block_types='SkipDown"),
        (
            "up_block_types",
            ["UpBlock2D", "UpBlock2D"],
            "attention at the levels of down_block_types",
        ),
        ("downsample_padding", 2, "expected 0 or 1"),
        ("sample_size", None, "the side of the images"),
        ("sample_size", 7, "a multiple of 2"),
        ("norm_num_groups", None, "norm_num_groups=None"),
        ("encoder_hid_dim", 3, "the field encoder_hid_dim=3"),
        ("block_out_channels", 3, "a field of the wrong type"),
        ("_class_name", "UNet2DConditionModel", "only UNet2DModel can be read"),
    ],
)
def test_network_that_cannot_be_expressed(tmp_path, field, value, message):
    """It is refused by name, before any weight is read."""
    shutil.copytree(PIPELINE, tmp_path / "p")
    path = tmp_path / "p" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    (tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=message) as error:
        pretrained.read(str(tmp_path / "p"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "expected DDPMScheduler or DDIMScheduler"),
        ({"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
        ({"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'"),
        ({"variance_type": "learned_range"}, "out_channels=3"),
        ({"clip_sample_range": 2.0}, "clip_sample_range=2.0"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps|wrong type|num_timesteps"),
        ({"trained_betas": [2.0, 3.0]}, r"every beta must lie in \(0, 1\]"),
        ({"rescale_betas_zero_snr": True}, "cannot recover x_0"),
    ],
)
def test_scheduler_that_cannot_be_expressed(tmp_path, fields, message):
    shutil.copytree(PIPELINE, tmp_path / "p")
    path = tmp_path / "p" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises((ConfigError, RunError), match=message) as error:
        pretrained.read(str(tmp_path / "p"))
    assert "\n" not in str(error.value)


def damaged(arrays, how):
    name = "conv_in.weight"
    if how == "missing":
        return {key: array for key, array in arrays.items() if key != name}
    if how == "more":
        return arrays | {"extra.weight": arrays[name]}
    changes = {
        "shape": arrays[name][:, :, :1],
        "nan": np.full_like(arrays[name], np.nan),
        "integers": arrays[name].astype(np.int32),
    }
    return arrays | {name: changes[how]}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "lacks the array conv_in.weight"),
        ("more", "has also the array extra.weight"),
        (
            "shape",
            r"conv_in.weight has the shape \(8, 3, 1, 3\), and the network needs \(8, 3, 3, 3\)",
        ),
        ("nan", "numbers that are not finite"),
        ("integers", "holds int32"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, how, message):
    shutil.copytree(PIPELINE, tmp_path / "p")
    path = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    safetensors.save_file(damaged(safetensors.load_file(path), how), path)
    with pytest.raises(DataError, match=message) as error:
        pretrained.read(str(tmp_path / "p"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 5, 100, 2000])
@pytest.mark.parametrize(
    "name",
    ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "unet/weights"],
)
def test_damaged_files(tmp_path, name, cut):
    shutil.copytree(PIPELINE, tmp_path / "p")
    path = tmp_path / "p" / name.replace("weights", "diffusion_pytorch_model.safetensors")
    content = path.read_bytes()
    if cut >= len(content):
        pytest.skip("the file is shorter")
    path.write_bytes(content[:cut])
    with pytest.raises((DataError, RunError), match=path.name) as error:
        pretrained.read(str(tmp_path / "p"))
    assert "\n" not in str(error.value)


def test_sources_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"there is no runs/none/here; expected a folder"):
        pretrained.read("runs/none/here")
    with pytest.raises(RunError, match=r"is not a folder of diffusers"):
        pretrained.read(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunError, match=r"is a run directory"):
        pretrained.read(str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs no-such-package .*: pip install no-such-package"):
        extras.load("no_such_module", "no-such-package", "this")


def test_models_that_cannot_be_exported(tmp_path):
    network = UNet(channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
    good = dj.DDPM(schedule=dj.linear_schedule(10, end=0.5), network=network, image_shape=(8, 8, 1))

    def refused(message, **changes):
        model = dj.DDPM(
            **{"schedule": good.schedule, "network": network, "image_shape": (8, 8, 1), **changes}
        )
        with pytest.raises(ConfigError, match=message):
            pretrained.write_folder(model, None, str(tmp_path / "out"), "")
        assert not (tmp_path / "out").exists()

    refused(
        "multiples of 2", image_shape=(7, 7, 1), network=network.clone(attention_resolutions=(7,))
    )
    refused("num_heads=2", network=network.clone(num_heads=2, attention_resolutions=(8, 4)))
    refused("time_scale", network=network.clone(time_scale=0.5))
    refused("variance-preserving", schedule=dj.straight_schedule(10), prediction="velocity")
    refused("prediction='mean'", prediction="mean")
    refused("variance='learned'", variance="learned", loss="hybrid")


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub, for one model with the files of `PIPELINE`."""

    files: ClassVar = {str(f.relative_to(PIPELINE)): f for f in PIPELINE.rglob("*") if f.is_file()}
    sha = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.partition(f"/resolve/{self.sha}/")[2] or path.partition("/resolve/main/")[2]
        if name in self.files:
            content = self.files[name].read_bytes()
        elif path.startswith("/api/models/somebody/small/tree/"):
            tree = [{"type": "file", "path": n, "size": 1, "oid": self.sha} for n in self.files]
            content = json.dumps(tree).encode()
        elif path.startswith("/api/models/somebody/small"):
            files = [{"rfilename": name} for name in self.files]
            info = {"id": "somebody/small", "sha": self.sha, "siblings": files, "tags": []}
            content = json.dumps(info | {"private": False, "downloads": 0}).encode()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.mark.slow
def test_hub(tmp_path):
    """A model is downloaded from the address in HF_ENDPOINT, and later read from the cache without a network."""
    pytest.importorskip("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "JAX_PLATFORMS": "cpu"}

    def load(name, **more):
        line = [sys.executable, "-m", "ddpm_jax.main", "import", name]
        line += [f"--workdir={tmp_path / f'run{len(list(tmp_path.iterdir()))}'}"]
        return subprocess.run(line, env=env | more, capture_output=True, text=True)

    first = load("somebody/small")
    assert first.returncode == 0, first.stderr
    assert f"asking {address}/somebody/small" in first.stdout
    missing = load("somebody/else")
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
    assert f"error: {address}/somebody/else cannot be read" in missing.stderr
    server.shutdown()
    server.server_close()
    offline = load("somebody/small", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


class FakeHub:
    """The two calls of huggingface_hub that --push makes."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, name, exist_ok):
        self.calls.append(("create", name, exist_ok))

    def upload_folder(self, *, repo_id, folder_path):
        self.calls.append(("upload", repo_id, sorted(os.listdir(folder_path))))
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [None, ValueError("401 Unauthorized\nlog in first")])
def test_push(tmp_path, monkeypatch, error):
    """The folder is complete before anything is sent, and stays if sending fails."""
    hub, load = FakeHub(error), extras.load

    def fake(module, *more):
        return hub if module == "huggingface_hub" else load(module, *more)

    monkeypatch.setattr(extras, "load", fake)
    run, out = dj.load_pretrained(str(PIPELINE)), tmp_path / "out"
    monkeypatch.setattr("ddpm_jax.commands.pretrained._card", lambda *args: "a card")
    if error:
        with pytest.raises(RunError, match=r"somebody/mine was not written \(401 .* is complete"):
            commands.export(run, out=str(out), push="somebody/mine")
    else:
        commands.export(run, out=str(out), push="somebody/mine")
    files = ["README.md", "model_index.json", "scheduler", "unet"]
    assert hub.calls == [("create", "somebody/mine", True), ("upload", "somebody/mine", files)]
    with pytest.raises(RunError, match=r"is not empty"):
        commands.export(run, out=str(out))


def test_no_extra_is_imported_before_it_is_asked_for():
    extras = "torch diffusers safetensors huggingface_hub tensorboard wandb imageio_ffmpeg"
    code = f"""
import sys, ddpm_jax.main, ddpm_jax.library
ddpm_jax.main.main(["--help"])
found = [name for name in "{extras}".split() if name in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
