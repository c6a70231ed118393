"""Every path alike: tables against their formulas, and samplers and bound against recursions written from (α, σ).

The data are N(m, s²) in each pixel. Then E[x_0 | x_t] = m + α s²/(α² s² + σ²) (x_t − α m) on any path, and a sampler is
an affine map with independent noise. The recursions here are float64 and share no code with ddpm_jax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import optimized

from ddpm_jax.process import (
    budget,
    diffusion,
    likelihood,
    predictions,
    schedules,
    terminal,
    timesteps,
)
from ddpm_jax.process.samplers import DDIM, Ancestral, DPMSolver, Heun
from ddpm_jax.process.samplers.inversion import encode
from ddpm_jax.process.samplers.repaint import inpaint, resampling

M, S = 0.3, 0.5  # mean and standard deviation of the data
PATHS = {
    "linear": schedules.linear(),
    "cosine": schedules.cosine(),
    "zero snr": schedules.zero_terminal_snr(schedules.linear()),
    "exploding": schedules.exploding(),
    "straight": schedules.straight(),
}
EVERY = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


# ---- the truth -------------------------------------------------------------------------------------


def total(alpha, sigma):
    """The variance of x_t."""
    return alpha**2 * S**2 + sigma**2


def exact_x_0(x, alpha, sigma):
    """E[x_0 | x_t = x]."""
    return M + alpha * S**2 / total(alpha, sigma) * (x - alpha * M)


def before_and_after(chain):
    """(α_t, σ_t, α_s, σ_s) of each step from the last to the first, which ends at data."""
    alpha, sigma = [1.0, *chain.alpha.tolist()], [0.0, *chain.sigma.tolist()]
    return [(alpha[i], sigma[i], alpha[i - 1], sigma[i - 1]) for i in range(len(chain), 0, -1)]


def previous_given_x_t(alpha, sigma, alpha_s, sigma_s):
    """x_s given x_t = x for these data is N(slope x + shift, variance), by conditioning two normal numbers."""
    covariance = alpha / alpha_s * total(alpha_s, sigma_s)
    slope = covariance / total(alpha, sigma)
    return slope, alpha_s * M - slope * alpha * M, total(alpha_s, sigma_s) - slope * covariance


def posterior_given_x_0(alpha, sigma, alpha_s, sigma_s):
    """x_s given x_t and x_0 is N(k_0 x_0 + k_t x_t, variance): precisions add, and means in proportion."""
    step = alpha / alpha_s
    added = sigma**2 - step**2 * sigma_s**2
    variance = 1 / (step**2 / added + 1 / sigma_s**2)
    return variance * alpha_s / sigma_s**2, variance * step / added, variance


def prior_std(chain):
    """That of x_T for data of unit variance, which is 1 for every variance-preserving chain."""
    return np.hypot(chain.alpha[-1], chain.sigma[-1])


def with_noise(chain, step):
    """Mean and standard deviation of x_0 where step(*levels) is (slope, shift, variance) of a noisy line."""
    mean, variance = 0.0, prior_std(chain) ** 2
    for levels in before_and_after(chain):
        slope, shift, noise = step(*levels)
        mean, variance = slope * mean + shift, slope**2 * variance + noise
    return mean, np.sqrt(variance)


def ancestral_step(alpha, sigma, alpha_s, sigma_s):
    slope, shift, variance = previous_given_x_t(alpha, sigma, alpha_s, sigma_s)
    return slope, shift, variance if sigma_s > 0 else 0.0


def ddim_step(alpha, sigma, alpha_s, sigma_s, eta):
    noise = eta**2 * (sigma**2 - (alpha / alpha_s) ** 2 * sigma_s**2) * sigma_s**2 / sigma**2

    def move(x):
        x_0 = exact_x_0(x, alpha, sigma)
        return alpha_s * x_0 + np.sqrt(max(sigma_s**2 - noise, 0.0)) * (x - alpha * x_0) / sigma

    return move(1.0) - move(0.0), move(0.0), noise


def dpm_solver(chain, x, order):
    """DPM-Solver++ for one number x: the polynomial through the last x̂_0, integrated by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    seen = []  # (λ, x̂_0), the newest first
    for alpha, sigma, alpha_s, sigma_s in before_and_after(chain):
        x_0 = exact_x_0(x, alpha, sigma)
        if sigma_s == 0:
            return x_0
        if (
            alpha == 0
        ):  # λ = −∞: of x only the noise is kept, and no later step extrapolates from here
            x = sigma_s / sigma * x + alpha_s * x_0
            continue
        level = np.log(alpha / sigma)
        h = np.log(alpha_s / sigma_s) - level
        seen.insert(0, (level, x_0))
        known = seen[:order]
        while len(known) > 1 and h > 2 * (known[0][0] - known[-1][0]) / (len(known) - 1):
            known = known[:-1]
        if order == 2 and len(known) == 2:  # Lu et al., Algorithm 2
            r = (known[0][0] - known[1][0]) / h
            integral = -np.expm1(-h) * (x_0 + (x_0 - known[1][1]) / (2 * r))
        else:
            curve = np.polynomial.Polynomial.fit(*zip(*known, strict=True), deg=len(known) - 1)
            u = (nodes + 1) * h / 2
            integral = np.sum(weights * h / 2 * np.exp(u - h) * curve(level + u))
        x = sigma_s / sigma * x + alpha_s * integral
    return x


