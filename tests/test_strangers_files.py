"""Files of strangers are data: none of them runs code, or reads or writes outside of its folder, without --allow_code.

Each test is an attack: a run directory, an archive, weights or a picture as someone with ill intent would write it. After
each one the files beside it are as they were, and nothing was executed.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import stat
import struct
import sys
import tarfile
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ddpm_jax
from ddpm_jax import data, main, names, pretrained
from ddpm_jax.configs import digits
from ddpm_jax.data import archives
from ddpm_jax.files import checkpoints, results, runs, writers
from ddpm_jax.files import config as config_lib
from ddpm_jax.files.run_data import RunError
from ddpm_jax.networks.pytorch_files import read_state_dict
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop, mirror

HERE = Path(__file__).parent
EVIL = "open({executed!r}, 'w').close()\nmake = Net = lambda *args, **kwargs: None\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with files that no attack may change, in which `stranger.py` can be imported."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine\n")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "mine" / "private.png")
    (tmp_path / "stranger.py").write_text(EVIL.format(executed=str(tmp_path / "executed")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = contents(tmp_path / "mine")
    yield tmp_path
    assert contents(tmp_path / "mine") == before
    imported = sys.modules.pop("stranger", None)
    assert not (tmp_path / "executed").exists() and imported is None


@pytest.fixture
def run(place):
    """A run directory as it comes from the internet."""
    shutil.copytree(HERE / "run_of_format_2", place / "run")
    shutil.copy(place / "stranger.py", place / "run")
    return place / "run"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(run, **fields):
    """Sets fields of a config.json, whose digest is then right."""
    config = config_lib.load(str(run / "config.json")).unlock()
    for field, value in fields.items():
        *sections, name = field.split("__")
        section = config
        for one in sections:
            section = section[one]
        with section.ignore_type():
            section[name] = value
    config_lib.save(config, str(run / "config.json"))


def refused(capsys, *words):
    """The line with which a command line is refused."""
    with pytest.raises(SystemExit) as caught:
        main.main(list(words))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code in (1, 2) and line.startswith("error: ")
    return line


def training(run, num_steps=5):
    """A user's own config that continues the run."""
    saved = config_lib.load(str(run / "config.json"))
    config = digits.get_config()
    for section in ("model", "schedule", "diffusion", "optimizer", "step", "training", "preview"):
        config[section] = saved[section]
    config.training.num_steps = num_steps
    return config


# ---- code that a config.json names -----------------------------------------------------------------

FIELDS = (
    *("method", "model__name", "schedule__name", "data__name", "diffusion__prediction"),
    *("diffusion__loss", "diffusion__t_sampling", "preview__sampler", "training__logger"),
)


@pytest.mark.parametrize("field", FIELDS)
def test_no_command_imports_code_that_a_config_json_names(field, run, capsys):
    """A module of that name lies in the current folder and in the run directory."""
    value = "stranger" if field == "method" else "stranger:Net"
    edit(run, **{field: (value,) if field == "training__logger" else value})
    train = [f"--config={run}/config.json", "--workdir=new"]
    assert "stranger" in refused(capsys, *train)
    if field == "training__logger":
        return  # other commands do not read it
    for command in (["sample"], ["nll"], ["export", "--out=out"], ["encode"], ["nearest"]):
        line = refused(capsys, command[0], f"--workdir={run}", *command[1:])
        assert "imports code from outside ddpm_jax" in line and "--allow_code" in line
    main.main(["report", f"--workdir={run}"])  # which shows the name, and imports nothing


@pytest.mark.parametrize("kind", ["model", "plan", "optimizer"])
def test_other_sections_name_no_code_either(kind, run, capsys):
    if kind == "plan":
        edit(run, plan={"name": "stranger:Net"})
    else:
        edit(run, **{f"{kind}__act" if kind == "model" else "optimizer__name": "stranger:Net"})
    line = refused(capsys, f"--config={run}/config.json", "--workdir=new")
    assert "stranger" in line
    with contextlib.suppress(SystemExit):
        main.main(["sample", f"--workdir={run}", "--num_samples=1", "--steps=1"])


