"""The assembled Method with a small U-Net: its loss, its randomness, its samples, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ddpm_jax import ddpm, options
from ddpm_jax.augmentation import mirror_at_random
from ddpm_jax.configs import cifar10
from ddpm_jax.files.run_data import fill_in
from ddpm_jax.method import from_config, labels_of
from ddpm_jax.networks import cost
from ddpm_jax.options import ConfigError
from ddpm_jax.process import diffusion
from ddpm_jax.process.samplers import SAMPLERS
from ddpm_jax.process.time_sampling import TIME_SAMPLERS, LossHistory
from ddpm_jax.training import parallel, step


def make_config(**changes):
    config = cifar10.get_config()
    config.data.image_shape = (6, 4, 2)
    config.model.channels = 8
    config.model.num_groups = 2
    config.model.channel_mults = (1,)  # levels and attention are tested with the network
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = ()
    config.schedule.num_timesteps = 20
    config.schedule.end = 0.5
    for field, value in changes.items():
        section, name = field.split("__")
        with config.ignore_type():
            config[section][name] = value
    return config


def make_batch(n=8):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (n, 6, 4, 2), np.uint8),
        "label": np.arange(n, dtype=np.int32) % 3,
        "index": np.arange(n, dtype=np.int32),
        "position": np.arange(n) / np.float32(n),
    }


def far_from_zero(params):
    """Random parameters instead of initial ones, whose near-zero layers would hide errors."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


KEY = jax.random.key(5)


def sampling(**values):
    """Sampling from flat options, as a config or a command line has them."""
    return options.build(ddpm.Sampling, values, "")


def sampler_of(method, **values):
    """(params, key, index, label, **given) -> images, with these options."""
    return functools.partial(method.sample, sampling=sampling(**values))


def bound_of(method, x_0_error=None, **values):
    """(params, key, batch) -> the bound, with these options."""
    chosen = options.build(ddpm.Bounding, values, "")
    return functools.partial(method.bound, options=chosen, x_0_error=x_0_error)


def says(method, params, label, x, t, **options):
    """The network's estimates for x_t with these parameters."""

    def call(params, label, x, t):
        return method.denoiser(params, label, **options)(method.schedule)(x, t)

    return jax.jit(call)(params, label, x, t)


def test_own_betas_have_the_length_of_their_list():
    betas = (0.1, 0.5, 0.9)
    config = cifar10.get_config()  # whose num_timesteps is 1000
    config.schedule.name, config.schedule.betas = "betas", betas
    fill_in(config)  # as every command does
    np.testing.assert_array_equal(from_config(config).schedule.beta, betas)
    config.schedule.betas = ()
    with pytest.raises(ConfigError, match=r"config.schedule: .*needs the list"):
        from_config(config)


@pytest.mark.slow
def test_channels_of_a_head_in_a_config():
    changes = {"model__attention_resolutions": (4,), "model__channels": 16}
    one, four = (make_config(**changes, model__head_channels=size) for size in (0, 4))
    params = from_config(one).init(KEY)
    params = far_from_zero(params)
    x = jax.random.normal(KEY, (2, 6, 4, 2))
    say = [
        says(from_config(config), params, jnp.zeros(2, jnp.int32), x, jnp.array([3, 4]))
        for config in (one, four, make_config(**changes, model__num_heads=4))
    ]
    np.testing.assert_array_equal(say[1].eps, say[2].eps)  # four heads of four channels
    assert np.abs(say[0].eps - say[1].eps).max() > 1e-3


def test_an_untrained_network_predicts_nothing():
    """Near-zero output: L_simple starts at E[ε²] = 1, whatever the images are."""
    method = from_config(make_config())
    loss, metrics, _ = jax.jit(method.loss_fn)(method.init(KEY), (), KEY, make_batch(128))
    assert loss.shape == (128,) and abs(loss.mean() - 1) < 4 * np.sqrt(2 / (128 * 48))
    weights = np.stack([metrics[f"loss_t{q}"][1] for q in (1, 2, 3, 4)])
    assert (weights.sum(axis=0) == 1).all()  # every example is in exactly one quarter of t
    assert (weights.sum(axis=1) > 10).all()