def heun(chain, x):
    """Heun's method for one number x, in x/α and s = σ/α; DDIM's step where that is infinite or far."""

    def slope(scaled, s, alpha):
        return (scaled - exact_x_0(scaled * alpha, alpha, s * alpha)) / s

    for alpha, sigma, alpha_s, sigma_s in before_and_after(chain):
        end = sigma_s / alpha_s
        if alpha == 0:
            x = alpha_s * M + sigma_s * x / sigma
            continue
        s = sigma / alpha
        first = second = slope(x / alpha, s, alpha)
        if end > 0 and (s <= 10 or s <= 10 * end):
            second = slope(x / alpha + (end - s) * first, end, alpha_s)
        x = alpha_s * (x / alpha + (end - s) * (first + second) / 2)
    return x


def there_and_back(chain, x):
    """x_T of numbers x, and where they return: ε̂ is always that of the noisier end of a step."""

    def move(x, alpha, sigma, start, end):
        eps = (x - alpha * exact_x_0(x, alpha, sigma)) / sigma
        share = end[0] / start[0] if start[0] > 0 else 0.0
        x_0 = exact_x_0(x, alpha, sigma)
        if share == 0.0 and end[0] > 0:  # from where nothing of x_0 is left
            return end[0] * x_0 + end[1] * eps
        return share * x + (end[1] - share * start[1]) * eps

    levels = before_and_after(chain)
    for alpha, sigma, alpha_s, sigma_s in levels[::-1]:
        x = move(x, alpha, sigma, (alpha_s, sigma_s), (alpha, sigma))
    x_T = x
    for alpha, sigma, alpha_s, sigma_s in levels:
        x = move(x, alpha, sigma, (alpha, sigma), (alpha_s, sigma_s))
    return x_T, x


def of_line(chain, solve):
    """Mean and standard deviation of x_0 where solve(chain, x) is an affine map."""
    return solve(chain, 0.0), abs(solve(chain, 1.0) - solve(chain, 0.0)) * prior_std(chain)


# ---- ours ------------------------------------------------------------------------------------------


def exact_denoiser(path, **options):
    """E[x_0 | x_t] as a network of the full path, which looks up its levels by the time it is given."""
    gain = path.alpha * S**2 / total(path.alpha, path.sigma)
    shift = M - gain * path.alpha * M

    def network_fn(x, t):
        return diffusion.at(gain, t, x) * x + diffusion.at(shift, t, x)

    return diffusion.denoiser(path, network_fn, prediction="x_0", **options)


