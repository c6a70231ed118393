"""Image editing: denoising from an intermediate time, and inpainting.

python -m ddpm_jax.main --mode=denoise --workdir=runs/digits --from_t=250,500
python -m ddpm_jax.main --mode=inpaint --workdir=runs/digits --mask=left
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import Annotated

import numpy as np

from ddpm_jax import data, options
from ddpm_jax.commands import analytic, shared
from ddpm_jax.commands.shared import Images, Output, Seed
from ddpm_jax.ddpm import Chain, Sampling
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.method import fold_in_each
from ddpm_jax.names import nearest
from ddpm_jax.options import AtLeast
from ddpm_jax.process import diffusion
from ddpm_jax.process.diffusion import from_uint8, to_uint8
from ddpm_jax.process.samplers import repaint

MASKS = ("centre", "left", "right", "top", "bottom")


def denoise(
    run: Run,
    *,
    from_t: Annotated[
        shared.Times, "The time up to which noise is added, or several times, such as 250,500,750."
    ],
    sampling: Sampling = Sampling(),
    images: Images = Images(),
    seed: Seed = 0,
    output: Output = Output(),
) -> str:
    """Adds noise to images up to a time t, and denoises them again; details lost at t are generated anew.

    Args:
      from_t: times of the chain; all of them use the same noise.

    Returns:
      the path of the .npz: images uint8 [N, R, H, W, C] for R times, and the noisy images x_t of the same shape.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    model, key = shared.diffusion_of(run), shared.sample_key(seed)
    times, chosen = shared.numbers("from_t", from_t), model.resolve(sampling)
    for t in times:
        with options.errors_at("denoising"):
            model.chain(chosen, from_t=t)
    loaded = shared.load_images(run, images, key=key, default=8)
    images = dataclasses.replace(images, num_images=len(loaded.images))
    examples = (np.arange(len(loaded.images)), loaded.labels, loaded.images)

    def from_time(t, kept):
        def function(params, key, index, label, image):
            x_0 = from_uint8(image)
            eps = diffusion.noise(fold_in_each(key, index), diffusion.PRIOR_STREAM, x_0.shape[1:])
            x_t = diffusion.q_sample(model.schedule, x_0, t, eps)
            x = model.sample(params, key, index, label, chosen, x_T=x_t, from_t=t)
            return to_uint8(x_t), shared.as_saved(x)

        return shared.map_images(
            run,
            function,
            key,
            *examples,
            batch_size=output.batch_size,
            settings=options.describe(chosen),
            kept=kept,
        )

    def make(folder):
        paths = (os.path.join(folder, f"time_{n}") for n in range(len(times)))
        noisy, made = zip(*map(from_time, times, paths), strict=True)
        arrays = {"images": np.stack(made, axis=1), "x_t": np.stack(noisy, axis=1)}
        return arrays | {"originals": loaded.images, **loaded.origin()}

    recipe = loaded.recipe | {"seed": seed} | options.describe(chosen) | {"from_t": times}
    settings = images.named() | options.changed(sampling) | {"from_t": times}
    name = run.name("denoise", f"seed{seed}", settings=settings)
    out, arrays = shared.write(run, "denoise", recipe, make, output, name)
    shown = shared.shown(len(loaded.images))
    rows = [("images", loaded.images[shown])]
    for n, t in enumerate(times):
        rows += [(f"with the noise of t = {t}", arrays["x_t"][shown, n])]
        rows += [(f"denoised from t = {t}", arrays["images"][shown, n])]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=len(shown))
    print(f"{len(loaded.images)} images in {out}, a picture in the .png beside it", flush=True)
    return out


