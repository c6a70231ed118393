"""Commands by their modes, with flat keyword arguments, as a command line gives them."""

from ddpm_jax import main, options
from ddpm_jax.files import runs


def call(mode, workdir, *, weights="ema", **values):
    """The command of a mode on a run directory."""
    command = main.COMMANDS[mode]
    kwargs = options.bind(command, values, "", given=main.POSITIONAL)
    return command(runs.load(workdir, weights=weights), **kwargs)
