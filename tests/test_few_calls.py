"""Distillation and consistency models on data N(m, s²), where denoiser, ODE, teacher and student are known exactly."""

import dataclasses
import functools
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import MEAN, STD

from ddpm_jax.configs import digits
from ddpm_jax.experiments import consistency, edm, flow_matching, progressive_distillation
from ddpm_jax.files import runs
from ddpm_jax.method import from_config
from ddpm_jax.options import ConfigError
from ddpm_jax.process import diffusion
from ddpm_jax.process.diffusion import Denoised, at
from ddpm_jax.process.samplers import DDIM
from ddpm_jax.process.schedules import exploding, straight
from ddpm_jax.training import loop

SHAPE, N = (4, 4, 1), 4096
KEY = jax.random.key(7)


class Lines:
    """Mixed into a model: its weights are tables, x̂_0 = slope_t x + shift_t at the times of its own schedule; data N(m, s²)."""

    def init(self, key):
        return {"slope": np.zeros(len(self.schedule)), "shift": np.zeros(len(self.schedule))}

    def shown(self, key, batch):
        keys = self.example_keys(key, batch)[3]
        return MEAN + STD * jax.vmap(lambda key: jax.random.normal(key, self.image_shape))(keys)

    def denoiser(self, params, label=None, **more):
        def on(chain):
            rows = np.searchsorted(params["times"], chain.times)
            assert (params["times"][rows] == chain.times).all()

            def denoise_fn(x, t):
                x_0 = at(params["slope"][rows], t, x) * x + at(params["shift"][rows], t, x)
                return Denoised(x_0, x_0, diffusion.noise_of(chain, x_0, x, t))

            return denoise_fn

        return on


def exact(chain):
    """E[x_0 | x_t] of data N(m, s²)."""
    a, s = chain.alpha, chain.sigma
    slope = a * STD**2 / (a**2 * STD**2 + s**2)
    return {"slope": slope, "shift": MEAN * (1 - slope * a), "times": chain.times}


def batch():
    index = np.arange(N)
    position = (index / N).astype(np.float32)
    empty = np.zeros((N, *SHAPE), np.uint8)
    return {"image": empty, "label": np.zeros(N, np.int32), "index": index, "position": position}


# ---- progressive distillation ----------------------------------------------------------------------


class LineStudent(Lines, progressive_distillation.Student):
    pass


def student_of(calls) -> LineStudent:
    config = progressive_distillation.get_config("")
    config.init_from, config.diffusion.calls = "the_test_gives_the_teacher", calls
    config.diffusion.prediction = "x_0"  # as `Lines` predict
    config.data.image_shape = SHAPE
    model = from_config(config)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    return LineStudent(**fields)


def two_steps(chain, tables):
    """Where two steps of DDIM lead from each second step t of a chain, as a line in x_t, and the line of x̃; in float64."""
    lines = []
    for t in range(1, len(chain), 2):
        slope, shift = 1.0, 0.0
        for row in (t, t - 1):
            a, s, b, r = (
                table[row]
                for table in (chain.alpha, chain.sigma, chain.alpha_prev, chain.sigma_prev)
            )
            k, c = tables["slope"][row], tables["shift"][row]  # x ↦ b x̂_0 + r (x − a x̂_0)/s
            factor, constant = b * k + r * (1 - a * k) / s, (b - r * a / s) * c
            slope, shift = factor * slope, factor * shift + constant
        a, s, b, r = (
            chain.alpha[t],
            chain.sigma[t],
            chain.alpha_prev[t - 1],
            chain.sigma_prev[t - 1],
        )
        lines.append((slope, shift, (slope - r / s) / (b - r * a / s), shift / (b - r * a / s)))
    return np.array(lines).T