def inpaint(
    run: Run,
    *,
    mask: Annotated[
        str,
        f"The part to fill in: {', '.join(MASKS)}, or a picture file whose white part is filled in.",
    ] = "centre",
    chain: Chain = Chain(),
    variance: Annotated[
        str | None, "The variance of the reverse chain. Default: as in the config."
    ] = None,
    resample: Annotated[int, "How many times each part of the chain is run.", AtLeast(1)] = 10,
    jump: Annotated[
        int, "How many steps the chain goes back before it repeats a part.", AtLeast(1)
    ] = 10,
    images: Images = Images(),
    seed: Seed = 0,
    output: Output = Output(),
) -> str:
    """Fills in a part of images by RePaint (Lugmayr et al. 2022); the other pixels do not change.

    `repaint.inpaint` describes the algorithm.

    Returns:
      the path of the .npz: images uint8 [N, H, W, C], originals, and the mask uint8 [H, W], 255 where the image was
      filled in.

    Raises: as `denoise`.
    """
    model, key = shared.diffusion_of(run), shared.sample_key(seed)
    chosen = model.resolve(chain)
    errors, origin = analytic.errors_for(run, chain, variance)
    with options.errors_at("inpainting"):
        steps = model.chain(chosen)
        repaint.resampling(len(steps), resample=resample, jump=jump)
        reverse = model.reverse_variance(variance, steps, errors)
    hole = load_mask(mask, run.method.image_shape)
    loaded = shared.load_images(run, images, key=key, default=8)
    images = dataclasses.replace(images, num_images=len(loaded.images))
    known = np.broadcast_to(1.0 - hole[None, :, :, None], (len(loaded.images), *hole.shape, 1))

    def function(params, key, index, label, image, known):
        denoiser = model.denoiser(params, label, guidance=chosen.guidance, variance=reverse)
        images, keys = (from_uint8(image), known.astype(np.float32)), fold_in_each(key, index)
        clip = chosen.clip_x0
        return shared.as_saved(
            repaint.inpaint(
                steps, denoiser, *images, keys, resample=resample, jump=jump, clip_x0=clip
            )
        )

    walk = {"resample": resample, "jump": jump, "variance": variance or model.variance}

    def make(folder):
        examples = (np.arange(len(loaded.images)), loaded.labels, loaded.images, known)
        made = shared.map_images(
            run,
            function,
            key,
            *examples,
            batch_size=output.batch_size,
            settings=options.describe(chosen),
            kept=os.path.join(folder, "images"),
        )
        mask = 255 * hole.astype(np.uint8)
        return {"images": made, "originals": loaded.images, **loaded.origin(), "mask": mask}

    recipe = (
        loaded.recipe | {"seed": seed} | options.describe(chosen) | walk | {"x_0_error": origin}
    )
    recipe |= {"mask_sha256": hashlib.sha256(hole.tobytes()).hexdigest()}
    settings = {"mask": os.path.basename(mask), "variance": variance}
    settings |= {key: n for key, n in (("resample", resample), ("jump", jump)) if n != 10}
    settings |= images.named() | options.changed(chain)
    name = run.name("inpaint", f"seed{seed}", settings=settings)
    out, arrays = shared.write(run, "inpaint", recipe, make, output, name)
    hidden = np.where(hole[None, :, :, None], np.uint8(128), loaded.images)
    shown = shared.shown(len(loaded.images))
    rows = [
        ("images", loaded.images[shown]),
        ("what is kept; grey is filled in", hidden[shown]),
    ]
    rows += [("filled in", arrays["images"][shown])]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=len(shown))
    print(f"{len(loaded.images)} images in {out}, a picture in the .png beside it", flush=True)
    return out


def load_mask(mask: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """bool [H, W], True where an image is to be filled in: one of `MASKS`, or the white part of a picture file.

    Raises:
      DataError, RunError: there is no such mask, or it is white everywhere or nowhere.
    """
    height, width, _ = image_shape
    if mask in MASKS:
        y, x = np.mgrid[:height, :width]
        hole = {
            "centre": (abs(2 * y + 1 - height) < height / 2) & (abs(2 * x + 1 - width) < width / 2),
            "left": x < width // 2,
            "right": x >= width - width // 2,
            "top": y < height // 2,
            "bottom": y >= height - height // 2,
        }[mask]
    elif os.path.exists(config_lib.path(mask)):
        hole = data.picture(config_lib.path(mask), (height, width, 1))[:, :, 0] >= 128
    else:
        raise RunError(
            f"there is no mask {mask!r}{nearest(mask, MASKS)} (choose from {', '.join(MASKS)},"
            " or a picture file whose white part is filled in)"
        )
    if not hole.any() or hole.all():
        raise RunError(
            f"the mask {mask!r} {'is all' if hole.all() else 'has no'} white; white is filled in and black is"
            " kept, so a mask needs both"
        )
    return hole
