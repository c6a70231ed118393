"""How a test compiles, where it runs longer than it compiles."""

import contextlib
import os

import jax


@contextlib.contextmanager
def optimized():
    """Programs compiled within are optimized, as production's are; conftest.py saves the time of it elsewhere."""
    name = "jax_disable_most_optimizations"
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
