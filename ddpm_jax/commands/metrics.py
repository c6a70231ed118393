"""Metrics of samples, computed from features of samples and data, and saved with all settings that affect them.

    python -m ddpm_jax.main --mode=eval --workdir=runs/cifar10 --metrics=fid,is --num_samples=50000
    python -m ddpm_jax.main --mode=eval --workdir=runs/fashion_mnist --metrics=fid,prdc --num_samples=10000 \\
        --features=experiments.feature_classifier:runs/fashion_mnist_classifier.npz
    python -m ddpm_jax.main --mode=eval --workdir=runs/cifar10 --metrics=fid --images=made_elsewhere.npz

Each writes a .json of the numbers and their manifest to eval/, and prints both, a line for each number.
Samples and features are kept as they grow: an interrupted command continues, and a repeated one computes
only the numbers. Images are rounded to uint8 before anything looks at them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import Annotated, Any

import numpy as np

from ddpm_jax import data, options, processes
from ddpm_jax import metrics as metrics_lib
from ddpm_jax.commands import analytic, likelihood, shared
from ddpm_jax.commands import sampling as sampling_lib
from ddpm_jax.commands.bound import Measured, check_out
from ddpm_jax.commands.shared import DataDir, Labels, Output, Seed
from ddpm_jax.ddpm import Bounding, Sampling
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import results as results_lib
from ddpm_jax.files import run_data, writers
from ddpm_jax.files.progress import Progress
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.metrics import METRICS, Extractor, Features
from ddpm_jax.names import check_takes, described, find, import_module
from ddpm_jax.options import AtLeast
from ddpm_jax.training import parallel
from ddpm_jax.training.preview import check_sampling

INCEPTION = "ddpm_jax.networks.inception"
CHUNK = 250  # images that a network of features sees at once
NUM_SAMPLES = 50_000  # as in the papers


def load_extractor(spec: str) -> Extractor:
    """The Extractor that MODULE:PATH names; "inception" and "inception:PATH" stand for `networks.inception`.

    Raises:
      RunError: there is no such module, no `load` in it, or it returns something else; and what that raises.
    """
    module, _, path = spec.partition(":")
    module = INCEPTION if module in ("inception", "ddpm_jax.inception") else module
    try:
        load = import_module(module, "features").load
    except (ValueError, AttributeError) as error:
        raise RunError(
            f"--features={spec!r}: no module {module!r} with a load(path) -> Extractor ({error});"
            " write inception, or MODULE:PATH such as experiments.feature_classifier:FILE.npz"
        ) from None
    with options.errors_at(f"--features={spec!r}"):
        check_takes(load, ("path",), "features")
    extractor = load(config_lib.path(path))
    fields = [name for name in Extractor._fields if not hasattr(extractor, name)]
    if fields:
        raise RunError(
            f"--features={spec!r}: {described(load, 'function')} returns {type(extractor).__name__}, and"
            f" must return an Extractor({', '.join(Extractor._fields)})"
        )
    return extractor


def evaluate(
    run: Run,
    *,
    metrics: Annotated[
        str, f"The metrics, with commas: {', '.join(METRICS)}, nll, or module:NAME."
    ] = "fid",
    features: Annotated[
        str,
        "The network of the features: inception, inception:FILE, or MODULE:FILE for a module with load(path) ->"
        " Extractor.",
    ] = "inception",
    sampling: Sampling = Sampling(),
    num_samples: Annotated[
        int | None, "How many images to draw. Default: 50000, as in the papers.", AtLeast(1)
    ] = None,
    labels: Labels = "cycle",
    num_seeds: Annotated[
        int,
        "How many seeds to draw with, from --seed on; a metric is then a mean with its spread.",
        AtLeast(1),
    ] = 1,
    images: Annotated[
        str | None, "A folder of pictures or an .npz to judge. Default: samples are drawn."
    ] = None,
    split: Annotated[
        str, "The split of the data that is compared with; Ho et al. take train."
    ] = "train",
    num_images: Annotated[int | None, "How many images for nll. Default: all.", AtLeast(1)] = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    output: Output = Output(),
) -> dict:
    """Measures samples by FID and other metrics, against the run's data.

    Args:
      metrics: "prdc" is precision, recall, density and coverage; "nll" the variational bound of the test split, with
        the variance and clip_x0 that are given, on the whole chain. A metric of your own has the signature of those in
        `metrics.METRICS`.
      features: metrics of features other than Inception's are prefixed by their name, and Fréchet distances of fewer
        than 10,000 images say their number.

    Returns:
      {name: {"mean", "std", "values", "manifest"}} for each number.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    names = [name.strip() for name in metrics.split(",")]
    with options.errors_at("--metrics"):
        functions = {name: find(name, METRICS, "metric") for name in names if name != "nll"}
        for function in functions.values():
            check_takes(function, ("generated", "reference"), "metric")
    out = check_out(output.out, run.workdir)
    chosen = options.changed(sampling)
    for_nll = {name: chosen[name] for name in ("variance", "clip_x0") if name in chosen}
    drawing = chosen | {"num_samples": num_samples, "labels": None if labels == "cycle" else labels}
    if images is not None or not functions:
        unused = drawing | {"num_seeds": num_seeds if num_seeds > 1 else None}
        if not functions:
            unused = {k: v for k, v in unused.items() if k not in for_nll} | {"images": images}
        refuse_unused(unused, metrics, images)
    output = dataclasses.replace(output, out=None)
    results = {}
    if functions:
        if images is None:
            check_sampler(run, sampling)
        judge = Judge(run, functions, features, split, data_dir)
        if images is not None:
            judge.add(results, run_data.load_images(run, images), None)
        count = num_samples or NUM_SAMPLES
        draw = functools.partial(sampling_lib.sample, run, sampling=sampling, labels=labels)
        for its_seed in range(seed, seed + num_seeds) if images is None else ():
            path = draw(num_samples=count, seed=its_seed, output=output)
            judge.add(results, *_samples(path, count))
    if "nll" in names:
        measured = Measured(num_images=num_images, data_dir=data_dir, seed=seed)
        results["nll_bits_per_dim"] = bound_of(run, for_nll, measured, output)
    summarise(results)
    if out is None:
        settings = drawing | {"images": images, "split": split, "num_images": num_images}
        settings |= {"seeds": f"{seed}-{seed + num_seeds - 1}"}
        settings |= {"metrics": metrics, "features": features}
        out = os.path.join(run.workdir, "eval", f"{run.name('metrics', settings=settings)}.json")
    writers.save_result(out, {"recipe": run.recipe(), "metrics": results})
    print(report(results))
    print(os.path.abspath(out), flush=True)
    return results


