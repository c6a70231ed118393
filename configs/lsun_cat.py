"""LSUN Cat at 256×256, Ho et al. 2020, App. B.

    python -m ddpm_jax.main --config=configs/lsun_cat.py

113,673,219 parameters. The paper: 1,800,000 steps at 2.2 steps/s on a TPU v3-8, about 227 h, FID 19.75. According to the
paper images are flipped; its script has flipping commented out.
The data set is tensorflow-datasets' lsun/cat, prepared beforehand, or your own copy with
--config.data.name=image_folder:PATH.

Measured: not run.
"""

from ddpm_jax.configs import celebahq256, variants


def get_config(variant: str = ""):
    config = celebahq256.get_config()
    config.data.name = "lsun/cat"
    config.data.flip = True
    config.training.num_steps = 1_800_000
    return variants.apply(config, variant)
