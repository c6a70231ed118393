"""Ideas in one file: a sampler with an option from outside the package, flow matching, EDM, a new network."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import oracle
import pytest
from ml_collections import ConfigDict
from test_edit import make_config

from ddpm_jax import main, modes, options
from ddpm_jax.configs import digits
from ddpm_jax.ddpm import Sampling
from ddpm_jax.experiments import edm, flow_matching, my_network
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import results, runs
from ddpm_jax.method import from_config
from ddpm_jax.process import diffusion, schedules
from ddpm_jax.process.samplers import DDIM, Heun
from ddpm_jax.process.timesteps import shorten
from ddpm_jax.training import loop, resume

pytestmark = pytest.mark.slow

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
MINE = '''
import dataclasses
from ddpm_jax.options import option
from ddpm_jax.process.samplers.chain import scan

@dataclasses.dataclass(frozen=True, kw_only=True)
class Lazy:
    """Goes straight to the predicted image, and a share of the way only."""

    share: float = option(1.0, "The share of the way to the prediction that a step goes.")

    def __call__(self, chain, denoiser, x_T, keys, **loop):
        def step(k, i, x, denoised, carry):
            return x + self.share * (denoised.x_0 - x), carry
        return scan(chain, denoiser, x_T, step, **loop)
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with a run and the file of an idea, and a function that runs commands there."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_idea.py").write_text(MINE)
    loop.train(make_config(), folder / "run")

    def command(*arguments):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}", "XLA_FLAGS": ""}
        line = [sys.executable, "-m", "ddpm_jax.main", *arguments]
        given = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        return subprocess.run(line, check=False, **given)

    return folder, command


def test_a_sampler_of_ones_own_on_the_command_line(mine):
    folder, command = mine
    shared = ("--mode=sample", "--workdir=run", "--sampler=my_idea:Lazy")
    done = command(*shared, "--share=0.5", "--num_samples=3", "--steps=4", "--allow_code")
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "run" / "samples").glob("*share_0.5*.npz")
    recipe = json.loads(str(results.read_npz(str(path))["recipe"]))
    assert recipe["sampler"] == "my_idea:Lazy" and recipe["share"] == 0.5
    out = command(*shared, "--help").stdout
    assert "--share=VALUE" in out and "share of the way" in out and "Default: 1.0." in out
    refused = command(*shared, "--eta=0.5").stderr
    assert refused.startswith("error: eta is an option of sampler 'ddim'"), refused
    assert "did you mean '--share'" in command(*shared, "--shar=0.5").stderr


def test_samples_are_drawn_again_when_the_sampler_has_changed(mine):
    folder, command = mine
    shared = ("--mode=sample", "--workdir=run", "--sampler=my_idea:Lazy", "--num_samples=2")
    first = command(*shared, "--steps=3", "--allow_code")
    assert first.returncode == 0, first.stderr
    again = command(*shared, "--steps=3", "--allow_code")
    assert "2 images with this recipe exist already" in again.stdout
    with open(folder / "my_idea.py", "a") as file:
        file.write("# another version\n")
    again = command(*shared, "--steps=3", "--allow_code")
    assert again.returncode == 0 and "exist already" not in again.stdout, again.stdout


def test_a_sampler_of_ones_own_in_a_config_python_and_the_report(mine, monkeypatch):
    folder, _ = mine
    monkeypatch.syspath_prepend(str(folder))
    config = make_config()
    config.preview.sampler = "my_idea:Lazy"
    config.preview.share = 0.25
    loop.train(config, folder / "previewed")
    run = runs.load(str(folder / "previewed"), allow_code=True)
    assert run.config.preview.share == 0.25
    import my_idea

    sampling = Sampling(sampler=my_idea.Lazy(share=0.5), steps="4")
    path = modes.COMMANDS["sample"](run, sampling=sampling, num_samples=2)
    assert json.loads(str(results.read_npz(path)["recipe"]))["share"] == 0.5
    page = modes.COMMANDS["report"](str(folder / "previewed"), allow_code=True)
    with open(page, encoding="utf-8") as file:
        assert "share 0.5" in file.read()


# ---- other paths -------------------------------------------------------------------------------------


def exact_denoiser(chain):
    """The denoise_fn of a chain for data N(MEAN, STD²)."""
    gain = chain.alpha * oracle.STD**2 / (chain.alpha**2 * oracle.STD**2 + chain.sigma**2)
    shift = oracle.MEAN * (1 - gain * chain.alpha)

    def denoise_fn(x, i):
        x_0 = diffusion.at(gain, i, x) * x + diffusion.at(shift, i, x)
        return diffusion.Denoised(x_0, x_0, diffusion.noise_of(chain, x_0, x, i))

    return denoise_fn


def draw(sampler, chain):
    keys = jax.random.split(jax.random.key(0), 512)
    x_T = chain.prior_std * jax.random.normal(jax.random.key(1), (512, 4, 4, 1))
    return np.asarray(jax.jit(lambda: sampler(chain, exact_denoiser, x_T, keys, clip_x0=False))())


def test_eulers_step_on_a_straight_path_is_ddims():
    chain = shorten(schedules.straight(1000), "10")
    pairs = draw(flow_matching.Euler(), chain), draw(DDIM(), chain)
    np.testing.assert_allclose(*pairs, atol=1e-5)


@pytest.mark.parametrize("sampler, order", [(flow_matching.Euler(), 1), (flow_matching.Heun(), 2)])
def test_flow_matching_converges_at_its_order(sampler, order):
    errors = []
    for steps in (16, 32, 64):
        x = draw(sampler, shorten(schedules.straight(4096), str(steps)))
        errors.append(abs(x.std() - draw(flow_matching.Heun(), schedules.straight(1024)).std()))
    assert errors[0] / errors[2] > 0.8 * 4**order


def test_without_churn_it_is_heuns_method():
    chain = shorten(schedules.exploding(1000), "18")
    pairs = draw(edm.HeunWithChurn(), chain), draw(Heun(), chain)
    np.testing.assert_allclose(*pairs, rtol=1e-4, atol=1e-4)


def test_churn_keeps_the_distribution():
    x = draw(edm.HeunWithChurn(churn=20), shorten(schedules.exploding(1000), "40"))
    assert x.mean() == pytest.approx(oracle.MEAN, abs=0.02)
    assert x.std() == pytest.approx(oracle.STD, abs=0.02)


def test_noise_levels_are_log_normal():
    schedule = schedules.exploding(1000)
    keys = jax.random.split(jax.random.key(0), 20_000)
    t, weight = edm.LogNormal().draw(schedule, (), jax.random.key(1), keys, None)
    level = np.log(schedule.ratio[np.asarray(t)])
    assert level.mean() == pytest.approx(-1.2, abs=0.03) and level.std() == pytest.approx(
        1.2, abs=0.03
    )
    assert (np.asarray(weight) == 1).all()


@pytest.mark.parametrize("experiment", [flow_matching, edm, my_network], ids=lambda m: m.__name__)
def test_each_trains_and_draws(experiment, tmp_path):
    config = experiment.get_config("smoke")
    config.data.name = "synthetic"
    config.data.image_shape = (8, 8, 1)
    config.training.num_steps = 2
    config.preview.every = 2
    config.preview.num_images = 2
    if experiment is my_network:
        config.model.update(width=16, depth=1, num_heads=2)
    else:  # levels and attention are tested with the network
        config.model.update(channel_mults=(1,), attention_resolutions=())
    loop.train(config, tmp_path / "run")
    path = modes.COMMANDS["sample"](
        runs.load(str(tmp_path / "run")), num_samples=2, sampling=Sampling(steps="3")
    )
    assert results.read_npz(path)["images"].shape == (2, 8, 8, 1)


# ---- mistakes in a user's own file ---------------------------------------------------------------------

LOSSES = """
import sys; sys.path.append({here!r})
import jax.numpy as jnp
from test_edit import make_config

