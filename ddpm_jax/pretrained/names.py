"""The parameters of a `UNet` under the names of other codebases: diffusers, OpenAI's, and Ho et al.'s.

A `Naming` says where each layer of a network is in another codebase, and what its parts and arrays are called there. From
that follow the name, the shape and the axes of each array, so that weights are read, checked and written by one function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.data import DataError
from ddpm_jax.networks import UNet

ATTENTION = ("norm", "query", "key", "value", "proj_out")
BLOCK = ("norm_1", "conv_1", "dense_emb", "norm_2", "conv_2", "shortcut")


class Naming(NamedTuple):
    """The names of another codebase.

    Attributes:
      layers: (network, image_shape) -> {name of a layer of ours: its name there}.
      parts: the names there of `BLOCK` and `ATTENTION`.
      weight, scale, bias, shift: the names there of a kernel, the scale of a norm, and the biases of both.
      torch: arrays have PyTorch's axes, otherwise ours.
      kernel_axes: numbers of axes of the kernels of the parts that are 1×1 convolutions there: {part: axes}.
      fused: query, key and value are one array, with each head's three in a row.
    """

    layers: Callable[[UNet, tuple], dict[str, str]]
    parts: Mapping[str, str]
    weight: str = "weight"
    scale: str = "weight"
    bias: str = "bias"
    shift: str = "bias"
    torch: bool = True
    kernel_axes: Mapping[str, int] = {}
    fused: str = ""


class Place(NamedTuple):
    """An array of ours in another codebase.

    Attributes:
      name, shape: its name and shape there.
      kind: "conv" or "dense" for a kernel with PyTorch's axes, "same" for what has the same axes there.
      rows: the rows that are ours; None for all.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "same"
    rows: np.ndarray | None = None


def places(naming: Naming, network: UNet, image_shape, template: Any) -> dict[tuple, Place]:
    """{path in our tree: place of the array there} of all parameters."""
    layers = naming.layers(network, image_shape)
    result = {}
    for path, leaf in flat(template).items():
        layer, *part, array = path
        is_norm = layer == "norm_out" or (bool(part) and part[0].startswith("norm"))
        words = {"kernel": naming.weight, "embedding": naming.weight, "scale": naming.scale}
        words["bias"] = naming.shift if is_norm else naming.bias
        inner = [naming.parts[name] for name in part]
        name = ".".join([layers[layer], *inner, words[array]])
        shape, kind, rows = tuple(leaf.shape), "same", None
        if naming.torch and array == "kernel":
            kind = "conv" if len(shape) == 4 else "dense"
            shape = (*shape[:-3:-1], *shape[:-2])
            shape += (1,) * (naming.kernel_axes.get(part[0] if part else "", 2) - len(shape))
        if naming.fused and part and part[0] in ("query", "key", "value"):
            heads, which = (
                heads_of(network, leaf.shape[-1]),
                ("query", "key", "value").index(part[0]),
            )
            rows = np.arange(3 * leaf.shape[-1]).reshape(heads, 3, -1)[:, which].reshape(-1)
            shape = (3 * shape[0], *shape[1:])
        name = name if naming.torch else name.replace(".", "/")
        result[path] = Place(name, shape, kind, rows)
    return result


