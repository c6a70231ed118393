"""The auto-encoder with one latent against quadrature, and whole runs of it."""

import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from running import call
from scipy import stats
from test_configs import trace_step

from ddpm_jax import data
from ddpm_jax.experiments import vae
from ddpm_jax.experiments.vae import __main__ as command
from ddpm_jax.experiments.vae import config as vae_config
from ddpm_jax.experiments.vae import draws
from ddpm_jax.files.run_data import RunError
from ddpm_jax.method import from_config
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop
from ddpm_jax.training import step as training

pytestmark = pytest.mark.slow

Z = np.linspace(-14, 14, 14001)
DZ = Z[1] - Z[0]


def make_config(shape=(2, 2, 1), **changes):
    config = vae_config.get_config("smoke")
    config.data.image_shape = shape
    config.vae.update({"latents": 1, "hidden": 3, **changes})
    return config


@pytest.fixture(scope="module")
def one_latent():
    """A Method, its network, parameters of a nonlinear decoder and a poor encoder, and an image."""
    config = make_config()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(from_config(config).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.float32(rng.normal(0, 1.2, leaf.shape)), shapes)
    params["encoder_log_variance"]["bias"] += 1.0  # with σ near 1 mistakes would not show
    network = vae.make_network(config.data.image_shape, **config.vae)
    image = np.array([[255, 40], [0, 128]], np.uint8).reshape(1, 2, 2, 1)
    return from_config(config), network, params, image


def exact(params, image):
    """log p(x), E_q[log p(x|z)], KL(q ‖ prior) and KL(q ‖ posterior), by the trapezoidal rule in float64."""
    p = jax.tree.map(np.float64, params)

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    x = image.reshape(-1) / 255.0
    h = np.maximum(dense("encoder_hidden", x), 0)
    mean, variance = dense("encoder_mean", h), np.exp(dense("encoder_log_variance", h))
    y = 1 / (
        1 + np.exp(-dense("decoder_logits", np.maximum(dense("decoder_hidden", Z[:, None]), 0)))
    )
    log_p_x = (x * np.log(y) + (1 - x) * np.log(1 - y)).sum(axis=1)
    log_prior = -0.5 * (Z**2 + np.log(2 * np.pi))
    log_q = -0.5 * ((Z - mean) ** 2 / variance + np.log(2 * np.pi * variance))
    log_p = np.log(np.sum(np.exp(log_p_x + log_prior)) * DZ)
    q = np.exp(log_q) * DZ
    assert q.sum() == pytest.approx(1)
    to_posterior = np.sum(q * (log_q - (log_p_x + log_prior - log_p)))
    return log_p, np.sum(q * log_p_x), np.sum(q * (log_q - log_prior)), to_posterior


def batch_of(image, count):
    index = np.arange(count, dtype=np.int32)
    return {
        "image": np.repeat(image, count, axis=0),
        "label": np.zeros(count, np.int32),
        "index": index,
        "place": np.float32(index / count),
    }


def close(values, expected):
    """Whether the mean of independent draws is within four standard errors of the expected value."""
    values = np.asarray(values, np.float64)
    return abs(values.mean() - expected) < 4 * values.std() / np.sqrt(len(values))


def test_the_loss_is_the_bound_on_the_exact_likelihood(one_latent):
    method, _, params, image = one_latent
    log_p, log_p_x, kl, to_posterior = exact(params, image)
    assert to_posterior > 0.1 and kl > 0.1  # an encoder that knows it all would prove little
    np.testing.assert_allclose(log_p_x - kl, log_p - to_posterior, rtol=1e-8)  # the identity (1)
    key = jax.random.key(1)
    loss, metrics, _ = jax.jit(method.loss_fn)(params, (), key, batch_of(image, 20_000))
    assert close(loss, -(log_p - to_posterior))
    assert close(metrics["reconstruction"][0], -log_p_x)
    np.testing.assert_allclose(metrics["kl"][0], kl, rtol=1e-5)
    assert np.mean(loss) > -log_p


