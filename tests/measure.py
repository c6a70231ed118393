"""Prints the measures of the code's size and openness: python tests/measure.py [FOLDER].

Lines, the longest file and function, nested functions, calls with ** of a dict. Works on any folder of Python files.
"""

from __future__ import annotations

import ast
import pathlib
import sys

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def measures(folder: str | pathlib.Path) -> dict[str, object]:
    """{measure: value} of all Python files below a folder."""
    files = {path: path.read_text(encoding="utf-8") for path in pathlib.Path(folder).rglob("*.py")}
    trees = {path: ast.parse(text) for path, text in files.items()}
    lines = {path: len(text.splitlines()) for path, text in files.items()}
    docstrings = [line for tree in trees.values() for line in docstring_lines(tree)]
    blank = sum(not line.strip() for text in files.values() for line in text.splitlines())
    functions = {
        f"{path.relative_to(folder)}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    }
    nested = [f for tree in trees.values() for f in nested_functions(tree)]
    spread = sum(
        isinstance(node, ast.Call) and any(keyword.arg is None for keyword in node.keywords)
        for tree in trees.values()
        for node in ast.walk(tree)
    )
    return {
        "files": len(files),
        "lines": sum(lines.values()),
        "of these blank": blank,
        "of these in docstrings": len(docstrings),
        "longest files": {str(p.relative_to(folder)): lines[p] for p in longest(lines)},
        "longest functions": {name: functions[name] for name in longest(functions)},
        "nested functions": len(nested),
        "calls f(**dict)": spread,
    }


def longest(sizes: dict, count: int = 8) -> list:
    return sorted(sizes, key=sizes.get, reverse=True)[:count]


def docstring_lines(tree: ast.AST) -> list[int]:
    """The numbers of the lines of all docstrings."""
    result = []
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
            result += range(node.body[0].lineno, node.body[0].end_lineno + 1)
    return result


def nested_functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """The functions defined inside functions."""
    return list(
        {
            inner
            for outer in ast.walk(tree)
            if isinstance(outer, FUNCTIONS)
            for inner in ast.walk(outer)
            if isinstance(inner, FUNCTIONS) and inner is not outer
        }
    )


if __name__ == "__main__":
    for name, value in measures(sys.argv[1] if len(sys.argv) > 1 else "ddpm_jax").items():
        print(f"{name:24}{value}")
