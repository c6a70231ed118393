"""Writes docs/commands.md from the declarations of the options, as --help is.

python docs/commands.py > docs/commands.md
"""

from __future__ import annotations

from ddpm_jax import hints, main, modes, options
from ddpm_jax.options import Option

HEAD = f"""# Commands

`{main.PROGRAM} --mode=MODE --FLAG=VALUE …`, also `python -m ddpm_jax` and `ddpm_jax`. Written by `python docs/commands.py` from the
declarations of the options. `--mode=MODE --help` shows the same, with the options of a sampler of your own if it is named.

"""


def type_of(one: Option) -> str:
    """The values that an option takes."""
    if one.choice is not None:
        return " ".join(f"`{name}`" for name in one.choice.built_in) + " `module:NAME`"
    words = hints.literals(one.hint)
    return " ".join(f"`{word}`" for word in words) or hints.expected(one.hint)


def default_of(one: Option) -> str:
    """The default as a command line has it; empty where the help describes it."""
    if one.default is options.EMPTY:
        return "must be given"
    if one.default is None or one.default == () or "Default:" in one.help:
        return ""
    if one.choice is not None:
        return f"`{options.name_of(one.default, one.choice)}`"
    if isinstance(one.default, tuple):
        return f"`{','.join(map(str, one.default))}`"
    return f"`{str(one.default).lower() if isinstance(one.default, bool) else one.default}`"


def table(found: list[Option]) -> str:
    lines = ["| flag | values | default | |", "|---|---|---|---|"]
    for one in found:
        flag = f"`--[no]{one.flag}`" if one.is_boolean else f"`--{one.flag}`"
        cells = flag, type_of(one), default_of(one), one.help
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n\n"


def choices(found: list[Option]) -> str:
    """The options of each thing that can be chosen by name."""
    text = ""
    for one in found:
        for name, cls in one.choice.built_in.items() if one.choice else ():
            own = list(options.flat(cls))
            text += f"`--{one.flag}={name}`: {modes.about(cls)}\n\n" + (table(own) if own else "")
    return text


def commands() -> str:
    """The whole page."""
    text, shared = HEAD, {one.flag for one in options.flat(modes.shared_flags)}
    text += "| mode | |\n|---|---|\n"
    for mode, command in modes.COMMANDS.items():
        text += f"| [`{mode}`](#{mode}) | {modes.about(command)} |\n"
    text += f"\n## Every mode\n\n{table(list(options.flat(modes.shared_flags)))}"
    chosen = {}  # the options of samplers are listed once
    for mode, command in modes.COMMANDS.items():
        default = {}  # leaves out the fields of the default choice, which stand below
        for one in modes.flags_of(mode).values():
            if one.choice and one.default not in (None, options.EMPTY):
                default |= {inner.flag: one for inner in options.flat(type(one.default))}
        found = [
            one
            for flag, one in modes.flags_of(mode).items()
            if flag not in shared and flag not in default
        ]
        text += f"## {mode}\n\n{modes.about(command)}\n\n" + (table(found) if found else "")
        chosen |= {one.flag: one for one in found if one.choice}
    for one in chosen.values():
        text += f"## Options of each {one.choice.kind}\n\n{choices([one])}"
    return text.rstrip() + "\n"


if __name__ == "__main__":
    print(commands(), end="")
