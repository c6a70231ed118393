"""Schedule, loss and learned variance: Nichol & Dhariwal 2021, Table 2.

    python -m experiments.sweep experiments/iddpm_table2                   prints the commands of the full size
    python -m experiments.sweep experiments/iddpm_table2 --run             CIFAR-10, six runs of configs/cifar10_iddpm.py
    python -m experiments.sweep experiments/iddpm_table2 --size=cpu --run  Fashion-MNIST, on two CPU cores

The paper, CIFAR-10 after 500k steps:

    row               T     schedule  trained with                          bits/dim  FID
    linear_simple_1k  1000  linear    L_simple                              3.73       3.29
    linear_simple     4000  linear    L_simple                              3.37       2.90
    linear_hybrid     4000  linear    L_hybrid                              3.26       3.07
    cosine_simple     4000  cosine    L_simple                              3.26       3.05
    cosine_hybrid     4000  cosine    L_hybrid                              3.17       3.19
    cosine_vlb        4000  cosine    L_vlb, t drawn by importance          2.94      11.47

At T = 4000 both ends of the linear schedule are a quarter of those at 1000. Dropout is 0.1 with linear, 0.3 with cosine.
`:cpu` has four of the rows, with T = 1000, so that a bound takes about 6 s per image on two cores.

The columns are variances of the reverse process. A model trained with L_simple is measured with the fixed variance and
with the optimal one, the analytic variance (Bao et al. 2022), computed from its errors on 64 training images.

Expected: each change lowers the bound, in the order of the paper's rows, and a learned variance is nearly as good as
the analytic one of the same schedule.
Measured, :cpu, two cores of an AMD EPYC server, jax 0.10.2, 64 images of the test set, EMA weights; ± is the
standard error over images, and of a difference that of the differences image by image:

    row            variance       bits/dim        less the first
    linear_simple  fixed_large    3.704 ± 0.113
    linear_simple  fixed_small    3.718 ± 0.135   +0.014 ± 0.022
    linear_simple  analytic       3.556 ± 0.123   -0.148 ± 0.009
    linear_hybrid  learned_range  3.476 ± 0.122   -0.228 ± 0.009

Each row was trained once, and ± is over images; the difference between rows 1 and 4 includes the spread between
trainings, which was not measured (--seeds=3). fixed_small and fixed_large are not distinguishable here. The order of
the others is that of the literature. L_0 is 1.61 and the error of x̂_0 equal in all rows: the difference is in the
variance of the later steps. Training a row took 28 min and measuring it 7 min, on one core each. The second line is
--mode=nll --num_images=64 --variance=fixed_small on the run of the first.
Not run: the two cosine rows, and other seeds.
Measured, the full size, which has FID of 50,000 samples too: not run. `:smoke`: every row
trains and is evaluated, 7 minutes on two cores of an AMD EPYC server beside other work.
"""

from ddpm_jax.configs import cifar10_iddpm, fashion_mnist, variants


def get_config(variant: str = ""):
    return variants.apply(cifar10_iddpm.get_config(), variant, cpu=cpu)


def cpu(config):
    """configs/fashion_mnist.py:cpu with ε, half as long, with its T = 1000."""
    config = fashion_mnist.get_config("cpu")
    config.diffusion.prediction = "eps"
    config.training.num_steps = 2000
    return config


SIMPLE = {"config.diffusion.loss": "simple", "config.diffusion.variance": "fixed_large"}
HYBRID = {"config.diffusion.loss": "hybrid", "config.diffusion.variance": "learned_range"}
VLB = {
    "config.diffusion.loss": "vlb",
    "config.diffusion.variance": "learned_range",
    "config.diffusion.t_sampling": "importance",
    "config.step.clip": "none",  # as in the paper; `:cpu` has a clip that fits L_simple
}


def rows(size: str) -> dict[str, dict]:
    linear, cosine = {"config.schedule.name": "linear"}, {"config.schedule.name": "cosine"}
    if size == "cpu":
        return {
            "linear_simple": linear | SIMPLE,
            "linear_hybrid": linear | HYBRID,
            "cosine_hybrid": cosine | HYBRID,
            "cosine_vlb": cosine | VLB,
        }
    linear |= {"config.model.dropout": 0.1}
    linear_1k = linear | {"config.schedule.num_timesteps": 1000}
    linear |= {"config.schedule.start": 1e-4 / 4, "config.schedule.end": 0.02 / 4}
    return {
        "linear_simple_1k": linear_1k | SIMPLE,
        "linear_simple": linear | SIMPLE,
        "linear_hybrid": linear | HYBRID,
        "cosine_simple": cosine | SIMPLE,
        "cosine_hybrid": cosine | HYBRID,
        "cosine_vlb": cosine | VLB,
    }


def evaluations(size: str, row: str) -> dict[str, list[str]]:
    variance = rows(size)[row]["config.diffusion.variance"]
    variances = [variance, "analytic"] if variance == "fixed_large" else [variance]
    images = {"": [], "cpu": ["--num_images=64"], "smoke": ["--num_images=8", "--steps=10"]}
    bounds = {name: ["--mode=nll", f"--variance={name}", *images[size]] for name in variances}
    return bounds | ({} if size else {"samples": ["--mode=eval", "--metrics=fid"]})
