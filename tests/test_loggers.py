"""Loggers: each row once, after a kill and a resume too; what they lack is said, and what fails does not end a run."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
from test_train import make_config, metrics

from ddpm_jax import main
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import runs, writers
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loggers, loop


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Without loss.png, which takes half of the time of so short a run."""
    monkeypatch.setattr(writers, "save_loss_curve", lambda path, rows: None)


MINE = """
import json, os

class Mine:
    def __init__(self, start):
        self.path = os.path.join(start.workdir, "mine.jsonl")
        self.write("start", start.step, start.sent)
        if {rewinds}:
            self.step = min(start.step, start.sent)

    def write(self, *words):
        with open(self.path, "a") as file:
            file.write(json.dumps(words) + "\\n")

    def log(self, step, scalars, pictures, histograms):
        if step == {fails_at}:
            raise {error}
        shapes = {{name: picture.shape for name, picture in pictures.items()}}
        self.write(step, scalars, shapes, {{name: len(x) for name, x in histograms.items()}})

    def close(self):
        self.write("close")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes a logger of one's own, and returns its name and a function that reads what it got."""

    def make(rewinds=False, fails_at=-1, error='RuntimeError("no network\\\\nand more")'):
        text = MINE.format(rewinds=rewinds, fails_at=fails_at, error=error)
        (tmp_path / "my_logger.py").write_text(text)
        sys.modules.pop("my_logger", None)
        return "my_logger:Mine"

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return make


def got(workdir):
    lines = (workdir / "mine.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train(workdir, *names, num_steps=6, **changes):
    changes = {"training__logger": names, "preview__every": 4} | changes
    return loop.train(make_config(num_steps=num_steps, **changes), workdir)


def kill_after(workdir, step):
    """Leaves a run as a kill after its last step would: rows are logged, and no checkpoint after `step` is there."""
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def test_a_logger_of_ones_own_gets_what_the_run_directory_gets(tmp_path, mine):
    train(tmp_path / "run", mine(), training__histograms=True)
    start, *rows, close = got(tmp_path / "run")
    assert start == ["start", 0, 0] and close == ["close"]
    assert [row[0] for row in rows] == [2, 4, 6]
    written = writers.read_metrics(str(tmp_path / "run" / "metrics.jsonl"))
    for (step, scalars, _, _), row in zip(rows, written, strict=True):
        assert row.pop("step") == step
        assert scalars == {name: value for name, value in row.items() if value is not None}
    assert [list(row[2]) for row in rows] == [[], ["samples"], ["samples"]]
    assert rows[1][2]["samples"][2] == 3
    assert [row[3] for row in rows] == [{}, {"params/level": 1}, {"params/level": 1}]


def test_a_run_is_read_without_its_logger(tmp_path, mine):
    train(tmp_path / "run", mine())
    assert runs.foreign_modules(config_lib.load(tmp_path / "run" / "config.json")) == ["affine"]


@pytest.mark.parametrize(
    "words, chosen",
    [
        ([], ()),
        (["--logger=tensorboard"], ("tensorboard",)),
        (["--config.training.logger=json:dumps,wandb"], ("json:dumps", "wandb")),
        (["--config.training.logger=wandb", "--logger="], ()),
    ],
)
def test_flags_and_fields(tmp_path, monkeypatch, words, chosen):
    trained = []
    monkeypatch.setattr(loop, "train", lambda config, *_, **__: trained.append(config) or 1 / 0)
    request = main.Request(["--config=digits:smoke", f"--workdir={tmp_path / 'run'}", *words])
    with pytest.raises(ZeroDivisionError):
        main.execute(request)
    assert tuple(trained[0].training.get("logger") or ()) == chosen


def test_histograms_come_on_request_only(tmp_path, mine):
    train(tmp_path / "run", mine())
    assert not any(row[3] for row in got(tmp_path / "run")[1:-1])


@pytest.mark.parametrize("rewinds, steps", [(False, [2, 4, 6, 8, 10]), (True, [2, 4, 6, 8, 8, 10])])
def test_a_killed_run_continues_as_one(tmp_path, mine, rewinds, steps):
    name, run = mine(rewinds), tmp_path / "run"
    train(run, name, num_steps=8)
    kill_after(run, 6)
    train(run, name, num_steps=10)
    lines = [row for row in got(run) if row[0] != "close"]
    assert [row[1:] for row in lines if row[0] == "start"] == [[0, 0], [6, 8]]
    assert [row[0] for row in lines if row[0] != "start"] == steps


def test_a_kill_between_the_checkpoint_and_the_logger_loses_nothing(tmp_path, mine):
    name, run = mine(), tmp_path / "run"
    train(run, name)
    lines = (run / "mine.jsonl").read_text().splitlines()
    (run / "mine.jsonl").write_text("\n".join(lines[:-2]) + "\n")  # without step 6 and close
    (run / "loggers.json").write_text(json.dumps({name: 4}))
    train(run, name, num_steps=8)
    rows = [row for row in got(run) if isinstance(row[0], int)]
    assert [row[0] for row in rows] == [2, 4, 6, 8]
    assert "loss" in rows[2][1] and rows[2][2]["samples"] == rows[3][2]["samples"]


def test_a_logger_that_is_added_gets_the_whole_run_even_if_it_is_finished(tmp_path, mine, capsys):
    run = tmp_path / "run"
    train(run)
    train(run, mine())
    assert "nothing to do" in capsys.readouterr().out
    rows = got(run)
    assert [row[0] for row in rows] == ["start", 2, 4, 6, "close"]
    assert [list(row[2]) for row in rows[1:4]] == [[], ["samples"], ["samples"]]


@pytest.mark.parametrize("error", ['OSError(28, "No space")', 'ValueError("a\\nb")'])
def test_a_logger_that_fails_does_not_end_the_run(tmp_path, mine, capsys, error):
    run = tmp_path / "run"
    state = train(run, mine(fails_at=4, error=error))
    assert int(state.step) == 6
    lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING: the logger" in line]
    assert len(lines) == 1 and "my_logger:Mine failed at step 4 and gets nothing more" in lines[0]
    assert [row[0] for row in got(run)] == ["start", 2]
    train(run, mine(), num_steps=8)  # repaired, it gets what it has missed
    assert [row[0] for row in got(run)] == ["start", 2, "start", 4, 6, 8, "close"]


@pytest.mark.parametrize(
    "names, words",
    [
        (("tensorbord",), "unknown logger 'tensorbord'; did you mean 'tensorboard'"),
        (("test_loggers:NoLogger",), "must take \\(start\\)"),
        (("test_loggers:nothing",), "has no 'nothing'"),
        (("json:dumps", "nowhere:X"), "nowhere"),
    ],
)
def test_bad_names_are_one_line_and_leave_no_run(tmp_path, names, words):
    with pytest.raises(ConfigError, match=words) as error:
        train(tmp_path / "run", *names)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def NoLogger():
    """Takes no argument."""


class WithoutLog:
    """Has a log that takes something else."""

    def __init__(self, start):
        pass

    def log(self, row):
        pass


def test_a_log_that_takes_something_else_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"step, scalars, pictures, histograms"):
        train(tmp_path / "run", "test_loggers:WithoutLog")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_what_brings_it(tmp_path, monkeypatch, name):
    for module in list(sys.modules):
        if module.partition(".")[0] == name:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    with pytest.raises(ConfigError, match=f"--logger={name} needs.*pip install {name}$") as error:
        train(tmp_path / "run", name)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_no_package_of_a_logger_is_imported_unasked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert int(train(tmp_path).step) == 6
    assert not (tmp_path / "loggers.json").exists()


