"""The bound against float64 quadrature for data whose best denoiser is known, and what its terms say."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import integrate

from ddpm_jax.process import budget, diffusion, likelihood, losses, schedules, timesteps

FULL = schedules.make("linear")
LEVELS = np.arange(256) / 127.5 - 1
KEYS = jax.random.split(jax.random.key(2), 3)
FIXED = ("fixed_small", "fixed_large")


def chain(steps):
    return timesteps.respace(FULL, timesteps.subsequence(steps, len(FULL)))


def said(schedule, variance, x_t):
    """What a network that knows this chain gives for a learned variance, for x_t [S, …]: float64."""
    table = np.cos(np.arange(len(schedule)))
    if variance == "learned":
        table = np.log(oracle.sigma2(schedule.alpha_bar, "fixed_large")) + 0.3 * table
    return oracle.along(table, x_t) + 0.3 * np.tanh(x_t)


def exact_sigma2(schedule, variance, x_0, eps):
    """σ² [S, …] for given noise eps [S, …]: float64."""
    a = oracle.along(schedule.alpha_bar, eps)
    values = said(schedule, variance, np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps)
    return oracle.along(oracle.sigma2(schedule.alpha_bar, variance, values), eps)


def model(schedule, variance):
    """The exact denoiser with a variance, as the program takes it."""
    if variance == "analytic":
        error = oracle.x_0_error(schedule.alpha_bar)
        table = diffusion.analytic_log_variance(schedule, error)
        return oracle.exact_denoiser(FULL, variance=table)
    table = np.zeros(len(FULL))  # at the times that the network is asked
    table[schedule.times] = said(schedule, variance, np.zeros(len(schedule)))

    def variance_fn(x_t, t):
        return diffusion.at(table, t, x_t) + 0.3 * jnp.tanh(x_t)

    learned = variance in diffusion.LEARNED
    return oracle.exact_denoiser(FULL, "eps", variance_fn if learned else None, variance)


def images(shape, seed=0):
    """uint8 levels as the program scales them, and the same in float64."""
    levels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    levels.flat[:2] = 0, 255
    return diffusion.from_uint8(levels), LEVELS[levels]


# ---- every term ------------------------------------------------------------------------------------


@functools.cache
def exact_draws(steps):
    """The noise that `bound` draws for KEYS at each step, and what the exact denoiser says: [S, B, H, W, C]."""
    schedule, (_, x_0) = chain(steps), images((3, 4, 4, 2))
    noise = jax.vmap(lambda t: diffusion.noise(KEYS, t, x_0.shape[1:]))
    eps = np.float64(noise(schedule.times))
    a = oracle.along(schedule.alpha_bar, eps)
    x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps
    eps_hat = np.sqrt(1 - a) / (a * oracle.STD**2 + 1 - a) * (x_t - np.sqrt(a) * oracle.MEAN)
    return eps, (x_t - np.sqrt(1 - a) * eps_hat) / np.sqrt(a), eps_hat


@pytest.mark.slow
@pytest.mark.parametrize("variance", diffusion.VARIANCES)
@pytest.mark.parametrize("steps", [10, 1000])
def test_every_term_is_its_definition_for_the_noise_it_saw(steps, variance):
    schedule, (x_0, exact_x_0) = chain(steps), images((3, 4, 4, 2))
    bound = functools.partial(likelihood.bound, schedule, model(schedule, variance), clip_x0=False)
    ours = jax.jit(bound)(x_0, KEYS)

    eps, x_0_hat, eps_hat = exact_draws(steps)
    sigma2 = exact_sigma2(schedule, variance, exact_x_0, eps)
    terms = oracle.bound_terms(schedule.alpha_bar, exact_x_0, eps, sigma2).mean(axis=(2, 3, 4)).T
    prior = oracle.prior_bits(schedule.alpha_bar, exact_x_0).mean(axis=(1, 2, 3))
    assert ours.terms.shape == (3, steps)
    wrong = np.abs(ours.terms - terms).sum(axis=1) + np.abs(ours.prior - prior)
    # A ten-thousandth of a bit; fixed_small with ten steps costs a thousand bits, of seven digits.
    assert (wrong < 1e-4 + 1e-6 * terms.sum(axis=1)).all(), wrong

    for error, difference in (
        (ours.x_0_error, exact_x_0 - x_0_hat),
        (ours.eps_error, eps - eps_hat),
    ):
        np.testing.assert_allclose(error, np.mean(difference**2, axis=(2, 3, 4)).T, rtol=2e-4)


@pytest.mark.parametrize("name", ["linear", "const", "jsd"])
def test_the_prior_term_is_the_divergence_from_where_the_chain_ends(name):
    """Of q(x_T | x_0) from N(0, 1) by quadrature, for chains that stop short, and 0 for one that arrives."""
    schedule, (x_0, exact_x_0) = schedules.make(name, num_timesteps=30), images((3, 2, 2, 1))
    a = schedule.alpha_bar[-1]
    z = np.linspace(-9, 9, 2001)
    x_T = np.sqrt(a) * exact_x_0[..., None] + np.sqrt(1 - a) * z
    nats = (x_T**2 - z**2 - np.log(1 - a)) / 2  # ln q − ln p
    expected = (nats @ np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()).mean(axis=(1, 2, 3))
    ours = likelihood.prior_term(schedule, x_0)
    np.testing.assert_allclose(ours, expected / np.log(2), rtol=1e-5, atol=1e-9)
    assert (expected.min() > 0.05) == (name != "jsd")


@functools.cache
def expected_terms(steps, variance, count=5):
    """E[L_i] over the noise for some levels, ours and by quadrature: x_0 [X], two [S, X].

    Ours is `likelihood.term` at the nodes of a Gauss-Hermite rule, the other the trapezoidal rule over
    float64 formulas: both are exact to far more digits than are compared.
    """
    schedule = chain(steps)
    levels = np.round(np.linspace(0, 255, count)).astype(np.uint8)
    node, weight = np.polynomial.hermite_e.hermegauss(32)
    i, k = (grid.ravel() for grid in np.mgrid[:steps, :32])
    denoise_fn = model(schedule, variance)(schedule)

    @jax.jit
    def at_nodes(x_0, eps):
        x_t = diffusion.q_sample(schedule, x_0, i, eps)
        # One number is one image, so that each has its own term.
        return likelihood.term(schedule, denoise_fn(x_t, i), x_0, x_t, i)

    ours = []
    for x_0 in np.float32(diffusion.from_uint8(levels)):
        shape = (len(i), 1, 1, 1)
        values = at_nodes(np.full(shape, x_0), np.float32(node[k]).reshape(shape))
        ours.append(np.float64(values).reshape(steps, 32) @ (weight / weight.sum()))

    z = np.linspace(-9, 9, 301)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    x_0 = LEVELS[levels]
    eps = np.broadcast_to(z[:, None], (steps, 301, count))
    sigma2 = exact_sigma2(schedule, variance, x_0, eps)
    exact = oracle.bound_terms(schedule.alpha_bar, x_0, eps, sigma2)
    return x_0, np.stack(ours, axis=1), np.einsum("szx,z->sx", exact, density)


@pytest.mark.parametrize("variance", diffusion.VARIANCES)
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_the_expected_bound_agrees_with_quadrature(steps, variance):
    _, ours, exact = expected_terms(steps, variance)
    np.testing.assert_allclose(ours.sum(axis=0), exact.sum(axis=0), atol=1e-4, rtol=1e-6)


def test_the_quadrature_agrees_with_an_adaptive_one():
    x_0, _, exact = expected_terms(10, "learned_range")
    schedule = chain(10)

    def integrand(z, i, k):
        eps = np.full((10, 1), z)
        sigma2 = exact_sigma2(schedule, "learned_range", x_0[k], eps)
        terms = oracle.bound_terms(schedule.alpha_bar, x_0[k], eps, sigma2)
        return terms[i, 0] * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

    for i, k in ((0, 0), (0, 2), (1, 3), (9, 4)):
        value, _ = integrate.quad(integrand, -9, 9, args=(i, k), epsabs=1e-10)
        np.testing.assert_allclose(exact[i, k], value, rtol=1e-7)


def test_the_bound_of_many_draws_has_that_expectation():
    schedule, x_0 = chain(10), diffusion.from_uint8(np.full((2000, 4, 4, 1), 128, np.uint8))
    keys = jax.random.split(jax.random.key(4), 2000)
    denoiser = oracle.exact_denoiser(FULL, variance="fixed_large")
    ours = likelihood.bound(schedule, denoiser, x_0, keys, clip_x0=False)
    eps = np.broadcast_to(np.linspace(-9, 9, 301)[:, None], (10, 301, 1))
    density = np.exp(-(eps[0, :, 0] ** 2) / 2)
    sigma2 = exact_sigma2(schedule, "fixed_large", LEVELS[128], eps)
    exact = oracle.bound_terms(schedule.alpha_bar, LEVELS[128], eps, sigma2)[:, :, 0]
    exact = exact @ density / density.sum()
    drawn = np.append(ours.terms, ours.terms.sum(axis=1, keepdims=True), axis=1)
    error = drawn.std(axis=0) / np.sqrt(2000)
    assert (np.abs(drawn.mean(axis=0) - np.append(exact, exact.sum())) < 4 * error).all()


@pytest.mark.parametrize("variance", [*FIXED, "analytic"])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_the_bound_lies_above_the_likelihood_of_the_model(steps, variance):
    """What the chain draws is a normal number, and its levels' probabilities are known without any bound."""
    schedule = chain(steps)
    x_0, ours, _ = expected_terms(steps, variance)
    sigma2 = oracle.sigma2(schedule.alpha_bar, variance)
    mean, std = oracle.ancestral_moments(schedule.alpha_bar, sigma2)
    log_likelihood = oracle.level_bits(x_0, mean, np.sqrt(std**2 + sigma2[0]))
    above = ours.sum(axis=0) + oracle.prior_bits(schedule.alpha_bar, x_0) - log_likelihood
    assert (above > 0).all()
    if variance == "analytic":
        # Each step is then exact, and what is left inside is that q(x_1 | x_0) starts from one number
        # and the model's from a bin, wider by Δ²/12: r²/4 nats with r = Δ²/(12 β_1).
        r = (2 / 255) ** 2 / 12 / FULL.beta[0]
        np.testing.assert_allclose(above[1:-1], r**2 / 4 / np.log(2), rtol=0.1)
        assert above[1:-1].max() < 1e-3


