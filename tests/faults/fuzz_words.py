"""Properties of command lines: odd values of fields and flags, words that are no options."""

from __future__ import annotations

import functools

from hypothesis import given
from hypothesis import strategies as st

from tests.faults import tiny
from tests.faults.room import Room

ODD = st.sampled_from(
    [
        *(
            "nan",
            "inf",
            "-inf",
            "-1",
            "0",
            "1",
            "2",
            "-0.0",
            "0.5",
            "1e-400",
            "1e400",
            "1e30",
            str(2**31),
        ),
        *(
            str(2**63),
            str(-(2**63) - 1),
            "9" * 400,
            "True",
            "false",
            "None",
            "none",
            "",
            " ",
            ",",
            "()",
            "(,)",
        ),
        *(
            "1,2",
            "1,,2",
            "[1, 2]",
            "((1,),)",
            "{}",
            "x",
            "ε",
            "\u202e",
            "a:b",
            ":",
            "a.b:C",
            "os:system",
            "a" * 5000,
        ),
        *(
            "..",
            "/",
            "/dev/null",
            "~",
            "~nobody",
            "0x10",
            "1_000",
            "1e3",
            "--",
            "{1:2}",
            "[" * 200,
            "lambda: 1",
        ),
        *(
            "cosine",
            "linear",
            "v",
            "eps",
            "ddim",
            "uniform",
            "cycle",
            "random",
            "learned",
            "tests.faults.tiny:get_config",
        ),
    ]
)
VALUES = ODD | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)


def config_fields() -> list[str]:
    """The fields of a config, and the options of its sections that it leaves at their defaults."""
    from ddpm_jax.files import config as config_lib
    from ddpm_jax.training import resume

    config = tiny.get_config()
    found = set(config_lib.fields(config))
    for section in config:
        with_options = config_lib._options_of_section(config, section, resume.readers_of)
        found |= {f"{section}.{name}" for name in with_options}
    return sorted(found)


@given(st.data(), st.lists(VALUES, min_size=1, max_size=3))
def fields_of_configs(room: Room, data, values):
    """--config.FIELD=VALUE of a training, which is checked."""
    fields = [data.draw(st.sampled_from(config_fields())) for _ in values]
    pairs = [f"--config.{field}={value}" for field, value in zip(fields, values, strict=True)]
    room.passes(
        [f"--config={tiny.CONFIG}", f"--workdir={room.clean() / 'run'}", *pairs], check=True
    )


@given(st.data(), VALUES)
def fields_of_trainings(room: Room, data, value):
    """--config.FIELD=VALUE of a training of two steps."""
    field = data.draw(st.sampled_from([f for f in config_fields() if f not in LONG]))
    limits = ["--config.training.num_steps=2", f"--config.{field}={value}"]
    room.passes([f"--config={tiny.CONFIG}", f"--workdir={room.clean() / 'run'}", *limits])


LONG = ("training.num_steps",)  # a value of these may rightly take hours
SIZES = ("num_samples", "num_images", "num_pairs", "num_seeds", "batch_size", "repeats", "steps")


@functools.cache
def flags_of(mode: str) -> list[str]:
    from ddpm_jax import modes

    left_out = ("config", "workdir", "debug", "data_dir", "push")
    return sorted(flag for flag in modes.all_flags(mode) if flag not in left_out)


@given(
    st.data(),
    st.sampled_from(
        [*tiny.COMMANDS, "nearest", "progressive", "interpolate", "reconstruct", "animate"]
    ),
    VALUES,
)
def flags_of_commands(room: Room, data, mode, value):
    """--FLAG=VALUE of a command on a finished run, which runs unless its size is the flag."""
    flag = data.draw(st.sampled_from(flags_of(mode)))
    argv = [f"--mode={mode}", f"--workdir={room.subject}", f"--{flag}={value}"]
    if flag in SIZES or flag == "out" or (mode == "eval" and flag == "metrics"):
        room.passes(argv, check=True)
        return
    run = room.copy()
    known = {
        "num_samples": "4",
        "num_images": "4",
        "steps": "2",
        "batch_size": "4",
        "features": "tests.faults.pixels:2",
    }
    small = [
        f"--{name}={size}"
        for name, size in known.items()
        if name in flags_of(mode) and name != flag
    ]
    room.passes([f"--mode={mode}", f"--workdir={run}", *small, f"--{flag}={value}"])


@given(
    st.lists(
        st.text(max_size=6)
        | st.sampled_from(
            [
                "--",
                "-",
                "=",
                "--=",
                "--config",
                "--mode",
                "sample",
                "--config.",
                "--config=digits",
                "--noconfig.x",
                "--mode=",
                "--help",
                "--version",
                "--workdir=",
            ]
        ),
        max_size=4,
    )
)
def words(room: Room, words):
    """Words that are no options."""
    if "train" in words or "--config=digits" in words:
        words = [*words, "--config.nothing=1"]
    room.passes(words, check=not {"--help", "--version"} & set(words))
