"""CelebA-HQ at 256×256, the network and the run of Ho et al. 2020, App. B; the base of the LSUN configs.

    python -m ddpm_jax.main --config=configs/celebahq256.py

113,673,219 parameters. The paper: 500k steps at 2.2 steps/s on a TPU v3-8, about 63 h; no FID given.
The data set is tensorflow-datasets' celeb_a_hq/256, prepared beforehand (manual download), or your own
copy with --config.data.name=image_folder:PATH.

Measured: not run.
"""

from ddpm_jax.configs import cifar10, variants


def get_config(variant: str = ""):
    config = cifar10.get_config()
    config.data.name = "celeb_a_hq/256"
    config.data.image_shape = (256, 256, 3)
    config.model.channel_mults = (1, 1, 2, 2, 4, 4)
    config.model.dropout = 0.0
    config.diffusion.variance = "fixed_small"
    config.optimizer.learning_rate = 2e-5
    config.training.batch_size = 64
    config.training.num_steps = 500_000
    return variants.apply(config, variant)
