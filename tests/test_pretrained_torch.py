"""Networks of diffusers at the papers' sizes, where PyTorch and diffusers are installed: pip install -e '.[bench]'."""

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_oracle as oracle
import pytest

from ddpm_jax import pretrained

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HO2020 = {
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def config(widths, attended, **more):
    """Options of a UNet2DModel with attention at one level."""
    kinds = ["Attn" if level == attended else "" for level in range(len(widths))]
    return {
        **HO2020,
        "block_out_channels": widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in kinds[::-1]],
        **more,
    }


@pytest.mark.parametrize(
    ("widths", "attended", "more"),
    [
        ((128, 256, 256, 256), 1, {"sample_size": 32}),  # google/ddpm-cifar10-32
        ((16, 16, 32, 32, 64, 64), 4, {"sample_size": 256, "norm_num_groups": 16}),  # ddpm-cat-256
    ],
    ids=["cifar10", "256"],
)
def test_sizes_of_the_paper(tmp_path, widths, attended, more):
    """A pipeline that diffusers saves is read, written and loaded by diffusers, with equal outputs."""
    network = diffusers.UNet2DModel(**config(widths, attended, **more)).eval()
    with torch.no_grad():  # the initial last layers of blocks would hide what comes before them
        for name, array in network.state_dict().items():
            array.copy_(torch.tensor(oracle.weights(name, tuple(array.shape))))
    pipeline = diffusers.DDPMPipeline(unet=network, scheduler=diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "theirs")
    found = pretrained.read(str(tmp_path / "theirs"))
    side = more["sample_size"]
    x, t, _ = oracle.inputs((side, side, 3))
    x, t = (x[:1], t[:1]) if side > 32 else (x, t)
    expected = oracle.evaluate(network, x, t)
    apply = jax.jit(found.method.sized_network.apply)
    ours = np.asarray(apply({"params": found.params}, jnp.asarray(x), jnp.asarray(t)))
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()

    pretrained.write_folder(found.method, found.params, str(tmp_path / "ours"), "")
    again = diffusers.DDPMPipeline.from_pretrained(str(tmp_path / "ours"))
    assert type(again.scheduler).__name__ == "DDPMScheduler"
    theirs = network.state_dict()
    assert theirs.keys() == again.unet.state_dict().keys()
    for name, array in again.unet.state_dict().items():
        assert torch.equal(array, theirs[name]), name
    found = oracle.evaluate(again.unet.eval(), x, t)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_older_weights_are_read(tmp_path):
    """A .bin of torch.save, with the names of attention before diffusers 0.17."""
    network, _ = oracle.unet()
    network.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    weights = {}
    for name, array in network.state_dict().items():
        for old, new in pretrained.OLD_NAMES.items():
            name = name.replace(new, old)
        weights[name] = array
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    found = pretrained.read(str(tmp_path))
    x, t, _ = oracle.inputs((8, 8, 3))
    ours = found.method.sized_network.apply(
        {"params": found.params}, jnp.asarray(x), jnp.asarray(t)
    )
    expected = oracle.evaluate(network, x, t)
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
    assert found.notes


def test_fields_and_defaults_are_those_of_diffusers():
    from ddpm_jax.pretrained.diffusers import SCHEDULER, UNET

    theirs = dict(diffusers.DDPMScheduler().config) | dict(diffusers.DDIMScheduler().config)
    theirs = {name: value for name, value in theirs.items() if not name.startswith("_")}
    assert theirs == SCHEDULER
    theirs = dict(diffusers.UNet2DModel(**oracle.SMALL).config)
    theirs = {name: value for name, value in theirs.items() if not name.startswith("_")}
    assert theirs.keys() == UNET.keys()
    for name in theirs.keys() - oracle.SMALL.keys():
        assert theirs[name] == UNET[name], name
