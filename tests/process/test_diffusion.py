"""The equations against kernels composed step by step, products of Gaussians and their own inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from ddpm_jax.process import diffusion, likelihood, losses, predictions, schedules, timesteps

SCHEDULES = [
    schedules.make("linear"),
    schedules.make("cosine", num_timesteps=50),
    timesteps.respace(schedules.make("linear"), timesteps.subsequence(10, 1000)),
]


def images(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def test_uint8_round_trip_and_range():
    levels = np.arange(256, dtype=np.uint8)
    x = diffusion.from_uint8(levels)
    assert x[0] == -1 and x[-1] == 1 and x.dtype == np.float32
    assert (diffusion.to_uint8(x) == levels).all()
    assert diffusion.to_uint8(jnp.array([-7.0, 7.0, 0.0])).tolist() == [0, 255, 128]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_composed_are_the_closed_form(schedule):
    # One-step kernels carried through a mean and a variance, in float64.
    mean, variance = 1.0, 0.0
    for t in range(len(schedule)):
        alpha = 1 - schedule.beta[t]
        mean, variance = np.sqrt(alpha) * mean, alpha * variance
        variance += schedule.beta[t]
        zero, one = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
        if t in (0, 1, len(schedule) // 2, len(schedule) - 1):
            ours = diffusion.q_sample(schedule, one, jnp.array([t]), zero)
            np.testing.assert_allclose(ours, mean, rtol=1e-6)
            ours = diffusion.q_sample(schedule, zero, jnp.array([t]), one)
            np.testing.assert_allclose(ours**2, variance, rtol=1e-6)


def test_q_step_is_the_kernel():
    schedule = SCHEDULES[0]
    x, eps = images(0, 2, 3, 3, 1), images(1, 2, 3, 3, 1)
    t = jnp.array([0, 700])
    expected = np.stack(
        [
            np.sqrt(1 - schedule.beta[k]) * x[i] + np.sqrt(schedule.beta[k]) * eps[i]
            for i, k in enumerate((0, 700))
        ]
    )
    np.testing.assert_allclose(diffusion.q_step(schedule, x, t, eps), expected, rtol=1e-6)


def test_a_path_is_one_step_after_another():
    schedule = SCHEDULES[2]
    x, keys = images(0, 3, 2, 2, 1), jax.random.split(jax.random.key(0), 3)
    path = diffusion.q_path(schedule, x, keys)
    assert path.shape == (3, 10, 2, 2, 1)
    for i, t in enumerate(schedule.times):
        x = diffusion.q_step(schedule, x, i, diffusion.noise(keys, t, (2, 2, 1)))
        np.testing.assert_allclose(path[:, i], x, rtol=1e-5, atol=1e-6)
    # Its noise is that of the samplers and the bound at the same time, one example at a time.
    alone = diffusion.q_path(schedule, images(0, 3, 2, 2, 1)[1:2], keys[1:2])
    np.testing.assert_allclose(alone[0], path[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_a_product_of_gaussians(schedule):
    # q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0): precisions add, means add by precision.
    x_0, x_t = 0.7, -1.3
    of_x_0, of_x_t = diffusion.posterior_mean_coefficients(schedule)
    variance = diffusion.posterior_variance(schedule)
    for t in range(1, len(schedule)):
        a, b, p = 1 - schedule.beta[t], schedule.beta[t], schedule.alpha_bar[t - 1]
        precision = a / b + 1 / (1 - p)
        mean = (np.sqrt(a) * x_t / b + np.sqrt(p) * x_0 / (1 - p)) / precision
        np.testing.assert_allclose(variance[t], 1 / precision, rtol=1e-9)
        np.testing.assert_allclose(of_x_0[t] * x_0 + of_x_t[t] * x_t, mean, rtol=1e-9)
    assert variance[0] == 0 and of_x_0[0] == pytest.approx(1) and of_x_t[0] == 0


def test_reverse_variances_at_both_ends():
    schedule = SCHEDULES[0]
    small = np.exp(diffusion.fixed_log_variance(schedule, "fixed_small"))
    large = np.exp(diffusion.fixed_log_variance(schedule, "fixed_large"))
    np.testing.assert_allclose(large[1:], schedule.beta[1:], rtol=1e-12)
    np.testing.assert_allclose(large[0], 5.45318766e-5, rtol=1e-8)  # the posterior's next one
    np.testing.assert_allclose(small[:2], 5.45318766e-5, rtol=1e-8)
    assert (small[1:] < large[1:]).all()
    for other in ("large", "learned"):
        with pytest.raises(ValueError, match="expected fixed_small or fixed_large"):
            diffusion.fixed_log_variance(schedule, other)


def log_variance(schedule, variance, said, t):
    """log σ_t² for one pixel where the network said a number."""
    x_t = jnp.zeros((len(t), 1, 1, 1))
    values = jnp.broadcast_to(jnp.float32(said), x_t.shape)
    result = diffusion.model_log_variance(schedule, variance, values, x_t, t)
    return np.asarray(jnp.broadcast_to(result, x_t.shape))[:, 0, 0, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learned_range_reaches_from_one_fixed_variance_to_the_other(schedule):
    t = jnp.arange(len(schedule))
    low, high = (log_variance(schedule, end, 0.0, t) for end in ("fixed_small", "fixed_large"))
    assert (log_variance(schedule, "learned_range", -1.0, t) == low).all()  # to the last bit
    assert (log_variance(schedule, "learned_range", 1.0, t) == high).all()
    between = [log_variance(schedule, "learned_range", v, t) for v in (-1.0, -0.5, 0.5, 1.0)]
    steps = np.diff(between, axis=0)[:, 1:]  # at t = 0 both ends are one
    apart = (high - low)[1:] > 1e-5  # near the end they differ by less than float32 can divide
    assert (steps[:, apart] > 0).all() and (steps[:, ~apart] > -1e-6).all()
    for share, v in ((0.25, -0.5), (0.75, 0.5)):  # Nichol & Dhariwal (15), β̃_t and β_t by hand
        a, p = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
        large, small = np.log(1 - a / p), np.log((1 - a / p) * (1 - p) / (1 - a))
        ours = log_variance(schedule, "learned_range", v, t)[1:]
        np.testing.assert_allclose(ours, share * large + (1 - share) * small, atol=2e-6)


def test_learned_is_what_the_network_says_and_a_table_what_it_holds():
    schedule, t = SCHEDULES[1], jnp.array([0, 7, 49])
    table = np.linspace(-9, -3, 50)
    assert (log_variance(schedule, "learned", -3.25, t) == np.float32(-3.25)).all()
    assert (log_variance(schedule, table, -3.25, t) == np.float32(table[[0, 7, 49]])).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_analytic_variance_is_that_of_q_for_gaussian_data(schedule):
    """The exact denoiser of N(m, s²) errs by the conditional variance; q(x_{t−1}|x_t) is then known."""
    a, s2 = schedule.alpha_bar, oracle.STD**2
    p = np.append(1.0, a[:-1])
    ours = np.exp(diffusion.analytic_log_variance(schedule, s2 * (1 - a) / (a * s2 + 1 - a)))
    of_previous, of_step = p * s2 + 1 - p, a / p  # Var x_{t−1}; α_t
    np.testing.assert_allclose(ours, 1 / (1 / of_previous + of_step / (1 - of_step)), rtol=1e-9)

    # Bao et al. 2022, Theorem 1 with λ² = β̃, from the noise that the network predicts.
    of_eps = (1 - a) / (a * s2 + 1 - a)  # E‖ε̂‖²/d
    b, b_prev, lam2 = 1 - a, 1 - p, (1 - a / p) * (1 - p) / (1 - a)
    bao = lam2 + (np.sqrt(b * p / a) - np.sqrt(b_prev - lam2)) ** 2 * (1 - of_eps)
    np.testing.assert_allclose(ours, bao, rtol=1e-9)


def x_0_of(schedule, kind, value, x_t, t):
    """x̂_0 of a network's output, by the table of its prediction."""
    of_x_t, of_output = predictions.named(kind)(schedule, schedule).to_x_0(schedule)
    return diffusion.at(of_x_t, t, x_t) * x_t + diffusion.at(of_output, t, x_t) * value


