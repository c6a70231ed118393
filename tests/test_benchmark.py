"""The benchmark: its counts, its tables, and programs in turns. No test asserts a time."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.commands import benchmark, trace, turns
from ddpm_jax.configs import digits
from ddpm_jax.networks import cost
from ddpm_jax.networks.unet import UNet
from ddpm_jax.options import ConfigError
from ddpm_jax.training import parallel

SMALL = UNet(channels=16, channel_mults=(1, 2), num_res_blocks=1, out_channels=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, shape",
    [
        (SMALL, (15, 9, 3)),
        (SMALL.clone(attention_resolutions=()), (8, 8, 1)),
        (SMALL.clone(num_heads=2, scale_shift=True, num_classes=3), (16, 16, 3)),
    ],
)
def test_operations_are_those_that_xla_counts_on_a_cpu(network, shape):
    plain = network.clone(plain=True)
    x, t = jnp.zeros((1, *shape)), jnp.zeros(1)
    labels = jnp.zeros(1, jnp.int32) if network.num_classes else None
    params = jax.eval_shape(lambda: network.init_params(jax.random.key(0), shape))

    def total(params, x):
        return plain.apply({"params": params}, x, t, labels).sum()

    def counted(function):
        costs = jax.jit(function).lower(params, x).compile().cost_analysis()
        return (costs[0] if isinstance(costs, list) else costs)["flops"]

    ours = cost.forward_flops(network, shape)
    # XLA counts element-wise operations too, which are a larger part of so small a network.
    assert 0.9 * counted(total) < ours < counted(total)
    assert 0.85 * counted(jax.grad(total)) < 3 * ours < 1.05 * counted(jax.grad(total))


def test_the_operations_of_a_convolution_a_dot_a_loop_and_a_branch():
    x, w = jnp.zeros((5, 4)), jnp.zeros((4, 4))
    image, kernel = jnp.zeros((1, 3, 3, 2)), jnp.zeros((3, 3, 2, 7))

    def same(image):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )

    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=6)[0]

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x, x)

    inside = 4 * 4 + 4 * 6 + 9  # taps of the corners, the edges and the centre
    for function, argument, expected in (
        (same, image, 2 * inside * 2 * 7),
        (lambda x: x @ w, x, 2 * 5 * 4 * 4),
        (loop, x, 6 * 2 * 5 * 4 * 4),
        (branch, x, 2 * 2 * 5 * 4 * 4),
    ):
        assert cost.count(jax.make_jaxpr(function)(argument).jaxpr) == expected


@pytest.mark.slow
def test_the_paper_network_has_11_6_billion_operations_in_a_forward_pass():
    network = UNet(channels=128, attention_resolutions=(16,))
    assert round(cost.forward_flops(network, (32, 32, 3)) / 1e9, 1) == 11.6


@pytest.mark.slow
def test_a_program_by_kind_and_layer():
    network = SMALL.clone(dtype="float32")
    x, t = jnp.ones((2, 8, 8, 3)), jnp.zeros(2)
    params = network.init_params(jax.random.key(0), (8, 8, 3))
    gradient = jax.grad(lambda params: network.apply({"params": params}, x, t).sum())
    program = jax.jit(gradient).lower(params).compile()
    found = trace.instructions(program.as_text()).values()
    kinds = {one.kind for one in found}
    assert {"convolution", "dot", "element-wise", "reduction"} <= kinds <= dict(trace.KINDS).keys()
    layers = {one.layer for one in found}
    assert {"conv_in", "down_0_block_0/conv_1", "up_1_upsample"} <= layers
    assert {one.backward for one in found if one.layer == "down_0_block_0/conv_1"} == {True, False}
    table = trace.table(program.as_text(), lambda: program(params), count=1, rows=1000)
    assert "element-wise" in table and "down_0_block_0" in table


def test_ratios_are_of_times_in_the_same_round():
    # The machine slows down to a half on the way: the ratio of each round is 2 all the same.
    ours = np.array([1.0, 1.0, 2.0, 2.0])
    found = turns.ratio(list(ours), list(2 * ours))
    assert found[:3] == (2.0, 2.0, 2.0) and str(found) == "2.00 (2.00–2.00)"
    assert found.ours == 1.5 and found.other == 3.0


WORKER = """
import sys
import types
from ddpm_jax.commands import turns
print("not for the reader")
turns.serve({"first": lambda: None, "second": lambda: print("nor this")})
"""


def test_workers_answer_in_turns_and_a_dead_one_is_named():
    command = [sys.executable, "-c", WORKER]
    with turns.workers([command, command]) as running:
        assert [worker.names for worker in running] == [["first", "second"]] * 2
        times = turns.in_turns(running, "second", 3)
        assert [len(one) for one in times] == [3, 3] and min(map(min, times)) >= 0
    assert all(worker.process.returncode == 0 for worker in running)
    with pytest.raises(RuntimeError, match="ended with status 3"):
        turns.Worker([sys.executable, "-c", "raise SystemExit(3)"])


def config():
    config = digits.get_config("smoke")
    config.model.channels = 8
    return config


@pytest.mark.slow
def test_a_benchmark_has_shares_of_a_peak_that_it_measures(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CHAIN_STEPS", 2)
    monkeypatch.setattr(benchmark.median_seconds, "__defaults__", (0.0,))
    monkeypatch.setattr(parallel, "peak_flops", lambda dtype: {"float32": 1e12}[dtype])
    result = benchmark.benchmark(config(), plain=False)
    assert result["train_gflop_per_image"] == 3 * result["forward_gflop_per_image"] > 0
    rate = result["train_images_per_second"] * result["train_gflop_per_image"]
    np.testing.assert_allclose(result["train_gflop_per_second"], rate)
    np.testing.assert_allclose(result["train_share_of_peak"], rate / 1e3)


def test_the_banner_names_the_precision_of_products(monkeypatch):
    assert "products of float32" not in parallel.banner()  # of a CPU: always float32
    with jax.default_matmul_precision("bfloat16"):
        assert "; products of float32 in bfloat16" in parallel.banner()
    gpu = types.SimpleNamespace(platform="gpu", device_kind="a GPU")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    line = parallel.banner()
    assert "in tensorfloat32 (JAX_DEFAULT_MATMUL_PRECISION=highest for float32)" in line


@pytest.mark.slow
def test_the_peak_is_a_rate():
    assert 1e8 < parallel.peak_flops("float32") < 1e16


@pytest.mark.slow
def test_a_benchmark_profiles_and_compares_in_turns(capsys):
    assert benchmark.benchmark(config(), profile=True) == {}
    out = capsys.readouterr().out
    assert "Training step: one call takes" in out and "Forward pass: one call takes" in out
    result = benchmark.benchmark(config(), compare="model.plain=True,step.accumulate=2", rounds=2)
    assert {"training step", "forward", "gradient"} < result.keys()
    assert all(ratio.ours > 0 and ratio.other > 0 for ratio in result.values())
    with pytest.raises(ConfigError, match=r"model\.plane.*plain"):
        benchmark.benchmark(config(), compare="model.plane=True")
