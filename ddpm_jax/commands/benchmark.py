"""Measures how fast a config trains and samples on this machine, relative to its network alone.

    python -m ddpm_jax.benchmark --config=configs/cifar10.py --batch_size=8

Prints the time to start, training and sampling speed, operations, memory, and three ratios: the training step over the
bare forward and backward pass of its network, one network call of each sampler over a bare forward pass, and the
textbook form of the network over the form that is used. Times are medians after a warm-up; the calls that a ratio
compares run in turns. Images are random; data are loaded only if the config takes its image shape or classes from them.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import options
from ddpm_jax.ddpm import Bounding, Sampling
from ddpm_jax.files import run_data
from ddpm_jax.files.run_data import RunError
from ddpm_jax.method import from_config, is_diffusion
from ddpm_jax.options import AtLeast
from ddpm_jax.process.samplers import DDIM, SAMPLERS, DPMSolver
from ddpm_jax.training import parallel
from ddpm_jax.training import step as step_lib

CHAIN_STEPS = 10  # steps of the reverse chains that are timed; all steps cost the same
TWO_CALLS = ("heun",)  # samplers that evaluate the network twice in every step but the last


def benchmark(
    config,
    *,
    batch_size: Annotated[
        int | None, "How many images are computed at a time. Default: as in the config.", AtLeast(1)
    ] = None,
    plain: Annotated[bool, "Also times the textbook form of the network."] = True,
    sampling: Sampling = Sampling(),
) -> dict[str, Any]:
    """Measures how fast a config trains and samples, relative to its network alone.

    Args:
      batch_size: over all local devices.
      sampling: a sampler to time together with the built-in ones.

    Returns:
      numbers by name; the names end in their units.
    """
    print(parallel.banner(), flush=True)
    bench = Benchmark.of(config, batch_size)
    result = bench.measure(sampling, plain)
    print("\n".join(f"{name:32} {_shown(value)}" for name, value in result.items()))
    print(json.dumps({"device": parallel.banner(), **result}))
    return result


def _shown(value: float) -> str:
    return f"{value:,d}" if isinstance(value, int) else f"{value:.4g}"


def median_seconds(calls: dict[str, Callable], at_least: float = 10.0) -> dict[str, float]:
    """Median seconds of each call, timed in turns after one warm-up each."""
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


@dataclasses.dataclass
class Benchmark:
    """A config prepared for timing."""

    method: Any
    steps: int  # number of steps of the timed chains
    batch_size: int
    accumulate: int
    state: Any
    params: Any
    batch: Any  # sharded
    step: Any  # compiled
    seconds: dict[str, float]  # init, compile

    @classmethod
    def of(cls, config, batch_size: int | None) -> Benchmark:
        config = config.copy_and_resolve_references()
        run_data.fill_in(config)
        batch_size = batch_size or config.training.batch_size
        with options.errors_at("config.training"):
            parallel.check_batch_size("batch_size", batch_size, config.step.accumulate)
        method = from_config(config)
        if not is_diffusion(method):
            raise RunError(f"{config.method} (config.method) is not a diffusion: nothing to time")
        tx, _ = step_lib.optimizer_of(config)
        key = jax.random.key(config.seed)
        update = step_lib.make_update(method, tx, key, axis_name=parallel.AXIS, **config.step)
        start = time.perf_counter()
        state = step_lib.init_state(method, tx, key)
        state = jax.block_until_ready(parallel.place(state))
        init = time.perf_counter() - start
        shape = (batch_size, *method.image_shape)
        batch = {
            "image": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
            "label": np.zeros(batch_size, np.int32),
            "index": np.arange(batch_size, dtype=np.int32),
        }
        batch, start = parallel.shard(batch), time.perf_counter()
        step = parallel.compile_step(update, state, batch)
        return cls(
            method=method,
            steps=min(CHAIN_STEPS, len(method.schedule)),
            batch_size=batch_size,
            accumulate=config.step.accumulate,
            params=parallel.place(state.params),
            state=state,
            batch=batch,
            step=step,
            seconds={"init": init, "compile": time.perf_counter() - start},
        )

    def train(self):
        self.state, loss = self.step(self.state, self.batch)
        return loss, self.state.params

    def inputs(self):
        """Noise at times over the whole chain, as input of the network."""
        count, T = self.batch_size, len(self.method.schedule)
        x = np.random.default_rng(1).normal(size=(count, *self.method.image_shape))
        t = np.arange(count, dtype=np.int32) * T // count
        keys = jax.random.split(jax.random.key(0), count)
        label = self.batch["label"] if self.method.num_classes else None
        return parallel.shard(x.astype(np.float32)), parallel.shard(t), label, parallel.shard(keys)

    def bare(self, network) -> dict[str, Callable]:
        """The network alone: forward, and forward and backward."""
        x, t, label, keys = self.inputs()

        def forward(params, inputs, keys=None):
            x, t, label = inputs
            return network.apply({"params": params}, x, t, label, dropout_keys=keys)

        def gradient(params, inputs):
            *inputs, keys = inputs

            def loss(params):
                return jnp.mean(jnp.square(forward(params, inputs, keys) - inputs[0]))

            return jax.value_and_grad(loss)(params)

        forward_all, gradient_all = map(parallel.map_shards, (forward, gradient))
        self.lowered = forward_all.lower(self.params, (x, t, label))
        return {
            "forward": lambda: forward_all(self.params, (x, t, label)),
            "gradient": lambda: gradient_all(self.params, (x, t, label, keys)),
        }

    def mapped(self, function: Callable, *examples) -> Callable:
        """A call of function(params, key, *examples) on all devices."""
        key = jax.random.key(0)
        all_shards = parallel.map_shards(lambda tree, examples: function(*tree, *examples))
        return lambda: all_shards((self.params, key), examples)

    def chains(self, sampling: Sampling) -> dict[str, Callable]:
        """A short chain of each sampler, and the bound of as many terms."""
        samplers = {name: cls() for name, cls in SAMPLERS.items()}
        samplers |= {"ddim_eta": DDIM(eta=0.5), "dpm_solver_3": DPMSolver(order=3)}
        if sampling != Sampling():
            own = options.describe(sampling)["sampler"]
            samplers["yours" if own in samplers else str(own)] = sampling.sampler
        guided = {"guided": 3.0} if self.method.label_dropout else {}
        calls, steps = {}, str(self.steps)
        for name, guidance in {**dict.fromkeys(samplers, 1.0), **guided}.items():
            chosen = Sampling(sampler=samplers.get(name, DDIM()), steps=steps, guidance=guidance)

            def draw(params, key, index, label, chosen=chosen):
                return self.method.sample(params, key, index, label, chosen)

            calls[name] = self.mapped(draw, self.batch["index"], self.batch["label"])

        def bound(params, key, batch):
            return self.method.bound(params, key, batch, Bounding(steps=steps))

        calls["bound"] = self.mapped(bound, self.batch)
        return calls

    def measure(self, sampling: Sampling, plain: bool) -> dict[str, Any]:
        network = self.method.sized_network
        bare, chains = self.bare(network), self.chains(sampling)
        flops = parallel.flops(self.step)
        forward_flops = parallel.flops(self.lowered.compile())
        seconds = median_seconds({"train": self.train, **bare, **chains})
        stats = jax.local_devices()[0].memory_stats() or {}
        calls = {name: self.steps for name in chains}
        calls |= {name: 2 * self.steps - 1 for name in TWO_CALLS}
        chain_step = seconds["ancestral"] / self.steps
        per_image = jax.local_device_count() / self.batch_size
        result = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            "batch_size": self.batch_size,
            "init_seconds": self.seconds["init"],
            "compile_seconds": self.seconds["compile"],
            "train_step_seconds": seconds["train"],
            "train_images_per_second": self.batch_size / seconds["train"],
            "sample_step_images_per_second": self.batch_size / chain_step,
            "sample_chain_steps": len(self.method.schedule),
            "sample_chain_steps_timed": self.steps,
            "sample_chain_images_per_second": self.batch_size
            / (chain_step * len(self.method.schedule)),
            "train_gflop_per_image": flops * per_image / 1e9,
            "forward_gflop_per_image": forward_flops * per_image / 1e9,
            "train_gflop_per_second": flops * per_image * self.batch_size / seconds["train"] / 1e9,
            "step_memory_mib": parallel.memory(self.step) / 2**20,
            "peak_host_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            "train_step_over_bare_gradient": seconds["train"] / seconds["gradient"],
        }
        for name in chains:
            label = "bound_term" if name == "bound" else f"{name}_call"
            ratio = seconds[name] / calls[name] / seconds["forward"]
            result[f"{label}_over_bare_forward"] = ratio
        if "peak_bytes_in_use" in stats:  # a CPU has no such count
            result["peak_device_memory_mib"] = stats["peak_bytes_in_use"] / 2**20
        if plain and hasattr(network, "plain"):
            textbook = self.bare(network.clone(plain=True))
            both = bare | {f"plain_{name}": call for name, call in textbook.items()}
            versus = median_seconds(both)
            for name in ("gradient", "forward"):
                result[f"plain_{name}_over_{name}"] = versus[f"plain_{name}"] / versus[name]
        return result
