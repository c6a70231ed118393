"""Quality for compute on Fashion-MNIST: do the best methods of the digits (experiments/frontier) lead at 28×28 too?

    python -m experiments.feature_classifier --data=fashion_mnist --data_dir=data/fashion_mnist --out=runs/fashion_mnist_classifier.npz
    python -m experiments.sweep experiments/frontier_fashion.py --size=cpu --run --seeds=3 --table --page

Every row trains the network of configs/fashion_mnist.py:cpu on the same images in the same order, 1,000 steps of 32.

    row          what it is
    ddpm         ε, linear β; Ho et al. 2020
    v            v, cosine ᾱ; Salimans & Ho 2022
    min_snr      v, cosine ᾱ, Min-SNR-5 weights; Hang et al. 2023
    edm          preconditioned, ln σ normal; Karras et al. 2022
    flow_logit   straight path, velocity, u logit-normal; Esser et al. 2024

The columns are those of experiments/frontier, between 300 samples and the training images; `bound` is in bits/dim, of 16
test images.

Expected: the order of the digits, with larger differences, since the network is further from converged.
Measured: not run.
"""

from ddpm_jax.configs import fashion_mnist
from ddpm_jax.experiments.frontier import config as digits_table

FEATURES = "--features=experiments.feature_classifier:runs/fashion_mnist_classifier.npz"
STEPS = {"": 20_000, "cpu": 1000}
COLUMNS = ("ddim_10", "ddim_20", "ddim_50", "dpm_10", "dpm_20", "heun_9", "heun_19")


def get_config(variant: str = ""):
    return fashion_mnist.get_config(variant)


def rows(size: str) -> dict[str, dict]:
    changes = {
        "ddpm": digits_table.EPS | {"config.schedule.name": "linear"},
        "v": digits_table.V,
        "min_snr": digits_table.V | {"config.diffusion.min_snr_gamma": 5.0},
        "edm": {
            "config.schedule.name": "exploding",
            "config.schedule.num_timesteps": 1281,
            "config.diffusion.prediction": "edm",
            "config.diffusion.t_sampling": "experiments.edm:LogNormal",
            "config.preview.sampler": "heun",
            "config.preview.steps": "18",
        },
        "flow_logit": {
            "config.schedule.name": "straight",
            "config.diffusion.prediction": "velocity",
            "config.diffusion.t_sampling": "experiments.flow_matching:LogitNormal",
            "config.preview.sampler": "experiments.flow_matching:Euler",
        },
    }
    if size == "smoke":
        return {row: changes[row] for row in ("ddpm", "min_snr")}  # the rest as in frontier
    fields = ("training.num_steps", "training.checkpoint_every", "preview.every")
    common = {f"config.{field}": STEPS[size] for field in fields}
    return {row: changes[row] | common for row in changes}


def evaluations(size: str, row: str) -> dict[str, list[str]]:
    if size == "smoke":  # without data there is no classifier
        return {"bound": ["--mode=nll", "--num_images=8", "--steps=1"]}
    images = ["--num_samples=300", "--batch_size=100"] if size == "cpu" else ["--num_samples=10000"]
    judged = ["--mode=eval", "--metrics=fid", FEATURES, *images]
    samplers = digits_table.samplers(row)
    columns = [name for name in COLUMNS if name in samplers]
    bound = ["--mode=nll", *(["--num_images=16"] if size == "cpu" else [])]
    return {name: [*judged, *samplers[name]] for name in columns} | {"bound": bound}


def charts(size: str) -> dict[str, tuple[str, dict]]:
    """{title: (name of x, {curve: [(row, column, x), …]})} of the page."""
    result = {}
    for sampler, name in {"ddim": "DDIM", "heun": "Heun", "dpm": "DPM-Solver++"}.items():
        columns = [column for column in COLUMNS if column.startswith(sampler)]
        curves = {row: [(row, c, int(c.rpartition("_")[2])) for c in columns] for row in rows(size)}
        result[f"distance by {name}"] = "network calls", curves
    return result