@pytest.mark.slow
def test_losses_and_masks_do_not_depend_on_the_batch():
    method = from_config(make_config(model__dropout=0.5))
    params, batch = far_from_zero(method.init(KEY)), make_batch(8)
    loss = jax.jit(lambda *args: method.loss_fn(*args)[0])
    whole = loss(params, (), KEY, batch)
    halves = [loss(params, (), KEY, jax.tree.map(lambda x, s=s: x[s::2], batch)) for s in (0, 1)]
    np.testing.assert_allclose(np.stack(halves, axis=1).ravel(), whole, rtol=2e-5)
    assert np.unique(whole).size == 8


def test_flips_mirror_half_of_the_images():
    images = np.arange(200 * 6 * 4, dtype=np.float32).reshape(200, 6, 4, 1)
    out = np.asarray(mirror_at_random(jax.random.split(KEY, 200), images))
    mirrored = (out == images[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (out == images).all(axis=(1, 2, 3))
    assert (mirrored ^ kept).all() and 70 < mirrored.sum() < 130


def test_flips_are_a_choice_of_the_config():
    # Images that are bright on one side: their mirrored copies give another loss.
    images = np.zeros((16, 6, 4, 2), np.uint8)
    images[:, :, :2] = 255
    losses = []
    for flip in (True, False):
        method = from_config(make_config(data__flip=flip, model__dropout=0.0))
        params = far_from_zero(method.init(KEY))
        batch = {**make_batch(16), "image": images}
        losses.append(jax.jit(method.loss_fn)(params, (), KEY, batch)[0])
    same = np.isclose(*losses, rtol=1e-4)
    assert 2 <= same.sum() <= 14  # those that were not mirrored


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_updates_are_the_same_on_one_device_and_four(devices):
    method = from_config(make_config())
    tx, _ = step.make_optimizer(num_steps=10, warmup_steps=0, learning_rate=1e-3)
    state = step.init_state(method, tx, KEY)
    state = state.replace(params=far_from_zero(state.params))
    if devices == 1:
        run, to_device = jax.jit(step.make_update(method, tx, KEY)), lambda batch: batch
    else:
        update = step.make_update(method, tx, KEY, axis_name=parallel.AXIS)
        state, to_device = parallel.place(state), parallel.shard
        run = parallel.compile_step(update, state, to_device(make_batch()))
    for _ in range(2):
        state, loss = run(state, to_device(make_batch()))
    RESULTS[devices] = jax.device_get((loss, state.params["conv_in"], state.ema_params["conv_out"]))
    if len(RESULTS) == 2:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=2e-5), RESULTS[1], RESULTS[4]
        )


RESULTS = {}


@pytest.mark.slow
def test_a_tiny_batch_is_overfitted():
    config = make_config(model__dropout=0.0, data__flip=False)
    method = from_config(config)
    tx, _ = step.make_optimizer(num_steps=200, warmup_steps=10, learning_rate=5e-3)
    run = jax.jit(step.make_update(method, tx, KEY, ema_decay=0.9))
    state = step.init_state(method, tx, KEY)
    batch = jax.tree.map(lambda x: x[[0, 1] * 16], make_batch(2)) | {"index": np.arange(32)}
    losses = []
    for _ in range(200):
        state, loss = run(state, batch)
        losses.append(float(loss))
    assert np.mean(losses[-50:]) < 0.35 * np.mean(losses[:5])
    # Two images were shown: ancestral samples lie close to one or the other, pure noise does not.
    keys = (jax.random.key(3), np.arange(8), np.zeros(8, np.int32))
    x = jax.jit(method.sample)(state.ema_params, *keys)
    seen = np.asarray(batch["image"][:2] / 127.5 - 1)
    distance = np.sqrt(np.mean((np.asarray(x)[:, None] - seen[None]) ** 2, axis=(2, 3, 4)))
    apart = np.sqrt(np.mean((seen[0] - seen[1]) ** 2))
    assert np.median(distance.min(axis=1)) < 0.5 * apart


