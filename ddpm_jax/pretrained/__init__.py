"""Pretrained weights of other codebases, as a model and a config of ours, and back.

folder or hub name        diffusers: DDPMPipeline, DDIMPipeline or UNet2DModel
FILE.pt, with a config    OpenAI's Improved DDPM and guided-diffusion: a state dict
FILE.npz, with a config   Ho et al.'s TensorFlow variables, by their names
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ddpm_jax import extras
from ddpm_jax.data import DataError, open_npz
from ddpm_jax.ddpm import DDPM
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.run_data import NO_DATA, RunError
from ddpm_jax.files.writers import save_bytes, save_json
from ddpm_jax.method import from_config
from ddpm_jax.names import installed
from ddpm_jax.networks import UNet
from ddpm_jax.networks.pytorch_files import read_state_dict
from ddpm_jax.options import ConfigError
from ddpm_jax.pretrained import diffusers, names

UNET_NAMES = ("unet/config.json", "config.json")  # in a pipeline, and in older or single networks
SCHEDULER_NAMES = ("scheduler/scheduler_config.json", "scheduler_config.json")
WEIGHTS = "diffusion_pytorch_model"
OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
OF_OPENAI = {  # fields of the network in which their code differs from Ho et al.'s
    "norm_epsilon": 1e-5,
    "downsample_padding": 1,
    "frequency_shift": 0.0,
    "cosine_first": True,
    "middle_attention": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """Weights of another codebase.

    Attributes:
      config: the ConfigDict of a run, with its network, schedule and diffusion.
      method: the model of the config.
      params: its parameters, on the host.
      notes: what was assumed, one line each.
    """

    config: Any
    method: DDPM
    params: Any
    notes: tuple[str, ...] = ()


def read(source: str, config: Any = None) -> Pretrained:
    """Reads pretrained weights.

    Args:
      source: a folder or hub name of diffusers, or a file .pt or .npz.
      config: a ConfigDict. A folder brings its own network, schedule and diffusion, and takes the rest from the config, such
        as the data; a file needs all of it.

    Raises:
      ConfigError: something that cannot be expressed here, named; before any weight is read.
      DataError, RunError: files or arrays that are missing, damaged or do not fit; one line.
    """
    path = config_lib.path(source)
    if os.path.isdir(path):
        return read_folder(path, config, source=source)
    if path.endswith((".pt", ".pth", ".npz")) or os.path.exists(path):
        return read_file(path, config)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise RunError(
            f"there is no {source}; expected a folder, a file .pt or .npz, or a name of the hub such as"
            " google/ddpm-cifar10-32"
        )
    return read_folder(_download(source), config, source=source)


# ---- diffusers ---------------------------------------------------------------------------------------


def read_folder(folder: str, config: Any = None, *, source: str | None = None) -> Pretrained:
    """Reads a folder of diffusers, see `read`."""
    if os.path.isdir(os.path.join(folder, "checkpoints")):
        raise RunError(f"{folder} is a run directory of ddpm_jax already; give it as --workdir")
    index = _json(folder, ("model_index.json",))
    kind = (index or {}).get("_class_name", "DDPMPipeline")
    if kind not in ("DDPMPipeline", "DDIMPipeline"):
        raise ConfigError(
            f"{folder}: a {kind} cannot be read; expected DDPMPipeline, DDIMPipeline or UNet2DModel"
        )
    unet, notes = _json(folder, UNET_NAMES), []
    if unet is None:
        raise RunError(
            f"{folder} has no {' or '.join(UNET_NAMES)}: it is not a folder of diffusers with a UNet2DModel"
        )
    kind = unet.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ConfigError(f"{folder}: the network is a {kind}; only UNet2DModel can be read")
    with _named(f"{folder}, network"):
        model, image_shape = diffusers.read_unet(unet, f"{folder}, network")
    found = _json(folder, SCHEDULER_NAMES)
    if found is None:
        notes.append(
            "no scheduler: the schedule is taken as linear, 1e-4 to 0.02 in 1000 steps, for ε"
        )
    with _named(f"{folder}, scheduler"):
        sections = diffusers.read_scheduler(found or {}, f"{folder}, scheduler")
    schedule, diffusion, sampling = sections
    config = _with_sections(config, source or folder, model, image_shape)
    for name, values in (("schedule", schedule), ("diffusion", diffusion)):
        config[name] = values
    preview = {"every": config.preview.every, "num_images": config.preview.num_images}
    config.preview = preview | sampling
    with _named(f"{folder}, scheduler"):
        method = from_config(config)
    if method.sized_network.out_channels != unet.get("out_channels", 3):
        raise ConfigError(
            f"{folder}: the network has out_channels={unet.get('out_channels', 3)}, and the scheduler's"
            f" variance_type needs {method.sized_network.out_channels}"
        )
    params = _params(method, names.DIFFUSERS, _weights(folder), folder)
    return Pretrained(config=config, method=method, params=params, notes=tuple(notes))


@contextlib.contextmanager
def _named(what: str):
    """A context in which values of a wrong type in a file end as one line."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConfigError(f"{what} has a field of the wrong type ({error})") from error


