"""Installs the package `ddpm_jax`, with the folders configs and experiments inside it."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

VERSION = re.search(
    r'__version__ = "(.*)"', Path("ddpm_jax/__init__.py").read_text(encoding="utf-8")
)[1]
TEST = ["pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.10"]
PRETRAINED = ["safetensors>=0.4", "huggingface_hub>=0.24"]
LOGGERS = ["tensorboard>=2.18", "wandb>=0.18"]
MP4 = ["imageio-ffmpeg>=0.5"]
NOTEBOOKS = ["nbclient>=0.10.1", "ipykernel>=6.29", "nbformat>=5.10"]
PACKAGES = find_namespace_packages(include=["ddpm_jax*"])
FOLDERS = find_namespace_packages(include=["configs*", "experiments*"])

setup(
    name="ddpm_jax",
    version=VERSION,
    license="Apache-2.0",
    description="Denoising diffusion probabilistic models in JAX and Flax",
    packages=PACKAGES + [f"ddpm_jax.{name}" for name in FOLDERS],
    package_dir={f"ddpm_jax.{name}": name.replace(".", "/") for name in FOLDERS},
    package_data={"ddpm_jax.commands.report": ["*.html.j2", "style.css"]},
    entry_points={"console_scripts": ["ddpm_jax = ddpm_jax.main:main"]},
    python_requires=">=3.11",
    # Floors, at or below what a Colab TPU runtime ships, and no upper pins: installing ddpm_jax never
    # moves an accelerator's own jax.
    install_requires=[
        "jax>=0.7.2",
        "flax>=0.11.2",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "tensorflow-datasets>=4.9.8",
        "importlib_resources",  # tensorflow-datasets needs it and does not declare it
        "ml-collections>=1.0.0",
        "absl-py>=1.4",
        "jaxtyping>=0.2.36",
        "jinja2>=3.1",
        "numpy>=2.0",
        "pillow>=10.0",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",  # carries the handwritten digits of configs/digits.py
    ],
    extras_require={
        "test": TEST + PRETRAINED + LOGGERS + MP4 + NOTEBOOKS,
        "pretrained": PRETRAINED,  # import and export of weights
        "bench": ["torch", "diffusers"],  # what experiments.speed compares with
        "tensorboard": LOGGERS[:1],  # --logger=tensorboard writes its files, without TensorFlow
        "wandb": LOGGERS[1:],  # --logger=wandb
        "mp4": MP4,  # --animation=mp4
        "heic": ["pillow-heif"],  # photographs of phones, .heic and .heif, in folders of pictures
        "tensorflow": ["tensorflow"],  # only for preparing a tensorflow-datasets data set
    },
)