ALL_SAMPLERS = [
    {"sampler": "ancestral"},
    {"sampler": "ddim", "eta": 0.5},
    {"sampler": "ddim", "eta": "hat", "clip_x0": "dynamic"},
    {"sampler": "dpm_solver", "order": 3, "spacing": "log_snr"},
    {"sampler": "dpm_solver", "singlestep": True},
    {"sampler": "heun", "spacing": "quadratic"},
    {"sampler": "ddim", "guidance": 3.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ALL_SAMPLERS, ids=str)
def test_64_images_are_the_same_however_they_are_drawn(chosen):
    # As v: dividing by √ᾱ and by its own guidance would make rounding of this random network visible.
    changes = {"diffusion__label_dropout": 0.1, "diffusion__prediction": "v"}
    method = from_config(make_config(model__num_classes=3, **changes))
    params = far_from_zero(method.init(KEY))
    sample = sampler_of(method, steps="5", **chosen)
    draw = jax.jit(sample)
    index, label = np.arange(64), np.arange(64) % 3
    whole = draw(params, KEY, index, label)
    parts = [draw(params, KEY, index[i::4], label[i::4]) for i in range(4)]
    np.testing.assert_allclose(np.stack(parts, 1).reshape(whole.shape), whole, atol=1e-5)
    on_four = parallel.map_examples(sample)(parallel.place(params), KEY, index, label)
    np.testing.assert_allclose(on_four, whole, atol=1e-5)
    other = draw(params, KEY, index, (label + 1) % 3)
    assert np.abs(other - whole).max(axis=(1, 2, 3)).min() > 1e-4  # the label is heard


# ---- guidance --------------------------------------------------------------------------------------


def make_guided(**changes):
    changes = {"model__num_classes": 3, "diffusion__label_dropout": 0.25, **changes}
    method = from_config(make_config(**changes))
    return method, far_from_zero(method.init(KEY))


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_guidance_mixes_what_the_network_says_with_and_without_the_label(prediction):
    method, params = make_guided(diffusion__prediction=prediction)
    x, t = jax.random.normal(KEY, (5, 6, 4, 2)), np.array([0, 3, 9, 15, 19])
    label = np.array([0, 1, 2, 1, 0])

    alone, without, strong = (
        says(method, params, label, x, t, guidance=guidance) for guidance in (1.0, 0.0, 2.5)
    )
    unlabelled = says(method, params, np.full(5, 3), x, t)
    np.testing.assert_allclose(without.prediction, unlabelled.prediction, atol=1e-5)
    expected = without.prediction + 2.5 * (alone.prediction - without.prediction)
    np.testing.assert_allclose(strong.prediction, expected, atol=1e-5)
    # ε̂ and x̂_0 are affine in each other: guidance of the one is guidance of the other.
    expected = without.eps + 2.5 * (alone.eps - without.eps)
    np.testing.assert_allclose(strong.eps, expected, atol=1e-4)
    assert np.abs(alone.eps - without.eps).max() > 0.01


@pytest.mark.slow
def test_guidance_one_and_zero_are_the_two_models_to_the_bit_and_cost_one_pass():
    method, params = make_guided()
    index, label = np.arange(4), np.array([0, 1, 2, 0])
    flops, images = {}, {}
    for guidance in (None, 1.0, 0.0, 2.0):
        chosen = {} if guidance is None else {"guidance": guidance}
        sample = sampler_of(method, steps="3", sampler="ddim", **chosen)
        flops[guidance] = cost.count(jax.make_jaxpr(sample)(params, KEY, index, label).jaxpr)
        images[guidance] = np.asarray(jax.jit(sample)(params, KEY, index, label))
    np.testing.assert_array_equal(images[1.0], images[None])
    assert flops[0.0] == flops[1.0] == flops[None] and flops[2.0] == 2 * flops[None]
    plain = jax.jit(sampler_of(method, steps="3", sampler="ddim"))
    np.testing.assert_array_equal(images[0.0], plain(params, KEY, index, np.full(4, 3)))
    assert np.abs(images[2.0] - images[1.0]).max() > 1e-3


@pytest.mark.slow
def test_a_guided_learned_variance_is_that_of_the_label():
    changes = {"diffusion__variance": "learned_range", "diffusion__loss": "hybrid"}
    method, params = make_guided(**changes)
    x, t, label = jax.random.normal(KEY, (3, 6, 4, 2)), np.array([0, 9, 19]), np.arange(3)
    alone, strong = (
        says(method, params, label, x, t, guidance=g, variance="learned_range") for g in (1.0, 3.0)
    )
    np.testing.assert_allclose(strong.log_variance, alone.log_variance, atol=1e-5)
    assert np.abs(strong.eps - alone.eps).max() > 0.01


def test_label_dropout_hides_its_share_of_labels():
    n = 2000
    changes = {"model__num_classes": 2, "diffusion__label_dropout": 0.25}
    method = tiny.make(make_config(**changes))
    params = method.init(KEY)
    assert params["Embed_0"]["embedding"].shape == (3, 2)

    def total(params, batch):  # a class that is heard gets a gradient, in proportion to its images
        return method.loss_fn(params, (), KEY, batch)[0].sum()

    batch = jax.tree.map(lambda x: x[np.arange(n) % 8], make_batch()) | {
        "label": np.zeros(n, np.int32),
        "index": np.arange(n, dtype=np.int32),
    }
    params["Embed_0"]["embedding"] = 1e4 * jnp.array([[1.0, 1], [0, 0], [-1, -1]])
    gradient = jax.jit(jax.grad(total))(params, batch)["Embed_0"]["embedding"]  # 2·(±1e4)/2 a image
    heard = np.abs(gradient[:, 0]) / 1e4 / n
    assert heard[1] == 0 and abs(heard[2] - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)
    np.testing.assert_allclose(heard[0] + heard[2], 1, atol=1e-3)


def test_a_model_without_dropout_has_the_classes_of_the_data():
    method = tiny.make(make_config(model__num_classes=3))
    assert method.init(KEY)["Embed_0"]["embedding"].shape == (3, 2) and method.num_classes == 3


@pytest.mark.parametrize(
    "labels, expected",
    [
        ("cycle", [0, 1, 2, 0, 1]),
        ("2", [2, 2, 2, 2, 2]),
        ("2,0", [2, 0, 2, 0, 2]),
        ([1, 2], [1, 2, 1, 2, 1]),
        (1, [1, 1, 1, 1, 1]),
    ],
)
def test_labels(labels, expected):
    method, _ = make_guided()
    got = labels_of(method, np.arange(5), labels)
    assert got.tolist() == expected and got.dtype == np.int32


def test_random_labels_depend_on_key_and_index_alone():
    method, _ = make_guided()
    index = np.arange(300)
    labels = labels_of(method, index, "random", key=KEY)
    part = labels_of(method, index[7:9], "random", key=KEY)
    np.testing.assert_array_equal(part, labels[7:9])
    assert (np.bincount(labels) > 60).all() and set(labels) == {0, 1, 2}
    assert (labels_of(method, index, "random", key=jax.random.key(6)) != labels).any()


@pytest.mark.parametrize("labels, words", [("3", "0 … 2"), ("a", "cannot read"), ("-1", "0 … 2")])
def test_labels_that_there_are_not(labels, words):
    with pytest.raises(ValueError, match=words):
        labels_of(make_guided()[0], np.arange(3), labels)


def test_labels_of_a_model_without_classes():
    method = tiny.make(make_config())
    assert labels_of(method, np.arange(3)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="has none"):
        labels_of(method, np.arange(3), "1")


@pytest.mark.parametrize(
    "chosen, words",
    [
        (
            {"sampler": "ddim", "variance": "fixed_small"},
            "variance is an option of sampler 'ancestral', and 'ddim' has none",
        ),
        ({"eta": 0.5}, "eta is an option of sampler 'ddim'"),
        ({"sampler": "heun", "order": 2}, "order is an option of sampler 'dpm_solver'"),
        ({"sampler": "ddim", "singlestep": True}, "singlestep is an option of"),
        ({"sampler": "dpm_solve"}, "did you mean 'dpm_solver'"),
        ({"sampler": "ddim", "eta": 1.01}, "0 … 1"),
        ({"spacing": "log_snr"}, "such as steps=50"),
        ({"spacing": "quadratic", "steps": "quad10"}, "such as steps=50"),
        ({"spacing": "quadratc", "steps": "10"}, "must be uniform or linear or quadratic"),
        ({"guidance": 2.0}, "label_dropout above 0"),
        ({"guidance": float("nan")}, "finite"),
        ({"variance": "analytic", "from_t": 5}, "whole chains"),
        ({"clip_x0": "soft"}, "true or false or dynamic"),
        ({"from_t": 20}, "0 to 19"),
    ],
)
def test_options_of_sampling_that_make_no_sense_are_refused(chosen, words):
    from_t = chosen.get("from_t")
    chosen = {name: value for name, value in chosen.items() if name != "from_t"}
    with pytest.raises(ValueError, match=words) as error:
        tiny.make(make_config()).chain(sampling(**chosen), from_t=from_t)
    assert "\n" not in str(error.value)


def test_a_recipe_names_what_the_sampler_has_and_no_more():
    def recipe(**values):
        return options.describe(tiny.make(make_config()).resolve(sampling(**values)))

    assert recipe()["variance"] == "fixed_large" and "eta" not in recipe()
    ddim = recipe(sampler="ddim", steps=5)
    assert (ddim["eta"], ddim["steps"]) == (0.0, "5") and not {"variance", "order"} & ddim.keys()
    assert recipe(sampler="dpm_solver")["order"] == 2
    assert sampling(**recipe()) == tiny.make(make_config()).resolve(sampling())


def test_a_chain_can_begin_at_a_given_image():
    # At the first time there is hardly any noise, at the last hardly any image.
    method, params, batch = make_tiny(schedule__end=0.9)
    x_0 = batch["image"] / np.float32(127.5) - 1
    index, label = np.arange(8), np.zeros(8, np.int32)
    eps = jax.random.normal(KEY, x_0.shape)
    for t in (0, 19):
        x_t = diffusion.q_sample(method.schedule, x_0, t, eps)
        draw = sampler_of(method, sampler="ddim")
        x = draw(params, KEY, index, label, from_t=t, x_T=x_t)
        correlation = np.corrcoef(np.ravel(x), np.ravel(x_0))[0, 1]
        assert correlation > 0.99 if t == 0 else abs(correlation) < 0.3


@pytest.mark.slow
def test_bfloat16_computes_close_to_float32():
    losses = []
    for dtype in ("float32", "bfloat16"):
        method = from_config(make_config(model__dtype=dtype))
        params = far_from_zero(method.init(KEY))
        loss, gradient = jax.jit(jax.value_and_grad(lambda *a, m=method: m.loss_fn(*a)[0].mean()))(
            params, (), KEY, make_batch()
        )
        assert loss.dtype == jnp.float32
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


# ---- the bound, with the network of tiny.py --------------------------------------------------------


def make_tiny(**changes):
    """A method of one matrix, its parameters away from zero, and eight images."""
    method = tiny.make(make_config(**changes))
    return method, far_from_zero(method.init(KEY)), make_batch()


def test_the_bound_is_the_sum_of_its_parts():
    method, params, batch = make_tiny()
    parts = jax.jit(bound_of(method, steps=5))(params, KEY, batch)
    shapes = {name: value.shape for name, value in parts.items()}
    scalars = dict.fromkeys(("total", "L_T", "L_0"), (8,))
    assert shapes == scalars | dict.fromkeys(("terms", "x_0_error", "eps_error"), (8, 5))
    chain = method.bound_chain(ddpm.Bounding(steps=5))
    assert chain.times.tolist() == [0, 5, 10, 14, 19]
    np.testing.assert_allclose(parts["total"], parts["L_T"] + parts["terms"].sum(axis=1), rtol=1e-6)
    assert (parts["L_0"] == parts["terms"][:, 0]).all()


def test_the_bound_of_an_image_depends_on_its_index_and_label_alone():
    method = from_config(make_config(model__num_classes=3))
    params, batch = far_from_zero(method.init(KEY)), make_batch()
    bound = jax.jit(bound_of(method, steps=3))
    whole = bound(params, KEY, batch)
    part = bound(params, KEY, jax.tree.map(lambda x: x[2:5], batch))
    for name in whole:
        np.testing.assert_allclose(part[name], whole[name][2:5], rtol=1e-5, atol=1e-6)
    for change in ({"label": (batch["label"] + 1) % 3}, {"index": batch["index"] + 1}):
        other = bound(params, KEY, {**batch, **change})
        assert (np.abs(other["total"] / whole["total"] - 1) > 1e-6).all()


def test_a_shortened_chain_makes_the_same_errors_at_the_same_times():
    method, params, batch = make_tiny()
    tau = np.array([0, 4, 11, 19])
    full, short = (
        jax.jit(bound_of(method, steps=steps))(params, KEY, batch) for steps in (None, tau.tolist())
    )
    for name in ("x_0_error", "eps_error"):
        np.testing.assert_allclose(short[name], full[name][:, tau], rtol=1e-5)
    np.testing.assert_allclose(short["L_T"], full["L_T"], rtol=1e-5)


def test_the_memory_of_the_bound_does_not_grow_with_its_steps():
    sizes = []
    for T in (20, 200):
        method = tiny.make(make_config(data__image_shape=(16, 16, 3), schedule__num_timesteps=T))
        batch = {**make_batch(), "image": np.zeros((8, 16, 16, 3), np.uint8)}
        lowered = jax.jit(method.bound).lower(method.init(KEY), KEY, batch)
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    # A step leaves three numbers for each image and takes some from tables; one batch of images is 24 KiB.
    assert 0 <= sizes[1] - sizes[0] < 180 * 1024 and sizes[0] > 24 * 1024


@pytest.mark.parametrize(
    "trained, chosen, words",
    [
        ("fixed_large", {"variance": "learned"}, "trained with 'fixed_large'"),
        (
            "fixed_large",
            {"variance": "learned_range"},
            "needs outputs that this network does not have",
        ),
        ("learned", {"variance": "learned_range"}, "trained with 'learned'"),
        ("fixed_large", {"variance": "analytic"}, "needs x_0_error"),
        ("fixed_large", {"variance": "analytic", "x_0_error": np.ones(5)}, "each of the 4 steps"),
        ("fixed_large", {"variance": "fixed"}, "fixed_small"),
        ("fixed_large", {"steps": 21}, "1 to 20"),
    ],
)
def test_what_a_trained_model_cannot_do_is_refused(trained, chosen, words):
    changes = {} if trained == "fixed_large" else {"diffusion__loss": "vlb"}
    method = tiny.make(make_config(diffusion__variance=trained, **changes))
    error_of = {"x_0_error": chosen.get("x_0_error")}
    chosen = {"steps": 4} | {name: value for name, value in chosen.items() if name != "x_0_error"}
    for check, group in ((method.chain, ddpm.Sampling), (method.bound_chain, ddpm.Bounding)):
        with pytest.raises(ValueError, match=words) as error:
            check(options.build(group, chosen, ""), **error_of)
        assert "\n" not in str(error.value)


def test_a_learned_variance_serves_any_beginning_of_the_full_chain():
    changes = {"diffusion__variance": "learned", "diffusion__loss": "vlb"}
    method = tiny.make(make_config(**changes))
    assert len(method.chain(from_t=7)) == 8
    with pytest.raises(ValueError, match="single steps"):
        method.chain(sampling(steps=5), from_t=7)


def test_an_unknown_cdf_is_refused():
    with pytest.raises(ValueError, match="normal"):
        make_tiny()[0].bound_chain(options.build(ddpm.Bounding, {"cdf": "logistic"}, ""))


def test_a_learned_model_can_be_asked_for_the_other_variances():
    changes = {"diffusion__variance": "learned_range", "diffusion__loss": "hybrid"}
    method, params, batch = make_tiny(**changes)
    totals = []
    for variance in ("learned_range", "fixed_large", "analytic"):
        chosen, error = {"steps": 4, "variance": variance}, None
        error = np.full(4, 0.3) if variance == "analytic" else None
        bound = jax.jit(bound_of(method, error, **chosen))
        totals.append(bound(params, KEY, batch)["total"])
    assert np.isfinite(totals).all() and len(np.unique(np.array(totals)[:, 0])) == 3
    keys = KEY, np.arange(2), np.zeros(2, np.int32)
    drawn = sampler_of(method, **chosen)(params, *keys, x_0_error=error)
    assert drawn.shape == (2, 6, 4, 2) and np.isfinite(drawn).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule, prediction, variance",
    [
        ({"name": "linear", "end": 0.5, "zero_snr": True}, "v", "fixed_large"),
        ({"name": "exploding"}, "edm", "fixed_small"),
        ({"name": "exploding"}, "eps", "learned_range"),
        ({"name": "straight"}, "velocity", "learned_range"),
        ({"name": "straight"}, "x_0", "fixed_large"),
    ],
)
def test_any_path_trains_samples_and_has_a_bound(schedule, prediction, variance):
    config = make_config(diffusion__prediction=prediction, diffusion__variance=variance)
    config.diffusion.loss = "hybrid" if variance == "learned_range" else "simple"
    with config.unlocked():
        config.schedule = {"num_timesteps": 20, **schedule}
    method, batch = tiny.make(config), make_batch()
    params = far_from_zero(method.init(KEY))
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda p: method.loss_fn(p, (), KEY, batch)[0].mean())
    )(params)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    draws = {}
    for name in SAMPLERS:
        draw = jax.jit(sampler_of(method, sampler=name, steps=6))
        whole = draw(params, KEY, np.arange(4), np.zeros(4, np.int32))
        part = draw(params, KEY, np.arange(1, 3), np.zeros(2, np.int32))
        np.testing.assert_allclose(part, whole[1:3], atol=2e-4)
        draws[name] = np.asarray(whole)
        assert whole.shape == (4, 6, 4, 2) and np.abs(whole).max() <= 1 + 1e-5
    assert np.abs(draws["ddim"] - draws["ancestral"]).max() > 1e-3
    parts = jax.jit(bound_of(method, steps=6))(params, KEY, batch)
    np.testing.assert_allclose(parts["total"], parts["L_T"] + parts["terms"].sum(axis=1), rtol=1e-6)
    assert np.isfinite(parts["terms"]).all() and (parts["terms"] >= -1e-6).all()


