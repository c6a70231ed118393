"""Blocks of a page as plain dictionaries, which blocks.html.j2 renders by their "kind"."""

from __future__ import annotations

import base64

from ddpm_jax.commands.report import charts, words


def text(line: str, style: str = "quiet", command: str = "") -> dict | None:
    """A paragraph, with a command line behind it; None for an empty line."""
    return {"kind": "text", "text": line, "style": style, "command": command} if line else None


def block(kind: str, items, title: str = "") -> dict | None:
    """Blocks in an arrangement ("cards", "pairs", "groups", "fold"), or "fields"; None without items."""
    items = items if isinstance(items, dict) else [item for item in items if item]
    return {"kind": kind, "title": title, "items": items} if items else None


def table(caption: str, head, rows) -> dict:
    """A table whose first column names the rows."""
    return {"kind": "table", "caption": caption, "head": head, "rows": rows}


def chart_block(items, title: str = "", caption: str = "Numbers of the charts") -> list:
    """Charts under a title, and their numbers in a folded table."""
    items = [item for item in items if item]
    rows = [row for item in items for row in item["rows"]]
    numbers = table(caption, ("", *charts.NUMBERS), rows)
    return [block("charts", items, title), block("fold", [numbers] if rows else [], "Numbers")]


def figure(path: str, caption: str, alt: str) -> dict:
    """A picture embedded in the page."""
    with open(path, "rb") as file:
        content = base64.b64encode(file.read()).decode()
    source = f"data:image/{path.rpartition('.')[2]};base64,{content}"
    return {"kind": "figure", "source": source, "caption": caption, "alt": alt}


def pivot(caption: str, cells: list[tuple[str, dict, str]], across: str, columns) -> dict:
    """A table of (name, settings, value) with a column for each value of one setting.

    Settings that all cells share go into the caption, the others under the name of each row.
    """
    others = [{k: v for k, v in of.items() if k != across} for _, of, _ in cells]
    shared, labels = words.common(others)
    rows = {}
    for label, (name, of, value) in zip(labels, cells, strict=True):
        label = label if name or label else "mean"
        row, column = rows.setdefault((name, label), {}), of.get(across)
        row[column] = f"{row[column]}; {value}" if column in row else value
    head = ("", *(column or "value" for column in columns))
    rows = sorted(rows.items(), key=lambda row: -len(row[1]))
    body = [(names, *(row.get(column, "–") for column in columns)) for names, row in rows]
    return table(f"{caption}: {shared}" if shared else caption, head, body)
