"""Four CPU devices, so that every test of sharding is a real one; broadcasting by rank is an error; fast compiling."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

# Most of the time is compiling; JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as production does.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