def bound_of(run: Run, settings: dict, measured: Measured, output: Output) -> dict:
    """The variational bound in bits/dim as an entry of the results, with these settings of `Bounding`."""
    bounding = dataclasses.replace(Bounding(), **settings)
    bound = likelihood.nll(run, bounding=bounding, measured=measured, output=output)
    return {
        "values": [float(np.mean(bound.scalars["total"]))],
        "manifest": bound.recipe | {"num_images": bound.count},
        "seeds": [measured.seed],
    }


def summarise(results: dict) -> None:
    """Adds mean and standard deviation over seeds, and the software, to each number."""
    for entry in results.values():
        spread = np.std(entry["values"], ddof=1) if len(entry["values"]) > 1 else None
        entry |= {"mean": float(np.mean(entry["values"])), "std": spread and float(spread)}
        entry["manifest"] = entry["manifest"] | {"software": parallel.banner()}


def refuse_unused(options_of_samples: dict, metrics: str, images: str | None) -> None:
    """Refuses options of sampling where no samples are drawn.

    Raises:
      RunError: one of them is not None.
    """
    unused = sorted(name for name, value in options_of_samples.items() if value is not None)
    if unused:
        raise RunError(
            f"--{unused[0]} is for samples, and nothing is drawn for"
            f" --metrics={metrics}{f' of --images={images}' if images else ''}"
        )


