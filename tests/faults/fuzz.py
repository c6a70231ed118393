"""Nonsense as input, drawn by hypothesis: each case ends with status 0, or with one line of error and status 1 or 2.

Each property takes the draws of its strategies and a `Worker`; `settings` sets how many. A case that hangs, ends the
interpreter, shows a traceback or needs more than 4 GiB fails, and hypothesis looks for the smallest one.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.faults import fuzz_inputs, fuzz_runs, fuzz_words
from tests.faults.room import Room

PROPERTIES = {  # a property: its share of the cases, the smaller the longer a case takes
    fuzz_words.fields_of_configs: 24,
    fuzz_words.fields_of_trainings: 2,
    fuzz_words.flags_of_commands: 8,
    fuzz_words.words: 20,
    fuzz_runs.trees_of_runs: 3,
    fuzz_runs.bytes_of_runs: 2,
    fuzz_runs.lines_of_runs: 2,
    fuzz_runs.mirrors: 3,
    fuzz_inputs.pictures: 3,
    fuzz_inputs.arrays: 6,
}


def run(a_property, room: Room, examples: int, *, seeded: bool = True) -> None:
    """Checks a property with this number of examples.

    Raises:
      AssertionError: a case fails; the smallest one that was found.
    """
    chosen = settings(
        max_examples=examples,
        derandomize=seeded,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    chosen(a_property)(room)
