"""Sampling in few steps against float64 recursions, exact flows and the papers' own identities."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import optimized
from test_samplers import COUNTS, FULL, N, agrees, chain, draw

from ddpm_jax.process import diffusion, schedules, timesteps
from ddpm_jax.process.samplers import DDIM, SAMPLERS, DPMSolver, Heun
from ddpm_jax.process.samplers.chain import clip
from ddpm_jax.process.samplers.inversion import encode, slerp
from ddpm_jax.process.samplers.repaint import inpaint, resampling


@pytest.fixture(scope="module")
def denoiser():
    return oracle.exact_denoiser(FULL, variance="fixed_large")


# ---- moments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0, "hat"])
@pytest.mark.parametrize("steps", COUNTS)
def test_ddim_has_the_exact_moments(steps, eta):
    agrees(draw(steps, "ddim", eta=eta), *oracle.ddim_moments(chain(steps).alpha_bar, eta))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", COUNTS)
def test_dpm_solver_has_the_exact_moments(steps, order):
    alpha_bar = chain(steps).alpha_bar
    moments = oracle.affine_moments(lambda x: oracle.dpm_solver(alpha_bar, x, order))
    agrees(draw(steps, "dpm_solver", order=order), *moments)


@pytest.mark.parametrize("steps", COUNTS)
def test_singlestep_has_the_exact_moments(steps):
    alpha_bar = chain(steps).alpha_bar
    moments = oracle.affine_moments(lambda x: oracle.dpm_solver_2s(alpha_bar, x))
    agrees(draw(steps, "dpm_solver", singlestep=True), *moments)


@pytest.mark.parametrize("steps", COUNTS)
def test_heun_has_the_exact_moments(steps):
    alpha_bar = chain(steps).alpha_bar
    agrees(draw(steps, "heun"), *oracle.affine_moments(lambda x: oracle.heun(alpha_bar, x)))


@pytest.mark.parametrize("steps", [10, 11])
@pytest.mark.parametrize("spacing", timesteps.SPACINGS)
@pytest.mark.parametrize("sampler", ["ddim", "2", "3", "2S", "heun"])
def test_one_path_is_the_float64_recursion_on_any_spacing(sampler, spacing, steps, denoiser):
    # Of single numbers, not of moments: the coefficients of every step count, to float32.
    short = timesteps.shorten(FULL, steps, spacing=spacing)
    x_T = np.linspace(-3, 3, 16).reshape(1, 4, 4, 1)
    run = {"ddim": DDIM(), "heun": Heun()}.get(sampler)
    if run is None:
        run = DPMSolver(order=int(sampler[0]), singlestep=sampler == "2S")
    x = np.ravel(run(short, denoiser, jnp.asarray(x_T, jnp.float32), None, clip_x0=False))
    exact = {
        "ddim": lambda x: oracle.dpm_solver(short.alpha_bar, x, 1),
        "2": lambda x: oracle.dpm_solver(short.alpha_bar, x, 2),
        "3": lambda x: oracle.dpm_solver(short.alpha_bar, x, 3),
        "2S": lambda x: oracle.dpm_solver_2s(short.alpha_bar, x),
        "heun": lambda x: oracle.heun(short.alpha_bar, x),
    }[sampler]
    np.testing.assert_allclose(x, [exact(value) for value in np.ravel(x_T)], atol=2e-5)


# ---- identities ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ddim_with_eta_one_is_the_ddpm_step():
    for steps in (1000, 10):
        same = draw(steps, "ancestral", variance="fixed_small")
        np.testing.assert_allclose(draw(steps, "ddim", eta=1.0), same, atol=2e-5)


def test_sigma_hat_is_ancestral_sampling_with_the_large_variance():
    np.testing.assert_allclose(
        draw(10, "ddim", eta="hat"), draw(10, "ancestral", variance="fixed_large"), atol=2e-5
    )


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_the_first_order_solver_is_ddim(steps):
    np.testing.assert_allclose(draw(steps, "dpm_solver", order=1), draw(steps, "ddim"), atol=2e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd", "quad", "const", "sigmoid"])
@pytest.mark.parametrize("steps", [1, 2, 37, 1000])
def test_coefficients_of_any_schedule_are_finite(name, steps):
    short = timesteps.shorten(schedules.make(name), steps)
    before = np.append(1.0, short.alpha_bar[:-1])
    for eta in (0, 0.3, 1, "hat"):
        of_eps, std = diffusion.ddim_std(short, eta)
        assert (std >= 0).all() and (of_eps**2 <= 1 - before + 1e-15).all()
        if eta != "hat":  # Lemma 2.1: the marginals keep their variance
            np.testing.assert_allclose(of_eps**2 + std**2, 1 - before, atol=1e-12)
    for order in (1, 2, 3):
        of_x, _, of_x_0 = DPMSolver(order=order).weights(short)
        assert np.isfinite(of_x).all() and np.isfinite(of_x_0).all()
        # A constant x̂_0 = 1 with x_t = √ᾱ_t stays on its line: the weights sum to what DDIM's does.
        on_line = of_x * np.sqrt(short.alpha_bar) + of_x_0.sum(axis=1)
        np.testing.assert_allclose(on_line, np.sqrt(before), atol=1e-9)


# ---- orders of convergence -------------------------------------------------------------------------


def slope(counts, errors):
    """Of log error over log S: minus the order."""
    return np.polyfit(np.log(counts), np.log(errors), 1)[0]


def flow_error(solve, S):
    """How far a solver ends from the exact flow of x_T = 2, with S steps evenly spaced in λ."""
    level = np.linspace(-4.0, 2.0, S)
    alpha_bar = (1 / (1 + np.exp(-2 * level)))[::-1]
    exact = oracle.exact_x_0(oracle.flow(2.0, alpha_bar[-1], alpha_bar[0]), alpha_bar[0])
    return abs(solve(alpha_bar) - exact)


def our_solver(name, order):
    """A sampler on a chain of any ᾱ, whose network is asked at its own steps."""

    def solve(alpha_bar):
        schedule = schedules.from_betas(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
        denoiser = oracle.exact_denoiser(schedule)
        run = {"ddim": DDIM(), "heun": Heun()}.get(name)
        if run is None:
            run = DPMSolver(order=order, singlestep=name == "singlestep")
        x_T = jnp.full((1, 1, 1, 1), 2.0)
        return float(run(schedule, denoiser, x_T, None, clip_x0=False)[0, 0, 0, 0])

    return solve


@pytest.mark.parametrize(
    "name, order, counts",
    [
        ("ddim", 1, (20, 40, 80)),
        ("dpm_solver", 1, (20, 40, 80)),
        ("dpm_solver", 2, (60, 120, 240)),
        ("singlestep", 2, (61, 121, 241)),
        ("dpm_solver", 3, (40, 60, 80)),  # beyond, the error is that of float32
        ("heun", 2, (40, 80, 160)),
    ],
)
def test_solvers_converge_at_their_order(name, order, counts):
    errors = [flow_error(our_solver(name, order), S) for S in counts]
    assert order - 0.2 < -slope(counts, errors) < order + 0.4, errors


def test_half_the_second_difference_would_be_of_order_two():
    # As in the authors' code; in float64, where the orders can be told apart over a long range.
    def solve(alpha_bar, share):
        level, x, seen = 0.5 * np.log(alpha_bar / (1 - alpha_bar)), 2.0, []
        for i in reversed(range(len(alpha_bar))):
            seen.insert(0, oracle.exact_x_0(x, alpha_bar[i]))
            if i == 0:
                return seen[0]
            h = level[i - 1] - level[i]
            phi_1 = -np.expm1(-h)
            phi_2, first, second = (h - phi_1) / h, 0.0, 0.0
            phi_3 = 0.5 - phi_2 / h  # ∫ e^{−(h−u)} (u/h)² / 2 du
            if len(seen) >= 3:
                second = seen[0] - 2 * seen[1] + seen[2]
                first = seen[0] - seen[1] + second / 2
            elif len(seen) == 2:
                first = seen[0] - seen[1]
            integral = phi_1 * seen[0] + phi_2 * first + share * phi_3 * second
            a, p = alpha_bar[i], alpha_bar[i - 1]
            x = np.sqrt((1 - p) / (1 - a)) * x + np.sqrt(p) * integral

    counts = (60, 120, 240)
    whole, half = (
        slope(counts, [flow_error(lambda a, s=share: solve(a, s), S) for S in counts])
        for share in (1.0, 0.5)
    )
    assert whole == pytest.approx(-3, abs=0.25) and half == pytest.approx(-2, abs=0.25)
    # And ours is the whole one.
    alpha_bar = (1 / (1 + np.exp(-2 * np.linspace(-4.0, 2.0, 12))))[::-1]
    ours = our_solver("dpm_solver", 3)(alpha_bar)
    assert abs(ours - solve(alpha_bar, 1.0)) < 2e-6 < abs(ours - solve(alpha_bar, 0.5))


# ---- there and back --------------------------------------------------------------------------------


def test_encoding_comes_to_where_the_flow_does_and_back(denoiser):
    x_0 = oracle.data(np.random.default_rng(0), (64, 4, 4, 1))
    errors, latents = [], []
    counts = (10, 40, 160, 1000)
    for S in counts:
        x_T = encode(chain(S), denoiser, x_0, clip_x0=False)
        back = DDIM()(chain(S), denoiser, x_T, None, clip_x0=False)
        errors.append(float(jnp.mean(jnp.square(back - x_0))))
        exact = oracle.flow(np.asarray(x_0, np.float64), 1.0, FULL.alpha_bar[-1])
        latents.append(np.abs(x_T - exact).max())
    assert (np.diff(errors) < 0).all() and (np.diff(latents) < 0).all()
    assert slope(counts, errors) < -1.5  # a first-order method, squared
    assert latents[-1] < 5e-3
    # The error of the full chain is that of the method, not of float32: the same there and back in float64.
    exact = oracle.there_and_back(np.asarray(x_0, np.float64), FULL.alpha_bar)
    assert errors[-1] == pytest.approx(np.mean((exact - np.asarray(x_0)) ** 2), rel=0.01)


def test_encoding_clips_as_decoding_does():
    # Images at the edge of the range, and a network that overshoots it.
    wild = diffusion.denoiser(FULL, lambda x, t: 3.0 * jnp.sign(x), prediction="x_0")
    x_0 = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (4, 4, 4, 1)), 1.0, -1.0)
    x_T = encode(chain(50), wild, x_0)
    assert jnp.isfinite(x_T).all()
    np.testing.assert_allclose(DDIM()(chain(50), wild, x_T, None), x_0, atol=1e-5)


def test_slerp():
    keys = jax.random.split(jax.random.key(1), 32)
    x, y = (diffusion.prior(FULL, half, (4, 4, 3)) for half in (keys[:16], keys[16:]))
    fractions = np.linspace(0, 1, 16)
    between = slerp(x, y, fractions)
    np.testing.assert_allclose(slerp(x, y, np.zeros(16)), x, atol=1e-6)
    np.testing.assert_allclose(slerp(x, y, np.ones(16)), y, atol=1e-6)
    # On a great circle: lengths of independent normal images are alike, and so are those between.
    unit = [v / jnp.linalg.norm(v.reshape(16, -1), axis=1)[:, None, None, None] for v in (x, y)]
    lengths = jnp.linalg.norm(slerp(*unit, fractions).reshape(16, -1), axis=1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)
    whole = jnp.arccos(jnp.sum(unit[0] * unit[1], axis=(1, 2, 3)))
    angles = jnp.arccos(jnp.sum(unit[0] * slerp(*unit, fractions), axis=(1, 2, 3)))
    np.testing.assert_allclose(angles, fractions * whole, atol=2e-3)
    np.testing.assert_allclose(slerp(x, x, fractions), x, rtol=1e-5)  # no angle at all
    assert jnp.isfinite(between).all()


# ---- filling in ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "S, resample, jump", [(10, 1, 1), (10, 3, 2), (7, 2, 3), (5, 4, 1), (1, 1, 1)]
)
def test_resampling_walks_every_part_as_often_as_asked(S, resample, jump):
    rows = resampling(S, resample=resample, jump=jump)
    walks = np.bincount(rows, minlength=S)
    assert rows[0] == S - 1 and rows[-1] == 0
    steps = np.diff(rows)
    assert ((steps == -1) | (steps == jump - 1)).all()  # down one, or up `jump` and down one
    # A step is walked again once for each part that goes back over it.
    expected = np.ones(S, int)
    for level in range(1, S - jump + 1, jump):
        expected[level : level + jump] += resample - 1
    np.testing.assert_array_equal(walks, expected)


def test_resampling_is_the_papers():
    # Six steps, jump length 2, resampling twice, as the algorithm of Lugmayr et al., App. B, written out.
    rows = resampling(6, resample=2, jump=2)
    assert rows.tolist() == [5, 4, 3, 4, 3, 2, 1, 2, 1, 0]


@pytest.mark.parametrize("resample, jump, words", [(2, 5, "lower it"), (0, 1, "at least 1")])
def test_resampling_refuses(resample, jump, words):
    with pytest.raises(ValueError, match=words):
        resampling(5, resample=resample, jump=jump)
    assert resampling(5, resample=1, jump=9).tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("steps", [5, 10, 50])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_solvers_come_near_the_data_on_any_schedule(name, steps):
    full = schedules.make(name)
    keys = jax.random.split(jax.random.key(9), 512)
    x_T, denoiser = diffusion.prior(full, keys, (4, 4, 1)), oracle.exact_denoiser(full)
    for sampler in (DDIM(), DPMSolver(), Heun()):
        x = sampler(timesteps.shorten(full, steps), denoiser, x_T, keys, clip_x0=False)
        assert abs(float(jnp.mean(x)) - 0.3) < 0.1
        assert 0.2 < float(jnp.std(x)) < 0.8  # of 0.5; no step may blow it up


@pytest.mark.slow
@optimized()
def test_inpainting_keeps_what_is_known_and_draws_the_rest(denoiser):
    n = N // 16
    keys = jax.random.split(jax.random.key(2), n)
    x_0 = oracle.data(np.random.default_rng(1), (n, 4, 4, 1))
    mask = np.zeros((1, 4, 4, 1), np.float32)
    mask[:, :, :2] = 1
    given = {"resample": 2, "jump": 5, "clip_x0": False}
    x = inpaint(chain(50), denoiser, x_0, jnp.broadcast_to(mask, x_0.shape), keys, **given)
    np.testing.assert_array_equal(x[:, :, :2], x_0[:, :, :2])
    made = np.asarray(x[:, :, 2:])
    # The pixels of these data are independent: what is made has the marginal of data. With the best
    # variance each step is exact, with β_t nearly: 0.52 after 50 steps, and going back keeps a fixed point.
    mean, std = oracle.ancestral_moments(
        chain(50).alpha_bar, oracle.sigma2(chain(50).alpha_bar, "fixed_large")
    )
    assert abs(made.mean() - 0.3) < 0.01 and abs(made.std() - std) < 0.01
    assert abs(mean - 0.3) < 0.01
    part = inpaint(
        chain(50), denoiser, x_0[3:5], jnp.broadcast_to(mask, (2, 4, 4, 1)), keys[3:5], **given
    )
    np.testing.assert_allclose(part, x[3:5], atol=1e-5)


# ---- clipping, refusals ----------------------------------------------------------------------------


def test_dynamic_clipping():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8, 8, 3)), jnp.float32)
    x = x * np.array([0.1, 1.0, 3.0], np.float32)[:, None, None, None]
    out = np.asarray(clip(x, "dynamic"))
    np.testing.assert_array_equal(out[0], x[0])  # within the range: left alone
    for image, result in zip(np.asarray(x)[1:], out[1:], strict=True):
        size = np.percentile(np.abs(image), 99.5)
        np.testing.assert_allclose(result, np.clip(image, -size, size) / size, rtol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("how", [True, "dynamic"])
def test_every_sampler_clips(sampler, how):
    options = {"prediction": "x_0", "variance": "fixed_large"}
    wild = diffusion.denoiser(FULL, lambda x, t: 3.0 * x, **options)
    keys = jax.random.split(jax.random.key(7), 4)
    x_T = diffusion.prior(FULL, keys, (4, 4, 1))
    x = SAMPLERS[sampler]()(chain(10), wild, x_T, keys, clip_x0=how)
    assert jnp.abs(x).max() <= 1.0 + 1e-6


@pytest.mark.parametrize(
    "sampler, options, words",
    [
        ("ddim", {"eta": 1.5}, "0 … 1"),
        ("ddim", {"eta": "hot"}, "'hat'"),
        ("dpm_solver", {"order": 4}, "1, 2 or 3"),
        ("dpm_solver", {"order": 3, "singlestep": True}, "singlestep needs order=2"),
        ("ancestral", {"clip_x0": "soft"}, "true or false or dynamic"),
    ],
)
def test_refusals(sampler, options, words, denoiser):
    clip_x0 = options.get("clip_x0", True)
    own = {name: value for name, value in options.items() if name != "clip_x0"}
    run, x_T = SAMPLERS[sampler](**own), jnp.zeros((1, 2, 2, 1))
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match=words):
        run(chain(10), denoiser, x_T, keys, clip_x0=clip_x0)
    if hasattr(run, "check"):  # before anything is computed
        with pytest.raises(ValueError, match=words):
            run.check(chain(10))


def test_heun_takes_a_ddim_step_from_where_no_signal_is_left():
    full, x_T = schedules.make("jsd", num_timesteps=20), jnp.linspace(-2, 2, 16).reshape(1, 4, 4, 1)
    # x̂_0 is known to be 0.3, and then every step of either keeps to the line from it to the noise.
    point = diffusion.denoiser(full, lambda x, t: jnp.full_like(x, 0.3), prediction="x_0")
    short = timesteps.respace(full, [12, 19])
    kept = {"keep": [1, 0], "clip_x0": False}
    for run in (DDIM(), Heun()):
        x, frames = run(short, point, x_T, None, **kept)
        a = full.alpha_bar[12]
        np.testing.assert_allclose(
            frames.x_t[:, 1], np.sqrt(a) * 0.3 + np.sqrt(1 - a) * x_T, atol=1e-6
        )
        np.testing.assert_allclose(x, 0.3, rtol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_trajectory_shows_the_chain(sampler):
    mild = schedules.make("linear", end=2e-3)  # x̂_0 = (x_t − σ ε̂)/α: a small α would show rounding
    denoiser = oracle.exact_denoiser(mild, variance="fixed_large")
    short = timesteps.shorten(mild, 6)
    keys = jax.random.split(jax.random.key(8), 2)
    x_T = diffusion.prior(mild, keys, (4, 4, 1))
    x, frames = SAMPLERS[sampler]()(short, denoiser, x_T, keys, keep=[5, 3, 0])
    assert frames.t.tolist() == [short.times[[5, 3, 0]].tolist()] * 2
    np.testing.assert_array_equal(frames.x_t[:, 0], x_T)
    np.testing.assert_array_equal(frames.x_0[:, -1], x)  # the last step gives x̂_0
    for k in range(3):
        seen = denoiser(mild)(frames.x_t[:, k], frames.t[:, k]).x_0
        np.testing.assert_allclose(frames.x_0[:, k], jnp.clip(seen, -1, 1), atol=1e-5)