def exact_variance(chain):
    """log Var[x_s | x_t] as `analytic_log_variance` makes it of the error of x̂_0."""
    error = S**2 * chain.sigma**2 / total(chain.alpha, chain.sigma)
    return diffusion.analytic_log_variance(chain, error)


SAMPLERS = {
    "ancestral": (Ancestral(), lambda chain: with_noise(chain, ancestral_step)),
    **{
        f"ddim {eta}": (
            DDIM(eta=eta),
            lambda chain, eta=eta: with_noise(chain, functools.partial(ddim_step, eta=eta)),
        )
        for eta in (0.0, 0.5, 1.0)
    },
    **{
        f"dpm_solver {order}": (
            DPMSolver(order=order),
            lambda chain, order=order: of_line(chain, functools.partial(dpm_solver, order=order)),
        )
        for order in (1, 2, 3)
    },
    "heun": (Heun(), lambda chain: of_line(chain, heun)),
}
KEYS = jax.random.split(jax.random.key(3), 2048)
N = 2048 * 16


@optimized()
def draw(path, sampler, steps, denoiser=None):
    chain = timesteps.shorten(path, steps)
    if denoiser is None:
        denoiser = exact_denoiser(path, variance=exact_variance(chain))
    x_T = diffusion.prior(chain, KEYS, (4, 4, 1))
    return np.asarray(sampler(chain, denoiser, x_T, KEYS, clip_x0=False), np.float64)


# ---- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["linear", "quadratic", "constant", "jsd", "warmup10", "sigmoid", "cosine"]
)
def test_tables_of_alpha_and_sigma_are_those_of_beta(name):
    chain = schedules.make(name)
    alpha_bar = np.cumprod(1 - chain.beta)
    p, variance = np.append(1.0, alpha_bar[:-1]), 1 - alpha_bar
    of_x_0, of_x_t = diffusion.posterior_mean_coefficients(chain)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=0)
    assert chain.is_variance_preserving and chain.prior_std == 1.0
    close(chain.alpha_bar, alpha_bar)
    close(of_x_0, np.sqrt(p) * chain.beta / variance)
    close(of_x_t, np.sqrt(1 - chain.beta) * (1 - p) / variance)
    close(diffusion.posterior_variance(chain), chain.beta * (1 - p) / variance)
    tau = timesteps.subsequence(50, 1000)
    short = timesteps.respace(chain, tau)
    p = np.append(1.0, alpha_bar[tau][:-1])
    np.testing.assert_allclose(short.beta, 1 - alpha_bar[tau] / p, rtol=5e-12)


@EVERY
@pytest.mark.parametrize("steps", [7, 1000])
def test_the_posterior_is_a_product_of_gaussians(path, steps):
    chain = timesteps.shorten(path, steps)
    of_x_0, of_x_t = diffusion.posterior_mean_coefficients(chain)
    variance = diffusion.posterior_variance(chain)
    levels = before_and_after(chain)[-2::-1]  # all but the first step, from the second up
    expected = np.array([posterior_given_x_0(*each) for each in levels]).T
    for ours, known in zip((of_x_0, of_x_t, variance), expected, strict=True):
        np.testing.assert_allclose(ours[1:], known, rtol=1e-9, atol=1e-15)
    assert (variance[0], of_x_0[0], of_x_t[0]) == (0.0, pytest.approx(1.0), 0.0)


@EVERY
def test_steps_composed_are_the_path(path):
    alpha, variance = 1.0, 0.0
    for t in range(len(path)):
        alpha, variance = path.step_alpha[t] * alpha, path.step_alpha[t] ** 2 * variance
        variance += path.step_variance[t]
        np.testing.assert_allclose(
            [alpha, variance], [path.alpha[t], path.sigma[t] ** 2], rtol=1e-9
        )


