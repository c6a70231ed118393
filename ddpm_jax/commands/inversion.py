"""Encoding, reconstruction and interpolation of images.

    python -m ddpm_jax.main --mode=reconstruct --workdir=runs/digits --steps=10,20,50
    python -m ddpm_jax.main --mode=encode --workdir=runs/digits --images=/path/to/pictures
    python -m ddpm_jax.main --mode=interpolate --workdir=runs/digits
    python -m ddpm_jax.main --mode=interpolate --workdir=runs/digits --from_t=250,500,750

Each command writes an .npz with its results, its input images and the recipe, and a picture as .png.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Annotated

import numpy as np

from ddpm_jax import options
from ddpm_jax.commands import shared
from ddpm_jax.commands.shared import Given, Images, Output, Seed
from ddpm_jax.ddpm import Chain, Sampling
from ddpm_jax.files import writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.method import fold_in_each
from ddpm_jax.process import diffusion
from ddpm_jax.process.diffusion import from_uint8, to_uint8
from ddpm_jax.process.samplers import DDIM, Ancestral, inversion
from ddpm_jax.stats import mean_and_error

PAIRED = 8  # default number of images to interpolate, two for each pair
FRACTIONS = 9  # images in a row of an interpolation, both ends included
FEW = 50  # default number of steps of a deterministic chain


def encode(
    run: Run,
    *,
    chain: Chain = Chain(steps="50"),
    images: Images = Images(),
    output: Output = Output(),
) -> str:
    """Encodes images to latents x_T, from which DDIM reconstructs them.

    The .npz holds `latents`, float32 [N, H, W, C]; `sample` with latents=PATH decodes them.

    Returns:
      the path of the .npz.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    model = shared.diffusion_of(run)
    chain = few_steps(model, chain)
    encoder, steps = make_encoder(model, chain, "encoding")
    loaded = shared.load_images(run, images, default=64)
    images = dataclasses.replace(images, num_images=len(loaded.images))
    chosen = options.describe(model.resolve(chain))

    def make(folder):
        latents = shared.map_images(
            run,
            lambda params, key, image, label: encoder(params, label, from_uint8(image)),
            None,
            *(loaded.images, loaded.labels),
            batch_size=output.batch_size,
            settings=chosen,
            kept=os.path.join(folder, "latents"),
        )
        shared.check_finite(np.isfinite(latents).all(axis=(1, 2, 3)), chosen)
        return {"latents": latents, "images": loaded.images, **loaded.origin()}

    recipe = loaded.recipe | chosen | {"last": steps.times[-1].item()}  # the time of the latents
    name = run.name("encode", settings=images.named() | options.changed(chain))
    out, arrays = shared.write(run, "encode", recipe, make, output, name)
    latents, shown = arrays["latents"], shared.shown(len(loaded.images))
    look = np.asarray(to_uint8(latents / 3))  # three standard deviations fill the range
    rows = [("images", loaded.images[shown]), ("their x_T, from -3 to 3", look[shown])]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=len(shown))
    print(
        f"x_T of {len(latents)} images: mean {latents.mean():.4f}, standard deviation"
        f" {latents.std():.4f}; {out}, and a picture in the .png of the same name",
        flush=True,
    )
    return out


def few_steps(model, chosen):
    """The options; the default number of steps is reduced if the chain has fewer."""
    if chosen.steps == str(FEW):
        return dataclasses.replace(chosen, steps=str(min(FEW, len(model.schedule))))
    return chosen


def make_encoder(model, chosen: Chain, where: str):
    """Checks the options and returns a function (params, label, x_0) -> x_T and its chain."""
    chosen = model.resolve(chosen)
    with options.errors_at(where):
        steps = model.chain(chosen)

    def encoder(params, label, x_0):
        denoiser = model.denoiser(params, label, guidance=chosen.guidance)
        return inversion.encode(steps, denoiser, x_0, clip_x0=chosen.clip_x0)

    return encoder, steps