# ---- the loss, however t is drawn ------------------------------------------------------------------


def a_history(method, T=20):
    """A loss state in which early times have much larger losses; unchanged for samplers of t without a state."""
    if not jax.tree.leaves(method.init_loss_state(params=None)):
        return ()
    rows = np.tile(10.0 / np.arange(1, T + 1, dtype=np.float32)[:, None], 10)
    return LossHistory(rows, np.full(T, 10, np.int32))


@pytest.mark.slow
def test_the_mean_loss_is_the_bound_less_its_prior_term_however_t_is_drawn():
    n = 4096
    batch = jax.tree.map(lambda x: x[np.arange(n) % 8], make_batch()) | {
        "index": np.arange(n, dtype=np.int32),
        "position": np.arange(n) / np.float32(n),
    }
    expected, spread = None, {}
    for t_sampling in TIME_SAMPLERS:
        changes = {"diffusion__variance": "learned_range", "diffusion__t_sampling": t_sampling}
        method, params, _ = make_tiny(diffusion__loss="vlb", data__flip=False, **changes)
        if expected is None:
            parts = jax.jit(bound_of(method, clip_x0=False))(params, KEY, batch)
            expected = parts["total"] - parts["L_T"]
        loss = jax.jit(method.loss_fn)(params, a_history(method), KEY, batch)[0]
        difference = np.asarray(loss - expected)
        assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(n)
        spread[t_sampling] = float(loss.std() / loss.mean())
    assert spread["importance"] < 0.7 * spread["uniform"]  # a history of costs pays


