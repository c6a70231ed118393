"""Variants of every config, such as `--config=configs/NAME.py:smoke`."""

from ml_collections import ConfigDict


def smoke(config: ConfigDict) -> ConfigDict:
    """A run of the whole program within a minute on two CPU cores, without data files.

    Image channels, loss and schedule stay; images are random, of at most 32 pixels, and the network has two levels, one
    attention level and few channels.
    """
    height, width, channels = config.data.image_shape or (32, 32, 3)
    config.data.name = "synthetic"
    config.data.image_shape = (min(height, 32), min(width, 32), channels)
    if "channel_mults" in config.model:  # a U-Net; another network keeps its size
        config.model.channel_mults = config.model.channel_mults[:2]
        config.model.attention_resolutions = config.model.attention_resolutions[:1]
        config.model.channels = 8
        config.model.num_groups = 2
        config.model.num_res_blocks = 1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 5
    config.training.num_steps = 20
    config.training.batch_size = 8
    config.training.log_every = 5
    config.training.checkpoint_every = 10
    config.preview.every = 10
    config.preview.num_images = 8
    config.preview.steps = "10"
    return config


def apply(config: ConfigDict, variant: str, **more) -> ConfigDict:
    """The config, changed by the named variant; unchanged for an empty name.

    Args:
      more: further variants by name, functions like `smoke`.

    Raises:
      ValueError: an unknown variant.
    """
    variants = {"smoke": smoke, **more}
    if variant and variant not in variants:
        raise ValueError(f"no variant {variant!r} of this config; it has {', '.join(variants)}")
    return variants[variant](config) if variant else config
