"""Samplers: from x_T ~ N(0, I) to x_0, each one `lax.scan` over a Schedule.

A sampler takes a `denoise_fn(x_t, t) -> Denoised` and knows nothing of networks. Each turn of its scan
calls it once, so a turn costs a forward pass; Heun's method takes two turns a step, the others one. Noise
of example i at time t is drawn from that example's key and t, so a sample does not depend on the batch it
is part of.

    ancestral    x_{t−1} ~ N(μ̃_t(x_t, x̂_0), σ_t² I)                        Ho et al. 2020, Algorithm 2
    ddim         x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1−ᾱ_{t−1}−σ_t²) ε̂ + σ_t z       Song et al. 2021 (12)
    dpm_solver   the probability-flow ODE in λ = log √(ᾱ/(1−ᾱ))           Lu et al. 2022, DPM-Solver++
    heun         the same ODE in √((1−ᾱ)/ᾱ), trapezoidal rule             Karras et al. 2022, Algorithm 1

A coefficient is a float64 table over the steps, made when a sampler is; no argument of a square root is
ever clamped to be one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import diffusion
from ddpm_jax.diffusion import ddim_std
from ddpm_jax.schedules import Schedule

SAMPLERS = ("ancestral", "ddim", "dpm_solver", "heun")
DYNAMIC_PERCENTILE = 99.5  # of |x̂_0| in an image; Saharia et al. 2022 (Imagen)


class Trajectory(NamedTuple):
    """What a chain looked like at K of its steps."""

    t: jax.Array  # int32 [B, K], the time of each
    x_t: jax.Array  # [B, K, H, W, C]
    x_0: jax.Array  # [B, K, H, W, C] x̂_0(x_t), clipped if the sampler does


def prior(keys, image_shape):
    """x_T ~ N(0, I): [B, H, W, C] from one key for each example; the keys are not consumed."""
    return diffusion.noise(keys, np.uint32(2**32 - 1), image_shape)  # the one time no chain has


def check_clip(how: bool | str) -> None:
    """Raises ValueError if `clip` does not know how."""
    if how not in (True, False, "dynamic"):
        raise ValueError(f"clip_x0 is True, False or 'dynamic', not {how!r}")


def clip(x_0, how: bool | str):
    """x̂_0 [B, H, W, C] within [−1, 1] again.

    Args:
      how: True cuts off what lies beyond ±1 (Ho et al.'s code); "dynamic" cuts each image at the
        `DYNAMIC_PERCENTILE` of its |x̂_0| if that is above 1, and divides by it (Saharia et al. 2022
        §2.3); False does nothing.
    """
    check_clip(how)
    if how == "dynamic":
        size = jnp.percentile(jnp.abs(x_0), DYNAMIC_PERCENTILE, axis=(1, 2, 3), keepdims=True)
        size = jnp.maximum(size, 1.0)
        return jnp.clip(x_0, -size, size) / size
    return jnp.clip(x_0, -1.0, 1.0) if how else x_0


def _sqrt(square: np.ndarray) -> np.ndarray:
    assert (square >= 0).all(), square.min()  # never clamped: a negative one is a wrong formula
    return np.sqrt(square)


def _scan(
    schedule: Schedule,
    denoise_fn: Callable,
    x,
    turn: Callable,
    *,
    clip_x0: bool | str,
    keep: Sequence[int] | None = None,
    rows: np.ndarray | None = None,
    memory=(),
):
    """Runs x, memory = turn(k, i, x, denoised, memory) for k = 0, 1, … at the steps i = rows[k].

    Args:
      rows: int [K] steps at which the network is asked; None for all, from the last to the first.
      memory: what a turn leaves to the next one beside x.
    """
    times = jnp.asarray(schedule.timesteps)
    rows = np.arange(len(schedule))[::-1] if rows is None else rows
    kept = np.asarray([] if keep is None else keep, np.int32)
    place = np.full(len(schedule), len(kept), np.int32)  # out of range: not kept
    place[kept] = np.arange(len(kept))
    place = jnp.asarray(place)

    def body(carry, now):
        (x, memory, frames), (k, i) = carry, now
        denoised = denoise_fn(x, jnp.full(x.shape[:1], times[i]))
        if clip_x0:
            x_0 = clip(denoised.x_0, clip_x0)
            # The noise that leads from the clipped x̂_0 to this x_t, so that both describe the same.
            eps = diffusion.from_x_0(schedule, "eps", x_0, x, i)
            denoised = denoised._replace(x_0=x_0, eps=eps)
        frames = tuple(
            all_kept.at[:, place[i]].set(one, mode="drop")
            for all_kept, one in zip(frames, (x, denoised.x_0), strict=False)
        )
        x, memory = turn(k, i, x, denoised, memory)
        return (x, memory, frames), None

    empty = jnp.zeros((x.shape[0], len(kept), *x.shape[1:]))
    frames = () if keep is None else (empty, empty)
    turns = (jnp.arange(len(rows)), jnp.asarray(rows))
    (x, _, frames), _ = jax.lax.scan(body, (x, memory, frames), turns)
    if keep is None:
        return x
    t = jnp.broadcast_to(times[kept], (x.shape[0], len(kept)))
    return x, Trajectory(t, *frames)


# ---- with noise ------------------------------------------------------------------------------------


def _ancestral_step(schedule: Schedule, variance, i, x_t, denoised, z):
    """x_{t−1} from the noise z ~ N(0, I); none at the last step."""
    mean = diffusion.posterior_mean(schedule, denoised.x_0, x_t, i)
    log_variance = diffusion.model_log_variance(schedule, variance, denoised, x_t, i)
    return mean + jnp.where(i > 0, jnp.exp(0.5 * log_variance), 0.0) * z


def ancestral(
    schedule: Schedule,
    denoise_fn: Callable,
    x_T,
    keys,
    *,
    variance: str | np.ndarray = "fixed_large",
    clip_x0: bool | str = True,
    keep: Sequence[int] | None = None,
):
    """Ho et al. Algorithm 2: x_{t−1} ~ N(μ̃_t(x_t, x̂_0), σ_t² I), no noise at the last step.

    Args:
      schedule: the chain to run, full or shortened.
      denoise_fn: (x_t [B, H, W, C], t int [B]) -> Denoised.
      x_T: [B, H, W, C] from N(0, I); or any x_t of the last step of the schedule.
      keys: [B] keys, one for each example.
      variance: a name or a table of log σ², float64 [S]; see `diffusion.model_log_variance`.
      clip_x0: see `clip`; of x̂_0 before the posterior mean, as Ho et al.'s code does and the paper does
        not say; it applies to every parameterisation.
      keep: K steps of the schedule to be remembered.

    Returns:
      x_0: [B, H, W, C]; within [−1, 1] if clipped. With `keep`, (x_0, Trajectory).
    """

    def turn(k, i, x_t, denoised, memory):
        z = diffusion.noise(keys, jnp.asarray(schedule.timesteps)[i], x_t.shape[1:])
        return _ancestral_step(schedule, variance, i, x_t, denoised, z), memory

    return _scan(schedule, denoise_fn, x_T, turn, clip_x0=clip_x0, keep=keep)


def ddim(
    schedule: Schedule,
    denoise_fn: Callable,
    x_T,
    keys=None,
    *,
    eta: float | str = 0.0,
    clip_x0: bool | str = True,
    keep: Sequence[int] | None = None,
):
    """Song et al. 2021 (12): x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1−ᾱ_{t−1}−σ_t²) ε̂ + σ_t z.

    Arguments and result as `ancestral`, with which η = 1 and "fixed_small" share all noise. ε̂ is derived
    anew from the clipped x̂_0, so that both describe the same x_t (as Improved DDPM's code; Song et al. do
    not clip).

    Args:
      keys: [B] keys; None if eta is 0, where nothing is drawn.
      eta: 0 … 1 or "hat"; see `diffusion.ddim_std`.
    """
    of_x_0, (of_eps, std) = _sqrt(schedule.alpha_bar_prev), ddim_std(schedule, eta)

    def turn(k, i, x_t, denoised, memory):
        x = (
            diffusion.at(of_x_0, i, x_t) * denoised.x_0
            + diffusion.at(of_eps, i, x_t) * denoised.eps
        )
        if eta != 0:
            z = diffusion.noise(keys, jnp.asarray(schedule.timesteps)[i], x_t.shape[1:])
            x += diffusion.at(std, i, x_t) * z
        return x, memory

    return _scan(schedule, denoise_fn, x_T, turn, clip_x0=clip_x0, keep=keep)


# ---- solvers of the probability-flow ODE -----------------------------------------------------------


class SolverWeights(NamedTuple):
    """x_{t−1} = of_x x_t + of_x_before x_before + Σ_j of_x_0[:, j] x̂_0 of j network calls ago; float64."""

    of_x: np.ndarray  # [S]
    of_x_before: np.ndarray  # [S], of what the network saw one call ago
    of_x_0: np.ndarray  # [S, order]


def dpm_solver_weights(
    schedule: Schedule, order: int, *, singlestep: bool = False
) -> SolverWeights:
    """The steps of DPM-Solver++ as linear combinations.

    With λ = log √(ᾱ/(1−ᾱ)), h = λ_{t−1} − λ_t and α_{t−1} = √ᾱ_{t−1}, the ODE has the exact solution

        x_{t−1} = √((1−ᾱ_{t−1})/(1−ᾱ_t)) x_t + α_{t−1} ∫_0^h e^{−(h−u)} x̂_0(λ_t + u) du     Lu et al. (8)

    Order 1 takes x̂_0 as constant, which is DDIM; order 2 is Lu et al.'s Algorithm 2 (2M); order 3
    integrates the parabola through the last three x̂_0. (The authors' code weighs the second difference by
    half of that integral; its error then falls as S⁻², see the tests.) With `singlestep`, order 2 is their
    Algorithm 1 (2S): across two steps at a time, through the time between them.

    The order is lower where there is no past, at the end, where λ is infinite, and where a step is more
    than twice as long as those that it extrapolates from. (For a mixture of two normal densities, 10 evenly
    rounded times left an error of 0.12 with that rule and 0.36 without; on log-SNR spacing it never acts.)

    Raises:
      ValueError: order is not 1, 2 or 3; singlestep with another order than 2.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if singlestep and order != 2:
        raise ValueError(f"singlestep is of order 2 only, got order={order}")
    S, a, p = len(schedule), schedule.alpha_bar, schedule.alpha_bar_prev
    with np.errstate(divide="ignore"):
        level = 0.5 * np.log(schedule.snr)  # λ
    level_prev = np.append(np.inf, level[:-1])
    weights = SolverWeights(_sqrt((1.0 - p) / (1.0 - a)), np.zeros(S), np.zeros((S, order)))
    for i in range(S):
        h, begin = level_prev[i] - level[i], i + 1
        if singlestep and i % 2 == 1 and begin < S and np.isfinite(level[begin]):
            h = level_prev[i] - level[begin]
            through = -np.expm1(-h) * h / (2.0 * (level[i] - level[begin]))
            share = [through, -np.expm1(-h) - through]
            weights.of_x[i], weights.of_x_before[i] = 0.0, np.sqrt((1.0 - p[i]) / (1.0 - a[begin]))
        else:
            backs = np.zeros(0) if singlestep else level[i] - level[begin : i + order]
            backs = backs[np.isfinite(backs)]
            if (np.diff(backs, prepend=0.0) <= 0).any():  # β so small that ᾱ stayed the same
                backs = backs[:0]
            while len(backs) and h > 2.0 * backs[-1] / len(backs):
                backs = backs[:-1]
            share = _multistep(h, backs, order)
        weights.of_x_0[i, : len(share)] = np.sqrt(p[i]) * np.asarray(share)
    return weights