def short(schedule, x_0, t, eps):
    return eps

def broken(schedule, denoise_fn, x_0, t, eps):
    return jnp.mean(denoise_fn(x_0, t).eps, axis=(1, 2, 7))

def get_config():
    config = make_config()
    config.diffusion.loss = {loss!r}
    return config
"""


@pytest.mark.parametrize(
    "loss, words",
    [
        ("my_loss:nope", "my_loss.py has no 'nope'"),
        ("my_loss:short", "must take (schedule, denoise_fn, x_0, t, eps)"),
        ("my_loss:broken", "my_loss.py, line 10: "),
        ("my_los:broken", "there is no module 'my_los'"),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_one_line(loss, words, mine):
    folder, command = mine
    (folder / "my_loss.py").write_text(LOSSES.format(here=HERE, loss=loss))
    done = command("--config=my_loss.py", "--workdir=bad")
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error"))
    assert words in line and "Traceback" not in done.stderr and not (folder / "bad").exists()
    if "broken" in loss and "my_loss" in loss:
        assert "Traceback" in command("--config=my_loss.py", "--workdir=bad", "--debug").stderr


WRONG = """
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ddpm_jax.process.predictions import Prediction

class NoCall:
    share: float = 1.0

class Narrow:
    def __call__(self, chain, x_T): return x_T