@pytest.mark.parametrize("calls", [32, 4, 1])
def test_a_student_that_has_learned_does_in_one_step_what_its_teacher_does_in_two(calls):
    model = student_of(calls)
    assert len(model.schedule) == calls and len(model.twice) == 2 * calls
    assert model.schedule.times[-1] == model.twice.times[-1] == 1023
    teacher = exact(model.twice)
    _, _, slope, shift = two_steps(model.twice, teacher)
    learned = {"slope": slope, "shift": shift, "times": model.schedule.times}

    x = 2 * jax.random.normal(KEY, (calls, *SHAPE))
    t = jnp.arange(calls)
    found = model.two_steps(model.denoiser(teacher)(model.twice), x, t)
    expected = slope[:, None, None, None] * x + shift[:, None, None, None]
    np.testing.assert_allclose(found, expected, atol=3e-6)

    args = (model.init_loss_state(teacher), KEY, batch())
    loss = model.loss_fn(learned, *args)[0]
    worse = model.loss_fn(learned | {"slope": slope + 0.01}, *args)[0]
    assert float(jnp.max(loss)) < 1e-10 < 1e-6 < float(jnp.mean(worse))

    draw = functools.partial(DDIM(), x_T=x, keys=None, clip_x0=False)
    one = draw(model.schedule, model.denoiser(learned))
    two = draw(model.twice, model.denoiser(teacher))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_halved_down_to_one_call_it_is_the_teachers_chain():
    """Six students, each of the one before: the last one's image is that of the first teacher's 64 steps, near the ODE's."""
    tables, first = exact(student_of(32).twice), student_of(32).twice
    line = np.array([1.0, 0.0])
    for row in reversed(range(64)):
        a, s = first.alpha[row], first.sigma[row]
        b, r, k = first.alpha_prev[row], first.sigma_prev[row], tables["slope"][row]
        factor = b * k + r * (1 - a * k) / s
        line = np.array(
            [factor * line[0], factor * line[1] + (b - r * a / s) * tables["shift"][row]]
        )
    for calls in (32, 16, 8, 4, 2, 1):
        model = student_of(calls)
        assert (model.twice.times == tables["times"]).all()
        slope, shift = two_steps(model.twice, tables)[2:]
        tables = {"slope": slope, "shift": shift, "times": model.schedule.times}
    np.testing.assert_allclose([tables["slope"][0], tables["shift"][0]], line, rtol=1e-9)
    a, s = first.alpha[-1], first.sigma[-1]
    ode = STD / np.sqrt(a**2 * STD**2 + s**2)
    assert abs(line[0] / ode - 1) < 0.05 and abs(line[1] - MEAN * (1 - a * ode)) < 0.01
    x_T = jax.random.normal(KEY, (8, *SHAPE))
    images = DDIM()(model.schedule, model.denoiser(tables), x_T, None, clip_x0=False)
    np.testing.assert_allclose(images, line[0] * x_T + line[1], atol=1e-5)


def test_the_teacher_stays_and_the_weights_move():
    model = student_of(4)
    state = model.init_loss_state({"w": jnp.ones(2)})
    state = model.update_loss_state(state, ((), ()), {"w": jnp.zeros(2)})
    assert state[1]["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"init_from": ""}, "a student needs a teacher"),
        ({"diffusion.calls": 24}, "the chain of 1024 steps must be a multiple of 48"),
        ({"diffusion.calls": 0}, "calls must be at least 1"),
        ({"diffusion.prediction": "eps"}, "needs prediction 'v' or 'x_0'"),
    ],
)
def test_a_student_refuses(changes, said):
    config = progressive_distillation.get_config("")
    config.init_from = "runs/v"
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=said):
        from_config(config)


# ---- consistency models ----------------------------------------------------------------------------


class LineConsistency(Lines, consistency.Consistency):
    pass


def consistency_of(variant="", **changes) -> LineConsistency:
    config = consistency.get_config(variant)
    config.init_from = "the_test_gives_the_teacher"
    config.data.image_shape = SHAPE
    config.diffusion.update(changes)
    model = from_config(config)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    return LineConsistency(**fields)


def rows_of(model, n):
    return np.round(np.arange(n + 1) * (len(model.schedule) - 1) / n).astype(int)


def composed(model, n, step):
    """The line f with f(x, σ_{j+1}) = f(step(x), σ_j) and f(x, σ_0) = x, from slopes of `step` about m; in float64.

    Rows that are no level keep 0.
    """
    rows, sigma = rows_of(model, n), model.schedule.sigma
    slope = np.zeros(len(sigma))
    slope[rows[0]] = 1.0
    for low, high in itertools.pairwise(rows):
        slope[high] = slope[low] * step(sigma[low], sigma[high])
    return {"slope": slope, "shift": MEAN * (1 - slope), "times": model.schedule.times}


def heun(low, high):
    """The slope of Heun's step of the exact ODE, dx/dσ = (x − m) σ/(s² + σ²)."""
    first, second = (high / (STD**2 + high**2), low / (STD**2 + low**2))
    h = low - high
    return 1 + 0.5 * h * (first + second * (1 + h * first))


