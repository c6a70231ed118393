"""MNIST, 28×28, on one accelerator.

    python -m ddpm_jax.main --config=configs/mnist.py

The archives are downloaded to data/mnist, 12 MB, or found there. Hyper-parameters after configs/cifar10.py
with half the channels and three levels (28, 14, 7).

Measured: not run (no accelerator at hand). `:cpu` is the same network and run as that of
configs/fashion_mnist.py, whose numbers stand there.
"""

from ddpm_jax.configs import fashion_mnist, variants


def get_config(variant: str = ""):
    config = fashion_mnist.get_config()
    config.data.name = "mnist"
    return variants.apply(config, variant, cpu=fashion_mnist.cpu)
