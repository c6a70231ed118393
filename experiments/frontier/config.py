"""Quality for compute on the digits: which method reaches a given quality soonest, in training and in sampling?

    python -m experiments.feature_classifier --data=digits --out=runs/digits_classifier.npz
    python -m experiments.sweep experiments/frontier --size=cpu --run --seeds=5 --table --page

Every method trains the network of configs/digits.py on the same images in the same order, 2,000 steps of 32, at a constant
learning rate, so that each checkpoint is a fair shorter run; samples are those of the moving average.

    row          what it is                                                    calls per training image
    ddpm         ε, L_simple, linear β; Ho et al. 2020                         3 (a backward pass counts as two)
    eps          ε, cosine ᾱ; Nichol & Dhariwal 2021                           3
    v            v, cosine ᾱ; Salimans & Ho 2022                               3
    x_0          x_0, cosine ᾱ                                                 3
    min_snr      v with Min-SNR-5 weights; Hang et al. 2023                    3
    hybrid       ε and Σ, L_hybrid, cosine ᾱ; Nichol & Dhariwal 2021           3
    edm          preconditioned, ln σ normal; Karras et al. 2022               3
    flow         straight path, velocity, u uniform; Lipman et al. 2023        3
    flow_logit   the same, u logit-normal; Esser et al. 2024                   3
    dit          v with a transformer; Peebles & Xie 2023                      3
    v_32         student of v in 32 calls, 333 steps; Salimans & Ho 2022       5, after v
    v_16         student of v_32 in 16 calls                                   5, after v_32
    v_8          student of v_16 in 8 calls                                    5, after v_16
    v_4          student of v_8 in 4 calls                                     5, after v_8
    v_2          student of v_4 in 2 calls                                     5, after v_4
    v_1          student of v_2 in 1 call                                      5, after v_2
    consistency  10 … 80 intervals, no teacher; Song & Dhariwal 2023           4
    distilled    17 intervals, student of edm, pseudo-Huber; Song et al. 2023  6, after edm

The columns are squared Fréchet distances of 64 classifier features between 500 samples and the training images, named by
sampler and network calls: `ddim_10` has 10 evenly spaced steps that end at the image (trailing), `dpm_10` is DPM-Solver++ of
second order with even steps in log-SNR, `heun_9` has five steps of two calls, the last of one. `at_16k` … `at_48k` are
ddim_20 after so many images. `bound` is in bits/dim, of 64 test images.

Expected: with ten calls or fewer, students and consistency models are best, since each was trained for them; with 50 and
more all methods are alike; second-order samplers need about half the calls of DDIM.
Measured: not run.
"""

from ddpm_jax.configs import digits

FEATURES = "--features=experiments.feature_classifier:runs/digits_classifier.npz"
CALLS = (1, 2, 4, 10, 20, 50, 250)
STEPS = 2000
COMMON = {
    "config.optimizer.decay": "none",
    "config.training.num_steps": STEPS,
    "config.training.checkpoint_every": STEPS // 4,
    "config.training.keep": 20,  # those that an interruption saves count too
    "config.preview.every": STEPS,
    "config.preview.num_images": 8,
}
COSINE = {"config.schedule.name": "cosine", "config.schedule.num_timesteps": 1024}
V = COSINE | {"config.diffusion.prediction": "v"}
STUDENTS = (32, 16, 8, 4, 2, 1)


def get_config(variant: str = ""):
    return digits.get_config(variant)


