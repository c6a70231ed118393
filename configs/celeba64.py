"""CelebA at 64×64, the network and the run of Song et al. 2021 (DDIM), App. D.

    python -m ddpm_jax.main --config=configs/celeba64.py
    python -m ddpm_jax.main --mode=sample --workdir=runs/celeba64 --sampler=ddim --steps=50 --spacing=linear

78,700,803 parameters: the network of CIFAR-10 with five levels. The paper, Table 1, FID of DDIM in 10, 20, 50, 100
and 1000 steps: 17.33, 13.73, 9.17, 6.53, 3.51; of σ̂ in 1000 steps 3.26. It does not state the number of training
steps, and its code sets no limit: the 500k here are our choice. (A public attempt with its settings,
github.com/ermongroup/ddim issue 19, reports FID 4.5 in 1000 steps as the best of checkpoints between 250k and 700k.)

Two differences from the paper's code: it sums the squared error over pixels, so that its clip at 1.0 scales every
gradient to that norm, while here the loss is the mean; and it draws t in pairs t, T − 1 − t.

The pictures are a 128×128 crop of the aligned ones around (89, 121), which is not their centre, reduced to half size.
With img_align_celeba/ and list_eval_partition.txt of the official download in this folder:

    from pathlib import Path

    from PIL import Image

    for line in Path("list_eval_partition.txt").read_text().splitlines():
        name, part = line.split()
        folder = Path("data/celeba64", ("train", "validation", "test")[int(part)])
        folder.mkdir(parents=True, exist_ok=True)
        face = Image.open(f"img_align_celeba/{name}").crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
        face.resize((64, 64), Image.Resampling.BILINEAR).save(folder / f"{name[:-4]}.png")

Measured: not run.
"""

from ddpm_jax.configs import cifar10, variants


def get_config(variant: str = ""):
    config = cifar10.get_config()
    config.data.name = "image_folder:data/celeba64"
    config.data.image_shape = (64, 64, 3)
    config.model.channel_mults = (1, 2, 2, 2, 4)
    config.optimizer.warmup_steps = 0
    config.training.num_steps = 500_000
    return variants.apply(config, variant)
