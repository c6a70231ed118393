"""How fast a diffusion config is on this machine, and how much of that its network needs by itself.

    python -m ddpm_jax.benchmark --config=configs/cifar10.py --batch_size=8

Prints the time to start, training and sampling speed, operations, memory, and three ratios: the training
step over the bare forward and backward pass of its network and loss, one network call of each sampler over
a bare forward pass, and the textbook form of the network over the one that is used. Times are medians
after a warm-up; what is compared runs in turns. Images are made up; data are loaded only for a shape or classes
that the config leaves to them.
"""

from __future__ import annotations

import functools
import json
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ddpm_jax import config as config_lib
from ddpm_jax import ddpm, main, parallel, runs, training

CHAIN_STEPS = 10  # of the reverse chains that are timed; they all cost the same
SAMPLERS = {
    "ancestral": {},
    "ddim": {"sampler": "ddim"},
    "ddim_eta": {"sampler": "ddim", "eta": 0.5},
    "dpm_solver_2": {"sampler": "dpm_solver", "order": 2},
    "dpm_solver_3": {"sampler": "dpm_solver", "order": 3},
    "heun": {"sampler": "heun"},  # of two calls a step, but for the last
}
GUIDED = {"guided": {"sampler": "ddim", "guidance": 3.0}}  # of a model that can be