@pytest.mark.parametrize("t_sampling", ["antithetic", "importance"])
def test_hybrid_is_simple_and_a_thousandth_of_the_bound(t_sampling):
    changes = {"diffusion__variance": "learned_range", "diffusion__t_sampling": t_sampling}
    method, params, batch = make_tiny(diffusion__loss="hybrid", **changes)
    loss = jax.jit(method.loss_fn)
    whole, metrics, record = loss(params, a_history(method), KEY, batch)
    assert sorted(metrics) == sorted(method.metric_names)
    (simple, weight), (vlb, _) = metrics["simple"], metrics["vlb"]
    np.testing.assert_allclose(whole, weight * (simple + 0.001 * vlb), rtol=1e-6)
    assert ((weight == 1) == (t_sampling != "importance")).all()
    if t_sampling == "importance":  # it remembers what a t costs, without the weight
        np.testing.assert_allclose(record[1] * weight, whole, rtol=1e-6)
    halves = [
        loss(params, a_history(method), KEY, jax.tree.map(lambda x, s=s: x[s], batch))[0]
        for s in (slice(4), slice(4, 8))
    ]
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-5)


@functools.cache
def importance_step(devices, accumulate):
    """The initial state and the step of a run with four times, drawn by importance."""
    changes = {"schedule__num_timesteps": 4, "diffusion__t_sampling": "importance"}
    changes |= {"diffusion__variance": "learned_range", "diffusion__loss": "vlb"}
    method = tiny.make(make_config(**changes))
    tx, _ = step.make_optimizer(num_steps=10, warmup_steps=0, learning_rate=1e-2)
    state = jax.device_get(step.init_state(method, tx, KEY))
    axis = parallel.AXIS if devices else None
    update = step.make_update(method, tx, KEY, axis_name=axis, accumulate=accumulate)
    if devices:
        batch = parallel.shard(make_batch(32))
        return state, parallel.compile_step(update, parallel.place(state), batch)
    return state, jax.jit(update)


