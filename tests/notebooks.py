"""Runs the notebooks of experiments/ whole, at smoke size.

    python tests/notebooks.py DIR                            all of them
    python tests/notebooks.py DIR experiments/theory.ipynb   only these

Each runs in a fresh folder DIR/NAME with the contents of a clone, where the executed notebook stays, and prints its time.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from docs_blocks import LINKED, ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from ddpm_jax.files.progress import BAR_WIDTH

NOTEBOOKS = sorted((ROOT / "experiments").glob("*.ipynb"))
LINES = 25  # maximum number of lines that a cell prints


def run(path: Path, folder: Path) -> str:
    """Executes a notebook in a folder; what is wrong as text, or nothing."""
    folder.mkdir(parents=True)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": folder}}, coalesce_streams=True
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return f"{path.name}: {error}"
    finally:
        nbformat.write(notebook, folder / path.name)
    return "\n".join(f"{path.name}: {fault}" for fault in faults(notebook))


def faults(notebook) -> list[str]:
    """Outputs that a reader would not want: many lines, lines of a progress bar, errors."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            lines = output.get("text", "").splitlines()
            if len(lines) > LINES:
                found.append(f"cell {number} prints {len(lines)} lines")
            if any(line.startswith("[") and f"[{'#' * BAR_WIDTH}]" not in line for line in lines):
                found.append(f"cell {number} leaves an unfinished progress bar")
            if output.get("name") == "stderr":
                found.append(f"cell {number} writes to stderr: {output.text}")
    return found


def main() -> None:
    folder, *chosen = sys.argv[1:]
    os.environ["DDPM_JAX_SMOKE"] = "1"
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    failures = []
    for path in [Path(name).resolve() for name in chosen] or NOTEBOOKS:
        start = time.monotonic()
        failures += filter(None, [run(path, Path(folder).resolve() / path.stem)])
        print(f"{time.monotonic() - start:5.1f} s  {path.relative_to(ROOT)}", flush=True)
    print("\n\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
