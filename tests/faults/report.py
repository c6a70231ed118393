"""Cases and their table."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import NamedTuple

GOOD = ("refused", "repaired", "unread")
COLUMNS = {
    "refused": "refused by name",
    "repaired": "same result",
    "unread": "not read",
    "wrong": "silently wrong",
    "traceback": "traceback",
    "hang": "hang or crash",
}


class Case(NamedTuple):
    """One way of hurting the program, and how it ended."""

    what: str  # a row of the table
    outcome: str  # of COLUMNS; anything else counts as a crash
    about: str  # the case, to repeat it
    weight: int = 1  # how often the program was hurt in it

    @property
    def is_good(self) -> bool:
        return self.outcome in GOOD


def table(cases: Iterable[Case]) -> str:
    """A Markdown table: how many cases of what ended how."""
    counts: dict[str, collections.Counter] = {}
    for case in cases:
        column = case.outcome if case.outcome in COLUMNS else "hang"
        row = counts.setdefault(case.what, collections.Counter())
        row[column] += 1
        row["hurt"] += case.weight
    lines = [
        f"| what was hurt | times | {' | '.join(COLUMNS.values())} |",
        f"|---|---{'|---' * len(COLUMNS)}|",
    ]
    total = collections.Counter()
    for what, row in counts.items():
        total += row
        lines.append(_line(what, row))
    return "\n".join([*lines, _line("**all**", total)])


def _line(what: str, row: collections.Counter) -> str:
    cells = [row["hurt"], *(row[column] for column in COLUMNS)]
    return f"| {what} | {' | '.join(map(str, cells))} |"