def _json(folder: str, candidates: tuple[str, ...]) -> dict | None:
    """The first of several JSON files in a folder; None if there is none."""
    for name in candidates:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path} cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise RunError(
                f"{path} cannot be read: it must hold fields, not a {type(found).__name__}"
            )
        return found
    return None


def _weights(folder: str) -> dict[str, np.ndarray]:
    """The arrays of a folder's network."""
    for inner in ("unet", ""):
        path = os.path.join(folder, inner, f"{WEIGHTS}.safetensors")
        if os.path.isfile(path):
            arrays = _safetensors(path)
        elif os.path.isfile(path := path.replace(".safetensors", ".bin")):
            arrays = read_state_dict(path)
        else:
            continue
        for old, new in OLD_NAMES.items():
            arrays = {name.replace(old, new): array for name, array in arrays.items()}
        return arrays
    raise RunError(f"{folder} has no {WEIGHTS}.safetensors or .bin, in it or in unet/")


def _safetensors(path: str) -> dict[str, np.ndarray]:
    library = extras.load("safetensors.flax", "safetensors", "a .safetensors file")
    try:
        return {name: np.asarray(array) for name, array in library.load_file(path).items()}
    except Exception as error:  # the library has its own, and passes on those of Rust
        raise DataError(f"{path} cannot be read as safetensors: {error}") from None


def _download(name: str) -> str:
    """The folder of a model of the hub, downloaded or from the cache."""
    hub = extras.load("huggingface_hub", "huggingface_hub", "a model of the hub")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each retry
    print(f"asking {address}/{name}", flush=True)
    patterns = ["model_index.json", *UNET_NAMES, *SCHEDULER_NAMES]
    patterns += [f"{folder}{WEIGHTS}.safetensors" for folder in ("unet/", "")]
    try:
        files = hub.HfApi().list_repo_files(name)
        if not any(file.endswith(f"{WEIGHTS}.safetensors") for file in files):
            patterns += [f"{folder}{WEIGHTS}.bin" for folder in ("unet/", "")]
        return hub.snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # offline, no such model, no permission: the library has its own
        try:
            return hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True)
        except Exception:
            line = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise RunError(
                f"{address}/{name} cannot be read ({line}); check the name and the network, or give a folder"
            ) from None


