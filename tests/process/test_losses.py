"""Losses against divergences computed from the distributions themselves, and their minima."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from ddpm_jax.process import diffusion, gaussians, losses, predictions, schedules, timesteps

FULL = schedules.make("linear")
PREDICTIONS = ("eps", "x_0", "mean", "v")  # the others are held by test_paths
rng = np.random.default_rng(0)
X_0 = jnp.asarray(rng.uniform(-1, 1, (6, 4, 4, 1)), jnp.float32)
EPS = jnp.asarray(rng.normal(size=X_0.shape), jnp.float32)
T_S = jnp.array([1, 2, 50, 300, 700, 999])
A, P = FULL.alpha_bar, np.append(1.0, FULL.alpha_bar[:-1])
BETA = 1 - A / P
ERROR = 0.5 * np.cos(np.arange(X_0.size)).reshape(X_0.shape)


def x_0_and(kind, error):
    """network_fn of the truth of a kind, by its definition in float64, as if x̂_0 were x_0 + error."""
    a, p = (table[np.asarray(T_S)][:, None, None, None] for table in (A, P))
    x_0, eps = np.float64(X_0), np.float64(EPS)
    x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps
    of_x_0, of_x_t = np.sqrt(p) * (1 - a / p) / (1 - a), np.sqrt(a / p) * (1 - p) / (1 - a)
    value = {
        "x_0": x_0 + error,
        "eps": eps - np.sqrt(a / (1 - a)) * error,
        "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x_0 - error / np.sqrt(1 - a),
        "mean": of_x_0 * (x_0 + error) + of_x_t * x_t,
    }[kind]
    return lambda x_t, t: jnp.asarray(value, jnp.float32)


def test_simple_is_the_squared_error_of_the_noise():
    zero = diffusion.denoiser(FULL, lambda x, t: jnp.zeros_like(x))(FULL)
    np.testing.assert_allclose(
        losses.simple(FULL, zero, X_0, T_S, EPS), np.mean(np.square(EPS), axis=(1, 2, 3)), rtol=1e-6
    )


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
def test_simple_vanishes_for_the_truth(prediction):
    def network_fn(x_t, t):
        if prediction in PREDICTIONS:
            return x_0_and(prediction, 0.0)(x_t, t)
        return losses.target(FULL, prediction, X_0, T_S, EPS)

    denoiser = diffusion.denoiser(FULL, network_fn, prediction=prediction)
    loss = losses.simple(FULL, denoiser(FULL), X_0, T_S, EPS, prediction=prediction)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_vlb_has_the_weights_of_the_divergence(prediction, variance):
    """T (w_t ‖error‖² + ½(r − 1 − ln r)) with r = β̃_t/σ_t²; w_t of Ho et al. (8), (10), (12)."""
    posterior = BETA * (1 - P) / (1 - A)
    with np.errstate(divide="ignore", invalid="ignore"):  # the decoder's place, t = 0, is not asked
        sigma2 = {"fixed_small": posterior, "fixed_large": BETA}[variance]
        r = posterior / sigma2
        left = 0.5 * (r - 1 - np.log(r))
        w = {
            "mean": 1 / (2 * sigma2),
            "x_0": P * BETA**2 / (2 * sigma2 * (1 - A) ** 2),
            "eps": BETA**2 / (2 * sigma2 * (1 - BETA) * (1 - A)),
            "v": P * BETA**2 / (2 * sigma2 * (1 - A)),
        }[prediction]
    relative = {
        "mean": np.sqrt(P) * BETA / (1 - A),
        "x_0": np.ones(1000),
        "eps": np.sqrt(A / (1 - A)),
        "v": 1 / np.sqrt(1 - A),
    }[prediction]
    t = np.asarray(T_S)
    squared_error = relative[t] ** 2 * np.mean(ERROR**2, axis=(1, 2, 3))
    expected = 1000 / np.log(2) * (w[t] * squared_error + left[t])
    options = {"prediction": prediction, "variance": variance}
    denoiser = diffusion.denoiser(FULL, x_0_and(prediction, ERROR), **options)
    ours = losses.vlb(FULL, denoiser(FULL), X_0, T_S, EPS)
    # At t = 999 the mean holds x̂_0 with a factor of 1e-4: float32 leaves three digits of it.
    np.testing.assert_allclose(ours, expected, rtol=2e-3 if prediction == "mean" else 5e-5)
    if prediction == "x_0":  # and where the means agree, what no training takes away
        truth = diffusion.denoiser(FULL, x_0_and("x_0", 0.0), **options)
        ours = losses.vlb(FULL, truth(FULL), X_0, T_S, EPS)
        # Logarithms around −5 keep 5e-7 of r, and what is left is r²/4 near the end.
        np.testing.assert_allclose(ours, 1000 / np.log(2) * left[t], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.001, 5.0])
def test_min_snr_weighs_the_image_the_same_whatever_is_predicted(gamma):
    snr = (A / (1 - A))[np.asarray(T_S)]
    assert (snr < gamma).any() and (snr > gamma).any()
    expected = np.minimum(snr, gamma) * np.mean(ERROR**2, axis=(1, 2, 3))
    for kind in PREDICTIONS:
        denoise_fn = diffusion.denoiser(FULL, x_0_and(kind, ERROR), prediction=kind)(FULL)
        options = {"prediction": kind, "min_snr_gamma": gamma}
        ours = losses.simple(FULL, denoise_fn, X_0, T_S, EPS, **options)
        np.testing.assert_allclose(ours, expected, rtol=2e-3 if kind == "mean" else 5e-5)


def test_own_weights():
    network = diffusion.denoiser(FULL, lambda x_t, t: 0.3 * x_t)(FULL)
    gamma = np.full(1000, 1 / (1000 * X_0[0].size))
    simple = losses.simple(FULL, network, X_0, T_S, EPS)
    loss = losses.weighted(FULL, network, X_0, T_S, EPS, gamma=gamma)
    np.testing.assert_allclose(loss, simple, rtol=1e-6)
    gamma[50] = 0.0
    loss = losses.weighted(FULL, network, X_0, T_S, EPS, gamma=gamma)
    np.testing.assert_allclose(loss, np.where(T_S == 50, 0.0, simple), rtol=1e-6)
    with pytest.raises(ValueError, match=r"each of the 1000 steps, got shape \(999,\)"):
        losses.weighted(FULL, network, X_0, T_S, EPS, gamma=gamma[1:])
    for eta in (0, "hat", 1.5):
        with pytest.raises(ValueError, match="eta"):
            losses.ddim_gamma(FULL, eta)


CHAINS = [
    schedules.make("linear", num_timesteps=6, start=0.05, end=0.5),
    timesteps.shorten(FULL, "2,2,1"),
    schedules.make("cosine", num_timesteps=4),
]


def objective(chain, eta, slope, shift, x_0):
    """J_σ of one number x_0 by its definition E_q[log q_σ(x_1 … x_S | x_0) − log p_θ(x_0 … x_S)], float64.

    With ε̂ = slope_t x_t + shift_t all of it is normal. Mean and covariance of x_S … x_1 are composed by the
    posteriors of Lemma 2.1, the densities of p_θ by its Gaussian steps; nothing of ddpm_jax is used.
    """
    a = chain.alpha_bar
    p, S = np.append(1.0, a[:-1]), len(a)
    std = eta * np.sqrt((1 - p) / (1 - a) * (1 - a / p))
    keep = np.sqrt(1 - p - std**2)
    mean, covariance = np.zeros(S), np.zeros((S, S))
    mean[-1], covariance[-1, -1] = np.sqrt(a[-1]) * x_0, 1 - a[-1]
    for t in range(S - 1, 0, -1):  # x_{t−1} of the loop's t is a line in x_t, plus noise
        line = keep[t] / np.sqrt(1 - a[t])
        mean[t - 1] = np.sqrt(p[t]) * x_0 + line * (mean[t] - np.sqrt(a[t]) * x_0)
        covariance[t - 1] = covariance[:, t - 1] = line * covariance[t]
        covariance[t - 1, t - 1] = line**2 * covariance[t, t] + std[t] ** 2
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    square = mean[-1] ** 2 + covariance[-1, -1]
    cross = 0.5 * (np.log(2 * np.pi) + square)  # −E log p(x_S)
    std[0] = np.sqrt((1 - p[1]) / (1 - a[1]) * (1 - a[1] / p[1]))  # fixed_small's at the first step
    for t in range(S):
        of_x = np.sqrt(p[t] / a[t])  # μ_θ = √ᾱ_{t−1} x̂_0 + keep ε̂
        of_eps = keep[t] - np.sqrt(p[t] * (1 - a[t]) / a[t])
        factor, constant = of_x + of_eps * slope[t], of_eps * shift[t]
        below = (x_0, 0.0, 0.0) if t == 0 else (mean[t - 1], *covariance[t - 1, [t - 1, t]])
        bias = below[0] - factor * mean[t] - constant
        spread = below[1] - 2 * factor * below[2] + factor**2 * covariance[t, t]
        cross += 0.5 * (np.log(2 * np.pi * std[t] ** 2) + (bias**2 + spread) / std[t] ** 2)
    return cross - entropy


@pytest.mark.parametrize("eta", [0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("chain", CHAINS)
def test_every_ddim_has_the_objective_of_ddpm_up_to_a_constant(chain, eta):
    """J_σ − L_γ is the same for any network; Song et al. 2021, Theorem 1."""
    S, draws = len(chain), np.random.default_rng(1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)  # exact for squares of ε
    t, n = (index.ravel() for index in np.indices((S, 3)))
    constants, values = [], []
    for x_0 in (0.4, 0.4, 0.4):
        slope, shift = draws.normal(size=(2, S))

        def denoise_fn(x_t, t, slope=slope, shift=shift):
            of_x, constant = (diffusion.at(table, t, x_t) for table in (slope, shift))
            return diffusion.Denoised(x_t, x_t, of_x * x_t + constant)

        images = jnp.full((3 * S, 1, 1, 1), x_0)
        eps = jnp.asarray(nodes[n], jnp.float32).reshape(-1, 1, 1, 1)
        gamma = losses.ddim_gamma(chain, eta)
        loss = losses.weighted(chain, denoise_fn, images, t, eps, gamma=gamma)
        mean_over_t = np.sum(np.float64(loss) * weights[n] / weights.sum()) / S
        values.append(objective(chain, eta, slope, shift, x_0))
        constants.append(values[-1] - mean_over_t)
    assert np.ptp(values) > 0.5
    np.testing.assert_allclose(constants, constants[0], atol=1e-4 * max(values))


def test_first_term_is_the_discretised_likelihood():
    levels = diffusion.from_uint8(np.arange(96, dtype=np.uint8).reshape(6, 4, 4, 1))
    t = jnp.zeros(6, jnp.int32)
    options = {"prediction": "x_0", "variance": "fixed_small"}
    denoiser = diffusion.denoiser(FULL, lambda x, t: jnp.zeros_like(x), **options)
    ours = losses.vlb(FULL, denoiser(FULL), levels, t, EPS)
    log_variance = np.log(5.45318766e-5)
    expected = -gaussians.discretized_log_likelihood(levels, 0.0, log_variance)
    np.testing.assert_allclose(
        ours, losses.mean_over_pixels(expected) * 1000 / np.log(2), rtol=1e-5
    )


# ---- hybrid ----------------------------------------------------------------------------------------


def linear_network(params, prediction, variance):
    """A mean and a variance from a parameter each: they share nothing."""

    def network_fn(x_t, t):
        return jnp.concatenate([params["mean"] * x_t, params["variance"] + 0.1 * x_t], axis=-1)

    options = {"prediction": prediction, "variance": variance, "learned_variance": True}
    return diffusion.denoiser(FULL, network_fn, **options)(FULL)


@pytest.mark.parametrize("variance", diffusion.LEARNED)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound(prediction, variance):
    params = {"mean": jnp.float32(0.3), "variance": jnp.float32(-0.4)}
    t = T_S.at[0].set(0)  # the decoder too

    def parts(params):
        of_mean, of_variance = losses.hybrid(
            *(FULL, linear_network(params, prediction, variance), X_0, t, EPS),
            **{"prediction": prediction, "min_snr_gamma": 5.0},
        )
        return jnp.stack([of_mean, of_variance])

    of_mean, of_variance = parts(params)
    args = (FULL, linear_network(params, prediction, variance), X_0, t, EPS)
    simple = losses.simple(*args, prediction=prediction, min_snr_gamma=5.0)
    vlb = losses.vlb(*args)
    np.testing.assert_allclose(of_mean, simple, rtol=1e-6)
    np.testing.assert_allclose(of_variance, vlb, rtol=1e-6)

    slopes = jax.jacobian(parts)(params)  # [2, B] each
    assert (slopes["mean"][1] == 0.0).all() and (slopes["variance"][0] == 0.0).all()
    assert (slopes["mean"][0] != 0.0).all()
    trained = t > 0 if variance == "learned_range" else t >= 0  # its range is one point at t = 0
    assert (slopes["variance"][1][trained] != 0.0).all()


@pytest.mark.parametrize(
    "options, words",
    [
        (("simple", "learned", None), "'hybrid' or 'vlb'"),
        (("simple", "learned_range", 5.0), "'hybrid' or 'vlb'"),
        (("hybrid", "fixed_large", None), "'learned_range'"),
        (("vlb", "analytic", None), "--variance=analytic"),
        (("vlb", "learned", 5.0), "needs loss 'simple' or 'hybrid'; got 5.0 and loss 'vlb'"),
        (("simple", "fixed_small", 0.0), "must be positive"),
        (("hybrid", "learned", float("nan")), "must be positive"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words) as error:
        losses.check(*options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variance", diffusion.VARIANCES[:4])
def test_everything_else_can_be_trained(variance):
    for loss in losses.LOSSES:
        if (loss, variance in diffusion.LEARNED) not in (("simple", True), ("hybrid", False)):
            losses.check(loss, variance, None)
            losses.check(loss, variance, None if loss == "vlb" else 5.0)


def test_the_exact_denoiser_minimises_simple():
    x_0 = oracle.data(np.random.default_rng(1), (4096, 4, 4, 1))
    eps = jnp.asarray(np.random.default_rng(2).normal(size=x_0.shape), jnp.float32)
    exact = oracle.exact_eps(FULL)
    for k in (5, 400):
        t = jnp.full(4096, k)

        def loss(scale, t=t):
            denoiser = diffusion.denoiser(FULL, lambda x, t: scale * exact(x, t))
            return losses.simple(FULL, denoiser(FULL), x_0, t, eps).mean()

        # E[(ε − E[ε|x])²] is the conditional variance of the noise
        a = FULL.alpha_bar[k]
        known = a * oracle.STD**2 / (a * oracle.STD**2 + 1 - a)
        np.testing.assert_allclose(loss(1.0), known, rtol=2e-2)
        assert loss(1.0) < min(loss(0.9), loss(1.1))


def test_gradients_are_finite_for_a_bad_network():
    def total(scale):
        options = {"prediction": "x_0", "variance": "fixed_large"}
        denoiser = diffusion.denoiser(FULL, lambda x, t: scale * x, **options)
        t = jnp.array([0, 0, 1, 2, 998, 999])
        return losses.vlb(FULL, denoiser(FULL), X_0, t, EPS).sum()

    assert np.isfinite(jax.grad(total)(100.0))
