"""MNIST, 28×28, on one accelerator.

    python -m ddpm_jax.main --config=configs/mnist.py

The archives are read from data/mnist, or downloaded there (12 MB). All settings, also those of `:cpu`, are those of
configs/fashion_mnist.py: v, the cosine schedule, and the network of configs/cifar10.py with half the channels and three levels
(28, 14, 7).

Measured: not run. The times in configs/fashion_mnist.py are those of the same network.
"""

from ddpm_jax.configs import fashion_mnist, variants


def get_config(variant: str = ""):
    config = fashion_mnist.get_config()
    config.data.name = "mnist"
    return variants.apply(config, variant, cpu=fashion_mnist.cpu)