def flat(tree: Any) -> dict[tuple[str, ...], Any]:
    """{path: leaf} of a tree of dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(entry.key for entry in path): leaf for path, leaf in leaves}


def heads_of(network: UNet, channels: int) -> int:
    """The number of heads of an attention over this many channels."""
    return channels // network.head_channels if network.head_channels else network.num_heads


def read(where: Mapping[tuple, Place], arrays: Mapping[str, np.ndarray], source: str) -> Any:
    """Our tree of parameters, float32, from the arrays of another codebase.

    Raises:
      DataError: an array is missing or not expected, has another shape, or is not finite; one line that names it.
    """
    known = {place.name for place in where.values()}
    for kind, names in (("lacks", known - arrays.keys()), ("has also", arrays.keys() - known)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(
                f"{source} {kind} the array {min(names)}{more}; the weights do not belong to this network"
            )
    tree: dict = {}
    for path, place in where.items():
        array = np.asarray(arrays[place.name])
        if array.shape != place.shape:
            raise DataError(
                f"{source}: {place.name} has the shape {array.shape}, and the network needs {place.shape}"
            )
        if not np.issubdtype(array.dtype, np.floating) and array.dtype.name != "bfloat16":
            raise DataError(
                f"{source}: {place.name} holds {array.dtype}, not floating-point numbers"
            )
        array = np.asarray(array, np.float32)
        if not np.isfinite(array).all():
            raise DataError(f"{source}: {place.name} holds numbers that are not finite")
        array = array if place.rows is None else array[place.rows]
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        if place.kind == "conv":
            array = array.transpose(2, 3, 1, 0)
        elif place.kind == "dense":
            array = array.reshape(array.shape[:2]).T
        inner[path[-1]] = np.ascontiguousarray(array)
    return tree


def write(where: Mapping[tuple, Place], tree: Any) -> dict[str, np.ndarray]:
    """The arrays of another codebase, {name: float32}, from our tree; the inverse of `read`."""
    arrays = {}
    for path, leaf in flat(tree).items():
        array, place = np.asarray(leaf, np.float32), where[path]
        if place.kind == "conv":
            array = array.transpose(3, 2, 0, 1)
        elif place.kind == "dense":
            array = array.T.reshape(place.shape)
        arrays[place.name] = np.ascontiguousarray(array)
    return arrays


# ---- where each layer is -----------------------------------------------------------------------------


def _levels(network: UNet, image_shape) -> list[tuple[int, bool]]:
    """(level, whether it has attention) from the top."""
    attended = network.attended(image_shape[:2])
    return [(level, side in attended) for level, side in enumerate(network.sides(image_shape))]


def _in_diffusers(network: UNet, image_shape) -> dict[str, str]:
    layers = {
        "conv_in": "conv_in",
        "time_dense_1": "time_embedding.linear_1",
        "time_dense_2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "middle_block_0": "mid_block.resnets.0",
        "middle_attention": "mid_block.attentions.0",
        "middle_block_1": "mid_block.resnets.1",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    levels, conv = _levels(network, image_shape), "" if network.resample_blocks else ".conv"
    for level, _ in levels:
        up = len(levels) - 1 - level
        layers[f"down_{level}_downsample"] = f"down_blocks.{level}.downsamplers.0{conv}"
        layers[f"up_{level}_upsample"] = f"up_blocks.{up}.upsamplers.0{conv}"
        for i in range(network.num_res_blocks + 1):
            for ours, theirs in (("block", "resnets"), ("attention", "attentions")):
                layers[f"down_{level}_{ours}_{i}"] = f"down_blocks.{level}.{theirs}.{i}"
                layers[f"up_{level}_{ours}_{i}"] = f"up_blocks.{up}.{theirs}.{i}"
    return layers


def _in_openai(network: UNet, image_shape) -> dict[str, str]:
    layers = {
        "conv_in": "input_blocks.0.0",
        "time_dense_1": "time_embed.0",
        "time_dense_2": "time_embed.2",
        "label_emb": "label_emb",
        "middle_block_0": "middle_block.0",
        "middle_attention": "middle_block.1",
        "middle_block_1": "middle_block.2",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }
    levels, blocks, n = _levels(network, image_shape), network.num_res_blocks, 1
    down, up = ("", "") if network.resample_blocks else (".op", ".conv")
    for level, _ in levels:
        for i in range(blocks):
            layers[f"down_{level}_block_{i}"] = f"input_blocks.{n}.0"
            layers[f"down_{level}_attention_{i}"] = f"input_blocks.{n}.1"
            n += 1
        layers[f"down_{level}_downsample"] = f"input_blocks.{n}.0{down}"
        n += 1
    n = 0
    for level, attended in reversed(levels):
        for i in range(blocks + 1):
            layers[f"up_{level}_block_{i}"] = f"output_blocks.{n}.0"
            layers[f"up_{level}_attention_{i}"] = f"output_blocks.{n}.1"
            n += 1
        layers[f"up_{level}_upsample"] = f"output_blocks.{n - 1}.{1 + attended}{up}"
    return layers


def _in_ho2020(network: UNet, image_shape) -> dict[str, str]:
    layers = {
        "conv_in": "conv_in",
        "time_dense_1": "temb.dense0",
        "time_dense_2": "temb.dense1",
        "middle_block_0": "mid.block_1",
        "middle_attention": "mid.attn_1",
        "middle_block_1": "mid.block_2",
        "norm_out": "norm_out",
        "conv_out": "conv_out",
    }
    for level, _ in _levels(network, image_shape):
        layers[f"down_{level}_downsample"] = f"down_{level}.downsample.conv"
        layers[f"up_{level}_upsample"] = f"up_{level}.upsample.conv"
        for i in range(network.num_res_blocks + 1):
            for way in ("down", "up"):
                layers[f"{way}_{level}_block_{i}"] = f"{way}_{level}.block_{i}"
                layers[f"{way}_{level}_attention_{i}"] = f"{way}_{level}.attn_{i}"
    return layers


def _parts(block: str, attention: str) -> dict[str, str]:
    return dict(zip(BLOCK + ATTENTION, (block + " " + attention).split(), strict=True))


DIFFUSERS = Naming(
    layers=_in_diffusers,
    parts=_parts(
        "norm1 conv1 time_emb_proj norm2 conv2 conv_shortcut", "group_norm to_q to_k to_v to_out.0"
    ),
    kernel_axes={"shortcut": 4},
)
OPENAI = Naming(
    layers=_in_openai,
    parts=_parts(
        "in_layers.0 in_layers.2 emb_layers.1 out_layers.0 out_layers.3 skip_connection",
        "norm qkv qkv qkv proj_out",
    ),
    kernel_axes={"shortcut": 4, "query": 3, "key": 3, "value": 3, "proj_out": 3},
    fused="qkv",
)
HO2020 = Naming(
    layers=_in_ho2020,
    parts=_parts("norm1 conv1 temb_proj norm2 conv2 nin_shortcut", "norm q k v proj_out"),
    weight="W",
    scale="gamma",
    bias="b",
    shift="beta",
    torch=False,
)
