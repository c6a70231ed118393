"""Reports: well-formed HTML without scripts, the run's own numbers, and a command for each missing result."""

import html.parser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import logging
from running import call
from test_edit import make_config

from ddpm_jax.commands.report import arrange, blocks, charts, render, results, words
from ddpm_jax.commands.report import report as write_report
from ddpm_jax.commands.report.find import find
from ddpm_jax.configs import digits
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.process import terminal
from ddpm_jax.training import loop

pytestmark = pytest.mark.slow

STYLE = os.path.join(os.path.dirname(charts.__file__), "style.css")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VOID = {"br", "img", "meta", "wbr"}


def report(workdir, **options):
    return write_report(workdir, allow_code=True, **options)


class Reader(html.parser.HTMLParser):
    """Elements, rows of tables, commands and text of a page; it fails if tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows = [], [], [], []
        self.text, self.style = "", ""
        self.commands = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "code":
            self.commands.append("")

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
        else:
            self.text += data
        if self.rows and {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data
        if "code" in self.open:
            self.commands[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.attributes if name == tag]

    def row(self, name):
        return next(cells for first, *cells in self.rows if first.strip() == name)


def read(path):
    with open(path, encoding="utf-8") as file:
        return Reader(file.read())


def value(text):
    return float(text.replace(",", "").replace("–", "nan"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run without its checkpoints, and one with what the other commands write."""
    bare, full = (str(tmp_path_factory.mktemp(name)) for name in ("bare", "full"))
    config = make_config()
    config.training.log_every = 5
    loop.train(config, full)
    shutil.copytree(full, bare, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints"))
    call("sample", full, num_samples=4, sampler="ddim", steps="4", trajectory=True)
    call("progressive", full, num_samples=2, steps="4")
    call("reconstruct", full, num_images=4, steps="4,8")
    call("nearest", full, num_samples=2, neighbours=2, steps="4")
    call("rate_distortion", full, num_images=4)
    return bare, full


def test_a_page_holds_the_run_and_needs_no_network(trained, capsys):
    reader = read(report(trained[0]))
    assert capsys.readouterr().out.startswith(f"{trained[0]}/report.html")
    last = writers.read_metrics(f"{trained[0]}/metrics.jsonl")[-1]
    for name in last.keys() - {"step"}:
        title = f"loss by quarter of t, quarter {name[-1]}" if "loss_t" in name else name
        *places, low, high = map(value, reader.row(arrange.TITLES.get(name, title)))
        assert places[-1] == pytest.approx(last[name], rel=6e-4)
        assert low <= min(places) and max(places) <= high
    assert f"step{last['step']}" in reader.text.replace(",", "")
    for _, attributes in reader.attributes:
        for name in ("src", "href", "srcset", "data", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:image/"))
        assert not any(name.startswith("on") for name in attributes)
    assert "script" not in reader.tags and "link" not in reader.tags
    assert "url(" not in reader.style and "@import" not in reader.style
    ids = [attributes["id"] for _, attributes in reader.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} == {link["href"] for link in reader.all("a")}


def test_it_can_be_read_aloud(trained):
    reader = read(report(trained[1]))
    assert all(len(image["alt"]) > 15 for image in reader.all("img"))
    assert all(len(picture["aria-label"]) > 20 for picture in reader.all("svg"))
    assert all(cell["scope"] in ("row", "col") for cell in reader.all("th"))
    assert reader.tags.count("caption") == reader.tags.count("table")
    levels = [int(tag[1]) for tag in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1 and (np.diff(levels) <= 1).all()
    assert reader.all("html")[0]["lang"] == "en" and reader.all("meta")[0] == {"charset": "utf-8"}


def luminance(colour):
    """The relative luminance of #rrggbb or #rgb as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    rgb = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme):
    with open(STYLE, encoding="utf-8") as file:
        colours = dict(re.findall(r"--(\w+): (#\w+)", file.read().split(":root {")[theme + 1]))
    curves = {f"c{n}": 3 for n in range(charts.COLOURS)}
    for ink, least in {"ink": 7, "quiet": 4.5, "accent": 4.5, **curves}.items():
        for ground in ("ground", "paper"):
            low, high = sorted(luminance(colours[name]) for name in (ink, ground))
            assert (high + 0.05) / (low + 0.05) >= least, (ink, ground)


def test_only_missing_results_come_with_their_commands(trained):
    bare, full = (read(report(path)).text for path in trained)
    modes = {*arrange.MODES, "nll", "rate_distortion", "best_steps", "sample", "eval"} - {
        "trajectory"
    }
    for mode in modes:
        assert f"python -m ddpm_jax.main --mode={mode} --workdir={trained[0]}" in bare
    there = {"nll", "rate_distortion", "progressive", "nearest", "sample", "reconstruct"}
    for mode in modes:
        assert (f"--mode={mode} --workdir=" in full) == (mode not in there)


def test_results_are_those_of_their_files(trained):
    reader = read(report(trained[1]))
    result = call("nll", trained[1], num_images=4)
    total = reader.row("mean")[0]
    mean, spread = (float(part) for part in total.split(" ± "))
    values = result.scalars["total"]
    assert mean == pytest.approx(values.mean(), abs=spread / 10)
    assert spread == pytest.approx(values.std(ddof=1) / 2, rel=0.05)
    errors = call("reconstruct", trained[1], num_images=4, steps="4,8")
    for cell, (mean, _) in zip(reader.row("error"), errors.values(), strict=True):
        assert float(cell.split(" ± ")[0]) == pytest.approx(mean, rel=0.05)
    kinds = [image["src"].split(";")[0] for image in reader.all("img")]
    assert kinds.count("data:image/gif") == 1
    # Two of training, the data, samples of two commands, the chain, x_0, reconstructions, neighbours.
    assert kinds.count("data:image/png") == len(list_of_pictures(trained[1]))


def list_of_pictures(workdir):
    names = [*os.listdir(f"{workdir}/samples"), "data_preview.png", "forward.png"]
    return [name for name in names if name.endswith(".png")]


def test_the_schedule_is_that_of_the_method(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path, dirs_exist_ok=True)
    config = config_lib.load(f"{tmp_path}/config.json")
    config.method = "ddpm_jax.ddpm"
    config.schedule.update(name="experiments.log_linear:log_linear", start=9.2, end=-10.1)
    config.model.num_groups = 2
    config_lib.save(config, f"{tmp_path}/config.json")
    assert f"α² at the end {1 / (1 + np.exp(10.1)):.3g}" in read(report(str(tmp_path))).text
    config.method = "experiments.of_another_checkout"
    config_lib.save(config, f"{tmp_path}/config.json")
    text = read(report(str(tmp_path))).text
    assert "α² at the end" not in text and "--mode=inpaint" not in text
    assert "Rate and distortion" in text and "Encoded and decoded" in text  # there all the same


def test_text_of_files_stays_text(trained, tmp_path):
    folder = tmp_path / "a <u> & 'run'"
    shutil.copytree(trained[0], folder)
    config = config_lib.load(f"{folder}/config.json")
    config.data.name = "<script>alert(1)</script>"
    config_lib.save(config, f"{folder}/config.json")
    with open(folder / "log.txt", "a", encoding="utf-8") as file:
        file.write("2026-01-01 00:00:00  WARNING: <img src=x onerror=y>\n")
    (folder / "eval").mkdir()
    (folder / "eval/x.json").write_text('{"<i>": 1.0, "<i>_stderr": 0.1, "recipe": {}}')
    shutil.copy(folder / "data_preview.png", folder / 'samples/"><u>.png')
    reader = read(report(str(folder)))
    assert not {"script", "i", "u"} & set(reader.tags)
    assert all("src" in image and image["src"] != "x" for image in reader.all("img"))
    for text in ("<script>alert(1)</script>", "<img src=x onerror=y>", "<i>", '"><u>.png'):
        assert text in reader.text
    assert all(f"--workdir={folder}" in shlex.split(line) for line in reader.commands)
    assert len(reader.commands) > 5


def test_a_comparison_lists_the_fields_that_differ_and_no_others(trained, tmp_path, monkeypatch):
    workdirs = [str(tmp_path / name) for name in "abc"]
    for n, path in enumerate(workdirs):
        shutil.copytree(trained[0], path)
        config = config_lib.load(f"{path}/config.json")
        config.seed = 5 * (n == 2)
        config.optimizer.learning_rate = 0.001 * (1 + n)
        if n == 1:
            config.model.extra = "<em>"
        config_lib.save(config, f"{path}/config.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = report("~/a, ~/b," + workdirs[2])
    assert out == f"{tmp_path}/here/comparison.html"
    assert not any((tmp_path / name / "comparison.html").exists() for name in "abc")
    reader = read(out)
    fields = {row[0]: row[1:] for row in reader.rows if row[0].startswith("config.")}
    assert fields == {
        "config.seed": ["0", "0", "5"],
        "config.optimizer.learning_rate": ["0.001", "0.002", "0.003"],
        "config.model.extra": ["–", "<em>", "–"],
    }
    assert reader.row("field") == ["a", "b", "c"]
    labels = [svg["aria-label"] for svg in reader.all("svg")]
    assert any(label.startswith("loss over step: a, b, c;") for label in labels)
    assert len(reader.all("img")) == 3


def test_a_comparison_of_two_schedules(trained, tmp_path, monkeypatch):
    """Chains and bounds are compared; equal curves are drawn once."""
    for name in ("linear", "cosine"):
        shutil.copytree(trained[1], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    workdirs = f"{tmp_path}/linear,{tmp_path}/cosine"
    alike = read(report(workdirs))
    assert alike.text.count("α² at the end") == 1 and "linear: T = 40" not in alike.text
    config = config_lib.load(f"{tmp_path}/cosine/config.json")
    config.schedule.update(name="cosine", start=None, end=None)
    config_lib.save(config, f"{tmp_path}/cosine/config.json")
    (bound,) = (tmp_path / "cosine/eval").glob("*_nll_test_seed0.json")
    result = writers.read_json(bound) | {"total": 1.25, "total_stderr": None}
    writers.save_result(str(bound), result)
    reader = read(report(workdirs))
    for name in ("linear", "cosine"):
        run = find(str(tmp_path / name), allow_code=True)
        health = terminal.health(run.chain)
        assert f"{name}: T = 40; α² at the end {health.alpha_T**2:.3g}" in reader.text
    assert reader.row("cosine")[0] == "1.250" != reader.row("linear")[0]
    labels = [svg["aria-label"] for svg in reader.all("svg")]
    for title in ("β", "ᾱ", "SNR", "L_t"):
        (label,) = (label for label in labels if label.startswith(title))
        assert ": linear, cosine;" in label


def test_metrics_of_several_runs_stand_beside_one_another(trained, tmp_path):
    manifest = {
        "num_generated": 300,
        "generated": {"sampler": "ddim", "eta": 0.0, "weights": "ema"},
    }
    for name, scale in (("a", 1.0), ("b", 2.0)):
        folder = tmp_path / name
        shutil.copytree(trained[0], folder)
        (folder / "eval").mkdir()
        for steps in ("10", "5"):
            made = manifest | {"generated": manifest["generated"] | {"steps": steps}}
            entry = {"values": [1.0], "seeds": [0], "mean": scale * int(steps), "std": None}
            metrics = {"fid_300": entry | {"manifest": made}}
            (folder / f"eval/{steps}.json").write_text(json.dumps({"metrics": metrics}))
    made = manifest | {"generated": {"images": "npz:mine.npz"}}  # better, but not of this run
    entry = {"values": [1.0], "seeds": [None], "mean": 1.0, "std": None, "manifest": made}
    (tmp_path / "b/eval/other.json").write_text(json.dumps({"metrics": {"fid_300": entry}}))
    reader = read(report(str(tmp_path / "b")))
    assert "fid_300, the best10" in "".join(reader.text.split("\n"))
    assert ["fid_300 npz:mine.npz, 300 images", "1"] in reader.rows
    assert ["", "5 steps", "10 steps"] in reader.rows and reader.row("fid_300") == ["10", "20"]
    reader = read(report(f"{tmp_path}/a,{tmp_path}/b", out=str(tmp_path / "c.html")))
    rows = [row for row in reader.rows if row[0].startswith("fid_300")]
    assert rows[:2] == [["fid_300 10 steps", "10", "20"], ["fid_300 5 steps", "5", "10"]]
    assert rows[2] == ["fid_300 npz:mine.npz, 300 images", "1"]


@pytest.mark.parametrize(
    "keep, words",
    [
        ((), "no config.json"),
        (("config.json",), "nothing in metrics.jsonl"),
        (None, "is listed twice"),
    ],
)
def test_a_directory_that_is_not_a_run_gives_one_line(trained, tmp_path, keep, words):
    workdir = str(tmp_path)
    for name in keep or ():
        shutil.copy(f"{trained[0]}/{name}", tmp_path)
    if keep is None:
        workdir = f"{trained[0]},{trained[0]}/"
    with pytest.raises(RunError, match=words) as error:
        report(workdir)
    assert "\n" not in str(error.value)


def test_no_device_is_requested(trained, tmp_path):
    command = [
        sys.executable,
        "-m",
        "ddpm_jax.main",
        "--mode=report",
        f"--workdir={trained[0]}",
        "--allow_code",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}  # a request for a device fails
    environment["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))
    given = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False}
    out = str(tmp_path / "page.html")
    result = subprocess.run([*command, f"--out={out}"], **given)
    assert result.returncode == 0 and not result.stderr, result.stderr
    pages = [read(path).text for path in (out, report(trained[0]))]
    assert pages[0].split("Written")[0] == pages[1].split("Written")[0]


def test_another_file_is_not_overwritten(trained, tmp_path):
    other = tmp_path / "page.html"
    other.write_text("mine")
    with pytest.raises(RunError, match="not a report"):
        report(trained[0], out=str(other))
    with pytest.raises(RunError, match=r"end in \.html"):
        report(trained[0], out=str(tmp_path / "page.png"))
    fresh = str(tmp_path / "fresh.html")
    assert report(trained[0], out=fresh) == report(trained[0], out=fresh) == fresh


def test_settings_without_words_of_their_own_are_shown(trained, tmp_path):
    """An option of a new sampler, a mode of another program and a result of one, without an entry here."""
    shutil.copytree(trained[1], tmp_path, dirs_exist_ok=True)
    name = next(name for name in os.listdir(tmp_path / "samples") if "_reconstruct_" in name)
    root = tmp_path / "samples" / name.rpartition(".")[0]
    for sampler, churn in (("my_idea:Euler", 0.25), ("my_idea:Heun", 0.5)):
        recipe = {"mode": "sample", "sampler": sampler, "churn": churn, "steps": "5", "seed": 3}
        path = tmp_path / f"samples/{churn}"
        np.savez(f"{path}.npz", recipe=json.dumps(recipe | {"weights_sha256": "12", "extra": {}}))
        shutil.copy(f"{root}.png", f"{path}.png")
    np.savez(tmp_path / "samples/x.npz", recipe=json.dumps({"mode": "outpaint", "width": 12}))
    shutil.copy(f"{root}.png", tmp_path / "samples/x.png")
    result = {"recipe": {"beams": 4}, "psnr": 31.5, "psnr_stderr": 0.25, "num_images": 7}
    (tmp_path / "eval/mine.json").write_text(json.dumps(result))
    reader = read(report(str(tmp_path)))
    for sampler, churn in (("my_idea:Euler", 0.25), ("my_idea:Heun", 0.5)):
        assert f"{sampler}, 5 steps, seed 3, churn {churn}" in reader.text
    assert "x.png, width 12" in reader.text and "mine.json: beams" not in reader.text
    assert ["beams 4, 7 images", "31.50 ± 0.25"] in [[r[0].strip(), *r[1:]] for r in reader.rows]


def test_half_written_files_are_left_out(trained, tmp_path, caplog):
    shutil.copytree(trained[1], tmp_path, dirs_exist_ok=True)
    pictures = len(read(report(str(tmp_path))).all("img"))
    (path,) = (tmp_path / "samples").glob("*_reconstruct_*.npz")
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "samples/half.tmp.png").write_bytes(b"\x89PNG")
    (tmp_path / "eval/half.json").write_text('{"total": 1.0, "cur')
    (tmp_path / "eval/list.json").write_text("[1]")
    (tmp_path / "eval/step_00000030_ema_nll_test_seed9.json").write_text("{}")
    odd = {
        "recipe": "r",
        "num_images": "n",
        "x": 1.0,
        "x_stderr": "s",
        "metrics": {"fid": {"manifest": {}}},
    }
    (tmp_path / "eval/odd.json").write_text(json.dumps(odd))
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 99, "lo')
    reader = read(report(str(tmp_path)))
    assert {"half.json", "list.json", "step_00000030_ema_nll_test_seed9.json"} == {
        line.split("eval/")[1].split(" ")[0] for line in caplog.messages if "left out" in line
    }
    assert path.name.replace(".npz", ".png") in reader.text  # without a recipe, by its name
    assert "--mode=reconstruct" in reader.text and len(reader.all("img")) == pictures
    os.remove(tmp_path / "log.txt")
    assert "No log.txt" in read(report(str(tmp_path))).text


def test_only_data_urls_make_a_page_large(trained):
    for workdir in trained:
        path = report(workdir)
        inline = sum(len(image["src"]) for image in read(path).all("img"))
        assert os.path.getsize(path) - inline < 400_000


# ---- charts ----------------------------------------------------------------------------------------


def points(svg, which=-1):
    """The points of a curve, [N, 2], in pixels."""
    paths = [
        a["d"] for _, a in Reader(f"<svg>{svg}</svg>").attributes if "var(--c" in a.get("style", "")
    ]
    return np.array(re.findall(r"[\d.]+", paths[which]), float).reshape(-1, 2)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_curve_lies_where_its_numbers_are(scale):
    x, y = np.arange(1, 6), np.array([1.0, 10.0, 100.0, 10.0, 1.0])
    svg = charts.chart("c", [charts.Curve("a", x, y)], x_label="x", y_scale=scale)["svg"]
    drawn = points(svg)
    np.testing.assert_allclose(np.diff(drawn[:, 0]), np.diff(drawn[:, 0])[0], atol=0.02)
    height = drawn[0, 1] - drawn[:, 1]  # y grows downwards
    expected = (np.log10(y) if scale == "log" else y - 1) / (2 if scale == "log" else 99)
    np.testing.assert_allclose(height / height[2], expected, atol=1e-3)
    marks = re.findall(r'text-anchor: end; [^>]*y="([\d.]+)"[^>]*>([\d.,]+)</text>', svg)
    marks = {float(label): float(at) for at, label in marks}
    offset = marks[100] - drawn[2, 1]  # of the baseline of a label
    assert len(marks) >= 3 and 0 < offset < 6
    if scale == "log":
        assert marks[10] - offset == pytest.approx(drawn[1, 1], abs=0.1)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_bars_reach_from_a_standard_deviation_below_to_one_above(scale):
    y, spread = np.array([4.0, 10.0, 2.0, 100.0]), np.array([2.0, 0.0, 3.0, np.nan])
    curves = [
        charts.Curve("ends", np.arange(4), np.array([2.0, 6.0, 5.0, 100.0])),
        charts.Curve("a", np.arange(4), y, spread=spread),
    ]
    svg = charts.chart("c", curves, x_label="x", y_scale=scale)["svg"]
    ends, curve = points(svg, 0), points(svg, -3)
    first, second = points(svg, -2), points(svg, -1)  # none for 0 and NaN
    assert len(points(svg, -4)) == len(ends) == len(curve) == 4
    np.testing.assert_allclose(sorted(first[:, 1]), [ends[1, 1], ends[0, 1]], atol=0.02)
    assert second[:, 1].min() == pytest.approx(ends[2, 1], abs=0.02)
    lowest = curve[2, 1]
    if scale == "log":  # 2 − 3 is not on the axis
        assert second[:, 1].max() == pytest.approx(lowest, abs=0.02)
    else:
        one = (ends[0, 1] - ends[2, 1]) / 3  # 2 and 5
        assert second[:, 1].max() == pytest.approx(lowest + 3 * one, abs=0.05)
    np.testing.assert_allclose([first[:, 0], second[:, 0]], [[curve[0, 0]] * 2, [curve[2, 0]] * 2])


def test_long_curves_stay_small_and_no_numbers_of_labels_are_cut():
    x = np.arange(100_000)
    curve = charts.Curve("a", x, 1e-4 * (np.sin(x / 1e4) + x % 2), window=4000)
    svg = charts.chart("c", [curve], x_label="x")["svg"]
    assert len(svg) < 60_000 and len(points(svg)) < 2000
    turns = [(np.diff(np.sign(np.diff(points(svg, k)[:, 1]))) != 0).sum() for k in (-2, -1)]
    assert turns[0] > 500 and turns[1] < 20  # as logged, and the moving average
    assert ">0.0001<" in svg
    labels = charts.chart("c", [charts.Curve("a", x, 1 + 1e-5 * x)], x_label="x")
    assert "80,000" in labels["svg"]
    assert " ".join(labels["rows"][0]) == "c 1 1.250 1.500 1.750 2.000 1 2.000"


def test_colours_are_those_of_the_style_sheet():
    curves = [charts.Curve(str(n), [1, 2], [n, n + 1]) for n in range(8)]
    chart = charts.chart("c", curves)
    assert "#" not in chart["svg"] and " id=" not in chart["svg"] and "font" not in chart["svg"]
    assert [n for _, n, _ in chart["legend"]] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert [dashed for _, _, dashed in chart["legend"]] == [False] * 6 + [True] * 2
    assert chart["svg"].count("stroke-dasharray") == 2


@pytest.mark.parametrize(
    "y", [[np.nan, 1.0, np.inf], [3.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-30, 1e30], [], [-1.0, 5.0]]
)
def test_odd_numbers_are_drawn_or_left_out(y):
    for scale in ("linear", "log", None):
        chart = charts.chart("c", [charts.Curve("a", range(len(y)), y)], x_label="x", y_scale=scale)
        good = np.isfinite(y) & ((np.array(y) > 0) | (scale != "log"))
        assert (chart is None) == (not good.any())
        if chart:
            assert "nan" not in chart["svg"] and "inf" not in chart["svg"]
            assert points(chart["svg"]).size


# ---- words and blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, text",
    [(4000, "4,000"), (0.0405046, "0.04050"), (1.79e-10, "1.79e-10"), (None, "–"), (0.0, "0")],
)
def test_numbers_in_words(number, text):
    assert words.number(number) == text


def test_settings_in_words():
    recipe = {"beta": [1, 2], "eta": "hat", "sampler": "ddim", "guidance": 1.0, "clip_x0": False}
    recipe |= {
        "x_sha256": "3f",
        "x_0_error": {"a": 1},
        "workdir": "/tmp",
        "step": 20_000,
        "order": None,
    }
    assert list(words.settings(recipe).values()) == [
        *("ddim", "all steps", "σ̂", "step 20,000", "beta 1, 2", "x̂_0 not clipped"),
    ]
    times = words.settings({"steps": "[0,111,222,333]"})
    assert times == {"steps": "4 (0, 111, 222 …) steps"}


def test_a_pivot_keeps_every_value():
    cells = [("fid", {"k": "1", "run": r}, v) for r, v in (("a", "3"), ("b", "4"), ("b", "5"))]
    cells.append(("is", {"k": "1", "run": "c"}, "6"))
    table = blocks.pivot("T", cells, "run", ["a", "b", "c"])
    assert table["caption"] == "T: 1"
    assert table["rows"] == [(("fid", ""), "3", "4; 5", "–"), (("is", ""), "–", "–", "6")]


def test_every_text_of_a_block_is_escaped(tmp_path):
    hostile = "<script>'\"&"
    chart = charts.chart(hostile, [charts.Curve(f"{hostile}{n}", [1], [1]) for n in range(2)])
    (tmp_path / "x.png").write_bytes(b"0")
    every = [
        blocks.text(hostile, hostile, hostile),
        blocks.block("fold", [blocks.table(hostile, (hostile,), [(hostile, hostile)])], hostile),
        blocks.block("cards", [blocks.figure(str(tmp_path / "x.png"), hostile, hostile)], hostile),
        blocks.block("fields", {hostile: hostile}, hostile),
        *blocks.chart_block([chart], hostile, hostile),
        {"kind": "pre", "text": hostile},
    ]
    names = ("title", "lead", "written", "command")
    page = dict.fromkeys(names, hostile) | {
        "facts": {hostile: hostile},
        "sections": {hostile: every},
    }
    reader = Reader(render(page))
    assert "script" not in reader.tags and reader.text.count("<script>") > 15


def test_the_rows_of_table_4():
    assert results.tenths(1000) == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]
    assert results.tenths(4) == [4, 3, 2, 1]
    assert results.rmse(np.array([4.0])) == 255.0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 99_999,
        '{"curves": 3}',
        '{"curves": {"timesteps": [0, 1], "terms": [1.0]}}',
        '{"curves": {"timesteps": ["x"]}}',
        '{"rmse": [1, 2], "rate": [1]}',
    ],
)
def test_a_damaged_result_is_left_out_and_named(content, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    config_lib.save(digits.get_config("smoke"), str(tmp_path / "config.json"))
    writers.append_line(str(tmp_path / "metrics.jsonl"), {"step": 1, "loss": 1.0})
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "good.json").write_text('{"curves": {"timesteps": [0], "terms": [null]}}')
    (tmp_path / "eval" / "bad.json").write_text(content)
    assert list(find(str(tmp_path)).results) == ["good"]
    assert len(lines) == 1 and "bad.json is damaged" in lines[0]
