"""Animations: GIF by Pillow, MP4 by the ffmpeg that imageio-ffmpeg brings."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from ddpm_jax import extras
from ddpm_jax.files import writers

Kinds = tuple[Literal["gif", "mp4"], ...]
LAST_SECONDS = 1.0  # how long the last picture is shown


def check(kinds: Kinds) -> None:
    """Checks that animations of these kinds can be written.

    Raises:
      ConfigError: imageio-ffmpeg is not installed.
    """
    if "mp4" in kinds:
        extras.load("imageio_ffmpeg", "imageio-ffmpeg", "--animation=mp4")


def save(
    path: str, pictures: Sequence[np.ndarray], kinds: Kinds, *, seconds: float = 4.0
) -> list[str]:
    """Writes pictures uint8 [H, W, 3] as looping animations PATH.gif and PATH.mp4.

    Args:
      seconds: their length, without the last picture.

    Returns:
      the paths of the files.
    """
    each = max(0.02, seconds / len(pictures))
    writers.make_folder_of(path)
    write = {"gif": _write_gif, "mp4": _write_mp4}
    files = [f"{path}.{kind}" for kind in dict.fromkeys(kinds)]
    for file in files:
        kind = file.rpartition(".")[2]
        writers.replace(file, lambda temporary, kind=kind: write[kind](temporary, pictures, each))
    return files


def _write_gif(path: str, pictures: Sequence[np.ndarray], each: float) -> None:
    first, *others = map(Image.fromarray, pictures)
    durations = [*[round(1000 * each)] * len(others), round(1000 * LAST_SECONDS)]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


def _write_mp4(path: str, pictures: Sequence[np.ndarray], each: float) -> None:
    import imageio_ffmpeg

    pictures = [*pictures, *[pictures[-1]] * round(LAST_SECONDS / each)]
    height, width, _ = pictures[0].shape
    even = [(0, height % 2), (0, width % 2), (0, 0)]  # what the usual players need
    raw = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width + width % 2}x{height + height % 2}",
    ]
    words = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-y",
        "-loglevel",
        "error",
        *raw,
        "-r",
        f"{1 / each:.6g}",
    ]
    words += ["-i", "-", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", path]
    # Without imageio_ffmpeg.write_frames, which forks this process and its threads.
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with contextlib.suppress(BrokenPipeError):  # ffmpeg has said why
            for picture in pictures:
                process.stdin.write(np.pad(picture, even, constant_values=255).tobytes())
        _, errors = process.communicate()
    if process.returncode:
        line = (errors.decode(errors="replace").strip().splitlines() or ["ffmpeg failed"])[-1]
        raise OSError(f"ffmpeg says {line}")


def previews(workdir: str) -> dict[int, str]:
    """{step: path} of the previews of a training run, in the order of the steps."""
    folder, found = os.path.join(workdir, "samples"), {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if match := re.fullmatch(r"step_(\d+)\.png", name):
            found[int(match[1])] = os.path.join(folder, name)
    return dict(sorted(found.items()))
