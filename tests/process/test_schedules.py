"""Schedules against published constants, respacing against the notations' own tables."""

import numpy as np
import pytest

from ddpm_jax.process import diffusion, schedules, terminal, timesteps

BETAS = [  # the schedules that are given by β, with their names in older configs
    *("linear", "quad", "const", "jsd", "warmup10", "warmup50", "sigmoid", "cosine"),
    *("quadratic", "constant"),
]


def make(name, **options):
    return schedules.make(name, **options)


def test_linear_constants():
    s = make("linear", num_timesteps=1000)
    np.testing.assert_allclose(
        s.alpha_bar[[0, 499, 999]], [0.9999, 0.0785872429, 4.035829765e-5], rtol=1e-9
    )
    np.testing.assert_allclose(
        diffusion.posterior_variance(s)[:3], [0, 5.45318766e-5, 8.54891152e-5], rtol=1e-8
    )
    np.testing.assert_allclose(
        diffusion.fixed_log_variance(s, "fixed_small")[0], -9.8167251, rtol=1e-8
    )


def test_cosine_constants():
    s = make("cosine")
    np.testing.assert_allclose(s.beta[0], 4.12842248e-5, rtol=1e-8)
    assert s.beta[-1] == 0.999 and (s.beta == 0.999).sum() == 1
    np.testing.assert_allclose(s.alpha_bar[-1], 2.4288e-9, rtol=1e-4)
    np.testing.assert_allclose(make("cosine", num_timesteps=4000).beta[0], 9.8658e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "name, alpha_bar_T", [("quad", 7.334e-4), ("const", 1.683e-9), ("jsd", 0.0)]
)
def test_last_alpha_bar(name, alpha_bar_T):
    np.testing.assert_allclose(make(name).alpha_bar[-1], alpha_bar_T, rtol=1e-3, atol=0)


def test_linear_4000_with_end_points_divided():
    s = make("linear", num_timesteps=4000, start=1e-4 / 4, end=0.02 / 4)
    np.testing.assert_allclose(s.alpha_bar[-1], 4.2467e-5, rtol=1e-4)


def test_jsd_is_linear_in_alpha_bar():
    s = make("jsd", num_timesteps=100)
    np.testing.assert_allclose(s.alpha_bar, np.arange(99, -1, -1) / 100, atol=1e-12)
    assert s.beta[-1] == 1.0


def test_warmups_and_sigmoid():
    for name, end in (("warmup10", 100), ("warmup50", 500)):
        beta = make(name).beta
        np.testing.assert_allclose(beta[:end], np.linspace(1e-4, 0.02, end), rtol=1e-12)
        assert (beta[end:] == 0.02).all()
    beta = make("sigmoid", start=0.0, end=1.0, num_timesteps=9).beta
    np.testing.assert_allclose(beta + beta[::-1], 1.0, rtol=1e-12)  # the logistic curve is odd
    np.testing.assert_allclose(np.log(beta / (1 - beta)), np.linspace(-6, 6, 9), rtol=1e-9)


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_every_schedule_at_every_length(name, T):
    s = make(name, num_timesteps=T)
    assert len(s) == T and ((s.beta > 0) & (s.beta <= 1)).all()
    assert (np.diff(s.alpha_bar) < 0).all() and s.beta.dtype == np.float64


