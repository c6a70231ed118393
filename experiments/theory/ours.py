"""The quantities of the table, computed by ddpm_jax. Times are the documents' t = 1 … 1000; the t of
ddpm_jax is smaller by one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.experiments.theory.chain import TIMES
from ddpm_jax.networks import layers
from ddpm_jax.networks.unet import UNet
from ddpm_jax.process import diffusion, gaussians, likelihood, losses, predictions, schedules
from ddpm_jax.process.samplers import Ancestral
from ddpm_jax.process.timesteps import respace

SCHEDULE = schedules.make("linear")


def row(times) -> np.ndarray:
    """The rows of the schedule for times of the documents."""
    return np.asarray(times) - 1


def image(values):
    """[N] numbers to N images of one pixel, [N, 1, 1, 1] float32."""
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1)


def alpha():
    return SCHEDULE.step_alpha[row(TIMES)] ** 2


def forward_variance(times=TIMES):
    return 1 - SCHEDULE.alpha_bar[row(times)]


def factor_of_x_0():
    return diffusion.posterior_mean_coefficients(SCHEDULE)[0][row(TIMES)]


def factor_of_x_t():
    return diffusion.posterior_mean_coefficients(SCHEDULE)[1][row(TIMES)]


def posterior_variance(times=TIMES):
    return diffusion.posterior_variance(SCHEDULE)[row(times)]


def _x_0(eps, x_t, t):
    of_x_t, of_eps = predictions.eps(SCHEDULE, SCHEDULE).to_x_0(SCHEDULE)
    return diffusion.at(of_x_t, t, x_t) * x_t + diffusion.at(of_eps, t, x_t) * eps


def _mean(x_t, eps):
    x_t, t = image(x_t), row(TIMES)
    x_0 = _x_0(image(eps), x_t, t)
    return np.ravel(diffusion.posterior_mean(SCHEDULE, x_0, x_t, t))


def mean_from_eps():
    return _mean(2 * np.sqrt(forward_variance()), np.ones(len(TIMES)))


def factor_of_eps():
    return -_mean(np.zeros(len(TIMES)), np.ones(len(TIMES)))


def divergence_of_eps(times=TIMES, variance: str = "fixed_small"):
    """L_{t−1} in nats for ε_θ = ε + 1, from `likelihood.term`, which the bound uses."""
    t = row(times)
    x_t, zero = image(np.zeros(len(t))), image(np.zeros(len(t)))
    x_0, x_theta = (_x_0(image(np.full(len(t), e)), x_t, t) for e in (0, 1))
    log_variance = diffusion.model_log_variance(SCHEDULE, variance, None, x_t, t)
    denoised = diffusion.Denoised(zero, x_theta, zero, log_variance)
    bits = likelihood.term(SCHEDULE, denoised, x_0, x_t, t)
    return np.asarray(bits) * np.log(2)


def prior_term():
    short = schedules.from_betas(SCHEDULE.beta[:100])
    return float(likelihood.prior_term(short, image([0.3]))[0]) * np.log(2)


def last_step():
    """The standard deviation of many samples if all data are one point, with the exact x_0."""
    chain = respace(SCHEDULE, [0, 250, 500, 999])
    options = {"prediction": "x_0", "variance": "fixed_large"}
    denoiser = diffusion.denoiser(SCHEDULE, lambda x, t: jnp.full_like(x, 0.3), **options)
    keys = jax.random.split(jax.random.key(0), 64)
    x_T = diffusion.prior(chain, keys, (1, 1, 1))
    return np.std(np.float64(Ancestral()(chain, denoiser, x_T, keys)))


def pixels_lost():
    network = UNet(out_channels=1, channels=8, channel_mults=(1, 1), num_res_blocks=1, num_groups=2)
    x = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    out, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), x, t)
    return float(x.shape[1] - out.shape[1])


def isotropic_divergence(mean_1, mean_2, variances):
    """KL for each pair of variances."""
    logs = np.log(np.float32(variances))
    mean_1, mean_2 = np.float32([mean_1]), np.float32([mean_2])
    return np.asarray(gaussians.kl(mean_1, logs[:, :1], mean_2, logs[:, 1:])).sum(axis=1)


def divergence_from_the_prior():
    return -float(gaussians.kl(0.4, np.log(0.36), 0.0, 0.0))


def _log_p(x, mean, std):
    return gaussians.discretized_log_likelihood(jnp.asarray(x, jnp.float32), mean, 2 * np.log(std))


def sum_of_levels():
    return float(
        np.exp(_log_p(diffusion.from_uint8(np.arange(256, dtype=np.uint8)), 0.2, 0.5)).sum()
    )


def weight_of_the_decoder():
    x_0 = float(diffusion.from_uint8(np.uint8(128)))
    return float(_log_p(x_0, x_0, 0.1) - _log_p(x_0, x_0 + 0.1, 0.1)) / 0.1**2


def first_mean():
    eps, t = image([0.7]), np.array([0])
    x_1 = diffusion.q_sample(SCHEDULE, image([0.3]), t, eps)
    x_0 = _x_0(eps, x_1, t)
    return float(diffusion.posterior_mean(SCHEDULE, x_0, x_1, t)[0, 0, 0, 0])


def variance_of_a_jump():
    """β̃ of the shortened chain, in the order of the table: τ_i = 500 first, and without the first
    τ, which has no predecessor.
    """
    tau = np.arange(100, 1001, 100)
    variance = diffusion.posterior_variance(respace(SCHEDULE, row(tau)))
    first = list(tau).index(500)
    return np.append(variance[first], np.delete(variance, first)[1:])


def weight_of_ddim():
    return losses.ddim_gamma(SCHEDULE, 0.5)[row(TIMES)]


def mean_of_x_1(x_0):
    zero = np.zeros(len(x_0))
    return np.ravel(diffusion.q_sample(SCHEDULE, image(x_0), np.array([0]), image(zero)))


def ddim_step(x_before, x_0):
    t, ones = row(TIMES), np.ones(len(TIMES))
    x = image(x_before * ones), image(x_0 * ones), t, image(0 * ones)
    return np.ravel(diffusion.q_step_ddim(SCHEDULE, *x, eta=0.0))


def correlation(times):
    """The correlation of two pixels that are equal in the data, both 1 or both −1."""
    t = row(times)
    x_t = np.ravel(diffusion.q_sample(SCHEDULE, image(np.ones(len(t))), t, image(0.0 * t)))
    return np.float64(x_t) ** 2  # their covariance; the variance of each is 1


def first_term():
    x_0 = float(diffusion.from_uint8(np.uint8(128)))
    std = np.sqrt(SCHEDULE.beta[0])
    off = std / SCHEDULE.step_alpha[0]
    return float(_log_p(x_0, x_0, std) - _log_p(x_0, x_0 + off, std))


def time_embedding(t, width):
    return np.ravel(layers.time_embedding(jnp.array([t]), width))
