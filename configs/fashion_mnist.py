"""Fashion-MNIST, 28×28.

    python -m ddpm_jax.main --config=configs/fashion_mnist.py          one accelerator
    python -m ddpm_jax.main --config=configs/fashion_mnist.py:cpu      two CPU cores

The archives are read from data/fashion_mnist, or downloaded there (31 MB). Vilhes' own settings are those of experiments/fashion_mnist_ddpm.

It predicts v with the cosine schedule. Against ε with the linear schedule of Ho et al., in three trainings of 1,000 steps of `:cpu`: Fréchet
distance by DDIM in 50 calls 51.6 ± 1.8 instead of 85.7 ± 6.0, bound of 16 images lower by 0.042 ± 0.009 bits/dim; see experiments/frontier_fashion.py.

Measured with ε and the linear schedule, `:cpu`, on two cores of an AMD EPYC server shared with other work, jax 0.10.2: 4000 steps of 32
images in 64 minutes, 34 images/s in the median log line and 50 in the best (at that speed the run takes
43 minutes); compiled in 31 s; L_simple 0.041 over the last 500 steps, by quarters of t 0.131, 0.025, 0.005,
0.001. Most images drawn by DDIM in 50 steps are clearly shirts, trousers, dresses, shoes or bags; about one in
four shows a mottled texture.
Measured with the same, the full config: 2,919 steps of 128 in bfloat16 on one H100 beside another training, two minutes, learning
rate 6e-4 with a cosine; samples in docs/images. Not run at full length.
"""

from ddpm_jax.configs import cifar10, variants


def get_config(variant: str = ""):
    config = cifar10.get_config()
    config.data.name = "fashion_mnist"
    config.data.image_shape = (28, 28, 1)
    config.data.flip = False  # shoes point one way

    config.schedule.name = "cosine"
    config.diffusion.prediction = "v"

    config.model.channels = 64
    config.model.channel_mults = (1, 2, 2)
    config.model.attention_resolutions = (14,)

    config.optimizer.warmup_steps = 1000
    config.step.ema_decay = 0.999
    config.step.ema_warmup = True
    config.training.num_steps = 100_000
    return variants.apply(config, variant, cpu=cpu)


def cpu(config):
    """A network and a run of forty minutes on two CPU cores."""
    config.model.channels = 32
    config.model.num_groups = 8
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (7,)
    config.model.dropout = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.decay = "cosine"
    config.training.num_steps = 4000
    config.training.batch_size = 32
    config.training.log_every = 50
    config.training.checkpoint_every = 500
    config.preview.every = 500
    config.preview.num_images = 32
    return config
