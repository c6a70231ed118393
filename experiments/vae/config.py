"""Kingma & Welling 2014, Auto-Encoding Variational Bayes, on MNIST: 20 latents, or 2 (`:2`).

    python -m ddpm_jax.main --config=experiments/vae/config.py --workdir=runs/vae_20       815,824 parameters
    python -m ddpm_jax.main --config=experiments/vae/config.py:2 --workdir=runs/vae_2      788,788 parameters
    python -m experiments.vae --workdir=runs/vae_20                                        measures it
    python -m experiments.vae.draws --out=runs/vae_draws                                   with more draws of z

Training is a hundred epochs of Adam in batches of 100; Kingma & Welling use Adagrad with a small weight decay.

Expected: about -100 nats with 20 latents, as in Kingma & Welling's Figure 2; a lower ELBO with 2 latents, and a plane
of digits as in their Figure 4 (Figure 2 begins at 3 latents).
Measured on one core of an AMD EPYC server that did other work too, with jax 0.10.2, in 20 and 23 minutes: the median
speed was 4800 images/s, the highest 13,400, at which a run takes 8 minutes. The third command gave these nats per image for
the 10,000 test images, with EMA weights; ± is the standard error over images:

    latents   ELBO               reconstruction    KL              log p, 50 weights   ELBO in training
    20        -100.00 ± 0.24      74.43 ± 0.20     25.58 ± 0.05     -96.71 ± 0.23       -99.18
    2         -148.51 ± 0.53     141.84 ± 0.54      6.67 ± 0.01    -144.82 ± 0.51      -140.66

The last column is the ELBO of the last 600 steps on the training set: with 2 latents the network overfits by
8 nats, with 20 by 1. The plane of the second run contains every digit, with smooth transitions; of 64 images
drawn from the first (`--mode=sample`) about two in three are readable.
"""

from ml_collections import ConfigDict

from ddpm_jax.configs import mnist, variants


def get_config(variant: str = ""):
    config = mnist.get_config()
    config.method = "experiments.vae"
    for section in ("model", "schedule", "diffusion"):
        del config[section]
    config.vae = ConfigDict()
    config.vae.latents = 20
    config.vae.hidden = 500

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 0
    config.optimizer.decay = "cosine"
    config.step.clip = "none"  # the loss is a sum over pixels, and so is its gradient
    config.training.num_steps = 60_000  # a hundred epochs
    config.training.batch_size = 100  # as in Kingma & Welling
    config.training.log_every = 600
    config.training.checkpoint_every = 6000
    config.preview = ConfigDict({"every": 6000, "num_images": 32})
    return variants.apply(config, variant, smoke=smoke, **{"2": two})


def two(config: ConfigDict) -> ConfigDict:
    """Two latents, so that the whole plane can be drawn."""
    config.vae.latents = 2
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """A run of the whole program within a minute, without data files."""
    config.data.name = "synthetic"
    config.data.image_shape = (8, 8, 1)
    config.vae.latents = 2
    config.vae.hidden = 16
    config.training.num_steps = 20
    config.training.batch_size = 8
    config.training.log_every = 5
    config.training.checkpoint_every = 10
    config.preview = ConfigDict({"every": 10, "num_images": 8})
    return config
