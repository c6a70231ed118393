"""Is one draw of z enough to train on? Liu 2023 §1, after Kingma & Welling 2014 §2.3, measured on MNIST.

    python -m experiments.vae.draws --out=runs/vae_draws --data_dir=data

Said: "a sample size of 1 is sufficient"; by Kingma & Welling, "as long as the minibatch size M was large enough,
e.g. M = 100". Trains the network of config.py for five epochs in batches of 100 with 1 and with 5 draws for each
image, three seeds each, which share images, their order and the initial weights, and measures the ELBO of the
10,000 test images. Then the variance of the gradient of one image is taken apart: it is D + Z/K for K draws, D
between images and Z between draws, so K draws divide the variance of a batch by at most (D + Z)/D.

Expected: D well above Z, so that four more draws buy less than a second pass over the data.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ddpm_jax import data, parallel, train
from ddpm_jax.evaluate import mean_and_error
from experiments import vae
from experiments.vae import __main__ as command
from experiments.vae import config as vae_config

DRAWS = (1, 5)
SEEDS = (0, 1, 2)
NUM_STEPS = 3000  # five epochs
NUM_IMAGES = 1000  # of the training set, for the gradient's variance
BLOCK = 20  # images whose gradients are in memory at once


def make_config(draws: int, seed: int, data_dir: str):
    config = vae_config.get_config()
    config.seed, config.data.data_dir = seed, data_dir
    with config.unlocked():
        config.vae.draws = draws
    config.training.num_steps = NUM_STEPS
    config.training.checkpoint_every = NUM_STEPS
    config.preview.every = NUM_STEPS
    return config


def gradient_variances(network: vae.Network, params, images, key) -> tuple[float, float]:
    """D and Z of the gradient of one image's negative ELBO, summed over parameters.

    Z is half the mean squared difference of the gradients of two draws; their average has D + Z/2 between
    images, of which D is what is left.

    Args:
      images: uint8 [N, H, W, C].
    """

    def gradient(image, eps):
        def loss(params):
            reconstruction, kl, _ = vae.parts(network, params, vae.grey(image[None]), eps)
            return (kl - reconstruction[0])[0]

        return ravel_pytree(jax.grad(loss)(params))[0]

    @jax.jit
    def sums(images, keys):
        """Of the mean of the two draws' gradients: the sum and that of its squared norm; ‖difference‖²."""
        shape = (2, 1, 1, network.latents)
        eps = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        first, second = (jax.vmap(gradient)(images, eps[:, n]) for n in (0, 1))
        mean = 0.5 * (first + second)
        return mean.sum(axis=0), jnp.sum(mean**2), jnp.sum((first - second) ** 2)

    total, squares, differences, N = 0.0, 0.0, 0.0, len(images)
    for start in range(0, N, BLOCK):
        keys = jax.random.split(jax.random.fold_in(key, start), len(images[start : start + BLOCK]))
        parts = jax.device_get(sums(images[start : start + BLOCK], keys))
        total = total + np.float64(parts[0])
        squares, differences = squares + float(parts[1]), differences + float(parts[2])
    between_draws = 0.5 * differences / N
    between_means = (squares - np.sum(total**2) / N) / (N - 1)
    return float(between_means - between_draws / 2), between_draws


def table(elbo: dict[int, np.ndarray], seconds: dict[int, float]) -> str:
    """Markdown: the ELBO of each number of draws over the seeds, and its difference from that of the first."""
    first, *_ = elbo.values()
    lines = [
        "| draws | ELBO, nats | more than with the first | seconds of training |",
        "|---|---|---|---|",
    ]
    for draws, values in elbo.items():
        mean, difference = mean_and_error(values), mean_and_error(values - first)
        gain = "" if values is first else "{:.2f} ± {:.2f}".format(*difference)
        lines.append(f"| {draws} | {mean[0]:.2f} ± {mean[1]:.2f} | {gain} | {seconds[draws]:.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.vae.draws",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--data_dir", default="data", help="where MNIST is (default: data)")
    options = parser.parse_args(argv)
    parallel.enable_compilation_cache()
    elbo, seconds = ({draws: [] for draws in DRAWS} for _ in range(2))
    for seed in SEEDS:
        for draws in DRAWS:
            workdir = os.path.join(options.out, f"draws_{draws}_seed_{seed}")
            start = time.perf_counter()
            train.train(make_config(draws, seed, options.data_dir), workdir)
            seconds[draws].append(time.perf_counter() - start)
            values = command.measure(workdir, num_draws=10, data_dir=options.data_dir)
            elbo[draws].append(values["elbo"].mean())
    print(table({k: np.array(v) for k, v in elbo.items()}, {k: min(v) for k, v in seconds.items()}))
    print(f"± is the standard error over {len(SEEDS)} seeds; of the difference, seed by seed")

    run, network = command.load(os.path.join(options.out, "draws_1_seed_0"), "raw")
    images = data.load("mnist", data_dir=options.data_dir).fetch(np.arange(NUM_IMAGES))
    for when, params in (
        ("before training", run.method.init(jax.random.key(0))),
        (f"after {run.step:,} steps", run.params),
    ):
        D, Z = gradient_variances(network, params, images, jax.random.key(1))
        print(
            f"{when}: variance of one image's gradient between images {D:.4g}, between draws {Z:.4g}; five"
            f" draws divide that of a batch by {(D + Z) / (D + Z / 5):.3f}, endless ones by {(D + Z) / D:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
