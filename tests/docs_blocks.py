"""The code blocks of README and docs: read, and run in order in a fresh folder, at smoke size.

    python tests/docs_blocks.py DIR                      README first, then the pages, two at a time
    python tests/docs_blocks.py DIR docs/sampler.md      only these pages, where README's runs are in DIR already

Each bash command and each Python block is a process of its own. A Python block that begins with `# NAME.py` is a file. A
block below the comment `<!-- not run: REASON -->` is not run. Blocks may use what README and their own page made.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LINKED = (
    "configs",
    "experiments",
    "README.md",
    "docs",
    "tests",
)  # what a clone has and commands name
DONE_BEFORE = ("pip", "pytest", "pre-commit", "ruff", "git", "cd")  # by whoever runs this

# How a command is made small: what is replaced in each of its words.
SMALL = (
    (r"^--config=((?:configs/|experiments/)?[\w/]+(?:\.py)?)(:\w+)?$", r"--config=\1:smoke"),
    (r"^--size=(full|cpu)$", "--size=smoke"),
    (r"^--num_images=\d+$", "--num_images=8"),
    (r"^--num_samples=\d{2}$", "--num_samples=16"),
    (r"^--num_samples=\d{3,}$", "--num_samples=64"),  # of metrics
    (r"^--counts=\S+$", "--counts=2"),
    (r"^--config\.training\.num_steps=\S+$", "--config.training.num_steps=20"),
)
ADDED = {  # flags that a command gets if it has no such flag
    "--mode=nll": "--num_images=8",
    "--mode=rate_distortion": "--num_images=8",
    "--mode=best_steps": "--num_images=8",
    "--mode=sample": "--num_samples=16",
    "ddpm_jax.benchmark": "--noplain",
    "experiments.ddim_table1": "--num_seeds=1",
    "experiments.feature_classifier": "--steps=50",
}
SMALL_PYTHON = (
    (r"\bnum_steps=[\d_]{3,}", "num_steps=20"),
    (r"\bimages\[:100\]", "images[:8]"),
)


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str  # why, or empty

    @property
    def file(self) -> str | None:
        """The file name in the first line of a Python block."""
        match = re.match(r"# (\w+\.py)\b", self.text)
        return match[1] if match and self.language == "python" else None

    def commands(self) -> list[list[str]]:
        """The commands of a bash block, as words."""
        joined = self.text.replace("\\\n", " ")
        if self.not_run:  # in a script for another program, such as gcloud or kubectl
            lines = re.findall(r"\bpython3?( -m ddpm_jax[^\n\"]*)", joined)
            joined = re.sub(r"\$\w+", "1", "\n".join(f"python{line}" for line in lines))
        words = [shlex.split(line, comments=True) for line in joined.splitlines()]
        found = []
        for line in filter(None, words):
            while "&&" in line:
                cut = line.index("&&")
                found.append(line[:cut])
                line = line[cut + 1 :]
            found.append(line)
        return found


def blocks(path: Path) -> list[Block]:
    """The bash and Python blocks of a page."""
    found, text = [], path.read_text(encoding="utf-8")
    pattern = r"(?:<!-- not run: ([^\n]*?) -->\n+)?^```(bash|python)\n(.*?)^```$"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        line = text[: match.start(2)].count("\n") + 1
        page = str(path.relative_to(ROOT))
        found.append(Block(page, line, match[2], match[3], match[1] or ""))
    return found


def small(words: list[str]) -> list[str]:
    """A command at smoke size."""
    result = list(words)
    for pattern, replacement in SMALL:
        result = [re.sub(pattern, replacement, word) for word in result]
    for word, flag in ADDED.items():
        known = (flag.partition("=")[0], "--latents", "--help")
        if word in result and not any(w.startswith(known) for w in result):
            result.append(flag)
    if "experiments.sweep" in result and "--run" in result and "--size=smoke" not in result:
        result.append("--size=smoke")
    return result


def run_python(words: list[str]) -> None:
    """python …, in this process."""
    sys.argv = words[1:]
    if words[1] == "-m":
        sys.argv = words[2:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[1], run_name="__main__")


def forked(function, *args) -> tuple[int, str]:
    """The status and output of a function in a forked process, which need not import the package again."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this process has threads; none has begun
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(write, 1), os.dup2(write, 2)
            os.closerange(3, 256)
            warnings.simplefilter("ignore")
            function(*args)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read, errors="replace") as file:
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def run_command(words: list[str]) -> tuple[int, str]:
    if words[0] == "ddpm_jax":
        words = ["python", "-m", "ddpm_jax", *words[1:]]
    if words[0] == "python":
        return forked(run_python, small(words))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def run_script(block: Block) -> None:
    text = block.text
    for pattern, replacement in SMALL_PYTHON:
        text = re.sub(pattern, replacement, text)
    code = compile("\n" * block.line + text, block.page, "exec")
    exec(code, {"__name__": "__main__"})


def run_page(path: Path) -> str:
    """Runs the blocks of a page in the current folder; the first failure as text, or nothing."""
    for block in blocks(path):
        if block.not_run:
            continue
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
            continue
        jobs = [("(Python block)", lambda block=block: forked(run_script, block))]
        if block.language == "bash":
            commands = [words for words in block.commands() if words[0] not in DONE_BEFORE]
            jobs = [(shlex.join(small(w)), lambda w=w: run_command(w)) for w in commands]
        for name, job in jobs:
            start, before = time.monotonic(), os.times()
            status, output = job()
            wall, after = time.monotonic() - start, os.times()
            busy = sum(after[2:4]) - sum(before[2:4])  # user and system, of children
            print(f"{wall:5.1f} s, {busy:5.1f} s of CPU  {block.page}: {name}", flush=True)
            if status:
                return f"{block.page}, line {block.line}: status {status} of {name}\n{output}"
    return ""


def main() -> None:
    folder, *chosen = sys.argv[1:]
    pages = [Path(page).resolve() for page in chosen] or PAGES
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    for name in LINKED:
        if not os.path.lexists(name):
            os.symlink(ROOT / name, name)
    # Most of the time is compiling; JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as production does.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath("cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    sys.path.insert(0, "")  # as `python -m` has it
    for module in ("ddpm_jax.main", "ddpm_jax.library"):  # once for all; touches no device
        importlib.import_module(module)
    failures = []
    if not chosen:
        failures += filter(None, [run_page(pages.pop(0))])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for failure in pool.imap_unordered(run_page, pages, chunksize=1):
            failures += filter(None, [failure])
    print("\n\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
