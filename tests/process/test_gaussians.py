"""Divergences against Monte Carlo and linear algebra; the likelihood of levels against SciPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ddpm_jax.process import diffusion, gaussians

LEVELS = np.asarray(diffusion.from_uint8(np.arange(256, dtype=np.uint8)))


@pytest.mark.parametrize(
    "m1, v1, m2, v2", [(0.3, 0.2, -0.5, 1.7), (0.0, 1e-4, 0.01, 1e-4), (2.0, 3.0, 2.0, 3.0)]
)
def test_kl_against_quadrature(m1, v1, m2, v2):
    p, q = stats.norm(m1, v1**0.5), stats.norm(m2, v2**0.5)
    integral, _ = integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)),
        *p.interval(1 - 1e-13),
        epsabs=1e-12,
    )
    ours = gaussians.kl(m1, jnp.log(v1), m2, jnp.log(v2))
    np.testing.assert_allclose(ours, integral, rtol=1e-5, atol=1e-7)


def test_kl_of_nearly_equal_variances_keeps_its_digits():
    r = 1e-3  # KL = (eʳ − 1 − r)/2 ≈ r²/4: lost if computed by subtraction in float32
    np.testing.assert_allclose(
        gaussians.kl(0.0, jnp.float32(r), 0.0, 0.0), (np.expm1(r) - r) / 2, rtol=1e-3
    )


def test_isotropic_is_the_general_formula():
    rng = np.random.default_rng(0)
    n, v1, v2 = 5, 0.7, 1.9
    m1, m2 = rng.normal(size=(2, n)).astype(np.float32)
    general = gaussians.kl_full(m1, v1 * jnp.eye(n), m2, v2 * jnp.eye(n))
    summed = gaussians.kl(m1, np.log(v1), m2, np.log(v2)).sum()
    formula = 0.5 * (np.sum((m1 - m2) ** 2) / v2 + n * v1 / v2 - n * np.log(v1 / v2) - n)
    np.testing.assert_allclose([general, summed], formula, rtol=1e-5)


def test_general_kl_against_monte_carlo():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3, 3))
    c1, c2 = a @ a.T + np.eye(3), b @ b.T + np.eye(3)
    m1, m2 = rng.normal(size=(2, 3))
    p, q = stats.multivariate_normal(m1, c1), stats.multivariate_normal(m2, c2)
    x = p.rvs(400_000, random_state=2)
    estimates = p.logpdf(x) - q.logpdf(x)
    error = estimates.std() / np.sqrt(len(x))
    ours = float(gaussians.kl_full(*(jnp.asarray(v, jnp.float32) for v in (m1, c1, m2, c2))))
    assert abs(ours - estimates.mean()) < 4 * error


@pytest.mark.parametrize("cdf", ["normal", "tanh"])
@pytest.mark.parametrize("mean", [0.0, 0.37, -1.0, 1.0, 3.0, -40.0])
@pytest.mark.parametrize("std", [0.003, 0.0074, 0.1, 1.0])
def test_the_256_levels_sum_to_one(mean, std, cdf):
    log_p = gaussians.discretized_log_likelihood(LEVELS, mean, 2 * np.log(std), cdf=cdf)
    assert np.isfinite(log_p).all()
    np.testing.assert_allclose(np.exp(log_p).sum(), 1.0, atol=2e-5)


@pytest.mark.parametrize("mean", [0.0, 0.37, -0.99, 2.0])
@pytest.mark.parametrize("std", [0.0074, 0.1, 1.0])
def test_levels_against_float64(mean, std):
    lower, upper = (LEVELS[1:-1] + side / 255 for side in (-1.0, 1.0))
    mirror = lower + upper > 2 * mean  # differences of Φ are taken in the left tail
    near = np.where(mirror, 2 * mean - lower, upper)
    far = np.where(mirror, 2 * mean - upper, lower)
    log_near, log_far = (stats.norm.logcdf(edge, mean, std) for edge in (near, far))
    inside = log_near + np.log1p(-np.exp(log_far - log_near))
    first = stats.norm.logcdf(-1 + 1 / 255, mean, std)
    last = stats.norm.logsf(1 - 1 / 255, mean, std)
    expected = np.concatenate([[first], inside, [last]])
    ours = gaussians.discretized_log_likelihood(LEVELS, mean, 2 * np.log(std))
    np.testing.assert_allclose(ours, expected, rtol=3e-4, atol=3e-4)


def test_tanh_is_the_approximation_of_the_reference_code():
    exact = gaussians.discretized_log_likelihood(LEVELS, 0.2, 2 * np.log(0.05))
    close = gaussians.discretized_log_likelihood(LEVELS, 0.2, 2 * np.log(0.05), cdf="tanh")
    near = np.abs(LEVELS - 0.2) < 0.1
    assert 1e-6 < np.abs(exact - close)[near].max() < 2e-2


def test_no_nan_for_any_finite_input():
    mean, log_variance = np.meshgrid([-1e30, -1e4, -1.0, 0.0, 1.0, 1e4, 1e30], [-400.0, -20, 0, 80])
    for x in (-1.0, LEVELS[1], 0.0, 1.0):

        def f(mean, log_variance, x=x):
            return gaussians.discretized_log_likelihood(x, mean, log_variance)

        value, gradient = jax.vmap(jax.value_and_grad(f))(
            jnp.float32(mean.ravel()), jnp.float32(log_variance.ravel())
        )
        assert not np.isnan(value).any() and not np.isnan(gradient).any()
