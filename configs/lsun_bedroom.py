"""LSUN Bedroom at 256×256, Ho et al. 2020, App. B.

    python -m ddpm_jax.main --config=configs/lsun_bedroom.py

113,673,219 parameters. The paper: 2,400,000 steps at 2.2 steps/s on a TPU v3-8, about 303 h, FID 6.36. Of the LSUN
sets, this is the only one that the paper does not flip.
The data set is tensorflow-datasets' lsun/bedroom, prepared beforehand, or your own copy with
--config.data.name=image_folder:PATH.

Measured: not run.
"""

from ddpm_jax.configs import celebahq256, variants


def get_config(variant: str = ""):
    config = celebahq256.get_config()
    config.data.name = "lsun/bedroom"
    config.data.flip = False
    config.training.num_steps = 2_400_000
    return variants.apply(config, variant)
