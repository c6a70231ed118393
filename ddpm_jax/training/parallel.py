"""The devices; the only file that uses pmap.

State and parameters have no device axis: `place` copies them to every local device, and they enter a mapped function
unbatched. `shard` splits batches along their first axis.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import glob
import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ddpm_jax
from ddpm_jax import processes

AXIS = "batch"


def place(tree):
    """A copy of a tree on each local device. State and parameters enter mapped functions only through it.

    Other arrays are transferred again at every call (0.27 s for 128 MiB on 4 CPU devices), and donating them fails in
    a job of several processes.
    """
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(jax.device_get(tree), NamedSharding(mesh, PartitionSpec()))


def shard(batch):
    """[B, …] -> [L, B/L, …] for L local devices."""
    n = jax.local_device_count()

    def split(x):
        assert x.shape[0] % n == 0, (x.shape, n)  # pmap would silently use fewer devices
        return x.reshape(n, x.shape[0] // n, *x.shape[1:])

    return jax.tree.map(split, batch)


def check_batch_size(name: str, batch_size: int, accumulate: int = 1) -> None:
    """Checks that the global batch divides evenly over devices and accumulation parts.

    Raises:
      ValueError: names the nearest sizes that do.
    """
    unit = jax.device_count() * accumulate
    if batch_size < 1 or batch_size % unit:
        below, above = batch_size // unit * unit, (max(batch_size, 0) // unit + 1) * unit
        sizes = " or ".join(str(size) for size in (below, above) if size > 0)
        parts = f" and {accumulate} parts of accumulation" if accumulate > 1 else ""
        raise ValueError(
            f"{name} {batch_size} does not divide over {jax.device_count()} devices{parts}; use {sizes}"
        )


def local_rows(batch_size: int) -> slice:
    """The part of the global batch that this process feeds."""
    rows = batch_size // processes.count()
    return slice(processes.index() * rows, (processes.index() + 1) * rows)


def compile_step(step: jax.tree_util.Partial, state, batch) -> functools.partial:
    """Compiles (state, sharded batch) -> (state, loss) for all devices of all processes; donates the state.

    Args:
      step: its arguments, such as a key, are data of the program, not constants: a run with another seed finds it compiled.

    Returns:
      a callable whose `func` is a `jax.stages.Compiled`, with `memory_analysis()` and `cost_analysis()` of one device. In a
      job of several processes it is the mapped function, which compiles at its first call: there a Compiled takes global
      arrays, and a process has only its own part. On several CPU devices a call returns when the step has ended.
    """
    mapped = jax.pmap(
        lambda step, state, batch: step(state, batch),
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=1,
    )
    step = place(step)
    program = mapped if processes.count() > 1 else compiled(mapped, step, state, batch)
    several_cpus = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    return (_OneAtATime if several_cpus else functools.partial)(program, step)


class _OneAtATime(functools.partial):
    """A step that returns when it has ended.

    Several CPU devices of one process share its threads. When steps wait in a queue, the means over devices can wait for
    each other for ever (jaxlib 0.10.2; within a minute at 1,000 steps a second); XLA then aborts the process.
    """

    def __call__(self, *arguments):
        return jax.block_until_ready(super().__call__(*arguments))


def compiled(mapped: Callable, *arguments):
    """A mapped or jit-compiled function, compiled for these arguments with `compiler_options`."""
    gc.disable()  # tracing creates millions of objects that stay alive: 4.3 s instead of 5.5 for CIFAR-10
    try:
        return mapped.lower(*arguments).compile(compiler_options=compiler_options())
    finally:
        gc.enable()


@functools.cache
def compiler_options() -> dict[str, str]:
    """The options of XLA with which this backend is fastest; none where it does not know them.

    jaxlib 0.10 hands the convolutions of CPUs to YNNPACK, which is slower at them than Eigen; dots and reductions stay
    with it. See docs/speed.md.
    """
    if jax.default_backend() != "cpu":
        return {}
    kept = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    options = {"xla_cpu_experimental_ynn_fusion_type": kept}
    try:
        jax.jit(lambda x: x + 1).lower(0.0).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:  # this jaxlib has no such option
        return {}
    return options


def memory(compiled) -> float:
    """Bytes that a compiled function or step needs on one device, arguments and results included; or NaN."""
    compiled = getattr(compiled, "func", compiled)
    if not isinstance(compiled, jax.stages.Compiled):
        return float("nan")
    stats = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )


def free_memory(root: str = "/") -> float:
    """Free bytes on one device; inf if unknown.

    On a CPU this is the memory that the system reports as available, with swap, within the limits of the process's
    control groups, shared by its devices.

    Args:
      root: root of the file system in which the operating system reports memory.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", float("inf")) - stats.get("bytes_in_use", 0)

    def numbers(*names: str) -> dict[str, int]:
        """The lines "WORD NUMBER" of a file as {word: number}; a line with only a number has the word ""."""
        found = {}
        with (
            contextlib.suppress(OSError),
            open(os.path.join(root, *names), encoding="utf-8") as file,
        ):
            for line in file:
                *word, value = line.removesuffix("kB\n").split() or [""]
                if value.isdecimal():
                    found[" ".join(word)] = int(value)
        return found

    system = numbers("proc", "meminfo")  # in kB
    swap = 1024 * system.get("SwapFree:", 0)
    free = [1024 * system["MemAvailable:"] + swap] if "MemAvailable:" in system else []
    groups = []
    with contextlib.suppress(OSError), open(os.path.join(root, "proc/self/cgroup")) as file:
        groups = [line.strip().split(":", 2)[1:] for line in file]
    names = {"": ("memory.max", "memory.current")}  # version 2, whose controllers have no names
    names["memory"] = ("memory.limit_in_bytes", "memory.usage_in_bytes")  # version 1
    for controllers, group in groups:
        limit, usage = names.get(controllers, (None, None))
        folders = ["sys/fs/cgroup", controllers, *group.strip("/").split("/")]
        for depth in (
            range(2, len(folders) + 1) if limit else ()
        ):  # limits of parent groups hold too
            folder = folders[:depth]
            most, used = (numbers(*folder, name).get("") for name in (limit, usage))
            if most is not None and used is not None:
                cache = numbers(*folder, "memory.stat").get("inactive_file", 0)  # reclaimable
                free.append(most - used + cache + swap)
    return min(free, default=float("inf")) / jax.local_device_count()


