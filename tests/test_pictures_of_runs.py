"""Samples as single PNG files, animations of chains and of previews, profiles of training steps."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from running import call
from test_train import make_config, make_diffusion

from ddpm_jax import modes
from ddpm_jax.files import animations, results, writers
from ddpm_jax.files.run_data import RunError
from ddpm_jax.options import ConfigError
from ddpm_jax.training import loop


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    loop.train(make_config(num_steps=3), path)
    return str(path)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusion")
    loop.train(make_diffusion(), path)
    return str(path)


# ---- PNG files -------------------------------------------------------------------------------------


def pngs(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".png"))


def assert_alike(out, count):
    """The folder holds exactly the images of the .npz, pixel by pixel."""
    with np.load(out) as file:
        images = file["images"]
    folder = out.removesuffix(".npz")
    assert len(images) == count and pngs(folder) == [f"{i:06d}.png" for i in range(count)]
    for i, image in enumerate(images):
        found = np.asarray(Image.open(os.path.join(folder, f"{i:06d}.png")))
        np.testing.assert_array_equal(found.reshape(image.shape), image)


def test_png_files_are_the_images_and_are_written_once(workdir, tmp_path):
    out = str(tmp_path / "x.npz")
    call("sample", workdir, num_samples=5, out=out, png=True)
    assert_alike(out, 5)
    folder = tmp_path / "x"
    assert str(folder) in writers.written  # and not each file
    assert not any(path.startswith(f"{folder}/") for path in writers.written)
    for name in pngs(folder):
        os.utime(folder / name, (1, 1))
    (folder / "000002.png").unlink()
    (folder / "000009.tmp.png").write_bytes(b"half")  # of a killed process
    call("sample", workdir, num_samples=7, out=out, png=True)
    assert_alike(out, 7)
    old = [name for name in pngs(folder) if (folder / name).stat().st_mtime == 1]
    assert old == ["000000.png", "000001.png", "000003.png", "000004.png"]


def test_png_files_of_samples_that_exist_and_none_unasked(workdir, tmp_path):
    out = str(tmp_path / "x.npz")
    call("sample", workdir, num_samples=4, out=out)
    assert not (tmp_path / "x").exists()
    call("sample", workdir, num_samples=2, out=out, png=True)
    assert_alike(out, 4)


def test_an_interrupted_drawing_continues_its_png_files(workdir, tmp_path, monkeypatch):
    out, append, count = str(tmp_path / "x.npz"), results.GrowingFile.append, []

    def stops(self, rows):
        count.append(len(rows))
        if len(count) == 3:
            raise KeyboardInterrupt
        append(self, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(results.GrowingFile, "append", stops)
        call("sample", workdir, num_samples=12, batch_size=4, out=out, png=True)
    assert len(pngs(tmp_path / "x")) == 8 and not os.path.exists(out)
    call("sample", workdir, num_samples=12, batch_size=4, out=out, png=True)
    assert_alike(out, 12)


def test_png_files_of_other_settings_are_not_mixed(workdir, tmp_path):
    out = str(tmp_path / "x.npz")
    call("sample", workdir, num_samples=3, out=out, png=True)
    os.remove(out)
    with pytest.raises(RunError, match="holds other files than the PNG files of these settings"):
        call("sample", workdir, num_samples=3, seed=5, out=out, png=True)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="another --out"):
        call("sample", workdir, num_samples=3, out=str(tmp_path / "y.npz"), png=True)
    assert (tmp_path / "y" / "mine.txt").read_text() == "keep"


def test_a_folder_that_the_program_named_is_set_aside(workdir):
    out = call("sample", workdir, num_samples=3, png=True)
    folder = out.removesuffix(".npz")
    path = os.path.join(folder, "recipe.json")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace('"weights_sha256": "', '"weights_sha256": "0'))
    call("sample", workdir, num_samples=3, png=True)
    assert_alike(out, 3)
    assert len(pngs(f"{folder}.replaced")) == 3


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_channels(tmp_path, channels, mode):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, channels), np.uint8)
    with results.png_folder(str(tmp_path / "x.npz"), {"seed": 0}, named=True) as write:
        write(7, images)
    picture = Image.open(tmp_path / "x" / "000008.png")
    assert picture.mode == mode
    np.testing.assert_array_equal(np.asarray(picture).reshape(5, 4, channels), images[1])


def test_an_error_of_a_writing_thread_is_raised(tmp_path, monkeypatch):
    def full(path, image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "_save_png", full)
    with (
        pytest.raises(OSError, match="No space"),
        results.png_folder(str(tmp_path / "x.npz"), {}, named=True) as write,
    ):
        write(0, np.zeros((3, 4, 4, 1), np.uint8))


# ---- animations ------------------------------------------------------------------------------------


def size(path):
    with Image.open(path) as picture:
        return picture.size


def frames(path):
    with Image.open(path) as picture:
        found = []
        for k in range(picture.n_frames):
            picture.seek(k)
            found.append((picture.size, picture.info["duration"]))
        return found


def video(path):
    """(width, height), frames per second, and the frames of an MP4."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    words = [program, "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(words, capture_output=True, check=True)
    found = re.search(r"h264.*yuv420p.* (\d+)x(\d+)[ ,].* ([\d.]+) fps", done.stderr.decode())
    width, height, rate = int(found[1]), int(found[2]), float(found[3])
    return (width, height), rate, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def test_a_gif_has_all_pictures_and_shows_the_last_for_a_second(tmp_path):
    pictures = [np.full((9, 7, 3), 50 * k, np.uint8) for k in range(4)]
    (path,) = animations.save(str(tmp_path / "x"), pictures, ("gif",), seconds=2.0)
    assert frames(path) == [((7, 9), 500)] * 3 + [((7, 9), 1000)]


