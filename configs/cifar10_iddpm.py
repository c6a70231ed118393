"""CIFAR-10 with learned variances, the network and the run of Nichol & Dhariwal 2021; the base of the ImageNet configs.

    python -m ddpm_jax.main --config=configs/cifar10_iddpm.py

52,546,438 parameters, 4000 steps of the cosine schedule, L_hybrid. The paper, Table 2: 500k steps, FID 3.19,
3.17 bits/dim. The other rows of that table are experiments/iddpm_table2.

Two differences from the paper's code: it multiplies t by 1000/T before the embedding, while here the embedding
takes t = 0 … T−1; and the embedding and the initial weights here are those of Ho et al.

Measured: not run.
"""

from ddpm_jax.configs import cifar10, variants


def get_config(variant: str = ""):
    config = cifar10.get_config()
    config.data.flip = False

    config.model.num_res_blocks = 3
    config.model.attention_resolutions = (16, 8)
    config.model.num_heads = 4
    config.model.dropout = 0.3  # 0.1 with the linear schedule
    config.model.scale_shift = True

    config.schedule.name = "cosine"
    config.schedule.num_timesteps = 4000
    config.diffusion.variance = "learned_range"
    config.diffusion.loss = "hybrid"

    config.optimizer.learning_rate = 1e-4  # their AdamW has a weight decay of 0, so it is Adam
    config.optimizer.warmup_steps = 0
    config.step.clip = "none"
    config.training.num_steps = 500_000
    return variants.apply(config, variant)
