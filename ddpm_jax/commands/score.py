"""Metrics of samples: drawn, turned into features, compared with the data, and never without what moved them.

    python -m ddpm_jax.main --mode=eval --workdir=runs/cifar10 --metrics=fid,is --num_samples=50000
    python -m ddpm_jax.main --mode=eval --workdir=runs/fashion_mnist --metrics=fid,prdc --num_samples=10000 \\
        --features=experiments.feature_classifier:runs/fashion_mnist_classifier.npz
    python -m ddpm_jax.main --mode=eval --workdir=runs/cifar10 --metrics=fid --images=made_elsewhere.npz

Each writes a .json of the numbers and their manifest to eval/, and prints both, a line for each number.
Samples and features are kept as they grow: an interrupted command continues, and a repeated one computes
only the numbers. Images are rounded to uint8 before anything looks at them.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import NamedTuple

import numpy as np

from ddpm_jax import config as config_lib
from ddpm_jax import data, evaluate, metrics, parallel, runs, sample, writers

METRICS = ("fid", "is", "kid", "prdc", "nll")
INCEPTION = "ddpm_jax.inception"
CHUNK = 250  # images that a network of features sees at once
KID_SUBSET = 1000


class Features(NamedTuple):
    """What an Extractor says of N images."""

    features: np.ndarray  # float32 [N, D]
    logits: np.ndarray  # float32 [N, K]
    images_sha256: str


def load_extractor(spec: str) -> metrics.Extractor:
    """The Extractor that MODULE:PATH names; "inception" and "inception:PATH" stand for `ddpm_jax.inception`.

    Raises:
      RunError: there is no such module, or no `load` in it; and what that raises.
    """
    module, _, path = spec.partition(":")
    module = INCEPTION if module == "inception" else module
    try:
        load = importlib.import_module(module).load
    except (ImportError, AttributeError, ValueError) as error:
        raise runs.RunError(
            f"--features={spec!r}: no module {module!r} with a load(path) -> Extractor ({error});"
            " write inception, or MODULE:PATH such as experiments.feature_classifier:FILE.npz"
        ) from None
    return load(config_lib.path(path))


def score(
    workdir: str,
    *,
    metrics: str = "fid",
    features: str = "inception",
    num_samples: int | None = None,
    num_seeds: int = 1,
    images: str | None = None,
    split: str = "train",
    num_images: int | None = None,
    data_dir: str | None = None,
    weights: str = "ema",
    seed: int = 0,
    batch_size: int | None = None,
    out: str | None = None,
    **options,
) -> dict:
    """Measures samples of a run, or images made by any other program, against the run's data.

    Args:
      metrics: some of `METRICS`, with commas. "prdc" is precision, recall, density and coverage; "nll" the
        variational bound of the test split, with the variance and clip_x0 that are given, on the whole chain.
      features: see `load_extractor`. Numbers of other features than Inception's carry their name, and
        Fréchet distances of fewer than 10,000 images their count.
      num_samples: how many to draw for each seed; None for 50,000, as in the papers.
      num_seeds: seeds seed, seed + 1, …; each number then is a mean, with its standard deviation over them.
      images: a folder of pictures or an .npz to judge instead of samples.
      split: of the data that is compared with; Ho et al. take "train".
      num_images: of the test split, for "nll"; None for all.
      data_dir, weights, batch_size, labels and all other options: as `sample.sample`.
      out: the .json to write; None names it in workdir/eval.

    Returns:
      {name: {"mean", "std", "values", "manifest"}} for each number.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    names = [name.strip() for name in metrics.split(",")]
    for name in names:
        with config_lib.errors_at("--metrics"):
            config_lib.check_choice("metric", name, METRICS)
    out = evaluate.check_out(out, workdir)
    of_features = [name for name in names if name != "nll"]
    options = runs.given(options)
    for_nll = {name: options[name] for name in ("variance", "clip_x0") if name in options}
    if images is not None or not of_features:
        told = {k: v for k, v in options.items() if of_features or k not in for_nll}
        told |= {"num_samples": num_samples, "num_seeds": None if num_seeds == 1 else num_seeds}
        told |= {} if of_features else {"images": images}
        if runs.given(told):
            raise runs.RunError(
                f"--{sorted(runs.given(told))[0]} is for samples, and nothing is drawn for"
                f" --metrics={metrics}{f' of --images={images}' if images else ''}"
            )
    run = runs.load(workdir, weights)
    if of_features and images is None:  # what can be refused is, before anything is computed
        given = {k: v for k, v in options.items() if k not in ("labels", "trajectory", "latents")}
        config_lib.call("sampling", run.method.make_sample, runs.with_errors(run, given)[0])
    shared = {"weights": weights, "batch_size": batch_size}
    results, reference, origin = {}, None, None
    if of_features:
        extractor = load_extractor(features)
        if set(of_features) != {"is"}:
            dataset = runs.data_of(run, split, data_dir)
            reference = features_of(run, extractor, dataset)
            origin = {"data": dataset.name, "split": dataset.split}
            origin |= {"num_images": len(dataset), "images_sha256": reference.images_sha256}
        if images is not None:
            judged = [(runs.load_images(run, images), None)]
        else:
            judged = []
            for one in range(seed, seed + num_seeds):
                count = num_samples or 50_000
                path = sample.sample(workdir, num_samples=count, seed=one, **shared, **options)
                judged.append(_samples(path, count))
        for dataset, recipe in judged:
            generated = features_of(run, extractor, dataset)
            recipe = recipe or {"images": dataset.name}
            manifest = {
                "features": {
                    "name": extractor.name,
                    "sha256": extractor.sha256,
                    "resize": extractor.resize,
                    "from": features,
                },
                "num_generated": len(dataset),
                "reference": origin,
                "generated": recipe
                | {"images_sha256": generated.images_sha256, "rounded": "uint8"},
            }
            with config_lib.errors_at("--metrics"):
                values = numbers(of_features, extractor.name, generated, reference)
            for name, value in values.items():
                entry = results.setdefault(name, {"values": [], "manifest": manifest, "seeds": []})
                entry["values"].append(value)
                entry["seeds"].append(recipe.get("seed"))
    if "nll" in names:
        told = {"num_images": num_images, "data_dir": data_dir, "seed": seed}
        bound = evaluate.nll(workdir, **told, **shared, **for_nll)
        total, count = bound.scalars["total"], len(bound.scalars["total"])
        entry = {
            "values": [float(np.mean(total))],
            "manifest": bound.recipe | {"num_images": count},
        }
        results["nll_bits_per_dim"] = entry | {"seeds": [seed]}
    for entry in results.values():
        spread = np.std(entry["values"], ddof=1) if len(entry["values"]) > 1 else None
        entry |= {"mean": float(np.mean(entry["values"])), "std": spread and float(spread)}
        entry["manifest"] = entry["manifest"] | {"software": parallel.banner()}
    if out is None:
        told = {"images": images, "split": split, "num_samples": num_samples, **options}
        told |= {"num_images": num_images}
        told |= {
            "metrics": metrics,
            "features": features,
            "seeds": f"{seed}-{seed + num_seeds - 1}",
        }
        out = os.path.join(run.workdir, "eval", f"{run.name('metrics', **told)}.json")
    writers.save_json(out, {"recipe": run.recipe(), "metrics": results})
    print(report(results))
    print(os.path.abspath(out), flush=True)
    return results