def test_an_mp4_of_odd_size_has_the_pictures_in_their_order(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    levels = [0, 100, 200]
    pictures = [np.full((33, 47, 3), level, np.uint8) for level in levels]
    paths = animations.save(str(tmp_path / "x"), pictures, ("mp4", "gif"), seconds=1.5)
    assert [os.path.basename(path) for path in paths] == ["x.mp4", "x.gif"]
    size, fps, found = video(paths[0])
    assert size == (48, 34) and fps == pytest.approx(2.0) and len(found) == 5  # the last stays 1 s
    assert [int(frame[:30, :40].mean()) for frame in found] == pytest.approx(
        [*levels, 200, 200], abs=4
    )


def test_what_ffmpeg_says_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    module = pytest.importorskip("imageio_ffmpeg")
    pictures = [np.zeros((8, 8, 3), np.uint8)]
    real = module.get_ffmpeg_exe()
    script = tmp_path / "ffmpeg"
    script.write_text(f"#!/bin/sh\n{real} -loglevel error -i /nowhere -f null -\n")
    script.chmod(0o755)
    monkeypatch.setattr(module, "get_ffmpeg_exe", lambda: str(script))
    with pytest.raises(OSError, match=r"x.mp4 could not be written: .*No such file"):
        animations.save(str(tmp_path / "x"), pictures, ("mp4",))
    assert sorted(os.listdir(tmp_path)) == ["ffmpeg"]


@pytest.mark.parametrize("mode", ["sample", "progressive", "animate"])
def test_a_missing_ffmpeg_is_one_line_before_anything_is_computed(
    diffusion, tmp_path, monkeypatch, mode
):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    values = {"animation": "gif,mp4"} if mode == "animate" else {"animation": ("gif", "mp4")}
    with pytest.raises(
        ConfigError, match=r"--animation=mp4 needs imageio-ffmpeg .*pip install imageio-ffmpeg$"
    ) as error:
        if mode == "animate":
            modes.COMMANDS[mode](diffusion, animation=("gif", "mp4"))
        else:
            extra = {"trajectory": True} if mode == "sample" else {}
            call(mode, diffusion, out=str(tmp_path / "x.npz"), num_samples=2, **values, **extra)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_ffmpeg_is_not_imported_unasked(diffusion, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    out = str(tmp_path / "x.npz")
    call("sample", diffusion, num_samples=2, steps="3", out=out, trajectory=True)
    assert len(frames(tmp_path / "x_trajectory.gif")) == 4
    with pytest.raises(ConfigError, match="give --trajectory, too"):
        call("sample", diffusion, num_samples=2, steps="3", out=out, animation=("mp4",))


def test_progressive_pictures_move(diffusion, tmp_path):
    out = str(tmp_path / "x.npz")
    call("progressive", diffusion, num_samples=3, steps="5", out=out)
    assert not (tmp_path / "x.gif").exists()
    os.remove(out)
    call("progressive", diffusion, num_samples=3, steps="5", out=out, animation=("gif",))
    with np.load(out) as file:
        images, x_0 = file["images"], file["x_0"]
    found = frames(tmp_path / "x.gif")
    seconds = sum(duration for _, duration in found) / 1000
    assert len(found) == x_0.shape[1]  # the last x_0 is the image, and Pillow joins equal pictures
    assert seconds == pytest.approx(4.0 * x_0.shape[1] / (x_0.shape[1] + 1) + 1.0, abs=0.05)
    with Image.open(tmp_path / "x.gif") as picture:
        picture.seek(len(found) - 1)
        last = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(last - writers.grid(images, columns=1)).mean() < 3  # a palette of 256 colours


def test_previews_become_one_animation(tmp_path, capsys):
    run = tmp_path / "run"
    loop.train(make_config(num_steps=4, preview__every=2), run)
    loop.train(make_config(num_steps=6, preview__every=2, preview__num_images=2), run)
    (run / "samples" / "step_00000006_ema_seed0.png").write_bytes(b"of another command")
    assert list(animations.previews(str(run))) == [2, 4, 6]
    (path,) = modes.COMMANDS["animate"](str(run), seconds=3)
    assert path == str(run / "previews.gif") and "3 of 3 previews" in capsys.readouterr().out
    sizes = [size(file) for file in animations.previews(str(run)).values()]
    assert len(set(sizes)) == 2  # with fewer images the picture is smaller
    most = tuple(np.max(sizes, axis=0))
    assert frames(path) == [(most, 1000)] * 3


def test_previews_that_are_missing_or_damaged_are_one_line(tmp_path):
    with pytest.raises(RunError, match=r"no previews in .* yet"):
        modes.COMMANDS["animate"](str(tmp_path))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_00000002.png").write_bytes(b"half")
    with pytest.raises(RunError, match=r"step_00000002.png cannot be read"):
        modes.COMMANDS["animate"](str(tmp_path))


# ---- profiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, words",
    [
        ("5", "START:COUNT"),
        ("0:2", "START:COUNT"),
        ("2:0", "START:COUNT"),
        ("a:b", "START:COUNT"),
        ("5:3", "ends at step 7, but the run has 6 steps"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(tmp_path, steps, words):
    with pytest.raises(ConfigError, match=words):
        loop.train(make_config(num_steps=6), tmp_path / "run", profile=steps)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def traces(monkeypatch):
    """What the profiler is asked for, without the profiler."""
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))

    class Annotation:
        def __init__(self, name, step_num):
            calls.append(step_num)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("jax.profiler.StepTraceAnnotation", Annotation)
    return calls


def test_a_profile_has_the_steps_that_were_asked_for(tmp_path, traces, capsys):
    loop.train(make_config(num_steps=6), tmp_path, profile="3:2")
    assert traces == [str(tmp_path / "profile"), 3, 4, "stop"]
    assert f"profile of steps 3 to 4: {tmp_path}/profile; open it" in capsys.readouterr().out
    loop.train(make_config(num_steps=8), tmp_path, profile="3:2")  # the same command resumes
    assert len(traces) == 4
    assert (
        "no profile: step 3 is done, and the run continues after step 6" in capsys.readouterr().out
    )


def test_a_profile_ends_with_the_run(tmp_path, traces, monkeypatch):
    def fails(self, loss):
        if self.step == 4:
            raise OSError("the disk is gone")

    monkeypatch.setattr(loop.Trainer, "after_step", fails)
    with pytest.raises(OSError):
        loop.train(make_config(num_steps=9), tmp_path, profile="3:5")
    assert traces[-1] == "stop" and traces[1:-1] == [3, 4]


def test_a_profiler_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def busy(folder):
        raise RuntimeError("Profile has already been started.")

    monkeypatch.setattr("jax.profiler.start_trace", busy)
    assert int(loop.train(make_config(num_steps=4), tmp_path, profile="2:1").step) == 4
    assert "WARNING: no profile; training continues: Profile has" in capsys.readouterr().out


@pytest.mark.slow
def test_a_profile_can_be_opened(tmp_path):
    """In a process of its own: a second profile of a process may be empty."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_train\n"
        "test_train.loop.train(test_train.make_config(), sys.argv[3], profile='3:2')"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    words = [sys.executable, "-c", code, here, os.path.dirname(here), str(tmp_path)]
    subprocess.run(words, check=True, capture_output=True)
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz")
    import gzip
    import json

    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("name") == "train"]
    assert sorted({str(event["args"]["step_num"]) for event in named}) == ["3", "4"]