def test_a_damaged_record_is_one_line(tmp_path, mine):
    train(tmp_path / "run", mine())
    (tmp_path / "run" / "loggers.json").write_text("{")
    with pytest.raises(ConfigError, match=r"loggers.json cannot be read.*delete it"):
        train(tmp_path / "run", mine(), num_steps=8)


# ---- TensorBoard -----------------------------------------------------------------------------------


def events(workdir):
    """What TensorBoard reads."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    size = {module.SCALARS: 0, module.IMAGES: 0, module.HISTOGRAMS: 0}
    found = module.EventAccumulator(str(workdir / "tensorboard"), size_guidance=size)
    return found.Reload()


def test_tensorboard_reads_the_rows_of_metrics_once_after_a_kill(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # nothing needs it
    train(tmp_path, "tensorboard", num_steps=8)
    kill_after(tmp_path, 6)
    train(tmp_path, "tensorboard", num_steps=10)
    read = events(tmp_path)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    for name in ("loss", "grad_norm", "learning_rate", "dark"):
        found = [(one.step, one.value) for one in read.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows], name
    assert "never" not in read.Tags()["scalars"]  # None in every row
    assert [one.step for one in read.Images("samples")] == [4, 8, 10]


def test_tensorboard_has_pictures_and_histograms(tmp_path):
    pytest.importorskip("tensorboard")
    start = loggers.Start(str(tmp_path), make_config(), 0, 0)
    logger = loggers.TensorBoard(start)
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    values = np.array([0.0, 0.0, 1.0, 3.0], np.float32)
    logger.log(
        3, {}, {"samples": picture}, {"params/w": values, "params/b": np.zeros(1, np.float32)}
    )
    read = events(tmp_path)  # before it is closed: complete after every step
    (image,) = read.Images("samples")
    assert (image.height, image.width, image.step) == (9, 7, 3)
    assert image.encoded_image_string == writers.png_bytes(picture)
    (one,) = read.Histograms("params/w")
    counted = one.histogram_value
    assert (counted.min, counted.max, counted.num, counted.sum) == (0.0, 3.0, 4.0, 4.0)
    assert sum(counted.bucket) == 4 and counted.bucket_limit[-1] == 3.0
    assert sum(read.Histograms("params/b")[0].histogram_value.bucket) == 1
    logger.close()


# ---- Weights & Biases ------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """Records calls as the real module takes them."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    offline, had = True, 0  # what is known of the run on the server

    def init(self, **settings):
        self.runs.append(FakeRun(settings, self.offline, 0 if self.offline else self.had + 1))
        return self.runs[-1]

    def Image(self, picture):
        assert picture.dtype == np.uint8
        return picture.shape

    def Histogram(self, *, np_histogram):
        return len(np_histogram[0])


