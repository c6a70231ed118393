"""What a trained model makes of given images: encode, reconstruct, interpolate, denoise, fill in, compare.

    python -m ddpm_jax.main --mode=reconstruct --workdir=runs/digits --steps=10,20,50
    python -m ddpm_jax.main --mode=encode --workdir=runs/digits --images=/path/to/pictures
    python -m ddpm_jax.main --mode=interpolate --workdir=runs/digits
    python -m ddpm_jax.main --mode=interpolate --workdir=runs/digits --from_t=250,500,750
    python -m ddpm_jax.main --mode=denoise --workdir=runs/digits --from_t=250,500
    python -m ddpm_jax.main --mode=inpaint --workdir=runs/digits --mask=left
    python -m ddpm_jax.main --mode=nearest --workdir=runs/digits --num_samples=8

Images are of a split of the run's data, of a folder (resized and cropped) or of an .npz, chosen by one fixed
permutation (`data.choose`): the first ones of a sorted folder would all be of one class.
Each command writes an .npz with what it made, what it was made of and the recipe, and a picture as .png.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import data, diffusion, runs, sample, samplers, schedules, training, writers
from ddpm_jax.ddpm import all_options, fold_in_each, labels_of

PAIRED = 8  # images between which is interpolated by default
FRACTIONS = 9  # images in a row of an interpolation, both ends included
MASKS = ("centre", "left", "right", "top", "bottom")
BLOCK = 4096  # training images that are compared at once


class Given(NamedTuple):
    """Images to begin with."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]
    index: np.ndarray  # int64 [N], their positions in the split, folder or file
    recipe: dict  # where they come from, and a digest


def load_images(
    run: runs.Run,
    images: str,
    *,
    num_images: int | None,
    default: int,
    split: str | None = None,
    data_dir: str | None = None,
    labels: str | None = None,
    key=None,
) -> Given:
    """Images of "data" (the run's own), of a folder of pictures or of an .npz, chosen by `data.choose`.

    Args:
      images: "data" or a path.
      num_images: how many; None for `default`, or all if there are fewer.
      split, data_dir: of the run's data; the default split is "test".
      labels: see `labels_of`; None for those that the images have.
      key: for labels="random".

    Raises:
      DataError, ConfigError, RunError: one line that says what to do.
    """
    if images == "data":
        dataset = runs.data_of(run, split or "test", data_dir)
    elif split or data_dir:
        raise runs.RunError(
            f"--split and --data_dir are of the run's data, not of --images={images}"
        )
    else:
        dataset = runs.load_images(run, images)
    num_images = min(default, len(dataset)) if num_images is None else num_images
    if num_images > len(dataset):
        raise runs.RunError(
            f"{num_images} images asked of the {len(dataset)} in {dataset.name}/{dataset.split};"
            " ask for fewer"
        )
    rows = data.choose(len(dataset), num_images)
    rows = np.sort(rows) if num_images == len(dataset) else rows  # all of them: in their own order
    pixels = dataset.fetch(rows)
    if labels is not None or not run.method.num_classes:
        key = training.make_keys(0).sample if key is None else key
        labels = runs.class_numbers(run, labels or "cycle")
        with config_lib.errors_at("--labels"):
            chosen = labels_of(run.method, np.arange(num_images), labels, key=key)
    elif dataset.num_classes == run.method.num_classes and (dataset.labels[rows] >= 0).all():
        runs.check_classes(run.method, dataset)
        chosen = dataset.labels[rows]
    else:
        raise runs.RunError(
            f"the model has {run.method.num_classes} classes and the images of"
            f" {dataset.name}/{dataset.split} have no such labels; give --labels=3, or one for each image"
            " as in --labels=3,5,7, or choose a split that has labels, such as --split=train"
        )
    digest = hashlib.sha256(pixels.tobytes() + chosen.tobytes()).hexdigest()
    recipe = {"images": dataset.name, "split": dataset.split, "images_sha256": digest}
    order = "all" if num_images == len(dataset) else runs.CHOSEN
    return Given(pixels, chosen, rows, recipe | {"num_images": num_images, "chosen": order})


# ---- there and back --------------------------------------------------------------------------------


