"""The one loop of all samplers: a `lax.scan` that evaluates the network once per iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from ddpm_jax.process import diffusion
from ddpm_jax.process.diffusion import Denoiser, Images
from ddpm_jax.process.schedules import Schedule

DYNAMIC_PERCENTILE = 99.5  # percentile of |x̂_0| in an image; Saharia et al. 2022 (Imagen)


class Trajectory(NamedTuple):
    """The chain at K of its steps."""

    t: Num[Array, "B K"]  # the time of each
    x_t: Float[Array, "B K H W C"]
    x_0: Float[Array, "B K H W C"]  # x̂_0(x_t), clipped if the sampler clips


def check_clip(how: bool | str) -> None:
    """Raises ValueError if `clip` does not know how."""
    if how not in (True, False, "dynamic"):
        raise ValueError(f"clip_x0 is True, False or 'dynamic', not {how!r}")


def clip(x_0: Images, how: bool | str) -> Images:
    """x̂_0 within [−1, 1] again.

    Args:
      how: True cuts off what lies beyond ±1 (Ho et al.'s code); "dynamic" cuts each image at the `DYNAMIC_PERCENTILE`
        of its |x̂_0| if that is above 1, and divides by it (Saharia et al. 2022 §2.3); False does nothing.
    """
    check_clip(how)
    if how == "dynamic":
        size = jnp.percentile(jnp.abs(x_0), DYNAMIC_PERCENTILE, axis=(1, 2, 3), keepdims=True)
        size = jnp.maximum(size, 1.0)
        return jnp.clip(x_0, -size, size) / size
    return jnp.clip(x_0, -1.0, 1.0) if how else x_0


def scan(
    chain: Schedule,
    denoiser: Denoiser,
    x: Images,
    step: Callable,
    *,
    clip_x0: bool | str = True,
    keep: Sequence[int] | None = None,
    rows: np.ndarray | None = None,
    carry=(),
):
    """Runs x, carry = step(k, i, x, denoised, carry) for k = 0, 1, … at the rows i = rows[k].

    x̂_0 is clipped before `step` sees it, and ε̂ is then derived anew, so that both describe the same x_t.

    Args:
      rows: int [K] rows of the chain at which the network is evaluated; None for all, from the last to the first.
      keep: rows of which x_t and x̂_0 are returned.
      carry: what a step passes to the next one beside x.

    Returns:
      the last x; with `keep`, (x, Trajectory).
    """
    denoise_fn = denoiser(chain)
    rows = np.arange(len(chain))[::-1] if rows is None else rows
    kept = np.asarray([] if keep is None else keep, np.int32)
    positions = np.full(len(chain), len(kept), np.int32)  # out of range: not kept
    positions[kept] = np.arange(len(kept))
    position = jnp.asarray(positions)

    def body(state, now):
        (x, carry, frames), (k, i) = state, now
        denoised = denoise_fn(x, i)
        if clip_x0:
            x_0 = clip(denoised.x_0, clip_x0)
            denoised = denoised._replace(x_0=x_0, eps=diffusion.noise_of(chain, x_0, x, i))
        frames = tuple(
            frame.at[:, position[i]].set(image, mode="drop")
            for frame, image in zip(frames, (x, denoised.x_0), strict=False)
        )
        x, carry = step(k, i, x, denoised, carry)
        return (x, carry, frames), None

    empty = jnp.zeros((x.shape[0], len(kept), *x.shape[1:]))
    frames = () if keep is None else (empty, empty)
    counted = (jnp.arange(len(rows)), jnp.asarray(rows))
    (x, _, frames), _ = jax.lax.scan(body, (x, carry, frames), counted)
    if keep is None:
        return x
    t = jnp.broadcast_to(jnp.asarray(chain.times)[kept], (x.shape[0], len(kept)))
    return x, Trajectory(t, *frames)


def flow(
    alpha: np.ndarray, sigma: np.ndarray, to_alpha: np.ndarray, to_sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The factors of x and ε̂ in a step of Song et al. 2021 (13) from levels [S] to others."""
    of_x = np.divide(to_alpha, alpha, out=np.zeros_like(alpha), where=alpha > 0)  # 0: never used
    return of_x, to_sigma - of_x * sigma
