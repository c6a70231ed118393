"""Linear or cosine at 28×28? Statements of Sedykh (§2.1, §3) and Tang (§1) on the schedule, tested on Fashion-MNIST.

    python -m experiments.feature_classifier --data=fashion_mnist --out=runs/fashion_mnist_classifier.npz
    python -m experiments.sweep experiments/schedules --size=cpu --run --table
    python -m ddpm_jax.main --mode=report --workdir=runs/schedules/cpu/linear,runs/schedules/cpu/cosine

The last command writes a page with SNR and ᾱ of both, the bound by t, and samples of S = 50 steps. `cpu` uses
configs/fashion_mnist.py:cpu, the full size configs/fashion_mnist.py, both with ε.

    row      schedule
    linear   β from 1e-4 to 0.02, Ho et al. 2020
    cosine   ᾱ = cos²(…), β at most 0.999, Nichol & Dhariwal 2021

Tang states that the chain forgets the image if Σβ_t diverges. Sedykh states, after Nichol & Dhariwal, that the linear
schedule destroys images too fast towards its end, so that its last steps are of little use, and that it is sub-optimal
for images of 32 and 64 pixels. The columns test this. `bound` is the bound of the whole chain. The others are squared
Fréchet distances of 64 classifier features between 300 samples, for each of three seeds, and the training images: for
S = 50 evenly spaced steps, by DDIM and by the ancestral sampler; and `tail`, for the ancestral sampler with 40 steps,
evenly spaced over the first four fifths of the chain, starting from pure noise there.

Expected: leaving out the last fifth does not matter for the linear chain, but does for the cosine chain; the cosine
bound is lower (their Table 2: 3.26 instead of 3.37 bits/dim on CIFAR-10, T = 4000).
Measured, cpu, one core per row of an AMD EPYC server, jax 0.10.2, 17 minutes per row after training (37 minutes, two
cores); bits/dim of 64 test images ± the standard error over them, distances ± the standard deviation over seeds:

    row      ᾱ_T      ᾱ_800    bound           ddim          ancestral     tail
    linear   4.0e-5   0.0015   3.581 ± 0.110   28.6 ± 5.7    35.8 ± 5.2     30.6 ± 1.6
    cosine   2.4e-9   0.0940   3.408 ± 0.112   32.0 ± 4.9    27.7 ± 3.1    178.7 ± 1.4

Each row was trained once: ± is over images or over seeds of the sampler, and the spread between trainings was not
measured (--seeds=3). Image by image the cosine bound of these two is lower by 0.173 ± 0.004; its L_0 is lower by 0.41,
and its other terms are higher by 0.24; whether other trainings have the same order is open. The last fifth contributes
0.0007 bits/dim to the linear bound and 0.0148 to the cosine bound. Without the last fifth of the cosine chain the
distance is 27 standard deviations larger, and most garments become mottled lumps; without that of the linear chain it
is not distinguishable from 50 steps of the whole chain (35.8 ± 5.2 and 30.6 ± 1.6): Sedykh's statement holds at 28×28.
L_T, the cost of ᾱ_T, is 2e-5 and 1e-9 bits/dim, so Σβ_t = 10.05 is enough. Not distinguishable are the samples of the
two schedules in 50 steps, by DDIM (28.6 ± 5.7, 32.0 ± 4.9) and by the ancestral sampler (35.8 ± 5.2, 27.7 ± 3.1).
Measured, the full size: not run.
"""

import numpy as np

from ddpm_jax.configs import fashion_mnist

FEATURES = "--features=experiments.feature_classifier:runs/fashion_mnist_classifier.npz"
FIRST_FOUR_FIFTHS = str(np.linspace(0, 799, 40).round().astype(int).tolist()).replace(" ", "")


def get_config(variant: str = ""):
    config = fashion_mnist.get_config(variant)
    config.diffusion.prediction = "eps"
    return config


def rows(size: str) -> dict[str, dict]:
    del size  # the same for every size
    return {name: {"config.schedule.name": name} for name in ("linear", "cosine")}


def evaluations(size: str, row: str) -> dict[str, list[str]]:
    del row  # the same for both
    if size == "smoke":  # without data there is no classifier
        return {"bound": ["--mode=nll", "--num_images=8", "--steps=10"]}
    images = {"": "--num_samples=10000", "cpu": "--num_samples=300"}[size]
    samples = ["--mode=eval", "--metrics=fid", FEATURES, images, "--num_seeds=3"]
    return {
        "bound": ["--mode=nll", *(["--num_images=64"] if size == "cpu" else [])],
        "ddim": [*samples, "--sampler=ddim", "--steps=50"],
        "ancestral": [*samples, "--sampler=ancestral", "--steps=50"],
        "tail": [*samples, "--sampler=ancestral", f"--steps={FIRST_FOUR_FIFTHS}"],
    }
