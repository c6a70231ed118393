"""The commands import and export: pretrained weights of other codebases, both ways."""

from __future__ import annotations

import os
from typing import Annotated, Any

import jax

from ddpm_jax import extras, pretrained
from ddpm_jax.commands.report import results
from ddpm_jax.commands.report.find import find
from ddpm_jax.files import checkpoints, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.run_data import RunError
from ddpm_jax.training import step as step_lib

CARD = """---
license: {licence}
library_name: diffusers
tags:
- pytorch
- diffusers
- unconditional-image-generation
---

# {name}

A denoising diffusion model (Ho et al. 2020), trained with ddpm_jax {version}.

| | |
|---|---|
{facts}

## Use

```python
from diffusers import DDPMPipeline

images = DDPMPipeline.from_pretrained("{name}")(batch_size=4).images
```

## Results

{results}

## Training

{training}

## Data and limits

Fill in: where the data come from, what they do not show, and what the model must not be used for.
"""


def import_weights(
    config: Any,
    workdir: str,
    *,
    source: Annotated[
        str,
        "The weights: a folder or hub name of diffusers, or with --config a .pt of OpenAI's code or an .npz of Ho et al.'s.",
    ],
) -> dict:
    """Makes a run directory from pretrained weights, which every mode accepts."""
    workdir = os.path.abspath(config_lib.path(workdir))
    if os.path.exists(workdir) and (not os.path.isdir(workdir) or os.listdir(workdir)):
        raise RunError(f"{workdir} exists already; choose another --workdir, or move it away")
    found = pretrained.read(source, config)
    for note in found.notes:
        print(f"WARNING: {source}: {note}", flush=True)
    tx, _ = step_lib.optimizer_of(found.config)
    state = step_lib.state_of(found.method, tx, jax.tree.map(jax.numpy.asarray, found.params))
    checkpoints.save(os.path.join(workdir, "checkpoints"), state, step=0)
    config_lib.save(found.config, os.path.join(workdir, "config.json"))
    writers.append_line(os.path.join(workdir, "metrics.jsonl"), {"step": 0})
    count = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    shape = "×".join(map(str, found.method.image_shape))
    flags = " ".join(
        f"--{'' if value else 'no'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in found.config.preview.items()
        if name not in ("every", "num_images")
    )
    print(
        f"{count:,} parameters for images of {shape}, from {source}\n"
        f"run directory: {workdir}\n"
        f"its own sampler in few steps: --mode=sample --workdir={workdir} {flags}",
        flush=True,
    )
    return {"workdir": workdir, "parameters": count}


def export(
    run: Any,
    *,
    out: Annotated[str, "The folder to write, a new one."],
    licence: Annotated[str, "The licence of the weights, for the model card."] = "unknown",
    push: Annotated[
        str | None, "USER/NAME of the hub, to which the folder is uploaded afterwards."
    ] = None,
) -> dict:
    """Writes a folder that DDPMPipeline.from_pretrained of diffusers loads, with a model card."""
    out = os.path.abspath(config_lib.path(out))
    hub = push and extras.load("huggingface_hub", "huggingface_hub", "--push")
    name = push or os.path.basename(out)
    pretrained.write_folder(run.method, run.params, out, _card(run, name, licence))
    print(f"{out}: diffusers loads it by DDPMPipeline.from_pretrained", flush=True)
    if hub:
        address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        print(f"sending it to {address}/{push}", flush=True)
        try:
            hub.create_repo(push, exist_ok=True)
            hub.upload_folder(repo_id=push, folder_path=out)
        except Exception as error:  # the library has its own, and passes on those of the network
            raise RunError(
                f"{address}/{push} was not written ({' '.join(str(error).split())[:200]}); {out} is complete:"
                " check the name, the network and `hf auth login`"
            ) from error
    return {"out": out}


def _card(run: Any, name: str, licence: str) -> str:
    """The model card: facts, results with their settings, and the settings of training."""
    import ddpm_jax

    config = run.config
    facts = {
        "data": config.data.name,
        "images": "×".join(map(str, run.method.image_shape)),
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(run.params)):,}",
        "steps": f"{run.step:,} of batch size {config.training.batch_size}",
        "weights": "moving average" if run.weights == "ema" else "last parameters",
        "weights from": config.get("init_from"),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value)
    scores = [
        f"| {score.name} | {score.value} | {', '.join(f'{k} {v}' for k, v in score.settings.items())} |"
        for score in results.scores(find(run.workdir, allow_code=True))
    ]
    measured = (
        "None measured." if not scores else "| | value | of |\n|---|---|---|\n" + "\n".join(scores)
    )
    sections = ("optimizer", "step", "schedule", "diffusion")
    lines = []
    for section in sections:
        values = {k: v for k, v in config[section].items() if v is not None}
        values = {k: v for k, v in values.items() if not isinstance(v, tuple) or len(v) < 9}
        lines.append(f"* {section}: {', '.join(f'{k} {v}' for k, v in values.items())}")
    return CARD.format(
        name=name,
        licence=licence,
        version=ddpm_jax.__version__,
        facts=rows,
        results=measured,
        training="\n".join(lines),
    )