def check_sampler(run: Run, sampling: Sampling) -> None:
    """Checks that options of sampling fit the run, before anything is computed."""
    chosen = shared.resolved(run, sampling)
    if analytic.variance_of(chosen) == "analytic":
        analytic.errors_for(run, sampling, "analytic")
    else:
        check_sampling(run.method, chosen, "sampling")


class Judge:
    """Computes metrics of sets of images: holds the metrics, the feature network and the reference images."""

    def __init__(self, run: Run, functions: dict, spec: str, split: str, data_dir: str | None):
        self.run, self.functions, self.spec = run, functions, spec
        self.extractor = load_extractor(spec)
        self.reference, self.origin = None, None
        if set(functions) != {"is"}:
            dataset = run_data.data_of(run, split, data_dir)
            self.reference = features_of(run, self.extractor, dataset)
            self.origin = {"data": dataset.name, "split": dataset.split}
            self.origin |= {"num_images": len(dataset)}
            self.origin |= {"images_sha256": self.reference.images_sha256}

    def add(self, results: dict, dataset: data.Dataset, recipe: dict | None) -> None:
        """Adds the numbers of one set of images to the results.

        Args:
          recipe: of samples; None for other images.
        """
        extractor = self.extractor
        generated = features_of(self.run, extractor, dataset)
        recipe = recipe or {"images": dataset.name}
        features = {"name": extractor.name, "sha256": extractor.sha256, "resize": extractor.resize}
        made = {"images_sha256": generated.images_sha256, "rounded": "uint8"}
        manifest = {
            "features": features | {"from": self.spec},
            "num_generated": len(dataset),
            "reference": self.origin,
            "generated": recipe | made,
        }
        with options.errors_at("--metrics"):
            values = numbers(self.functions, extractor.name, generated, self.reference)
        for name, value in values.items():
            entry = results.setdefault(name, {"values": [], "manifest": manifest, "seeds": []})
            entry["values"].append(value)
            entry["seeds"].append(recipe.get("seed"))


def numbers(
    functions: dict[str, Any], extractor: str, generated: Features, reference: Features | None
) -> dict[str, float]:
    """The metrics of one set of images; the names state the features and the number of images.

    Raises:
      ValueError: one line, as those of `metrics`.
    """
    prefix, result = "" if extractor.startswith("inception") else f"{extractor}_", {}
    for function in functions.values():
        values = function(generated, reference)
        if not isinstance(values, dict) or any(
            np.ndim(value) or np.asarray(value).dtype.kind not in "iuf" for value in values.values()
        ):
            raise ValueError(
                f"{described(function, 'metric')} returns {values!r}, and must return"
                " {name: number}"
            )
        result |= values
    if "fid" in functions:
        warning = metrics_lib.warning(len(generated.features), generated.features.shape[1])
        if warning:
            print(f"WARNING: {warning}", flush=True)
    return {prefix + name: value for name, value in result.items()}


def report(results: dict) -> str:
    """A table of the numbers, and below it the settings that they were measured with, once for each set."""
    rows, settings = [("metric", "value", "standard deviation", "")], []
    for name, entry in results.items():
        about = settings_of(entry)
        if about not in settings:
            settings.append(about)
        spread = (
            f"± {entry['std']:.2g} ({len(entry['values'])} seeds)"
            if entry["std"] is not None
            else ""
        )
        rows.append((name, f"{entry['mean']:.6g}", spread, f"[{settings.index(about) + 1}]"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*table, *(f"[{n}] {about}" for n, about in enumerate(settings, 1))])


