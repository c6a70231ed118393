"""Random changes of training images, each a function of the key of its example: the fields flip and shift of config.data."""

from __future__ import annotations

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ddpm_jax.data import check_image_shape
from ddpm_jax.options import AtLeast, bind, errors_at

FIELDS = ("flip", "shift")  # the options of `augmented`


def augmented(
    keys: Key[Array, " B"],
    images: Array,
    *,
    flip: Annotated[bool, "Mirrors training images left to right with probability 1/2."] = False,
    shift: Annotated[
        int, "Moves training images by up to this many pixels in each direction.", AtLeast(0)
    ] = 0,
) -> Array:
    """Images [B, H, W, C], mirrored and moved at random."""
    images = mirror_at_random(keys, images) if flip else images
    return shift_at_random(keys, images, shift) if shift else images


def mirror_at_random(keys: Key[Array, " B"], images: Array) -> Array:
    """Mirrors each image [B, H, W, C] left to right with probability ½."""
    mirror = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)


def shift_at_random(keys: Key[Array, " B"], images: Array, pixels: int) -> Array:
    """Moves each image [B, H, W, C] by up to `pixels` in each direction; its reflection fills the border."""

    def draw(key):  # another number than that of `mirror_at_random`, from the same key
        return jax.random.randint(jax.random.fold_in(key, 1), (2,), -pixels, pixels + 1)

    def move(image, by):
        return image[_moved(image.shape[0], by[0])][:, _moved(image.shape[1], by[1])]

    return jax.vmap(move)(images, jax.vmap(draw)(keys))


def _moved(size: int, by: Array) -> Array:
    """The positions that an axis shows after a move by `by`, reflected at both ends."""
    last = size - 1
    return last - jnp.abs(last - jnp.abs(jnp.arange(size) - by))


def of(section: Any) -> dict[str, Any]:
    """The options of `augmented` in a config's section data.

    Raises:
      ConfigError: one of a wrong type, or a shift that is too large for the image_shape.
    """
    values = {name: section[name] for name in FIELDS if section.get(name) is not None}
    values = bind(augmented, values, "config.data", given=("keys", "images"))
    if section.get("image_shape") is not None:
        with errors_at("config.data"):
            check(check_image_shape(section.image_shape), **values)
    return values


def check(image_shape: tuple[int, int, int], *, flip: bool = False, shift: int = 0) -> None:
    """Raises ValueError for a shift by a whole side of the images (H, W, C) or more."""
    del flip
    if not 0 <= shift < min(image_shape[:2]):
        raise ValueError(
            f"shift must lie in 0 … {min(image_shape[:2]) - 1} for images"
            f" {image_shape[0]}×{image_shape[1]}, got {shift}"
        )


def describe(section: Any) -> list[str]:
    """A line for each change in a config's section data."""
    lines = []
    if section.get("flip"):
        mirrored = "training images are mirrored left to right with probability 1/2"
        lines.append(f"{mirrored} (config.data.flip)")
    if shift := section.get("shift"):
        lines.append(f"training images are moved by up to {shift} pixels (config.data.shift)")
    return lines