OWN = {  # code of ours that is not a part of a model: what a schedule of this name would do
    "ddpm_jax.files.writers:save_text": {"path": "mine/letter.txt", "text": "yours"},
    "ddpm_jax.data.archives:download": {"urls": ("file:///etc/passwd",), "path": "mine/letter.txt"},
    "ddpm_jax.names:import_module": {"kind": "x"},
    "ddpm_jax.names:find": {"spec": "stranger:Net", "built_in": {}, "kind": "x"},
    "ddpm_jax.ddpm:find": {"spec": "stranger:Net", "built_in": {}, "kind": "x"},
    "ddpm_jax.process.schedules:find": {"spec": "stranger:Net", "built_in": {}, "kind": "x"},
    "experiments.sweep:run": {"commands": (("x", "-c", "open('executed', 'w')"),)},
    "experiments.feature_classifier:train": {"out": "mine/letter.txt"},
    "experiments.theory.__main__:main": {"argv": ("--out=mine/letter.txt",)},
    "ddpm_jax.experiments.sweep:run": {"commands": (("x", "-c", "open('executed', 'w')"),)},
    "ddpm_jax.main:main": {"argv": ("--version",)},
    "ddpm_jax.runs.evil.stranger:Net": {},
    "ddpm_jax:stranger": {},
    "os:system": {"command": "touch executed"},
    "builtins:exec": {},
}


@pytest.mark.parametrize("name", OWN)
def test_our_own_code_is_no_tool_of_strangers(name, run, place, monkeypatch, capsys):
    """In a clone, ddpm_jax.runs.NAME.MODULE would be a file of a run directory in runs/."""
    (place / "runs").mkdir()
    (place / "runs" / "evil").symlink_to(run)
    monkeypatch.setattr(ddpm_jax, "__path__", [*ddpm_jax.__path__, str(place)])
    edit(run, schedule={"name": name, **OWN[name]})
    for words in (["sample", f"--workdir={run}"], [f"--config={run}/config.json", "--workdir=new"]):
        line = refused(capsys, *words)
        assert name in line or "stranger:Net" in line


@pytest.mark.parametrize(
    "name", ["ddpm_jax.ddpm:find", "experiments.edm:option", "experiments.edm:ConfigDict"]
)
def test_what_a_part_imports_is_not_a_name_of_it(name, place):
    with pytest.raises(ValueError, match=r"is of .*; name it there"):
        names.find(name, {}, "schedule")


def test_parts_of_this_installation_need_no_permission():
    for module in ("ddpm_jax.ddpm", "ddpm_jax.networks.unet", "experiments.edm", "experiments.vae"):
        assert runs.is_part(module), module
    for module in ("experiments.sweep", "ddpm_jax", "ddpm_jax.process..x", "experiments/edm", ""):
        assert not runs.is_part(module), module


# ---- a training that continues a stranger's run ------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"field": "model.name", "old": "unet", "new": "stranger:Net"},
        {"field": "data.name", "old": "digits", "new": "stranger:Net"},
        {"field": "training.mirror", "old": None, "new": "mine/run.zip"},
        {"field": "training.logger", "old": None, "new": ("stranger:Net",)},
        {"field": "method", "old": "ddpm_jax.ddpm", "new": "stranger"},
        {"new": "stranger:Net"},
    ],
)
def test_a_history_changes_only_what_can_change(change, run):
    writers.append_line(str(run / "history.jsonl"), {"step": 1, "time": "", **change})
    with pytest.raises(
        ConfigError, match=r"history\.jsonl, line 1 is damaged, or is not a change that --change"
    ):
        loop.train(training(run), run)


def test_an_optimizer_in_a_history_is_one_of_ours(run):
    change = {"step": 1, "field": "optimizer.name", "old": "adam", "new": "stranger:Net"}
    change["time"] = "2026-01-01 00:00:00"
    writers.append_line(str(run / "history.jsonl"), change)
    with pytest.raises(ConfigError, match=r"stranger:Net"):
        loop.train(training(run), run)


