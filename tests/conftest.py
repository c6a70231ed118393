"""Four CPU devices, so that every test of sharding is a real one; broadcasting by rank is an error; fast compiling.

Most of the time is compiling. Programs are compiled with little optimization, and a program that two tests or two
processes need is compiled once. JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as production does.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile

import jaxlib

flags = ["--xla_force_host_platform_device_count=4"]
fast = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
known = tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11)  # an unknown flag is fatal
if fast and known:
    flags.append("--xla_cpu_use_fusion_emitters=false")  # compiles three times as fast
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # in the first process; the others inherit it
    folder = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402 – the variables come first
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(200_000, 20, 100)  # tracing makes millions of objects that live on


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drops the compiled programs of a file of tests; all files together would fill the memory of four processes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def forget_modules(tmp_path_factory):
    """Drops the modules that a test imported from its folder; the next test's may have the same name."""
    before, folder = set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folder):
            del sys.modules[name]
