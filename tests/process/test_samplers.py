"""Samplers against the exact oracle, and their randomness against how a batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import optimized

from ddpm_jax.process import diffusion, schedules, timesteps
from ddpm_jax.process.samplers import DDIM, SAMPLERS, Ancestral

FULL = schedules.make("linear")
COUNTS = [1, 2, 7, 10, 37, 50, pytest.param(1000, marks=pytest.mark.slow)]  # of steps
N = 65_536  # numbers drawn; the mean is known to s/√N = 0.002, the standard deviation to s/√(2N)


def chain(steps):
    return timesteps.respace(FULL, timesteps.subsequence(steps, len(FULL)))


def said(variance, t):
    """What the networks of these tests give for a learned variance."""
    return np.cos(t) - (2.0 if variance == "learned" else 0.0)


@functools.cache
@optimized()
def draw(steps, sampler, prediction="eps", **options):
    schedule = chain(steps)
    shape = (N // 16, 4, 4, 1)
    keys = jax.random.split(jax.random.key(1), shape[0])
    x_T = diffusion.prior(schedule, keys, shape[1:])
    variance, variance_fn = options.pop("variance", None), None
    if variance in diffusion.LEARNED:
        table = said(variance, np.arange(len(FULL)))
        variance_fn = lambda x, t: jnp.broadcast_to(diffusion.at(table, t, x), x.shape)  # noqa: E731
    if variance == "analytic":
        error = oracle.x_0_error(schedule.alpha_bar)
        variance = diffusion.analytic_log_variance(schedule, error)
    denoiser = oracle.exact_denoiser(FULL, prediction, variance_fn, variance)
    return SAMPLERS[sampler](**options)(schedule, denoiser, x_T, keys, clip_x0=False)


def agrees(x, mean, std):
    assert abs(float(jnp.mean(x)) - mean) < 4 * std / np.sqrt(N)
    assert abs(float(jnp.std(x)) - std) < 4 * std / np.sqrt(2 * N)


def exact_moments(steps, variance):
    schedule = chain(steps)
    sigma2 = oracle.sigma2(schedule.alpha_bar, variance, said(variance, schedule.times))
    return oracle.ancestral_moments(schedule.alpha_bar, sigma2)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", COUNTS)
def test_ancestral_has_the_exact_moments(steps, variance):
    agrees(draw(steps, "ancestral", variance=variance), *exact_moments(steps, variance))


@pytest.mark.parametrize("variance", ["learned", "learned_range", "analytic"])
def test_ancestral_has_the_exact_moments_with_other_variances(variance):
    agrees(draw(7, "ancestral", variance=variance), *exact_moments(7, variance))


def test_the_analytic_variance_is_the_true_one():
    # Each reverse step is then exact for these data: after any number of them, so is what is drawn. The
    # last step of a chain adds no noise, and with it goes the variance of x_0 given x_1, 1e-4.
    for steps in (7, 50, 1000):
        np.testing.assert_allclose(exact_moments(steps, "analytic"), [0.3, 0.5], atol=2e-4)


def test_the_recursion_has_the_known_moments():
    moments = [exact_moments(1000, v) for v in ("fixed_large", "fixed_small")]
    np.testing.assert_allclose(moments, [[0.3, 0.5008], [0.3, 0.4961]], atol=5e-5)


@pytest.mark.parametrize("prediction", ["x_0", "v", "mean"])
def test_parameterisations_draw_the_same_images(prediction):
    same = draw(7, "ancestral", variance="fixed_small")
    other = draw(7, "ancestral", prediction, variance="fixed_small")
    np.testing.assert_allclose(other, same, atol=2e-3 if prediction == "mean" else 1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_one_step_is_the_posterior_with_its_noise(variance):
    # Two steps; at the last, x̂_0 = x_t, so the output is what the first step drew.
    two = schedules.from_betas([0.1, 0.4])
    x_0, x_t = 0.9, 0.4
    denoiser = diffusion.denoiser(
        two,
        lambda x, t: jnp.where(t[:, None, None, None] == 0, x, x_0),
        prediction="x_0",
        variance=variance,
    )
    keys = jax.random.split(jax.random.key(2), N)
    x_T = jnp.full((N, 1, 1, 1), x_t)
    x = Ancestral()(two, denoiser, x_T, keys, clip_x0=False)
    # q(x_1 | x_2, x_0) by hand: ᾱ = 0.9, 0.54
    mean = (np.sqrt(0.9) * 0.4 * x_0 + np.sqrt(0.6) * 0.1 * x_t) / 0.46
    std = {"fixed_large": np.sqrt(0.4), "fixed_small": np.sqrt(0.1 / 0.46 * 0.4)}[variance]
    agrees(x, mean, std)


@pytest.mark.parametrize("steps", [1, 7])
def test_no_noise_at_the_last_step(steps):
    # With x̂_0 fixed, the last step returns it whatever was drawn before.
    schedule, shape = chain(steps), (4, 2, 2, 1)
    options = {"prediction": "x_0", "variance": "fixed_large"}
    denoiser = diffusion.denoiser(FULL, lambda x, t: jnp.full_like(x, 0.25), **options)
    for seed in (3, 4):
        keys = jax.random.split(jax.random.key(seed), 4)
        x = Ancestral()(schedule, denoiser, diffusion.prior(schedule, keys, shape[1:]), keys)
        np.testing.assert_allclose(x, 0.25, rtol=1e-6)


def test_an_image_depends_on_its_key_alone():
    denoiser, schedule = oracle.exact_denoiser(FULL, variance="fixed_large"), chain(7)
    keys = jax.random.split(jax.random.key(5), 6)

    def run(keys):
        return Ancestral()(schedule, denoiser, diffusion.prior(schedule, keys, (3, 5, 2)), keys)

    whole = run(keys)
    parts = jnp.concatenate([run(keys[:1]), run(keys[1:5]), run(keys[5:])])
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert jnp.std(whole, axis=0).min() > 0  # and they all differ


def test_noise_differs_between_steps_and_from_the_prior():
    keys = jax.random.split(jax.random.key(6), 1000)
    draws = [diffusion.prior(FULL, keys, (1, 1, 1))]
    draws += [diffusion.noise(keys, t, (1, 1, 1)) for t in (0, 1, 999)]
    correlations = np.corrcoef(np.stack([np.ravel(d) for d in draws]))
    assert np.abs(correlations - np.eye(4)).max() < 4 / np.sqrt(1000)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_clipping_bounds_the_image_and_keeps_what_needs_none(sampler):
    options = {"prediction": "x_0", "variance": "fixed_large"}
    wild = diffusion.denoiser(FULL, lambda x, t: 3.0 * x, **options)
    calm = diffusion.denoiser(FULL, lambda x, t: 0.1 * jnp.tanh(x), **options)
    keys = jax.random.split(jax.random.key(7), 4)
    x_T = diffusion.prior(FULL, keys, (4, 4, 1))

    def run(denoiser, clip_x0):
        return SAMPLERS[sampler]()(chain(10), denoiser, x_T, keys, clip_x0=clip_x0)

    assert jnp.abs(run(wild, True)).max() <= 1.0 + 1e-6
    assert jnp.abs(run(wild, False)).max() > 1.0
    np.testing.assert_allclose(run(calm, True), run(calm, False), atol=1e-5)


def test_clipped_ddim_stays_consistent():
    # ε̂ re-derived from the clipped x̂_0: with x̂_0 clipped to 1, x_t lies on the line from 1 to the noise.
    two = schedules.from_betas([0.2, 0.5])
    denoiser = diffusion.denoiser(two, lambda x, t: jnp.where(t[0] == 0, x, 5.0), prediction="x_0")
    x_1 = DDIM()(two, denoiser, jnp.full((1, 1, 1, 1), 0.3), None)
    eps = (0.3 - np.sqrt(0.4)) / np.sqrt(0.6)  # x_2 = √ᾱ·1 + √(1 − ᾱ) ε with ᾱ = 0.4
    np.testing.assert_allclose(x_1, np.sqrt(0.8) + np.sqrt(0.2) * eps, rtol=1e-6)