def test_what_a_plan_leaves_open_is_no_path_and_no_logger_of_a_stranger(run):
    """Open fields of a plan are taken from the run that is continued; not those that write or send."""
    edit(run, training__mirror="mine/run.zip", training__logger=("wandb",), data__data_dir="mine")
    config = training(run)
    with config.unlocked(), config.ignore_type():
        config.plan = {"name": "configs.folder:plan"}
        config.training.update(mirror=None, logger=None, batch_size=None)
        config.data.data_dir = None
    saved = config_lib.load(str(run / "config.json"))
    from ddpm_jax.files import run_data

    found = run_data.as_saved_where_open(config, saved)
    assert found.training.batch_size == saved.training.batch_size
    assert found.training.mirror is found.training.logger is found.data.data_dir is None


# ---- links, pipes and devices in a run directory -----------------------------------------------------

LINKS = (
    *("log.txt", "metrics.jsonl", "history.jsonl", "data.json", ".lock", "config.tmp.json"),
    *("loss.tmp.png", "samples", "eval", "tensorboard", "checkpoints/5", "checkpoints/5.tmp"),
    *("samples/step_00000004.png", "eval/a.json", "report.tmp.html", "checkpoints/4/state/d/x"),
)


@pytest.mark.parametrize("name", LINKS)
def test_no_link_leads_out_of_a_run(name, run, place, capsys):
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    folder = name in ("samples", "eval", "tensorboard") or name.startswith("checkpoints/5")
    path.symlink_to(
        "../mine"
        if folder and "/" not in name
        else place / "mine" / ("" if folder else "letter.txt")
    )
    words = [f"--workdir={run}"]
    for command in (["sample", *words], ["report", *words], ["animate", *words], ["nll", *words]):
        line = refused(capsys, *command)
        assert f"{path} leads out of the run directory, to {place}/mine" in line
    with pytest.raises(RunError, match="leads out of the run directory"):
        loop.train(training(run), run)


def test_links_of_a_user_are_followed(run, place, capsys):
    """Of the whole run directory, and within it; what Weights & Biases links is not read."""
    (place / "short").symlink_to(run)
    (run / "latest").symlink_to("checkpoints/4")
    (run / "wandb").mkdir()
    (run / "wandb" / "debug.log").symlink_to(place / "mine" / "letter.txt")
    main.main(["report", f"--workdir={place}/short"])
    assert runs.load(str(place / "short")).step == 4
    mirror.save(str(place / "x.zip"), str(run), None, print)
    with zipfile.ZipFile(place / "x.zip") as archive:
        assert "wandb/debug.log" not in archive.namelist()


@pytest.mark.parametrize("name", ["metrics.jsonl", "data.json", "samples/a.png", "eval/a.json"])
def test_a_pipe_is_refused_and_not_waited_for(name, run, capsys):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for command in ("report", "sample"):
        assert "is neither a file nor a folder" in refused(capsys, command, f"--workdir={run}")


def test_what_a_training_deletes_meanwhile_is_not_looked_at(run, monkeypatch):
    """A folder and a file that are gone when their turn comes, and a folder of another user."""
    scandir, folder = os.scandir, run / "checkpoints" / "5.tmp"

    class Gone:
        """An entry of a directory, on a file system that does not say what it is."""

        name, path = "history.tmp.jsonl", str(run / "history.tmp.jsonl")
        is_symlink = is_dir = is_file = lambda *_, **__: False

        def __fspath__(self):
            return self.path

    @contextlib.contextmanager
    def listed(path):
        if str(path) == str(folder) and folder.exists():
            folder.rmdir()
        with scandir(path) as found:
            yield [*found, Gone()]

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", listed)
        folder.mkdir()
        runs.refuse_links(str(run))
        assert not folder.exists()

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        with pytest.raises(RunError, match=f"^{run} cannot be read: Permission denied$"):
            runs.refuse_links(str(run))


