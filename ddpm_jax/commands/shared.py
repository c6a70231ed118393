"""Shared parts of the commands: groups of options, input images, and results computed image by image."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import data, options
from ddpm_jax.files import results, run_data, writers
from ddpm_jax.files.progress import Progress
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.method import is_diffusion, labels_of
from ddpm_jax.options import AtLeast, option
from ddpm_jax.training import jobs
from ddpm_jax.training.preview import drawn
from ddpm_jax.training.step import make_keys

SEED_HELP = "The seed of all random numbers; those of image i depend only on the seed and on i."
DATA_DIR_HELP = "The folder where the data are. Default: as in the config."
Seed = Annotated[int, SEED_HELP, AtLeast(0)]
Times = str | int | float | tuple[float, ...]  # a command line gives text with commas
Labels = Annotated[
    str,
    "The classes of the images: cycle (all in turn), random, one class such as 3, or several in turn such as 3,5,7."
    " Class names work too, such as cat,dog.",
]
DataDir = Annotated[str | None, DATA_DIR_HELP]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """How a result is computed and where it goes."""

    batch_size: int | None = option(
        None, "How many images to compute at a time. Default: depends on the device.", least=1
    )
    out: str | None = option(
        None,
        "The file to write, in an existing folder; pictures get the same name. Default: a file in the run"
        " directory, named after the settings.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Input images."""

    images: str | None = option(
        "data",
        "The input images: data (the data set of the run), a folder of pictures, or an .npz.",
    )
    num_images: int | None = option(None, "How many images to use.", least=1)
    split: str | None = option(None, "The split of the data, such as train or test. Default: test.")
    data_dir: str | None = option(None, DATA_DIR_HELP)
    labels: str | None = option(
        None, "The classes of the images, as for --mode=sample. Default: the labels in the data."
    )

    def named(self) -> dict[str, Any]:
        """The settings that appear in file names."""
        values = options.describe(self)
        del values["data_dir"]
        return values


class Given(NamedTuple):
    """Loaded images."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]
    index: np.ndarray  # int64 [N], their positions in the split, folder or file
    recipe: dict  # the source and a digest of the images

    def origin(self) -> dict[str, np.ndarray]:
        """Arrays that identify the input images, for the .npz."""
        return {"labels": self.labels, "index": self.index}


def load_images(run: Run, which: Images, *, default: int, key=None) -> Given:
    """Loads images from the data set of the run ("data"), a folder of pictures or an .npz.

    Args:
      default: the number of images if `which.num_images` is None; all if there are fewer. `data.choose` chooses them.
      key: the random key for labels="random".

    Raises:
      DataError, ConfigError, RunError: one line that says what to do.
    """
    if which.images == "data":
        dataset = run_data.data_of(run, which.split or "test", which.data_dir)
    elif which.split or which.data_dir:
        raise RunError(
            f"--split and --data_dir are for the run's data, not for --images={which.images}"
        )
    else:
        dataset = run_data.load_images(run, which.images)
    count = which.num_images or min(default, len(dataset))
    if count > len(dataset):
        raise RunError(
            f"{count} images requested, but {dataset.name}/{dataset.split} has {len(dataset)}; choose a"
            " smaller --num_images"
        )
    rows = data.choose(len(dataset), count)
    rows = np.sort(rows) if count == len(dataset) else rows  # all images keep their order
    pixels = dataset.fetch(rows)
    if which.labels is not None or not run.method.num_classes:
        chosen = choose_labels(run, np.arange(count), which.labels or "cycle", key)
    elif dataset.num_classes == run.method.num_classes and (dataset.labels[rows] >= 0).all():
        run_data.check_classes(run.method, dataset)
        chosen = dataset.labels[rows]
    else:
        raise RunError(
            f"the model has {run.method.num_classes} classes, but the images of"
            f" {dataset.name}/{dataset.split} have no such labels; give --labels=3, or one for each image"
            " as in --labels=3,5,7, or choose a split that has labels, such as --split=train"
        )
    digest = hashlib.sha256(pixels.tobytes() + chosen.tobytes()).hexdigest()
    recipe = {"images": dataset.name, "split": dataset.split, "images_sha256": digest}
    order = "all" if count == len(dataset) else results.CHOSEN
    return Given(pixels, chosen, rows, recipe | {"num_images": count, "chosen": order})


def choose_labels(run: Run, index: np.ndarray, labels: str, key=None) -> np.ndarray:
    """The class of each image, as by `labels_of`; `labels` may also be names of classes."""
    labels = run_data.class_numbers(run, labels)
    key = sample_key(0) if key is None else key
    with options.errors_at("--labels"):
        return labels_of(run.method, index, labels, key=key)


def sample_key(seed: int):
    """The key of the random stream for sampling."""
    with options.errors_at("--seed"):
        return make_keys(seed).sample


def diffusion_of(run: Run):
    """The Method of a run, which must be a diffusion.

    Raises:
      RunError: the Method is not a diffusion.
    """
    if not is_diffusion(run.method):
        raise RunError(
            f"{run.config.method} (config.method) is not a diffusion, so it cannot add noise, which this"
            " command needs"
        )
    return run.method


def resolved(run: Run, chosen: Any) -> Any:
    """The options, where the model's values replace None."""
    return run.method.resolve(chosen) if hasattr(run.method, "resolve") else chosen


