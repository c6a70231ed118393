"""A run that trains in a second, its commands, and the comparison of two run directories."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import pathlib
import shutil

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = "tests/faults/tiny.py"
LEFTOVERS = ("*.tmp", "*.tmp.*", "*.partial", "*.replaced*")
SHORT = ["--num_samples=24", "--steps=4", "--batch_size=4"]
COMMANDS = {  # of a finished run; "{}" is the run directory
    "sample": ["--mode=sample", "--workdir={}", *SHORT],
    "nll": ["--mode=nll", "--workdir={}", "--num_images=24", "--batch_size=4"],
    "encode": ["--mode=encode", "--workdir={}", "--num_images=24", "--batch_size=4", "--steps=4"],
    "inpaint": ["--mode=inpaint", "--workdir={}", "--num_images=16", "--steps=4", "--resample=1"],
    "denoise": ["--mode=denoise", "--workdir={}", "--num_images=16", "--from_t=5"],
    "eval": [
        *("--mode=eval", "--workdir={}", "--metrics=fid", "--features=tests.faults.pixels:2"),
        *SHORT,
    ],
    "report": ["--mode=report", "--workdir={}"],
}
TRAIN = [f"--config={CONFIG}", "--workdir={}"]
LONGER = [*TRAIN, "--config.training.num_steps=12"]


def get_config(variant: str = ""):
    from ddpm_jax.configs import digits

    config = digits.get_config("smoke")
    config.model.update(channels=4, num_groups=1, channel_mults=(1,), attention_resolutions=())
    config.schedule.num_timesteps = 20
    config.optimizer.decay = "none"
    config.training.num_steps = 6
    config.training.batch_size = 8
    config.training.log_every = 2
    config.training.checkpoint_every = 3
    config.preview.every = 4
    config.preview.num_images = 4
    config.preview.steps = "2"
    return config


def environment(folder: str | os.PathLike) -> dict[str, str]:
    """The environment of a program: one cache of compiled programs, little optimization, CPU."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", os.path.join(folder, "compiled")
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
    }
    return {**os.environ, "XLA_FLAGS": "", **settings}


def filled(command, workdir) -> list[str]:
    return [word.replace("{}", str(workdir)) for word in command]


# ---- comparing -------------------------------------------------------------------------------------


def contents(workdir: str | os.PathLike) -> dict[str, object]:
    """{file: what must be equal in it} of a run directory.

    A checkpoint is its leaves, an .npz its arrays without the path of the run, a metrics.jsonl its rows without the speed.
    log.txt has times, and is left out; a picture counts by its name and pixels.
    """
    workdir, found = pathlib.Path(workdir), {}
    for path in sorted(p for p in workdir.rglob("*") if p.is_file()):
        name = str(path.relative_to(workdir))
        if path.name in (".lock", "log.txt") or path.suffix == ".html":
            continue
        if name.startswith("checkpoints/") and path.name != "meta.json":
            continue
        try:
            found[name] = _content(path)
        except Exception:  # a damaged file, where it does no harm
            found[name] = f"damaged {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return found


def _content(path: pathlib.Path):
    if path.name == "meta.json":
        return json.loads(path.read_text())["leaves"]
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        changing = ("images_per_second", "crc32", "time")
        return [{k: v for k, v in row.items() if k not in changing} for row in rows]
    if path.suffix == ".npz":
        return _arrays(path)
    if path.suffix == ".json" and path.parent.name == "eval":
        from ddpm_jax.files import writers  # not with the config, which this file is too

        return json.dumps(_without_places(writers.read_json(str(path))), sort_keys=True)
    if path.name == "loss.png" or (path.suffix == ".png" and path.parent.name == "eval"):
        return "a picture"  # its title may name the run directory
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _arrays(path) -> dict[str, str]:
    result = {}
    with np.load(path) as arrays:
        for name, array in arrays.items():
            if name == "recipe":
                result[name] = json.dumps(_without_places(json.loads(str(array))), sort_keys=True)
            else:
                result[name] = f"{array.dtype}{array.shape}{hashlib.sha256(array).hexdigest()}"
    return result


def _without_places(tree):
    if isinstance(tree, dict):
        return {k: _without_places(v) for k, v in tree.items() if k not in ("workdir", "software")}
    return [_without_places(v) for v in tree] if isinstance(tree, list) else tree


def differences(workdir, expected: dict, *, also=()) -> list[str]:
    """The names of files that are missing, additional or different; [] if two run directories are equal.

    Args:
      expected: `contents` of an undisturbed run.
      also: patterns of names that may be there too.
    """
    found = contents(workdir)
    wrong = [n for n in expected | found if found.get(n, "nothing") != expected.get(n, "nothing")]
    return [n for n in wrong if not any(fnmatch.fnmatch(n, p) for p in also)]


def leftovers(workdir) -> list[str]:
    """Unfinished files and folders in a run directory."""
    return [str(path) for pattern in LEFTOVERS for path in pathlib.Path(workdir).rglob(pattern)]


def copy(source, target) -> str:
    shutil.copytree(source, target, symlinks=True)
    return str(target)