def reconstruct(
    run: Run, *, chain: Chain = Chain(), images: Images = Images(), output: Output = Output()
) -> dict[int | str, tuple[float, float]]:
    """Encodes and decodes images, and prints the error for several numbers of steps; Song et al. 2021, Table 2.

    Args:
      chain: `steps` lists the numbers S with commas, by default 10, 20, 50 and 100. With semicolons it lists chains in
        the notations of `timesteps.subsequence`: "10,15,20;45" is two chains.

    Returns:
      {S: (mean squared error of a pixel on the scale 0 … 1, its standard error over images)}, where S is an int, or text
      that describes a chain.

    Raises: as `encode`.
    """
    model, steps = shared.diffusion_of(run), chain.steps
    counts = [S for S in (10, 20, 50, 100) if len(model.schedule) >= S]
    if isinstance(steps, str) and ";" in steps:
        parts = steps.replace(" ", "").strip(";").split(";")
        counts = [int(S) if S.isdecimal() else S for S in parts]
    elif steps is not None:
        counts = shared.numbers("steps", steps)
    pairs = {}
    for S in counts:  # check all options before anything is computed
        short = dataclasses.replace(chain, steps=str(S))
        encoder, _ = make_encoder(model, short, "reconstruction")
        pairs[S] = encoder, Sampling(sampler=DDIM(), **options.describe(model.resolve(short)))
    loaded = shared.load_images(run, images, default=64)
    images = dataclasses.replace(images, num_images=len(loaded.images))
    index = np.arange(len(loaded.images))
    chosen = options.describe(model.resolve(dataclasses.replace(chain, steps=None)))

    def encode_and_decode(S):
        encoder, decoding = pairs[S]

        def function(params, key, index, label, image):
            x_0 = from_uint8(image)
            x_T = encoder(params, label, x_0)
            x = model.sample(params, key, index, label, decoding, x_T=x_T)
            return shared.as_saved(x), ((x - x_0) ** 2).mean(axis=(1, 2, 3)) / 4

        return function

    def make(folder):
        arrays = {"images": loaded.images, **loaded.origin()}
        for n, S in enumerate(counts):
            print(f"S = {S}", flush=True)
            arrays[f"images_{S}"], arrays[f"error_{S}"] = shared.map_images(
                run,
                encode_and_decode(S),
                shared.sample_key(0),
                *(index, loaded.labels, loaded.images),
                batch_size=output.batch_size,
                settings=chosen,
                kept=os.path.join(folder, f"steps_{n}"),
            )
        return arrays

    recipe = loaded.recipe | chosen | {"steps": counts}
    settings = options.changed(chain) | {"steps": counts}
    name = run.name("reconstruct", settings=images.named() | settings)
    out, arrays = shared.write(run, "reconstruct", recipe, make, output, name)
    shown = shared.shown(len(loaded.images))
    rows = [("images", loaded.images[shown])]
    rows += [(f"encoded and decoded, S = {S}", arrays[f"images_{S}"][shown]) for S in counts]
    writers.save_grids(f"{out[:-4]}.png", rows, columns=len(shown))
    errors = {S: mean_and_error(arrays[f"error_{S}"]) for S in counts}
    errors = {S: (mean, spread or 0.0) for S, (mean, spread) in errors.items()}
    cells = (f"{mean:.2g} ± {spread:.1g}" for mean, spread in errors.values())
    print(
        f"| S | {' | '.join(map(str, counts))} |\n|---|{'---|' * len(counts)}\n"
        f"| error | {' | '.join(cells)} |\n"
        f"mean squared error of a pixel on the scale 0 … 1, {len(loaded.images)} images of"
        f" {loaded.recipe['images']}/{loaded.recipe['split']}, ± is the standard error over images\n{out}",
        flush=True,
    )
    return errors


FromT = Annotated[
    shared.Times | None,
    "The time up to which noise is added, or several times, such as 250,500,750. Default: no noise is"
    " added, and latents are interpolated.",
]