@EVERY
def test_the_large_variance_is_that_of_normal_data(path):
    """Var[x_s | x_t] for data N(0, 1), by conditioning; β of a variance-preserving chain."""
    chain = timesteps.shorten(path, 20)
    for i, (alpha, sigma, alpha_s, sigma_s) in enumerate(before_and_after(chain)[::-1]):
        step, before = alpha / alpha_s, alpha_s**2 + sigma_s**2
        known = before - (step * before) ** 2 / (alpha**2 + sigma**2)
        assert diffusion.large_variance(chain)[i] == pytest.approx(known, rel=1e-9)


# ---- samplers --------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_the_exact_moments(path, name):
    sampler, moments = SAMPLERS[name]
    mean, std = moments(timesteps.shorten(path, 7))
    x = draw(path, sampler, 7)
    assert abs(x.mean() - mean) < 4 * std / np.sqrt(N)
    assert abs(x.std() - std) < 4 * std / np.sqrt(2 * N)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_converge_to_the_data(path, name):
    sampler, moments = SAMPLERS[name]
    mean, std = moments(path)
    # The prior forgets the mean, which leaves m s/σ_T of it, and the last step draws no noise.
    assert abs(mean - M) < 4e-3 and abs(std - S) < 4e-3
    few = moments(timesteps.shorten(path, 7))
    assert abs(std - S) <= abs(few[1] - S) + 1e-3
    x = draw(path, sampler, 1000)
    assert abs(x.mean() - mean) < 4 * std / np.sqrt(N)
    assert abs(x.std() - std) < 4 * std / np.sqrt(2 * N)


@EVERY
@pytest.mark.parametrize("name", ["ddim 0.0", "dpm_solver 2", "dpm_solver 3", "heun"])
@pytest.mark.parametrize("steps", [10, 61])
def test_one_number_takes_the_path_of_the_recursion(path, name, steps):
    chain = timesteps.shorten(path, steps)
    x_T = prior_std(chain) * np.linspace(-2, 2, 16)
    x = SAMPLERS[name][0](
        chain,
        exact_denoiser(path),
        jnp.asarray(x_T.reshape(1, 4, 4, 1), jnp.float32),
        None,
        clip_x0=False,
    )
    if name.startswith("ddim"):
        exact = x_T
        for levels in before_and_after(chain):
            slope, shift, _ = ddim_step(*levels, eta=0.0)
            exact = slope * exact + shift
    else:
        solve = heun if name == "heun" else functools.partial(dpm_solver, order=int(name[-1]))
        exact = [solve(chain, value) for value in x_T]
    np.testing.assert_allclose(np.ravel(x), exact, atol=5e-5)


def test_heun_does_not_correct_a_step_that_falls_far():
    chain = schedules.Schedule(
        np.ones(5), [0.05, 0.8, 9.0, 15.0, 200.0]
    )  # 200 to 15 is far; 9 to 0.8 begins below 10
    far = schedules.Schedule(np.ones(4), [0.05, 0.8, 11.0, 200.0])  # here both are far
    for levels in (chain, far):
        x_T = 100 * np.linspace(-2, 2, 16)
        x = jnp.asarray(x_T.reshape(1, 4, 4, 1), jnp.float32)
        x = Heun()(levels, exact_denoiser(levels), x, None, clip_x0=False)
        np.testing.assert_allclose(np.ravel(x), [heun(levels, value) for value in x_T], atol=1e-4)


@EVERY
def test_a_shortened_chain_begins_where_the_prior_is(path):
    """Song et al.'s spacings leave out the end, which only a variance-preserving chain can spare."""
    for steps in ("ddim10", "quad10"):
        last = timesteps.shorten(path, steps).times[-1]
        if path.is_variance_preserving:
            assert last == {"ddim10": 900, "quad10": 800}[steps]
        else:
            assert last == 999
    assert timesteps.shorten(path, "[0,20,41]").times.tolist() == [0, 20, 41]  # as it was asked for


