"""Commands on input images, on a run of a one-matrix network: files, recipes, and what must not change."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from running import call

from ddpm_jax import data
from ddpm_jax.commands import sampling, shared
from ddpm_jax.configs import digits
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import neighbours, results
from ddpm_jax.files.run_data import RunError
from ddpm_jax.options import ConfigError
from ddpm_jax.process.samplers import inversion
from ddpm_jax.training import loop


def make_config(**model):
    config = digits.get_config()
    config.method = "tiny"
    config.model.update(model)
    config.schedule.update(name="linear", num_timesteps=40, end=0.3)
    config.diffusion.prediction = "eps"
    config.optimizer.warmup_steps = 0
    config.training.num_steps = 30
    config.training.batch_size = 16
    config.preview = ConfigDict({"every": 1000, "num_images": 4, "sampler": "ddim", "steps": "4"})
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run"))
    loop.train(make_config(), folder)
    return folder


@pytest.fixture(scope="module")
def with_classes(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("classes"))
    config = make_config(num_classes=-1)
    config.diffusion.label_dropout = 0.2
    loop.train(config, folder)
    return folder


def read(path):
    arrays = results.read_npz(path)
    return arrays, json.loads(str(arrays["recipe"]))


DIGITS = data.load("digits", split="test")


def chosen(values, count):
    """The `count` images that are chosen from the test split."""
    return values[data.choose(len(DIGITS), count)]


# ---- classes ---------------------------------------------------------------------------------------


def test_classes_come_from_the_data_and_labels_lie_beside_the_images(with_classes, tmp_path):
    assert config_lib.load(f"{with_classes}/config.json").model.num_classes == 10
    config = make_config(num_classes=-1)
    config.diffusion.label_dropout = 0.2
    loop.train(config, with_classes)  # −1 again: the same run, with nothing left to do
    given = {"num_samples": 12, "steps": "4", "guidance": 2.0}
    arrays, recipe = read(call("sample", with_classes, labels="3,5", **given))
    assert arrays["labels"].tolist() == [3, 5] * 6
    assert recipe["labels"] == "3,5" and recipe["guidance"] == 2.0
    arrays, _ = read(call("sample", with_classes, labels="random", seed=1, **given))
    assert len(set(arrays["labels"].tolist())) > 3
    with pytest.raises(ConfigError, match="0 … 9"):
        call("sample", with_classes, labels="10")
    config.data.name = "npz:none"
    images = tmp_path / "plain.npz"
    np.savez(images, images=DIGITS.images)
    config.data.name = f"npz:{images}"
    with pytest.raises(ConfigError, match="has no labels"):
        loop.train(config, tmp_path / "run")


# ---- there and back --------------------------------------------------------------------------------


def test_encoding_and_decoding(workdir, tmp_path, capsys):
    out = call("encode", workdir, num_images=10, steps=40, batch_size=4)
    arrays, recipe = read(out)
    assert arrays["latents"].shape == (10, 8, 8, 1) and arrays["latents"].dtype == np.float32
    np.testing.assert_array_equal(arrays["images"], chosen(DIGITS.images, 10))
    assert recipe["steps"] == "40" and recipe["images"] == "digits"
    back, of_images = read(call("sample", workdir, latents=out, batch_size=3))
    error = np.mean((back["images"].astype(float) - chosen(DIGITS.images, 10)) ** 2) / 255**2
    assert error < 0.5 * np.var(chosen(DIGITS.images, 10) / 255)  # a matrix: not exact, but theirs
    assert of_images["sampler"] == "ddim" and of_images["steps"] == "40"
    errors = call("reconstruct", workdir, num_images=10, steps="5,40")
    assert errors[40][0] < errors[5][0]
    # The same error, but for the rounding to levels.
    assert errors[40][0] == pytest.approx(error, rel=0.05)
    assert "| S | 5 | 40 |" in capsys.readouterr().out


def test_reconstruction_in_chains_of_several_parts(workdir, capsys):
    errors = call("reconstruct", workdir, num_images=10, steps="3, 9,2;40")
    assert list(errors) == ["3,9,2", 40] and "| S | 3,9,2 | 40 |" in capsys.readouterr().out
    out = call("encode", workdir, num_images=10, steps="3,9,2")
    back, images = (read(path)[0]["images"] for path in (call("sample", workdir, latents=out), out))
    error = np.mean((back.astype(float) - images) ** 2) / 255**2
    assert errors["3,9,2"][0] == pytest.approx(error, rel=0.05) and error > 1.5 * errors[40][0]
    with pytest.raises(ConfigError, match="cannot read steps='3,x'"):
        call("reconstruct", workdir, num_images=10, steps="3,x;40")


def test_latents_are_refused_where_they_do_not_fit(workdir, tmp_path):
    other = tmp_path / "other.npz"
    np.savez(other, images=DIGITS.images)
    with pytest.raises(RunError, match="--mode=encode"):
        call("sample", workdir, latents=str(other))
    with pytest.raises(RunError, match=r"^there is no file .*none\.npz$"):
        call("sample", workdir, latents=str(tmp_path / "none.npz"))
    with pytest.raises(RunError, match="cannot be opened: Is a directory"):
        call("sample", workdir, latents=str(tmp_path))
    other.write_bytes(other.read_bytes()[:-30])
    with pytest.raises(RunError, match="cannot be read"):
        call("sample", workdir, latents=str(other))
    wrong = {"latents": np.zeros((2, 4, 4, 1), np.float32), "labels": np.zeros(2), "recipe": "{}"}
    np.savez(other, **wrong)
    with pytest.raises(RunError, match=r"\(8, 8, 1\)"):
        call("sample", workdir, latents=str(other))


def test_a_trajectory_ends_in_the_images(workdir, tmp_path):
    out = call(
        "sample", workdir, num_samples=3, steps="8", trajectory=True, out=str(tmp_path / "x.npz")
    )
    with Image.open(tmp_path / "x_trajectory.png") as strip:
        assert strip.size[0] == 8 * (56 + 2) + 2
    with Image.open(tmp_path / "x_trajectory.gif") as animation:
        assert animation.n_frames == 9  # eight steps, and the images
    assert out == str(tmp_path / "x.npz")


# ---- between ---------------------------------------------------------------------------------------


def test_interpolation_begins_and_ends_at_its_images(workdir):
    arrays, _ = read(call("interpolate", workdir, num_images=4, steps=10))
    ends = read(call("sample", workdir, num_samples=4, sampler="ddim", steps=10))[0]["images"]
    row = arrays["images"][:, 0].astype(int)  # [pairs, fractions, …]
    assert row.shape == (2, 9, 8, 8, 1)
    np.testing.assert_allclose(row[:, 0], ends[0::2], atol=1)
    np.testing.assert_allclose(row[:, -1], ends[1::2], atol=1)
    steps = np.abs(np.diff(row, axis=1)).mean(axis=(2, 3, 4))
    assert (steps < np.abs(row[:, -1] - row[:, 0]).mean(axis=(1, 2, 3))[:, None]).all()


def test_interpolation_of_images_keeps_each_under_its_own_label(with_classes, tmp_path):
    given = {"steps": 10, "num_images": 4}
    arrays, _ = read(call("interpolate", with_classes, images="data", **given))
    latents = call("encode", with_classes, **given)
    ends = read(call("sample", with_classes, latents=latents))[0]["images"].astype(int)
    row = arrays["images"][:, 0].astype(int)
    np.testing.assert_allclose(row[:, 0], ends[0::2], atol=1)
    np.testing.assert_allclose(row[:, -1], ends[1::2], atol=1)
    # The middle: the latents half-way, decoded under the label of the second image.
    file = dict(results.read_npz(latents))
    x, y = file["latents"][0::2], file["latents"][1::2]
    file["latents"] = np.asarray(inversion.slerp(x, y, np.full(2, 0.5, np.float32)))
    np.savez(tmp_path / "middle.npz", **file | {"labels": file["labels"][1::2]})
    middle = read(call("sample", with_classes, latents=str(tmp_path / "middle.npz")))[0]["images"]
    np.testing.assert_allclose(row[:, 4], middle.astype(int), atol=1)


def test_latents_are_decoded_under_their_own_labels(with_classes, tmp_path):
    latents = call("encode", with_classes, num_images=4, steps=5)
    arrays, recipe = read(call("sample", with_classes, latents=latents))
    np.testing.assert_array_equal(arrays["labels"], chosen(DIGITS.labels, 4))
    assert recipe["labels"] == "of the latents"
    with pytest.raises(RunError, match="leave out --labels"):
        call("sample", with_classes, latents=latents, labels="3")
    with pytest.raises(RunError, match="begin at t = 28"):
        call("sample", with_classes, latents=latents, steps=3, spacing="linear")
    broken = dict(results.read_npz(latents), labels=np.full(4, 50))
    np.savez(tmp_path / "broken.npz", **broken)
    with pytest.raises(ConfigError, match="0 … 9"):
        call("sample", with_classes, latents=str(tmp_path / "broken.npz"))
    np.savez(tmp_path / "broken.npz", latents=broken["latents"], labels=[0] * 4, recipe="{")
    with pytest.raises(RunError, match="--mode=encode"):
        call("sample", with_classes, latents=str(tmp_path / "broken.npz"))


def test_stochastic_interpolation_mixes_less_the_earlier_it_begins(workdir):
    arrays, recipe = read(call("interpolate", workdir, num_images=2, from_t="1,30"))
    assert arrays["images"].shape == (1, 2, 9, 8, 8, 1) and recipe["from_t"] == [1, 30]
    early = arrays["images"][0, 0].astype(float)
    first, second = chosen(DIGITS.images, 2).astype(float)
    for k, share in enumerate(np.linspace(0, 1, 9)):  # almost no noise: a cross-fade of pixels
        assert np.abs(early[k] - (1 - share) * first - share * second).mean() < 12
    assert np.abs(arrays["images"][0, 1, 0].astype(float) - first).mean() > 12


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"num_images": 3}, RunError, "pairs"),
        ({"sampler": "ancestral"}, RunError, "deterministic"),
        ({"eta": 0.3}, ConfigError, "option of sampler 'ddim'"),
        ({"from_t": "half"}, RunError, "whole numbers"),
        ({"from_t": "40"}, ConfigError, "0 to 39"),
        ({"images": "nowhere"}, data.DataError, "no folder nowhere"),
        ({"num_images": 1000, "images": "data"}, RunError, "297"),
        ({"from_t": 0.5}, RunError, "whole numbers"),
        ({"images": "x.npz", "split": "train"}, RunError, "not for --images"),
    ],
)
def test_interpolation_refuses(workdir, options, error, words):
    with pytest.raises(error, match=words):
        call("interpolate", workdir, **options)


# ---- repairs ---------------------------------------------------------------------------------------


def test_denoising_changes_more_the_later_it_begins(workdir):
    arrays, _ = read(call("denoise", workdir, from_t=[1, 10, 39], num_images=6))
    assert arrays["images"].shape == (6, 3, 8, 8, 1)
    change = np.abs(arrays["images"].astype(float) - arrays["originals"][:, None].astype(float))
    assert (np.diff(change.mean(axis=(0, 2, 3, 4))) > 0).all()


@pytest.mark.parametrize("mask", ["left", "centre", "picture"])
def test_inpainting_keeps_what_is_known_to_the_bit(workdir, tmp_path, mask):
    hole = np.zeros((8, 8), np.uint8)
    hole[2:4, 5:] = 255
    if mask == "picture":
        mask = str(tmp_path / "mask.png")
        Image.fromarray(hole).save(mask)
    path = call("inpaint", workdir, mask=mask, num_images=5, steps=10, resample=2, jump=3)
    arrays, _ = read(path)
    known = arrays["mask"] == 0
    np.testing.assert_array_equal(arrays["images"][:, known], chosen(DIGITS.images, 5)[:, known])
    assert (arrays["images"][:, ~known] != chosen(DIGITS.images, 5)[:, ~known]).mean() > 0.5
    if mask.endswith(".png"):
        np.testing.assert_array_equal(arrays["mask"], hole)
    count = {"left": 32, "centre": 16}.get(mask, 6)
    assert (~known).sum() == count


@pytest.mark.parametrize("mask, words", [("rigth", "did you mean 'right'"), ("white", "all white")])
def test_masks_that_are_none(workdir, tmp_path, mask, words):
    if mask == "white":
        mask = str(tmp_path / "white.png")
        Image.fromarray(np.full((8, 8), 255, np.uint8)).save(mask)
    with pytest.raises(RunError, match=words):
        call("inpaint", workdir, mask=mask)


def test_images_of_a_folder_and_their_labels(workdir, with_classes, tmp_path):
    for n in range(3):
        Image.fromarray(DIGITS.images[n, :, :, 0]).resize((16, 16)).save(tmp_path / f"{n}.png")
    given = {"images": str(tmp_path), "num_images": 3, "steps": 5}
    arrays, recipe = read(call("encode", workdir, **given))
    assert np.abs(arrays["images"].astype(int) - DIGITS.images[:3]).mean() < 40
    assert recipe["images"] == f"image_folder:{tmp_path}"
    with pytest.raises(RunError, match="give --labels=3"):
        call("encode", with_classes, **given)
    arrays, _ = read(call("encode", with_classes, labels="7", **given))
    assert arrays["labels"].tolist() == [7, 7, 7]
    arrays, _ = read(call("encode", with_classes, num_images=3, steps=5))
    np.testing.assert_array_equal(arrays["labels"], chosen(DIGITS.labels, 3))


# ---- memory ----------------------------------------------------------------------------------------


def test_nearest_finds_what_it_is_shown(workdir, tmp_path):
    training = data.load("digits")
    shown = tmp_path / "shown.npz"
    np.savez(shown, images=training.images[[5, 700]])
    arrays, _ = read(call("nearest", workdir, images=str(shown), num_samples=2, neighbours=3))
    assert arrays["index"][:, 0].tolist() == [5, 700]
    np.testing.assert_array_equal(arrays["distance"][:, 0], 0)
    every = np.sqrt(
        np.mean(
            (training.images[[5, 700]][:, None].astype(float) - training.images) ** 2, (2, 3, 4)
        )
    )
    np.testing.assert_allclose(np.sort(every, axis=1)[:, :3], arrays["distance"], rtol=1e-5)
    with pytest.raises(RunError, match="--steps is for samples"):
        call("nearest", workdir, images=str(shown), num_samples=2, steps="4")
    drawn, _ = read(call("nearest", workdir, num_samples=2, steps="4"))
    assert drawn["neighbours"].shape == (2, 7, 8, 8, 1) and (drawn["distance"] > 1).all()


def test_blocks_do_not_matter(monkeypatch):
    training, queries = data.load("digits"), DIGITS.images[:4]
    whole = neighbours.nearest_of(queries, training, 5)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    for a, b in zip(whole, neighbours.nearest_of(queries, training, 5), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ---- every command ---------------------------------------------------------------------------------


def test_a_second_call_reads_what_the_first_one_made(workdir, tmp_path, monkeypatch):
    out = str(tmp_path / "x.npz")
    call("denoise", workdir, from_t=5, out=out)
    monkeypatch.setattr(shared, "map_images", None)
    call("denoise", workdir, from_t=5, out=out)
    with pytest.raises(RunError, match="other settings"):
        call("denoise", workdir, from_t=6, out=out)
    with pytest.raises(RunError, match=r"end in \.npz"):
        call("denoise", workdir, from_t=5, out="x.png")


def test_a_method_that_is_no_diffusion(tmp_path):
    from test_train import make_config as make_affine

    loop.train(make_affine(num_steps=3), tmp_path)
    with pytest.raises(RunError, match="not a diffusion"):
        call("encode", str(tmp_path))


def test_nearest_of_data_without_a_test_split(tmp_path):
    """The DataError must not become a ConfigError, which is not caught, after all the work."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n, pixels in enumerate(DIGITS.images[:20]):
        Image.fromarray(pixels[:, :, 0]).save(pictures / f"{n:02}.png")
    config = make_config()
    config.data.name, config.training.num_steps = f"image_folder:{pictures}", 1
    loop.train(config, tmp_path / "run")
    arrays, _ = read(call("nearest", str(tmp_path / "run"), num_samples=2, steps="2", neighbours=3))
    assert arrays["neighbours"].shape == (2, 3, 8, 8, 1) and "distance_of_test" not in arrays
    with pytest.raises(data.DataError, match="no split"):
        call("encode", str(tmp_path / "run"), num_images=2)


