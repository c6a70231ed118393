"""What the network predicts and which loss it is trained with: Ho et al. 2020, Table 2.

    python -m experiments.sweep experiments/ho2020_table2                   prints the commands of the full size
    python -m experiments.sweep experiments/ho2020_table2 --run             CIFAR-10, six runs of configs/cifar10.py
    python -m experiments.sweep experiments/ho2020_table2 --size=cpu --run  Fashion-MNIST, on two CPU cores

The paper, CIFAR-10, IS and FID from Table 2, bits/dim of the test set (of the training set) from Table 1:

    row              predicts  trained with                      IS           FID    bits/dim
    mean_learned     mean      L, learned diagonal variance      7.28 ± 0.10  23.69
    mean_fixed       mean      L, fixed isotropic variance       8.06 ± 0.09  13.22
    mean_unweighted  mean      the unweighted squared error      unstable
    eps_learned      eps       L, learned diagonal variance      unstable
    eps_fixed        eps       L, fixed isotropic variance       7.67 ± 0.13  13.51  ≤ 3.70 (3.69)
    eps_simple       eps       L_simple                          9.46 ± 0.11   3.17  ≤ 3.75 (3.72)

Unstable: the paper leaves these entries blank, for poor samples with scores out of range.
`L` here is T times one random term. The paper's code trains on the term alone, so its clip of 1 is ours of T.

Expected: eps_fixed has the lower bound, eps_simple the better samples; a learned variance gains nothing.
Measured: not run at full size (no accelerator at hand), nor at `:cpu`. `:smoke`: every row trains and is evaluated,
5 minutes on two cores of an AMD EPYC server beside other work. FID and IS, of 50,000 samples, are measured at full
size only.
"""

from configs import cifar10, fashion_mnist, variants


def get_config(variant: str = ""):
    return variants.apply(cifar10.get_config(), variant, cpu=cpu)


def cpu(config):
    """configs/fashion_mnist.py:cpu, half as long."""
    config = fashion_mnist.get_config("cpu")
    config.training.num_steps = 2000
    return config


FIXED = {"config.diffusion.variance": "fixed_large"}
LEARNED = {"config.diffusion.variance": "learned"}
SIMPLE = {"config.diffusion.loss": "simple"}
L = {"config.diffusion.loss": "vlb", "config.step.max_grad_norm": 1000.0}


def rows(size: str) -> dict[str, dict]:
    del size  # the same at all
    mean = {"config.diffusion.prediction": "mean"}
    eps = {"config.diffusion.prediction": "eps"}
    return {
        "mean_learned": mean | L | LEARNED,
        "mean_fixed": mean | L | FIXED,
        "mean_unweighted": mean | SIMPLE | FIXED,
        "eps_learned": eps | L | LEARNED,
        "eps_fixed": eps | L | FIXED,
        "eps_simple": eps | SIMPLE | FIXED,
    }


def evaluations(size: str, row: str) -> dict[str, list[str]]:
    del row  # the same for all: the bound with the variance of training
    images = {"": [], "cpu": ["--num_images=64"], "smoke": ["--num_images=8"]}
    samples = {} if size else {"samples": ["--mode=eval", "--metrics=fid,is"]}
    return {"nll": ["--mode=nll", *images[size]], **samples}
