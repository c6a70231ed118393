"""Is one draw of z enough to train on? Liu 2023 §1, after Kingma & Welling 2014 §2.3, measured on MNIST.

    python -m experiments.vae.draws --out=runs/vae_draws --data_dir=data

Liu: "a sample size of 1 is sufficient"; Kingma & Welling: "as long as the minibatch size M was large enough, e.g. M =
100". This experiment trains the network of config.py in batches of 100 with 1 and with 5 draws for each image: for the
same number of steps (five epochs), and for about the same time. Each training has three seeds; trainings with the same
seed share the images, their order and the initial weights. The ELBO is measured on the 10,000 test images. Then the
variance of the gradient of one image is decomposed: for K draws it is D + Z/K, with D between images and Z between draws,
so K draws divide the variance of a batch by at most (D + Z)/D.

Expected: D is larger than Z, and more draws do not help.
Measured on one core of an AMD EPYC server that did other work too, with jax 0.10.2, in ten minutes: nats per image, EMA
weights; ± is the standard error over three seeds, for gains that of the differences seed by seed; seconds are the shortest
of three trainings:

    draws   steps   ELBO              gain over the first   seconds
    1       3000    -108.60 ± 0.06                          31
    5       3000    -107.61 ± 0.02    0.99 ± 0.08           63
    1       7000    -104.96 ± 0.06    3.64 ± 0.01           79

Five draws help: they gain a nat in the same number of steps. But the time is better spent on more steps with one draw,
which gain 3.6 nats: in this sense one draw is sufficient. The expectation about variances was wrong. For 1000 training
images D = 2.0e4 and Z = 12.5e4 before training, and 1.8e4 and 6.4e4 after 3000 steps. So most of the noise of the gradient
comes from z, and five draws divide the variance of a batch by 3.2 and 2.6. It is the batch of a hundred that makes this
variance small, as Kingma & Welling say.
"""

import argparse
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ddpm_jax import data
from ddpm_jax.experiments import vae
from ddpm_jax.experiments.vae import __main__ as command
from ddpm_jax.experiments.vae import config as vae_config
from ddpm_jax.main import USER_ERRORS
from ddpm_jax.stats import mean_and_error
from ddpm_jax.training import loop, parallel

# Pairs of (draws, steps); the last two take about the same time on a CPU.
RUNS = ((1, 3000), (5, 3000), (1, 7000))
SEEDS = (0, 1, 2)
NUM_IMAGES = 1000  # training images for the variance of the gradient
BLOCK = 20  # images whose gradients are in memory at a time


def make_config(draws: int, num_steps: int, seed: int, data_dir: str):
    config = vae_config.get_config()
    config.seed, config.data.data_dir = seed, data_dir
    with config.unlocked():
        config.vae.draws = draws
    config.training.num_steps = num_steps
    config.training.checkpoint_every = num_steps
    config.preview.every = num_steps
    return config


def gradient_variances(network: vae.Network, params, images, key) -> tuple[float, float]:
    """D and Z of the gradient of one image's negative ELBO, summed over parameters.

    Z is half the mean squared difference of the gradients of two draws. The average of the two has variance D + Z/2
    between images, which gives D.

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
        """Sums over images of the mean gradient of two draws, its squared norm, and their squared difference."""
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


def table(found: dict[tuple[int, int], list[tuple[float, float]]]) -> str:
    """Markdown of {(draws, steps): [(ELBO, seconds of training) of each seed]}, compared with the first."""
    first, *_ = (np.array(values) for values in found.values())
    lines = [
        "| draws | steps | ELBO, nats | gain over the first | seconds |",
        "|---|---|---|---|---|",
    ]
    for (draws, num_steps), values in found.items():
        elbo, seconds = np.array(values).T
        mean, error = mean_and_error(elbo)
        gain = mean_and_error(elbo - first[:, 0])
        gain = "" if (elbo == first[:, 0]).all() else f"{gain[0]:.2f} ± {gain[1]:.2f}"
        cells = (draws, num_steps, f"{mean:.2f} ± {error:.2f}", gain, f"{seconds.min():.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.vae.draws",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="folder for the runs")
    parser.add_argument("--data_dir", default="data", help="folder of MNIST (default: data)")
    options = parser.parse_args(argv)
    parallel.enable_compilation_cache()
    found = {run: [] for run in RUNS}
    for seed in SEEDS:
        for draws, num_steps in RUNS:
            name = f"draws_{draws}_steps_{num_steps}_seed_{seed}"
            workdir, start = os.path.join(options.out, name), time.perf_counter()
            new = not os.path.exists(workdir)
            loop.train(make_config(draws, num_steps, seed, options.data_dir), workdir)
            seconds = (
                time.perf_counter() - start if new else np.inf
            )  # a run that existed has no time
            values = command.measure(workdir, num_draws=10, data_dir=options.data_dir)
            found[draws, num_steps].append((values["elbo"].mean(), seconds))
    print(table(found))
    print(
        f"± is the standard error over {len(SEEDS)} seeds, for gains that of the differences seed by seed"
    )

    run, network = command.load(os.path.join(options.out, "draws_1_steps_3000_seed_0"), "raw")
    mnist = data.load("mnist", data_dir=options.data_dir)
    images = mnist.fetch(data.choose(len(mnist), NUM_IMAGES))
    for when, params in (
        ("before training", run.method.init(jax.random.key(0))),
        (f"after {run.step:,} steps", run.params),
    ):
        D, Z = gradient_variances(network, params, images, jax.random.key(1))
        print(
            f"{when}: variance of one image's gradient between images {D:.4g}, between draws {Z:.4g}; five"
            f" draws divide the variance of a batch by {(D + Z) / (D + Z / 5):.3f}, infinitely many by"
            f" {(D + Z) / D:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
