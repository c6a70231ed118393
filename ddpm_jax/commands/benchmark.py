"""Measures how fast a config trains and samples on this machine, relative to its network alone.

    python -m ddpm_jax.benchmark --config=configs/cifar10.py --batch_size=8

Prints the time to start, training and sampling speed, operations, memory, and three ratios: the training step over the
bare forward and backward pass of its network, one network call of each sampler over a bare forward pass, and the
textbook form of the network over the form that is used. Times are medians after a warm-up; the calls that a ratio
compares run in turns. Operations are those of the network's dots and convolutions (`networks.cost`), also for a sampler
step; the peak is that of a large matrix product of the same type, measured in the same run. Images are random; data are loaded only if the config takes its image shape or classes from them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import ddpm_jax
from ddpm_jax import options
from ddpm_jax.commands import model_cost as cost_lib
from ddpm_jax.commands import trace, turns
from ddpm_jax.ddpm import Bounding, Sampling
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import run_data
from ddpm_jax.files.run_data import RunError
from ddpm_jax.method import from_config, is_diffusion
from ddpm_jax.networks import cost
from ddpm_jax.options import AtLeast
from ddpm_jax.process.samplers import DDIM, SAMPLERS, DPMSolver
from ddpm_jax.training import parallel, resume
from ddpm_jax.training import step as step_lib
from ddpm_jax.training.preview import check_sampling

CHAIN_STEPS = 10  # steps of the reverse chains that are timed; all steps cost the same
TWO_CALLS = ("heun",)  # samplers that evaluate the network twice in every step but the last


def benchmark(
    config,
    *,
    batch_size: Annotated[
        int | None, "How many images are computed at a time. Default: as in the config.", AtLeast(1)
    ] = None,
    plain: Annotated[bool, "Also times the textbook form of the network."] = True,
    profile: Annotated[
        bool, "Prints where the time of a training step and a forward pass goes, and nothing else."
    ] = False,
    model_cost: Annotated[
        bool,
        "Prints what the run of the config costs on several machines, predicted without compiling.",
    ] = False,
    compare: Annotated[
        str | None,
        "What to run in turns with the config, instead of the usual report: changed fields, as in"
        " model.plain=True,step.accumulate=2, or the folder of another checkout.",
    ] = None,
    rounds: Annotated[int, "How many turns --compare takes.", AtLeast(2)] = 10,
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
    if compare:
        return in_turns(config, batch_size, compare, rounds)
    if model_cost:
        print(cost_lib.table(config, batch_size))
        return {}
    bench = Benchmark.of(config, batch_size, sampling)
    if profile:
        print(f"\nTraining step: {trace.table(bench.step.func.as_text(), bench.train)}")
        forward = bench.bare(bench.method.sized_network)["forward"]
        print(f"\nForward pass: {trace.table(bench.forward.as_text(), forward)}")
        return {}
    result = bench.measure(sampling, plain)
    print("\n".join(f"{name:32} {_shown(value)}" for name, value in result.items()))
    print(json.dumps({"device": parallel.banner(), **result}))
    return result


def _shown(value: float) -> str:
    return f"{value:,d}" if isinstance(value, int) else f"{value:.4g}"


def in_turns(config, batch_size: int | None, other: str, rounds: int) -> dict[str, turns.Ratio]:
    """Prints and returns how often `other`, changed fields or a checkout, takes the time of the config."""
    changed, environments = config.copy_and_resolve_references(), [dict(os.environ)] * 2
    if os.path.isdir(other):
        environments[1] = environments[1] | {"PYTHONPATH": os.path.abspath(other)}
    else:
        for field, _, text in (part.partition("=") for part in re.split(r",(?=[\w.]+=)", other)):
            config_lib.override(changed, field, text, resume.readers_of)
    environments[0]["PYTHONPATH"] = os.path.dirname(os.path.dirname(ddpm_jax.__file__))
    with tempfile.TemporaryDirectory() as folder:
        commands, result = [], {}
        for name, settings in (("ours", config), ("other", changed)):
            path = os.path.join(folder, f"{name}.json")
            config_lib.save(settings, path)
            size = batch_size or settings.training.batch_size
            commands.append([sys.executable, "-P", turns.__file__, path, str(size)])
        with turns.workers(commands, environments) as running:
            for name in running[0].names:
                result[name] = turns.ratio(*turns.in_turns(running, name, rounds))
                print(f"{name:20} {result[name]}  {result[name].ours:.4g} s", flush=True)
    print(f"above 1: {other} takes longer")
    return result


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
    forward: Any = None  # compiled, as `bare` leaves it

    @classmethod
    def of(cls, config, batch_size: int | None, sampling: Sampling = Sampling()) -> Benchmark:
        config, _ = run_data.planned(config, "")
        run_data.fill_in(config)
        batch_size = batch_size or config.training.batch_size
        with options.errors_at("config.training"):
            parallel.check_batch_size("batch_size", batch_size, config.step.accumulate)
        method = from_config(config)
        if not is_diffusion(method):
            raise RunError(f"{config.method} (config.method) is not a diffusion: nothing to time")
        check_sampling(method, dataclasses.replace(sampling, steps=None), "sampling")
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

        forward_all, gradient_all = map(parallel.Mapped, (forward, gradient))
        self.forward = forward_all.compile(self.params, (x, t, label))
        return {
            "forward": lambda: forward_all(self.params, (x, t, label)),
            "gradient": lambda: gradient_all(self.params, (x, t, label, keys)),
        }

    def mapped(self, function: Callable, *examples) -> Callable:
        """A call of function(params, key, *examples) on all devices."""
        key = jax.random.key(0)
        all_shards = parallel.Mapped(lambda tree, examples: function(*tree, *examples))
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
        flops = cost.forward_flops(network, self.method.image_shape)
        peak = parallel.peak_flops(getattr(network, "dtype", "float32"))
        seconds = median_seconds({"train": self.train, **bare, **chains})
        stats = jax.local_devices()[0].memory_stats() or {}
        calls = {name: self.steps for name in chains}
        calls |= {name: 2 * self.steps - 1 for name in TWO_CALLS}
        chain_step = seconds["ancestral"] / self.steps
        train_flops = 3 * flops * self.batch_size / seconds["train"]  # a product has two gradients
        sample_flops = flops * self.batch_size / chain_step
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
            "train_gflop_per_image": 3 * flops / 1e9,
            "forward_gflop_per_image": flops / 1e9,
            "train_gflop_per_second": train_flops / 1e9,
            "peak_gflop_per_second": peak / 1e9,
            "train_share_of_peak": train_flops / peak,
            "sample_step_share_of_peak": sample_flops / peak,
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
