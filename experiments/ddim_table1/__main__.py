"""How few steps are enough? S × η and S × solver on a trained run: Song et al. 2021 (DDIM), Table 1.

    python -m ddpm_jax.main --config=configs/fashion_mnist.py:cpu --workdir=runs/fashion \\
        --config.schedule.name=linear --config.diffusion.prediction=eps
    python -m experiments.feature_classifier --data=fashion_mnist --out=runs/fashion_classifier.npz
    python -m experiments.ddim_table1 --workdir=runs/fashion --num_samples=300 --num_seeds=1 \\
        --features=experiments.feature_classifier:runs/fashion_classifier.npz

Each cell is the result of `--mode=eval` for three seeds (--num_seeds). Samples and features are saved, so a repeated
command continues where it was stopped, and computes only the rows that are new. A cell shows the mean ± standard
deviation over seeds and, in brackets, Student's t of the differences from the first row, seed by seed, if it is
significant at 95 %. The table is written to eval/ddim_table1.json in the run directory, and images of the same latents
for every S to eval/ddim_table1.png.

The paper, FID of 50,000 images, CIFAR-10, quadratic spacing:

    S        10      20      50     100    1000
    η 0.0    13.36    6.84    4.67   4.16   4.04
    η 0.2    14.04    7.11    4.77   4.25   4.09
    η 0.5    16.66    8.35    5.25   4.46   4.29
    η 1.0    41.07   18.36    8.01   5.78   4.73
    σ̂       367.43  133.37   32.72   9.99   3.17

Expected: with few steps, less noise is better, and a second-order solver is better than DDIM; on the full chain all
are similar.

Measured by the three commands above with --batch_size=100, on one core of an AMD EPYC server, jax 0.10.2, in 62
minutes, half of them for the last cell: squared Fréchet distance between 64 features of 300 samples and of the
60,000 training images (fashion_mnist_classifier_fid_300; for the first 300 test images it is 9.80, the bias of such a
small sample), EMA weights after 4000 steps, seed 0, x̂_0 clipped. Steps are spaced uniformly by default.

    S                              5       10      20      50       T
    DDIM η 0.0                  98.17   42.33   33.62   30.25
    DDIM η 0.2                  96.95   35.76   27.57   31.42
    DDIM η 0.5                  94.91   35.32   25.48   22.81
    DDIM η 1.0                 128.86   54.98   33.66   25.35
    DDIM σ̂                     250.58  135.64   78.03   35.84
    DDIM η 0.0, quadratic      123.50   54.04   38.99   34.50
    DPM-Solver++ 2, log-SNR     77.89   30.71   29.22   29.13
    DPM-Solver++ 3, log-SNR     99.43   32.50   28.63   29.10
    ancestral                                           35.84   15.82

This is one seed. For the same model, 300 images and S = 50, the standard deviation over three seeds is 5.7 (DDIM) and
5.2 (ancestral) (experiments/schedules), so cells that differ by less than about 15 are not distinguishable here.
These differences are larger: σ̂ needs many steps, as in the paper; five steps are too few for all rows; and the whole
ancestral chain is better than 50 of its steps. These are not distinguishable: the values of η from 20 steps on, uniform
and quadratic spacing at 20 and 50 steps, the orders of the solver from 10 steps on, and the solver and DDIM from 10 steps
on. A latent gives the same garment for S = 5, 10, 20, 50 and 1000, with more and more detail.
Not run: several seeds. experiments/frontier asks the same of the digits, with several trainings.
"""

import argparse
import dataclasses
import os
import sys

import numpy as np
from scipy import stats

from ddpm_jax import options
from ddpm_jax.commands import metrics as metrics_lib
from ddpm_jax.commands.sampling import sample
from ddpm_jax.commands.shared import Output
from ddpm_jax.ddpm import Sampling
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import results, runs, writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.main import USER_ERRORS
from ddpm_jax.method import is_diffusion
from ddpm_jax.process.samplers import DDIM, Ancestral, DPMSolver
from ddpm_jax.training import parallel

COUNTS = (5, 10, 20, 50)  # default values of S
LATENT_COUNTS = (*COUNTS, 1000)  # values of S in the picture
ROWS = {
    "DDIM η 0.0": Sampling(sampler=DDIM()),
    "DDIM η 0.2": Sampling(sampler=DDIM(eta=0.2)),
    "DDIM η 0.5": Sampling(sampler=DDIM(eta=0.5)),
    "DDIM η 1.0": Sampling(sampler=DDIM(eta=1.0)),
    "DDIM σ̂": Sampling(sampler=DDIM(eta="hat")),
    "DDIM η 0.0, quadratic": Sampling(sampler=DDIM(), spacing="quadratic"),
    "DPM-Solver++ 2, log-SNR": Sampling(sampler=DPMSolver(order=2), spacing="log_snr"),
    "DPM-Solver++ 3, log-SNR": Sampling(sampler=DPMSolver(order=3), spacing="log_snr"),
    "ancestral": Sampling(sampler=Ancestral()),
}
ONLY = {"ancestral": (50, None)}  # None: all T steps


