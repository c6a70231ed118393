"""The experiment of Vilhes 2024 (§5.2, §6, §7), a DDPM on Fashion-MNIST, with the numbers that the text does not give.

    python -m experiments.feature_classifier --data=fashion_mnist --out=runs/fashion_mnist_classifier.npz
    python -m experiments.sweep experiments/fashion_mnist_ddpm --size=cpu --run --table
    python -m ddpm_jax.main --mode=report --workdir=runs/fashion_mnist_ddpm/cpu/ddpm

The text has T = 1000, β linear from 1e-4 to 0.02, images in [−1, 1], a U-Net with sinusoidal embedding of t,
L_simple, and Algorithm 2 with σ² = β_t. Its result is a picture of samples, Figure 4, without a number. It does not
give the sizes of network and training; they are those of `configs/fashion_mnist.py`, or its `:cpu` for `cpu`. The only
row is `ddpm`.

The columns: `bound` in bits/dim with σ² = β_t; and, for samples of the whole chain, the squared Fréchet distance of 64
classifier features from those of the training images: `algorithm_2` as printed, `clipped` with x̂_0 clipped to
[−1, 1] in each step, as in Ho et al.'s code but in neither text, and `posterior` clipped and with σ² = β̃_t.

Expected: clipping helps a model that is far from fully trained; the two variances are alike on the whole chain.
Measured, cpu, one core of an AMD EPYC server, jax 0.10.2, 64 test images and 300 samples of seed 0:

    row    bound           algorithm_2   clipped   posterior
    ddpm   3.581 ± 0.110   15.49         15.82     15.73

For the first 300 test images the distance is 9.80, the bias of so small a sample. This is one seed, and seeds differ by
about 5 at 50 steps (experiments/schedules), so the three are not distinguishable: whether clipping or σ² matters is not
decided (`clipped` is the same cell as in experiments/ddim_table1). L_simple was 0.041 at the end of the 4000 steps, by
quarters of t 0.131, 0.025, 0.005, 0.001. Of the first 64 samples of Algorithm 2, about five in six are convincing
shirts, trousers, dresses, shoes or bags; the others have holes or torn outlines.
Measured, the full size: not run.
"""

from ddpm_jax.configs import fashion_mnist

FEATURES = "--features=experiments.feature_classifier:runs/fashion_mnist_classifier.npz"


def get_config(variant: str = ""):
    config = fashion_mnist.get_config(variant)
    config.schedule.name, config.diffusion.prediction = "linear", "eps"
    return config


def rows(size: str) -> dict[str, dict]:
    del size  # the same for every size
    return {"ddpm": {}}


def evaluations(size: str, row: str) -> dict[str, list[str]]:
    del row  # there is only one
    if size == "smoke":  # without data there is no classifier
        return {"bound": ["--mode=nll", "--num_images=8", "--steps=10"]}
    images = {"": "--num_samples=10000", "cpu": "--num_samples=300"}[size]
    samples = ["--mode=eval", "--metrics=fid", FEATURES, images, "--sampler=ancestral"]
    return {
        "bound": ["--mode=nll", *(["--num_images=64"] if size == "cpu" else [])],
        "algorithm_2": [*samples, "--noclip"],
        "clipped": samples,
        "posterior": [*samples, "--variance=fixed_small"],
    }
