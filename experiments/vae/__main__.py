"""Measures a trained auto-encoder: its ELBO, a tighter bound, and a picture of the plane of latents.

    python -m experiments.vae --workdir=runs/vae_20
    python -m experiments.vae --workdir=runs/vae_2 --num_images=1000

Prints reconstruction, KL and ELBO in nats per image, with standard errors over images, and the bound
log 1/K Σ_k p(x, z_k)/q(z_k|x) with K draws (Burda et al. 2016), which approaches log p(x) from below as K grows. The
numbers are also written to a .json in workdir/eval. For two latents a picture of the plane of latents is written to
workdir/samples (Kingma & Welling, Figure 4). The numbers of image i depend only on the seed and on i.
"""

import argparse
import os
import sys

import jax
import numpy as np
from scipy import special

from ddpm_jax import data, options
from ddpm_jax import main as command_line
from ddpm_jax.experiments import vae
from ddpm_jax.files import run_data, runs, writers
from ddpm_jax.files.progress import Progress
from ddpm_jax.files.run_data import RunError
from ddpm_jax.method import fold_in_each
from ddpm_jax.process.diffusion import to_uint8
from ddpm_jax.stats import mean_and_error
from ddpm_jax.training import jobs, parallel
from ddpm_jax.training.step import make_keys

METHOD = "experiments.vae"
PLANE = 20  # number of images along each side of the plane


def make_bounds(network: vae.Network, num_draws: int):
    """Makes a function (params, key, images uint8 [B, H, W, C], index [B]) -> {name: [B]}, in nats, from K draws of z.

    reconstruction is −E log p(x|z) and kl the divergence from the prior, so elbo = −reconstruction − kl;
    log_p is the importance-weighted bound.
    """

    def bounds(params, key, images, index):
        keys, shape = fold_in_each(key, index), (num_draws, network.latents)
        eps = jax.vmap(lambda key: jax.random.normal(key, shape), out_axes=1)(keys)
        log_p_x, kl, log_ratio = vae.parts(network, params, vae.grey(images), eps)
        reconstruction = -log_p_x.mean(axis=0)
        log_p = jax.nn.logsumexp(log_p_x + log_ratio, axis=0) - np.log(num_draws)
        return {
            "elbo": -reconstruction - kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "log_p": log_p,
        }

    return bounds


def load(workdir: str, weights: str) -> tuple[runs.Run, vae.Network]:
    """A run of this experiment.

    Raises:
      RunError: it is a run of another Method; or as `runs.load`.
    """
    run = runs.load(workdir, weights=weights)
    if run.config.method != METHOD:
        raise RunError(
            f"{run.workdir} is a run of {run.config.method}, but this command measures runs of {METHOD}"
        )
    return run, vae.make_network(run.method.image_shape, **run.config.vae)