@pytest.mark.parametrize("kind", predictions.PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_conversions_round_trip(schedule, kind):
    t = jnp.array([0, 1, len(schedule) // 2, len(schedule) - 1])
    x_0, eps = images(2, 4, 5, 5, 2), images(3, 4, 5, 5, 2)
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    value = losses.target(schedule, kind, x_0, t, eps)
    back = x_0_of(schedule, kind, value, x_t, t)
    # float32 numbers of size 1, divided by √ᾱ (eps) or by the weight of x_0 in the mean
    lost = {
        "eps": 1 / np.sqrt(schedule.alpha_bar),
        "mean": 1 / diffusion.posterior_mean_coefficients(schedule)[0],
        # their two parts, each of size 1 to 5, are multiplied by these
        "velocity": sum(np.abs(predictions.velocity(schedule, schedule).to_x_0(schedule))),
        "edm": sum(np.abs(predictions.edm(schedule, schedule).to_x_0(schedule))),
    }.get(kind, np.ones(len(schedule)))
    bound = 2e-6 * lost[np.asarray(t)]
    assert (np.abs(back - x_0).max(axis=(1, 2, 3)) <= bound).all()


def test_conversions_are_the_definitions():
    schedule, k = SCHEDULES[0], 321
    t = jnp.array([k])
    x_0, eps = images(4, 1, 4, 4, 1), images(5, 1, 4, 4, 1)
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    a = schedule.alpha_bar[k]
    expected = {
        "eps": eps,
        "x_0": x_0,
        "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x_0,
        # Ho et al. (11), the mean written with the noise
        "mean": (x_t - schedule.beta[k] / np.sqrt(1 - a) * eps) / np.sqrt(1 - schedule.beta[k]),
    }
    for kind, value in expected.items():
        ours = losses.target(schedule, kind, x_0, t, eps)
        np.testing.assert_allclose(ours, value, atol=3e-6)


@pytest.mark.parametrize("kind", ["x_0", "mean", "v"])
def test_a_chain_that_ends_at_zero_signal(kind):
    schedule = schedules.make("jsd", num_timesteps=20)
    t, x_T = jnp.array([19]), images(6, 1, 3, 3, 1)  # all of x_T is noise
    x_0 = images(7, 1, 3, 3, 1)
    value = losses.target(schedule, kind, x_0, t, x_T)
    np.testing.assert_allclose(x_0_of(schedule, kind, value, x_T, t), x_0, atol=1e-5)


def test_a_shortened_chain_asks_the_network_as_it_was_trained():
    # A network that predicts the posterior mean of the full chain must be read with the full chain's
    # coefficients, also when a sampler visits few steps.
    full = SCHEDULES[0]
    x_0, x_t, t = images(8, 1, 3, 3, 1), images(9, 1, 3, 3, 1), jnp.array([555])
    denoiser = diffusion.denoiser(
        full, lambda x, t: diffusion.posterior_mean(full, x_0, x, t), prediction="mean"
    )
    np.testing.assert_allclose(denoiser(full)(x_t, t).x_0, x_0, atol=1e-3)
    short = timesteps.respace(full, [100, 555, 999])
    np.testing.assert_allclose(denoiser(short)(x_t, jnp.array([1])).x_0, x_0, atol=1e-3)


def test_everything_is_float32_and_jits():
    schedule = SCHEDULES[0]
    x = images(10, 2, 3, 3, 1)

    @jax.jit
    def f(x, t):
        x_t = diffusion.q_sample(schedule, x, t, x)
        return diffusion.posterior_mean(schedule, x, x_t, t)

    assert f(x, jnp.array([3, 999])).dtype == jnp.float32
    np.testing.assert_allclose(f(x, jnp.array([3, 3]))[0], f(x, jnp.array(3))[0], rtol=1e-6)


def test_a_step_is_one_number_for_all_images_or_one_for_each():
    schedule, x, eps = SCHEDULES[2], images(11, 3, 2, 2, 1), images(12, 3, 2, 2, 1)
    keys = jax.random.split(jax.random.key(2), 3)
    denoised = diffusion.Denoised(eps, 0.5 * x, eps, diffusion.at(np.full(10, -2.0), 0, x))
    functions = {
        "q_sample": lambda t: diffusion.q_sample(schedule, x, t, eps),
        "q_step": lambda t: diffusion.q_step(schedule, x, t, eps),
        "q_step_ddim": lambda t: diffusion.q_step_ddim(schedule, x, 0.5 * x, t, eps, eta=0.5),
        "noise": lambda t: diffusion.noise(keys, t, x.shape[1:]),
        "step_noise": lambda t: diffusion.step_noise(schedule, keys, t, x.shape[1:]),
        "posterior_mean": lambda t: diffusion.posterior_mean(schedule, x, eps, t),
        "noise_of": lambda t: diffusion.noise_of(schedule, 0.5 * x, x, t),
        "term": lambda t: likelihood.term(
            schedule, denoised, diffusion.from_uint8(diffusion.to_uint8(x)), eps, jnp.asarray(t)
        ),
    }
    steps = (7, 0, 4)
    for name, function in functions.items():
        each = function(jnp.array(steps))
        for i, t in enumerate(steps):
            np.testing.assert_allclose(function(t)[i], each[i], rtol=1e-6, atol=1e-7, err_msg=name)
            np.testing.assert_array_equal(function(t), function(jnp.full(3, t)), err_msg=name)
        assert not np.array_equal(function(7), function(4)), name


# ---- DDIM's forward process ------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", [*SCHEDULES, schedules.make("jsd", num_timesteps=20)])
def test_ddims_forward_process_is_bayes_rule_on_its_posterior(schedule, eta):
    of_x_prev, std = diffusion.ddim_forward(schedule, eta)
    a = schedule.alpha_bar
    p = np.append(1.0, a[:-1])
    sigma = eta * np.sqrt((1 - p) / (1 - a) * (1 - a / p))
    assert of_x_prev[0] == 0 and std[0] ** 2 == pytest.approx(1 - a[0])
    # Of (x_{t−1}, x_t) given x_0: the covariance by way of the posterior, and by way of the forward step.
    squared_line = (1 - p - sigma**2) / (1 - a)
    assert (of_x_prev >= 0).all()
    np.testing.assert_allclose(squared_line * (1 - a) ** 2, (of_x_prev * (1 - p)) ** 2, atol=1e-12)
    np.testing.assert_allclose(of_x_prev**2 * (1 - p) + std**2, 1 - a, rtol=1e-9)
    if eta == 1:  # Markov: x_0 has dropped out
        np.testing.assert_allclose(of_x_prev[1:] ** 2, 1 - schedule.beta[1:], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(std**2, schedule.beta, rtol=1e-9)
    if eta == 0:  # solved, not drawn, from the second step on
        assert (std[1:] == 0).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddims_forward_steps_have_the_marginals_of_q(eta):
    schedule, x_0 = SCHEDULES[2], images(0, 1, 2, 2, 1)
    zero = jnp.zeros_like(x_0)
    mean, spread = x_0, zero  # of x_t given x_0, carried from step to step
    for t in range(len(schedule)):
        mean = diffusion.q_step_ddim(schedule, mean, x_0, jnp.array([t]), zero, eta=eta)
        of_x_prev, std = (table[t] for table in diffusion.ddim_forward(schedule, eta))
        spread = of_x_prev**2 * spread + std**2
        expected = diffusion.q_sample(schedule, x_0, jnp.array([t]), zero)
        np.testing.assert_allclose(mean, expected, atol=2e-6)
        np.testing.assert_allclose(spread, 1 - schedule.alpha_bar[t], rtol=1e-5)
        noisy = diffusion.q_step_ddim(schedule, mean, x_0, jnp.array([t]), zero + 1, eta=eta)
        still = diffusion.q_step_ddim(schedule, mean, x_0, jnp.array([t]), zero, eta=eta)
        np.testing.assert_allclose(noisy - still, std, atol=2e-6)
    with pytest.raises(ValueError, match="no forward process"):
        diffusion.ddim_forward(schedule, "hat")