# ---- the decoder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cdf", likelihood.CDFS)
def test_the_first_term_is_a_distribution_over_the_levels_whatever_the_network_says(cdf):
    mean = np.array([-1e30, -1e4, -3.0, -1.0, -0.5, 0.123, 0.999, 1.01, 7.0, 1e30])
    log_variance = np.array([-1e4, -200.0, -50.0, -20.0, -9.8, -5.0, 0.0, 5.0, 20.0, 200.0, 1e4])
    cases = np.array(list(itertools.product(LEVELS, mean, log_variance)), np.float32)
    x_0, mean, said = (column.reshape(-1, 1, 1, 1) for column in cases.T)

    def nats(mean, said):
        denoised = diffusion.Denoised(mean, mean, mean, said)
        return likelihood.term(FULL, denoised, x_0, x_0, 0, cdf=cdf) * np.float32(np.log(2))

    value = nats(mean, said)
    slopes = jax.grad(lambda *args: nats(*args).sum(), argnums=(0, 1))(mean, said)
    assert all(np.isfinite(x).all() for x in (value, *slopes))
    total = np.exp(-np.float64(value)).reshape(256, -1).sum(axis=0)
    np.testing.assert_allclose(total, 1.0, atol=5e-5)


def test_the_decoder_has_the_cdf_that_is_asked_for():
    schedule, (x_0, exact_x_0) = chain(2), images((3, 4, 4, 1))
    mean, std = exact_x_0 + 0.03, np.sqrt(oracle.sigma2(schedule.alpha_bar, "fixed_large")[0])
    options = {"prediction": "x_0", "variance": "fixed_large"}
    denoiser = diffusion.denoiser(FULL, lambda x, t: jnp.float32(mean), **options)

    def by_tanh(x):  # Ho et al.'s code
        z = (x - mean) / std
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    upper, lower = by_tanh(exact_x_0 + 1 / 255), by_tanh(exact_x_0 - 1 / 255)
    upper[exact_x_0 == 1], lower[exact_x_0 == -1] = 1, 0
    expected = {"tanh": -np.log2(upper - lower), "normal": oracle.level_bits(exact_x_0, mean, std)}
    for cdf in likelihood.CDFS:
        ours = likelihood.bound(schedule, denoiser, x_0, KEYS, clip_x0=False, cdf=cdf).terms[:, 0]
        np.testing.assert_allclose(ours, expected[cdf].mean(axis=(1, 2, 3)), rtol=1e-4)
    assert np.abs(expected["tanh"] - expected["normal"]).mean() > 0.01