def test_a_temporary_file_that_is_a_link_is_not_written_through(place):
    """Also outside of runs, such as beside an --out."""
    (place / "x.tmp.npz").symlink_to(place / "mine" / "letter.txt")
    writers.save_npz(str(place / "x.npz"), {"x": np.arange(3)})
    assert not (place / "x.npz").is_symlink() and not (place / "x.tmp.npz").exists()
    (place / "y.txt").symlink_to(place / "mine" / "letter.txt")
    writers.save_text(str(place / "y.txt"), "yours")  # replaces the link


# ---- results -----------------------------------------------------------------------------------------


class Command:
    """An object whose unpickling runs a command."""

    def __reduce__(self):
        return os.system, ("touch executed",)


SAMPLES = "samples/step_00000004_raw_seed0.npz"
DEEP = "[" * 100_000
RECIPES = {
    "not JSON": "__import__('os').system('touch executed')",
    "a list": "[1]",
    "nested": DEEP,
    "code": json.dumps({"mode": "sample", "sampler": "stranger:Net", "workdir": "../mine"}),
    "markup": json.dumps(
        {"mode": "<script>alert(1)</script>", "seed": "<script>alert(1)</script>"}
    ),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_are_compared_and_shown_and_never_run(recipe, run, capsys):
    """Samples with another recipe are set aside, and drawn anew."""
    Image.new("L", (8, 8)).save(run / SAMPLES.replace("npz", "png"))
    writers.save_npz(str(run / SAMPLES), {"images": np.zeros((2, 8, 8, 1), np.uint8)})
    with np.load(run / SAMPLES) as arrays:
        np.savez(run / SAMPLES, **arrays, recipe=recipe)
    main.main(["report", f"--workdir={run}"])
    page = (run / "report.html").read_text()
    assert "<script>alert" not in page
    main.main(["sample", f"--workdir={run}", "--weights=raw", "--num_samples=2"])
    assert (run / f"{SAMPLES}.replaced").exists()
    assert len(results.read_npz(str(run / SAMPLES))["images"]) == 2


@pytest.mark.parametrize("name", ["images", "recipe"])
def test_arrays_of_objects_are_not_unpickled(name, run, capsys):
    arrays = {"images": np.zeros((2, 8, 8, 1), np.uint8), "recipe": "{}"}
    np.savez(run / SAMPLES, **arrays | {name: np.array([Command()], dtype=object)})
    Image.new("L", (8, 8)).save(run / SAMPLES.replace("npz", "png"))
    line = refused(capsys, "sample", f"--workdir={run}", "--weights=raw", "--num_samples=2")
    assert f"{SAMPLES} cannot be read as an .npz" in line
    main.main(["report", f"--workdir={run}"])
    with pytest.raises(data.DataError, match=r"cannot be read as .npz: .*pickle"):
        np.savez(run / "data.npz", images=np.array([Command()], dtype=object))
        data.load(f"npz:{run}/data.npz")


def test_a_pickle_named_npz_is_not_unpickled(run, capsys):
    for content in (pickle.dumps(Command()), b"\x93NUMPY" + pickle.dumps(Command())):
        (run / SAMPLES).write_bytes(content)
        (run / "x.npz").write_bytes(content)
        line = refused(capsys, "sample", f"--workdir={run}", "--weights=raw", "--num_samples=2")
        assert "cannot be read as an .npz" in line
        with pytest.raises(data.DataError):
            data.load(f"npz:{run}/x.npz")
        with pytest.raises(data.DataError):
            pretrained.read(str(run / "x.npz"), digits.get_config())


def bomb(path, name="images.npy", size=1 << 44):
    """An .npz of a kilobyte whose array takes 16 TiB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (size // 64, 8, 8, 1)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, header.getvalue())
    content = bytearray(Path(path).read_bytes())
    at = content.index(b"PK\x01\x02")  # the size in the central directory, as ZIP64
    extra = struct.pack("<HHQ", 1, 8, size)
    name_end = at + 46 + len(name)
    content[at + 24 : at + 28] = b"\xff" * 4
    content[at + 30 : at + 32] = struct.pack("<H", len(extra))
    content[name_end:name_end] = extra
    end = content.index(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", end - at)
    Path(path).write_bytes(content)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(run, capsys):
    bomb(run / "x.npz")
    with zipfile.ZipFile(run / "x.npz") as archive:
        assert archive.infolist()[0].file_size == 1 << 44
    with pytest.raises(data.DataError, match="its arrays take 17592 GB, more than this machine's"):
        data.load(f"npz:{run}/x.npz")
    with pytest.raises(data.DataError, match="more than this machine's memory"):
        pretrained.read(str(run / "x.npz"), digits.get_config())
    shutil.move(run / "x.npz", run / SAMPLES)
    refused(capsys, "sample", f"--workdir={run}", "--weights=raw", "--num_samples=2")


@pytest.mark.parametrize(
    "content", [DEEP, "[]", "3", '{"class_names": 3}', '{"class_names": [[1]]}']
)
def test_other_json_of_a_run_is_one_line(content, run, capsys):
    (run / "data.json").write_text(content)
    assert "data.json cannot be read" in refused(capsys, "nll", f"--workdir={run}")
    with pytest.raises(RunError, match=r"data\.json cannot be read"):
        loop.train(training(run), run)


def test_names_and_words_in_a_report_are_text(run):
    """Markup in the config, the log, class names, results, and file names."""
    script = "<script>alert(1)</script>"
    edit(run, data__name=f"image_folder:{script}", init_from=script)
    (run / "log.txt").write_text(f"WARNING: {script}\n")
    tree = json.loads((run / "data.json").read_text()) | {"class_names": [script] * 10}
    (run / "data.json").write_text(json.dumps(tree))
    result = {"mode": script, "rmse": script, "metrics": {script: script}, "recipe": {script: 1}}
    (run / "eval" / f"{script.replace('/', '_')}.json").write_text(json.dumps(result))
    Image.new("L", (8, 8)).save(run / "samples" / "<script>alert(1)<_script>.png")
    main.main(["report", f"--workdir={run}"])
    page = (run / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page


# ---- checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{"loss": "x"}, {"loss": [1]}, [1], "x", {"loss": float("nan")}, {"loss": None}]
)
def test_values_of_a_checkpoint_that_are_no_numbers_do_not_count(values, run):
    path = run / "checkpoints" / "4" / "meta.json"
    meta = json.loads(path.read_text()) | {"values": values}
    del meta["sha256"]
    path.write_text(json.dumps(meta | {"sha256": checkpoints._sha256_json(meta)}))
    assert checkpoints.best_of(run / "checkpoints", "loss") is None
    assert runs.load(str(run)).step == 4


def test_files_beside_a_checkpoint_that_its_digests_do_not_name(run):
    """Names with .. in meta.json are not those of files of the checkpoint."""
    path = run / "checkpoints" / "4" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["sha256"]
    meta["files"]["../../../mine/letter.txt"] = "0" * 64
    path.write_text(json.dumps(meta | {"sha256": checkpoints._sha256_json(meta)}))
    with pytest.raises(checkpoints.CheckpointError, match=r"letter\.txt has changed"):
        runs.load(str(run))


# ---- the mirror --------------------------------------------------------------------------------------


def mirrored(run, place, change=lambda archive: None, **more):
    """The .zip of a run, with members of a stranger."""
    file = place / "run.zip"
    mirror.save(str(file), str(run), None, print)
    with zipfile.ZipFile(file, "a", **more) as archive:
        change(archive)
    return file


def member(name, mode=0o644, system=3):
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system = mode << 16, system
    return info


@pytest.mark.parametrize(
    "info, content",
    [
        (member("../mine/letter.txt"), "yours"),
        (member("samples/../../mine/letter.txt"), "yours"),
        (member("..\\mine\\letter.txt"), "yours"),
        (member("PLACE/mine/letter.txt"), "yours"),
        (member("//PLACE/mine/letter.txt"), "yours"),
        (member("samples/link", stat.S_IFLNK | 0o777), "../../mine"),
        (member("log.txt", stat.S_IFLNK | 0o777), "PLACE/mine/letter.txt"),
        (member("device", stat.S_IFBLK | 0o777), ""),
        (member("pipe", stat.S_IFIFO | 0o777), ""),
        (member("setuid", stat.S_ISUID | 0o777), "#!/bin/sh"),
        (member("history.jsonl"), '{"field": "model.name", "old": "unet", "new": "stranger:Net"}'),
        (member("checkpoints/../../../mine/9/x"), "yours"),
        (member("checkpoints/nine/meta.json"), "{}"),
    ],
)
def test_a_mirror_is_unpacked_inside_its_folder(info, content, run, place):
    info.filename = info.filename.replace("PLACE", str(place))
    content = content.replace("PLACE", str(place))
    file = mirrored(run, place, lambda archive: archive.writestr(info, content))
    target = place / "deep" / "er" / "again"
    mirror.restore(str(file), str(target))
    found = [
        path
        for path in target.rglob("*")
        if path.is_symlink() or not (path.is_file() or path.is_dir())
    ]
    assert not found and checkpoints.latest_step(target / "checkpoints") == 4
    assert not [path for path in target.rglob("*") if path.stat().st_mode & stat.S_ISUID]
    outside = {path.name for path in (place / "deep").rglob("*") if not path.is_relative_to(target)}
    assert outside == {"er", "again"} - (
        {"again"} if (place / "deep" / "er" / "again") == target else set()
    )


def test_a_mirror_that_would_fill_the_disk_is_refused(run, place):
    def deflated(archive):
        archive.writestr(member("big"), bytes(50_000_000), compress_type=zipfile.ZIP_DEFLATED)

    def overlapping(archive):
        archive.writestr("big", bytes(1_000_000))
        (info,) = (one for one in archive.infolist() if one.filename == "big")
        archive.filelist += [info] * 99

    for change in (deflated, overlapping):
        file = mirrored(run, place, change)
        with pytest.raises(checkpoints.CheckpointError, match="its files are larger than it is"):
            mirror.restore(str(file), str(place / "new"))
        assert not (place / "new").exists()
        file.unlink()


@pytest.mark.parametrize("kind", ["encrypted", "unknown compression", "no checkpoint"])
def test_a_mirror_that_cannot_be_unpacked_is_one_line(kind, run, place):
    if kind == "no checkpoint":
        shutil.rmtree(run / "checkpoints" / "4" / "state")
        (run / "checkpoints" / "4" / "meta.json").write_text(DEEP)
    file = mirrored(run, place)
    content = bytearray(file.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.index(mark) + flags + (0 if kind == "encrypted" else 2)
        if kind != "no checkpoint":
            content[at] |= 1 if kind == "encrypted" else 99
    file.write_bytes(content)
    with pytest.raises(
        checkpoints.CheckpointError, match="is not a mirrored run or is damaged"
    ) as e:
        mirror.restore(str(file), str(place / "new"))
    assert "\n" not in str(e.value)


def test_code_in_a_mirror_is_not_imported(run, place):
    """Its config.json names a network of its own; the training that unpacks it has its own config."""
    edit(run, model__name="stranger:Net")
    file = mirrored(run, place)
    config = training(HERE / "run_of_format_2")
    with config.ignore_type(), config.unlocked():
        config.training.mirror = str(file)
    with pytest.raises(ConfigError, match=r"belongs to another run: .*stranger:Net"):
        loop.train(config, place / "new")


# ---- weights -----------------------------------------------------------------------------------------


def torch_zip(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", content)
    return buffer.getvalue()


def legacy(content):
    head = (0x1950A86A20F9469CFC6C, 1001, {})
    return b"".join(pickle.dumps(one, 2) for one in head) + content


GADGETS = {
    "reduce": pickle.dumps(Command(), 2),
    "eval": b'cbuiltins\neval\n(S\'open("executed", "w")\'\ntR.',
    "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR.",
    "a tensor of code": b"ctorch._utils\n_rebuild_tensor_v2\n(cos\nsystem\nK\x00))tR.",
    "numpy": pickle.dumps(np.array([Command()], dtype=object), 2),
    "stack": b"\x80\x02" + b"(" * 1000 + b".",
    "memory": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60),
    "a storage outside": b"(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\n"
    b"ctorch\nFloatStorage\nS'../../../../mine/letter.txt'\nS'cpu'\nK\x01tQK\x00(K\x01t(K\x01ttRs.",
}


@pytest.mark.parametrize("wrap", [torch_zip, legacy])
@pytest.mark.parametrize("gadget", GADGETS)
def test_a_state_dict_runs_nothing(gadget, wrap, place):
    path = place / "weights.pt"
    path.write_bytes(wrap(GADGETS[gadget]))
    with pytest.raises(data.DataError, match="cannot be read as a PyTorch state dict") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def pipeline(place):
    shutil.copytree(HERE / "pretrained" / "pipeline", place / "pipeline")
    return place / "pipeline"


@pytest.mark.parametrize(
    "name, change",
    [
        ("model_index.json", {"_class_name": "stranger"}),
        ("model_index.json", {"unet": ["stranger", "Net"], "_class_name": "StrangerPipeline"}),
        ("unet/config.json", {"_class_name": "stranger:Net"}),
        ("unet/config.json", {"act_fn": "stranger:Net"}),
        ("unet/config.json", {"block_out_channels": "__import__('stranger')"}),
        ("unet/config.json", {"down_block_types": ["stranger:Net"] * 2}),
        ("scheduler/scheduler_config.json", {"_class_name": "stranger:Net"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "stranger:Net"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "stranger:Net"}),
        ("scheduler/scheduler_config.json", {"variance_type": "stranger:Net"}),
        ("scheduler/scheduler_config.json", {"trained_betas": "stranger:Net"}),
    ],
)
def test_a_folder_of_diffusers_names_no_code(name, change, pipeline):
    path = pipeline / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ConfigError, RunError)) as caught:
        pretrained.read(str(pipeline))
    assert "\n" not in str(caught.value)


def test_json_and_arrays_of_a_folder_of_diffusers(pipeline):
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        before = (pipeline / name).read_text()
        for content in (DEEP, "3", '"x"'):
            (pipeline / name).write_text(content)
            with pytest.raises(RunError, match="cannot be read"):
                pretrained.read(str(pipeline))
        (pipeline / name).write_text(before)
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    for header in (
        b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
        b"{" * 99,
    ):
        weights.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(data.DataError, match="cannot be read as safetensors"):
            pretrained.read(str(pipeline))
    weights.write_bytes(struct.pack("<Q", 1 << 62))
    with pytest.raises(data.DataError, match="cannot be read as safetensors"):
        pretrained.read(str(pipeline))


def test_a_config_of_the_current_folder_is_not_that_of_the_weights(pipeline, place):
    """Weights are read with the settings of configs/cifar10.py, which is looked up in the installation alone."""
    (place / "configs").mkdir()
    for name in ("cifar10", "cifar10.py", "configs/cifar10.py"):
        shutil.copy(place / "stranger.py", place / name)
    assert pretrained.read(str(pipeline)).config.training.batch_size == 128


@pytest.mark.parametrize(
    "name",
    ["../mine/x", "a/../..", "../..", "a/b/../../mine", "~/x", "a\n/b", "-x/--y", "file:///x"],
)
def test_names_of_the_hub_do_not_lead_elsewhere(name, place, monkeypatch):
    """The library is asked for no other files than those of a pipeline, whatever the hub lists."""
    asked = []

    class HfApi:
        def list_repo_files(self, name):
            asked.append(name)
            return ["../../mine/letter.txt", "unet/../../../mine/letter.txt", "/etc/passwd"]

    def snapshot_download(name, allow_patterns, **more):
        asked.extend(allow_patterns)
        raise ValueError("no such model")

    hub = types.SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(RunError):
        pretrained.read(name)
    patterns = [one for one in asked if one != name]
    assert not any(".." in one or "*" in one or one.startswith("/") for one in patterns)
    with pytest.raises(RunError):
        pretrained.read("some/model")
    assert {one for one in asked if "/" in one and ".." in one} <= {name}


# ---- data --------------------------------------------------------------------------------------------


def tar_of(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = content.decode()
            tar.addfile(info, io.BytesIO(content if kind == tarfile.REGTYPE else b""))


@pytest.mark.parametrize(
    "name, kind, content",
    [
        ("../mine/data_batch_9", tarfile.REGTYPE, bytes(3073)),
        ("/PLACE/mine/data_batch_9", tarfile.REGTYPE, bytes(3073)),
        ("x/data_batch_9", tarfile.SYMTYPE, b"PLACE/mine/letter.txt"),
        ("x/data_batch_9", tarfile.LNKTYPE, b"../../mine/letter.txt"),
        ("x/data_batch_9", tarfile.CHRTYPE, b""),
        ("x/data_batch_9", tarfile.FIFOTYPE, b""),
        ("x/data_batch_9", tarfile.DIRTYPE, b""),
    ],
)
def test_an_archive_of_data_is_read_and_never_unpacked(name, kind, content, place, monkeypatch):
    """Even if its sum, which is checked, were right."""
    path = place / "cifar-10-binary.tar.gz"
    image = bytes([7]) + bytes(3072)
    name, content = (
        name.replace("PLACE", str(place)),
        content.replace(b"PLACE", str(place).encode()),
    )
    tar_of(path, ("x/data_batch_1.bin", tarfile.REGTYPE, image), (name, kind, content))
    with pytest.raises(data.DataError, match="is not cifar10's archive or is damaged"):
        data.load("cifar10", data_dir=str(place))
    monkeypatch.setattr(archives, "damage", lambda *args: None)
    found = data.load("cifar10", data_dir=str(place))
    assert 7 in found.labels and len(found) == 1 + (kind == tarfile.REGTYPE)
    assert sorted(os.listdir(place)) == [path.name, "mine", "stranger.py"]


def png(width, height, *chunks):
    """A PNG of this size in its header, whose pixels are not there."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunk(*c) for c in chunks)


PICTURES = {
    "bomb": png(60_000, 60_000, (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")),
    "text bomb": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), (b"IEND", b"")),
    "pickle": pickle.dumps(Command()),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(executed) (w) file\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_pixels_or_one_line(kind, place):
    (place / "pictures").mkdir()
    (place / "pictures" / "a.png").write_bytes(PICTURES[kind])
    with pytest.raises(data.DataError, match=r"a\.png cannot be decoded") as caught:
        data.load(f"image_folder:{place}/pictures")
    assert "\n" not in str(caught.value)


def test_folders_of_pictures_with_pipes_and_endless_links(place):
    folder = place / "pictures"
    for number in range(30):  # 2^30 paths to one folder
        (folder / f"{number:02d}").mkdir(parents=True)
    for number in range(29):
        for name in ("a", "b"):
            (folder / f"{number:02d}" / name).symlink_to(f"../{number + 1:02d}")
    (folder / "29" / "up").symlink_to("../00")
    Image.new("RGB", (8, 8)).save(folder / "29" / "x.png")
    assert len(data.load(f"image_folder:{folder}", flatten=True)) == 1
    os.mkfifo(folder / "29" / "pipe.png")
    with pytest.raises(data.DataError, match=r"pipe\.png is not a file; remove it"):
        data.load(f"image_folder:{folder}", flatten=True)