def _multistep(h: float, backs: np.ndarray, order: int) -> list[float]:
    """The factors of x̂_0 at u = 0 and u = −backs in ∫_0^h e^{−(h−u)} x̂_0(u) du."""
    moment_0 = -np.expm1(-h)
    if len(backs) == 0:
        return [moment_0]
    if (
        order == 2
    ):  # Algorithm 2 takes the slope from the middle of the step, not from within the integral
        ahead = moment_0 * h / (2.0 * backs[0])
        return [moment_0 + ahead, -ahead]
    moment_1 = h - moment_0  # ∫ e^{−(h−u)} u du
    moment_2 = h**2 - 2.0 * moment_1  # ∫ e^{−(h−u)} u² du
    nodes, factors = np.append(0.0, -backs), []
    for j, node in enumerate(nodes):  # the polynomial that is 1 at this node and 0 at the others
        others = np.delete(nodes, j)
        powers = np.poly(others)[::-1] / np.prod(node - others)  # its coefficients of 1, u, u²
        factors.append(float(powers @ (moment_0, moment_1, moment_2)[: len(powers)]))
    return factors


def dpm_solver(
    schedule: Schedule,
    denoise_fn: Callable,
    x_T,
    *,
    order: int = 2,
    singlestep: bool = False,
    clip_x0: bool | str = True,
    keep: Sequence[int] | None = None,
):
    """DPM-Solver++ of order 1, 2 or 3 (Lu et al. 2022): deterministic, a network call for each step.

    Multistep unless told otherwise. `singlestep` helps where x̂_0 changes fast, as under strong guidance:
    for a mixture of two normal densities, guidance 4 and 10 log-SNR steps, an error of 0.044 against 0.136.
    Arguments and result as `ancestral`; see `dpm_solver_weights`.
    """
    weights = dpm_solver_weights(schedule, order, singlestep=singlestep)

    def turn(k, i, x_t, denoised, memory):
        before, *past = memory
        past = (denoised.x_0, *past)
        x = diffusion.at(weights.of_x, i, x_t) * x_t
        if singlestep:
            x += diffusion.at(weights.of_x_before, i, x_t) * before
        x += sum(diffusion.at(weights.of_x_0[:, j], i, x_t) * x_0 for j, x_0 in enumerate(past))
        return x, (x_t, *past[:-1])

    memory = (jnp.zeros_like(x_T),) * order
    return _scan(schedule, denoise_fn, x_T, turn, clip_x0=clip_x0, keep=keep, memory=memory)