def interpolate(
    run: Run,
    *,
    sampling: Sampling = Sampling(sampler=None),
    images: Images = Images(images=None),
    from_t: FromT = None,
    seed: Seed = 0,
    output: Output = Output(),
) -> str:
    """Interpolates between the images 2k and 2k + 1, or between pairs of random latents.

    Without `from_t`, latents are interpolated along a great circle and decoded by a deterministic sampler (Song et al.
    2021, App. D.5). With `from_t`, noise is added to both images up to that time, they are mixed linearly, and the chain is
    run from that time (Ho et al. 2020 §4.4); both images and all their mixtures have the same noise.

    Args:
      sampling: the default is DDIM in 50 steps without `from_t`, and all steps of the ancestral sampler with it.
      images: if `images.images` is None, random latents are used, or with `from_t` the run's data. `num_images` must be
        even.
      from_t: times of the chain; the picture has a row for each pair and time.

    Returns:
      the path of the .npz: images uint8 [N/2, R, `FRACTIONS`, H, W, C] for R times; R = 1 without `from_t`.

    Raises: as `encode`.
    """
    work = _Interpolation.plan(run, sampling, images, from_t, seed)
    recipe = work.loaded.recipe | {"seed": seed, "num_images": work.count, "labels": images.labels}
    recipe |= options.describe(run.method.resolve(work.sampling)) | {"from_t": work.times}
    settings = options.changed(work.sampling) | {"from_t": from_t and work.times}
    if work.random_latents:
        settings |= {"num_images": work.count, "labels": images.labels}
    else:
        settings |= work.images.named()
    name = run.name("interpolate", f"seed{seed}", settings=settings)
    out, arrays = shared.write(
        run, "interpolate", recipe, functools.partial(work.make, output.batch_size), output, name
    )
    rows = []
    for n, t in enumerate(work.times):
        how = "interpolated latents" if t is None else f"mixed with noise up to t = {t}"
        for k in range(work.count // 2):
            strip, text = arrays["images"][k, n], f"pair {k}, {how}"
            if not work.random_latents:  # put the images themselves at both ends
                pair = work.loaded.images[2 * k : 2 * k + 2]
                strip = np.concatenate([pair[:1], strip, pair[1:]])
                text += "; the images themselves are at both ends"
            rows.append((text, strip))
    writers.save_grids(f"{out[:-4]}.png", rows, columns=len(rows[0][1]))
    count = work.count // 2
    print(
        f"{count} interpolations in {out}, and a picture in the .png of the same name", flush=True
    )
    return out


@dataclasses.dataclass(frozen=True)
class _Interpolation:
    """A checked request for interpolations."""

    run: Run
    sampling: Sampling
    images: Images
    times: list  # times of the chain, or [None] for latents
    loaded: Given
    key: object
    random_latents: bool  # whether the latents are random

    @property
    def count(self) -> int:
        return len(self.loaded.images)

    @classmethod
    def plan(cls, run, sampling, images, from_t, seed) -> _Interpolation:
        model, key = shared.diffusion_of(run), shared.sample_key(seed)
        count = images.num_images
        if count is not None and count % 2:
            raise RunError(f"interpolation needs pairs of images, but --num_images={count} is odd")
        times = [None] if from_t is None else shared.numbers("from_t", from_t)
        if from_t is None:
            sampling = dataclasses.replace(sampling, sampler=sampling.sampler or DDIM())
            if sampling.steps is None:
                steps = str(min(FEW, len(model.schedule)))
                sampling = dataclasses.replace(sampling, steps=steps)
        else:
            sampling = dataclasses.replace(sampling, sampler=sampling.sampler or Ancestral())
            images = dataclasses.replace(images, images=images.images or "data")
        for t in times:
            with options.errors_at("interpolation"):
                model.chain(model.resolve(sampling), from_t=t)
        noisy = hasattr(sampling.sampler, "variance") or getattr(sampling.sampler, "eta", 0) != 0
        if from_t is None and noisy:
            raise RunError(
                "interpolation without --from_t decodes latents, which needs a deterministic sampler;"
                " choose ddim with eta 0, dpm_solver or heun"
            )
        random_latents = images.images is None
        if random_latents:
            index = np.arange(count or PAIRED)
            labels = shared.choose_labels(run, index, images.labels or "cycle", key)
            blank = np.zeros((len(index), *run.method.image_shape), np.uint8)
            loaded = Given(blank, labels, index, {})
        else:
            loaded = shared.load_images(run, images, key=key, default=PAIRED)
            pairs = len(loaded.images) // 2
            if not pairs:
                raise RunError(f"interpolation needs two images, but {images.images} has one")
            loaded = Given(*(values[: 2 * pairs] for values in loaded[:3]), loaded.recipe)
            images = dataclasses.replace(images, num_images=2 * pairs)
        return cls(run, sampling, images, times, loaded, key, random_latents)

    def ends(self, t, batch_size, kept):
        """The images with noise up to time t, or for t = None the latents: [N, H, W, C]."""
        model, encoder = self.run.method, None
        if t is None and not self.random_latents:
            values = options.describe(self.sampling)
            chain = Chain(**{f.name: values[f.name] for f in dataclasses.fields(Chain)})
            encoder, _ = make_encoder(model, chain, "interpolation")

        def function(params, key, index, label, image):
            x_0 = from_uint8(image)
            if encoder:
                return encoder(params, label, x_0)
            keys = fold_in_each(key, index)
            if t is None:
                return diffusion.prior(model.chain(self.sampling), keys, x_0.shape[1:])
            eps = diffusion.noise(keys, diffusion.PRIOR_STREAM, x_0.shape[1:])
            return diffusion.q_sample(model.schedule, x_0, t, eps)

        examples = (np.arange(self.count), self.loaded.labels, self.loaded.images)
        return self._map(function, examples, batch_size, kept)

    def _map(self, function, examples, batch_size, kept):
        return shared.map_images(
            self.run,
            function,
            self.key,
            *examples,
            batch_size=batch_size,
            settings=options.describe(self.sampling),
            kept=kept,
        )

    def make(self, batch_size, folder) -> dict:
        """The arrays of the .npz; unfinished work is kept in a folder."""
        pair = np.repeat(np.arange(self.count // 2), FRACTIONS)
        fraction = np.tile(np.linspace(0, 1, FRACTIONS, dtype=np.float32), self.count // 2)
        nearer = np.where(fraction < 0.5, 2 * pair, 2 * pair + 1)  # labels cannot be mixed
        model, rows = self.run.method, []
        sampling = model.resolve(self.sampling)
        for n, t in enumerate(self.times):

            def function(params, key, index, label, x, y, fraction, t=t):
                if t is None:
                    mixed = inversion.slerp(x, y, fraction)
                else:
                    mixed = x + fraction[:, None, None, None] * (y - x)
                x_0 = model.sample(params, key, index, label, sampling, x_T=mixed, from_t=t)
                return shared.as_saved(x_0)

            x = self.ends(t, batch_size, os.path.join(folder, f"ends_{n}"))
            labels = self.loaded.labels[nearer]
            examples = (2 * pair, labels, x[2 * pair], x[2 * pair + 1], fraction)
            made = self._map(function, examples, batch_size, os.path.join(folder, f"mixed_{n}"))
            rows.append(made.reshape(self.count // 2, FRACTIONS, *model.image_shape))
        images = np.stack(rows, axis=1)
        return {"images": images, "ends": self.loaded.images, **self.loaded.origin()}
