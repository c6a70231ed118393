"""Packages that are imported only when something needs them."""

from __future__ import annotations

import importlib
from typing import Any

from ddpm_jax.options import ConfigError


def load(module: str, package: str, what: str) -> Any:
    """A module of a package that ddpm_jax does not require.

    Raises:
      ConfigError: it is not installed; says what needs it, and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{what} needs {package} ({error}): pip install {package}") from error