def regression(low, high):
    """The slope of E[x_0 + σ_low ε | x_0 + σ_high ε], to which a loss without a teacher leads."""
    return (STD**2 + low * high) / (STD**2 + high**2)


def at_the_end(step, n):
    """The slope from 80 to 0.002 by n steps over the ODE's."""
    model = consistency_of()
    found = composed(model, n, step)["slope"][-1]
    low, high = model.schedule.sigma[[0, -1]]
    return found / np.sqrt((STD**2 + low**2) / (STD**2 + high**2)) - 1


def test_what_they_learn_becomes_the_map_of_the_ode_with_more_levels():
    errors = np.abs([at_the_end(heun, n) for n in (40, 80, 160)])
    assert (errors[:-1] / errors[1:] > 3.5).all() and errors[-1] < 1e-3  # second order
    errors = np.abs([at_the_end(regression, n) for n in (160, 320, 640, 1280)])
    assert (errors[:-1] / errors[1:] > 1.9).all() and errors[-1] < 0.02  # first order


def test_distillation_has_the_weights_and_loss_of_training_and_its_own_levels():
    alone, taught = (consistency.get_config(v).diffusion.to_dict() for v in ("", "distil"))
    assert taught == alone | {"distil": True, "improved": False, "s_0": 17, "s_1": 17}
    assert taught["weighted"] and alone["improved"] and alone["s_1"] == 80


@pytest.mark.parametrize(
    "n, improved, loss, limit",
    [(17, False, "squared", 1e-8), (160, False, "squared", 1e-8), (10, True, "pseudo_huber", 1e-4)],
)
def test_distillation_has_no_loss_where_f_is_the_teachers_path(n, improved, loss, limit):
    loss = f"experiments.consistency:{loss}"
    model = consistency_of("distil", s_0=n, s_1=n, improved=improved, weighted=improved, loss=loss)
    teacher = exact(model.schedule)
    learned = composed(model, n, heun)
    args = (model.init_loss_state(teacher)._replace(target=None), KEY, batch())
    loss, _, (t, _) = model.loss_fn(learned, *args)
    assert set(np.unique(t)) == set(rows_of(model, n)[1:]) and float(jnp.max(loss)) < limit
    other = learned["slope"] * (
        1 + 0.05 * np.random.default_rng(0).standard_normal(len(teacher["slope"]))
    )
    worse = model.loss_fn(learned | {"slope": other}, *args)[0]
    assert float(jnp.mean(worse)) > 1000 * limit


@pytest.mark.slow
def test_training_without_a_teacher_rests_where_f_is_the_regression():
    """The gradient of the squared error is 0 within its standard error there, and not at other tables."""
    n = 10
    song = {"improved": False, "weighted": False, "loss": "experiments.consistency:squared"}
    model = consistency_of(s_0=n, s_1=n, **song)
    learned = composed(model, n, regression)

    def slope_gradient(factor):
        table = {**learned, "slope": learned["slope"] * factor}
        table["slope"][0] = 1.0

        def loss(slope, shift, index):
            one = {**batch(), "index": index}
            values, _, _ = model.loss_fn(
                {**table, "slope": slope, "shift": shift}, memory, KEY, one
            )
            return jnp.sum(values)

        memory = model.init_loss_state(table)
        parts = [
            jax.jit(jax.grad(loss, argnums=(0, 1)))(
                jnp.asarray(table["slope"], jnp.float32),
                jnp.asarray(table["shift"], jnp.float32),
                np.arange(N) + N * part,
            )
            for part in range(16)
        ]
        rows = rows_of(model, n)[1:]
        slopes, shifts = (
            np.array([part[k] for part in parts], np.float64)[:, rows] for k in (0, 1)
        )
        values = np.concatenate([slopes, shifts], axis=1)
        return values.mean(0) / (values.std(0, ddof=1) / np.sqrt(len(values)))

    assert np.abs(slope_gradient(1.0)).max() < 4.5
    assert np.abs(slope_gradient(1.1)).max() > 20


