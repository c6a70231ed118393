"""The previews of a training run as one animation.

    python -m ddpm_jax.main --mode=animate --workdir=runs/digits

It reads WORKDIR/samples/step_*.png only, so it can run during training and needs no device.
"""

from __future__ import annotations

import os
from typing import Annotated

import numpy as np
from PIL import Image

from ddpm_jax.files import animations, runs
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.run_data import RunError
from ddpm_jax.options import AtLeast

FRAMES = 240  # maximum number of previews in an animation
LARGEST = 1024  # maximum width and height in pixels; larger previews are made smaller


def animate(
    workdir: str,
    *,
    animation: Annotated[
        animations.Kinds,
        "The files to write: gif, mp4 (needs imageio-ffmpeg), or both with commas.",
    ] = ("gif",),
    seconds: Annotated[
        int,
        "The length of the animation; its last picture is shown for another second.",
        AtLeast(1),
    ] = 8,
) -> list[str]:
    """Writes the previews of a training run as one animation, previews.gif in the run directory.

    Returns:
      the paths of the files.

    Raises:
      ConfigError, RunError: a missing package, or no previews; one line.
    """
    animations.check(animation)
    workdir = os.path.abspath(config_lib.path(workdir))
    runs.refuse_links(workdir)
    found = list(animations.previews(workdir).values())
    if not found or not animation:
        what = (
            "no kind of file in --animation" if found else f"no previews in {workdir}/samples yet"
        )
        raise RunError(f"there is {what}; a preview is written every config.preview.every steps")
    chosen = np.unique(np.round(np.linspace(0, len(found) - 1, FRAMES)).astype(int))
    pictures = [_read(found[k]) for k in chosen]
    size = np.max([picture.shape[:2] for picture in pictures], axis=0)
    for k, picture in enumerate(pictures):  # config.preview may have changed between them
        rest = [(0, most - have) for most, have in zip(size, picture.shape[:2], strict=True)]
        pictures[k] = np.pad(picture, (*rest, (0, 0)), constant_values=255)
    path = os.path.join(workdir, "previews")
    files = animations.save(path, pictures, animation, seconds=float(seconds))
    print(f"{len(pictures)} of {len(found)} previews: {', '.join(files)}", flush=True)
    return files


def _read(path: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            result = picture.convert("RGB")
    except OSError as error:
        raise RunError(f"{path} cannot be read as a picture ({error}); move it away") from error
    result.thumbnail((LARGEST, LARGEST))
    return np.asarray(result)