@EVERY
def test_encoding_goes_where_the_flow_does_and_decoding_returns(path):
    x_0 = oracle.data(np.random.default_rng(0), (4, 4, 4, 1))
    errors = []
    for steps in (50, 1000):
        chain, denoiser = timesteps.shorten(path, steps), exact_denoiser(path)
        x_T = encode(chain, denoiser, x_0, clip_x0=False)
        back = DDIM()(chain, denoiser, x_T, None, clip_x0=False)
        errors.append(float(jnp.abs(back - x_0).max()))
        exact_x_T, exact = there_and_back(chain, np.asarray(x_0, np.float64))
        np.testing.assert_allclose(x_T, exact_x_T, atol=1e-4 * prior_std(chain))
        np.testing.assert_allclose(back, exact, atol=5e-4)
    # What is left is the error of the method: of its first order, and largest on the long exploding path.
    assert errors[1] < 0.05 and errors[1] < 0.1 * errors[0], errors
    # The flow keeps deviations in units of the spread.
    alpha, sigma = path.alpha[-1], path.sigma[-1]
    exact = alpha * M + np.sqrt(total(alpha, sigma)) / S * (np.asarray(x_0) - M)
    np.testing.assert_allclose(x_T, exact, rtol=0.05, atol=0.02 * float(sigma))


@EVERY
def test_inpainting_is_its_recursion_for_the_noise_it_drew(path):
    chain = timesteps.shorten(path, 8)
    shape, keys = (2, 2, 1), KEYS[:3]
    denoiser = exact_denoiser(path, variance=exact_variance(chain))
    zero = jnp.zeros((3, *shape))
    ours = inpaint(chain, denoiser, zero, zero[..., :1], keys, resample=3, jump=2, clip_x0=False)
    levels = before_and_after(chain)[::-1]
    rows = resampling(8, resample=3, jump=2)
    x = np.float64(diffusion.prior(chain, keys, shape))
    for k, row in enumerate(rows):
        z, up = (np.float64(diffusion.noise(keys, 3 * k + n, shape)) for n in (0, 2))
        slope, shift, variance = ancestral_step(*levels[row])
        x = slope * x + shift + np.sqrt(variance) * z
        if k + 1 < len(rows) and rows[k + 1] >= row:  # up again, by q(x_t | x_s)
            alpha, sigma, alpha_s, sigma_s = *levels[rows[k + 1]][:2], *levels[row][2:]
            x = alpha / alpha_s * x + np.sqrt(sigma**2 - (alpha / alpha_s * sigma_s) ** 2) * up
    np.testing.assert_allclose(ours, x, atol=1e-4)


@EVERY
@optimized()
def test_inpainting_makes_data(path):
    """The pixels are independent: what is made beside given ones has the moments of data, going back or not."""
    chain = timesteps.shorten(path, 20)
    denoiser = exact_denoiser(path, variance=exact_variance(chain))
    x_0 = oracle.data(np.random.default_rng(1), (2048, 4, 4, 1))
    mask = np.zeros((2048, 4, 4, 1), np.float32)
    mask[:, :, :2] = 1
    x = np.float64(inpaint(chain, denoiser, x_0, mask, KEYS, resample=2, jump=5, clip_x0=False))
    np.testing.assert_array_equal(x[:, :, :2], x_0[:, :, :2])
    made, (mean, std) = x[:, :, 2:], with_noise(chain, ancestral_step)
    # Going back and down again brings the mean nearer to that of the data.
    assert min(mean, M) - 4 * S / np.sqrt(N / 2) < made.mean() < M + 4 * S / np.sqrt(N / 2)
    assert abs(made.std() - std) < 4 * S / np.sqrt(N)


# ---- predictions -----------------------------------------------------------------------------------


