"""Tables of experiments: each row is a training and its evaluations. Prints the commands, runs them, collects results.

    python -m experiments.sweep experiments/ho2020_table2                      prints the command lines
    python -m experiments.sweep experiments/ho2020_table2 --size=cpu --run     runs them, one after another
    python -m experiments.sweep experiments/ho2020_table2 --size=cpu --table   prints the results so far as a table

An experiment is a file, or a folder with a config.py, with these functions of the size, "" (full), "cpu" or "smoke":

    get_config(size)            the config that the rows share
    rows(size)                  {row: {"config.diffusion.loss": "vlb", …}}, the fields that each row changes in it;
                                with {"config": "configs/digits.py", …} a row changes this config instead, and with
                                {"config.init_from": ROW, …} it begins with the weights of an earlier row of the same seed
    evaluations(size, row)      {column: ["--mode=nll", …]}, the measurements of a row: --mode=nll or --mode=eval
    charts(size)                for --page, if there: {title: (name of x, {curve: [(row, column, x), …]})}

--seeds=3 trains each row with three seeds. The table then has the mean and the standard deviation over seeds and, below
them, each row minus the first one, seed by seed: the mean difference, its standard error, and whether it differs from 0
by Student's t at 95 %.

The run directory of a row is runs/EXPERIMENT/SIZE/ROW, with _seed1 and so on for seeds other than 0. Its results are the
files eval/COLUMN.json, which --mode=report shows too. The same command continues interrupted trainings and evaluations.
--page writes the table and the charts, with means over seeds and standard deviations as bars, to runs/EXPERIMENT/SIZE/page.html.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from scipy import stats

from ddpm_jax import main as main_lib
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import writers
from ddpm_jax.names import installed, place_of

SIZES = {
    "full": "",
    "cpu": "cpu",
    "smoke": "smoke",
}  # names on the command line: names for the functions


def fail(line: str):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def tables() -> list[str]:
    """The experiments of this folder that have rows: files, and folders with a config.py."""
    folder = Path(__file__).parent
    files = sorted([*folder.glob("*.py"), *folder.glob("*/config.py")])
    with_rows = [file for file in files if "\ndef rows(" in file.read_text(encoding="utf-8")]
    return [str(file.parent if file.name == "config.py" else file) for file in with_rows]


def file_of(experiment: str) -> str:
    """The file of an experiment that is a file, or a folder with a config.py."""
    return experiment if experiment.endswith(".py") else os.path.join(experiment, "config.py")


def load(experiment: str):
    """The module of an experiment."""
    path = Path(file_of(config_lib.path(experiment)))
    names = ", ".join(map(os.path.relpath, tables()))
    if not path.is_file():
        path = Path(installed(str(path)) or path)
    if not path.is_file():
        fail(f"no experiment {experiment!r}: there is no file {path} (choose from {names})")
    spec = importlib.util.spec_from_file_location(f"experiment_{Path(experiment).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        fail(f"{experiment}: {place_of(error)}: {type(error).__name__}: {error}")
    if not hasattr(module, "rows"):
        fail(f"{experiment} is not a table: it has no rows(size) (choose from {names})")
    return module


BARS = "Means over seeds; bars show the standard deviation"


class Sweep:
    """The command lines of an experiment at one size.

    Attributes:
      rows: {row: its overrides}.
    """

    def __init__(
        self, path: str, size: str, root: str = "runs", data_dir: str | None = None, seeds: int = 1
    ):
        self.path, self.variant = os.path.normpath(config_lib.path(path)), SIZES[size]
        self.size = size
        self.data_dir, root = data_dir, config_lib.path(root)
        self.seeds = range(seeds)
        self.experiment = load(self.path)
        self.rows = self.experiment.rows(self.variant)
        self.folder = os.path.join(root, Path(self.path).absolute().stem, size)
        names = list(self.rows)
        for row, overrides in self.rows.items():
            source = overrides.get("config.init_from")
            if source is not None and source not in names[: names.index(row)]:
                fail(f"row {row}: config.init_from is {source!r}, which is no earlier row")

    def workdir(self, row: str, seed: int = 0) -> str:
        return os.path.join(self.folder, f"{row}_seed{seed}" if seed else row)

    def train(self, row: str, seed: int = 0) -> list[str]:
        """The command that trains a row."""
        overrides = self.rows[row] | ({"config.seed": seed} if seed else {})
        file = overrides.pop("config", file_of(self.path))
        if "config.init_from" in overrides:
            overrides["config.init_from"] = self.workdir(overrides["config.init_from"], seed)
        if self.data_dir:
            overrides["config.data.data_dir"] = self.data_dir
        config = ":".join(filter(None, [file, self.variant]))
        where = [f"--config={config}", f"--workdir={self.workdir(row, seed)}"]
        changes = [f"--{field}={value}" for field, value in overrides.items()]
        return ["python", "-m", "ddpm_jax.main", *where, *changes]

    def evaluations(self, row: str, seed: int = 0) -> dict[str, list[str]]:
        """The commands that evaluate a row, by the column that each fills."""
        commands = {}
        for column, arguments in self.experiment.evaluations(self.variant, row).items():
            out = self.out(row, column, seed)
            where = [f"--workdir={self.workdir(row, seed)}", *arguments, f"--out={out}"]
            commands[column] = ["python", "-m", "ddpm_jax.main", *where]
        return commands

    def out(self, row: str, column: str, seed: int = 0) -> str:
        """The file of a result."""
        return os.path.join(self.workdir(row, seed), "eval", f"{column}.json")

    def commands(self, row: str) -> list[list[str]]:
        """The trainings of a row and their evaluations, in turn."""
        return [
            command
            for seed in self.seeds
            for command in (self.train(row, seed), *self.evaluations(row, seed).values())
        ]


def check(commands: dict[str, list[list[str]]]) -> None:
    """Exits with one line if a command of any row is wrong, or code that its config names, before any training."""
    for row, of_row in commands.items():
        method = None
        for command in of_row:
            try:
                method = main_lib.check(command[3:], method)
            except Exception as error:
                line = main_lib.explain(error)
                if line is None:
                    raise
                fail(f"row {row}: {line}")


TOGETHER = """
import json, shlex, sys
from ddpm_jax import main
for command in json.loads(sys.argv[1]):
    print(shlex.join(command), flush=True)
    main.main(command[3:])
