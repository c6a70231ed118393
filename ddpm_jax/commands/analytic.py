"""The measured errors of x̂_0 of a run, from which the analytic variance is computed."""

from __future__ import annotations

import hashlib
import json
import os
import shlex

from ddpm_jax import options
from ddpm_jax.ddpm import Bounding
from ddpm_jax.files import results
from ddpm_jax.files.run_data import RunError
from ddpm_jax.files.runs import Run
from ddpm_jax.process.timesteps import SPACINGS, as_text


def variance_of(chosen) -> str | None:
    """The variance in given options of sampling or of the bound."""
    return getattr(getattr(chosen, "sampler", chosen), "variance", None)


def measured(chosen) -> Bounding:
    """The options under which errors are measured for given options of sampling or of the bound."""
    steps = chosen.steps
    if steps is not None:
        steps = f"{SPACINGS.get(getattr(chosen, 'spacing', None), '')}{as_text(steps)}"
    return Bounding(steps=steps, clip_x0=chosen.clip_x0)


def path(run: Run, kept: Bounding) -> str:
    """The path of the measured errors."""
    name = run.name("x_0_error", settings=options.changed(kept))
    return os.path.join(run.workdir, "eval", f"{name}.npz")


def errors_for(run: Run, chosen, variance: str | None):
    """The measured x_0_error [S] and its origin for the recipe; (None, None) for other variances than "analytic".

    Raises:
      RunError: the errors are not measured yet, or were measured with another model; names the command that does it.
    """
    if variance != "analytic":
        return None, None
    if getattr(chosen, "guidance", 1.0) != 1 or chosen.clip_x0 == "dynamic":
        raise RunError(
            "variance 'analytic' is measured of the model as it is: leave out --guidance and --clip=dynamic,"
            " or choose fixed_small or fixed_large"
        )
    kept = measured(chosen)
    file_path = path(run, kept)
    words = ["--mode=nll", f"--workdir={run.workdir}", "--variance=analytic", "--num_images=8"]
    words += [f"--weights={run.weights}"] if run.weights != "ema" else []
    words += [f"--steps={kept.steps}"] if kept.steps is not None else []
    words += [f"--{'' if kept.clip_x0 else 'no'}clip"] if kept.clip_x0 is not None else []
    command = f"python -m ddpm_jax.main {shlex.join(words)}"
    if not os.path.exists(file_path):
        raise RunError(
            "variance 'analytic' needs the errors of this model on training images: measure them with"
            f" {command}"
        )
    file = results.read_npz(file_path)
    saved, wanted = json.loads(str(file.get("recipe", "{}"))), run.recipe()
    wanted |= {"chosen": results.CHOSEN, "steps": kept.steps}
    wanted["clip_x0"] = run.method.resolve(kept).clip_x0
    names = ("weights_sha256", "model_sha256", "chosen", "steps", "clip_x0")
    if "curve_x_0_error" not in file or any(saved.get(name) != wanted[name] for name in names):
        raise RunError(
            f"{file_path} was measured with another model, with other steps or, by an earlier version, on the"
            f" first images of the files; measure again with {command}"
        )
    errors, count = file["curve_x_0_error"], len(file["total"])
    digest = hashlib.sha256(errors.tobytes()).hexdigest()
    return errors, {"split": "train", "num_images": count, "sha256": digest}
