"""Full optimization for tests that run longer than they compile."""

import contextlib
import os

import jax


@contextlib.contextmanager
def optimized():
    """A context in which programs are compiled with full optimization, which conftest.py turns off elsewhere."""
    name = "jax_disable_most_optimizations"
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
