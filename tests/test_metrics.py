"""Metrics against closed forms for Gaussians and explicit loops over images, and their invariances."""

import functools
import itertools
import math

import numpy as np
import pytest
from scipy import linalg, special, stats

from ddpm_jax import data, metrics


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(n, seed=0):
    return stats.ortho_group.rvs(n, random_state=seed) if n > 1 else np.eye(1)


def spd(n, seed):
    a = normal(n, n, seed=seed)
    return a @ a.T + 0.1 * np.eye(n)


def frechet(x, y):
    x, y = metrics.moments(x), metrics.moments(y)
    return metrics.frechet_distance(x.mean, x.covariance, y.mean, y.covariance)


# ---- moments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_moments_in_any_order_and_any_batches(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    x = np.float32(
        1e3 + normal(100, 5) * [1, 2, 3, 4, 5]
    )  # far from 0, where Σx² − (Σx)²/N loses digits
    exact = x.astype(np.longdouble)
    mean = exact.mean(axis=0)
    covariance = (exact - mean).T @ (exact - mean) / 99
    shuffled = x[np.random.default_rng(1).permutation(100)]
    batches = np.split(shuffled, [1, 2, 40, 77])
    for features in (
        metrics.moments(x),
        functools.reduce(metrics.merge, map(metrics.moments, batches)),
    ):
        assert features.count == 100
        assert features.mean.dtype == features.covariance.dtype == np.float64
        np.testing.assert_allclose(features.mean, np.float64(mean), rtol=1e-14)
        np.testing.assert_allclose(features.covariance, np.float64(covariance), rtol=1e-11)


def test_integer_features_do_not_overflow():
    np.testing.assert_array_equal(metrics.moments(np.full((3, 2), 200, np.uint8)).mean, 200.0)


# ---- Fréchet distance ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 33])
def test_frechet_of_equal_covariances_is_the_distance_of_the_means(n):
    (a, b), c = normal(2, n), spd(n, 1)
    np.testing.assert_allclose(
        metrics.frechet_distance(a, c, b, c), np.sum((a - b) ** 2), rtol=1e-11
    )


@pytest.mark.parametrize("n", [1, 4, 33])
def test_frechet_of_commuting_covariances_is_that_of_their_axes(n):
    (a, b), q = normal(2, n), rotation(n)
    s, t = np.exp(normal(2, n, seed=1))  # standard deviations
    exact = np.sum((a - b) ** 2) + np.sum((s - t) ** 2)
    ours = metrics.frechet_distance(a, q * s**2 @ q.T, b, q * t**2 @ q.T)
    np.testing.assert_allclose(ours, exact, rtol=1e-11)


def test_frechet_of_lines_is_that_of_their_directions():
    u, v, zero = *normal(2, 50), np.zeros(50)  # of rank one: tr (u uᵀ v vᵀ)^½ = |uᵀv|
    exact = u @ u + v @ v - 2 * abs(u @ v)
    ours = metrics.frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
    np.testing.assert_allclose(ours, exact, rtol=1e-12)
    assert metrics.frechet_distance(zero, np.outer(u, u), u, np.zeros((50, 50))) == pytest.approx(
        2 * u @ u
    )


@pytest.mark.parametrize("n, seed", [(2, 0), (7, 1), (40, 2)])
def test_frechet_against_sqrtm(n, seed):
    (a, b), c, d = normal(2, n), spd(n, seed), spd(n, seed + 10)
    root = linalg.sqrtm(c @ d)
    exact = np.sum((a - b) ** 2) + np.trace(c + d - 2 * np.real(root))
    np.testing.assert_allclose(metrics.frechet_distance(a, c, b, d), exact, rtol=1e-8)
    np.testing.assert_allclose(metrics.frechet_distance(b, d, a, c), exact, rtol=1e-8)


@pytest.mark.parametrize("n", [2, 20, 200])  # images, fewer and more than features
def test_frechet_of_a_set_with_itself_is_zero(n):
    x = 10 * normal(n, 64) @ np.diag(np.logspace(-4, 0, 64))
    assert abs(frechet(x, x[::-1])) < 1e-9


