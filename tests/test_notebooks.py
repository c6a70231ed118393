"""The notebooks of experiments/: their text; and a training cell in a real kernel, interrupted and run again.

`notebooks.py` runs them whole in CI.
"""

import ast
import json
import os
import re
import time

import pytest
from docs_blocks import ROOT
from test_docs import anchors

import ddpm_jax as dj
from ddpm_jax.files.progress import BAR_WIDTH

NOTEBOOKS = sorted((ROOT / "experiments").glob("*.ipynb"))


def cells(path, kind):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["colab", "theory", "your_images"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_no_outputs_are_stored(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
        assert cell["metadata"] == {}, cell["id"]
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_it_is_a_notebook(notebook):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(notebook, as_version=4))


def test_its_code_compiles_and_its_names_exist(notebook):
    for number, text in enumerate(cells(notebook, "code")):
        for node in ast.walk(ast.parse(text, f"{notebook.name}, code cell {number}")):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "dj" or node.attr in dj.__all__, f"dj.{node.attr}"


def test_one_line_reads_the_smoke_switch(notebook):
    found = [line for text in cells(notebook, "code") for line in text.splitlines()]
    switches = [line for line in found if "DDPM_JAX_SMOKE" in line]
    assert switches == ['SMOKE = bool(os.environ.get("DDPM_JAX_SMOKE"))  # a short run, for tests']


def test_its_links_and_files_resolve(notebook):
    text = "\n".join(cells(notebook, "markdown"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            target = notebook.parent / file
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    files = re.findall(r"`((?:docs|experiments|tests|configs)/[^`]+)`", text)
    assert files
    for file in files:
        assert (ROOT / file).exists(), file


def test_it_names_no_machine(notebook):
    text = notebook.read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w./])/(?:work|tmp|root|home|Users|mnt|opt|usr|var)\b[^\"\s]*", text)
    assert not paths
    assert not re.findall(r"https?://(?!github\.com/OWNER/|colab\.research\.google\.com/)\S+", text)


def test_ci_and_readme_know_them():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"](experiments/{path.name})" in readme
    assert "python tests/notebooks.py" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


TRAIN = """
import ddpm_jax as dj
import numpy as np

network = dj.UNet(channels=8, channel_mults=(1,), num_res_blocks=1, num_groups=2)
model = dj.DDPM(schedule=dj.linear_schedule(100), network=network, image_shape=(8, 8, 1))
images = np.zeros((16, 8, 8, 1), np.uint8)
state = dj.fit(model, images, num_steps=NUM_STEPS, batch_size=8, workdir="run")
print("step", int(state.step))
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """run(text, interrupt=None) executes a cell, and interrupts it once its output contains `interrupt`."""
    manager_lib = pytest.importorskip("jupyter_client.manager")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    manager, client = manager_lib.start_new_kernel(
        kernel_name="python3", cwd=str(tmp_path), env=dict(os.environ)
    )

    def run(text, interrupt=None):
        identity, shown, error, deadline = client.execute(text), "", None, time.monotonic() + 120
        while time.monotonic() < deadline:
            message = client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != identity:
                continue
            content = message["content"]
            shown += content.get("text", "")
            error = content if message["msg_type"] == "error" else error
            if interrupt and re.search(interrupt, shown):
                manager.interrupt_kernel()
                interrupt = None
            if content.get("execution_state") == "idle":
                return shown, error
        raise TimeoutError(shown)

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the Jupyter packages
def test_an_interrupted_cell_saves_and_runs_on(kernel, tmp_path):
    shown, error = kernel(TRAIN.replace("NUM_STEPS", "1_000_000"), interrupt=r"step \d")
    assert error["ename"] == "KeyboardInterrupt"
    found = re.fullmatch(
        r"stopped by Ctrl-C; step ([\d,]+) is saved, and the same command continues there",
        error["evalue"],
    )
    step = int(found[1].replace(",", ""))
    assert "SIGINT: saving after the running step" in shown
    assert kernel("1 + 1")[1] is None  # the kernel lives
    shown, error = kernel(TRAIN.replace("NUM_STEPS", str(step + 3)))
    assert error is None and f"resuming at step {step:,}" in shown
    assert shown.endswith(f"step {step + 3}\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_progress_in_a_notebook_is_one_line(kernel):
    shown, error = kernel(TRAIN.replace("NUM_STEPS", "60"))
    assert error is None
    rewritten = [line.rpartition("\r")[2] for line in shown.split("\n")]
    bars = [line for line in rewritten if line.startswith("[")]
    assert len(bars) == 1 and "step 60/60  100 %" in bars[0] and "left" in bars[0]
    assert len(rewritten) < 15, shown


def test_faults_are_found():
    notebooks, v4 = pytest.importorskip("notebooks"), pytest.importorskip("nbformat.v4")

    def faults(**output):
        cell = v4.new_code_cell(outputs=[v4.new_output("stream", **output)])
        return notebooks.faults(v4.new_notebook(cells=[cell]))

    full = f"[{'#' * BAR_WIDTH}] step 3/3  100 %  0 s left\n"
    assert faults(text=full * 2) == []
    assert faults(text=full.replace("#", ".")) == ["cell 0 leaves an unfinished progress bar"]
    assert faults(text="line\n" * 30) == ["cell 0 prints 30 lines"]
    assert faults(text="oh", name="stderr") == ["cell 0 writes to stderr: oh"]
