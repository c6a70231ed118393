"""The rows of a table, each a training and its evaluations: prints the commands, runs them, collects results.

    python -m experiments.sweep experiments/ho2020_table2                      prints the command lines
    python -m experiments.sweep experiments/ho2020_table2 --size=cpu --run     runs them, one after another
    python -m experiments.sweep experiments/ho2020_table2 --size=cpu --table   a table of what is there

An experiment is a folder with a config.py that has, for the sizes "" (full), "cpu" and "smoke",

    get_config(size)            the config that the rows have in common
    rows(size)                  {row: {"config.diffusion.loss": "vlb", …}}, what each changes in it
    evaluations(size, row)      {column: ["--mode=nll", …]}, what is asked of it, with a "total" in its JSON

A row is the run runs/EXPERIMENT/SIZE/ROW, and a result the file COLUMN.json in it. Training and evaluations
take up where they were stopped, so the same command continues.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

SIZES = {"full": "", "cpu": "cpu", "smoke": "smoke"}  # on the command line: in the config


def fail(line: str):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def tables() -> list[str]:
    """The folders here whose config.py has rows."""
    files = sorted(Path(__file__).parent.glob("*/config.py"))
    return [str(file.parent) for file in files if "def rows(" in file.read_text(encoding="utf-8")]


def load(folder: str):
    """The module FOLDER/config.py."""
    path = Path(folder, "config.py")
    names = ", ".join(map(os.path.relpath, tables()))
    if not path.is_file():
        fail(f"no experiment {folder!r}: there is no file {path} (choose from {names})")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "rows"):
        fail(f"{folder} is no table: its config.py has no rows(size) (choose from {names})")
    return module


class Sweep:
    """The command lines of an experiment at one size.

    Attributes:
      rows: {row: its overrides}.
    """

    def __init__(self, folder: str, size: str, root: str = "runs", data_dir: str | None = None):
        self.folder, self.variant, self.data_dir = os.path.normpath(folder), SIZES[size], data_dir
        self.experiment = load(self.folder)
        self.rows = self.experiment.rows(self.variant)
        self.place = os.path.join(root, os.path.basename(os.path.abspath(folder)), size)

    def workdir(self, row: str) -> str:
        return os.path.join(self.place, row)

    def train(self, row: str) -> list[str]:
        """The command that trains a row."""
        config = ":".join(filter(None, [os.path.join(self.folder, "config.py"), self.variant]))
        overrides = dict(self.rows[row])
        if self.data_dir:
            overrides["config.data.data_dir"] = self.data_dir
        where = [f"--config={config}", f"--workdir={self.workdir(row)}"]
        changes = [f"--{field}={value}" for field, value in overrides.items()]
        return ["python", "-m", "ddpm_jax.main", *where, *changes]

    def evaluations(self, row: str) -> dict[str, list[str]]:
        """The commands that evaluate a row, by the file that each writes."""
        commands = {}
        for column, arguments in self.experiment.evaluations(self.variant, row).items():
            out = os.path.join(self.workdir(row), f"{column}.json")
            where = [f"--workdir={self.workdir(row)}", *arguments, f"--out={out}"]
            commands[out] = ["python", "-m", "ddpm_jax.main", *where]
        return commands


def run(commands: list[list[str]]) -> None:
    """Runs one command after another, and exits with the status of the first that fails.

    A command that is told to stop saves first and is waited for. Ctrl-C reaches it without us.
    """
    caught, running = [], []

    def handle(number, frame):
        caught.append(number)
        if number == signal.SIGTERM and running:
            running[0].terminate()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for command in commands:
            print(shlex.join(command), flush=True)
            running[:] = [subprocess.Popen([sys.executable, *command[1:]])]
            status = running[0].wait()
            if caught:
                print("stopped; the same command continues", file=sys.stderr)
                sys.exit(128 + caught[0])
            if status:
                print(f"error: status {status} of {shlex.join(command)}", file=sys.stderr)
                sys.exit(status if status > 0 else 128 - status)  # −n: killed by signal n
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cell(path: str) -> str:
    """ "mean ± standard error (images)" of a result, or a dash where there is none."""
    if not os.path.exists(path):
        return "—"
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        mean, error, count = (result[key] for key in ("total", "total_stderr", "num_images"))
        spread = "" if error is None else f" ± {error:.3f}"  # of a single image there is none
        return f"{mean:.3f}{spread} ({count})"
    except (ValueError, KeyError, TypeError) as problem:
        fail(f"{path} is no result ({problem!r}); delete it and evaluate again")


def table(sweep: Sweep, rows: list[str]) -> str:
    """Markdown: a line for each row, a column for each evaluation that any of them has."""
    cells = {row: {Path(path).stem: cell(path) for path in sweep.evaluations(row)} for row in rows}
    columns = list(dict.fromkeys(column for row in rows for column in cells[row]))
    lines = [["row", *columns], ["---"] * (1 + len(columns))]
    lines += [[row, *(cells[row].get(column, "—") for column in columns)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def main(argv: list[str] | None = None) -> None:
    first_line, _, rest = __doc__.partition("\n")
    parser = Parser(
        prog="python -m experiments.sweep",
        description=f"{first_line}\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="the experiment, such as experiments/ho2020_table2")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--row", action="append", default=[], help="only these: ROW or ROW,ROW")
    parser.add_argument("--run", action="store_true", help="run instead of print")
    parser.add_argument("--table", action="store_true", help="the results, after a --run if given")
    parser.add_argument("--root", default="runs", help="where the runs lie (default: runs)")
    parser.add_argument("--data_dir", help="config.data.data_dir of every training")
    args = parser.parse_args(argv)

    sweep = Sweep(args.folder, args.size, args.root, args.data_dir)
    rows = [row for names in args.row for row in names.split(",")] or list(sweep.rows)
    for row in rows:
        if row not in sweep.rows:
            fail(f"no row {row!r} at size {args.size} (choose from {', '.join(sweep.rows)})")
    commands = {row: [sweep.train(row), *sweep.evaluations(row).values()] for row in rows}
    if args.run:
        run([command for row in rows for command in commands[row]])
    elif not args.table:
        print("\n\n".join("\n".join(map(shlex.join, commands[row])) for row in rows))
    if args.table:
        print(table(sweep, rows))


if __name__ == "__main__":
    main()