def test_importance_weights_close_the_gap(one_latent):
    _, network, params, image = one_latent
    log_p, log_p_x, kl, to_posterior = exact(params, image)
    images, index = np.repeat(image, 500, axis=0), np.arange(500)

    def bounds(num_draws):
        function = jax.jit(command.make_bounds(network, num_draws))
        return jax.device_get(function(params, jax.random.key(2), images, index))

    one, many = bounds(1), bounds(1000)
    assert close(one["log_p"], log_p_x - kl) and close(one["elbo"], log_p_x - kl)
    assert close(many["elbo"], log_p_x - kl) and close(many["reconstruction"], -log_p_x)
    assert abs(many["log_p"].mean() - log_p) < 0.05 * to_posterior
    np.testing.assert_allclose(many["elbo"], -many["reconstruction"] - many["kl"], rtol=1e-6)


def test_the_divergence_is_the_mean_log_ratio(one_latent):
    _, network, params, image = one_latent
    eps = jax.random.normal(jax.random.key(3), (20_000, 1, 1))
    _, kl, log_ratio = vae.parts(network, params, vae.grey(image), eps)
    assert close(-log_ratio[:, 0], float(kl[0]))


def test_the_likelihood_of_all_binary_images_is_one():
    logits = jnp.asarray([0.3, -2.0, 5.0, -40.0])
    binary = np.array(list(itertools.product([0.0, 1.0], repeat=4)), np.float32)
    log_p = vae.log_bernoulli(binary, logits[None])
    np.testing.assert_allclose(np.exp(log_p).sum(), 1.0, rtol=1e-5)
    grey = np.array([0.2, 0.9, 0.5, 0.0], np.float32)
    p_binary = np.prod(np.where(binary == 1, grey, 1 - grey), axis=1)
    expected = np.sum(p_binary * np.asarray(log_p, np.float64))  # of an image drawn by its greys
    np.testing.assert_allclose(vae.log_bernoulli(grey, logits), expected, rtol=1e-5)


def test_an_example_does_not_depend_on_its_batch():
    method = from_config(make_config((4, 4, 1), latents=3, hidden=8))
    params = method.init(jax.random.key(0))
    batch = batch_of(np.zeros((1, 4, 4, 1), np.uint8), 6)
    batch["image"] = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1)).astype(np.uint8)
    loss_fn, key = jax.jit(method.loss_fn), jax.random.key(1)
    loss, metrics, _ = loss_fn(params, (), key, batch)
    some = np.array([4, 1, 5])
    part, part_metrics, _ = loss_fn(params, (), key, jax.tree.map(lambda x: x[some], batch))
    np.testing.assert_allclose(part, loss[some], rtol=1e-6)
    for name in method.metric_names:
        np.testing.assert_allclose(part_metrics[name][0], metrics[name][0][some], rtol=1e-6)
    same = dict(batch, image=np.repeat(batch["image"][:1], 6, axis=0))
    assert len(set(np.asarray(loss_fn(params, (), key, same)[0]).tolist())) == 6  # own noise each

    draw = jax.jit(method.sample)
    images = draw(params, key, np.arange(6), np.zeros(6, np.int32))
    assert images.shape == (6, 4, 4, 1) and (np.abs(images) <= 1).all()
    np.testing.assert_allclose(draw(params, key, some, some), images[some], rtol=1e-5, atol=1e-6)


def test_flips_are_the_config_s():
    plain = make_config((2, 2, 1))
    flipped = make_config((2, 2, 1))
    flipped.data.flip = True
    image = np.array([[255, 40], [0, 128]], np.uint8).reshape(1, 2, 2, 1)
    params = from_config(plain).init(jax.random.key(0))
    as_it_is, mirrored, either = (
        np.asarray(jax.jit(from_config(config).loss_fn)(params, (), jax.random.key(0), batch)[0])
        for config, batch in (
            (plain, batch_of(image, 16)),
            (plain, batch_of(image[:, :, ::-1], 16)),
            (flipped, batch_of(image, 16)),
        )
    )
    turned = np.isclose(either, mirrored, rtol=1e-6)
    assert 0 < turned.sum() < 16
    np.testing.assert_allclose(either[~turned], as_it_is[~turned], rtol=1e-6)