def test_a_tilde_is_the_home_directory(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(workdir)
    hole = np.zeros((8, 8), np.uint8)
    hole[2:4] = 255
    Image.fromarray(hole).save(tmp_path / "mask.png")
    np.savez(tmp_path / "mine.npz", images=DIGITS.images[:3])
    given = {"images": "~/mine.npz", "num_images": 2, "steps": "4"}
    assert call("encode", "~/run", out="~/x.npz", **given) == f"{tmp_path}/x.npz"
    drawn = call("sample", "~/run", latents="~/x.npz", out="~/y.npz")
    assert drawn == f"{tmp_path}/y.npz" and len(read(drawn)[0]["images"]) == 2
    filled, _ = read(
        call("inpaint", "~/run", mask="~/mask.png", out="~/z.npz", resample=1, **given)
    )
    np.testing.assert_array_equal(filled["mask"], hole)
    assert not (tmp_path / "~").exists()


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_drawn(workdir, monkeypatch):
    monkeypatch.setattr(sampling, "sample", None)
    with pytest.raises(RunError, match="there is no folder /not/there"):
        call("nearest", workdir, num_samples=2, out="/not/there/x.npz")


@pytest.mark.parametrize(
    "mode, values",
    [
        ("encode", {"steps": 5}),
        ("reconstruct", {"steps": "2,5"}),
        ("interpolate", {"images": "data", "steps": 4}),
        ("denoise", {"from_t": "10,20", "steps": 10}),
        ("inpaint", {"steps": 4, "resample": 2, "jump": 2}),
        ("progressive", {"steps": 4}),
    ],
)
def test_an_interrupted_command_computes_only_what_is_missing(
    workdir, tmp_path, monkeypatch, mode, values
):
    """Killed after each of its batches, also while a row is written, it ends with the same arrays."""
    count = {"num_samples" if mode == "progressive" else "num_images": 10}
    whole = call(mode, workdir, out=str(tmp_path / "whole.npz"), batch_size=4, **count, **values)
    out, appended = str(tmp_path / "killed.npz"), []
    append = results.GrowingFile.append

    def killed(self, rows):
        append(self, rows)
        appended.append(len(rows))
        with open(self._path, "ab") as file:
            file.write(b"half a row")
        raise KeyboardInterrupt

    monkeypatch.setattr(results.GrowingFile, "append", killed)
    for _ in range(100):
        try:
            call(mode, workdir, out=out, batch_size=4, **count, **values)
            break
        except KeyboardInterrupt:
            pass
    assert (
        len(appended) >= 3
        and sum(appended)
        == {
            "encode": 10,
            "reconstruct": 20,
            "interpolate": 10 + 5 * 9,
            "denoise": 20,
            "inpaint": 10,
            "progressive": 10,
        }[mode]
    )
    (expected, recipe), (found, again) = read(str(tmp_path / "whole.npz")), read(out)
    assert whole and recipe == again and expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