"""


def _together(commands: list[list[str]]) -> list:
    """The commands, where evaluations that follow one another are a list: one process runs them, which starts only once."""
    groups = itertools.groupby(
        commands, lambda command: "ddpm_jax.main" in command and not is_training(command)
    )
    result = []
    for are_evaluations, group in groups:
        result += [list(group)] if are_evaluations else group
    return result


def is_training(command: list[str]) -> bool:
    return any(word.startswith("--config=") for word in command)


def run(commands: list[list[str]]) -> None:
    """Runs one command after another, and exits with the status of the first that fails.

    On SIGTERM the running command gets SIGTERM too and can save before this program exits; Ctrl-C reaches it directly.
    """
    caught, running = [], []
    commands = _together(commands)

    def handle(number, frame):
        caught.append(number)
        if number == signal.SIGTERM and running:
            running[0].terminate()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for command in commands:
            if is_one := isinstance(command[0], str):
                print(shlex.join(command), flush=True)
            words = command[1:] if is_one else ["-c", TOGETHER, json.dumps(command)]
            running[:] = [subprocess.Popen([sys.executable, *words])]
            if signal.SIGTERM in caught:  # it came while the process began
                running[0].terminate()
            status = running[0].wait()
            if caught:
                print("stopped; the same command continues", file=sys.stderr)
                sys.exit(128 + caught[0])
            if status:
                which = shlex.join(command) if is_one else "the evaluation printed last"
                print(f"error: status {status} of {which}", file=sys.stderr)
                sys.exit(status if status > 0 else 128 - status)  # −n: killed by signal n
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def numbers(path: str) -> dict[str, tuple[float, str]]:
    """The numbers of a result as {name: (mean, cell of the table)}; empty if there is no file. The name of a bound is "".

    A cell is mean ± standard error (images) for a bound, mean ± standard deviation over seeds for a metric.
    """
    if not os.path.exists(path):
        return {}
    try:
        result = writers.read_json(path)
        if "metrics" in result:
            found = {name: (m["mean"], m["std"]) for name, m in result["metrics"].items()}
            return {name: (mean, cell(mean, spread)) for name, (mean, spread) in found.items()}
        mean, error, count = (result[key] for key in ("total", "total_stderr", "num_images"))
        return {"": (mean, f"{cell(mean, error)} ({count})")}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        fail(f"{path} is not a result ({problem!r}); delete it and evaluate again")


def cell(mean: float, spread: float | None) -> str:
    """A number with its spread, which is None for a single image or seed."""
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def over_seeds(values: list[float]) -> str:
    """Mean ± standard deviation over seeds (their number)."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return f"{cell(float(np.mean(values)), spread)} ({len(values)} seeds)"


def difference(values: dict[int, float], first: dict[int, float]) -> str:
    """A row minus the first one, seed by seed: mean ± standard error, and whether it is significant (t test, 95 %)."""
    paired = [values[seed] - first[seed] for seed in values.keys() & first.keys()]
    if len(paired) < 2:
        return "—"
    mean, error = np.mean(paired), np.std(paired, ddof=1) / np.sqrt(len(paired))
    limit = stats.t.ppf(0.975, len(paired) - 1) * error
    verdict = "" if abs(mean) > limit else ", not distinguishable here"
    return f"{mean:+.3f} ± {error:.3f}{verdict}"