def numbers(
    names, extractor: str, generated: Features, reference: Features | None
) -> dict[str, float]:
    """The metrics of one set of images, by names that say of which features, and of how many images.

    Raises:
      ValueError: one line, as those of `metrics`.
    """
    prefix = "" if extractor.startswith("inception") else f"{extractor}_"
    count, result = len(generated.features), {}
    for name in names:
        if name == "fid":
            first, second = (metrics.moments(of.features) for of in (generated, reference))
            moments = (first.mean, first.covariance, second.mean, second.covariance)
            result[metrics.short_name("fid", count)] = metrics.frechet_distance(*moments)
            warning = metrics.warning(count, len(first.mean))
            if warning:
                print(f"WARNING: {warning}", flush=True)
        elif name == "is":
            mean, spread = metrics.inception_score(generated.logits)
            result |= {"is": mean, "is_std_of_splits": spread}
        elif name == "kid":
            size = min(KID_SUBSET, count, len(reference.features))
            mean, spread = metrics.kid(generated.features, reference.features, subset_size=size)
            result |= {"kid": mean, "kid_std_of_subsets": spread}
        elif name == "prdc":
            result |= metrics.prdc(reference.features, generated.features)
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
    """What a number was measured with, for people."""
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
    arrays = runs.read_npz(path)
    images = arrays["images"][:count]
    labels = np.zeros(len(images), np.int32)
    shape = images.shape[1:]
    dataset = data.Dataset("samples", "drawn", shape, 0, labels, images.__getitem__, images)
    return dataset, json.loads(str(arrays["recipe"]))


def features_of(run: runs.Run, extractor: metrics.Extractor, dataset: data.Dataset) -> Features:
    """Features of all images of a data set, from eval/ if they are there, or from where they were left."""
    digest = dataset.digest()
    name = f"features_{extractor.name}_{extractor.sha256[:8]}_{digest[:16]}.npz"
    path = os.path.join(run.workdir, "eval", name)
    recipe = {"features": extractor.name, "features_sha256": extractor.sha256}
    recipe |= {"images_sha256": digest, "num_images": len(dataset)}
    with runs.in_progress(path, recipe) as (folder, finished):
        if finished is None:
            finished = _extract(folder, extractor, dataset)
            writers.save_npz(path, **finished, recipe=json.dumps(recipe))
    return Features(finished["features"], finished["logits"], digest)


def _extract(folder, extractor, dataset) -> dict[str, np.ndarray]:
    def chunk(first):
        """Features and logits side by side, and how many are features."""
        rows = np.minimum(first + np.arange(min(CHUNK, len(dataset))), len(dataset) - 1)
        features, logits = extractor.features(dataset.fetch(rows))  # one shape for all
        return np.concatenate([features, logits], axis=1), features.shape[1]

    rows, D = chunk(0)
    growing = runs.GrowingFile(os.path.join(folder, "features"), rows.shape[1:], np.float32)
    what = f"features of {dataset.name}/{dataset.split}: image"
    progress = writers.Progress(what, len(dataset), growing.count, unit="images")
    while growing.count < len(dataset):
        rows, _ = chunk(growing.count)
        growing.append(rows[: len(dataset) - growing.count])
        progress.done = growing.count
        progress.show()
    rows = growing.rows()
    return {"features": rows[:, :D], "logits": rows[:, D:]}