def write_folder(method: DDPM, params: Any, folder: str, card: str) -> None:
    """Writes a folder that DDPMPipeline.from_pretrained loads.

    Args:
      folder: a new one, or empty.
      card: the text of its README.md.

    Raises:
      ConfigError: a model that UNet2DModel or DDPMScheduler cannot express; before anything is written.
      RunError: the folder is not empty.
    """
    if not isinstance(method, DDPM) or not isinstance(method.network, UNet):
        raise ConfigError(
            "only a DDPM with a UNet can be exported: diffusers has no other network for it"
        )
    library = extras.load("safetensors.numpy", "safetensors", "a .safetensors file")
    network = method.sized_network
    unet = diffusers.write_unet(network, method.image_shape)
    scheduler = diffusers.write_scheduler(method)
    where = names.places(names.DIFFUSERS, network, method.image_shape, params)
    arrays = names.write(where, params)
    if os.path.isdir(folder) and os.listdir(folder):
        raise RunError(f"{folder} is not empty; choose a new folder")
    version = {"_diffusers_version": "0.30.0"}
    os.makedirs(os.path.join(folder, "unet"), exist_ok=True)
    os.makedirs(os.path.join(folder, "scheduler"), exist_ok=True)
    content = library.save(arrays, {"format": "pt"})
    save_bytes(os.path.join(folder, "unet", f"{WEIGHTS}.safetensors"), content)
    save_json(
        os.path.join(folder, UNET_NAMES[0]), {"_class_name": "UNet2DModel", **version, **unet}
    )
    save_json(os.path.join(folder, SCHEDULER_NAMES[0]), {**version, **scheduler})
    index = {"_class_name": "DDPMPipeline", **version}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    save_json(os.path.join(folder, "model_index.json"), index)
    save_bytes(os.path.join(folder, "README.md"), card.encode())


# ---- OpenAI and Ho et al. ----------------------------------------------------------------------------


def read_file(path: str, config: Any) -> Pretrained:
    """Reads a state dict of OpenAI's code (.pt) or Ho et al.'s variables (.npz), see `read`."""
    if config is None:
        raise ConfigError(
            f"{path} holds weights only: give the --config of its network, such as configs/cifar10_iddpm.py"
        )
    if path.endswith(".npz"):
        arrays, naming, fields = _variables(path), names.HO2020, {}
        if config.model.get("num_classes"):
            raise ConfigError(
                f"{path}: Ho et al.'s network has no classes; set config.model.num_classes=0"
            )
    else:
        arrays, naming = read_state_dict(path), names.OPENAI
        fields = OF_OPENAI | {"time_scale": 1000.0 / len(from_config(config).schedule)}
    config = _with_sections(config, path, config.model.to_dict() | fields, None)
    method = from_config(config)
    params = _params(method, naming, arrays, path)
    return Pretrained(config=config, method=method, params=params)


def _variables(path: str) -> dict[str, np.ndarray]:
    """Ho et al.'s variables without prefix: the moving averages, if the file has them."""
    try:
        with open_npz(path) as file:
            arrays = dict(file)
    except Exception as error:  # zipfile, zlib and NumPy each raise their own
        raise DataError(f"{path} cannot be read as an .npz: {error}") from None
    average, result = "/ExponentialMovingAverage", {}
    for name in sorted(arrays, key=lambda name: name.endswith(average)):
        key = name.removesuffix(":0").removesuffix(average).removeprefix("model/")
        if "Adam" not in key and key != "global_step":
            result[key] = arrays[name]
    return result


# ---- both --------------------------------------------------------------------------------------------


def _with_sections(config: Any, source: str, model: Mapping, image_shape) -> Any:
    """A copy of a config, or of CIFAR-10's without its data, with another network."""
    own = installed("configs/cifar10.py")  # not that of the current folder
    base = config_lib.from_file(own) if config is None else config
    result = base.copy_and_resolve_references().unlock()
    result.model, result.init_from = dict(model), source
    if image_shape is not None:
        result.data.image_shape = image_shape
    if config is None:
        result.data.name, result.data.flip = NO_DATA, False
    return result


def _params(method: DDPM, naming: names.Naming, arrays: Mapping, source: str) -> Any:
    if not isinstance(method, DDPM) or not isinstance(method.network, UNet):
        raise ConfigError(
            f"{source} holds the weights of a U-Net, and the config has another model"
        )
    template = jax.eval_shape(method.init, jax.random.key(0))
    where = names.places(naming, method.sized_network, method.image_shape, template)
    return names.read(where, arrays, source)