# ---- analytic variance -----------------------------------------------------------------------------


def test_the_analytic_variance_of_measured_errors_is_the_best():
    """With the same noise, any other σ² raises each term; the decoder's first one aside."""
    schedule, (x_0, _) = chain(10), images((8, 4, 4, 1))
    keys = jax.random.split(jax.random.key(3), 8)

    @jax.jit
    def mean_bound(table):
        denoiser = oracle.exact_denoiser(FULL, variance=table)
        parts = likelihood.bound(schedule, denoiser, x_0, keys)
        return parts.terms.mean(axis=0)[1:], parts.x_0_error.mean(axis=0)

    best = diffusion.analytic_log_variance(schedule, mean_bound(np.zeros(10))[1])
    at_best = mean_bound(best)[0]
    for shift in (-0.1, -0.03, 0.03, 0.1):
        excess = mean_bound(best + shift)[0] - at_best
        # At the minimum, ½(E/σ² + ln σ²) with E = σ² rises by this much.
        np.testing.assert_allclose(excess, (np.expm1(-shift) + shift) / 2 / np.log(2), rtol=1e-2)


def test_the_measured_errors_are_the_conditional_variance():
    schedule, x_0 = chain(10), oracle.data(np.random.default_rng(5), (4096, 4, 4, 1))
    keys = jax.random.split(jax.random.key(6), 4096)
    denoiser = oracle.exact_denoiser(FULL, variance="fixed_large")
    ours = likelihood.bound(schedule, denoiser, x_0, keys, clip_x0=False)
    known = oracle.x_0_error(schedule.alpha_bar)
    np.testing.assert_allclose(ours.x_0_error.mean(axis=0), known, rtol=4 * np.sqrt(2 / 65_536))
    # So σ² is known as well as that, where the error is all of it, and better elsewhere.
    log_variance = diffusion.analytic_log_variance(schedule, ours.x_0_error.mean(axis=0))
    exact = np.log(oracle.sigma2(schedule.alpha_bar, "analytic"))
    np.testing.assert_allclose(log_variance, exact, atol=4 * np.sqrt(2 / 65_536))
    # E‖ε̂‖² makes the same: the error of ε̂ is that of x̂_0 times the signal-to-noise ratio.
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    np.testing.assert_allclose(ours.eps_error, snr * np.asarray(ours.x_0_error), rtol=1e-3)


