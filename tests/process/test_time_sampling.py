"""How t is drawn: its distribution, its weights, what is remembered of the losses, in the words of a generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.process import schedules
from ddpm_jax.process.time_sampling import Antithetic, Importance, LossHistory, Uniform

KEY = jax.random.key(11)
IMPORTANCE = Importance()
probabilities = jax.jit(IMPORTANCE.probabilities)


def chain(T):
    return schedules.linear(T, end=0.01)


def uniform_t(keys, T):
    """The t of `Uniform`, which weighs them all the same."""
    t, weight = Uniform().draw(chain(T), (), KEY, keys, None)
    assert weight.shape == t.shape
    return t


def antithetic_t(key, position, T):
    return Antithetic().draw(chain(T), (), key, None, position)[0]


def importance_t(keys, state):
    return IMPORTANCE.draw(None, state, KEY, keys, None)


draw, update = jax.jit(importance_t), jax.jit(IMPORTANCE.update)


def no_history(T):
    return IMPORTANCE.init(chain(T))


def positions(size):
    return np.arange(size) / np.float32(size)


def agrees(t, p, draws):
    """Whether each t came as often as it should, within 4.5 standard errors; rare ones count together."""
    counts = np.bincount(np.asarray(t), minlength=len(p))
    often = draws * p > 20
    counts, p = (np.append(x[often], x[~often].sum()) for x in (counts, p))
    assert (np.abs(counts - draws * p) <= 4.5 * np.sqrt(draws * p * (1 - p)) + 1e-6).all()


def history(rows, count=10):
    """A history whose rows hold one number each, [T]."""
    rows = np.asarray(rows, np.float32)
    return LossHistory(np.tile(rows[:, None], 10), np.full(len(rows), count, np.int32))


def drawn(parts):
    """p_t of whole numbers of 2⁻³² whose sum is 2³² modulo 2³²: float64 [T]."""
    parts = np.asarray(parts, np.int64)
    rest = 2**32 - parts.sum()
    assert rest in (0, 2**32)
    return (parts + (rest if len(parts) == 1 else 0)) / 2.0**32


# ---- uniform and antithetic ------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 7, 64])
def test_uniform_is_uniform(T):
    t = uniform_t(jax.random.split(KEY, 20_000), T)
    assert t.dtype == jnp.int32
    agrees(t, np.full(T, 1 / T), 20_000)


@pytest.mark.parametrize("size, T", [(1, 10), (5, 10), (128, 4096), (12, 4), (64, 1000)])
def test_antithetic_batches_cover_the_range_evenly(size, T):
    starts = jax.random.split(KEY, 200)
    t = np.asarray(jax.vmap(lambda key: antithetic_t(key, positions(size), T))(starts))
    assert t.min() >= 0 and t.max() < T
    # Neighbours are T/B apart, rounded down or up, also over the end; if T or B divides by the other,
    # equal parts of the range get equally many.
    row = np.sort(t, axis=1)
    gaps = np.diff(row, axis=1, append=row[:, :1] + T)
    assert gaps.min() >= T // size and gaps.max() <= -(-T // size)
    bins = min(size, T)
    if T % bins == 0:
        assert all((np.bincount(k * bins // T) == size // bins).all() for k in t)


@pytest.mark.parametrize("size, T", [(1, 10), (4, 10), (16, 50)])
def test_antithetic_is_uniform_for_every_example(size, T):
    starts = jax.random.split(KEY, 20_000)
    t = np.asarray(jax.vmap(lambda key: antithetic_t(key, positions(size), T))(starts))
    for column in t.T:
        agrees(column, np.full(T, 1 / T), 20_000)


def test_antithetic_halves_are_the_whole():
    whole = antithetic_t(KEY, positions(64), 1000)
    parts = [antithetic_t(KEY, positions(64)[half], 1000) for half in (slice(32), slice(32, 64))]
    assert (np.concatenate(parts) == whole).all()


def test_antithetic_lowers_the_variance_of_a_mean():
    f = np.cos(np.arange(1000) / 300)
    starts = jax.random.split(KEY, 100)
    even = jax.vmap(lambda key: antithetic_t(key, positions(32), 1000))(starts)
    free = jax.vmap(lambda key: uniform_t(jax.random.split(key, 32), 1000))(starts)
    assert f[even].mean(axis=1).std() < 0.2 * f[free].mean(axis=1).std()


# ---- importance ------------------------------------------------------------------------------------


def test_importance_is_the_root_of_the_mean_square_with_a_little_of_the_uniform():
    rng = np.random.default_rng(0)
    rings = np.float32(rng.lognormal(sigma=2, size=(50, 10)))
    parts = probabilities(LossHistory(rings, np.full(50, 10, np.int32)))
    assert parts.dtype == jnp.uint32
    root = np.sqrt(np.mean(np.float64(rings) ** 2, axis=1))  # Nichol & Dhariwal (18)
    expected = 0.999 * root / root.sum() + 0.001 / 50
    np.testing.assert_allclose(drawn(parts)[1:], expected[1:], rtol=2e-5)
    np.testing.assert_allclose(drawn(parts)[0], expected[0], atol=2e-5)  # it takes the rest


def test_importance_is_uniform_until_every_t_has_ten():
    count = np.full(8, 10, np.int32)
    count[5] = 9
    rings = np.tile(np.arange(8, dtype=np.float32)[:, None], 10)
    for counts in (count, count * 0):
        p = drawn(probabilities(LossHistory(rings, counts)))
        np.testing.assert_allclose(p, 1 / 8, atol=2e-5)
    full = drawn(probabilities(LossHistory(rings, count + 1)))
    assert (np.diff(full) > 0.03).all()


HISTORIES = {
    "nothing yet": no_history(20),
    "one t": no_history(1),
    "one t, full": history([0.3]),
    "all zero": history(np.zeros(20)),
    "one of many": history(np.eye(1000)[700]),
    "the first of many": history(np.eye(4000)[0]),
    "falling": history(1.0 / np.arange(1, 1001) ** 2),
    "huge": history([1e36, 2e36, 1e30]),
    "tiny": history([1e-30, 2e-30, 4e-30]),
    "not a number": history([1.0, np.nan, 2.0]),
    "infinite": history([1.0, np.inf, 2.0]),
}


@pytest.mark.parametrize(
    "case, expected",
    [
        ("all zero", np.full(20, 1 / 20)),
        ("not a number", np.full(3, 1 / 3)),
        ("infinite", np.full(3, 1 / 3)),
        ("huge", 0.999 * np.array([1 / 3, 2 / 3, 0]) + 0.001 / 3),
        ("tiny", 0.999 * np.array([1, 2, 4]) / 7 + 0.001 / 3),
    ],
)
def test_importance_of_losses_that_say_nothing_or_much(case, expected):
    np.testing.assert_allclose(drawn(probabilities(HISTORIES[case])), expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*HISTORIES])
def test_words_belong_to_their_t_and_the_weighted_loss_has_the_uniform_expectation(
    case, monkeypatch
):
    """Σ p_t w_t L_t = mean L_t, whatever was remembered: with the p_t that are drawn, to the last digit."""
    parts = IMPORTANCE.probabilities(
        HISTORIES[case]
    )  # not compiled, as the draw below: to the last digit
    p, T = drawn(parts), len(parts)
    assert (p > 0).all() and p.sum() == 1.0

    # The first, the middle and the last word of each t, instead of random ones.
    ends = np.cumsum(p * 2.0**32).astype(np.uint64)
    firsts = np.append(np.uint64(0), ends[:-1])
    words = np.stack([firsts, (firsts + ends) // np.uint64(2), ends - np.uint64(1)])
    monkeypatch.setattr(jax.random, "bits", lambda key: key)
    t, weight = importance_t(jnp.asarray(words.ravel().astype(np.uint32)), HISTORIES[case])
    assert (np.asarray(t).reshape(3, T) == np.arange(T)).all()

    L = 1 + np.random.default_rng(1).exponential(size=T)
    expectation = np.sum(p * np.float64(weight).reshape(3, T) * L, axis=1)
    np.testing.assert_allclose(expectation, L.mean(), rtol=3e-7)


@pytest.mark.parametrize("case", ["nothing yet", "falling"])
def test_importance_draws_its_probabilities(case):
    parts = probabilities(HISTORIES[case])
    t, weight = draw(jax.random.split(KEY, 50_000), HISTORIES[case])
    p = drawn(parts)
    assert t.dtype == jnp.int32 and weight.dtype == jnp.float32
    agrees(t, p, 50_000)
    np.testing.assert_allclose(weight, 1 / (len(p) * p[np.asarray(t)]), rtol=1e-6)


def test_importance_draws_each_example_by_its_own_key():
    state, keys = HISTORIES["falling"], jax.random.split(KEY, 32)
    whole, _ = draw(keys, state)
    part, _ = draw(keys[10:20], state)
    assert (part == whole[10:20]).all()


# ---- what is remembered ----------------------------------------------------------------------------


def plainly(rings, count, t, values):
    """The same history by a loop."""
    rings, count = np.array(rings), np.array(count)
    for k, value in zip(t, values, strict=True):
        rings[k, count[k] % rings.shape[1]] = value
        count[k] += 1
    return rings, count


@pytest.mark.parametrize("T, size", [(5, 64), (3, 128), (1, 25), (40, 8)])
def test_the_history_is_that_of_a_loop(T, size):
    rng = np.random.default_rng(T)
    ours = no_history(T)
    rings, count = ours
    for _ in range(4):  # with T = 3, a t comes more than ten times in one batch
        t = rng.integers(0, T, size).astype(np.int32)
        values = np.float32(rng.normal(size=size))
        ours, (rings, count) = update(ours, t, values), plainly(rings, count, t, values)
        assert (ours.losses == rings).all() and (ours.count == count).all()


def test_a_row_keeps_its_last_ten():
    t, values = np.zeros(25, np.int32), np.arange(25, dtype=np.float32)
    ours = update(no_history(2), t, values)
    assert sorted(ours.losses[0].tolist()) == list(range(15, 25)) and ours.count.tolist() == [25, 0]
    assert (ours.losses[1] == 0).all()
