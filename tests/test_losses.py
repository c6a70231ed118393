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


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
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
    denoise_fn = diffusion.denoiser(FULL, x_0_and(prediction, ERROR), prediction=prediction)
    ours = losses.vlb(FULL, denoise_fn, X_0, T_S, EPS, variance=variance)
    # At t = 999 the mean holds x̂_0 with a factor of 1e-4: float32 leaves three digits of it.
    np.testing.assert_allclose(ours, expected, rtol=2e-3 if prediction == "mean" else 5e-5)
    if prediction == "x_0":  # and where the means agree, what no training takes away
        truth = diffusion.denoiser(FULL, x_0_and("x_0", 0.0), prediction="x_0")
        ours = losses.vlb(FULL, truth, X_0, T_S, EPS, variance=variance)
        # Logarithms around −5 keep 5e-7 of r, and what is left is r²/4 near the end.
        np.testing.assert_allclose(ours, 1000 / np.log(2) * left[t], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.001, 5.0])
def test_min_snr_weighs_the_image_the_same_whatever_is_predicted(gamma):
    snr = (A / (1 - A))[np.asarray(T_S)]
    assert (snr < gamma).any() and (snr > gamma).any()
    expected = np.minimum(snr, gamma) * np.mean(ERROR**2, axis=(1, 2, 3))
    for kind in diffusion.PREDICTIONS:
        denoise_fn = diffusion.denoiser(FULL, x_0_and(kind, ERROR), prediction=kind)
        options = {"prediction": kind, "min_snr_gamma": gamma}
        ours = losses.simple(FULL, denoise_fn, X_0, T_S, EPS, **options)
        np.testing.assert_allclose(ours, expected, rtol=2e-3 if kind == "mean" else 5e-5)


def test_first_term_is_the_discretised_likelihood():
    levels = diffusion.from_uint8(np.arange(96, dtype=np.uint8).reshape(6, 4, 4, 1))
    t = jnp.zeros(6, jnp.int32)
    denoise_fn = diffusion.denoiser(FULL, lambda x, t: jnp.zeros_like(x), prediction="x_0")
    ours = losses.vlb(FULL, denoise_fn, levels, t, EPS, variance="fixed_small")
    log_variance = np.log(5.45318766e-5)
    expected = -gaussians.discretized_log_likelihood(levels, 0.0, log_variance)
    np.testing.assert_allclose(
        ours, losses.mean_over_pixels(expected) * 1000 / np.log(2), rtol=1e-5
    )


# ---- hybrid ----------------------------------------------------------------------------------------


def linear_network(params, prediction):
    """A mean and a variance from a parameter each: they share nothing."""

    def network_fn(x_t, t):
        return jnp.concatenate([params["mean"] * x_t, params["variance"] + 0.1 * x_t], axis=-1)

    return diffusion.denoiser(FULL, network_fn, prediction=prediction, learned_variance=True)


@pytest.mark.parametrize("variance", diffusion.LEARNED)
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_hybrid_trains_the_mean_by_simple_and_the_variance_by_the_bound(prediction, variance):
    params = {"mean": jnp.float32(0.3), "variance": jnp.float32(-0.4)}
    t = T_S.at[0].set(0)  # the decoder too

    def parts(params):
        of_mean, of_variance = losses.hybrid(
            *(FULL, linear_network(params, prediction), X_0, t, EPS),
            **{"prediction": prediction, "variance": variance, "min_snr_gamma": 5.0},
        )
        return jnp.stack([of_mean, of_variance])

    of_mean, of_variance = parts(params)
    args = (FULL, linear_network(params, prediction), X_0, t, EPS)
    simple = losses.simple(*args, prediction=prediction, min_snr_gamma=5.0)
    vlb = losses.vlb(*args, variance=variance)
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
        (("vlb", "learned", 5.0), "weighs 'simple' and 'hybrid' only"),
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
        return losses.vlb(FULL, denoise_fn, X_0, t, EPS).sum()

    assert np.isfinite(jax.grad(total)(100.0))