def test_levels_grow_as_in_the_papers():
    model = consistency_of(s_0=10, s_1=1280)
    model = dataclasses.replace(model, num_steps=8000)
    assert [int(model.intervals(k)) for k in (0, 999, 1000, 4500, 7000, 9000)] == [
        10,
        10,
        20,
        160,
        1280,
        1280,
    ]
    model = dataclasses.replace(model, improved=False, s_0=2, s_1=150)
    points = [int(model.intervals(k)) + 1 for k in (0, 2000, 4000, 8000)]
    expected = [
        np.ceil(np.sqrt(k / 8000 * (151**2 - 4) + 4) - 1) + 1 for k in (0, 2000, 4000, 8000)
    ]
    assert points == expected and points[0] == 2


def test_levels_have_the_papers_law():
    """Song & Dhariwal 2023 (10): p(σ_i) ∝ erf((ln σ_{i+1} − m)/(√2 s)) − erf((ln σ_i − m)/(√2 s))."""
    from scipy.special import erf

    model, n, count = consistency_of(), 20, 200_000
    low, high = jax.jit(model.levels)(jnp.int32(n), jax.random.split(KEY, count))
    rows = rows_of(model, n)
    assert (np.searchsorted(rows, high) - np.searchsorted(rows, low) == 1).all()
    p = np.diff(erf((np.log(model.schedule.sigma[rows]) + 1.1) / (np.sqrt(2) * 2.0)))
    p /= p.sum()
    counts = np.bincount(np.searchsorted(rows, low), minlength=n)
    assert (np.abs(counts - count * p) < 5 * np.sqrt(count * p) + 1).all()


@pytest.mark.parametrize("improved", [False, True])
def test_losses_are_divided_by_the_distance_of_their_levels(improved):
    """Song & Dhariwal 2023, Table 1: λ(σ_i) = 1/(σ_{i+1} − σ_i); Song et al. 2023 have 1."""
    n, losses = 10, []
    for weighted in (False, True):
        model = consistency_of(s_0=n, s_1=n, improved=improved, weighted=weighted)
        params = exact(model.schedule)
        loss, _, (t, _) = model.loss_fn(params, model.init_loss_state(params), KEY, batch())
        losses.append(np.asarray(loss))
    sigma = model.schedule.sigma[rows_of(model, n)]
    distance = np.diff(sigma)[np.searchsorted(rows_of(model, n), t) - 1]
    np.testing.assert_allclose(losses[0], losses[1] * distance, rtol=1e-4)
    assert losses[0].min() > 0 and len(set(distance)) > 5


def test_the_target_is_a_moving_average():
    model = consistency_of(improved=False, s_0=2, s_1=150, target_decay=0.9)
    model = dataclasses.replace(model, num_steps=100)
    memory = model.init_loss_state({"w": jnp.ones(())})
    for k in range(3):
        memory = model.update_loss_state(memory, None, {"w": jnp.zeros(())})
        points = np.ceil(np.sqrt(np.arange(k + 1) / 100 * (151**2 - 4) + 4) - 1) + 1
        decays = np.exp(2 * np.log(0.9) / points)  # Song et al. 2023, §6.1
        np.testing.assert_allclose(memory.target["w"], np.prod(decays), rtol=1e-5)
    assert memory.step == 3 and memory.teacher is None


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_renoising_keeps_the_law_of_the_data(steps):
    model = consistency_of()
    sigma = model.schedule.sigma
    slope = STD / np.sqrt(STD**2 + sigma**2)
    f = {"slope": slope, "shift": MEAN * (1 - slope), "times": model.schedule.times}
    chain = model.chain(consistency.OneCall(steps=f"trailing{steps}"))
    keys = jax.random.split(KEY, N)
    x_T = MEAN + np.sqrt(STD**2 + sigma[-1] ** 2) * jax.random.normal(KEY, (N, *SHAPE))
    images = np.asarray(consistency.Renoise()(chain, model.denoiser(f), x_T, keys, clip_x0=False))
    assert abs(images.mean() - MEAN) < 4 * STD / np.sqrt(images.size)
    assert abs(images.std() / STD - 1) < 4 / np.sqrt(2 * images.size)
    if steps > 1:  # new noise: not the same image
        one = np.asarray(model.denoiser(f)(model.schedule)(x_T, 1280).x_0)
        assert np.abs(images - one).mean() > 0.05


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"distil": True}, "distillation needs a teacher"),
        ({"s_1": 1000}, "s_0 = 10 must divide s_1 = 1000, and that the 1280 intervals"),
        ({"s_1": 2560}, "1 ≤ s_0 ≤ s_1 ≤ 1280"),
        ({"target_decay": 1.0}, r"target_decay must lie in \[0, 1\)"),
        ({"prediction": "eps"}, "needs schedule 'exploding' and prediction 'edm'"),
    ],
)
def test_a_consistency_model_refuses(changes, said):
    config = consistency.get_config()
    config.diffusion.update(changes)
    with pytest.raises(ConfigError, match=said):
        from_config(config)


