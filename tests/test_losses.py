"""Losses against divergences computed from the distributions themselves, and their minima."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from ddpm_jax import diffusion, gaussians, losses, schedules

FULL = schedules.make("linear")
rng = np.random.default_rng(0)
X_0 = jnp.asarray(rng.uniform(-1, 1, (6, 4, 4, 1)), jnp.float32)
EPS = jnp.asarray(rng.normal(size=X_0.shape), jnp.float32)
T_S = jnp.array([1, 2, 50, 300, 700, 999])


def guesser(schedule, prediction):
    """A denoiser that is wrong in a known way: x̂_0 = x_0 + something small."""
    error = 0.05 * jnp.cos(jnp.arange(X_0.size, dtype=jnp.float32)).reshape(X_0.shape)

    def network_fn(x_t, t):
        return diffusion.from_x_0(schedule, prediction, X_0 + error, x_t, t)

    return diffusion.denoiser(schedule, network_fn, prediction=prediction)


def test_simple_is_the_squared_error_of_the_noise():
    zero = diffusion.denoiser(FULL, lambda x, t: jnp.zeros_like(x))
    np.testing.assert_allclose(
        losses.simple(FULL, zero, X_0, T_S, EPS), np.mean(np.square(EPS), axis=(1, 2, 3)), rtol=1e-6
    )


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_simple_vanishes_for_the_truth(prediction):
    def network_fn(x_t, t):
        return diffusion.from_x_0(FULL, prediction, X_0, x_t, t)

    denoise_fn = diffusion.denoiser(FULL, network_fn, prediction=prediction)
    loss = losses.simple(FULL, denoise_fn, X_0, T_S, EPS, prediction=prediction)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


@pytest.mark.parametrize("variance", diffusion.VARIANCES)
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_variational_weights_are_the_divergence(prediction, variance):
    """w_t ‖error‖² = KL(q(x_{t−1}|x_t, x_0) ‖ p) less the constant of the two fixed variances."""
    x_t = diffusion.q_sample(FULL, X_0, T_S, EPS)
    denoised = guesser(FULL, prediction)(x_t, T_S)
    log_posterior = diffusion.at(diffusion.posterior_log_variance(FULL), T_S, x_t)
    log_reverse = diffusion.at(diffusion.reverse_log_variance(FULL, variance), T_S, x_t)

    def divergence(mean):
        true_mean = diffusion.posterior_mean(FULL, X_0, x_t, T_S)
        nats = gaussians.kl(true_mean, log_posterior, mean, log_reverse)
        return losses.mean_over_pixels(nats)

    mean = diffusion.posterior_mean(FULL, denoised.x_0, x_t, T_S)
    expected = divergence(mean) - divergence(diffusion.posterior_mean(FULL, X_0, x_t, T_S))
    ours = losses.variational(
        FULL, guesser(FULL, prediction), X_0, T_S, EPS, prediction=prediction, variance=variance
    )
    expected *= 1000 / np.log(2)
    # The mean differs by 1e-6 at t = 999, where float32 leaves few digits of either side.
    np.testing.assert_allclose(ours[:-1], expected[:-1], rtol=2e-2)


@pytest.mark.parametrize("variance", diffusion.VARIANCES)
def test_weights_of_all_parameterisations_agree(variance):
    """The same error of x̂_0 costs the same, however the network says it: float64, Ho et al. (8)–(12)."""
    a, p = FULL.alpha_bar, FULL.alpha_bar_prev
    sigma2 = FULL.beta if variance == "fixed_large" else FULL.beta * (1 - p) / (1 - a)
    w = {k: losses.variational_weight(FULL, k, variance)[1:] for k in diffusion.PREDICTIONS}
    by_hand = p * (1 - FULL.alpha) ** 2 / (2 * sigma2 * (1 - a) ** 2 + (np.arange(1000) == 0))
    np.testing.assert_allclose(w["x_0"], by_hand[1:], rtol=1e-9)
    np.testing.assert_allclose(w["eps"], w["x_0"] * ((1 - a) / a)[1:], rtol=1e-9)
    np.testing.assert_allclose(w["v"], w["x_0"] * (1 - a)[1:], rtol=1e-9)
    np.testing.assert_allclose(w["mean"], 1 / (2 * sigma2[1:]), rtol=1e-9)


def test_first_term_is_the_discretised_likelihood():
    levels = diffusion.from_uint8(np.arange(96, dtype=np.uint8).reshape(6, 4, 4, 1))
    t = jnp.zeros(6, jnp.int32)
    denoise_fn = diffusion.denoiser(FULL, lambda x, t: jnp.zeros_like(x), prediction="x_0")
    ours = losses.variational(
        FULL, denoise_fn, levels, t, EPS, prediction="x_0", variance="fixed_small"
    )
    log_variance = np.log(5.45318766e-5)
    expected = -gaussians.discretized_log_likelihood(levels, 0.0, log_variance)
    np.testing.assert_allclose(
        ours, losses.mean_over_pixels(expected) * 1000 / np.log(2), rtol=1e-5
    )


def test_the_exact_denoiser_minimises_simple():
    x_0 = oracle.data(np.random.default_rng(1), (4096, 4, 4, 1))
    eps = jnp.asarray(np.random.default_rng(2).normal(size=x_0.shape), jnp.float32)
    exact = oracle.exact_eps(FULL)
    for k in (5, 400):
        t = jnp.full(4096, k)

        def loss(scale, t=t):
            denoise_fn = diffusion.denoiser(FULL, lambda x, t: scale * exact(x, t))
            return losses.simple(FULL, denoise_fn, x_0, t, eps).mean()

        # E[(ε − E[ε|x])²] is the conditional variance of the noise
        a = FULL.alpha_bar[k]
        known = a * oracle.STD**2 / (a * oracle.STD**2 + 1 - a)
        np.testing.assert_allclose(loss(1.0), known, rtol=2e-2)
        assert loss(1.0) < min(loss(0.9), loss(1.1))


def test_gradients_are_finite_for_a_bad_network():
    def total(scale):
        denoise_fn = diffusion.denoiser(FULL, lambda x, t: scale * x, prediction="x_0")
        t = jnp.array([0, 0, 1, 2, 998, 999])
        return losses.variational(FULL, denoise_fn, X_0, t, EPS, prediction="x_0").sum()

    assert np.isfinite(jax.grad(total)(100.0))