def rows(size: str) -> dict[str, dict]:
    """The rows; `smoke` leaves out those whose code others run too."""
    common = {} if size == "smoke" else COMMON
    in_one_file = {
        "edm": {"config": "experiments/edm.py", "config.schedule.num_timesteps": 1281},
        "flow": {"config": "experiments/flow_matching.py"},
        "flow_logit": {
            "config": "experiments/flow_matching.py",
            "config.diffusion.t_sampling": "experiments.flow_matching:LogitNormal",
        },
        "dit": {"config": "experiments/my_network.py", **V},
    }
    plain = {
        "ddpm": {"config.schedule.num_timesteps": 1024},
        "eps": COSINE,
        "v": V,
        "x_0": COSINE | {"config.diffusion.prediction": "x_0"},
        "min_snr": V | {"config.diffusion.min_snr_gamma": 5.0},
        "hybrid": COSINE
        | {"config.diffusion.loss": "hybrid", "config.diffusion.variance": "learned_range"},
    }
    students = {}
    for calls, teacher in zip(STUDENTS, ("v", *(f"v_{calls}" for calls in STUDENTS)), strict=False):
        students[f"v_{calls}"] = {
            "config": "experiments/progressive_distillation.py",
            "config.init_from": teacher,
            "config.diffusion.calls": calls,
            **({} if size == "smoke" else {"config.training.num_steps": STEPS // len(STUDENTS)}),
        }
    consistency = {"config": "experiments/consistency.py"}
    pseudo_huber = {"config.diffusion.loss": "experiments.consistency:pseudo_huber"}
    few = {
        "consistency": consistency | common | {"config.diffusion.s_1": 80},
        "distilled": consistency
        | common
        | {"config.init_from": "edm", "config.diffusion.distil": True}
        | {
            "config.diffusion.improved": False,
            "config.diffusion.s_0": 17,
            "config.diffusion.s_1": 17,
        }
        | pseudo_huber,
    }
    every = {name: row | common for name, row in (plain | in_one_file).items()} | students | few
    alike = ("eps", "x_0", "flow", "v_8", "v_4", "v_2", "v_1") if size == "smoke" else ()
    return {name: row for name, row in every.items() if name not in alike}


def samplers(row: str) -> dict[str, list[str]]:
    """{column: flags}, for the samplers that fit a row."""
    if row.startswith("v_"):
        calls = row.removeprefix("v_")
        return {f"ddim_{calls}": ["--sampler=ddim"]}
    if row in ("consistency", "distilled"):
        steps = {1: "1", 2: "[492,1280]", 4: "trailing4"}  # σ = 0.821 as in Song & Dhariwal 2023
        return {f"renoise_{calls}": [f"--steps={given}"] for calls, given in steps.items()}
    ddim = ["--sampler=ddim", "--spacing=trailing"]
    columns = {f"ddim_{calls}": [*ddim, f"--steps={calls}"] for calls in CALLS}
    heun = "experiments.flow_matching:Heun" if row.startswith("flow") else "heun"
    for steps in (2, 5, 10, 25):
        columns[f"heun_{2 * steps - 1}"] = [f"--sampler={heun}", f"--steps={steps}"]
    if row.startswith("flow"):
        return columns
    for calls in (4, 10, 20):
        flags = ["--sampler=dpm_solver", "--order=2", "--spacing=log_snr", f"--steps={calls}"]
        columns[f"dpm_{calls}"] = flags
    for calls in (50, 250):
        flags = ["--sampler=ancestral", "--spacing=trailing", f"--steps={calls}"]
        columns[f"ancestral_{calls}"] = flags
    return columns


def evaluations(size: str, row: str) -> dict[str, list[str]]:
    if size == "smoke":  # without data there is no classifier
        return {"bound": ["--mode=nll", "--num_images=8", "--steps=1"]}
    judged = ["--mode=eval", "--metrics=fid", FEATURES, "--num_samples=500", "--batch_size=125"]
    columns = {name: [*judged, *flags] for name, flags in samplers(row).items()}
    if row.startswith("v_") or row in ("consistency", "distilled"):
        return columns
    at_20 = [*judged, *samplers(row)["ddim_20"]]
    for quarter in (1, 2, 3):
        step = quarter * STEPS // 4
        columns[f"at_{step * 32 // 1000}k"] = [*at_20, f"--checkpoint={step}"]
    return columns | {"bound": ["--mode=nll", "--num_images=64"]}


GROUPS = {
    "what is predicted": ("ddpm", "eps", "v", "x_0", "min_snr", "hybrid"),
    "paths and networks": ("v", "edm", "flow", "flow_logit", "dit"),
}


def charts(size: str) -> dict[str, tuple[str, dict]]:
    """{title: (name of x, {curve: [(row, column, x), …]})} of the page."""
    del size

    def by_calls(row, sampler):
        columns = [column for column in samplers(row) if column.startswith(f"{sampler}_")]
        return [(row, column, int(column.rpartition("_")[2])) for column in columns]

    result = {}
    for group, rows_of_group in GROUPS.items():
        curves = {row: by_calls(row, "ddim") for row in rows_of_group}
        result[f"distance by DDIM, {group}"] = "network calls", curves
    of_one = {sampler: by_calls("v", sampler) for sampler in ("ddim", "heun", "dpm", "ancestral")}
    result["distance of v, by sampler"] = "network calls", of_one
    few = {
        "v, ddim": by_calls("v", "ddim"),
        "v, dpm": by_calls("v", "dpm"),
        "students of v": [(f"v_{calls}", f"ddim_{calls}", calls) for calls in STUDENTS[::-1]],
        "edm, heun": by_calls("edm", "heun"),
        "edm, dpm": by_calls("edm", "dpm"),
        "distilled from edm": by_calls("distilled", "renoise"),
        "consistency": by_calls("consistency", "renoise"),
    }
    result["distance in few calls"] = "network calls", few
    ends = [(f"at_{k}k", k) for k in (16, 32, 48)] + [("ddim_20", 64)]
    for group, rows_of_group in GROUPS.items():
        curves = {row: [(row, column, k) for column, k in ends] for row in rows_of_group}
        result[f"distance by DDIM in 20, {group}"] = "1,000 training images", curves
    return result
