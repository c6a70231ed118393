"""LSUN Church at 256×256, Ho et al. 2020, App. B.

    python -m ddpm_jax.main --config=configs/lsun_church.py

113,673,219 parameters. The paper: 1,200,000 steps at 2.2 steps/s on a TPU v3-8, about 152 h, FID 7.89. Published weights
for this set are from 4.4M steps; the paper trained for 1.2M.
The data set is tensorflow-datasets' lsun/church_outdoor, prepared beforehand, or your own copy with
--config.data.name=image_folder:PATH.

Measured: not run.
"""

from ddpm_jax.configs import celebahq256, variants


def get_config(variant: str = ""):
    config = celebahq256.get_config()
    config.data.name = "lsun/church_outdoor"
    config.data.flip = True
    config.training.num_steps = 1_200_000
    return variants.apply(config, variant)
