"""Where the time of a compiled function goes: a table by kind of operation and by layer, from jax.profiler.

On a CPU, threads run beside one another, and the seconds of all of them are added. The library that computes convolutions
there reports no times of its own: a convolution's row has only what its caller took.
"""

from __future__ import annotations

import collections
import glob
import os
import re
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

KINDS = (  # of an instruction, by what its name contains; the first that fits
    ("convolution", r"conv(?!ert)|cudnn"),
    ("dot", r"dot|gemm|matmul|ynn"),
    ("copy, transpose, concatenate", r"copy|transpose|concatenate|pad|slice|bitcast"),
    ("reduction", r"reduce"),
    ("element-wise", r""),
)
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \S+.*? ([\w\-]+)\((.*)$", re.MULTILINE)
OP_NAME = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
    """An instruction of a compiled program.

    Attributes:
      kind: one of those of KINDS.
      layer: the modules of the network that it comes from, such as "down_0_block_0/conv_1"; "" if none.
      backward: whether it belongs to the gradient.
    """

    kind: str
    layer: str
    backward: bool


def instructions(program: str) -> dict[str, Instruction]:
    """The instructions of a program, `Compiled.as_text()`, by name."""
    found = {}
    for name, opcode, rest in INSTRUCTION.findall(program):
        path = (OP_NAME.search(rest) or ["", ""])[1]
        words = name if opcode in ("fusion", "custom-call", "call") else opcode
        dots = "dot_general" in path and "ynn" in name
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, words))
        if "ynn" in name and not dots:
            kind = "reduction" if "reduce" in path or not path else "dot"
        layers = [part for part in path.split("/") if re.fullmatch(r"[a-z]+_[a-z0-9_]+", part)]
        layers = [part for part in layers if part not in LAX]
        found[name] = Instruction(kind, "/".join(layers[:2]), "transpose(" in path)
    return found


LAX = frozenset(
    [
        "conv_general_dilated",
        "dot_general",
        "reduce_sum",
        "reduce_max",
        "broadcast_in_dim",
        "add_any",
        "optimization_barrier",
        "dynamic_slice",
        "dynamic_update_slice",
        "select_n",
        "convert_element_type",
        "branch_0_fun",
        "branch_1_fun",
        "stop_gradient",
        "integer_pow",
    ]
)


def seconds_by_instruction(call: Callable, count: int) -> tuple[dict[str, float], float]:
    """Seconds of each instruction in one call, all threads or streams added, and the seconds of the call."""
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with jax.profiler.trace(folder):
            for _ in range(count):
                jax.block_until_ready(call())
        whole = (time.perf_counter() - start) / count
        (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        seconds = collections.Counter()
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for line in plane.lines:
                if line.name == "python":
                    continue
                for event in line.events:
                    own = dict(event.stats) if plane.name.startswith("/device") else {}
                    seconds[str(own.get("hlo_op", event.name))] += event.duration_ns / count / 1e9
    return dict(seconds), whole


def table(program: str, call: Callable, count: int = 3, rows: int = 12) -> str:
    """The milliseconds of a call by kind of operation and by layer.

    Args:
      program: of the call, `Compiled.as_text()`.
      rows: how many layers to show.
    """
    known = instructions(program)
    seconds, whole = seconds_by_instruction(call, count)
    seconds = {name: value for name, value in seconds.items() if name in known}
    kinds, layers = collections.Counter(), collections.Counter()
    for name, value in seconds.items():
        one = known[name]
        kinds[one.kind] += value
        layers[f"{one.layer or '(outside)'}{', gradient' if one.backward else ''}"] += value
    total = sum(seconds.values())
    lines = [f"one call takes {1e3 * whole:.1f} ms; its operations, added up, {1e3 * total:.1f} ms"]
    for title, counter in (("kind of operation", kinds), ("layer", layers)):
        lines += ["", f"{title:58}      ms  share"]
        lines += [
            f"{name:58}{1e3 * value:8.1f}{100 * value / total:5.0f} %"
            for name, value in counter.most_common(rows)
        ]
    return "\n".join(lines)