def network(path, kind):
    """The exact denoiser as a network of this prediction, by the definition of each."""
    rows = before_and_after(path)[::-1]
    previous = np.array([previous_given_x_t(*levels) for levels in rows]).T
    velocity = predictions.velocity(path, path)

    def network_fn(x, t):
        if (
            kind == "edm"
        ):  # D = c_skip x̃ + c_out F of x̃ = x_0 + s ε, whose input is c_in x̃; Karras et al., Table 1
            s, d = jnp.exp(4.0 * t)[:, None, None, None], 0.5
            root = jnp.sqrt(s**2 + d**2)
            scaled = x * root
            D = M + S**2 / (S**2 + s**2) * (scaled - M)
            return (D - d**2 / root**2 * scaled) / (s * d / root)
        if kind == "mean":
            return diffusion.at(previous[0], t, x) * x + diffusion.at(previous[1], t, x)
        alpha, sigma = (diffusion.at(table, t, x) for table in (path.alpha, path.sigma))
        x_0 = exact_x_0(x, alpha, sigma)
        eps = (x - alpha * x_0) / sigma
        if kind == "velocity":
            slopes = (diffusion.at(table, t, x) for table in (velocity.of_x_0, velocity.of_eps))
            return sum(slope * part for slope, part in zip(slopes, (x_0, eps), strict=True))
        return {"x_0": x_0, "eps": eps, "v": alpha * eps - sigma * x_0}[kind]

    return network_fn


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("kind", predictions.PREDICTIONS)
def test_every_prediction_draws_the_same_images(path, kind):
    if path.alpha[-1] == 0 and kind in ("eps", "edm"):
        with pytest.raises(ValueError, match=r"x_0|alpha is 0") as error:
            predictions.check(path, kind)
        assert "\n" not in str(error.value)
        return
    predictions.check(path, kind)
    denoiser = diffusion.denoiser(path, network(path, kind), prediction=kind)
    for sampler in (DDIM(), Heun()):
        same, ours = draw(path, sampler, 10), draw(path, sampler, 10, denoiser)
        np.testing.assert_allclose(ours, same, atol=5e-3 if kind == "mean" else 5e-4)


def test_velocity_is_the_slope_of_the_path():
    straight, u = predictions.velocity(*2 * [PATHS["straight"]]), np.arange(1, 1001) / 1000
    np.testing.assert_allclose(straight.of_x_0, -1.0, rtol=1e-9)
    np.testing.assert_allclose(straight.of_eps, 1.0, rtol=1e-9)
    exploding = predictions.velocity(*2 * [PATHS["exploding"]])
    ends = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    root = ends[0] + (ends[1] - ends[0]) * (u * 1000 - 1) / 999
    known = 7 * root**6 * (ends[1] - ends[0]) * 1000 / 999
    assert (exploding.of_x_0 == 0).all()
    np.testing.assert_allclose(exploding.of_eps[1:-1], known[1:-1], rtol=1e-4)


# ---- the bound -------------------------------------------------------------------------------------


