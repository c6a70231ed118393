"""ImageNet at 64×64 without labels, Nichol & Dhariwal 2021.

    python -m ddpm_jax.main --config=configs/imagenet64_iddpm.py

121,063,942 parameters. The paper, Table 1: 1.5M steps of L_hybrid, FID 19.2, 3.57 bits/dim; after 200k steps
28.0 and 3.62. With --config.diffusion.loss=vlb --config.diffusion.t_sampling=importance: 40.1 and 3.53.
The data set is tensorflow-datasets' downsampled_imagenet/64x64, the files that the paper used (van den Oord
et al. 2016), prepared beforehand, or your own copy with --config.data.name=image_folder:PATH.
The paper's bits/dim are of the validation images: --mode=nll --split=validation.

Measured: not run.
"""

from ddpm_jax.configs import cifar10_iddpm, variants


def get_config(variant: str = ""):
    config = cifar10_iddpm.get_config()
    config.data.name = "downsampled_imagenet/64x64"
    config.data.image_shape = (64, 64, 3)
    config.model.channel_mults = (1, 2, 3, 4)
    config.model.dropout = 0.0
    config.training.num_steps = 1_500_000
    return variants.apply(config, variant)
