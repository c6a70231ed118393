"""How fast training and the network are on a CPU beside PyTorch's, with the same network, batch, threads and optimiser.

pip install -e '.[bench]'
python -m experiments.speed --size=digits --rounds=6

Measured on two cores of an AMD EPYC server, jax 0.10.2 and torch 2.13.0, 4 to 6 rounds in turns; above 1, ours is faster.
Other programs used the cores during digits and the forward pass of medium.

                  training step                                 forward pass
                  eager                  torch.compile          eager                  torch.compile
digits            1.52 (1.33–1.73)       1.56 (1.47–1.94)       1.37 (1.23–1.47)       1.86 (1.61–2.33)
fashion_mnist     0.85 (0.84–0.86)       0.88 (0.86–0.89)       0.80 (0.74–0.82)       0.72 (0.71–0.73)
medium            0.92 (0.90–0.94)       0.91 (0.86–0.93)       0.82 (0.78–1.04)       0.71 (0.71–2.51)
cifar10           0.92 (0.90–0.95)       0.93 (0.88–0.97)       0.90 (0.82–0.94)       0.87 (0.79–0.88)
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

from ddpm_jax.commands import turns


class Size(NamedTuple):
    """A network and its batch."""

    channels: int
    channel_mults: tuple[int, ...]
    attention: tuple[int, ...]  # sides of the levels that have it
    blocks: int  # residual blocks of a level
    groups: int  # of the norms
    shape: tuple[int, int, int]
    batch_size: int


SIZES = {
    "cifar10": Size(128, (1, 2, 2, 2), (16,), 2, 32, (32, 32, 3), 16),
    "medium": Size(64, (1, 2, 2, 2), (16,), 2, 16, (32, 32, 3), 64),
    "fashion_mnist": Size(32, (1, 2, 2), (14,), 2, 8, (28, 28, 1), 128),
    "digits": Size(24, (1, 2), (4,), 1, 8, (8, 8, 1), 32),
}


def ours(size: str, plain: bool) -> None:
    """Serves our training step and forward pass."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from ddpm_jax.ddpm import DDPM
    from ddpm_jax.networks.unet import UNet
    from ddpm_jax.process import schedules
    from ddpm_jax.training import parallel, step

    one = SIZES[size]
    shape, batch_size = one.shape, one.batch_size
    network = UNet(
        channels=one.channels,
        channel_mults=one.channel_mults,
        num_res_blocks=one.blocks,
        attention_resolutions=one.attention,
        num_groups=one.groups,
        out_channels=shape[-1],
        plain=plain,
    )
    model = DDPM(schedule=schedules.linear(1000), network=network, image_shape=shape)
    tx, key = optax.adam(2e-4), jax.random.key(0)
    state = parallel.place(step.init_state(model, tx, key))
    rng = np.random.default_rng(0)
    batch = parallel.shard(
        {
            "image": rng.integers(0, 256, (batch_size, *shape), np.uint8),
            "label": np.zeros(batch_size, np.int32),
            "index": np.arange(batch_size, dtype=np.int32),
        }
    )
    update = step.make_update(model, tx, key, axis_name=parallel.AXIS)
    program = parallel.compile_step(update, state, batch)
    params = jax.tree.map(jnp.copy, state.params)
    x = parallel.shard((rng.normal(size=(batch_size, *shape)).astype(np.float32),))
    t = jnp.zeros(batch_size, jnp.float32)
    forward = parallel.Mapped(lambda params, x: network.apply({"params": params}, x[0], t))
    print(sum(leaf.size for leaf in jax.tree.leaves(params)), "parameters", file=sys.stderr)

    def train():
        nonlocal state
        state, _ = jax.block_until_ready(program(state, batch))

    turns.serve({"train": train, "forward": lambda: jax.block_until_ready(forward(params, x))})


def pytorch(size: str, compiled: bool) -> None:
    """Serves the same of diffusers' UNet2DModel."""
    import torch
    from diffusers import UNet2DModel

    one = SIZES[size]
    shape, batch_size = one.shape, one.batch_size
    sides = [shape[0] // 2**level for level in range(len(one.channel_mults))]
    kinds = ["Attn" if side in one.attention else "" for side in sides]
    network = UNet2DModel(
        sample_size=shape[0],
        in_channels=shape[-1],
        out_channels=shape[-1],
        block_out_channels=[one.channels * mult for mult in one.channel_mults],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        layers_per_block=one.blocks,
        downsample_padding=0,
        attention_head_dim=None,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=one.groups,
        dropout=0.1,
    )
    print(sum(p.numel() for p in network.parameters()), "parameters", file=sys.stderr)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-4, fused=True)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    images = torch.randint(0, 256, (batch_size, shape[-1], *shape[:2]), dtype=torch.uint8)
    model = torch.compile(network) if compiled else network

    def train():
        network.train()
        x_0 = images.float() / 127.5 - 1
        t, eps = torch.randint(0, 1000, (batch_size,)), torch.randn_like(x_0)
        scale = alpha_bar[t][:, None, None, None]
        x_t = scale.sqrt() * x_0 + (1 - scale).sqrt() * eps
        loss = torch.nn.functional.mse_loss(model(x_t, t).sample, eps)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        loss.item()

    x, t = torch.randn(batch_size, shape[-1], *shape[:2]), torch.zeros(batch_size)

    @torch.no_grad()
    def forward():
        network.eval()
        model(x, t).sample.sum().item()

    turns.serve({"train": train, "forward": forward})


SERVERS = {
    "ours": lambda size: ours(size, plain=False),
    "plain": lambda size: ours(size, plain=True),
    "eager": lambda size: pytorch(size, compiled=False),
    "compiled": lambda size: pytorch(size, compiled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="fashion_mnist")
    parser.add_argument("--against", default="eager,compiled,plain", help="which, with commas")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return SERVERS[args.serve](args.size)
    names = ["ours", *args.against.split(",")]
    line = [sys.executable, "-m", "experiments.speed", f"--size={args.size}"]
    with turns.workers([[*line, f"--serve={name}"] for name in names]) as running:
        for what in ("train", "forward"):
            mine, *others = turns.in_turns(running, what, args.rounds)
            for name, theirs in zip(names[1:], others, strict=True):
                found = turns.ratio(mine, theirs)
                print(f"{args.size} {what}: {found} of {name} ({found.ours:.3f} s)", flush=True)


if __name__ == "__main__":
    main()