def test_frechet_of_few_images_is_that_of_their_matrices():
    """tr (C_1 C_2)^½ is the sum of the singular values of X Yᵀ, [N, M]: no matrix of D × D."""
    x, y = 30 * normal(20, 512), 0.1 + 30 * normal(30, 512, seed=1)
    a, b = (z - z.mean(axis=0) for z in (x, y))
    root = np.sum(linalg.svdvals(a @ b.T)) / np.sqrt(19 * 29)
    exact = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) - 2 * root
    exact += np.sum(a**2) / 19 + np.sum(b**2) / 29
    np.testing.assert_allclose(frechet(x, y), exact, rtol=1e-12)


@pytest.mark.parametrize("n", [30, 300])
def test_frechet_sees_no_rotation_and_no_translation(n):
    x, y, q = normal(n, 64), 0.5 + 2 * normal(n, 64, seed=1), rotation(64)
    np.testing.assert_allclose(frechet(x @ q + 3, y @ q + 3), frechet(x, y), rtol=1e-9)


def test_frechet_of_two_halves_is_its_bias():
    """To first order in 1/N: 2 D/N of the means, and ‖C_1 − C_2‖²/4 of the covariances, D (D + 1)/2N."""
    D, N = 8, 1000
    exact = 2 * D / N + D * (D + 1) / (2 * N)
    values = np.array([frechet(*normal(2, N, D, seed=seed)) for seed in range(40)])
    assert (values > 0).all() and values.std() < 0.3 * exact
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(40) + 0.02 * exact


def test_a_warning_where_the_covariance_is_singular():
    assert metrics.warning(65, 64) is None
    line = metrics.warning(64, 64)
    assert "64 images for 64 features" in line and "\n" not in line
    for n, singular in ((65, False), (64, True)):
        rank = np.linalg.matrix_rank(metrics.moments(normal(n, 64)).covariance)
        assert (rank < 64) == singular


@pytest.mark.parametrize(
    "num_images, name",
    [(50_000, "fid"), (10_000, "fid"), (9_999, "fid_9999"), (2_000, "fid_2k"), (500, "fid_500")],
)
def test_short_names(num_images, name):
    assert metrics.short_name("fid", num_images) == name


# ---- Inception Score -------------------------------------------------------------------------------


def unpermuted(logits):
    """Logits in an order that `inception_score` permutes into the given one before splitting."""
    result = np.empty_like(logits)
    result[data.choose(len(logits))] = logits
    return result


def test_inception_score_of_ignorance_and_of_knowledge():
    assert metrics.inception_score(np.ones((40, 7))) == pytest.approx((1.0, 0.0))
    perfect = np.tile(1e4 * np.eye(7, dtype=np.float32), (20, 1))  # each class twice in a split
    assert metrics.inception_score(unpermuted(perfect)) == pytest.approx((7.0, 0.0))
    one = np.full((40, 7), -1e4) * (np.arange(7) != 3)
    assert metrics.inception_score(one) == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize("splits", [1, 3])
def test_inception_score_is_its_definition(splits):
    logits = 2 * normal(50, 6)
    p = special.softmax(logits, axis=1)
    parts = [p] if splits == 1 else [p[:16], p[16:33], p[33:]]
    scores = [
        math.exp(np.mean([stats.entropy(row, part.mean(axis=0)) for row in part])) for part in parts
    ]
    expected = np.mean(scores), np.std(scores)
    assert metrics.inception_score(unpermuted(logits), splits=splits) == pytest.approx(expected)
    shifted = unpermuted(logits + 300 * normal(50, 1))  # a softmax does not see it
    assert metrics.inception_score(shifted, splits=splits) == pytest.approx(expected)


def test_inception_score_does_not_depend_on_how_a_folder_is_sorted():
    """Images sorted by class: in file order each split would hold a single class, with a score of 1."""
    by_class = 1e4 * np.eye(10, dtype=np.float32)[np.repeat(np.arange(10), 100)]
    assert 9.0 < metrics.inception_score(by_class)[0] <= 10.0


# ---- kernel distance -------------------------------------------------------------------------------


def test_mmd2_is_a_loop_over_pairs():
    x, y = normal(5, 3), 1 + normal(4, 3, seed=1)

    def k(a, b):
        return (sum(map(math.prod, zip(a, b, strict=True))) / 3 + 1) ** 3

    exact = (
        np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
        + np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
        - 2 * np.mean([k(a, b) for a, b in itertools.product(x, y)])
    )
    assert metrics.mmd2(x, y) == pytest.approx(exact, rel=1e-12)


