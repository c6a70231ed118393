"""The loop that all samplers share: a `lax.scan` that evaluates the network once per iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Num

from ddpm_jax.process import diffusion
from ddpm_jax.process.diffusion import Denoiser, Images
from ddpm_jax.process.schedules import Schedule

DYNAMIC_PERCENTILE = 99.5  # percentile of |x̂_0| in an image; Saharia et al. 2022 (Imagen)


class Trajectory(NamedTuple):
    """x_t and x̂_0 at K steps of a chain."""

    t: Num[Array, "B K"]  # the time of each step
    x_t: Float[Array, "B K H W C"]
    x_0: Float[Array, "B K H W C"]  # x̂_0(x_t), clipped if the sampler clips


def check_clip(how: bool | str) -> None:
    """Raises ValueError if `how` is not an argument of `clip`."""
    if how not in (True, False, "dynamic") and _most(how) is None:
        raise ValueError(
            f"clip_x0 must be true or false or dynamic, or such as dynamic:1.5; got {how!r}"
        )


def _most(how: bool | str) -> float | None:
    """The limit of "dynamic:LIMIT"."""
    kind, _, limit = str(how).partition(":")
    try:
        return float(limit) if kind == "dynamic" and float(limit) >= 1 else None
    except ValueError:
        return None


def clip(x_0: Images, how: bool | str) -> Images:
    """Clips x̂_0 to [−1, 1].

    Args:
      how: True clips at ±1, as in Ho et al.'s code. "dynamic" clips each image at ±s, with s the `DYNAMIC_PERCENTILE` of its
        |x̂_0| and at least 1, and divides it by s (Saharia et al. 2022 §2.3); "dynamic:1.5" has s ≤ 1.5. False does nothing.
    """
    check_clip(how)
    if isinstance(how, str):
        size = jnp.percentile(jnp.abs(x_0), DYNAMIC_PERCENTILE, axis=(1, 2, 3), keepdims=True)
        size = jnp.clip(size, 1.0, _most(how))
        return jnp.clip(x_0, -size, size) / size
    return jnp.clip(x_0, -1.0, 1.0) if how else x_0


def scan(
    chain: Schedule,
    denoiser: Denoiser,
    x: Images,
    step: Callable,
    *,
    clip_x0: bool | str = True,
    clipped_eps: bool = True,
    keep: Sequence[int] | None = None,
    rows: np.ndarray | None = None,
    carry=(),
):
    """Runs x, carry = step(k, t, x, denoised, carry) for k = 0, 1, … with t = rows[k].

    `denoised` is the model at x and t, with clipped x̂_0 and the ε̂ that belongs to it.

    Args:
      clipped_eps: False leaves ε̂ as the model gave it.
      rows: [K], the steps t of the chain at which the network is evaluated; by default all, from the last to the first.
      keep: steps to return as a Trajectory.
      carry: what a step passes to the next beside x, a tree of arrays.

    Returns:
      the last x; with `keep`, (x, Trajectory).
    """
    denoise_fn = denoiser(chain)
    rows = np.arange(len(chain))[::-1] if rows is None else rows
    kept = np.asarray([] if keep is None else keep, np.int32)
    table = np.full(len(chain), len(kept), np.int32)  # out of range: not kept
    table[kept] = np.arange(len(kept))
    position = jnp.asarray(table)

    def body(state, now):
        (x, carry, frames), (k, t) = state, now
        denoised = denoise_fn(x, t)
        if clip_x0:
            x_0 = clip(denoised.x_0, clip_x0)
            eps = diffusion.noise_of(chain, x_0, x, t) if clipped_eps else denoised.eps
            denoised = denoised._replace(x_0=x_0, eps=eps)
        frames = tuple(
            frame.at[:, position[t]].set(image, mode="drop")
            for frame, image in zip(frames, (x, denoised.x_0), strict=False)
        )
        x, carry = step(k, t, x, denoised, carry)
        return (x, carry, frames), None

    empty = jnp.zeros((x.shape[0], len(kept), *x.shape[1:]))
    frames = () if keep is None else (empty, empty)
    counted = (jnp.arange(len(rows)), jnp.asarray(rows))
    (x, _, frames), _ = jax.lax.scan(body, (x, carry, frames), counted)
    if keep is None:
        return x
    times = jnp.broadcast_to(jnp.asarray(chain.times)[kept], (x.shape[0], len(kept)))
    return x, Trajectory(times, *frames)


def flow(
    alpha: Float64[np.ndarray, " S"],
    sigma: Float64[np.ndarray, " S"],
    to_alpha: Float64[np.ndarray, " S"],
    to_sigma: Float64[np.ndarray, " S"],
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """The coefficients of x and ε̂ in an Euler step of the ODE from (α, σ) to others; Song et al. 2021 (13)."""
    from_x = np.divide(to_alpha, alpha, out=np.zeros_like(alpha), where=alpha > 0)  # α = 0: unused
    return from_x, to_sigma - from_x * sigma