def peak_flops(dtype: str) -> float:
    """The operations per second of the local devices together, measured at a large matrix product of this type."""
    cpu = jax.default_backend() == "cpu"
    side, count, best = (2048, 1, 5) if cpu else (8192, 20, 3)
    a = jnp.full((jax.local_device_count(), side, side), 1 / side, dtype)
    product = Mapped(lambda _, a: functools.reduce(lambda b, _: b @ a, range(count), a))
    seconds = []
    for _ in range(best + 1):
        start = time.perf_counter()
        jax.block_until_ready(product(0.0, a))
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 * count * len(a) / min(seconds[1:])


class Mapped:
    """function(tree, batch) on each of this process's devices: (tree, sharded batch) -> [L, …].

    It is compiled with `compiler_options` for the shapes of the batch at their first call; `tree` always has the same.
    """

    def __init__(self, function: Callable):
        self.mapped = jax.pmap(function, in_axes=(None, 0), devices=jax.local_devices())
        self.programs: dict[tuple, Callable] = {}

    def compile(self, tree, batch) -> Callable:
        """The program for these arguments, which is compiled unless it exists."""
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))
        if shapes not in self.programs:
            self.programs[shapes] = compiled(self.mapped, tree, batch)
        return self.programs[shapes]

    def __call__(self, tree, batch):
        return self.compile(tree, batch)(tree, batch)


class map_examples:
    """Runs function(params, key, *examples) over this process's devices.

    A call takes (params, key, *examples [N, …]) and returns a tree of NumPy [N, …] for any N: the last example is repeated
    to fill all devices, and the copies are removed again. `params` come from `place` or from a training state.
    """

    def __init__(self, function: Callable):
        self.mapped = Mapped(lambda tree, examples: function(*tree, *examples))

    def compile(self, params, key, *examples) -> None:
        """Compiles for examples of these shapes."""
        self.mapped.compile((params, key), _filled(examples))

    def send(self, params, key, *examples):
        """Starts the computation; returns at once with what `fetch` takes."""
        return len(examples[0]), self.mapped((params, key), _filled(examples))

    def fetch(self, sent):
        """Waits for the results of `send`."""
        count, result = sent
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], jax.device_get(result))

    def __call__(self, params, key, *examples):
        return self.fetch(self.send(params, key, *examples))


def _filled(examples):
    """The shards of the examples, with copies of the last to fill all devices."""
    count = len(examples[0])
    rows = np.minimum(np.arange(count + -count % jax.local_device_count()), count - 1)
    return shard(tuple(x[rows] for x in examples))


def banner() -> str:
    """Versions, devices and the precision of products, in one line; a warning if an accelerator is present but unused."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = [f"ddpm_jax {ddpm_jax.__version__}"]  # an editable install may have an older number
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    device = jax.devices()[0]
    line = (
        f"Python {platform.python_version()}, {', '.join(versions)}; {jax.device_count()} ×"
        f" {device.device_kind} ({device.platform}), {processes.count()} process(es)"
    )
    chosen = jax.config.jax_default_matmul_precision
    if (
        device.platform != "cpu" or chosen
    ):  # TF32 on a GPU, bfloat16 on a TPU, unless chosen otherwise
        default = {"gpu": "tensorfloat32", "tpu": "bfloat16"}.get(device.platform, "float32")
        line += f"; products of float32 in {chosen or default}"
        line += "" if chosen else " (JAX_DEFAULT_MATMUL_PRECISION=highest for float32)"
    if device.platform == "cpu" and (
        glob.glob("/dev/nvidia[0-9]") or glob.glob("/dev/accel[0-9]*")
    ):
        line += "\nWARNING: this machine has an accelerator, but jax runs on the CPU: install jax for it"
    return line


def enable_compilation_cache() -> None:
    """Keeps compiled programs for the next start, unless JAX_COMPILATION_CACHE_DIR is already set.

    The folder carries the version of jaxlib and the kind of processor: programs of another version or for
    another instruction set must not be loaded.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    processor = platform.machine() + platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        processor += "".join(
            sorted({line for line in file if line.startswith(("flags", "Features"))})
        )
    kind = hashlib.sha256(processor.encode()).hexdigest()[:8]
    folder = f"jaxlib-{importlib.metadata.version('jaxlib')}-{kind}"
    root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    jax.config.update("jax_compilation_cache_dir", os.path.join(root, "ddpm_jax", folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