def test_the_gradient_reaches_every_parameter():
    method = from_config(make_config((4, 4, 1), latents=2, hidden=8))
    params = method.init(jax.random.key(0))
    batch = batch_of(np.full((1, 4, 4, 1), 200, np.uint8), 4)

    @jax.jit
    @jax.grad
    def gradient(params):
        return method.loss_fn(params, (), jax.random.key(1), batch)[0].mean()

    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient(params)))


@pytest.mark.parametrize("variant, latents", [("", 20), ("2", 2), ("smoke", 2)])
def test_the_training_step_of_every_variant(variant, latents):
    config = vae_config.get_config(variant)
    before, after, loss = trace_step(config)
    assert after == before and loss.shape == () and loss.dtype == np.float32
    assert config.vae.latents == latents
    if variant != "smoke":  # 784–500–2·J and J–500–784, with biases
        count = sum(leaf.size for leaf in jax.tree.leaves(before.params))
        assert count == 785 * 500 + 501 * 2 * latents + (latents + 1) * 500 + 501 * 784
        assert f"{count:,} parameters" in vae_config.__doc__


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("latent", 3, "did you mean 'latents'"),
        ("latents", 0, "must be at least 1"),
        ("hidden", 2.5, "config.vae.hidden must be a whole number"),
    ],
)
def test_mistakes_are_one_line(name, value, said):
    config = make_config()
    with config.vae.unlocked(), config.vae.ignore_type():
        config.vae[name] = value
    with pytest.raises(ConfigError, match=said):
        from_config(config)


def test_the_loss_of_several_draws_is_their_mean(one_latent):
    _, _, params, image = one_latent
    n, key = 6, jax.random.key(3)
    batch = {"image": np.repeat(image, n, axis=0), "index": np.arange(n, dtype=np.int32)}
    keys = jax.vmap(lambda k: jax.random.split(k)[0])(vae.fold_in_each(key, batch["index"]))
    for count in (1, 5):
        config = make_config()
        with config.unlocked():
            config.vae.draws = count
        method = from_config(config)
        network = vae.make_network(config.data.image_shape, **config.vae)
        loss, metrics, _ = jax.jit(method.loss_fn)(params, (), key, batch)
        eps = jax.vmap(lambda k, n=count: jax.random.normal(k, (n, 1)))(keys)  # [B, K, J]
        each = [
            vae.parts(network, params, vae.grey(batch["image"]), eps[None, :, k])
            for k in range(count)
        ]
        np.testing.assert_allclose(
            loss,
            np.mean([kl - reconstruction[0] for reconstruction, kl, _ in each], axis=0),
            rtol=1e-5,
        )
        np.testing.assert_allclose(loss, metrics["reconstruction"][0] + metrics["kl"][0], rtol=1e-6)
    # One draw is what it was before there were several: the same noise.
    once = jax.vmap(lambda k: jax.random.normal(k, (1,)))(keys)
    np.testing.assert_array_equal(
        jax.vmap(lambda k: jax.random.normal(k, (1, 1)))(keys)[:, 0], once
    )
    with pytest.raises(ConfigError, match="draws must be at least 1"):
        config.vae.draws = 0
        from_config(config)


def test_the_gradient_s_variance_is_taken_apart(one_latent):
    _, network, params, image = one_latent
    several = np.random.default_rng(0).integers(0, 256, (50, 2, 2, 1), np.uint8)
    key = jax.random.key(0)
    D, Z = draws.gradient_variances(network, params, np.repeat(image, 400, axis=0), key)
    assert Z > 0.1 and abs(D) < 0.1 * Z  # one image: all of it is between draws
    still = jax.tree.map(np.copy, params)
    still["encoder_log_variance"]["kernel"] *= 0.0
    still["encoder_log_variance"]["bias"] -= 60.0  # σ of z is e^−30: no noise is left
    D, Z = draws.gradient_variances(network, still, several, key)

    def loss(params, x):
        log_p, kl, _ = vae.parts(network, params, x[None], jnp.zeros((1, 1, 1)))
        return (kl - log_p[0])[0]

    gradient = jax.jit(jax.grad(loss))
    gradients = [gradient(still, x) for x in vae.grey(several)]
    flat = np.stack(
        [np.concatenate([g.ravel() for g in jax.tree.leaves(g)]) for g in jax.device_get(gradients)]
    )
    assert Z < 1e-6 * D and pytest.approx(np.var(flat, axis=0, ddof=1).sum(), rel=1e-4) == D