def importance_run(first, last, state=None, *, devices=0, accumulate=1):
    """The state after these steps, on the host, as a checkpoint holds it."""
    begin, run = importance_step(devices, accumulate)
    state = begin if state is None else state
    state = parallel.place(state) if devices else jax.tree.map(jnp.array, state)
    for k in range(first, last):
        batch = make_batch(32) | {"index": (32 * k + np.arange(32)).astype(np.int32)}
        state, _ = run(state, parallel.shard(batch) if devices else batch)
    return jax.device_get(state)


def test_importance_resumes_bit_for_bit():
    whole, half = importance_run(0, 6), importance_run(0, 3)
    assert (half.loss_state.count >= 10).all()  # from here on the losses decide
    assert whole.loss_state.count.sum() == 192 and np.ptp(whole.loss_state.count) > 4
    jax.tree.map(np.testing.assert_array_equal, importance_run(3, 6, half), whole)
    forgetful = half.replace(loss_state=importance_step(0, 1)[0].loss_state)
    assert (
        importance_run(3, 6, forgetful).params["Dense_0"]["kernel"]
        != whole.params["Dense_0"]["kernel"]
    ).any()


@pytest.mark.slow
def test_importance_remembers_the_same_on_four_devices_and_in_parts():
    one, other = importance_run(0, 6), importance_run(0, 6, devices=4, accumulate=2)
    np.testing.assert_array_equal(other.loss_state.count, one.loss_state.count)
    np.testing.assert_allclose(
        other.loss_state.losses, one.loss_state.losses, rtol=1e-4
    )  # each in its place
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), other.params, one.params)


