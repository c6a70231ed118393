"""CIFAR-10, the network and the run of Ho et al. 2020, App. B; the base of the other configs.

    python -m ddpm_jax.main --config=configs/cifar10.py

35,746,307 parameters. The paper: 800k steps in 10.6 h on a TPU v3-8 (21 steps/s), then FID 3.17 against
the training set, IS 9.46, at most 3.75 bits/dim; its FID is the lowest seen while training. The clip of
its code works on each replica's gradient: --config.step.clip=per_replica.

`:smoke` is a minute's run of the same program, shrunk: see `configs/variants.py`.

Measured here: 6,636 steps of 128 in bfloat16 on one H100, 5,492 images/s, on JPEG-compressed CIFAR-10
(`cifar10_jpeg75`), learning rate 3e-4, EMA 0.9995 with warm-up; samples in docs/images. Not run at full length.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ddpm_jax.configs import variants


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.method = "ddpm_jax.ddpm"  # a module with make(config) -> Method
    config.seed = 0
    config.init_from = placeholder(str)  # a run directory, whose EMA weights are the first weights

    config.data = ConfigDict()
    config.data.name = "cifar10"  # see ddpm_jax.data.load: also npz:PATH, image_folder:PATH, …
    config.data.data_dir = "data"  # folder that archives are read from or downloaded to
    config.data.image_shape = (32, 32, 3)  # None in your own config: the shape of the data
    config.data.flip = True  # mirror training images at random
    config.data.shift = 0  # move training images at random, by up to this many pixels
    config.data.flatten = False  # image_folder: True takes pictures at any depth, without classes
    config.data.skip_broken = False  # image_folder: True leaves out pictures that cannot be decoded
    config.data.background = "white"  # behind transparent pictures; or "black", "#808080"
    config.data.memory_limit_gb = 4.0  # larger data sets are decoded on demand

    config.model = ConfigDict()
    config.model.channels = 128
    config.model.channel_mults = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16,)
    config.model.num_heads = 1
    config.model.head_channels = 0  # if above 0: channels of each head, instead of num_heads
    config.model.dropout = 0.1
    config.model.scale_shift = False
    config.model.num_classes = 0  # 0: unconditional; -1: the number of classes of the data
    config.model.num_groups = 32  # of each norm, or the next lower divisor of its channels
    config.model.dtype = "float32"  # or "bfloat16"
    config.model.remat = False

    config.schedule = ConfigDict()
    config.schedule.name = "linear"  # see ddpm_jax.schedules: quad, cosine, betas, …
    config.schedule.num_timesteps = 1000  # for "betas": set to the length of the list
    config.schedule.start = placeholder(float)  # None: the schedule's default, here 1e-4
    config.schedule.end = placeholder(float)  # None: the schedule's default, here 0.02
    config.schedule.betas = placeholder(tuple)  # your own list, for the name "betas"

    config.diffusion = ConfigDict()
    config.diffusion.prediction = "eps"  # or "x_0", "mean", "v"
    config.diffusion.variance = "fixed_large"  # or "fixed_small", "learned", "learned_range"
    config.diffusion.loss = "simple"  # or "vlb"; "hybrid" with a learned variance
    config.diffusion.t_sampling = "uniform"  # or "antithetic", "importance"
    config.diffusion.min_snr_gamma = placeholder(float)  # None: L_simple without weights
    config.diffusion.label_dropout = 0.0  # with classes: 0.1 allows guidance
    config.diffusion.clip_x0 = True

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # or "adamw"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 5000
    config.optimizer.decay = "none"  # or "cosine"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0  # for "adamw"

    config.step = ConfigDict()
    config.step.accumulate = 1  # parts of a batch, computed one after the other to save memory
    config.step.clip = "global"  # or "per_replica", "none"
    config.step.max_grad_norm = 1.0
    config.step.ema_decay = 0.9999
    config.step.ema_warmup = False

    config.training = ConfigDict()
    config.training.num_steps = 800_000
    config.training.batch_size = 128  # over all devices
    config.training.log_every = 100
    config.training.checkpoint_every = 5000
    config.training.checkpoint_minutes = 10.0  # maximum time between checkpoints
    config.training.keep = 3

    config.preview = (
        ConfigDict()
    )  # samples during training; other fields are options of Method.sample
    config.preview.every = 5000
    config.preview.num_images = 16
    config.preview.sampler = "ddim"
    config.preview.steps = "50"
    config.preview.nearest = False  # at the end: samples beside the training images nearest to them
    return variants.apply(config, variant)