class Halved:
    def __call__(self, chain, denoiser, x_T, keys, **loop): return x_T[:, ::2]

class Plain:
    out_channels: int = 1

class Fixed(nn.Module):
    def __call__(self, x, t, labels): return x

class Short(nn.Module):
    out_channels: int = 1
    def __call__(self, x): return x

class Wide(nn.Module):
    out_channels: int = 1
    @nn.compact
    def __call__(self, x, t, labels): return nn.Dense(3)(x)

class Empty(nn.Module):
    out_channels: int = 1
    def __call__(self, x, t, labels): return x

class Normed(nn.Module):
    out_channels: int = 1
    @nn.compact
    def __call__(self, x, t, labels): return nn.BatchNorm(use_running_average=False)(x)

def function(chain, denoiser, x_T, keys, **loop): return x_T

class Typed:
    share: "Nowhere" = 1.0
    def __init__(self, share: "Nowhere" = 1.0): pass

class Unchecked:
    def check(self): pass
    def __call__(self, chain, denoiser, x_T, keys, **loop): return x_T

def scalar(schedule, denoise_fn, x_0, t, eps): return jnp.mean(denoise_fn(x_0, t).eps)

def cold(num_timesteps, *, temperature): pass

def unchained(chain): pass

def nothing(trained, chain): pass

def pair(trained, chain): return np.zeros(len(chain)), np.ones(len(chain))

def of_three(trained, chain): return Prediction(np.zeros(3), np.ones(len(chain)), chain.times)

def of_zeros(trained, chain): return Prediction(*np.zeros((2, len(chain))), chain.times)

class Drawless: pass

class Timeless:
    def draw(self, schedule, state): return ()

class Late:
    def draw(self, schedule, state, key, keys, position):
        return jnp.full(len(keys), len(schedule)), jnp.ones(len(keys))

class Floating:
    def draw(self, schedule, state, key, keys, position):
        return jnp.zeros(len(keys)), jnp.ones(len(keys))

class Single:
    def draw(self, schedule, state, key, keys, position): return jnp.zeros((), int), jnp.ones(())

class Alone:
    def draw(self, schedule, state, key, keys, position): return jnp.zeros(len(keys), int)