def test_a_misspelt_variance_is_refused():
    method = tiny.make(make_config())
    with pytest.raises(ValueError, match="did you mean 'fixed_small'"):
        method.chain(sampling(variance="fixed_smal"))


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("diffusion__prediction", "epsilon", "did you mean 'eps'"),
        ("diffusion__loss", "simpel", "did you mean 'simple'"),
        ("diffusion__variance", "fixed", "fixed_small or fixed_large"),
        ("diffusion__variance", "analytic", "evaluate with --variance=analytic"),
        ("diffusion__variance", "learned_range", "'hybrid' or 'vlb'"),
        ("diffusion__t_sampling", "importence", "did you mean 'importance'"),
        ("schedule__name", "jsd", "where alpha² falls to 0; use prediction 'x_0'"),
        ("model__channels", "many", "config.model.channels must be a whole number"),
        ("model__channels", True, "config.model.channels must be a whole number"),
        ("model__channel_mults", (1, "a"), "config.model.channel_mults must be"),
        ("model__depth", 3, "no field 'depth'"),
        ("model__dropuot", 0.1, "did you mean 'dropout'"),
        ("model__attention_resolutions", (16,), "16"),
        ("data__image_shape", (2, 1, 3), "too small"),
        ("data__image_shape", (32, 32), "image_shape"),
        ("diffusion__label_dropout", 0.1, "a model without classes"),
        ("diffusion__label_dropout", 1.0, "in .0, 1."),
    ],
)
def test_refusals(field, value, words):
    config = make_config(**{"model__channel_mults": (1, 2), field: value})
    if field == "schedule__name":
        config.schedule.end = None
    with pytest.raises(ConfigError, match=words) as error:
        from_config(config)
    assert str(error.value).startswith("config.") and "\n" not in str(error.value)
