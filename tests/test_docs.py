"""README and docs: every command parses, every name exists, every link resolves; `docs_blocks.py` runs the blocks in CI."""

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from typing import Annotated

import docs_blocks
import pytest
from docs_blocks import PAGES, ROOT

import ddpm_jax as dj
from ddpm_jax import main, modes

BLOCKS = [block for page in PAGES for block in docs_blocks.blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [
    (block, words) for block in BLOCKS if block.language == "bash" for words in block.commands()
]
NOT_RUN = 10


def where(block):
    return f"{block.page}:{block.line}"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the contents of a clone and the files that the pages write."""
    for name in docs_blocks.LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    for block in PYTHON:
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_every_command_parses(clone):
    assert len(COMMANDS) > 40
    for block, words in COMMANDS:
        if words[0] in docs_blocks.DONE_BEFORE:
            continue
        line = f"{where(block)}: {shlex.join(words)}"
        assert words[:2] == ["python", "-m"] or words[0] == "ddpm_jax", line
        module, arguments = (
            (words[2], words[3:]) if words[0] == "python" else ("ddpm_jax", words[1:])
        )
        if module.partition(".")[0] != "ddpm_jax":
            assert importlib.util.find_spec(module), line
            continue
        mode = "benchmark" if module == "ddpm_jax.benchmark" else None
        try:
            request = main.Request(arguments, mode)
            if not str(request.config_file).startswith(
                "runs/"
            ):  # of a run that an earlier block made
                request.config()
            if not request.wants_help:
                target = modes.COMMANDS[request.mode]
                main.options.bind(target, request.values(target), "--", given=modes.POSITIONAL)
        except ValueError as error:
            pytest.fail(f"{line}\n{error}")
        assert request.wants_help or request.workdir(), line


@pytest.mark.parametrize("block", PYTHON, ids=where)
def test_python_compiles_and_its_names_exist(block, clone):
    tree = ast.parse(block.text)
    compile(tree, block.page, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                spec = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(spec), spec
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "dj" or node.attr in dj.__all__, f"dj.{node.attr}"


def anchors(text):
    """The anchors of the headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_linked():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for page in (*PAGES[1:], *(ROOT / "docs" / "images").iterdir()):
        assert re.search(rf'[("/]{page.name}[)"#]', text), page.name


def test_readme_is_a_front_page():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def test_public_names_are_in_the_table():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert named == set(dj.__all__)


def test_commands_are_those_of_the_code():
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == module.commands(), "write it anew: python docs/commands.py > docs/commands.md"


def test_a_new_option_is_on_the_page(monkeypatch):
    def command(run, *, colour: Annotated[str, "The colour of the noise."] = "white"):
        """Does something new."""

    monkeypatch.setitem(modes.COMMANDS, "new", command)
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "| `--colour` | text | `white` | The colour of the noise. |" in module.commands()


def test_blocks_that_are_not_run_have_a_reason_and_are_few():
    left_out = [block for block in BLOCKS if block.not_run]
    assert len(left_out) == NOT_RUN, list(map(where, left_out))
    comments = sum(page.read_text(encoding="utf-8").count("not run:") for page in PAGES)
    assert comments == NOT_RUN  # each comment belongs to a block


def test_fences_are_of_known_languages():
    """Blocks in other languages would not be run."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^```(\w*)$", text, re.MULTILINE)
        assert set(fences[::2]) <= {"bash", "python"} and set(fences[1::2]) <= {""}, page
        assert len(fences) == 2 * len(docs_blocks.blocks(page)), page


@pytest.mark.parametrize(
    "line, small",
    [
        (
            "python -m ddpm_jax.main --config=configs/cifar10.py",
            "--config=configs/cifar10.py:smoke",
        ),
        ("ddpm_jax --config=fashion_mnist.py:cpu", "--config=fashion_mnist.py:smoke"),
        ("ddpm_jax --config=digits --mode=nll", "--num_images=8"),
        ("ddpm_jax --mode=nll --num_images=500", "--num_images=8"),
        ("python -m experiments.sweep experiments/x --run", "--size=smoke"),
        ("python -m experiments.sweep experiments/x --size=cpu --run", "--size=smoke"),
    ],
)
def test_commands_are_made_small(line, small):
    words = docs_blocks.small(shlex.split(line))
    assert words.count(small) == 1


def test_blocks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_blocks, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\n# why\npip install x && python -m a --b=1 \\\n    --c='2 3'  # what\n```\n"
        "<!-- not run: needs a GPU -->\n```python\n# mine.py\nx = 1\n```\n"
    )
    bash, python = docs_blocks.blocks(page)
    assert bash.commands() == [["pip", "install", "x"], ["python", "-m", "a", "--b=1", "--c=2 3"]]
    assert (bash.not_run, python.not_run, python.file) == ("", "needs a GPU", "mine.py")
    assert (bash.line, python.line) == (1, 7)
