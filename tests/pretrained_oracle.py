"""Outputs of other codebases' networks and samplers, for tests/test_pretrained.py, which runs without PyTorch.

    pip install torch diffusers guided-diffusion-sdk
    python tests/pretrained_oracle.py

writes tests/pretrained/: a pipeline of diffusers as it saves it, and diffusers.npz and openai.npz. The networks have the
weights of `weights`, so that only names and shapes are stored; the samplers have the noise of `noise`.
"""

import json
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "pretrained"
SMALL = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
BY_BLOCKS = {
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
NETWORKS = {  # {name: options of UNet2DModel beside SMALL}
    "defaults": {},
    "ho2020": {
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "act_fn": "swish",
    },
    "no_middle_attention": {"add_attention": False},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},  # no norm in the middle's attention
    "middle_groups": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "classes": {"num_class_embeds": 5},
    "centered": {"center_input_sample": True},
    "by_blocks": BY_BLOCKS,
    "attention_above": {
        **BY_BLOCKS,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    },
    "fraction": {"block_out_channels": (8, 12)},
    "learned": {"out_channels": 6},
    "oblong": {"sample_size": (8, 12)},
    "shift": {"freq_shift": 0.5, "dropout": 0.1},
}
BETAS = np.linspace(1e-3, 0.05, 100).tolist()
SCHEDULERS = [  # (class, options, number of steps, η)
    ("DDPMScheduler", {}, 10, None),
    ("DDPMScheduler", {"beta_schedule": "scaled_linear"}, 10, None),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, 10, None),
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}, 10, None),
    ("DDPMScheduler", {"trained_betas": BETAS, "num_train_timesteps": 100}, 10, None),
    (
        "DDPMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        10,
        None,
    ),
    ("DDPMScheduler", {"prediction_type": "sample", "clip_sample": False}, 10, None),
    ("DDPMScheduler", {"thresholding": True}, 10, None),
    ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5}, 10, None),
    ("DDPMScheduler", {"variance_type": "learned_range"}, 10, None),
    (
        "DDPMScheduler",
        {"variance_type": "fixed_small_log", "timestep_spacing": "linspace"},
        7,
        None,
    ),
    ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, 7, None),
    ("DDPMScheduler", {"variance_type": "fixed_large", "steps_offset": 1}, 10, None),
    ("DDIMScheduler", {}, 10, 0.0),
    ("DDIMScheduler", {"timestep_spacing": "linspace"}, 10, 0.0),
    ("DDIMScheduler", {"timestep_spacing": "linspace"}, 7, 1.0),
    ("DDIMScheduler", {"timestep_spacing": "trailing"}, 10, 1.0),
    ("DDIMScheduler", {"timestep_spacing": "trailing"}, 7, 0.0),
    ("DDIMScheduler", {"set_alpha_to_one": False}, 10, 1.0),
    ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}, 10, 0.5),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "clip_sample": False}, 10, 0.0),
]
OPENAI = {  # {name: options of UNetModel}
    "improved": {"num_heads": 4, "use_scale_shift_norm": True, "out_channels": 6},
    "guided": {
        "num_head_channels": 16,
        "use_scale_shift_norm": True,
        "out_channels": 6,
        "num_classes": 5,
        "resblock_updown": True,
    },
    "plain": {"out_channels": 3},
}


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that depend on the name and shape of an array; those of norms are near 1, and kernels keep the variance."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) == 1:
        return (0.1 * drawn + ("norm" in name and name.endswith("weight"))).astype(np.float32)
    return (drawn / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def inputs(image_shape, classes: int = 0) -> tuple:
    """x [2, H, W, C], t [2] and labels [2], or None."""
    x = np.random.default_rng(0).normal(size=(2, *image_shape)).astype(np.float32)
    return x, np.array([3, 700]), np.array([0, classes - 1]) if classes else None


def noise(num_steps: int, image_shape) -> np.ndarray:
    """The noise of each step, and last that of x_T: [S + 1, 2, H, W, C]."""
    shape = (num_steps + 1, 2, *image_shape)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def seeded(network):
    """The network with the weights of `weights`, and the names and shapes of its arrays."""
    import torch

    shapes = {name: tuple(array.shape) for name, array in network.state_dict().items()}
    network.load_state_dict({n: torch.tensor(weights(n, s)) for n, s in shapes.items()})
    return network.eval(), json.dumps(shapes)


def evaluate(network, x, t, labels=None) -> np.ndarray:
    """The output [B, H, W, C] of a PyTorch network for x [B, H, W, C]."""
    import torch

    with torch.no_grad():
        more = [] if labels is None else [torch.tensor(labels)]
        out = network(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), *more)
    return getattr(out, "sample", out).numpy().transpose(0, 2, 3, 1)


def unet(**options):
    from diffusers import UNet2DModel

    return seeded(UNet2DModel(**{**SMALL, **options}))


def run_scheduler(name: str, fields: dict, num_steps: int, eta: float | None) -> np.ndarray:
    """The images [2, H, W, C] of a scheduler with the network of SMALL."""
    import diffusers
    import torch

    scheduler = getattr(diffusers, name)(**fields)
    network, _ = unet(out_channels=6 if fields.get("variance_type") == "learned_range" else 3)
    scheduler.set_timesteps(num_steps)
    drawn = torch.tensor(noise(num_steps, (8, 8, 3)).transpose(0, 1, 4, 2, 3))
    x = drawn[-1]
    for i, t in enumerate(scheduler.timesteps):
        z = drawn[num_steps - 1 - i]
        with torch.no_grad():
            out = network(x, t).sample
        if eta is not None:
            x = scheduler.step(out, t, x, eta=eta, variance_noise=z).prev_sample
            continue
        module = diffusers.schedulers.scheduling_ddpm
        module.randn_tensor = lambda *args, z=z, **kwargs: z
        x = scheduler.step(out, t, x).prev_sample
    return x.numpy().transpose(0, 2, 3, 1)


def make() -> None:
    import diffusers
    from guided_diffusion.unet import UNetModel

    FOLDER.mkdir(exist_ok=True)
    found = {"version": diffusers.__version__}
    for name, options in NETWORKS.items():
        network, shapes = unet(**options)
        size, channels = network.config.sample_size, network.config.in_channels
        shape = (*(size if isinstance(size, (tuple, list)) else (size, size)), channels)
        found[f"{name}/config"] = json.dumps(dict(network.config))
        found[f"{name}/shapes"] = shapes
        classes = network.config.num_class_embeds or 0
        found[f"{name}/output"] = evaluate(network, *inputs(shape, classes))
    for i, row in enumerate(SCHEDULERS):
        scheduler = getattr(diffusers, row[0])(**row[1])
        fields = {**dict(scheduler.config), "_class_name": row[0]}
        found[f"{i}/config"] = json.dumps(fields)
        found[f"{i}/output"] = run_scheduler(*row)
    np.savez_compressed(FOLDER / "diffusers.npz", **found)

    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, variance_type="fixed_large")
    network, _ = unet(**NETWORKS["ho2020"])
    diffusers.DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(FOLDER / "pipeline")

    found = {}
    for name, options in OPENAI.items():
        network = UNetModel(
            image_size=8,
            in_channels=3,
            model_channels=32,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            **options,
        )
        network, shapes = seeded(network)
        x, t, labels = inputs((8, 8, 3), options.get("num_classes", 0))
        found[f"{name}/shapes"] = shapes
        found[f"{name}/output"] = evaluate(network, x, t * 1000.0 / 4000.0, labels)
    np.savez_compressed(FOLDER / "openai.npz", **found)


if __name__ == "__main__":
    make()
