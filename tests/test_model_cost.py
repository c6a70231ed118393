"""The cost model against arrays and compiled programs."""

import math
import re

import jax
import numpy as np
import pytest

from ddpm_jax.commands import model_cost
from ddpm_jax.commands.benchmark import benchmark
from ddpm_jax.configs import digits
from ddpm_jax.method import from_config
from ddpm_jax.training import parallel
from ddpm_jax.training import step as step_lib


def make_config(channels=8, side=8, dropout=0.0):
    config = digits.get_config("smoke")
    config.data.image_shape = (side, side, 1)
    config.model.update(channels=channels, dropout=dropout, attention_resolutions=(side // 2,))
    return config


def compiled_step(config, batch_size):
    method, (tx, _) = from_config(config), step_lib.optimizer_of(config)
    key = jax.random.key(0)
    update = step_lib.make_update(method, tx, key, axis_name=parallel.AXIS, **config.step)
    state = parallel.place(step_lib.init_state(method, tx, key))
    batch = {
        name: parallel.shard(np.zeros(x.shape, x.dtype))
        for name, x in step_lib.batch_shapes(method, batch_size).items()
        if name != "position"
    }
    return parallel.compile_step(update, state, batch)


def test_parameters_and_bytes_are_those_of_a_state():
    config = make_config()
    method, (tx, _) = from_config(config), step_lib.optimizer_of(config)
    state = step_lib.init_state(method, tx, jax.random.key(0))
    found = model_cost.of(config)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert found.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert found.gradient_bytes == 4 * found.parameters


@pytest.mark.slow
def test_the_devices_exchange_gradients_and_a_few_metrics():
    config, exchanged = make_config(), 0
    for shapes in re.findall(
        r"= (.*?) all-reduce(?:-start)?\(", compiled_step(config, 8).func.as_text()
    ):
        for dimensions in re.findall(r"f32\[([\d,]*)\]", shapes):
            exchanged += 4 * math.prod(int(n) for n in dimensions.split(",") if n)
    gradients = model_cost.of(config).gradient_bytes
    assert exchanged == pytest.approx(gradients, rel=0.01)  # equal gradients of biases only once


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"channels": 16}, {"side": 16, "dropout": 0.1}])
def test_the_memory_of_a_step_is_near_that_of_the_compiled_program(settings):
    config, each = make_config(**settings), 8
    measured = parallel.memory(compiled_step(config, each * jax.device_count()))
    assert model_cost.step_bytes(config, each) == pytest.approx(measured, rel=0.15)


def test_recomputed_blocks_and_accumulation_need_less_memory():
    config = make_config()
    whole = model_cost.step_bytes(config, 8)
    config.model.remat = True
    assert model_cost.step_bytes(config, 8) < 0.9 * whole
    config.model.remat, config.step.accumulate = False, 2
    assert model_cost.step_bytes(config, 8) < 0.9 * whole


def test_a_ring_sends_all_but_its_own_part_twice():
    assert model_cost.ring_bytes(800, 1) == 0
    assert model_cost.ring_bytes(800, 4) == 1200


def test_the_table_marks_its_predictions(capsys):
    assert benchmark(make_config(), model_cost=True) == {}
    text = capsys.readouterr().out
    assert "predicted, not measured" in text
    assert all(name in text for name in model_cost.MACHINES)
