"""A run directory as the commands read it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from ddpm_jax import data, options, processes
from ddpm_jax import method as method_lib
from ddpm_jax.files import checkpoints
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.run_data import RunError, saved_data
from ddpm_jax.names import check_choice, full_name, installed
from ddpm_jax.process.timesteps import as_text

EMA_SHARE = 0.02  # share of the random initial weights in the EMA weights from which on a warning is printed
PARTS = "ddpm|networks|process|experiments|configs"  # what is_part may be of
Checkpoint = Literal["newest", "best"] | int
NAME_LIMIT = 180  # maximum length of a file name before its suffixes; file systems allow 255 bytes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """The contents of a run directory.

    Attributes:
      workdir: its absolute path.
      config: the ConfigDict that it was trained with.
      method: the Method of the config.
      params: the parameters, on the host.
      step: the step of the checkpoint.
      weights: "ema" or "raw".
    """

    workdir: str
    config: Any
    method: method_lib.Method
    params: Any
    step: int
    weights: str

    def recipe(self, settings: Mapping[str, Any] | None = None) -> dict:
        """The origin of the parameters, with digests of them, of their model, and of code outside ddpm_jax.

        Args:
          settings: of the result, whose code counts too, such as a sampler of one's own; they are not part of the recipe.
        """
        weights = hashlib.sha256()
        for leaf in jax.tree.leaves(self.params):
            weights.update(np.ascontiguousarray(leaf))
        left_out = ("training", "step", "optimizer", "preview", "data", "seed", "init_from")
        config = json.loads(config_lib.to_json(self.config))
        model = {name: value for name, value in config.items() if name not in left_out}
        return {
            "workdir": self.workdir,
            "step": self.step,
            "weights": self.weights,
            "weights_sha256": weights.hexdigest(),
            "model_sha256": hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest(),
            **code_of(config_lib.fields(self.config) | dict(settings or {})),
        }

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that it was trained with, by their numbers; empty if not saved."""
        return tuple((saved_data(self.workdir) or {}).get("class_names", ()))

    def name(self, *parts: str, settings: Mapping[str, Any] | None = None) -> str:
        """A file name for a result: step, weights, the parts, and the settings that are not None."""
        words = [f"step_{self.step:08d}", self.weights, *parts]
        settings = {key: value for key, value in (settings or {}).items() if value is not None}
        if "steps" in settings:
            settings["steps"] = as_text(settings["steps"])
        words += [f"{key}_{_short(value)}" for key, value in sorted(settings.items())]
        name = "_".join(words)
        if len(name) <= NAME_LIMIT:
            return name
        return f"{name[:NAME_LIMIT]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _short(value) -> str:
    """A value as part of a file name: 250-500-750 for a list, the last part of a path."""
    text = str(value)
    listed = "-".join(text.strip("[]()").replace(" ", "").split(","))
    if isinstance(value, str) and text.startswith("["):  # times themselves, not numbers of steps
        listed = f"t{listed}"
    if re.fullmatch(r"[\w.-]{1,24}", listed):
        return listed
    last = re.sub(r"[^\w.-]", "", os.path.basename(text.rstrip("/")).partition(".")[0])
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{last[:24]}-{digest}" if last and os.sep in text else digest


def load(
    workdir: str,
    *,
    weights: str = "ema",
    checkpoint: Checkpoint = "newest",
    allow_code: bool = False,
    method: method_lib.Method | None = None,
) -> Run:
    """Loads a checkpoint of a run directory with its own config. Needs no optimiser.

    Args:
      weights: "ema", the moving average of the parameters, or "raw", the last ones.
      checkpoint: "newest"; "best", by config.training.keep_best; or the step of one that is there.
      allow_code: import modules outside ddpm_jax and experiments that the config names.
      method: the Method itself; None for that of the config.

    Raises:
      ConfigError, CheckpointError, RunError: no run, no checkpoint yet, or none that can be read.
    """
    workdir = os.path.abspath(config_lib.path(workdir))
    refuse_links(workdir)
    config = config_lib.load(os.path.join(workdir, "config.json"))
    with options.errors_at("weights"):
        check_choice("weights", weights, ("ema", "raw"))
    foreign = foreign_modules(config) if method is None else []
    if foreign and not allow_code:
        raise RunError(
            f"{workdir} imports code from outside ddpm_jax, {', '.join(foreign)}; if you trust it, give"
            " --allow_code (allow_code=True in Python)"
        )
    method = method or method_lib.from_config(config)
    part = {"ema": "ema_params", "raw": "params"}[weights]
    template = {part: jax.eval_shape(method.init, jax.random.key(0))}
    directory = os.path.join(workdir, "checkpoints")
    number = processes.from_first(lambda: _step_of(checkpoint, config, directory))
    restored = checkpoints.restore(directory, template, step=number, partial=True)
    if restored is None:
        raise RunError(f"{workdir} has no checkpoint yet; train first, or wait for one")
    state, step = restored
    if weights == "ema" and (warning := ema_warning(config, step)):
        print(f"WARNING: {warning}", flush=True)
    params = state[part]
    return Run(
        workdir=workdir, config=config, method=method, params=params, step=step, weights=weights
    )