def table(sweep: Sweep, rows: list[str]) -> str:
    """The table in Markdown: a line for each row, a column for each number of its evaluations."""
    found = {}  # (row, (column, name)): {seed: (mean, cell)}
    columns = {row: list(sweep.evaluations(row)) for row in rows}
    for row in rows:
        for column in columns[row]:
            for seed in sweep.seeds:
                for name, number in numbers(sweep.out(row, column, seed)).items():
                    found.setdefault((row, (column, name)), {})[seed] = number
    heads = {}  # {(column, name of the number): its heading}
    for column in dict.fromkeys(column for row in rows for column in columns[row]):
        names = dict.fromkeys(name for _, (other, name) in found if other == column)
        heads |= {(column, name): f"{column} {name}".strip() for name in names or ("",)}
    means = {key: {seed: mean for seed, (mean, _) in n.items()} for key, n in found.items()}
    lines = [["row", *heads.values()], ["---"] * (1 + len(heads))]
    for row in rows:
        keys, several = [(row, head) for head in heads], len(sweep.seeds) > 1
        lines.append([row])
        for key in keys:
            seeds = found.get(key)
            text = over_seeds(list(means[key].values())) if seeds and several else None
            lines[-1].append("—" if not seeds else text or seeds[0][1])
    for row in rows[1:] if len(sweep.seeds) > 1 else ():
        lines.append([f"{row} minus {rows[0]}"])
        for head in heads:
            values, first = (means.get((name, head), {}) for name in (row, rows[0]))
            lines[-1].append(difference(values, first))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(sweep: Sweep, rows: list[str]) -> str:
    """Writes page.html, and returns its path."""
    from ddpm_jax.commands import report
    from ddpm_jax.commands.report import blocks, charts

    drawn = []
    for title, (x_label, curves) in getattr(sweep.experiment, "charts", lambda _: {})(
        sweep.variant
    ).items():
        lines = []
        for name, points in curves.items():
            found = [
                (x, values_of_seeds(sweep, row, column)) for row, column, x in points if row in rows
            ]
            found = sorted((x, values) for x, values in found if values)
            lines.append(
                charts.Curve(
                    name,
                    x=[x for x, _ in found],
                    y=[np.mean(values) for _, values in found],
                    spread=[np.std(v, ddof=1) if len(v) > 1 else 0.0 for _, v in found],
                )
            )
        drawn.append(charts.chart(title, lines, x_label=x_label, x_scale="log"))
    head, _, *body = (
        [cell.strip() for cell in line[2:-2].split(" | ")]
        for line in table(sweep, rows).splitlines()
    )
    words = ["python", "-m", "experiments.sweep", sweep.path, f"--size={sweep.size}"]
    text = report.render(
        {
            "title": sweep.path,
            "lead": (sweep.experiment.__doc__ or "").partition("\n")[0],
            "facts": {"rows": str(len(rows)), "seeds": str(len(sweep.seeds))},
            "sections": {
                "Charts": [block for block in blocks.chart_block(drawn, BARS) if block],
                "Table": [blocks.table("Means over seeds", head, body)],
            },
            "written": time.strftime("%Y-%m-%d %H:%M"),
            "command": shlex.join([*words, f"--seeds={len(sweep.seeds)}", "--page"]),
        }
    )
    path = os.path.join(sweep.folder, "page.html")
    writers.make_folder_of(path)
    writers.save_text(path, text)
    return path


def values_of_seeds(sweep: Sweep, row: str, column: str) -> list[float]:
    """The first number of a column, for the seeds that have one."""
    found = [numbers(sweep.out(row, column, seed)) for seed in sweep.seeds]
    return [next(iter(one.values()))[0] for one in found if one]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m experiments.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", help="a folder or file, such as experiments/ho2020_table2")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--row", action="append", default=[], help="only these rows: ROW or ROW,ROW"
    )
    parser.add_argument("--run", action="store_true", help="run the commands")
    parser.add_argument(
        "--table", action="store_true", help="print the results; with --run, after it"
    )
    parser.add_argument("--page", action="store_true", help="write charts and table as one page")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each row (default: 1)")
    parser.add_argument("--root", default="runs", help="folder of the runs (default: runs)")
    parser.add_argument("--data_dir", help="folder of the data for every training")
    args = parser.parse_args(argv)

    if args.seeds < 1:
        fail(f"--seeds must be at least 1, got {args.seeds}")
    sweep = Sweep(args.experiment, args.size, args.root, args.data_dir, args.seeds)
    rows = [row for names in args.row for row in names.split(",")] or list(sweep.rows)
    for row in rows:
        if row not in sweep.rows:
            fail(f"no row {row!r} at size {args.size} (choose from {', '.join(sweep.rows)})")
    commands = {row: sweep.commands(row) for row in rows}
    if args.run:
        check(commands)
        run([command for row in rows for command in commands[row]])
    elif not args.table and not args.page:
        print("\n\n".join("\n".join(map(shlex.join, commands[row])) for row in rows))
    if args.table:
        print(table(sweep, rows))
    if args.page:
        print(page(sweep, rows))


if __name__ == "__main__":
    main()
