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

The chain has T = 1000 in `ddpm` and `flow_logit`, 1024 in `v` and `min_snr`, and 1281 levels in `edm`. The columns are those of
experiments/frontier, between 300 samples and the training images; `bound` is in bits/dim, of 16 test images.

Expected: the order of the digits, with larger differences, since the network is further from converged.
Measured on two cores of an AMD EPYC server, jax 0.10.2, one run on each, 12 to 17 minutes a run beside other work. Mean ± standard deviation
over three seeds. 300 training images have a distance of 9.0 ± 1.8.

    row         ddim_10       ddim_20       ddim_50       dpm_10        dpm_20        heun_9        heun_19       bound
    ddpm        115.4 ± 5.8   95.9 ± 5.3    85.7 ± 6.0    82.8 ± 10.6   78.9 ± 2.5    107.1 ± 12.0  90.0 ± 5.5    4.07 ± 0.02
    v           71.2 ± 2.5    58.6 ± 2.8    51.6 ± 1.8    57.6 ± 1.7    47.8 ± 1.4    158.8 ± 5.7   64.4 ± 3.5    4.02 ± 0.01
    min_snr     78.7 ± 7.2    59.5 ± 4.6    49.8 ± 3.4    59.9 ± 5.3    46.5 ± 4.3    145.6 ± 20.8  71.1 ± 5.8    4.64 ± 0.05
    edm         78.7 ± 6.9    66.4 ± 6.2    60.4 ± 6.2    59.9 ± 7.3    57.6 ± 6.5    66.5 ± 6.0    54.2 ± 6.9    4.15 ± 0.03
    flow_logit  50.8 ± 4.3    41.9 ± 2.7    38.3 ± 1.5    —             —             61.1 ± 5.5    40.1 ± 2.0    5.84 ± 0.09

Trained again on two cores instead of one, flow_logit with seed 1, a cell drawn by chance, has 67.1 in heun_9 instead of 66.1.

Paired by seeds, ± standard error; a difference below two of them is called none. By Student's t three seeds need 4.3 for 95 %, which those
marked ? do not reach.
* The straight path leads in all columns of DDIM: in 50 calls flow_logit is 13.3 ± 1.8 better than v, in 10 calls it does not differ
  from v by DPM-Solver++ in 20 (3.0 ± 3.3). Its bound is 1.81 ± 0.05 worse.
* v is 34.1 ± 4.3 better than ddpm in 50 calls of DDIM, and its bound 0.042 ± 0.009 lower. Of `ddpm` many samples are noise.
* Otherwise than on the digits, Min-SNR does not differ from v in 50 calls (1.7 ± 1.8), is 7.5 ± 3.6 (?) worse in 10, and costs 0.62 ± 0.03
  bits/dim as there. EDM by Heun in 19 calls is no better than v by DDIM in 50 (2.6 ± 3.9).
* DPM-Solver++ is better than DDIM at equal calls for v: 13.5 ± 0.8 in 10 calls; in 20 it is 3.8 ± 0.3 better than DDIM in 50. Heun in 5 steps,
  evenly spaced in t, fails for v and Min-SNR; on the digits it was the best that Min-SNR has in about ten calls.
* Seeds matter: EDM has a standard deviation of 6 to 7 in most columns.
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