def _step_of(checkpoint: Checkpoint, config, directory: str) -> int | None:
    """The step of a checkpoint; None for the newest.

    Raises:
      RunError: there is no best one.
    """
    if checkpoint == "newest":
        return None
    if checkpoint != "best":
        if not isinstance(checkpoint, int) or isinstance(checkpoint, bool):
            raise options.ConfigError(
                f"checkpoint must be newest, best or the number of a step, got {checkpoint!r}"
            )
        return checkpoint
    name = config.training.get("keep_best")
    if name is None:
        raise RunError(
            f"{directory}: nothing says which checkpoint is the best; train with config.training.keep_best, such as"
            " =loss, or give the step of one"
        )
    best = checkpoints.best_of(directory, name)
    if best is None:
        raise RunError(
            f"{directory}: no checkpoint has a value of {name} (config.training.keep_best)"
        )
    return best[0]


def foreign_modules(config, *, to_train: bool = False) -> list[str]:
    """The modules named in a config that do not belong to this installation.

    Args:
      to_train: also those that only training imports.
    """
    found = []
    for field, values in config_lib.fields(config).items():
        if field.startswith(("training.", "plan.")) and not to_train:
            continue
        for value in values if isinstance(values, (tuple, list)) else (values,):
            module, colon, _ = str(value).partition(":")
            is_path = field in ("data.data_dir", "init_from")
            is_path |= field == "data.name" and module in data.WITH_PATH
            if field != "method" and (not isinstance(value, str) or not colon or is_path):
                continue
            if not is_part(module):
                found.append(value)
    return found


def is_part(module: str) -> bool:
    """Whether a module of this installation makes parts of models, and neither reads nor writes files, nor is a program."""
    name = full_name(module)
    if (
        not re.match(rf"ddpm_jax\.({PARTS})(\.|$)", name)
        or not name.replace(".", "").isidentifier()
    ):
        return False
    file = installed(name.removeprefix("ddpm_jax.").replace(".", os.sep))
    if file is None or os.path.basename(file) == "__main__.py":
        return False
    return "\nif __name__ ==" not in pathlib.Path(file).read_text(encoding="utf-8")


def refuse_links(workdir: str) -> None:
    """Checks that a run directory holds files and folders only: a link of a stranger could lead to files of yours.

    The run directory itself may be a link, and links in it may lead to its own files. What Weights & Biases wrote is
    not read, and not checked.

    A training may delete files and folders meanwhile.

    Raises:
      RunError: a link that leads out of it, a device, or a folder that cannot be read; one line.
    """
    root = os.path.realpath(workdir)
    folders = [root] if os.path.isdir(root) else []
    while folders:
        try:
            with os.scandir(folder := folders.pop()) as found:
                entries = list(found)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RunError(f"{folder} cannot be read: {error.strerror}") from error
        for entry in entries:
            target = os.path.realpath(entry.path) if entry.is_symlink() else ""
            if target and target != root and not target.startswith(f"{root}{os.sep}"):
                raise RunError(
                    f"{entry.path} leads out of the run directory, to {target}; put what it leads to in its place, or"
                    " make a link of the whole run directory"
                )
            if entry.is_dir(follow_symlinks=False):
                folders += [entry.path] if entry.path != os.path.join(root, "wandb") else []
            elif not (target or entry.is_file(follow_symlinks=False)) and os.path.lexists(entry):
                raise RunError(f"{entry.path} is neither a file nor a folder; remove it")


def code_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """{"code_sha256": digest} of the files of the modules that settings name, {} if they are all those of ddpm_jax.

    A result is computed again if a sampler or network of one's own has changed since.
    """
    modules = {
        full_name(str(value).partition(":")[0])
        for name, value in settings.items()
        if isinstance(value, str) and (":" in value or name == "method")
    }
    digest = hashlib.sha256()
    for name in sorted(modules):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and (not name.startswith("ddpm_jax.") or name.startswith("ddpm_jax.experiments.")):
            digest.update(pathlib.Path(file).read_bytes())
    return (
        {} if digest.digest() == hashlib.sha256().digest() else {"code_sha256": digest.hexdigest()}
    )


def ema_warning(config, step: int) -> str:
    """A one-line warning if the EMA weights are still close to their initial values; otherwise empty."""
    if config.get("init_from"):  # the initial weights are not random
        return ""
    decay, warmup = config.step.get("ema_decay", 0.9999), config.step.get("ema_warmup", False)
    share = initial_share(step, ema_decay=decay, ema_warmup=warmup)
    if share < EMA_SHARE:
        return ""
    return (
        f"after {step:,} steps with ema_decay {decay}, {100 * share:.0f} % of the EMA weights are still the"
        " random initial ones: use --weights=raw, train longer, or train with"
        " --config.step.ema_warmup=True or a smaller --config.step.ema_decay"
    )


def initial_share(step: int, *, ema_decay: float, ema_warmup: bool) -> float:
    """The share of the initial parameters in the EMA after `step` steps: the product of the decays."""
    decay = np.full(step, ema_decay)
    if ema_warmup:
        first = np.arange(step)
        decay = np.minimum(decay, (1 + first) / (10 + first))
    return float(np.exp(np.sum(np.log(decay)))) if ema_decay > 0 or not step else 0.0
