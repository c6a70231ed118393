"""ImageNet at 64×64 by class, the large model of Nichol & Dhariwal 2021.

    python -m ddpm_jax.main --config=configs/imagenet64_iddpm_class.py

273,049,350 parameters. The paper, Table 4: 250k steps of 2048 images; of 50k images drawn in 250 steps FID
2.92, precision 0.82, recall 0.71. Their code weights the bound of this model by λ = 1/T = 0.00025; here λ
is 0.001.
The data set is tensorflow-datasets' imagenet2012, prepared beforehand (manual download), cropped at the centre
and resized when it is read, as in the paper; imagenet_resized/64x64 is already resized and reads faster. Or
use your own copy with --config.data.name=image_folder:PATH. If 2048 images do not fit into memory, use
--config.step.accumulate=16.
The paper's bits/dim are of the validation images: --mode=nll --split=validation.

Measured: not run.
"""

from ddpm_jax.configs import imagenet64_iddpm, variants


def get_config(variant: str = ""):
    config = imagenet64_iddpm.get_config()
    config.data.name = "imagenet2012"
    config.model.channels = 192
    config.model.num_classes = 1000
    config.optimizer.learning_rate = 3e-4
    config.training.num_steps = 250_000
    config.training.batch_size = 2048
    return variants.apply(config, variant, smoke=smoke)


def smoke(config):
    """`variants.smoke`, whose random images have ten classes."""
    config = variants.smoke(config)
    config.model.num_classes = 10
    return config
