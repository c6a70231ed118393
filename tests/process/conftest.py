"""Small programs that draw many numbers: here optimizing pays."""

import os

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def optimized():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update(
        "jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    )