# ---- what the terms say ----------------------------------------------------------------------------


def test_clipping_changes_the_mean_and_the_error_but_not_the_error_of_the_noise():
    schedule, (x_0, _) = chain(10), images((3, 4, 4, 1))
    options = {"prediction": "x_0", "variance": "fixed_large"}
    denoiser = diffusion.denoiser(FULL, lambda x, t: x_0 + 1.5, **options)
    free, clipped = (
        likelihood.bound(schedule, denoiser, x_0, KEYS, clip_x0=clip) for clip in (False, True)
    )
    np.testing.assert_allclose(free.x_0_error, 2.25, rtol=1e-5)
    expected = np.square(np.clip(x_0 + 1.5, -1, 1) - x_0).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(clipped.x_0_error, np.tile(expected[:, None], 10), rtol=1e-5)
    np.testing.assert_allclose(clipped.eps_error, free.eps_error, rtol=1e-6)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    np.testing.assert_allclose(free.eps_error, np.tile(2.25 * snr, (3, 1)), rtol=1e-4)
    assert (clipped.terms < free.terms).all()


def test_vlb_has_the_mean_of_the_bound_less_its_prior_term():
    full, (x_0, _) = schedules.make("cosine", num_timesteps=20), images((1, 4, 4, 1))
    denoiser = oracle.exact_denoiser(full, variance="fixed_large")
    parts = likelihood.bound(full, denoiser, x_0, KEYS[:1], clip_x0=False)
    t = jnp.arange(20)
    eps = jax.vmap(lambda t: diffusion.noise(KEYS[:1], t, x_0.shape[1:])[0])(t)
    ours = jax.jit(losses.vlb, static_argnums=(0, 1))(full, denoiser(full), x_0[[0] * 20], t, eps)
    np.testing.assert_allclose(ours / 20, parts.terms[0], rtol=1e-4)
    np.testing.assert_allclose(ours.mean(), parts.terms[0].sum(), rtol=2e-6)


