"""Every line of experiments/theory: the right formula and ddpm_jax agree with the truth, the printed formula does not."""

import ast
import importlib
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.experiments.theory.erratum import error

pytestmark = pytest.mark.slow

theory = importlib.import_module("experiments.theory.__main__")
FOLDER = Path(theory.__file__).parent
EVERY = [
    pytest.param(erratum, id=f"{name} {erratum.place}")
    for name, (module, _) in theory.DOCUMENTS.items()
    for erratum in module.ERRATA
    if not isinstance(erratum.decide, str)
]


@pytest.mark.parametrize("erratum", EVERY)
def test_numbers_decide(erratum):
    truth, printed, right = numbers = erratum.decide()
    for value in numbers:
        assert np.asarray(value).dtype == np.float64 and np.isfinite(value).all()
    assert error(right, truth) < erratum.tolerance
    if erratum.is_one:
        assert error(printed, truth) > 10 * erratum.tolerance
    else:
        assert error(printed, truth) < erratum.tolerance
    if erratum.ours is not None:
        assert error(erratum.ours(), truth) < erratum.ours_tolerance


def test_the_page_is_what_is_computed(tmp_path):
    theory.main([f"--out={tmp_path}/page.md"])
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page == (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in rows} == {len(theory.COLUMNS) - 1}
    for name, (module, _) in theory.DOCUMENTS.items():
        _, _, section = page.partition(f"\n## {name}\n")
        section = section.partition("\n## ")[0]
        assert all(f"\n| {erratum.place} | " in section for erratum in module.ERRATA)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_only_one_file_knows_ddpm_jax(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    names = {name for name in names if not name.startswith("ddpm_jax.experiments.")}
    ours = {name.split(".")[0] for name in names} & {"jax", "flax", "ddpm_jax"}
    assert (path.stem == "ours") == bool(ours)


def test_an_error_is_relative_and_absolute_at_zero():
    assert error(1.1, 1.0) == pytest.approx(0.1) and error(-0.5, 0.0) == 0.5
    assert error(np.array([2.0, 3.0]), np.array([2.0, 4.0])) == 0.25