def test_the_table_of_draws_compares_seed_by_seed():
    found = {(1, 10): [(-5.0, 3.0), (-7.0, 2.0)], (5, 10): [(-4.0, 9.0), (-6.5, 8.0)]}
    first, second = draws.table(found).splitlines()[2:]
    assert first == "| 1 | 10 | -6.00 ± 1.00 |  | 2 |"
    assert second == "| 5 | 10 | -5.25 ± 1.25 | 0.75 ± 0.25 | 8 |"


def test_a_run_its_samples_and_what_is_measured_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "ddpm_jax.files.writers.save_loss_curve", lambda *args: None
    )  # takes a second
    workdir = str(tmp_path / "run")
    state = loop.train(vae_config.get_config("smoke"), workdir)
    out = call("sample", workdir, num_samples=5)
    with np.load(out) as file:
        assert file["images"].shape == (5, 8, 8, 1)

    command.main([f"--workdir={workdir}", "--num_images=10", "--batch_size=4", "--num_draws=3"])
    (path,) = (tmp_path / "run" / "eval").glob("*.json")
    result = json.loads(path.read_text())
    assert result["num_images"] == 10 and result["recipe"]["num_draws"] == 3
    assert (
        f"ELBO {result['elbo']:.2f} ± {result['elbo_stderr']:.2f} nats" in capsys.readouterr().out
    )

    with pytest.raises(RunError, match=r"its own command is python -m experiments\.vae"):
        call("nll", workdir, num_images=2)

    # By hand, in one batch: the same images and the same draws.
    run, network = command.load(workdir, "ema")
    images = command.run_data.load_data(run.config, split="test").images
    rows, key = data.choose(len(images), 10), training.make_keys(0).evaluate
    values = command.make_bounds(network, 3)(run.params, key, images[rows], rows)
    for name, each in values.items():
        assert result[name] == pytest.approx(float(np.mean(each)), rel=1e-5)

    picture = np.asarray(Image.open(next((tmp_path / "run" / "samples").glob("*plane.png"))))
    assert picture.shape[0] == picture.shape[1] >= 20 * 8 and picture.std() > 1
    expected = command.plane(network, state.ema_params)
    np.testing.assert_array_equal(command.plane(network, run.params), expected)


def test_the_plane_is_even_in_probability_with_z_1_to_the_right_and_z_2_upwards():
    network = vae.Network(pixels=2, latents=2, hidden=4)
    pass_on = np.float32([[1, -1, 0, 0], [0, 0, 1, -1]])  # relu(z) − relu(−z) is z
    params = {"decoder_hidden": {"kernel": pass_on, "bias": np.zeros(4, np.float32)}}
    params["decoder_logits"] = {"kernel": pass_on.T, "bias": np.zeros(2, np.float32)}
    levels = command.plane(network, params).reshape(20, 20, 2) / 255.0
    z = np.log(levels / (1 - levels))  # what the pixels say of their code
    expected = stats.norm.ppf((np.arange(20) + 0.5) / 20)
    np.testing.assert_allclose(z[..., 0], np.tile(expected, (20, 1)), atol=0.03)
    np.testing.assert_allclose(z[..., 1], np.tile(expected[::-1, None], (1, 20)), atol=0.03)


def test_a_run_of_another_method_is_refused(capsys, monkeypatch):
    run = SimpleNamespace(workdir="runs/other", config=SimpleNamespace(method="ddpm_jax.ddpm"))
    monkeypatch.setattr(command.runs, "load", lambda *args, **options: run)
    with pytest.raises(SystemExit) as exit:
        command.main(["--workdir=runs/other"])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 1 and "error: runs/other is a run of ddpm_jax.ddpm" in line