def test_kid_is_the_distance_of_three_moments():
    """In one dimension (xy + 1)³ = Σ_j C(3, j) x^j y^j, so MMD² = Σ_j C(3, j) (E x^j − E y^j)²."""
    x, y = normal(20_000, 1), 0.5 + normal(20_000, 1, seed=1)
    moments = [0, 1, 0], [0.5, 0.5**2 + 1, 0.5**3 + 3 * 0.5]
    exact = sum(
        math.comb(3, j + 1) * (a - b) ** 2 for j, (a, b) in enumerate(zip(*moments, strict=True))
    )
    mean, std = metrics.kid(x, y, subsets=50, subset_size=200)
    assert 0 < std < exact and abs(mean - exact) < 4 * std / np.sqrt(50)


def test_kid_of_one_distribution_is_zero_on_average():
    values = np.array([metrics.mmd2(*normal(2, 10, 4, seed=seed)) for seed in range(400)])
    error = values.std() / np.sqrt(400)
    assert abs(values.mean()) < 3 * error
    with_itself = 2 * np.mean((np.sum(normal(1000, 4) ** 2, axis=1) / 4 + 1) ** 3) / 10
    assert with_itself > 30 * error  # what a sum over all pairs would add


def test_the_subsets_of_kid():
    x, y = normal(30, 4), 1 + normal(40, 4, seed=1)
    whole, std = metrics.kid(x, y[:30], subsets=3, subset_size=30)  # all in each: none twice
    assert whole == pytest.approx(metrics.mmd2(x, y[:30])) and std < 1e-12
    some = functools.partial(metrics.kid, x, y, subsets=4, subset_size=10)
    assert some(seed=1) == some(seed=1) != some(seed=2)
    first, _ = metrics.kid(x, y, subsets=1, subset_size=10, seed=1)
    assert some(seed=1)[1] > 0 and first != some(seed=1)[0]
    # Results that are written down rest on the choice, in every version of NumPy: keep this number.
    x, y = np.sin(np.arange(60.0)).reshape(30, 2), np.cos(np.arange(80.0)).reshape(40, 2)
    assert metrics.kid(x, y, subsets=4, subset_size=10)[0] == pytest.approx(-0.127868, abs=1e-6)


# ---- neighbours ------------------------------------------------------------------------------------


def prdc_by_hand(real, generated, k, k_density):
    def radius(point, others, k):  # the point itself is first, at 0
        return sorted(math.dist(point, other) for other in others)[k]

    def inside(point, centres, k, within):
        return [within(math.dist(point, c), radius(c, centres, k)) for c in centres]

    def closed(d, r):
        return d <= r

    def open_(d, r):
        return d < r

    lies = np.array([inside(g, real, k_density, open_) for g in generated])  # [M, N]
    return {
        "precision": np.mean([any(inside(g, real, k, closed)) for g in generated]),
        "recall": np.mean([any(inside(r, generated, k, closed)) for r in real]),
        "density": np.sum(lies) / (k_density * len(generated)),
        "coverage": np.mean(lies.any(axis=0)),
    }


@pytest.mark.parametrize("block", [1, 7, 2048])
@pytest.mark.parametrize("k, k_density", [(1, 1), (3, 5), (9, 2)])
def test_prdc_by_hand(block, k, k_density, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, generated = normal(23, 3), 0.7 + 0.8 * normal(18, 3, seed=1)
    ours = metrics.prdc(real, generated, k=k, k_density=k_density)
    exact = prdc_by_hand(real, generated, k, k_density)
    assert ours == pytest.approx(exact) and min(ours.values()) > 0


def test_prdc_on_a_line():
    real = np.arange(10.0)[:, None]  # k = 1: balls of radius 1
    ours = metrics.prdc(real, np.array([[0.5], [10.0], [10.5], [99.0]]), k=1, k_density=1)
    # 10 is on the rim of the ball around 9: in it for precision, not for density.
    assert ours["precision"] == 2 / 4 and ours["density"] == 2 / 4 and ours["coverage"] == 2 / 10
    # Balls of the generated: (−9, 10), [9.5, 10.5], [10, 11] and around 99 all down to 10.5.
    assert ours["recall"] == 1.0


def test_prdc_of_sets_that_are_equal_and_of_sets_that_are_apart():
    x = np.float32(1e3 + normal(100, 16))  # float32 and far from 0
    equal = metrics.prdc(x, x[::-1])
    assert equal == {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}
    apart = metrics.prdc(x, x + 100)
    assert apart == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}