def settings_of(entry: dict) -> str:
    """The settings of a metric, in words."""
    manifest, parts = dict(entry["manifest"]), []
    features, origin = manifest.get("features"), manifest.get("reference")
    if features:
        made = manifest["generated"]
        parts += [
            f"features {features['name']} {features['sha256'][:8]}, resize {features['resize']}"
        ]
        parts += [f"{manifest['num_generated']} images {made['images_sha256'][:8]} as uint8"]
        if origin:
            against = f"{origin['num_images']} of {origin['data']}/{origin['split']}"
            parts += [f"against {against} {origin['images_sha256'][:8]}"]
    else:
        made = manifest
        parts += [f"{made['num_images']} images of {made['data']}/{made['split']}"]
    kept = ("sampler", "steps", "spacing", "eta", "order", "variance", "clip_x0", "guidance")
    parts += [f"{key} {made[key]}" for key in kept if made.get(key) is not None]
    if "weights" in made:
        parts += [f"{made['weights']} weights of step {made['step']}"]
    parts += (
        [f"seed {', '.join(map(str, entry['seeds']))}"] if entry["seeds"][0] is not None else []
    )
    return f"{'; '.join(parts)}; {manifest['software'].partition(';')[0]}"


def _samples(path: str, count: int) -> tuple[data.Dataset, dict]:
    """The first samples of an .npz as a data set, and their recipe."""
    arrays = results_lib.read_npz(path)
    images = arrays["images"][:count]
    labels = np.zeros(len(images), np.int32)
    shape = images.shape[1:]
    dataset = data.Dataset("samples", "drawn", shape, 0, labels, images.__getitem__, images)
    return dataset, json.loads(str(arrays["recipe"]))


def features_of(run: Run, extractor: Extractor, dataset: data.Dataset) -> Features:
    """Features of all images of a data set, loaded from eval/ if they exist; an interrupted extraction continues."""
    digest = dataset.digest()
    name = f"features_{extractor.name}_{extractor.sha256[:8]}_{digest[:16]}.npz"
    path = os.path.join(run.workdir, "eval", name)
    recipe = {"features": extractor.name, "features_sha256": extractor.sha256}
    recipe |= {"images_sha256": digest, "num_images": len(dataset)}
    with results_lib.in_progress(path, recipe) as (folder, finished):
        if finished is None:
            finished = _extract(folder, extractor, dataset)
            writers.save_npz(path, finished, recipe)
    return Features(finished["features"], finished["logits"], digest)


def _extract(folder, extractor, dataset) -> dict[str, np.ndarray]:
    def chunk(first):
        """Features and logits side by side of `CHUNK` images for each process, and how many are features."""
        first += processes.index() * min(CHUNK, len(dataset))
        rows = np.minimum(first + np.arange(min(CHUNK, len(dataset))), len(dataset) - 1)
        pair = extractor.features(dataset.fetch(rows))  # one shape for all
        shapes = [np.shape(part) for part in pair] if isinstance(pair, (tuple, list)) else []
        if len(shapes) != 2 or any(len(s) != 2 or s[0] != len(rows) for s in shapes):
            raise RunError(
                f"{described(extractor.features, 'features')} must return features [B, D] and logits [B, K];"
                f" for {len(rows)} images it returns {shapes or type(pair).__name__}"
            )
        return processes.gather(np.concatenate(pair, axis=1)), shapes[0][1]

    rows, D = chunk(0)
    growing = results_lib.GrowingFile(os.path.join(folder, "features"), rows.shape[1:], np.float32)
    what = f"features of {dataset.name}/{dataset.split}: image"
    progress = Progress(what, len(dataset), growing.count, unit="images")
    while growing.count < len(dataset):
        rows, _ = chunk(growing.count)
        growing.append(rows[: len(dataset) - growing.count])
        progress.done = growing.count
        progress.show()
    rows = growing.rows()
    return {"features": rows[:, :D], "logits": rows[:, D:]}