@pytest.mark.parametrize(
    "options, words",
    [
        ({"name": "linaer"}, "did you mean 'linear'"),
        ({"name": "linear", "num_timesteps": 0}, "at least 1"),
        ({"name": "cosine", "start": 1e-4}, "'start'"),
        ({"name": "linear", "end": 1.5}, r"\(0, 1\]"),
        ({"name": "linear", "start": 0.0}, r"beta\[0\] = 0"),
        ({"name": "betas"}, "needs the list"),
        ({"name": "betas", "betas": (0.1, float("nan"))}, r"beta\[1\] = nan"),
        ({"name": "betas", "betas": (0.1, 0.2), "num_timesteps": 3}, "2 betas"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_own_betas_and_immutability():
    s = make("betas", betas=(0.1, 0.5, 1.0))
    np.testing.assert_allclose(s.alpha_bar, [0.9, 0.45, 0.0])
    with pytest.raises(ValueError):
        s.beta[0] = 0.3


@pytest.mark.parametrize("second_moment, bits", [(0.25, 7.28e-6), (0.5, 1.456e-5), (1, 2.911e-5)])
def test_prior_term(second_moment, bits):
    health = terminal.health(make("linear"), second_moment=second_moment)
    np.testing.assert_allclose(health.prior_bits_per_dim, bits, rtol=1e-3)
    assert not health.warning


def test_a_chain_that_stops_short_is_reported():
    health = terminal.health(make("linear", num_timesteps=100))
    # KL(N(√ᾱ x, 1 − ᾱ) ‖ N(0, 1)) by quadrature over x_T, for |x_0| = 1.
    mean, var = health.alpha_T, 1 - health.alpha_T**2
    z = np.linspace(-12, 12, 200_001)
    density = np.exp(-((z - mean) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)
    log_ratio = -((z - mean) ** 2) / (2 * var) - 0.5 * np.log(var) + z**2 / 2
    kl = np.sum(density * log_ratio) * (z[1] - z[0]) / np.log(2)
    np.testing.assert_allclose(health.prior_bits_per_dim, kl, rtol=1e-8)
    assert "does not reach" in health.warning


def sequences(n):
    """β_1 … β_n of series whose sum is known to grow without end, or to stay finite."""
    k = np.arange(2.0, n + 2)
    return {
        True: [np.full(n, 3e-5), 1 / k, 0.5 / k, 0.9 / (k * np.log(k))],
        False: [1 / k**2, 0.3 / k**1.5],
    }


def test_the_product_goes_to_0_exactly_if_the_sum_diverges():
    """Tang, Proposition 1.1, and 1.2 for the divergence of q(x_t | x_0 = 1) from N(0, 1)."""
    lengths = (10**2, 10**4, 10**6)
    ends = [sequences(n) for n in lengths]
    for diverges in (True, False):
        for betas in zip(*(end[diverges] for end in ends), strict=True):
            health = [terminal.health(schedules.from_betas(beta)) for beta in betas]
            left = np.array([h.alpha_T**2 for h in health])
            sums = np.array([h.sum_beta for h in health])
            bits = np.array([h.prior_bits_per_dim for h in health])
            # Between two bounds by the sum, as −ln(1 − β) is convex: one goes to 0 with the other or not.
            largest = betas[0].max()
            assert (left <= [h.alpha_bar_bound for h in health]).all()
            assert (left >= 0.999 * np.exp(sums * np.log1p(-largest) / largest)).all()
            if diverges:
                assert (sums[1:] > sums[:-1] + 0.1).all() and (left[1:] < 0.9 * left[:-1]).all()
                assert (bits[1:] < 0.9 * bits[:-1]).all()
            else:
                assert sums[-1] - sums[-2] < 0.01 and left[-1] > 0.99 * left[-2] > 0.1
                assert bits[-1] > 0.97 * bits[-2] > 1e-2 and health[-1].warning
    # ∏(1 − 1/k²) over k = 2, 3 … is ½, and ∏(1 − 1/k) up to n + 1 is 1/(n + 1).
    telescopes = schedules.from_betas(1 / np.arange(2.0, 1002) ** 2)
    np.testing.assert_allclose(telescopes.alpha_bar[-1], 0.5 * 1002 / 1001, rtol=1e-12)
    harmonic = schedules.from_betas(1 / np.arange(2.0, 1002))
    np.testing.assert_allclose(harmonic.alpha_bar[-1], 1 / 1001, rtol=1e-12)


@pytest.mark.parametrize("name", BETAS)
def test_the_sum_of_beta_bounds_what_is_left(name):
    schedule = make(name, num_timesteps=300)
    health = terminal.health(schedule)
    np.testing.assert_allclose(health.sum_beta, sum(schedule.beta.tolist()), rtol=1e-12)
    assert health.alpha_T**2 <= health.alpha_bar_bound == np.exp(-health.sum_beta)
    assert (health.alpha_T > 0) == (name != "jsd")


# ---- shortened chains ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, T, count, head, tail",
    [
        ("10,15,20", 300, 45, [0, 11, 22], [294, 299]),
        ("ddim50", 1000, 50, [0, 20, 40], [960, 980]),
        ("50", 1000, 50, [0, 20, 41, 61], [979, 999]),
        (100, 4000, 100, [0, 40, 81], [3959, 3999]),
        ("quad10", 1000, 10, [0, 9, 39, 88, 158], [632, 800]),
        ([3, 7, 9], 10, 3, [3, 7], [9]),
        (1, 1000, 1, [999], [999]),
        ("ddim1", 1000, 1, [999], [999]),
        ("quad1", 1000, 1, [999], [999]),
    ],
)
def test_subsequence_tables(steps, T, count, head, tail):
    tau = timesteps.subsequence(steps, T)
    assert len(tau) == count
    assert tau[: len(head)].tolist() == head
    assert tau[-len(tail) :].tolist() == tail


def space_timesteps(T, counts):
    """Nichol & Dhariwal's rule, written from its description: parts, strides added up, Python's round."""
    times, start = [], 0
    for part, count in enumerate(counts):
        size = T // len(counts) + (1 if part < T % len(counts) else 0)
        position, stride = 0.0, 1.0 if count <= 1 else (size - 1) / (count - 1)
        for _ in range(count):
            times.append(start + round(position))
            position = position + stride
        start += size
    return times


@pytest.mark.parametrize(
    "T, counts",
    [
        (300, [10, 15, 20]),
        (301, [10, 15, 20]),  # parts of 101, 100, 100
        (302, [101, 101, 100]),  # every step of every part
        (300, [1, 1, 1]),
        (7, [3, 1, 0]),
        (1000, [29, 31, 43, 59]),  # halves that adding up rounds the other way
        (24, [23]),
        (1000, [21]),
        (4000, [95, 1, 333]),
    ],
)
def test_parts_are_those_of_improved_ddpm(T, counts):
    steps = ",".join(map(str, counts))
    assert timesteps.subsequence(steps, T).tolist() == space_timesteps(T, counts)
    chain = timesteps.shorten(make("cosine", num_timesteps=T), steps)
    assert chain.times.tolist() == space_timesteps(T, counts)


def test_parts_of_any_length_and_number():
    words = np.random.default_rng(0)
    for _ in range(2000):
        T = int(words.integers(2, 1200))
        n = int(words.integers(1, min(T, 8) + 1))
        counts = [int(words.integers(0, T // n + (i < T % n) + 1)) for i in range(n)]
        if sum(counts) > 1:
            steps = ",".join(map(str, counts))
            assert timesteps.subsequence(steps, T).tolist() == space_timesteps(T, counts), (
                T,
                steps,
            )


def test_parts_are_spaced_uniformly_and_not_otherwise():
    full = make("linear", num_timesteps=301)
    chain = timesteps.shorten(full, "10,15,20", spacing="uniform")
    assert chain.times.tolist() == space_timesteps(301, [10, 15, 20])
    for spacing in ("linear", "quadratic", "log_snr"):
        with pytest.raises(ValueError, match="such as steps=50; got steps='10,15,20'"):
            timesteps.shorten(full, "10,15,20", spacing=spacing)


@pytest.mark.parametrize("T", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("notation", ["{}", "ddim{}", "quad{}", "logsnr{}"])
def test_every_length_without_repeats(notation, T):
    snr = make("cosine", num_timesteps=T).snr
    for S in range(1, T + 1):
        tau = timesteps.subsequence(notation.format(S), T, snr=snr)
        assert len(tau) == S and (np.diff(tau) > 0).all() and tau[0] >= 0 and tau[-1] < T
    assert (tau == np.arange(T)).all()  # S = T is the whole chain


@pytest.mark.parametrize(
    "steps, words",
    [
        (1001, "1 to 1000"),
        (0, "1 to 1000"),
        ("ddim0", "1 to 1000"),
        ("quad2000", "1 to 1000"),
        ("10,600", "600 of 500"),
        ("10,-1", "-1 of 500"),
        ("0,0", "0 of 1000"),
        ("10,,20", "cannot read"),
        ("fifty", "cannot read"),
        ("quad5,6", "cannot read"),
        ("logsnr5", "SNR stays above 0"),
        ([3, 3], "strictly"),
        ([5, 1000], "0 … 999"),
        ([], "whole numbers"),
        ([0.5, 2], "whole numbers"),
    ],
)
def test_subsequence_refusals(steps, words):
    with pytest.raises(ValueError, match=words):
        timesteps.subsequence(steps, 1000)


def test_log_snr_spacing_is_even_where_whole_times_allow_it():
    full = make("linear")
    for S in (5, 10, 20):
        tau = timesteps.shorten(full, S, spacing="log_snr").times
        assert tau[0] == 0 and tau[-1] == 999
        log_snr = np.log(full.snr)
        wished = np.linspace(log_snr[0], log_snr[-1], S)
        # Each is the nearest there is: no other time would be closer.
        for t, wish in zip(tau, wished, strict=True):
            assert abs(log_snr - wish).min() == abs(log_snr[t] - wish)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"steps": None}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"steps": 4}, [0, 3, 6, 9]),
        ({"steps": "4", "spacing": "uniform"}, [0, 3, 6, 9]),
        ({"steps": 6, "spacing": "linear"}, [0, 1, 3, 5, 6, 8]),
        ({"steps": 5, "spacing": "linear"}, [0, 2, 4, 6, 8]),
        ({"steps": 3, "spacing": "quadratic"}, [0, 2, 8]),
        ({"steps": 4, "last": 7}, [0, 3, 6, 7]),
        ({"steps": 4, "last": 6}, [0, 3, 6]),
        ({"steps": None, "last": 2}, [0, 1, 2]),
        ({"steps": 2, "last": 0}, [0]),
    ],
)
def test_shorten(options, expected):
    full = make("linear", num_timesteps=10, end=0.5)
    short = timesteps.shorten(full, options.pop("steps"), **options)
    assert short.times.tolist() == expected
    np.testing.assert_allclose(short.alpha_bar, full.alpha_bar[expected], rtol=1e-9)


@pytest.mark.parametrize(
    "steps, options, words",
    [
        (None, {"spacing": "linear"}, "such as steps=50"),
        ("quad5", {"spacing": "linear"}, "such as steps=50"),
        (5, {"spacing": "qadratic"}, "did you mean 'quadratic'"),
        (5, {"last": 10}, "0 to 9"),
        (5, {"last": -1}, "0 to 9"),
    ],
)
def test_shorten_refusals(steps, options, words):
    with pytest.raises(ValueError, match=words):
        timesteps.shorten(make("linear", num_timesteps=10), steps, **options)


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
def test_respacing_keeps_the_marginals(name):
    full = make(name, num_timesteps=100)
    tau = timesteps.subsequence(7, 100)
    short = timesteps.respace(full, tau)
    # Near β = 1 the table holds α = 1 − β to 1e-16 of one, not of itself: hence 1e-7 for cosine.
    np.testing.assert_allclose(short.alpha_bar, full.alpha_bar[tau], rtol=1e-7)
    assert short.times.tolist() == tau.tolist()
    # A shortened chain shortened again is a Schedule of the first one's times.
    again = timesteps.respace(short, [1, 4])
    assert again.times.tolist() == tau[[1, 4]].tolist()
    np.testing.assert_allclose(again.alpha_bar, full.alpha_bar[tau[[1, 4]]], rtol=1e-7)


def test_respacing_to_all_steps_changes_nothing():
    full = make("linear")
    same = timesteps.respace(full, np.arange(1000))
    np.testing.assert_allclose(same.beta, full.beta, rtol=1e-9)


def test_tables_that_contradict_themselves_are_refused():
    u = np.arange(1, 51) / 51
    path = {"alpha": np.cos(np.pi / 2 * u), "sigma": np.sin(np.pi / 2 * u)}
    with pytest.raises(ValueError, match="step_variance must be"):
        schedules.Schedule(**path, step_variance=np.full(50, 0.5))
    assert (
        schedules.linear(10, start=1e-12).step_variance[0] == 1e-12
    )  # exact, unlike the difference
    for last in (np.nan, np.inf):
        with pytest.raises(ValueError, match="times must be finite"):
            schedules.Schedule(**path, times=np.append(np.arange(49.0), last))