# ---- time samplers and velocities ------------------------------------------------------------------


@pytest.mark.parametrize("location, scale", [(0.0, 1.0), (-0.8, 0.6)])
def test_the_logit_of_u_is_normal(location, scale):
    from scipy.stats import norm

    T, count = 50, 200_000
    sampler = flow_matching.LogitNormal(location=location, scale=scale)
    draw = jax.jit(lambda keys: sampler.draw(straight(T), (), KEY, keys, None))
    t, weight = draw(jax.random.split(KEY, count))
    edges = (np.arange(T + 1)[1:-1] + 0.5) / T  # between rows, which are u = (t + 1)/T
    edges = np.concatenate([[-np.inf], np.log(edges / (1 - edges)), [np.inf]])
    p = np.diff(norm.cdf((edges - location) / scale))
    counts = np.bincount(t, minlength=T)
    assert (np.abs(counts - count * p) < 5 * np.sqrt(count * p) + 1).all() and (weight == 1).all()


def test_edm_draws_a_normal_ln_sigma():
    schedule, count = exploding(1000), 20_000
    draw = jax.jit(lambda keys: edm.LogNormal().draw(schedule, (), KEY, keys, None)[0])
    level = np.log(schedule.sigma)[draw(jax.random.split(KEY, count))]
    assert abs(level.mean() + 1.2) < 0.04 and abs(level.std() / 1.2 - 1) < 0.03


def test_the_exact_velocity_is_the_slope_of_the_path_of_gaussian_data():
    """dx/du along x(u) = m α + (x_1 − m α_1) √(α² s² + σ²)/…, against ε̂ − x̂_0 of the exact denoiser."""
    chain = straight(1000)
    tables = exact(chain)
    spread = np.sqrt(chain.alpha**2 * STD**2 + chain.sigma**2)
    x = MEAN * chain.alpha + 0.7 * spread
    x_0 = tables["slope"] * x + tables["shift"]
    velocity = (x - chain.alpha * x_0) / chain.sigma - x_0
    np.testing.assert_allclose(velocity[1:-1], np.gradient(x, 1e-3)[1:-1], atol=2e-5)


@pytest.mark.slow
def test_a_student_begins_with_its_teacher_and_resumes_without_it(tmp_path, capfd):
    """Killed and continued it ends with the weights of an undisturbed run, also if the teacher is gone by then."""
    teacher = progressive_distillation.get_config("smoke")
    teacher.method, teacher.init_from = "ddpm_jax.ddpm", ""
    del teacher.diffusion["calls"]
    loop.train(teacher, str(tmp_path / "teacher"))
    config = progressive_distillation.get_config("smoke")
    config.diffusion.calls, config.init_from = 4, str(tmp_path / "teacher")
    config.training.update(num_steps=4, checkpoint_every=2)
    config.optimizer.decay = "none"  # a cosine would end at another step
    whole = loop.train(config, str(tmp_path / "whole"))
    first = runs.load(str(tmp_path / "teacher")).params
    jax.tree.map(np.testing.assert_array_equal, whole.loss_state[1], first)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, whole.params, first)
    assert "they were trained with" not in capfd.readouterr().out
    config.training.num_steps = 2
    loop.train(config, str(tmp_path / "parts"))
    shutil.rmtree(tmp_path / "teacher")
    config.training.num_steps = 4
    parts = loop.train(config, str(tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)


@pytest.mark.slow
def test_weights_of_another_prediction_are_a_warning(tmp_path, capfd):
    config = digits.get_config("smoke")
    config.training.update(num_steps=1)
    config.diffusion.prediction = "eps"
    loop.train(config, str(tmp_path / "eps"))
    config.diffusion.prediction, config.init_from = "v", str(tmp_path / "eps")
    loop.train(config, str(tmp_path / "v"))
    line = "WARNING: they were trained with config.diffusion.prediction 'eps', and this run has 'v'"
    assert line in capfd.readouterr().out