def encode(
    workdir: str,
    *,
    images: str = "data",
    num_images: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    labels: str | None = None,
    weights: str = "ema",
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> str:
    """Writes the latent x_T of each image, float32 [N, H, W, C] as `latents`; see `samplers.encode`.

    `sample(workdir, latents=PATH)` is the way back.

    Args:
      images, num_images, split, data_dir, labels: see `load_images`.
      options: of the Method's make_encode; 50 steps unless told.

    Returns:
      the path of the .npz.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    run, model = _load(workdir, weights)
    options = _few_steps(model) | runs.given(options)
    encoder = config_lib.call("encoding", model.make_encode, options)
    which = {"num_images": num_images, "split": split, "data_dir": data_dir, "labels": labels}
    given = load_images(run, images, default=64, **which)
    which["num_images"] = num_images = len(given.images)

    def function(params, key, image, label):
        return encoder(params, label, diffusion.from_uint8(image))

    def make():
        examples = (given.images, given.labels)
        latents = runs.map_images(run, function, None, *examples, batch_size=batch_size)
        runs.check_finite(np.isfinite(latents).all(axis=(1, 2, 3)), options)
        return {"latents": latents, "images": given.images, **_origin(given)}

    recipe = given.recipe | all_options(model.make_encode, options)
    chain = {"spacing": options.get("spacing")}
    chain = schedules.shorten(model.schedule, options["steps"], **chain)
    recipe["last"] = int(chain.timesteps[-1])  # the time of the latents
    out, arrays = _write(run, "encode", recipe, make, out, images=images, **which, **options)
    latents = arrays["latents"]
    look = diffusion.to_uint8(latents / 3)  # three standard deviations fill the range
    shown = _shown(num_images)
    rows = [("images", given.images[shown]), ("their x_T, from -3 to 3", np.asarray(look)[shown])]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=min(8, num_images))
    print(
        f"x_T of {num_images} images: mean {latents.mean():.4f}, standard deviation"
        f" {latents.std():.4f}; {out}, a picture in the .png beside it",
        flush=True,
    )
    return out


def reconstruct(
    workdir: str,
    *,
    steps=None,
    images: str = "data",
    num_images: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    labels: str | None = None,
    weights: str = "ema",
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> dict[int | str, tuple[float, float]]:
    """Encodes and decodes images in S steps, for several S; prints Song et al. 2021, Table 2.

    Args:
      steps: the numbers S, as a list or as text with commas; 10, 20, 50 and 100 by default. With
        semicolons between them, chains in any notation of `schedules.subsequence`: "10,15,20;45".
      images, num_images, split, data_dir, labels: see `load_images`.
      options: of the Method's make_encode, for both ways.

    Returns:
      {S: (mean squared error of a pixel on the scale 0 … 1, its standard error over images)}, where S is an
      int, or the text of another chain.

    Raises: as `encode`.
    """
    run, model = _load(workdir, weights)
    counts = [S for S in (10, 20, 50, 100) if len(model.schedule) >= S]
    if isinstance(steps, str) and ";" in steps:
        parts = steps.replace(" ", "").strip(";").split(";")
        counts = [int(S) if S.isdecimal() else S for S in parts]
    elif steps is not None:
        counts = _numbers("steps", steps)
    options = runs.given(options)
    pairs = {}
    for S in counts:  # whatever can be refused is, before anything is computed
        there = config_lib.call("reconstruction", model.make_encode, options | {"steps": str(S)})
        back = options | {"steps": str(S), "sampler": "ddim"}
        pairs[S] = there, config_lib.call("reconstruction", run.method.make_sample, back)
    which = {"num_images": num_images, "split": split, "data_dir": data_dir, "labels": labels}
    given = load_images(run, images, default=64, **which)
    which["num_images"] = num_images = len(given.images)
    index = np.arange(num_images)

    def make():
        arrays = {"images": given.images, **_origin(given)}
        for S, (there, back) in pairs.items():

            def function(params, key, index, label, image, there=there, back=back):
                x_0 = diffusion.from_uint8(image)
                x = back(params, key, index, label, there(params, label, x_0))
                return runs.drawn(x), ((x - x_0) ** 2).mean(axis=(1, 2, 3)) / 4

            print(f"S = {S}", flush=True)
            key, examples = training.make_keys(0).sample, (index, given.labels, given.images)
            how = {"batch_size": batch_size, "options": options}
            result = runs.map_images(run, function, key, *examples, **how)
            arrays[f"images_{S}"], arrays[f"error_{S}"] = result
        return arrays

    recipe = given.recipe | all_options(model.make_encode, options) | {"steps": counts}
    name = {"images": images, **which, **options, "steps": counts}
    out, arrays = _write(run, "reconstruct", recipe, make, out, **name)
    shown = _shown(num_images)
    rows = [("images", given.images[shown])]
    rows += [(f"encoded and decoded, S = {S}", arrays[f"images_{S}"][shown]) for S in counts]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=min(8, num_images))
    errors = {}
    for S in counts:
        values = arrays[f"error_{S}"].astype(np.float64)
        spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        errors[S] = float(values.mean()), float(spread)
    print(f"| S | {' | '.join(map(str, counts))} |\n|---|{'---|' * len(counts)}")
    print(
        f"| error | {' | '.join(f'{mean:.2g} ± {spread:.1g}' for mean, spread in errors.values())} |"
    )
    print(
        f"mean squared error of a pixel on the scale 0 … 1, {num_images} images of"
        f" {given.recipe['images']}/{given.recipe['split']}, ± is the standard error over images\n{out}",
        flush=True,
    )
    return errors


# ---- between two images ----------------------------------------------------------------------------


def interpolate(
    workdir: str,
    *,
    images: str | None = None,
    num_images: int | None = None,
    from_t=None,
    split: str | None = None,
    data_dir: str | None = None,
    labels: str | None = None,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> str:
    """Draws what lies between the images 2k and 2k + 1: a row of `FRACTIONS` for each pair.

    Without `from_t` along the great circle between their latents, decoded by a deterministic sampler (Song
    et al. 2021, App. D.5). With `from_t`, noise is added up to that time, the two are mixed linearly, and
    the chain is run from there (Ho et al. 2020 §4.4); of a row all noise is the same.

    Args:
      images: "data", or a path; None for latents out of noise, or "data" if from_t is given. See
        `load_images` for these and num_images (an even number), split, data_dir and labels.
      from_t: times of the chain, as a list or as text with commas; a row for each and pair.
      options: of the Method's make_sample. Unless told, DDIM in 50 steps without from_t, and the whole
        ancestral chain with it.

    Returns:
      the path of the .npz: images uint8 [N/2, R, FRACTIONS, H, W, C] for R times, or 1.

    Raises: as `encode`.
    """
    run, model = _load(workdir, weights)
    key = _sample_key(seed)
    if num_images is not None and (num_images < 2 or num_images % 2):
        raise runs.RunError(f"interpolation is between pairs of images; num_images is {num_images}")
    options = runs.given(options)
    if from_t is None:
        options = {"sampler": "ddim"} | _few_steps(model) | options
        draw = config_lib.call("interpolation", run.method.make_sample, options)
        if options["sampler"] == "ancestral" or options.get("eta", 0) != 0:
            raise runs.RunError(
                "interpolation without --from_t follows latents, which needs a deterministic sampler:"
                " ddim with eta 0, dpm_solver or heun"
            )
        times, draws = [None], [draw]
        shared = ("steps", "spacing", "clip_x0", "guidance")
        of_encoder = {name: options[name] for name in shared if name in options}
        encoder = config_lib.call("interpolation", model.make_encode, of_encoder)
    else:
        images, times = images or "data", _numbers("from_t", from_t)
        draws = [
            config_lib.call("interpolation", run.method.make_sample, options | {"from_t": t})
            for t in times
        ]
    if images is None:
        num_images = num_images or PAIRED
        index, labels = np.arange(num_images), runs.class_numbers(run, labels or "cycle")
        with config_lib.errors_at("--labels"):
            chosen = labels_of(run.method, index, labels, key=key)
        nothing = np.zeros((num_images, *run.method.image_shape), np.uint8)
        given = Given(nothing, chosen, index, {})
    else:
        which = {"num_images": num_images, "split": split, "data_dir": data_dir, "labels": labels}
        given = load_images(run, images, key=key, default=PAIRED, **which)
        pairs = len(given.images) // 2
        if not pairs:
            raise runs.RunError(f"interpolation needs two images, and {images} has one")
        pixels, chosen, rows = (values[: 2 * pairs] for values in given[:3])
        given = Given(pixels, chosen, rows, given.recipe)
        which["num_images"] = num_images = 2 * pairs

    def ends(t):
        """Each image at time t, or its latent: [N, H, W, C]."""

        def function(params, key, index, label, image):
            x_0 = diffusion.from_uint8(image)
            eps = samplers.prior(fold_in_each(key, index), x_0.shape[1:])
            if t is not None:
                return diffusion.q_sample(model.schedule, x_0, t, eps)
            return eps if images is None else encoder(params, label, x_0)

        examples = (np.arange(num_images), given.labels, given.images)
        return runs.map_images(run, function, key, *examples, batch_size=batch_size)

    def row(t, draw):
        def function(params, key, index, label, x, y, fraction):
            if t is None:
                mixed = samplers.slerp(x, y, fraction)
            else:
                mixed = x + fraction[:, None, None, None] * (y - x)
            return runs.drawn(draw(params, key, index, label, mixed))

        return function

    pair = np.repeat(np.arange(num_images // 2), FRACTIONS)
    fraction = np.tile(np.linspace(0, 1, FRACTIONS, dtype=np.float32), num_images // 2)
    nearer = np.where(fraction < 0.5, 2 * pair, 2 * pair + 1)  # a label cannot be mixed

    def make():
        rows = []
        for t, draw in zip(times, draws, strict=True):
            x = ends(t)
            examples = (2 * pair, given.labels[nearer], x[2 * pair], x[2 * pair + 1], fraction)
            how = {"batch_size": batch_size, "options": options}
            made = runs.map_images(run, row(t, draw), key, *examples, **how)
            rows.append(made.reshape(num_images // 2, FRACTIONS, *run.method.image_shape))
        return {"images": np.stack(rows, axis=1), "ends": given.images, **_origin(given)}

    recipe = given.recipe | {
        "seed": seed,
        "num_images": num_images,
        "labels": labels,
        "from_t": times,
    }
    recipe |= run.method.sample_options(**options) | {"from_t": times}
    which = {"num_images": num_images, "labels": labels} if images is None else which
    name = {"images": images, **which, **options, "from_t": from_t and times}
    out, arrays = _write(run, "interpolate", recipe, make, out, f"seed{seed}", **name)
    rows = []
    for n, t in enumerate(times):
        how = "between their latents" if t is None else f"mixed with the noise of t = {t}"
        for k in range(num_images // 2):
            strip, text = arrays["images"][k, n], f"pair {k}, {how}"
            if images is not None:  # between what they are images of
                first, second = given.images[2 * k : 2 * k + 1], given.images[2 * k + 1 : 2 * k + 2]
                strip = np.concatenate([first, strip, second])
                text += "; the images themselves are at both ends"
            rows.append((text, strip))
    writers.save_grids(f"{out[:-4]}.png", rows, columns=len(rows[0][1]))
    print(f"{num_images // 2} interpolations in {out}, a picture in the .png beside it", flush=True)
    return out


# ---- repairs ---------------------------------------------------------------------------------------


def denoise(
    workdir: str,
    *,
    from_t,
    images: str = "data",
    num_images: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    labels: str | None = None,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> str:
    """Adds noise to images up to a time and takes it away again: what is lost there is made anew.

    Args:
      from_t: times of the chain, as a list or as text with commas; each is tried, with the same noise.
      images, num_images, split, data_dir, labels: see `load_images`.
      options: of the Method's make_sample.

    Returns:
      the path of the .npz: images uint8 [N, R, H, W, C] for R times, the noisy ones as x_t.

    Raises: as `encode`.
    """
    run, model = _load(workdir, weights)
    key, options = _sample_key(seed), runs.given(options)
    times = _numbers("from_t", from_t)
    draws = [
        config_lib.call("denoising", run.method.make_sample, options | {"from_t": t}) for t in times
    ]
    which = {"num_images": num_images, "split": split, "data_dir": data_dir, "labels": labels}
    given = load_images(run, images, key=key, default=8, **which)
    which["num_images"] = num_images = len(given.images)
    examples = (np.arange(num_images), given.labels, given.images)

    def make():
        rows = []
        for t, draw in zip(times, draws, strict=True):

            def function(params, key, index, label, image, t=t, draw=draw):
                x_0 = diffusion.from_uint8(image)
                eps = samplers.prior(fold_in_each(key, index), x_0.shape[1:])
                x_t = diffusion.q_sample(model.schedule, x_0, t, eps)
                x = draw(params, key, index, label, x_t)
                return diffusion.to_uint8(x_t), runs.drawn(x)

            how = {"batch_size": batch_size, "options": options}
            rows.append(runs.map_images(run, function, key, *examples, **how))
        x_t, made = (np.stack(parts, axis=1) for parts in zip(*rows, strict=True))
        return {"images": made, "x_t": x_t, "originals": given.images, **_origin(given)}

    recipe = given.recipe | {"seed": seed} | run.method.sample_options(**options)
    recipe |= {"from_t": times}
    name = {"images": images, **which, **options, "from_t": times}
    out, arrays = _write(run, "denoise", recipe, make, out, f"seed{seed}", **name)
    shown = _shown(num_images)
    rows = [("images", given.images[shown])]
    for n, t in enumerate(times):
        rows += [(f"with the noise of t = {t}", arrays["x_t"][shown, n])]
        rows += [(f"denoised from t = {t}", arrays["images"][shown, n])]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=min(8, num_images))
    print(f"{num_images} images in {out}, a picture in the .png beside it", flush=True)
    return out


def inpaint(
    workdir: str,
    *,
    mask: str = "centre",
    images: str = "data",
    num_images: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    labels: str | None = None,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> str:
    """Fills in a part of images, the rest of which is kept to the bit; see `samplers.inpaint`.

    Args:
      mask: a picture whose white is to be filled in, or one of `MASKS` for that part of the image.
      images, num_images, split, data_dir, labels: see `load_images`.
      options: of the Method's make_inpaint, such as steps=250, resample=10 and jump=10.

    Returns:
      the path of the .npz: images uint8 [N, H, W, C], originals, and the mask uint8 [H, W], 255 where
      the image was filled in.

    Raises: as `encode`.
    """
    run, model = _load(workdir, weights)
    key, options = _sample_key(seed), runs.given(options)
    chosen, said = runs.with_errors(run, options)
    fill = config_lib.call("inpainting", model.make_inpaint, chosen)
    hole = load_mask(mask, run.method.image_shape)
    which = {"num_images": num_images, "split": split, "data_dir": data_dir, "labels": labels}
    given = load_images(run, images, key=key, default=8, **which)
    which["num_images"] = num_images = len(given.images)
    known = np.broadcast_to(1.0 - hole[None, :, :, None], (num_images, *hole.shape, 1))

    def function(params, key, index, label, image, known):
        x = fill(params, key, index, label, diffusion.from_uint8(image), known.astype(np.float32))
        return runs.drawn(x)

    def make():
        examples = (np.arange(num_images), given.labels, given.images, known)
        how = {"batch_size": batch_size, "options": options}
        made = runs.map_images(run, function, key, *examples, **how)
        return {
            "images": made,
            "originals": given.images,
            **_origin(given),
            "mask": 255 * hole.astype(np.uint8),
        }

    recipe = given.recipe | {"seed": seed} | all_options(model.make_inpaint, said)
    recipe |= {"mask_sha256": hashlib.sha256(hole.tobytes()).hexdigest()}
    name = {"mask": os.path.basename(mask), "images": images, **which, **options}
    out, arrays = _write(run, "inpaint", recipe, make, out, f"seed{seed}", **name)
    hidden = np.where(hole[None, :, :, None], np.uint8(128), given.images)
    shown = _shown(num_images)
    rows = [("images", given.images[shown]), ("what is kept of them", hidden[shown])]
    rows += [("filled in", arrays["images"][shown])]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=min(8, num_images))
    print(f"{num_images} images in {out}, a picture in the .png beside it", flush=True)
    return out


def load_mask(mask: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """bool [H, W], True where an image is to be filled in: one of `MASKS`, or the white of a picture.

    Raises:
      DataError, RunError: no such mask, or one that leaves nothing to fill in or nothing to go by.
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
        raise runs.RunError(
            f"there is no mask {mask!r}{config_lib.nearest(mask, MASKS)} (a picture whose white is to be"
            f" filled in, or {', '.join(MASKS)})"
        )
    if not hole.any() or hole.all():
        raise runs.RunError(
            f"the mask {mask!r} is {'all' if hole.all() else 'without'} white; white is filled in, black"
            " is kept, and both must be there"
        )
    return hole


# ---- memory ----------------------------------------------------------------------------------------


def nearest(
    workdir: str,
    *,
    images: str | None = None,
    num_samples: int | None = None,
    neighbours: int = 7,
    data_dir: str | None = None,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> str:
    """Shows samples beside the training images nearest to them: has the model memorised them?

    Near is a small root mean square difference of pixels. (Ho et al. 2020, App., show the same, for faces
    within a crop.) As a scale, the same is asked of as many test images, which the model has never seen.

    Args:
      images: a folder or .npz to ask for instead of samples.
      num_samples: how many; they are drawn as `sample.sample` does, with its options.
      neighbours: how many training images for each.

    Returns:
      the path of the .npz: images uint8 [N, H, W, C], neighbours uint8 [N, K, H, W, C], index int64 [N, K]
      in the training split, distance float32 [N, K] on the scale 0 … 255.

    Raises: as `encode`.
    """
    run, _ = _load(workdir, weights, of_diffusion=False)
    if out is not None:  # what can be refused is, before samples are drawn
        runs.out_path(out, ".npz", run.workdir)
    if images is not None and runs.given(options):
        raise runs.RunError(
            f"--{sorted(runs.given(options))[0]} is for samples, and --images={images} is given instead"
        )
    train = runs.data_of(run, "train", data_dir)
    if neighbours > len(train):
        raise runs.RunError(f"{neighbours} neighbours asked of {len(train)} training images")
    if images is None:
        num_samples = num_samples or 8
        drawn = {"weights": weights, "seed": seed, "batch_size": batch_size, **options}
        with np.load(sample.sample(workdir, num_samples=num_samples, **drawn)) as file:
            queries, origin = file["images"][:num_samples], json.loads(str(file["recipe"]))
            origin["workdir"] = ""  # a run may be moved
    else:
        labels = "cycle" if run.method.num_classes else None  # which does not matter here
        loaded = load_images(run, images, num_images=num_samples, default=8, labels=labels)
        queries, origin = loaded.images, loaded.recipe
        num_samples = len(queries)
    try:
        unseen = runs.data_of(run, "test", data_dir)
    except data.DataError as error:  # a folder without one
        unseen = None
        print(f"no test images to compare with: {str(error).partition(';')[0]}", flush=True)
    if unseen is not None:
        unseen = unseen.fetch(data.choose(len(unseen), len(queries)))

    def make():
        index, distance = nearest_of(queries, train, neighbours)
        result = {"images": queries, "index": index, "distance": distance}
        result["neighbours"] = train.fetch(index.ravel()).reshape(*index.shape, *queries.shape[1:])
        if unseen is not None:
            result["distance_of_test"] = nearest_of(unseen, train, 1)[1][:, 0]
        return result

    recipe = {"seed": seed, "of": origin, "data": train.name, "neighbours": neighbours}
    recipe |= {"num_samples": num_samples, "data_sha256": train.digest()}
    test = None if unseen is None else hashlib.sha256(unseen.tobytes()).hexdigest()
    recipe |= {"test_sha256": test}
    name = {"images": images, "num_samples": num_samples, "neighbours": neighbours}
    name |= runs.given(options)
    out, arrays = _write(run, "nearest", recipe, make, out, f"seed{seed}", **name)
    strip = np.concatenate([arrays["images"][:, None], arrays["neighbours"]], axis=1)[:20]
    what = "sample" if images is None else "image"
    title = f"first column: each {what}; then the {neighbours} training images nearest to it"
    rows = [(title, strip.reshape(-1, *queries.shape[1:]))]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=1 + neighbours)
    text = (
        f"distance to the nearest training image {np.mean(arrays['distance'][:, 0]):.2f} on average"
    )
    if "distance_of_test" in arrays:
        text += f", of test images {np.mean(arrays['distance_of_test']):.2f}"
    print(f"{text} (root mean square, 0 … 255)\n{out}, a picture in the .png beside it", flush=True)
    return out


def nearest_of(queries: np.ndarray, dataset: data.Dataset, count: int):
    """The `count` images of a data set nearest to each query, uint8 [N, H, W, C].

    Returns:
      index int64 [N, count], the nearest first; root mean square differences float32 [N, count].
    """
    flat = queries.reshape(len(queries), -1).astype(np.float64)
    index, squares = (np.zeros((len(flat), 0), kind) for kind in (np.int64, np.float64))
    for first in range(0, len(dataset), BLOCK):
        rows = np.arange(first, min(first + BLOCK, len(dataset)))
        others = dataset.fetch(rows).reshape(len(rows), -1).astype(np.float64)
        distance = (flat**2).sum(1)[:, None] - 2 * flat @ others.T + (others**2).sum(1)[None, :]
        index = np.concatenate([index, np.broadcast_to(rows, distance.shape)], axis=1)
        squares = np.concatenate([squares, distance], axis=1)
        order = np.argsort(squares, axis=1, kind="stable")[:, :count]
        index, squares = (np.take_along_axis(values, order, axis=1) for values in (index, squares))
    return index, np.sqrt(np.maximum(squares, 0) / flat.shape[1]).astype(np.float32)


# ---- what they share -------------------------------------------------------------------------------


def _load(workdir: str, weights: str, *, of_diffusion: bool = True):
    """The run, and its model as a diffusion."""
    run = runs.load(workdir, weights)
    if of_diffusion and run.method.diffusion is None:
        raise runs.RunError(
            f"{run.config.method} (config.method) is no diffusion: this needs one that can add noise"
        )
    return run, run.method.diffusion


def _few_steps(model) -> dict:
    return {"steps": str(min(50, len(model.schedule)))}


def _sample_key(seed: int):
    with config_lib.errors_at("--seed"):
        return training.make_keys(seed).sample


def _origin(given: Given) -> dict[str, np.ndarray]:
    """What an .npz says of the images that its results are made of."""
    return {"labels": given.labels, "index": given.index}


def _shown(count: int) -> np.ndarray:
    """Positions of the images, of `count`, that a picture shows: eight at most, of all parts of a sorted folder."""
    return np.sort(data.choose(count, 8))


def _numbers(name: str, value) -> list[int]:
    """Whole numbers from a list, or from text with commas."""
    try:
        parts = value.strip("[]").split(",") if isinstance(value, str) else np.ravel(value).tolist()
        numbers = [int(part) for part in parts]
        exact = all(float(part) == number for part, number in zip(parts, numbers, strict=True))
    except ValueError:
        exact = False
    if not (exact and numbers):
        raise runs.RunError(f"{name} is a list of whole numbers, such as 10,20,50; got {value!r}")
    return numbers


def _write(run, mode, recipe, make, out, *parts, **options):
    """The .npz of a command, made now unless it is there with the same recipe.

    Returns:
      its path, and its arrays.
    """
    named = out is not None
    if not named:
        options = {name: value for name, value in options.items() if name != "data_dir"}
        name = run.name(mode, *parts, **options)
        out = os.path.join(run.workdir, "samples", f"{name}.npz")
    out, recipe = runs.out_path(out, ".npz", run.workdir), run.recipe() | {"mode": mode} | recipe
    with runs.in_progress(out, recipe, named=named) as (_, finished):
        if finished:
            print("nothing new to compute: it is there with the same recipe", flush=True)
        arrays = finished or make()
        writers.save_npz(out, **arrays, recipe=json.dumps(recipe))
    return out, arrays
