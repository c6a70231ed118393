"""Every row of every experiment builds, its printed command trains it, and results become a table."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax import main, modes, options
from ddpm_jax.configs import digits
from ddpm_jax.ddpm import Bounding, Sampling
from ddpm_jax.experiments import sweep
from ddpm_jax.files import writers
from ddpm_jax.method import from_config
from ddpm_jax.process.samplers import DDIM
from ddpm_jax.training import step as training

ROOT = Path(__file__).parent.parent
TABLES = [f"experiments/{Path(table).name}" for table in sweep.tables()]
NAME = re.compile(r"[a-z0-9_]+")  # of a row or a column: a folder and a file
EVERY = [(table, size) for table in TABLES for size in sweep.SIZES]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def printed(capsys, *arguments) -> list[list[str]]:
    sweep.main(list(arguments))
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for line in lines if line]


def parsed(command):
    """The config and the work directory of a training command, as the main program reads them."""
    assert command[:3] == ["python", "-m", "ddpm_jax.main"]
    request = main.Request(command[3:])
    return request.config(), request.workdir()


def config_of(file: str):
    return importlib.import_module(file.removesuffix(".py").replace("/", "."))


def is_training(command) -> bool:
    return any(argument.startswith("--config=") for argument in command)


@pytest.mark.parametrize("table, size", EVERY)
def test_printed_commands_parse_back_to_the_rows_and_build(table, size, capsys):
    experiment, variant = sweep.load(table), sweep.SIZES[size]
    rows = experiment.rows(variant)
    commands = printed(capsys, table, f"--size={size}", "--root=my runs", "--data_dir=a b")
    trainings = list(filter(is_training, commands))
    assert len(rows) == len(trainings) >= 1
    for (row, overrides), command in zip(rows.items(), trainings, strict=True):
        config, workdir = parsed(command)
        assert workdir == f"my runs/{Path(table).stem}/{size}/{row}"
        overrides = overrides | {"config.data.data_dir": "a b"}
        if "config.init_from" in overrides:
            source = f"my runs/{Path(table).stem}/{size}/{overrides['config.init_from']}"
            overrides["config.init_from"] = source
        base = overrides.pop("config", None)
        expected = (config_of(base) if base else experiment).get_config(variant)
        for field, value in overrides.items():
            *sections, name = field.split(".")[1:]
            section = expected
            for part in sections:
                section = section[part]
            assert name in section, field
            section[name] = value
        assert config.to_dict() == expected.to_dict()
        from_config(config)
        training.optimizer_of(config)
        assert config.preview.every >= 1 and NAME.fullmatch(row)


@pytest.mark.parametrize("table, size", EVERY)
def test_evaluations_follow_their_training_and_use_flags_that_exist(table, size, capsys):
    experiment, variant = sweep.load(table), sweep.SIZES[size]
    commands = iter(printed(capsys, table, f"--size={size}"))
    for row in experiment.rows(variant):
        config, workdir = parsed(next(commands))
        method = from_config(config)
        evaluations = experiment.evaluations(variant, row)
        assert evaluations
        for column, arguments in evaluations.items():
            out = f"{workdir}/eval/{column}.json"
            expected = ["python", "-m", "ddpm_jax.main", f"--workdir={workdir}", *arguments]
            assert next(commands) == [*expected, f"--out={out}"] and NAME.fullmatch(column)
            request = main.Request(arguments)  # ConfigError: no such flag
            command = modes.COMMANDS[request.mode]
            kwargs = options.bind(
                command, request.values(command), "--", given=modes.POSITIONAL
            )  # ConfigError: no such value
            if request.mode == "eval":
                method.chain(kwargs.get("sampling", Sampling()))
            else:
                bounding = kwargs.get("bounding", Bounding())
                analytic = bounding.variance == "analytic"
                length = int(bounding.steps or config.schedule.num_timesteps)
                method.bound_chain(bounding, x_0_error=np.ones(length) if analytic else None)
    assert next(commands, None) is None


SMOKE = [(table, row) for table in TABLES for row in sweep.load(str(ROOT / table)).rows("smoke")]


@pytest.mark.slow
@pytest.mark.parametrize("table, row", SMOKE)
def test_the_loss_of_every_row(table, row, capsys):
    (command, *_) = printed(capsys, table, "--size=smoke", f"--row={row}")
    config, _ = parsed(command)
    if "channel_mults" in config.model:  # a shallower network is traced in half the time
        config.model.channel_mults = (1, 2)
        config.model.attention_resolutions = (min(config.data.image_shape[:2]) // 2,)
    method = from_config(config)
    params = jax.eval_shape(method.init, jax.random.key(0))
    b, shape = 2, jax.ShapeDtypeStruct
    batch = {"image": shape((b, *method.image_shape), np.uint8), "label": shape((b,), np.int32)}
    batch |= {"index": shape((b,), np.int32), "position": shape((b,), np.float32)}
    memory = jax.eval_shape(method.init_loss_state, params)
    loss, metrics, record = jax.eval_shape(
        method.loss_fn, params, memory, jax.eval_shape(lambda: jax.random.key(0)), batch
    )
    assert loss.shape == (b,) and set(metrics) == set(method.metric_names)
    assert jax.eval_shape(method.update_loss_state, memory, record, params) == memory


def test_the_papers_rows(capsys):
    def of(folder, row):
        return parsed(printed(capsys, f"experiments/{folder}", f"--row={row}")[0])[0]

    one = of("iddpm_table2", "linear_simple_1k")
    four = of("iddpm_table2", "linear_hybrid")
    vlb = of("iddpm_table2", "cosine_vlb")
    assert (one.schedule.num_timesteps, one.schedule.start, one.schedule.end) == (1000, None, None)
    assert (four.schedule.num_timesteps, four.schedule.start) == (4000, 2.5e-5)
    assert four.schedule.end == 0.005 and four.model.dropout == 0.1 and vlb.model.dropout == 0.3
    assert (vlb.schedule.name, vlb.diffusion.t_sampling) == ("cosine", "importance")
    simple = of("ho2020_table2", "eps_simple")
    base = sweep.load("experiments/ho2020_table2").get_config()
    assert simple.to_dict() == base.to_dict()  # the paper's best row is configs/cifar10.py


def test_a_table_of_what_is_there(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.py"
    place = tmp_path / "runs" / "mine" / "cpu"
    file.write_text(
        "def rows(size):\n    return {'a': {}, 'b': {}, 'c': {}}\n"
        "def evaluations(size, row):\n"
        "    return {'p': ['--mode=nll'], ('q' if row == 'b' else 'r'): ['--mode=eval']}\n"
    )

    def write(name, **result):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))

    def metric(mean, std):
        return {"mean": mean, "std": std, "values": [mean], "manifest": {}}

    write("a/eval/p.json", total=3.14159, total_stderr=0.0125, num_images=64, L_T=0.0)
    write("a/eval/r.json", metrics={"fid_300": metric(20, None), "kid": metric(0.5, 0.25)})
    write("b/eval/q.json", metrics={"fid_300": metric(1.0, 0.125)})
    write("c/eval/p.json", total=1.0, total_stderr=None, num_images=1)
    arguments = [str(file), "--size=cpu", f"--root={tmp_path}/runs", "--table"]
    sweep.main(arguments)
    assert capsys.readouterr().out.splitlines() == [
        "| row | p | r fid_300 | r kid | q fid_300 |",
        "| --- | --- | --- | --- | --- |",
        "| a | 3.142 ± 0.013 (64) | 20.000 | 0.500 ± 0.250 | — |",
        "| b | — | — | — | 1.000 ± 0.125 |",
        "| c | 1.000 (1) | — | — | — |",
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    file = f"~/{file.relative_to(tmp_path)}"
    sweep.main([file, "--size=cpu", "--root=~/runs", "--table", "--row=b"])
    assert capsys.readouterr().out.splitlines() == [
        "| row | p | q fid_300 |",
        "| --- | --- | --- |",
        "| b | — | 1.000 ± 0.125 |",
    ]
    for text, problem in (
        ('{"something": "else"}', "KeyError('total')"),
        ('{"metrics": {"fid": 3}}', "TypeError(\"'int' object is not subscriptable\")"),
        ('["metrics"]', "ValueError('it must hold fields, not a list'"),
        ("{", "JSONDecodeError("),
    ):
        (place / "c/eval/p.json").write_text(text)
        line = refused(capsys, *arguments)
        assert line.startswith(f"error: {place}/c/eval/p.json is not a result ({problem}")
        assert line.endswith("delete it and evaluate again")


def test_several_seeds_say_what_is_a_finding(tmp_path, capsys):
    """b is lower than a by about 1 for each seed; c is lower by as much on average, but not for each seed."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def rows(size):\n    return {'a': {}, 'b': {}, 'c': {}}\n"
        "def evaluations(size, row):\n    return {'p': ['--mode=nll']}\n"
    )
    values = {"a": (3.0, 5.0, 7.0), "b": (2.0, 4.1, 5.9), "c": (4.0, 1.0, 7.0)}
    for row, of in values.items():
        for seed, total in enumerate(of):
            path = tmp_path / "mine" / "cpu" / (f"{row}_seed{seed}" if seed else row) / "eval"
            path.mkdir(parents=True)
            result = {"total": total, "total_stderr": 0.1, "num_images": 64}
            (path / "p.json").write_text(json.dumps(result))
    given = [str(file), "--size=cpu", f"--root={tmp_path}", "--seeds=3"]
    sweep.main([*given, "--table"])
    assert capsys.readouterr().out.splitlines() == [
        "| row | p |",
        "| --- | --- |",
        "| a | 5.000 ± 2.000 (3 seeds) |",
        "| b | 4.000 ± 1.952 (3 seeds) |",
        "| c | 4.000 ± 3.000 (3 seeds) |",
        "| b minus a | -1.000 ± 0.058 |",
        "| c minus a | -1.000 ± 1.528, not distinguishable here |",
    ]
    commands = printed(capsys, *given, "--row=b")
    trainings = [command for command in commands if is_training(command)]
    assert [command[-1] for command in trainings[1:]] == ["--config.seed=1", "--config.seed=2"]
    assert not any("config.seed" in argument for argument in trainings[0])
    assert trainings[2][4].endswith("b_seed2") and len(commands) == 6
    assert "at least 1" in refused(capsys, str(file), "--seeds=0")


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit:
        sweep.main(list(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["experiments/ho2020"], "experiments/ho2020_table2, experiments/iddpm_table2"),
        (["experiments/log_lin.py"], "experiments/log_linear.py, experiments/schedules"),
        (["experiments/sweep.py"], "no rows(size) (choose from experiments/fashion_mnist_ddpm"),
        (["experiments/vae"], "no rows(size) (choose from experiments/fashion_mnist_ddpm"),
        (["experiments/iddpm_table2", "--size=tiny"], "'full', 'cpu', 'smoke'"),
        (["experiments/iddpm_table2", "--row=cosine"], "cosine_simple, cosine_hybrid, cosine_vlb"),
        (["experiments/iddpm_table2", "--row=cosine_vlb,"], "no row ''"),
        (["experiments/iddpm_table2", "--rows=cosine_vlb"], "--rows=cosine_vlb"),
        ([], "required: experiment"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert said in refused(capsys, *arguments)


WRONG_ROW = """
import flax.linen as nn
from ddpm_jax.configs import digits

class Wide(nn.Module):
    out_channels: int = 1
    @nn.compact
    def __call__(self, x, t, labels=None): return nn.Dense(7)(x)

def broken(schedule, denoise_fn, x_0, t, eps): return nowhere

def get_config(size=""): return digits.get_config(size)
def rows(size): return {{"one": {{}}, "two": {row}}}
def evaluations(size, row): return {{"nll": ["--mode=nll", "--steps=4", *{flags}]}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, flags, said",
    [
        ({"config.model.name": "wrong_row:Wide"}, [], "row two: network Wide"),
        ({"config.diffusion.loss": "wrong_row:broken"}, [], "NameError: name 'nowhere' is not"),
        ({}, ["--variance=learned"], "row one: bounding: variance 'learned' needs outputs"),
        ({}, ["--variance=learned_range"], "row one: bounding: variance 'learned_range' needs"),
        ({"config.training.batch_size": 0}, [], "row two: config.training: batch_size 0"),
    ],
)
def test_no_row_is_trained_if_one_cannot_be(row, flags, said, tmp_path, monkeypatch, capsys):
    file = tmp_path / "wrong_row.py"
    file.write_text(WRONG_ROW.format(row=row, flags=flags))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert said in refused(capsys, str(file), "--size=smoke", "--run", f"--root={tmp_path}/runs")
    assert not (tmp_path / "runs").exists()


def test_rows_can_be_chosen(capsys):
    given = ["experiments/ho2020_table2", "--row=eps_simple,mean_fixed", "--row=eps_fixed"]
    trainings = list(filter(is_training, printed(capsys, *given)))
    names = [os.path.basename(parsed(command)[1]) for command in trainings]
    assert names == ["eps_simple", "mean_fixed", "eps_fixed"]


def python(code):
    return ["python", "-c", code]


def test_run_stops_at_the_first_failure(tmp_path, capfd):
    file = tmp_path / "ran"
    commands = [python(f"open({str(file)!r}, 'w')"), python("raise SystemExit(3)")]
    with pytest.raises(SystemExit) as exit:
        sweep.run([*commands, python(f"import os; os.remove({str(file)!r})")])
    assert exit.value.code == 3 and file.exists()
    assert capfd.readouterr().err == f"error: status 3 of {shlex.join(commands[1])}\n"
    with pytest.raises(SystemExit) as exit:
        sweep.run([python("import os; os.kill(os.getpid(), 9)")])
    assert exit.value.code == 128 + 9


def test_a_signal_while_a_command_begins_ends_it(monkeypatch):
    """It comes before there is a process to pass it on to."""
    real = subprocess.Popen

    def popen(words):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(words)

    monkeypatch.setattr(subprocess, "Popen", popen)
    begin = time.monotonic()
    with pytest.raises(SystemExit) as exit:
        sweep.run([python("import time; time.sleep(60)")])
    assert exit.value.code == 128 + signal.SIGTERM and time.monotonic() - begin < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_command_and_runs_no_other(number, tmp_path, capfd):
    """The command signals its parent, as a terminal or a scheduler would, and then saves slowly."""
    file = tmp_path / "saved"
    save = f"lambda *_: (time.sleep(0.2), open({str(file)!r}, 'w'), os._exit(0))"
    stop = f"os.kill(os.getppid(), {number:d}); os.kill(os.getpid(), {signal.SIGINT:d})"
    first = (
        f"import os, signal, time; [signal.signal(n, {save}) for n in (2, {signal.SIGTERM:d})];"
        f"{stop}; time.sleep(60)"
    )
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        sweep.run([python(first), python(f"import os; os.remove({str(file)!r})")])
    assert exit.value.code == 128 + number and file.exists()
    assert capfd.readouterr().err == "stopped; the same command continues\n"
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("table", TABLES)
def test_each_docstring_says_what_to_run_and_what_came_of_it(table):
    text = sweep.load(table).__doc__
    assert f"python -m experiments.sweep {table} --size=cpu --run" in text
    assert "Expected" in text and "Measured" in text
    for size in sweep.SIZES.values():
        assert all(f"\n    {row} " in text for row in sweep.load(table).rows(size))


# ---- ddim_table1 -----------------------------------------------------------------------------------


def test_the_table_of_few_steps_asks_for_every_cell_once(monkeypatch):
    table1 = importlib.import_module("experiments.ddim_table1.__main__")
    asked = []

    def evaluate(run, *, sampling, **asked_too):
        asked.append(sampling)
        mean = 1.0 + 100 * int(sampling.steps or 0) + 0.125 * isinstance(sampling.sampler, DDIM)
        return {"fid_300": {"values": [mean]}}

    class Run:
        method = from_config(digits.get_config())

    monkeypatch.setattr(table1.runs, "load", lambda workdir: Run)
    monkeypatch.setattr(table1.metrics_lib, "evaluate", evaluate)
    table = table1.measure("run", features="x", num_samples=300, counts=(2, 4))
    assert len(asked) == 2 * (len(table1.ROWS) - 1) + 2
    assert len(set(asked)) == len(asked)
    lines = table1.show(table, "fid_300").splitlines()
    assert lines[0] == "| S | 2 | 4 | 50 | T |"
    assert lines[2] == "| DDIM η 0.0 | 201.12 | 401.12 |  |  |"
    assert lines[-1] == "| ancestral |  |  | 5001.00 | 1.00 |"
    seeds = {"a": {5: {"fid": [3.0, 5.0, 7.0]}}, "b": {5: {"fid": [2.0, 4.1, 5.9]}}}
    seeds |= {"c": {5: {"fid": [4.0, 1.0, 7.0]}}}
    assert table1.show(seeds, "fid").splitlines()[2:] == [
        "| a | 5.00 ± 2.00 |",
        "| b | 4.00 ± 1.95 (-17.3) |",
        "| c | 4.00 ± 3.00 |",
    ]


def test_every_row_is_checked_before_the_first_is_trained(tmp_path, capsys):
    file = tmp_path / "three.py"
    file.write_text(
        "from ddpm_jax.configs import digits\n"
        "def get_config(size=''): return digits.get_config('smoke')\n"
        "def rows(size): return {'good': {}, 'bad': {'config.diffusion.loss': 'vlbb'}}\n"
        "def evaluations(size, row): return {'bound': ['--mode=nll', '--num_images=3']}\n"
    )
    arguments = (str(file), "--size=smoke", "--run", f"--root={tmp_path / 'runs'}")
    assert "row bad: config.diffusion: unknown loss 'vlbb'" in refused(capsys, *arguments)
    file.write_text(file.read_text().replace("vlbb", "vlb").replace("num_images", "num_imgs"))
    assert "row good: there is no flag --num_imgs" in refused(capsys, *arguments)
    assert not (tmp_path / "runs").exists()


def test_a_row_begins_with_the_weights_of_an_earlier_one_of_its_seed(tmp_path, capsys):
    file = tmp_path / "mine.py"
    text = (
        "from ddpm_jax.configs import digits\n"
        "def get_config(size): return digits.get_config(size) | {{'init_from': ''}}\n"
        "def rows(size): return {rows}\n"
        "def evaluations(size, row): return {{}}\n"
    )
    teacher, student = ("'a': {}", "'b': {'config.init_from': 'a'}")
    file.write_text(text.format(rows=f"{{{teacher}, {student}}}"))
    commands = printed(capsys, str(file), "--size=smoke", "--seeds=2", "--root=r", "--row=b")
    given = [word for command in commands for word in command if "init_from" in word]
    assert given == [f"--config.init_from=r/mine/smoke/a{seed}" for seed in ("", "_seed1")]
    file.write_text(text.format(rows=f"{{{student}, {teacher}}}"))
    line = refused(capsys, str(file))
    assert line == "error: row b: config.init_from is 'a', which is no earlier row"


def test_a_page_of_charts_with_means_over_seeds(tmp_path, capsys):
    """Rows without a result are left out, and so are those that are not asked for."""
    file = tmp_path / "mine.py"
    file.write_text(
        '"""Which is better?"""\n'
        "def rows(size): return {'a': {}, 'b': {}, 'c': {}}\n"
        "def evaluations(size, row): return {f'd_{n}': ['--mode=eval'] for n in (1, 10, 100)}\n"
        "def charts(size):\n"
        "    of = {row: [(row, f'd_{n}', n) for n in (100, 1, 10)] for row in rows(size)}\n"
        "    return {'distance': ('network calls', of)}\n"
    )
    for row, seed, n, mean in (
        ("a", 0, 1, 4.0),
        ("a", 1, 1, 6.0),
        ("a", 0, 100, 2.0),
        ("b", 0, 10, 3.0),
    ):
        place = tmp_path / "r" / "mine" / "cpu" / (f"{row}_seed{seed}" if seed else row) / "eval"
        place.mkdir(parents=True, exist_ok=True)
        metric = {"mean": mean, "std": None, "values": [mean], "manifest": {}}
        writers.save_result(str(place / f"d_{n}.json"), {"metrics": {"fid": metric}})
    arguments = [str(file), "--size=cpu", f"--root={tmp_path}/r", "--seeds=2", "--page"]
    sweep.main(arguments)
    path = capsys.readouterr().out.strip()
    assert path == f"{tmp_path}/r/mine/cpu/page.html"
    text = Path(path).read_text()
    assert "Which is better?" in text and "distance over network calls: a, b;" in text
    assert (
        len(re.findall(r"<path[^>]*var\(--c", text)) == 3
    )  # two curves, and a bar where two seeds are
    assert "<td>5</td>" in text and "5.000 ± 1.414 (2 seeds)" in text
    sweep.main([*arguments, "--row=b,c"])
    assert "distance over network calls: b;" in Path(path).read_text()


def test_evaluations_of_a_run_share_a_process_and_stop_at_the_first_failure(tmp_path, capfd):
    nll = ["python", "-m", "ddpm_jax.main", f"--workdir={tmp_path}/none", "--mode=nll"]
    with pytest.raises(SystemExit) as exit:
        sweep.run([python("print('trained')"), nll, [*nll, "--steps=5"], python("print('never')")])
    out, err = capfd.readouterr()
    assert exit.value.code == 1 or exit.value.code == 2
    assert out.splitlines().count(shlex.join(nll)) == 1 and "trained" in out
    assert "--steps=5" not in out and "\nnever" not in out
    assert f"{tmp_path}/none" in err