def _flow(alpha_bar: np.ndarray, to: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of x and ε̂ in the step of Song et al. 2021 (13) from one ᾱ [S] to another."""
    of_x = _sqrt(to / alpha_bar)
    return of_x, _sqrt(1.0 - to) - of_x * _sqrt(1.0 - alpha_bar)


def check_heun(schedule: Schedule) -> None:
    """Refuses a chain for Heun's method that ends in noise alone, where its variable is infinite.

    Raises:
      ValueError: ᾱ is 0 at the last step.
    """
    if not schedule.alpha_bar[-1] > 0:
        raise ValueError(
            "heun integrates over √((1−ᾱ)/ᾱ), which is infinite where this schedule ends; use dpm_solver"
        )


def heun(
    schedule: Schedule,
    denoise_fn: Callable,
    x_T,
    *,
    clip_x0: bool | str = True,
    keep: Sequence[int] | None = None,
):
    """Heun's method on dx̄/dσ̄ = ε̂, with x̄ = x/√ᾱ and σ̄ = √((1−ᾱ)/ᾱ): 2S − 1 network calls, order 2.

    The ODE is Song et al. 2021 (14), the method Karras et al. 2022, Algorithm 1 without churn: a DDIM step,
    then the same step with the mean of ε̂ at both of its ends. The last step, to where no network was
    trained, is DDIM's, and so is one that falls to less than a tenth from σ̄ above 10: what is said at its
    end would be weighed by a length of which the end is nothing. (With the cosine schedule and 10 steps, for
    normal data of standard deviation 0.5, samples had 7.4 without that rule, 0.48 with it.) Arguments and
    result as `ancestral`.
    """
    check_heun(schedule)
    S, p = len(schedule), schedule.alpha_bar_prev
    sigma, sigma_prev = (_sqrt((1.0 - a) / a) for a in (schedule.alpha_bar, p))
    too_far = jnp.asarray((sigma > 10.0) & (sigma > 10.0 * sigma_prev))
    of_x, of_eps = _flow(schedule.alpha_bar, p)
    of_x_0, of_eps_euler = _sqrt(p), _sqrt(1.0 - p)
    # The network is asked at the last step, then twice at each below: where Euler's step ends, and where
    # the corrected one does.
    rows = np.append(S - 1, np.repeat(np.arange(S - 1)[::-1], 2))

    def turn(k, i, x, denoised, memory):
        start, slope = memory  # of the step that is being corrected
        euler = (
            diffusion.at(of_x_0, i, x) * denoised.x_0
            + diffusion.at(of_eps_euler, i, x) * denoised.eps
        )
        above = jnp.minimum(i + 1, S - 1)
        mean_slope = 0.5 * (slope + denoised.eps)
        corrected = (
            diffusion.at(of_x, above, x) * start + diffusion.at(of_eps, above, x) * mean_slope
        )
        corrected = jnp.where(too_far[above], x, corrected)
        correcting = k % 2 == 1
        return jnp.where(correcting, corrected, euler), (x, denoised.eps)

    memory = (x_T, jnp.zeros_like(x_T))
    return _scan(
        schedule, denoise_fn, x_T, turn, clip_x0=clip_x0, keep=keep, rows=rows, memory=memory
    )


# ---- what is done with given images ----------------------------------------------------------------


def encode(schedule: Schedule, denoise_fn: Callable, x_0, *, clip_x0: bool | str = True):
    """x_T of an image: DDIM's step backwards, S network calls; Song et al. 2021 §4.3.

    ε̂ is that of x_{t−1} at the time t that the step goes to, as if it were there already; `ddim` with η = 0
    is the way back. (Asking at the time the step comes from left twice the error for a mixture of two
    normal densities, at any S.) x̂_0 is clipped where ε̂ is derived from it, as on the way back.

    Args:
      x_0: [B, H, W, C] in [−1, 1].

    Returns:
      x_T: [B, H, W, C], of the last step of the schedule.
    """
    of_x, of_eps = _flow(schedule.alpha_bar_prev, schedule.alpha_bar)

    def turn(k, i, x, denoised, memory):
        x = diffusion.at(of_x, i, x) * x + diffusion.at(of_eps, i, x) * denoised.eps
        return x, memory

    rows = np.arange(len(schedule))
    return _scan(schedule, denoise_fn, x_0, turn, clip_x0=clip_x0, rows=rows)


def resampling(num_steps: int, *, resample: int, jump: int) -> np.ndarray:
    """The steps at which RePaint asks the network, in order: int [K]; Lugmayr et al. 2022, App. B.

    The chain goes down from S − 1. Each time 1, 1 + jump, 1 + 2 jump, … steps are left, it goes back up by
    `jump` steps and down again, until it has walked them `resample` times.

    Raises:
      ValueError: resample or jump below 1, or a chain too short to go back at all.
    """
    if min(resample, jump) < 1:
        raise ValueError(f"resample and jump must be at least 1, got {resample} and {jump}")
    if resample > 1 and num_steps <= jump:
        raise ValueError(
            f"a chain of {num_steps} steps cannot go back by jump={jump}; lower it, or take resample=1"
        )
    rows, level = [], num_steps  # the level is how many steps are still to be done
    walks = {at: resample - 1 for at in range(1, num_steps - jump + 1, jump)}
    while level > 0:
        level -= 1
        rows.append(level)
        if walks.get(level, 0) > 0:
            walks[level] -= 1
            level += jump
    return np.array(rows)


def inpaint(
    schedule: Schedule,
    denoise_fn: Callable,
    x_0,
    mask,
    keys,
    *,
    resample: int = 10,
    jump: int = 10,
    variance: str | np.ndarray = "fixed_large",
    clip_x0: bool | str = True,
):
    """Fills in what is missing of images: RePaint, Lugmayr et al. 2022, Algorithm 1.

    After each step of `ancestral` the known pixels are drawn from q(x_{t−1} | x_0); to let the rest agree
    with them, the chain goes back up `jump` steps and down again, `resample` times in all.

    Args:
      x_0: [B, H, W, C] in [−1, 1]; what it has outside the mask is kept exactly.
      mask: [B, H, W, 1], 1 where the image is known and 0 where it is to be made.
      keys: [B] keys.
      resample: how often each part of the chain is walked, at least 1; 1 never goes back.
      jump: steps that it goes back, at least 1.

    Returns:
      [B, H, W, C].
    """
    rows, shape = resampling(len(schedule), resample=resample, jump=jump), x_0.shape[1:]
    alpha_bar_prev = schedule.alpha_bar_prev
    following = np.append(
        rows[1:], -1
    )  # where the network is asked next: above rows − 1 if going back
    share = np.where(following >= rows, schedule.alpha_bar[following] / alpha_bar_prev[rows], 1.0)
    of_x, of_noise = _sqrt(share), _sqrt(1.0 - share)

    def turn(k, i, x_t, denoised, memory):
        z, known_z, up_z = (diffusion.noise(keys, 3 * k + n, shape) for n in range(3))
        made = _ancestral_step(schedule, variance, i, x_t, denoised, z)
        known = (
            diffusion.at(_sqrt(alpha_bar_prev), i, x_0) * x_0
            + diffusion.at(_sqrt(1.0 - alpha_bar_prev), i, x_0) * known_z
        )
        x = mask * known + (1.0 - mask) * made
        return diffusion.at(of_x, k, x) * x + diffusion.at(of_noise, k, x) * up_z, memory

    x_T = prior(keys, shape)
    return _scan(schedule, denoise_fn, x_T, turn, clip_x0=clip_x0, rows=rows)


def slerp(x, y, fraction):
    """From x (fraction 0) to y (1) along the great circle between them: Song et al. 2021, App. D.5.

    Args:
      x, y: [B, H, W, C], not of opposite directions.
      fraction: [B] in 0 … 1.
    """
    dot, x_norm, y_norm = (
        jnp.sum(values, axis=(1, 2, 3)) for values in (x * y, jnp.square(x), jnp.square(y))
    )
    angle = jnp.arccos(jnp.clip(dot / jnp.sqrt(x_norm * y_norm), -1.0, 1.0))
    flat = angle < 1e-4  # the same direction: a straight line
    safe = jnp.where(flat, 1.0, jnp.sin(angle))
    of_x = jnp.where(flat, 1.0 - fraction, jnp.sin((1.0 - fraction) * angle) / safe)
    of_y = jnp.where(flat, fraction, jnp.sin(fraction * angle) / safe)
    return of_x[:, None, None, None] * x + of_y[:, None, None, None] * y


# ---- by name ---------------------------------------------------------------------------------------


def make(
    chain: Schedule,
    sampler: str,
    *,
    eta: float | str = 0.0,
    order: int = 2,
    singlestep: bool = False,
    variance: str | np.ndarray = "fixed_large",
    clip_x0: bool | str = True,
    keep: Sequence[int] | None = None,
) -> Callable:
    """run(denoise_fn, x_T [B, H, W, C], keys [B]) -> x_0, or (x_0, Trajectory) with `keep`.

    Args:
      sampler: one of `SAMPLERS`; of eta, order, singlestep and variance only its own are used.

    Raises:
      ValueError: an option that the sampler cannot have.
    """
    check_clip(clip_x0)
    shared = {"clip_x0": clip_x0, "keep": keep}
    if sampler == "ancestral":
        return functools.partial(ancestral, chain, variance=variance, **shared)
    if sampler == "ddim":
        ddim_std(chain, eta)
        return functools.partial(ddim, chain, eta=eta, **shared)
    if sampler == "dpm_solver":
        dpm_solver_weights(chain, order, singlestep=singlestep)
        solver = functools.partial(dpm_solver, chain, order=order, singlestep=singlestep, **shared)
    else:
        check_heun(chain)
        solver = functools.partial(heun, chain, **shared)
    return lambda denoise_fn, x_T, keys: solver(denoise_fn, x_T)