def test_prdc_of_copies():
    x = np.repeat(np.float32(1e3 + normal(3, 16)), 8, axis=0)  # every ball is a point
    assert metrics.prdc(x, x) == {"precision": 1.0, "recall": 1.0, "density": 0.0, "coverage": 0.0}
    collapsed = metrics.prdc(1e3 + normal(50, 16), np.full((50, 16), 1e3))
    assert collapsed["precision"] == 1.0 and collapsed["recall"] == 0.0


def test_prdc_sees_no_rotation_order_or_names():
    real, generated, q = normal(60, 8), 0.3 + normal(50, 8, seed=1), rotation(8)
    ours = metrics.prdc(real, generated)
    assert metrics.prdc(real[::-1] @ q + 5, generated[::-1] @ q + 5) == pytest.approx(ours)
    swapped = metrics.prdc(generated, real)
    assert (swapped["precision"], swapped["recall"]) == (ours["recall"], ours["precision"])


# ---- what is refused -------------------------------------------------------------------------------


def with_nan(x):
    x = x.copy()
    x[[3, 7], 1] = np.nan
    x[5, 0] = np.inf
    return x


X = normal(20, 4)


@pytest.mark.parametrize(
    "ask, said",
    [
        (lambda: metrics.moments(X[:0]), "a mean needs at least 1 image, got 0"),
        (lambda: metrics.moments(X[0]), "features are [N, D], got [4]"),
        (lambda: metrics.moments(X[:1]).covariance, "at least 2 images, got 1"),
        (lambda: metrics.moments(with_nan(X)), "3 of 20 images"),
        (lambda: metrics.merge(metrics.moments(X), metrics.moments(X[:, :3])), "4 numbers"),
        (lambda: metrics.frechet_distance(X[0], np.eye(4), X[0, :3], np.eye(3)), "of 3"),
        (lambda: metrics.frechet_distance(X[0], np.eye(3), X[0], np.eye(4)), "[3, 3]"),
        (lambda: metrics.frechet_distance(0.0, 1.0, 0.0, 1.0), "got [] and []"),
        (lambda: metrics.frechet_distance(X[0], np.nan * X[:4], X[0], X[:4]), "not finite"),
        (lambda: metrics.inception_score(X, splits=11), "at least 22 images, got 20"),
        (lambda: metrics.inception_score(X, splits=0), "splits must be at least 1, got 0"),
        (lambda: metrics.inception_score(with_nan(X), splits=1), "3 of 20 images"),
        (lambda: metrics.kid(X, X), "subset_size 1000 needs at least 1000 images, got 20"),
        (lambda: metrics.kid(X, X[:9], subset_size=10), "got 9; draw more, or lower subset_size"),
        (lambda: metrics.kid(X, X, subset_size=1), "subset_size must be at least 2, got 1"),
        (lambda: metrics.kid(X, X, subset_size=2, subsets=0), "subsets must be at least 1"),
        (lambda: metrics.kid(X, X[:, :3], subset_size=5), "4 numbers"),
        (lambda: metrics.kid(X, with_nan(X), subset_size=5), "3 of 20 images"),
        (lambda: metrics.prdc(X, X[:5]), "at least 6 images, got 5; draw more, or lower k"),
        (lambda: metrics.prdc(X, X, k=20), "neighbour 20 of an image needs at least 21"),
        (lambda: metrics.prdc(X, X, k=0), "k must be at least 1, got 0"),
        (lambda: metrics.prdc(X[:, :3], X), "of 3 numbers"),
        (lambda: metrics.prdc(with_nan(X), X), "3 of 20 images"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(ask, said):
    with pytest.raises(ValueError) as info:
        ask()
    assert said in str(info.value) and "\n" not in str(info.value)
