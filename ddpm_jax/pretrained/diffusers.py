"""The configs of diffusers: a UNet2DModel and a DDPM or DDIM scheduler, as sections of our config and back.

Only what our network and samplers express exactly is read. Everything else is refused by name, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_jax.ddpm import DDPM
from ddpm_jax.networks import UNet
from ddpm_jax.networks.layers import largest_divisor
from ddpm_jax.options import ConfigError

# The fields of UNet2DModel and their defaults in diffusers, which leaves out of its files what older versions did not have.
UNET = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D",) + 3 * ("AttnDownBlock2D",),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": 3 * ("AttnUpBlock2D",) + ("UpBlock2D",),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,  # of DDIM only
}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
WITHOUT_EFFECT = {
    "tensor_format",
    "timestep_values",
    "skip_prk_steps",
}  # in files of older versions
BLOCKS = {  # {name: (has attention, halves or doubles by a block; None for what the field says)}
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, True),
    "UpBlock2D": (False, False),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, True),
}
PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
BETAS = {
    "linear": "linear",
    "scaled_linear": "quadratic",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


def _fields(found: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All known fields, from a file's and the defaults.

    Raises:
      ConfigError: the file has a field that is not known.
    """
    for name, value in found.items():
        if not (name.startswith("_") or name in known or name in WITHOUT_EFFECT or value is None):
            raise ConfigError(f"{where}: the field {name}={value!r} cannot be expressed here")
    return {**known, **{name: found[name] for name in known if name in found}}


def _refuse(where: str, name: str, value: Any, expected: str) -> None:
    raise ConfigError(f"{where}: {name}={value!r} cannot be expressed here; expected {expected}")


def _expect(where: str, fields: Mapping[str, Any], **allowed: tuple) -> None:
    for name, values in allowed.items():
        if fields[name] not in values:
            _refuse(where, name, fields[name], " or ".join(map(repr, values)))


# ---- the network -------------------------------------------------------------------------------------


