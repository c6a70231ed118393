"""The variational auto-encoder on MNIST with 20 latents, or with 2 (`:2`); see the package.

python -m ddpm_jax.main --config=experiments/vae/config.py --workdir=runs/vae_20
python -m ddpm_jax.main --config=experiments/vae/config.py:2 --workdir=runs/vae_2
"""

from ml_collections import ConfigDict

from configs import mnist, variants


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
    config.training.batch_size = 100  # Kingma & Welling's
    config.training.log_every = 600
    config.training.checkpoint_every = 6000
    config.preview = ConfigDict({"every": 6000, "num_images": 32})
    return variants.apply(config, variant, smoke=smoke, **{"2": two})


def two(config: ConfigDict) -> ConfigDict:
    """Few enough latents to draw all of them."""
    config.vae.latents = 2
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """The whole program within a minute, and without a file of data."""
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
