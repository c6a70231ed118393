"""The command line as people type it: one line for each mistake, its status, and no traceback."""

import concurrent.futures
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIGITS = "--config=configs/digits.py:smoke"

MISTAKES = {
    (): "give --config=configs/NAME.py",
    ("--config=configs/digts.py",): "did you mean 'digits.py'",
    ("--config=configs/digits.py:smke",): "it has smoke",
    (DIGITS, "--config.optimzer.name=adam"): 'Did you mean "optimizer"',
    (DIGITS, "--config.optimizer.learning_rte=1"): 'Did you mean "learning_rate"',
    (DIGITS, "--config.optimizer.learning_rate=fast"): "could not convert string to float",
    (DIGITS, "--config.model.head_channels=7"): "head_channels=7 does not divide",
    (DIGITS, "--config.schedule.name=betas", "--config.schedule.betas=0.1,1.5"): "beta[1] = 1.5",
    (DIGITS, "--config.preview.steps=10,15,334"): "asks for 334 of 333 steps",
    (DIGITS, "--config.model.channel_mults=1,a"): "config.model.channel_mults must be",
    (DIGITS, "--config.schedule.name=cosin"): "did you mean 'cosine'",
    (DIGITS, "--config.schedule.end=2"): "(0, 1]",
    (DIGITS, "--config.diffusion.prediction=noise"): "eps, x_0, mean, v",
    (DIGITS, "--config.schedule.name=jsd"): "alpha_bar falls to 0",
    (DIGITS, "--config.schedule.name=cosine", "--config.schedule.end=0.1"): "not 'end'",
    (DIGITS, "--config.data.name=npz:nowhere.npz"): "nowhere.npz",
    (DIGITS, "config.seed=3"): "what is 'config.seed=3'",
    (DIGITS, "--seed=3"): "write --config.seed",
    (DIGITS, "--config.seed=-1"): "seed must lie in",
    (DIGITS, "--config.preview.steps=200000"): "config.preview: steps='200000'",
    (DIGITS, "--config.preview.sampler=ddmi"): "did you mean 'ddim'",
    ("--wrkdir=x",): "Did you mean: workdir",
    ("--mode=sample", "--workdir=runs/not_there"): "runs/not_there/config.json",
    (
        "--mode=nll",
        "--num_samples=3",
    ): "--num_samples is for --mode=sample, progressive, nearest, eval, not for nll",
    ("--mode=best_steps",): "needs --steps=S",
    ("--mode=denoise", "--workdir=runs/not_there"): "needs --from_t=T",
    ("--mode=sample", "--eta=hot"): "'hot' is neither a number nor 'hat'",
    ("--mode=sample", "--clip=soft"): "'soft' is neither true, false nor 'dynamic'",
    ("--mode=sample", "--spacing=cubic"): "should be one of",
    ("--mode=nll", "--guidance=2"): "--guidance is for --mode=",
    ("--mode=smaple",): "should be one of",
}


def command(arguments, workdir):
    where = () if any("workdir" in a for a in arguments) else (f"--workdir={workdir}",)
    where = where if arguments else ()
    return subprocess.run(
        [sys.executable, "-m", "ddpm_jax.main", *arguments, *where],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": ""},
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = {a: pool.submit(command, a, folder / str(i)) for i, a in enumerate(MISTAKES)}
        return {arguments: run.result() for arguments, run in runs.items()}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_mistakes(results, arguments):
    result = results[arguments]
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode in (1, 2), result
    assert "Traceback" not in result.stderr and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and MISTAKES[arguments] in lines[0]