@pytest.mark.slow
@EVERY
def test_the_bound_of_gaussian_data_by_terms(path):
    chain = timesteps.shorten(path, 10)
    shape, keys = (4, 4, 1), KEYS
    rng = np.random.default_rng(4)
    levels = np.clip(
        np.round((M + S * rng.standard_normal((len(keys), *shape)) + 1) * 127.5), 0, 255
    )
    x_0 = levels / 127.5 - 1
    denoiser = exact_denoiser(path, variance=exact_variance(chain))
    ours = likelihood.bound(chain, denoiser, jnp.asarray(x_0, jnp.float32), keys, clip_x0=False)
    for i, step in enumerate(before_and_after(chain)[::-1]):
        eps = np.float64(diffusion.step_noise(chain, keys, i, shape))
        x_t = step[0] * x_0 + step[1] * eps
        slope, shift, of_model = previous_given_x_t(*step)
        mean = slope * x_t + shift
        if i == 0:
            bits = oracle.level_bits(x_0, mean, np.sqrt(of_model))
        else:
            k_0, k_t, posterior = posterior_given_x_0(*step)
            r = posterior / of_model
            squared = (k_0 * x_0 + k_t * x_t - mean) ** 2 / of_model
            bits = 0.5 * (squared + r - 1 - np.log(r)) / np.log(2)
        bits = bits.mean(axis=(1, 2, 3))
        np.testing.assert_allclose(ours.terms[:, i], bits, rtol=2e-4, atol=2e-5)
        if (
            i
        ):  # E(k_0 (x_0 − x̂_0))² = σ² − σ_q², so what is expected is half the logarithm of a ratio
            error = x_0.std() ** 2 / S**2  # the data are cut at ±1
            known = 0.5 * (r * (1 - error) + error - 1 - np.log(r)) / np.log(2)
            spread = np.std(bits) / np.sqrt(len(bits))
            assert abs(bits.mean() - known) < 0.1 * known + 4 * spread
    alpha, sigma, prior = chain.alpha[-1], chain.sigma[-1], prior_std(chain)
    ratio = (sigma / prior) ** 2
    nats = 0.5 * ((alpha * x_0 / prior) ** 2 + ratio - 1 - np.log(ratio))
    np.testing.assert_allclose(
        ours.prior, nats.mean(axis=(1, 2, 3)) / np.log(2), rtol=1e-4, atol=1e-6
    )


@EVERY
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "analytic"])
def test_the_cost_of_a_jump_is_a_divergence_of_two_gaussians(path, variance):
    full = timesteps.shorten(path, 12)
    error = np.linspace(0.01, 0.8, 12)
    bits = budget.jump_bits(full, error, variance)
    for t, s in ((11, 10), (11, 0), (7, 3), (1, 0)):
        levels = full.alpha[t], full.sigma[t], full.alpha[s], full.sigma[s]
        k_0, _, posterior = posterior_given_x_0(*levels)
        step, before = levels[0] / levels[2], levels[2] ** 2 + levels[3] ** 2
        of_model = {
            "fixed_small": posterior,
            "fixed_large": before - (step * before) ** 2 / (levels[0] ** 2 + levels[1] ** 2),
            "analytic": posterior + k_0**2 * error[t],
        }[variance]
        r = posterior / of_model
        known = 0.5 * (k_0**2 * error[t] / of_model + r - 1 - np.log(r)) / np.log(2)
        assert bits[t, s] == pytest.approx(known, rel=1e-7)


# ---- levels between rows ---------------------------------------------------------------------------


