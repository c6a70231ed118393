"""Calls commands by their mode with flat keyword arguments, like a command line."""

from ddpm_jax import main, modes
from ddpm_jax.files import runs


def call(mode, workdir, *, weights="ema", **values):
    """The command of a mode on a run directory."""
    command, run = modes.COMMANDS[mode], runs.load(workdir, weights=weights, allow_code=True)
    values = {name: value for name, value in values.items() if value is not None}
    return command(run, **main.arguments(command, run, values, ""))