def measure(
    workdir: str,
    *,
    split: str = "test",
    num_images: int | None = None,
    weights: str = "ema",
    seed: int = 0,
    num_draws: int = 50,
    batch_size: int | None = None,
    data_dir: str | None = None,
) -> dict[str, np.ndarray]:
    """Measures images of a split with the last checkpoint of a run; prints the means and writes them to a .json.

    Args:
      num_images: number of images, chosen by `data.choose`; None for all of the split.
      weights: "ema" or "raw".
      seed: seed of the draws of z.
      num_draws: K; the ELBO is averaged over K draws.
      batch_size: number of images at a time; affects memory and speed, and the result only by rounding.
      data_dir: where the data are; None for the path of the config.

    Returns:
      elbo, reconstruction, kl and log_p, float64 [N] in nats.

    Raises:
      ConfigError, DataError, CheckpointError, RunError: one line that says what to do.
    """
    run, network = load(workdir, weights)
    with options.errors_at("--seed"):
        key = make_keys(seed).evaluate
    dataset = run_data.data_of(run, split, data_dir)
    count = num_images or len(dataset)
    if count > len(dataset):
        raise RunError(f"{count} images requested, but {dataset.name}/{split} has {len(dataset)}")

    progress, found = Progress("image", count, 0, unit="images"), []
    chosen = data.choose(len(dataset), count)

    def examples(rows):
        return dataset.fetch(chosen[rows]), chosen[rows]

    for _, part in jobs.in_batches(
        make_bounds(network, num_draws), run.params, key, examples, progress, batch_size or 128
    ):
        found.append(part)
        progress.show()
    values = {
        name: np.concatenate([part[name] for part in found]).astype(np.float64) for name in found[0]
    }

    summary = {"num_images": count}
    for name, each in values.items():
        summary[name], summary[f"{name}_stderr"] = mean_and_error(each)
    recipe = run.recipe() | {"data": dataset.name, "split": split, "seed": seed}
    recipe |= {"num_draws": num_draws}
    name = run.name("elbo", split, f"seed{seed}", settings={"draws": num_draws})
    path = os.path.join(run.workdir, "eval", f"{name}.json")
    writers.save_result(path, summary | {"recipe": recipe, "software": parallel.banner()})
    texts = {name: _pm(*mean_and_error(each)) for name, each in values.items()}
    print(
        f"ELBO {texts['elbo']} nats: reconstruction {texts['reconstruction']}, KL {texts['kl']};"
        f" log p(x) at least {texts['log_p']} with {num_draws} importance weights\n"
        f"{os.path.basename(run.workdir)}, step {run.step:,}, {weights} weights, {network.latents}"
        f" latents: {count:,} images of {dataset.name}/{split}; ± is the standard error over"
        f" images\n{path}",
        flush=True,
    )
    return values


def _pm(mean: float, error: float | None) -> str:
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"


def plane(network: vae.Network, params) -> np.ndarray:
    """y(z) for a grid of z, evenly spaced in probability: z_1 to the right, z_2 upwards.

    As in Kingma & Welling, Figure 4, the inverse normal distribution function maps a regular grid on the unit square to
    z. Returns uint8 [PLANE², D], row by row from the top left.
    """
    axis = special.ndtri((np.arange(PLANE) + 0.5) / PLANE).astype(np.float32)
    z = np.stack(np.meshgrid(axis, -axis), axis=-1).reshape(-1, 2)
    return np.asarray(to_uint8(vae.decoded(network, params, z)))


def draw_plane(workdir: str, *, weights: str = "ema") -> str | None:
    """Writes the `plane` of a run with two latents.

    Returns:
      the path of the .png; None for another number of latents.

    Raises:
      ConfigError, CheckpointError, RunError: as `measure`.
    """
    run, network = load(workdir, weights)
    if network.latents != 2:
        return None
    images = plane(network, run.params).reshape(-1, *run.method.image_shape)
    path = os.path.join(run.workdir, "samples", f"{run.name('plane')}.png")
    writers.save_png(path, writers.grid(images, columns=PLANE, pad=0))
    print(f"the plane of latents: {path}", flush=True)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.vae",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--split", default="test", help="split of the data (default: test)")
    parser.add_argument("--num_images", type=int, help="number of images (default: all)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws of z (default: 0)")
    parser.add_argument(
        "--num_draws", type=int, default=50, help="draws of z for each image, K (default: 50)"
    )
    parser.add_argument("--batch_size", type=int, help="number of images at a time")
    parser.add_argument("--data_dir", help="where the data are (default: as in the config)")
    arguments = vars(parser.parse_args(argv))
    for name in ("num_images", "num_draws", "batch_size"):
        if arguments[name] is not None and arguments[name] < 1:
            parser.error(f"--{name} must be at least 1")
    parallel.enable_compilation_cache()
    try:
        measure(**arguments)
        draw_plane(arguments["workdir"], weights=arguments["weights"])
    except command_line.USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