"""


@pytest.mark.parametrize(
    "field, name, words",
    [
        ("preview.sampler", "Nothing", "wrong_{}.py has no 'Nothing'"),
        ("preview.sampler", "NoCall", "has no __call__(chain, denoiser, x_T, keys, clip_x0, keep)"),
        ("preview.sampler", "Narrow", "wrong_{}.py) takes (chain, x_T), and must take (chain, d"),
        ("preview.sampler", "Halved", "returns (1, 4, 8, 1), and must return (1, 8, 8, 1)"),
        ("model.name", "Plain", "wrong_{}.py) is not a flax Module"),
        ("model.name", "Fixed", "has no field out_channels, which the model fills in"),
        ("model.name", "Short", "wrong_{}.py) takes (x), and must take (x, t, labels)"),
        ("model.name", "Wide", "wrong_{}.py) returns (1, 8, 8, 3), and must return (1, 8, 8, 1)"),
        ("model.name", "Empty", "must have parameters, and no other variables; it has none"),
        ("model.name", "Normed", "no other variables; it has batch_stats, params"),
        ("preview.sampler", "function", "must be a dataclass, with its options as fields"),
        ("preview.sampler", "Typed", "wrong_{}.py): name 'Nowhere' is not defined"),
        ("preview.sampler", "Unchecked", "takes (), and must take (chain)"),
        ("diffusion.prediction", "unchained", "takes (chain), and must take (trained, chain)"),
        ("diffusion.prediction", "nothing", "returns NoneType, and must return a Prediction"),
        ("diffusion.prediction", "pair", "returns tuple, and must return a Prediction"),
        ("diffusion.prediction", "of_three", "of_x_0 of shape (3,), and must return a Prediction"),
        ("diffusion.prediction", "of_zeros", "cannot recover x_0 on this schedule"),
        ("diffusion.t_sampling", "Drawless", "wrong_{}.py) has no draw"),
        ("diffusion.t_sampling", "Timeless", "must take (schedule, state, key, keys, position)"),
        ("diffusion.t_sampling", "Late", "it returns t from 10 to 10"),
        ("diffusion.t_sampling", "Floating", "it returns float32 [8], float32 [8]"),
        ("diffusion.t_sampling", "Single", "it returns int32 [], float32 []"),
        ("diffusion.t_sampling", "Alone", "it returns int32 [8]"),
        ("diffusion.loss", "scalar", "wrong_{}.py) returns (), and must return (1,)"),
        ("schedule.name", "cold", "cold' lacks the field 'temperature'"),
    ],
    ids=lambda word: None if " " in word else word,
)
def test_what_a_file_offers_is_checked(field, name, words, tmp_path, monkeypatch):
    module = f"wrong_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = digits.get_config("smoke")
    config.data.image_shape, config.schedule.num_timesteps = (8, 8, 1), 10
    config.model.update(
        {
            "channels": 8,
            "channel_mults": (1,),
            "num_groups": 2,
            "dropout": 0.0,
            "attention_resolutions": (),
        }
    )
    config.training.num_steps = config.preview.every = 1
    section, key = field.split(".")
    if section == "model":
        config.model = ConfigDict()
    if section == "schedule":
        config.schedule = ConfigDict({"num_timesteps": 10})
    config.training.batch_size, config.preview.num_images = 4, 3
    with config.unlocked():
        config[section][key] = f"{module}:{name}"
    with pytest.raises(options.ConfigError) as error:
        loop.train(config, tmp_path / "run")
    assert words.format(name.lower()) in str(error.value), error.value
    assert "\n" not in str(error.value)


METHOD = '''
import dataclasses

import jax.numpy as jnp

import ddpm_jax as dj


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    scale: float = dj.option(1.0, "The factor of the mean image.")
    is_negative: bool = dj.option(False, "Whether the image is inverted.")


class Mean(dj.Method):
    """Draws the mean image."""

    image_shape, metric_names, Sampling = (8, 8, 1), (), Settings

    @classmethod
    def from_config(cls, config):
        return cls()

    def init(self, key):
        return jnp.ones(self.image_shape)

    def loss_fn(self, params, loss_state, key, batch):
        return jnp.mean((batch["image"] / 127.5 - 1 - params[None]) ** 2, axis=(1, 2, 3)), {}, ()

    def sample(self, params, key, index, label, sampling=Settings()):
        sign = -1 if sampling.is_negative else 1
        return sign * sampling.scale * jnp.repeat(params[None], len(index), axis=0)
'''


MISTAKEN = """

class NoMaker:
    pass

class NoKey(Mean):
    def init(self): return jnp.ones(self.image_shape)

class Scalar(Mean):
    def loss_fn(self, params, loss_state, key, batch): return jnp.mean(params)

class Total(Mean):
    def loss_fn(self, params, loss_state, key, batch): return jnp.mean(params), {}, ()

class Named(Mean):
    metric_names = ("gap",)

class One(Mean):
    def sample(self, params, key, index, label, sampling=Settings()): return params

def not_a_method(config): return 3

class Wider(dj.DDPM):
    def compare(self, denoise_fn, x_0, t, eps): return jnp.zeros(3), {}
