"""The floors of the house: a room imports only from lower ones."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "ddpm_jax"
FLOORS = (  # from the ground up; a folder is one room
    "hints names stats",
    "options",
    "watch",
    "extras processes",
    "process",
    "data",
    "metrics",
    "networks",
    "method settings augmentation",
    "ddpm",
    "files",
    "training",
    "pretrained",
    "commands",
    "library",
    "modes",
    "request",
    "main",
    "benchmark __main__ __init__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
FILES = sorted(PACKAGE.glob("**/*.py"))


def room(path):
    """The folder or file of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every module that a file imports anywhere, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("configs", "experiments", "tests"), f"{path.name} imports {name}"
        theirs = rest.split(".")[0]
        if top == "ddpm_jax" and theirs in FLOOR and theirs != room(path):
            assert FLOOR[theirs] < FLOOR[room(path)], f"{path.name} imports {name}"


def test_the_mathematics_knows_neither_networks_nor_files():
    for path in (PACKAGE / "process").glob("**/*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & {"flax", "optax", "orbax", "os", "pathlib", "PIL", "matplotlib"}, path


@pytest.mark.parametrize(
    "word, homes",
    [
        ("pmap", {"parallel.py"}),
        ("orbax", {"checkpoints.py"}),
        ("tensorflow_datasets", {"prepared.py"}),
        ("matplotlib", {"writers.py", "charts.py"}),
    ],
)
def test_one_home_for_each_library(word, homes):
    found = set()
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {part for name in imports(path) for part in name.split(".")}
        found |= {path.name} if word in names else set()
    assert found == homes


def test_there_is_no_drawer():
    for name in ("utils", "helpers", "base", "common", "misc"):
        assert not list(PACKAGE.glob(f"**/{name}.py"))