def read_unet(found: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """(config.model, image_shape) from the fields of a UNet2DModel.

    Raises:
      ConfigError: a field that our network cannot express; names it.
    """
    fields = _fields(found, UNET, where)
    widths, levels = tuple(fields["block_out_channels"]), len(fields["block_out_channels"])
    _expect(
        where,
        fields,
        time_embedding_type=("positional",),
        time_embedding_dim=(None, 4 * widths[0]),
        mid_block_type=("UNetMidBlock2D",),
        mid_block_scale_factor=(1,),
        act_fn=("silu", "swish"),
        downsample_padding=(0, 1),
        resnet_time_scale_shift=("default", "scale_shift"),
        class_embed_type=(None,),
        out_channels=(fields["in_channels"], 2 * fields["in_channels"]),
    )
    if not isinstance(fields["norm_num_groups"], int):
        _refuse(where, "norm_num_groups", fields["norm_num_groups"], "a number")
    down, up = (
        [name.removeprefix("UNetRes") for name in fields[f"{way}_block_types"]]
        for way in ("down", "up")
    )
    for way, names in (("down", down), ("up", up)):
        kinds = [name for name in BLOCKS if name.lower().find(way) >= 0]
        for name in names:
            if name not in kinds:
                _refuse(where, f"{way}_block_types", name, " or ".join(kinds))
        if len(names) != levels:
            _refuse(
                where, f"{way}_block_types", tuple(names), f"{levels} names, one for each level"
            )
    attended = [BLOCKS[name][0] for name in down]
    if attended != [BLOCKS[name][0] for name in reversed(up)]:
        _refuse(where, "up_block_types", tuple(up), "attention at the levels of down_block_types")
    resampled = {
        fields[f"{way}sample_type"] == "resnet" if by_block is None else by_block
        for way, names in (("down", down), ("up", up))
        for by_block in [BLOCKS[name][1] for name in names[:-1]]
    }
    if len(resampled) > 1:
        _refuse(where, "down_block_types", tuple(down), "all levels halved and doubled in one way")
    _expect(where, fields, downsample_type=("conv", "resnet"), upsample_type=("conv", "resnet"))

    size = fields["sample_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    factor = 2 ** (levels - 1)
    if not isinstance(height, int) or height % factor or width % factor:
        _refuse(where, "sample_size", size, f"the side of the images, a multiple of {factor}")
    heads, scale_shift = (
        fields["attention_head_dim"],
        fields["resnet_time_scale_shift"] != "default",
    )
    middle = fields["attn_norm_num_groups"]
    middle = 0 if middle is None and scale_shift else middle
    return {
        "channels": widths[0],
        "channel_mults": tuple(_whole(each / widths[0]) for each in widths),
        "num_res_blocks": fields["layers_per_block"],
        "attention_resolutions": tuple(
            min(height, width) // 2**level for level in range(levels) if attended[level]
        ),
        "num_heads": 1,
        "head_channels": heads or 0,
        "dropout": float(fields["dropout"]),
        "scale_shift": scale_shift,
        "num_classes": fields["num_class_embeds"] or 0,
        "num_groups": fields["norm_num_groups"],
        "norm_epsilon": float(fields["norm_eps"]),
        "downsample_padding": fields["downsample_padding"],
        "resample_blocks": resampled == {True},
        "middle_attention": bool(fields["add_attention"]),
        "middle_groups": middle,
        "frequency_shift": float(fields["freq_shift"]),
        "cosine_first": bool(fields["flip_sin_to_cos"]),
        "center_input": bool(fields["center_input_sample"]),
    }, (height, width, fields["in_channels"])


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def write_unet(network: UNet, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The fields of the UNet2DModel that is this network, which has its out_channels already.

    Raises:
      ConfigError: a field of the network that UNet2DModel does not have.
    """
    where, (height, width, channels) = "config.model", image_shape
    levels, attended = network.level_channels, network.attended(image_shape)
    sides, factor = network.sides(image_shape), 2 ** (len(levels) - 1)
    if height % factor or width % factor:
        raise ConfigError(
            f"images of {height}×{width} cannot be exported: UNet2DModel halves them {len(levels) - 1} times,"
            f" so their sides must be multiples of {factor}"
        )
    if network.time_scale != 1:
        raise ConfigError(f"{where}: UNet2DModel has no time_scale, and it is {network.time_scale}")
    middle = network.has_middle_attention(attended)
    with_attention = [w for w, side in zip(levels, sides, strict=True) if side in attended]
    with_attention += [levels[-1]] * middle
    dims = {network.head_channels or width // network.num_heads for width in with_attention}
    heads = dims.pop() if dims and (network.head_channels or network.num_heads > 1) else None
    if heads and dims:
        raise ConfigError(
            f"{where}: UNet2DModel has the same channels per head at every level, and num_heads={network.num_heads}"
            " has not; it cannot be exported"
        )
    groups = {largest_divisor(each, network.groups) for each in _norm_widths(network)}
    if len(groups) > 1:
        raise ConfigError(
            f"{where}: UNet2DModel has the same number of groups in every norm, and here they are"
            f" {', '.join(map(str, sorted(groups)))}; it cannot be exported"
        )
    (groups,) = groups
    kinds = ["Attn" if side in attended else "" for side in sides]
    block = "resnet" if network.resample_blocks else "conv"
    plain = {"down": "DownBlock2D", "up": "UpBlock2D"}
    if network.resample_blocks:
        plain = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
    names = {
        way: [f"Attn{way.capitalize()}Block2D" if kind else plain[way] for kind in kinds]
        for way in ("down", "up")
    }
    middle_groups = network.middle_groups
    if middle_groups is None:
        middle_groups = groups if network.scale_shift else None
    elif middle_groups:
        middle_groups = largest_divisor(levels[-1], middle_groups)
    if middle and middle_groups == 0 and not network.scale_shift:
        raise ConfigError(
            f"{where}: UNet2DModel has no middle attention without norm; it cannot be exported"
        )
    return {
        **UNET,
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": network.out_channels,
        "center_input_sample": network.center_input,
        "freq_shift": _whole(network.frequency_shift),
        "flip_sin_to_cos": network.cosine_first,
        "down_block_types": names["down"],
        "up_block_types": names["up"][::-1],
        "block_out_channels": list(levels),
        "layers_per_block": network.num_res_blocks,
        "downsample_padding": network.downsample_padding,
        "downsample_type": block,
        "upsample_type": block,
        "dropout": network.dropout,
        "attention_head_dim": heads,
        "norm_num_groups": groups,
        "attn_norm_num_groups": middle_groups or None,
        "norm_eps": network.norm_epsilon,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift else "default",
        "add_attention": middle,
        "num_class_embeds": network.num_classes or None,
    }


def _norm_widths(network: UNet) -> set[int]:
    """The number of channels of every norm of the blocks."""
    levels, blocks = network.level_channels, network.num_res_blocks
    skips, widths, h = [network.channels], set(levels) | {network.channels}, network.channels
    for level, width in enumerate(levels):
        skips += [width] * (blocks + (level < len(levels) - 1))
        h = width
    for width in reversed(levels):
        for _ in range(blocks + 1):
            widths.add(h + skips.pop())
            h = width
    return widths


# ---- the schedule and its samplers -------------------------------------------------------------------


def read_scheduler(found: Mapping[str, Any], where: str) -> tuple[dict, dict, dict]:
    """(config.schedule, config.diffusion, options of sampling) from the fields of a scheduler.

    Sampling with these options gives the numbers of diffusers for the same noise.

    Raises:
      ConfigError: another scheduler, or a field that cannot be expressed; names it.
    """
    name = found.get("_class_name", "DDPMScheduler")
    if name not in SCHEDULERS:
        _refuse(where, "_class_name", name, " or ".join(SCHEDULERS))
    is_ddim = name == "DDIMScheduler"
    fields = _fields(found, SCHEDULER, where)
    ranges = (
        {} if fields["thresholding"] or not fields["clip_sample"] else {"clip_sample_range": (1,)}
    )
    _expect(
        where,
        fields,
        beta_schedule=tuple(BETAS),
        prediction_type=tuple(PREDICTIONS),
        variance_type=tuple(VARIANCES),
        timestep_spacing=("leading", "trailing", "linspace"),
        **ranges,
    )
    if fields["thresholding"]:
        _expect(where, fields, dynamic_thresholding_ratio=(0.995,))
    schedule: dict[str, Any] = {"name": BETAS[fields["beta_schedule"]]}
    schedule["num_timesteps"] = fields["num_train_timesteps"]
    if fields["trained_betas"] is not None:
        betas = tuple(map(float, fields["trained_betas"]))
        schedule = {"name": "betas", "num_timesteps": len(betas), "betas": betas}
    elif schedule["name"] != "cosine":
        schedule |= {"start": fields["beta_start"], "end": fields["beta_end"]}
    if fields["rescale_betas_zero_snr"]:
        schedule["zero_snr"] = True
    clip: bool | str = bool(fields["clip_sample"])
    if fields["thresholding"]:
        most = max(fields["sample_max_value"], 1.0)
        clip = True if most == 1.0 else f"dynamic:{most:g}"
    variance = VARIANCES[fields["variance_type"]]
    diffusion = {
        "prediction": PREDICTIONS[fields["prediction_type"]],
        "variance": variance,
        "loss": "hybrid" if variance == "learned_range" else "simple",
        "clip_x0": clip,
    }
    spacing, offset = fields["timestep_spacing"], fields["steps_offset"]
    steps = {"leading": "leading50", "trailing": "trailing50", "linspace": "50"}[spacing]
    steps += f"+{offset}" if spacing == "leading" and offset else ""
    sampling: dict[str, Any] = {"sampler": "ancestral", "steps": steps}
    if is_ddim:
        sampling |= {"sampler": "ddim", "clipped_eps": False}
        sampling |= {} if spacing == "leading" else {"stride": True}
        sampling |= {} if fields["set_alpha_to_one"] else {"to_first": True}
    elif variance == "fixed_large" and (spacing == "trailing" or offset):
        sampling |= {"last_noise": True}
    return schedule, diffusion, sampling


def write_scheduler(model: DDPM) -> dict[str, Any]:
    """The fields of the DDPMScheduler with the schedule and the diffusion of a model.

    Raises:
      ConfigError: a path that is not variance preserving, or a prediction that the scheduler does not have.
    """
    schedule, predictions = model.schedule, {ours: name for name, ours in PREDICTIONS.items()}
    if not schedule.is_variance_preserving or (schedule.times != np.arange(len(schedule))).any():
        raise ConfigError("only a variance-preserving schedule with times 0 … T−1 can be exported")
    if model.prediction not in predictions:
        raise ConfigError(
            f"config.diffusion.prediction={model.prediction!r} has no counterpart in diffusers; expected"
            f" {', '.join(predictions.values())}"
        )
    variance = {"analytic": "fixed_small", "learned": None}.get(model.variance, model.variance)
    if variance is None:
        raise ConfigError(
            "config.diffusion.variance='learned' means another quantity in diffusers; only learned_range and"
            " fixed variances can be exported"
        )
    fields = SCHEDULER | {
        "num_train_timesteps": len(schedule),
        "trained_betas": schedule.beta.tolist(),
        "prediction_type": predictions[model.prediction],
        "variance_type": variance,
        "clip_sample": bool(model.clip_x0),
    }
    if isinstance(model.clip_x0, str):
        limit = float(model.clip_x0.partition(":")[2] or 1e9)
        fields |= {"thresholding": True, "sample_max_value": limit}
    linear = np.linspace(schedule.beta[0], schedule.beta[-1], len(schedule))
    if np.allclose(schedule.beta, linear, rtol=1e-12, atol=0):
        ends = {"beta_start": float(schedule.beta[0]), "beta_end": float(schedule.beta[-1])}
        fields |= {"trained_betas": None, "beta_schedule": "linear", **ends}
    del fields["set_alpha_to_one"]
    return {"_class_name": "DDPMScheduler", **fields}
