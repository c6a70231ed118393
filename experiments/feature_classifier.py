"""Features of small images: a classifier whose penultimate layer serves where Inception's is too large.

    python -m experiments.feature_classifier --data=fashion_mnist --data_dir=data --out=runs/feature_classifier/fashion_mnist.npz
    --features=experiments.feature_classifier:runs/feature_classifier/fashion_mnist.npz     where metrics are asked for

Two convolutions with stride, a layer of 64 units, which are the features, and the logits. No image sees another
of its batch. A Fréchet distance of these features is none of Inception's: it carries the Extractor's name, and
compares only with others of the same weights, by their SHA-256.

The .npz holds the weights by name and their recipe in JSON.
"""

import argparse
import functools
import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from ddpm_jax import data, diffusion, metrics, parallel, runs, writers

FEATURES = 64
CHUNK = 256  # images at a time in `load`'s features: one shape, compiled once


class Classifier(nn.Module):
    """Images [B, H, W, C] in [−1, 1] to features [B, 64] and logits [B, K]."""

    num_classes: int
    dropout: float = 0.3

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.relu(nn.Conv(32, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(len(x), -1))
        # With relu, 9 of the 64 features were 0 for every test image of Fashion-MNIST.
        features = nn.silu(nn.Dense(FEATURES)(x))
        return features, nn.Dense(self.num_classes)(features)


def train(
    name: str,
    *,
    data_dir: str = "data",
    seed: int = 0,
    num_steps: int = 4000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    out: str,
) -> float:
    """Trains on a data set's train split and writes weights and recipe, after a measurement on test.

    Adam with a cosine decay to 0. All that is random is a function of the seed and the step.

    Args:
      name, data_dir: see `data.load`.
      out: the .npz to write.

    Returns:
      the share of test images whose class is right.

    Raises:
      DataError: one line.
    """
    train_set, test_set = (data.load(name, split=s, data_dir=data_dir) for s in ("train", "test"))
    if not train_set.num_classes:
        raise data.DataError(f"{name} has no labels, and a classifier needs them")
    print(f"{train_set.describe()}\n{parallel.banner()}", flush=True)
    network = Classifier(train_set.num_classes)
    params = network.init(jax.random.key(seed), jnp.zeros((1, *train_set.image_shape)))
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
    opt_state = tx.init(params)
    dropout_key = jax.random.key(seed + 1)

    def loss(params, key, batch):
        images = diffusion.from_uint8(batch["image"])
        _, logits = network.apply(params, images, train=True, rngs={"dropout": key})
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, step, batch):
        key = jax.random.fold_in(dropout_key, step)
        value, gradient = jax.value_and_grad(loss)(params, key, batch)
        change, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(params, change), opt_state, value

    progress = writers.Progress("step", num_steps, 0, unit="images", per_count=batch_size)
    order = data.batches(train_set, seed=seed, start=0, stop=num_steps, batch_size=batch_size)
    for step, batch in enumerate(order):
        params, opt_state, value = update(params, opt_state, step, batch)
        progress.done = step + 1
        if progress.done % 200 == 0 or progress.done == num_steps:
            print(progress.line(f"loss {float(value):.4f}"), flush=True)
            progress.begin()

    forward = features_of(network, params, test_set.image_shape)
    images = test_set.fetch(np.arange(len(test_set)))
    accuracy = float(np.mean(np.argmax(forward(images)[1], axis=1) == test_set.labels))
    weights = traverse_util.flatten_dict(jax.device_get(params["params"]), sep="/")
    recipe = {
        "data": name,
        "split": "train",
        "seed": seed,
        "num_steps": num_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "image_shape": list(train_set.image_shape),
        "num_classes": train_set.num_classes,
        "test_accuracy": accuracy,
        "weights_sha256": digest(weights),
        "software": parallel.banner(),
    }
    writers.save_npz(out, recipe=json.dumps(recipe), **weights)
    print(f"test accuracy {100 * accuracy:.2f} % of {len(test_set)}: {out}", flush=True)
    return accuracy


def digest(weights: dict[str, np.ndarray]) -> str:
    """SHA-256 over the bytes of the weights, in the order of their names."""
    sha256 = hashlib.sha256()
    for _, array in sorted(weights.items()):
        sha256.update(np.ascontiguousarray(array))
    return sha256.hexdigest()


def features_of(network: Classifier, params, image_shape):
    """uint8 [B, H, W, C] -> features float32 [B, 64], logits float32 [B, K], `CHUNK` at a time.

    Raises:
      ValueError: images of another shape.
    """

    @jax.jit
    def forward(images):
        return network.apply(params, diffusion.from_uint8(images))

    def features(images):
        if images.dtype != np.uint8 or images.shape[1:] != tuple(image_shape) or not len(images):
            expected = ", ".join(map(str, image_shape))
            raise ValueError(
                f"this classifier knows images uint8 [B, {expected}], got {images.dtype}"
                f" {list(images.shape)}; train one on images of that size"
            )
        parts = []
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            padding = [(0, CHUNK - len(chunk)), (0, 0), (0, 0), (0, 0)]
            both = forward(np.pad(chunk, padding))
            parts.append([np.asarray(values)[: len(chunk)] for values in both])
        return tuple(np.concatenate(values) for values in zip(*parts, strict=True))

    return features


def load(path: str) -> metrics.Extractor:
    """The Extractor of an .npz that `train` wrote.

    Raises:
      RunError: it is missing, damaged or of something else.
    """
    weights = runs.read_npz(path)
    try:
        recipe = json.loads(str(weights.pop("recipe")))
        if digest(weights) != recipe["weights_sha256"]:
            raise runs.RunError(
                f"{path} is damaged: its weights are not those that were written; train again"
            )
        shape, network = recipe["image_shape"], Classifier(recipe["num_classes"])
        name = recipe["data"]
    except (KeyError, TypeError, ValueError):
        raise runs.RunError(
            f"{path} is no classifier; make one with python -m {__name__}"
        ) from None
    params = {"params": traverse_util.unflatten_dict(weights, sep="/")}
    forward = features_of(network, params, shape)
    return metrics.Extractor(f"{name}_classifier", recipe["weights_sha256"], "none", forward)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m experiments.feature_classifier", allow_abbrev=False)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args(argv)
    try:
        train(args.data, data_dir=args.data_dir, seed=args.seed, num_steps=args.steps, out=args.out)
    except (data.DataError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