"""


@pytest.mark.parametrize(
    "name, words",
    [
        ("NoMaker", ".py) has no from_config(config)"),
        ("NoKey", ".py) takes (), and must take (key)"),
        ("Scalar", ".py) returns one array, and must return (loss [B], metrics "),
        ("Total", ".py) returns (), and must return (1,)"),
        ("Named", ".py) returns the metrics none, and its metric_names are gap"),
        ("One", ".py) returns (8, 8, 1), and must return (1, 8, 8, 1)"),
        ("not_a_method", "is not a Method: it has no image_shape, num_classes"),
        ("Wider", "Wider.compare ({}.py) returns (3,), and must return (1,)"),
    ],
)
def test_what_a_method_returns_is_checked(name, words, tmp_path, monkeypatch):
    module = f"mistaken_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(METHOD + MISTAKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = make_config()
    config.method = f"{module}:{name}"
    config.training.update(batch_size=4, num_steps=1)
    config.preview = ConfigDict({"every": 1, "num_images": 2})
    with pytest.raises(options.ConfigError) as error:
        loop.train(config, tmp_path / "run")
    words = words.format(tmp_path / module)
    assert words in str(error.value), error.value


def test_init_and_update_of_a_time_sampler_are_optional(tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(WRONG.replace("len(schedule)),", "len(schedule) - 1),"))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = make_config()
    config.diffusion.t_sampling = "late:Late"
    config.training.num_steps = 1
    assert int(loop.train(config, tmp_path / "run").step) == 1


def test_the_options_of_a_method_are_flags(tmp_path, monkeypatch, capfd):
    def command_in(*arguments):
        status = 0
        try:
            main.main(list(arguments))
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_method.py").write_text(METHOD)
    config = digits.get_config("smoke")
    for section in ("model", "schedule", "diffusion"):
        del config[section]
    config.method, config.training.num_steps = "my_method:Mean", 1
    config.preview = ConfigDict({"every": 1, "num_images": 1})
    loop.train(config, str(tmp_path / "run"))
    sample = ("--mode=sample", "--workdir=run", "--num_samples=2", "--out=x.npz")
    status, out, err = command_in(*sample, "--scale=0.5", "--is_negative", "--allow_code")
    assert status == 0, err
    images = np.load(tmp_path / "x.npz")["images"]
    assert abs(images.mean() - 64) < 1
    status, out, err = command_in(*sample, "--help", "--allow_code")
    assert "--scale=VALUE" in out and "--[no]is_negative" in out and "--sampler" not in out
    status, out, err = command_in(*sample, "--scale=0.5")
    assert status == 2 and err.startswith("error: there is no flag --scale")
    assert "(options of the code of this run, my_method:Mean, need --allow_code)" in err
    status, out, err = command_in(*sample, "--scal=0.5", "--allow_code")
    assert status == 2 and "did you mean '--scale'?" in err
    status, out, err = command_in(*sample, "--steps=5", "--allow_code")
    assert status == 2 and "--steps is for diffusions" in err


def test_new_fields_of_a_subclass_of_DDPM_are_fields_of_the_command_line(
    mine, monkeypatch, tmp_path
):
    (tmp_path / "my_model.py").write_text(
        "import dataclasses\n"
        "from ddpm_jax.ddpm import DDPM\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)\n"
        "class Mine(DDPM):\n"
        "    share: float = 0.5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = digits.get_config("smoke")
    config.method = "my_model:Mine"
    config_lib.override(config, "diffusion.share", "0.25", resume.readers_of)
    assert config.diffusion.share == 0.25 and from_config(config).share == 0.25
    for field, near in (("diffusion.shar", "share"), ("diffusion.sigma", ""), ("model.parent", "")):
        with pytest.raises(options.ConfigError, match=f"no field config.{field}.*{near}"):
            config_lib.override(config, field, "1", resume.readers_of)


@pytest.mark.parametrize(
    "field, value, is_foreign",
    [
        ("model.name", "evil-probe:X", True),
        ("model.name", "evil:X-", True),
        ("model.name", "ddpm_jaxx:X", True),
        ("model.name", "npz:X", True),
        ("method", "evil", True),
        ("method", "ddpm_jax.ddpm", False),
        ("model.name", "experiments.my_network:DiT", False),
        ("model.name", "experiments.evil:DiT", True),
        ("data.name", "npz:a:b/c.npz", False),
        ("data.name", "evil:load", True),
        ("data.data_dir", "C:/data", False),
    ],
)
def test_code_of_others_is_found_however_it_is_written(field, value, is_foreign):
    config = digits.get_config()
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
    assert runs.foreign_modules(config) == ([value] if is_foreign else [])
