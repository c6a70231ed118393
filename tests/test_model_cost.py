"""The cost model against arrays that exist."""

import jax

from ddpm_jax.commands import model_cost
from ddpm_jax.configs import digits
from ddpm_jax.method import from_config
from ddpm_jax.training import step as step_lib


def test_parameters_and_bytes_are_those_of_a_state():
    config = digits.get_config("smoke")
    config.model.channels = 8
    method, (tx, _) = from_config(config), step_lib.optimizer_of(config)
    state = step_lib.init_state(method, tx, jax.random.key(0))
    found = model_cost.of(config)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert found.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert found.gradient_bytes == 4 * found.parameters


def test_a_ring_sends_all_but_its_own_part_twice():
    assert model_cost.ring_bytes(800, 1) == 0
    assert model_cost.ring_bytes(800, 4) == 1200


def test_the_table_marks_its_predictions():
    config = digits.get_config("smoke")
    text = model_cost.table(config)
    assert text.startswith("predicted, not measured")
    assert all(name in text for name in model_cost.MACHINES)