@EVERY
def test_levels_between_rows(path):
    rows = np.array([0, 3, 400, 998])
    same = path.at(path.ratio[rows])
    np.testing.assert_allclose(same.alpha, path.alpha[rows], rtol=1e-12)
    np.testing.assert_allclose(same.sigma, path.sigma[rows], rtol=1e-12)
    assert same.times.tolist() == rows.tolist() and (same.noise_ids == path.noise_ids[rows]).all()
    low, high = path.ratio[[10, 500]], path.ratio[[11, 501]]
    between = path.at(np.sqrt(low * high))  # half-way in log σ/α
    np.testing.assert_allclose(between.ratio, np.sqrt(low * high), rtol=1e-12)
    known = np.sqrt(path.alpha[[10, 500]] * path.alpha[[11, 501]])
    if path.is_variance_preserving:  # the level says it all
        known = 1 / np.sqrt(1 + low * high)
        np.testing.assert_allclose(between.alpha**2 + between.sigma**2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(between.alpha, known, rtol=1e-12)
    np.testing.assert_allclose(between.times, [10.5, 500.5], rtol=1e-6)
    assert between.times.dtype == np.float32
    ids = np.concatenate([between.noise_ids, path.noise_ids])
    assert np.unique(ids).size == ids.size
    assert (path.at(between.ratio).noise_ids == between.noise_ids).all()
    for wrong in (0.5 * path.ratio[0], 1e9):
        if wrong > path.ratio[np.isfinite(path.ratio)][-1] or wrong < path.ratio[0]:
            with pytest.raises(ValueError, match="must lie within"):
                path.at([wrong])


@EVERY
def test_fractional_times_reach_the_network(path):
    chain, seen = path.at(np.sqrt(path.ratio[[10, 500]] * path.ratio[[11, 501]])), []

    def network_fn(x, t):
        seen.append(t)
        return jnp.broadcast_to(t[:, None, None, None], x.shape).astype(jnp.float32)

    denoise_fn = diffusion.denoiser(path, network_fn, prediction="x_0")(chain)
    x_0 = denoise_fn(jnp.zeros((2, 1, 1, 1)), jnp.array([1, 0])).x_0
    np.testing.assert_allclose(np.ravel(x_0), [500.5, 10.5], rtol=1e-6)
    assert seen[0].dtype == jnp.float32
    with pytest.raises(ValueError, match="steps of the trained chain only"):
        diffusion.denoiser(path, network_fn, prediction="mean")(chain)


def test_a_sampler_runs_between_rows():
    """A network that knows every time: DDIM over levels of one's own is the float64 recursion."""
    path = PATHS["straight"]
    chain = path.at(np.geomspace(path.ratio[2], path.ratio[-2], 12))

    def network_fn(x, t):
        u = (t[:, None, None, None] + 1) / 1000
        return exact_x_0(x, 1 - u, u)

    denoiser = diffusion.denoiser(path, network_fn, prediction="x_0")
    x_T = np.linspace(-2, 2, 16)
    x = DDIM()(
        chain, denoiser, jnp.asarray(x_T.reshape(1, 4, 4, 1), jnp.float32), None, clip_x0=False
    )
    for levels in before_and_after(chain):
        slope, shift, _ = ddim_step(*levels, eta=0.0)
        x_T = slope * x_T + shift
    np.testing.assert_allclose(np.ravel(x), x_T, atol=2e-3)  # α between rows is interpolated


# ---- no signal at the end --------------------------------------------------------------------------


def test_zero_terminal_snr():
    plain, path = PATHS["linear"], PATHS["zero snr"]
    assert path.alpha[-1] == 0 and path.sigma[-1] == 1 and path.is_variance_preserving
    assert path.alpha[0] == pytest.approx(plain.alpha[0], rel=1e-15)
    assert (np.diff(path.alpha) < 0).all() and (path.times == plain.times).all()
    # Lin et al. 2024, Algorithm 1: shift to 0, stretch back to the first
    stretched = (
        (plain.alpha - plain.alpha[-1]) * plain.alpha[0] / (plain.alpha[0] - plain.alpha[-1])
    )
    np.testing.assert_allclose(path.alpha, stretched, rtol=1e-12)
    assert (schedules.make("linear", zero_snr=True).alpha == path.alpha).all()
    assert path.beta[-1] == 1 and terminal.health(path).prior_bits_per_dim == 0
    with pytest.raises(ValueError, match="use prediction 'x_0', 'v' or 'velocity'") as error:
        predictions.check(path, "eps")
    assert "\n" not in str(error.value)
    for wrong in (schedules.exploding(10), schedules.straight(10), schedules.linear(1)):
        with pytest.raises(ValueError, match="variance-preserving chain of at least two steps"):
            schedules.zero_terminal_snr(wrong)


@pytest.mark.parametrize("name", ["exploding", "straight"])
def test_beta_is_of_variance_preserving_chains_only(name):
    for what in ("beta", "alpha_bar"):
        with pytest.raises(ValueError, match=f"only a variance-preserving chain has {what}"):
            getattr(PATHS[name], what)
