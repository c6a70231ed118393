"""The floors of the house: a file imports only from lower ones, files on the I/O row none of ours."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = {
    **dict.fromkeys(["config", "data", "checkpoints", "writers"], -1),  # the I/O row
    **dict.fromkeys(["schedules", "gaussians", "metrics"], 0),
    **dict.fromkeys(["diffusion", "unet", "inception"], 1),
    **dict.fromkeys(["likelihood", "samplers"], 2),
    "losses": 3,
    **dict.fromkeys(["ddpm", "training", "parallel"], 4),
    "runs": 5,
    **dict.fromkeys(["train", "sample", "evaluate"], 6),
    **dict.fromkeys(["edit", "score", "report"], 7),
    "main": 8,
    **dict.fromkeys(["benchmark", "__main__"], 9),
    "__init__": 10,
}
FILES = sorted((ROOT / "ddpm_jax").glob("**/*.py"))


def imports(path):
    """Every module that a file imports anywhere, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    """A file of the package, or the folder that it is in."""
    return path.relative_to(ROOT / "ddpm_jax").parts[0].removesuffix(".py")


def test_every_file_has_a_floor():
    assert {*map(room, FILES)} == FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_go_down(path):
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("configs", "experiments", "tests"), f"{path.name} imports {name}"
        ours = rest.split(".")[0]
        if top == "ddpm_jax" and ours in FLOORS.keys() - {room(path)}:
            assert FLOORS[ours] < max(FLOORS[room(path)], 0), f"{path.name} imports {name}"
            assert FLOORS[room(path)] >= 0, f"{path.name} is on the I/O row and imports {name}"


@pytest.mark.parametrize(
    "word, home",
    [
        ("pmap", ["parallel.py"]),
        ("orbax", ["checkpoints.py"]),
        ("tensorflow_datasets", ["data.py"]),
        ("matplotlib", ["writers.py", "charts.py"]),  # pictures, and charts of the report
    ],
)
def test_one_home_for_each_library(word, home):
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {part for name in imports(path) for part in name.split(".")}
        assert (word in names) == (path.name in home), path.name


def test_there_is_no_drawer():
    for name in ("utils", "helpers", "base", "common", "misc"):
        assert not list((ROOT / "ddpm_jax").glob(f"**/{name}.py"))