class FakeRun:
    def __init__(self, settings, offline, step):
        self.settings, self.offline, self.step = settings, offline, step
        self.rows, self.status = [], None

    def log(self, values, *, step, commit):
        assert commit and (not self.rows or step > self.rows[-1][0])
        self.rows.append((step, values))

    def finish(self, *, exit_code):
        self.status = exit_code


def test_wandb_continues_one_run_and_gets_no_step_twice(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("WANDB_NAME", raising=False)
    run = tmp_path / "run"
    train(run, "wandb", num_steps=8, training__histograms=True)
    kill_after(run, 6)
    train(run, "wandb", num_steps=10)
    first, second = (one.settings for one in fake.runs)
    assert first["id"] == second["id"] == (run / "wandb_id").read_text().split()[0]
    assert first["project"] == "mine" and first["name"] == "run" and first["resume"] == "allow"
    assert first["dir"] == str(run) and first["config"]["training"]["num_steps"] == 8
    steps = [[step for step, _ in one.rows] for one in fake.runs]
    assert steps == [[2, 4, 6, 8], [10]]
    assert fake.runs[0].rows[1][1]["params/level"] == loggers.BINS
    assert fake.runs[0].rows[1][1]["samples"][2] == 3
    assert [one.status for one in fake.runs] == [0, 0]


@pytest.mark.parametrize(
    "offline, had, steps", [(True, 0, [2, 4, 6, 8, 10]), (False, 4, [6, 8, 10])]
)
def test_wandb_gets_what_a_killed_process_has_lost(tmp_path, monkeypatch, offline, had, steps):
    fake, run = FakeWandb(), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with monkeypatch.context() as patch:
        patch.setattr(loggers.WandB, "close", lambda self: None)
        train(run, "wandb", num_steps=8)
    kill_after(run, 6)
    fake.offline, fake.had = offline, had
    train(run, "wandb", num_steps=10)
    assert [step for step, _ in fake.runs[1].rows] == steps
    assert list(fake.runs[1].rows[-3][1])[-1] != "samples" and "loss" in fake.runs[1].rows[0][1]


def test_wandb_hears_of_a_failed_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(loop.Trainer, "save", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", "wandb")
    assert fake.runs[0].status == 1


def test_wandb_that_cannot_start_is_one_line_and_leaves_no_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    fake.init = lambda **_: exec('raise RuntimeError("No API key configured.\\nUse wandb login")')
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ConfigError, match=r"--logger=wandb could not start: No API key") as error:
        train(tmp_path / "run", "wandb")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb's own code
def test_wandb_itself_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    train(run, "wandb", num_steps=8)
    kill_after(run, 6)
    train(run, "wandb", num_steps=10)
    files = sorted(
        run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert {file.name for file in files} == {
        f"run-{(run / 'wandb_id').read_text().split()[0]}.wandb"
    }
    assert [history_steps(file) for file in files] == [[2, 4, 6, 8], [10]]


def history_steps(path):
    """The steps of the history in a .wandb file: blocks of records with a header of crc, length and kind."""
    from wandb.proto import wandb_internal_pb2

    content, position, steps, parts = path.read_bytes(), 7, [], b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = (
            int.from_bytes(content[position + 4 : position + 6], "little"),
            content[position + 6],
        )
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
    return steps