def measure(workdir, *, rows=ROWS, counts=COUNTS, **arguments):
    """The table as {row: {S or "T": {metric: numbers of each seed}}}, by `commands.metrics.evaluate`.

    Args:
      workdir: a run of a diffusion.
      rows: {name: Sampling}.
      counts: the values of S for all rows that are not in `ONLY`.
      arguments: arguments of `evaluate`.
    """
    run = runs.load(workdir)
    if not is_diffusion(run.method):
        raise RunError(f"{workdir} is not a run of a diffusion, so it has no steps to choose")
    cells = [
        (name, "T" if S is None else S, dataclasses.replace(row, steps=S and str(S)))
        for name, row in rows.items()
        for S in ONLY.get(name, counts)
        if S is None or len(run.method.schedule) >= S
    ]
    for _, _, sampling in cells:  # check all options before hours of sampling
        with options.errors_at("ddim_table1"):
            run.method.chain(sampling)
    table = {}
    for name, S, sampling in cells:
        result = metrics_lib.evaluate(run, sampling=sampling, **arguments)
        table.setdefault(name, {})[S] = {key: entry["values"] for key, entry in result.items()}
        print(f"{name}, S = {S}: {table[name][S]}", flush=True)
    return table


def show(table: dict, metric: str) -> str:
    """The table in Markdown, with a column for each S: the mean over seeds ± their standard deviation.

    Brackets contain Student's t of the differences from the first row, seed by seed, if it is significant at 95 %;
    without brackets the two are not distinguishable.
    """
    first = next(iter(table.values()))
    columns = list(dict.fromkeys(S for row in table.values() for S in row))
    lines = [["S", *map(str, columns)], ["---"] * (1 + len(columns))]
    for name, row in table.items():
        cells = []
        for S in columns:
            values = row[S][metric] if S in row else []
            of_first = first[S][metric] if S in first and row is not first else []
            cells.append(_cell(values, of_first))
        lines.append([name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(values: list[float], of_first: list[float]) -> str:
    if not values:
        return ""
    text = f"{np.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2f}"
    if len(values) > 1 and of_first:
        paired = np.subtract(values, of_first)
        t = np.mean(paired) / (np.std(paired, ddof=1) / np.sqrt(len(paired)))
        if abs(t) > stats.t.ppf(0.975, len(paired) - 1):
            text += f" ({t:+.1f})"
    return text


def follow(
    workdir, *, counts=LATENT_COUNTS, num_images: int = 10, seed: int = 0, output=Output()
) -> str:
    """Draws one row of images for each S, all from the same latents by DDIM; returns the picture's path."""
    run, grids = runs.load(workdir), []
    for S in counts:
        sampling = Sampling(sampler=DDIM(), steps=str(S))
        path = sample(run, sampling=sampling, num_samples=num_images, seed=seed, output=output)
        grids.append((f"S = {S}", results.read_npz(path)["images"][:num_images]))
    path = os.path.join(config_lib.path(workdir), "eval", "ddim_table1.png")
    writers.save_grids(path, grids, columns=num_images)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ddim_table1",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, help="a trained run")
    parser.add_argument("--features", default="inception", help="as for --mode=eval")
    parser.add_argument("--metrics", default="fid", help="as for --mode=eval")
    parser.add_argument("--num_samples", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--num_seeds", type=int, default=3, help="seeds of sampling, from --seed on"
    )
    parser.add_argument("--data_dir", help="where the data are (default: as in the config)")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument(
        "--counts", default=",".join(map(str, COUNTS)), help="values of S, separated by commas"
    )
    args = parser.parse_args(argv)
    args.workdir = config_lib.path(args.workdir)
    parallel.enable_compilation_cache()
    output = Output(batch_size=args.batch_size)
    try:
        counts = tuple(int(S) for S in args.counts.split(","))
        table = measure(
            args.workdir,
            counts=counts,
            features=args.features,
            metrics=args.metrics,
            num_samples=args.num_samples,
            num_seeds=args.num_seeds,
            seed=args.seed,
            data_dir=args.data_dir,
            output=output,
        )
        T = len(runs.load(args.workdir).method.schedule)
        picture = follow(args.workdir, counts=(*counts, T), seed=args.seed, output=output)
    except (*USER_ERRORS, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    names = list(next(iter(next(iter(table.values())).values())))
    path = os.path.join(args.workdir, "eval", "ddim_table1.json")
    rows = {name: {str(S): cell for S, cell in row.items()} for name, row in table.items()}
    writers.save_json(
        path, {"num_samples": args.num_samples, "features": args.features, "rows": rows}
    )
    for name in names:
        print(f"\n{name}\n\n{show(table, name)}")
    print(f"\n{path}\n{picture}: each column is one latent, each row one S", flush=True)


if __name__ == "__main__":
    main()