def median_seconds(calls: dict[str, Callable], at_least: float = 10.0) -> dict[str, float]:
    """Median seconds of each call, run one after the other, again and again, after one warm-up each."""
    for call in calls.values():
        jax.block_until_ready(call())
    times = {name: [] for name in calls}
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - begin < at_least:
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark(config, *, batch_size: int | None = None, plain: bool = True) -> dict:
    """Measures a config; see the module.

    Args:
      batch_size: over all local devices; None takes the config's.
      plain: also time the textbook form of the network, which is compiled for it.

    Returns:
      numbers by name; their units end the names.
    """
    config = config.copy_and_resolve_references()
    runs.fill_in(config)
    batch_size = batch_size or config.training.batch_size
    with config_lib.errors_at("config.training"):
        parallel.check_batch_size("batch_size", batch_size, config.step.accumulate)
    schedule, unet = ddpm.make_parts(config)
    method = ddpm.make_method(config)
    tx, _ = training.optimizer_of(config)
    key = jax.random.key(config.seed)
    update = training.make_update(method, tx, key, axis_name=parallel.AXIS, **config.step)

    start = time.perf_counter()
    state = jax.block_until_ready(parallel.place(training.init_state(method, tx, key)))
    init_seconds = time.perf_counter() - start
    params = parallel.place(state.params)
    shape = (batch_size, *method.image_shape)
    batch = parallel.shard(
        {
            "image": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
            "label": np.zeros(batch_size, np.int32),
            "index": np.arange(batch_size, dtype=np.int32),
        }
    )
    start = time.perf_counter()
    step = parallel.compile_step(update, state, batch)
    compile_seconds = time.perf_counter() - start

    def train_step():
        nonlocal state
        state, loss = step(state, batch)
        return loss, state.params

    # The bare network, on noise at random times; as much work as a step cannot do without.
    x = parallel.shard(np.random.default_rng(1).normal(size=shape).astype(np.float32))
    t = parallel.shard(np.arange(batch_size, dtype=np.int32) * len(schedule) // batch_size)
    label = batch["label"] if unet.num_classes else None
    keys = parallel.shard(jax.random.split(key, batch_size))

    def forward(unet, params, inputs, dropout_keys=None):
        x, t, label = inputs
        return unet.apply({"params": params}, x, t, label, dropout_keys=dropout_keys)

    def gradient(unet, params, inputs):
        *inputs, keys = inputs

        def loss(params):
            return jnp.mean(jnp.square(forward(unet, params, inputs, keys) - inputs[0]))

        return jax.value_and_grad(loss)(params)

    bare_forward = parallel.map_shards(functools.partial(forward, unet))
    bare_gradient = parallel.map_shards(functools.partial(gradient, unet))
    few_steps = str(min(CHAIN_STEPS, len(schedule)))
    _, bound = method.make_bound(steps=few_steps)

    def chain(options):
        sample = method.make_sample(steps=few_steps, **options)
        mapped = parallel.map_shards(lambda tree, examples: sample(*tree, *examples))
        return lambda: mapped((params, key), (batch["index"], batch["label"]))

    guided = GUIDED if config.diffusion.get("label_dropout") else {}
    all_terms = parallel.map_shards(lambda tree, batch: bound(*tree, batch))
    calls = {
        "train": train_step,
        "gradient": lambda: bare_gradient(params, (x, t, label, keys)),
        **{name: chain(options) for name, options in (SAMPLERS | guided).items()},
        "bound": lambda: all_terms((params, key), batch),
        "forward": lambda: bare_forward(params, (x, t, label)),
    }
    seconds = median_seconds(calls)
    stats = jax.local_devices()[0].memory_stats() or {}
    if plain:
        textbook = unet.clone(plain=True)
        plain_gradient = parallel.map_shards(functools.partial(gradient, textbook))
        plain_forward = parallel.map_shards(functools.partial(forward, textbook))
        versus = {
            "gradient": calls["gradient"],
            "plain_gradient": lambda: plain_gradient(params, (x, t, label, keys)),
            "forward": calls["forward"],
            "plain_forward": lambda: plain_forward(params, (x, t, label)),
        }
        versus = median_seconds(versus)

    chain_step, bound_term = (seconds[name] / int(few_steps) for name in ("ancestral", "bound"))
    over = {}
    for name in SAMPLERS | guided:
        count = int(few_steps) if name != "heun" else 2 * int(few_steps) - 1
        over[f"{name}_call_over_bare_forward"] = seconds[name] / count / seconds["forward"]
    per_image = jax.local_device_count() / batch_size
    flops = parallel.flops(step) * per_image
    forward_flops = parallel.flops(bare_forward.lower(params, (x, t, label)).compile()) * per_image
    result = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "batch_size": batch_size,
        "init_seconds": init_seconds,
        "compile_seconds": compile_seconds,
        "train_step_seconds": seconds["train"],
        "train_images_per_second": batch_size / seconds["train"],
        "sample_step_images_per_second": batch_size / chain_step,
        "sample_chain_steps": len(schedule),
        "sample_chain_steps_timed": int(few_steps),
        "sample_chain_images_per_second": batch_size / (chain_step * len(schedule)),
        "train_gflop_per_image": flops / 1e9,
        "forward_gflop_per_image": forward_flops / 1e9,
        "train_gflop_per_second": flops * batch_size / seconds["train"] / 1e9,
        "step_memory_mib": parallel.memory(step) / 2**20,
        "peak_host_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "train_step_over_bare_gradient": seconds["train"] / seconds["gradient"],
        **over,
        "bound_term_over_bare_forward": bound_term / seconds["forward"],
    }
    if "peak_bytes_in_use" in stats:  # a CPU has no such count
        result["peak_device_memory_mib"] = stats["peak_bytes_in_use"] / 2**20
    if plain:
        result["plain_gradient_over_gradient"] = versus["plain_gradient"] / versus["gradient"]
        result["plain_forward_over_forward"] = versus["plain_forward"] / versus["forward"]
    return result


def show(result: dict) -> str:
    """The numbers for people, one a line."""
    return "\n".join(
        f"{name:32} {value:{',d' if isinstance(value, int) else '.4g'}}"
        for name, value in result.items()
    )


def _main(argv) -> None:
    options = main.given_options("the benchmark", ("batch_size",))
    parallel.enable_compilation_cache()
    config = main.given_config()
    if config is None:
        raise app.UsageError("the benchmark needs --config=configs/NAME.py")
    print(parallel.banner(), flush=True)
    result = benchmark(config, plain=_PLAIN.value, **options)
    print(show(result))
    print(json.dumps({"device": parallel.banner(), **result}))


if __name__ == "__main__":
    _PLAIN = flags.DEFINE_bool("plain", True, "Also times the textbook form of the network.")
    main.run(
        _main,
        lambda: (
            f"{__doc__}\n{main.help_on(('config', 'batch_size', 'plain'), benchmark, 'benchmark')}"
        ),
    )