def test_rate_and_distortion_are_those_of_a_loop():
    rng = np.random.default_rng(7)
    terms, error, prior = rng.exponential(size=12), rng.exponential(size=12), 0.3
    rate, distortion = likelihood.rate_distortion(terms, prior, error)
    cost = prior  # what the receiver needs to have x_11
    for n, i in enumerate(reversed(range(12))):  # after n + 1 steps the image shown is x̂_0(x_i)
        np.testing.assert_allclose(rate[n], cost, rtol=1e-12)
        np.testing.assert_allclose(distortion[n], 255 * np.sqrt(error[i] / 4), rtol=1e-12)
        cost += terms[i]  # and now x_{i−1} too
    assert len(rate) == len(distortion) == 12
    np.testing.assert_allclose(rate[-1] + terms[0], prior + terms.sum(), rtol=1e-12)


# ---- the best steps --------------------------------------------------------------------------------

SHORT = schedules.make("linear", num_timesteps=8, start=0.01, end=0.6)
ERROR = np.array([0.004, 0.03, 0.05, 0.06, 0.2, 0.21, 0.6, 0.9])


def divergences(schedule, error, variance):
    """E[L_{t−1}] of a chain for t > 0, from its own table: mean and variances of two Gaussians, in bits."""
    a, p = schedule.alpha_bar, np.append(1.0, schedule.alpha_bar[:-1])
    beta = 1 - a / p
    posterior = (beta * (1 - p) / (1 - a))[1:]
    squared = (p * beta**2 / (1 - a) ** 2 * error)[1:]
    sigma2 = {"fixed_small": posterior, "fixed_large": beta[1:], "analytic": posterior + squared}
    r = posterior / sigma2[variance]
    return 0.5 * (squared / sigma2[variance] + r - 1 - np.log(r)) / np.log(2)


@pytest.mark.parametrize("variance", [*FIXED, "analytic"])
def test_jumps_along_a_chain_are_its_divergences(variance):
    bits = budget.jump_bits(SHORT, ERROR, variance)
    assert bits.shape == (8, 8) and np.isinf(bits[np.triu_indices(8)]).all()
    for tau in ([0, 7], [0, 3, 4, 7], list(range(8))):
        expected = divergences(timesteps.respace(SHORT, tau), ERROR[tau], variance)
        along = [bits[t, s] for s, t in itertools.pairwise(tau)]
        np.testing.assert_allclose(along, expected, rtol=1e-9, atol=1e-15)


def test_jumps_are_what_the_bound_of_a_shortened_chain_measures():
    tau, (x_0, _) = np.array([0, 2, 3, 7]), images((3, 4, 4, 1))
    short = timesteps.respace(SHORT, tau)

    @functools.partial(jax.jit, static_argnums=0)
    def bound(schedule, table):
        denoiser = oracle.exact_denoiser(SHORT, variance=table)
        return likelihood.bound(schedule, denoiser, x_0, KEYS, clip_x0=False)

    errors = bound(SHORT, np.zeros(8)).x_0_error
    for kind in (*FIXED, "analytic"):
        if kind == "analytic":
            table = diffusion.analytic_log_variance(short, errors.mean(axis=0)[tau])
        else:
            table = diffusion.fixed_log_variance(short, kind)
        measured = bound(short, table)
        # The same noise and the same network at the same time: the same error, whatever the chain.
        np.testing.assert_allclose(measured.x_0_error, errors[:, tau], rtol=1e-5)
        bits = budget.jump_bits(SHORT, errors.mean(axis=0), kind)
        jumps = [bits[t, s] for s, t in itertools.pairwise(tau)]
        np.testing.assert_allclose(measured.terms.mean(axis=0)[1:], jumps, rtol=2e-5)


@pytest.mark.parametrize("variance", [*FIXED, "analytic"])
@pytest.mark.parametrize("error", [ERROR, ERROR[::-1]])
def test_the_best_steps_are_those_of_trying_all(variance, error):
    for S in range(2, 9):
        costs = {
            (0, *inner, 7): divergences(
                timesteps.respace(SHORT, (0, *inner, 7)), error[[0, *inner, 7]], variance
            ).sum()
            for inner in itertools.combinations(range(1, 7), S - 2)
        }
        tau = budget.best_steps(SHORT, error, S, variance=variance)
        assert len(tau) == S
        np.testing.assert_allclose(costs[tuple(tau.tolist())], min(costs.values()), rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 9, 0, -3])
def test_the_best_steps_need_room(steps):
    with pytest.raises(ValueError, match="choose 2 to 8") as error:
        budget.best_steps(SHORT, ERROR, steps, variance="fixed_large")
    assert "\n" not in str(error.value)