def numbers(name: str, value) -> list[int]:
    """Whole numbers from text with commas, a number, or a sequence of numbers.

    Raises:
      RunError: the value is something else.
    """
    parts = value.strip("[]()").split(",") if isinstance(value, str) else np.ravel(value).tolist()
    try:
        found = [int(part) for part in parts]
        exact = all(float(part) == number for part, number in zip(parts, found, strict=True))
        found = found if exact else []
    except ValueError:
        found = []
    if not found:
        raise RunError(
            f"{name} must be whole numbers separated by commas, such as 10,20,50; got {value!r}"
        )
    return found


def shown(count: int) -> np.ndarray:
    """Positions of the images that a picture shows: at most eight of `count`, from all parts of a sorted folder."""
    return np.sort(data.choose(count, 8))


# ---- computing image by image ------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Images as they are saved."""

    images: Any  # uint8 [B, H, W, C]
    finite: Any  # bool [B], whether all values of the image were finite before rounding


def as_saved(x) -> Drawn:
    """Rounds and clips float images x [B, H, W, C], where −1 is black and 1 white; for use in a mapped function."""
    return Drawn(*drawn(x))


def check_finite(finite: np.ndarray, settings: dict) -> None:
    """Raises an error if images are not finite; rounding would turn them black.

    Args:
      finite: bool [N].
      settings: the settings of the images, from which the error message suggests other options.

    Raises:
      RunError: the number of such images, and the options to try.
    """
    if np.all(finite):
        return
    suspects = []
    if (settings.get("guidance") or 1.0) not in (0.0, 1.0):
        suspects.append(f"a --guidance nearer to 1 than {settings['guidance']}")
    if settings.get("clip_x0") is False:
        suspects.append("--clip")
    if settings.get("sampler") in ("dpm_solver", "heun") or settings.get("eta") == "hat":
        suspects.append("--sampler=ddim")
    suspects.append("the other weights (--weights), or an earlier checkpoint: see loss.png")
    raise RunError(
        f"{np.sum(~finite)} of {len(finite)} images are not finite (NaN or infinite), so they are not"
        f" saved; try {', '.join(suspects)}"
    )


def map_images(
    run: Run,
    function: Callable,
    key,
    *examples,
    batch_size: int | None,
    settings: dict,
    kept: str | None = None,
):
    """Maps function(params, key, *examples) over all examples in batches, and prints the progress.

    Args:
      function: any `Drawn` that it returns is checked by `check_finite`.
      examples: arrays [N, …].
      batch_size: number of examples at a time; None for the default of the device.
      settings: the settings of the images, for the error message of `check_finite`.
      kept: path of a `GrowingFile` of the results so far, from which an interrupted call continues.

    Returns:
      the results as NumPy arrays [N, …]; each `Drawn` is replaced by its images.
    """

    def chosen(rows):
        return tuple(np.asarray(values)[rows] for values in examples)

    shapes, tree = jax.tree.flatten(jax.eval_shape(function, run.params, key, *chosen([0])))
    fields = [(f"{n}", leaf.dtype, leaf.shape[1:]) for n, leaf in enumerate(shapes)]
    growing = results.GrowingFile(kept, (), fields) if kept else results.Rows(fields)
    if growing.count:
        print(f"{growing.count} images with this recipe exist already", flush=True)
    progress = Progress("image", len(examples[0]), growing.count, unit="images")
    for at, part in jobs.in_batches(function, run.params, key, chosen, progress, batch_size):
        rows = np.empty(len(at), fields)
        for n, leaf in enumerate(jax.tree.leaves(part)):
            rows[f"{n}"] = leaf
        growing.append(rows)
        progress.show()

    def images(node):
        if isinstance(node, Drawn):
            check_finite(node.finite, settings)
            return node.images
        return node

    rows = growing.rows()
    whole = tree.unflatten([np.ascontiguousarray(rows[name]) for name, *_ in fields])
    return jax.tree.map(images, whole, is_leaf=lambda node: isinstance(node, Drawn))


def write(
    run: Run, mode: str, recipe: dict, make: Callable, output: Output, name: str
) -> tuple[str, dict]:
    """Computes and writes the .npz of a command, unless it exists with the same recipe.

    Args:
      make: function from a folder, where unfinished work can be kept, to the arrays.
      name: name of the file in samples/ if output.out is None.

    Returns:
      the path and the arrays.
    """
    out = output.out or os.path.join(run.workdir, "samples", f"{name}.npz")
    out = results.out_path(out, ".npz", run.workdir)
    recipe = run.recipe(recipe) | {"mode": mode} | recipe
    with results.in_progress(out, recipe, named=output.out is not None) as (folder, finished):
        if finished:
            print("nothing new to compute: the result exists with the same recipe", flush=True)
        arrays = finished or make(folder)
        writers.save_npz(out, arrays, recipe)
    return out, arrays
