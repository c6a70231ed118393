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
    distilled    the same levels and weights, student of edm; Song et al. 2023 6, after edm

The columns are squared Fréchet distances of 64 classifier features between 500 samples and the training images, named by
sampler and network calls: `ddim_10` has 10 evenly spaced steps that end at the image (trailing), `dpm_10` is DPM-Solver++ of
second order with even steps in log-SNR, `heun_9` has five steps of two calls, the last of one. `at_16k` … `at_48k` are
ddim_20 after so many images. `bound` is in bits/dim, of 64 test images.

Expected: with ten calls or fewer, students and consistency models are best, since each was trained for them; with 50 and
more all methods are alike; second-order samplers need about half the calls of DDIM.
Measured with --seeds=3, not the five of the command, on an AMD EPYC server, jax 0.10.2; 27 minutes a seed on two cores, each
with half of the rows. Mean ± standard deviation over seeds. 500 training images have a distance of 2.6, the 297 test images of 9.2.

    row         ddim_1    ddim_2    ddim_4    ddim_10   ddim_20   ddim_50   ddim_250  ancestral_50  _250      bound
    ddpm        98 ± 2    284 ± 16  65.2±2.7  23.3±0.5  16.2±0.6  13.8±0.3  13.1±0.2  18.3±1.1      15.6±2.0  4.70±0.04
    eps         79 ± 8    66.6±1.3  26.6±0.2  13.8±0.7  11.1±0.2  10.1±0.1  9.8±0.2   11.4±0.5      6.7±0.1   4.54±0.02
    v           679 ± 9   105 ± 2   29.0±2.3  13.6±0.9  10.4±0.8  9.2±0.8   8.7±1.0   10.2±1.0      6.9±0.7   4.59±0.02
    x_0         628 ± 13  95.3±2.5  26.8±2.8  12.1±2.5  9.1±1.2   7.7±0.7   6.9±0.1   9.0±1.3       5.4±1.3   118 ± 8
    min_snr     455 ± 21  62.2±5.6  20.8±0.7  9.8±0.3   7.8±0.2   7.0±0.3   6.7±0.4   9.3±1.3       5.7±0.7   5.19±0.05
    hybrid      82 ± 4    66.7±3.4  26.4±0.6  13.5±0.6  11.1±0.6  10.0±0.4  9.7±0.4   10.5±1.0      6.7±0.2   4.44±0.02
    edm         649 ± 28  243 ± 12  121 ± 11  23.9±2.6  13.0±1.7  9.0±1.1   7.6±0.9   11.4±1.3      11.6±0.5  4.55±0.07
    flow        617 ± 12  92.6±6.6  30.5±4.2  12.4±1.6  9.4±0.9   8.1±0.5   7.6±0.3   —             —         5.36±0.04
    flow_logit  465 ± 22  66.3±1.4  23.5±1.4  9.5±0.3   7.7±0.0   6.8±0.1   6.5±0.2   —             —         6.51±0.15
    dit         727 ± 4   150 ± 8   49.6±2.2  27.0±0.9  22.5±0.4  21.2±0.1  20.3±0.2  26.1±0.7      21.6±1.3  4.69±0.02

                heun_3    heun_9    heun_19   heun_49   dpm_4     dpm_10    dpm_20    at_16k    at_32k    at_48k
    ddpm        98 ± 2    25.0±3.3  16.2±0.3  13.5±0.2  155 ± 22  12.2±0.9  12.9±0.3  49.9±3.5  31.1±1.9  21.5±1.0
    eps         79 ± 8    16.8±1.9  10.5±0.7  9.6±0.1   45.6±7.6  11.4±1.3  9.6±0.1   35.7±1.9  19.6±0.2  13.9±0.6
    v           681 ± 10  15.3±0.6  8.7±1.1   8.4±1.0   35.4±2.3  13.2±1.4  8.6±0.9   32.3±1.8  16.7±2.2  12.3±0.7
    x_0         523 ± 20  16.0±2.7  9.9±0.2   8.0±0.9   31.3±3.3  12.5±1.9  7.6±0.5   18.5±1.1  12.1±0.6  10.2±0.8
    min_snr     454 ± 21  7.0±0.2   6.4±0.4   6.5±0.3   16.6±1.3  9.6±0.6   6.7±0.2   24.3±1.3  12.5±0.9  10.1±0.9
    hybrid      82 ± 4    15.9±1.6  9.9±0.5   9.5±0.1   44.8±8.3  11.5±1.0  9.4±0.2   35.7±2.1  19.4±0.4  13.7±1.0
    edm         648 ± 28  17.0±1.9  5.9±0.7   7.0±0.8   58.8±9.0  8.7±1.4   7.5±0.9   37.5±0.7  20.5±1.2  17.0±0.7
    flow        285 ± 8   11.6±1.1  8.4±0.4   7.6±0.2   —         —         —         28.6±1.8  15.8±0.6  13.2±1.2
    flow_logit  212 ± 13  10.5±0.6  7.2±0.4   6.5±0.3   —         —         —         21.2±1.1  11.3±1.6  9.4±0.6
    dit         729 ± 4   30.6±0.2  20.7±0.5  20.2±0.3  61.1±3.5  22.6±0.2  19.8±0.3  65.4±5.1  35.9±0.5  28.2±1.0

                its own calls; renoise_1, _2, _4
    v_32        9.2 ± 1.1
    v_16        9.3 ± 0.9
    v_8         9.6 ± 0.9
    v_4         10.6 ± 1.1
    v_2         11.9 ± 1.5
    v_1         14.4 ± 1.8
    consistency 22.5 ± 1.5, 16.6 ± 1.8, 25.5 ± 0.9
    distilled   9.9 ± 0.6, 8.6 ± 0.5, 12.3 ± 2.1

Trained again by someone else, min_snr with seed 1 has 21.639 in ddim_4, as here; seed 3, which is not in the table, has 17.6, and
6.2 in ddim_20: less than all three (20.2 to 21.6, 7.7 to 8.0). So the spread of three seeds is an underestimate.

Paired by seeds, ± standard error; a difference below two of them is called none. By Student's t three seeds need 4.3 for 95 %, which the
0.4 ± 0.2, 2.4 ± 1.1, 1.6 ± 0.5 and 3.7 ± 1.1 below do not reach.
* One to eight calls: students, as expected. In one call `distilled` is 4.5 ± 1.1 better than v_1 and 12.6 ± 0.9 better than consistency
  training (not paired: `distilled` was trained later than the other rows). With 2 calls it is 1.3 ± 0.3 better than with one, and with 4
  calls 3.7 ± 1.1 worse than with 2. v_4 is 6.0 ± 1.0 better than Min-SNR by DPM-Solver++ in 4 (not paired).
* Nine to 19: the students are overtaken, against the expectation. Min-SNR by Heun in 9 calls (7.0) is 3.6 ± 0.6 better than v_4 and
  1.6 ± 0.3 better than `distilled` in 2 (not paired). EDM by Heun in 19 (5.9) is 0.4 ± 0.2 better than Min-SNR, and not different from the
  best of 250 calls.
* Many: the methods are not alike. v is 4.6 ± 0.6 better than ddpm in 50 calls of DDIM, Min-SNR and flow_logit are 2.2 ± 0.3 and
  2.4 ± 0.5 better than v, with no difference between them.
* Second order: DPM-Solver++ in 10 calls is 15.3 ± 0.7 better than DDIM for EDM, 2.4 ± 1.1 for eps, none for v and Min-SNR. Heun in 9 is
  2.8 ± 0.2 better than DDIM in 10 for Min-SNR, and 1.6 ± 0.5 worse for v.
* The ancestral sampler in 250 calls is better than DDIM for eps (3.0 ± 0.2) and v (1.8 ± 0.2), and worse for EDM (3.9 ± 0.8).
* Training: Min-SNR after 32,000 images is where v is after 48,000 (0.2 ± 0.9). After 16,000 x_0 is the best, 5.9 ± 1.2 ahead of Min-SNR.
* The bound: hybrid is 0.101 ± 0.001 better than eps. What gives little weight to small noise costs bits: Min-SNR 0.60 ± 0.03 more
  than v, flow 0.77 ± 0.01, flow_logit 1.92 ± 0.09; with x_0 the error of ε̂ has no limit there.
* With levels and weights of Song et al. 2023 and 17 intervals `distilled` had 49 ± 10 in one call; see experiments/consistency.py.
* `dit` still improved (5.7 ± 0.6 over the last 16,000 images).
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
EPS = {"config.diffusion.prediction": "eps"}
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
        "ddpm": EPS | {"config.schedule.name": "linear", "config.schedule.num_timesteps": 1024},
        "eps": EPS | COSINE,
        "v": V,
        "x_0": COSINE | {"config.diffusion.prediction": "x_0"},
        "min_snr": V | {"config.diffusion.min_snr_gamma": 5.0},
        "hybrid": EPS
        | COSINE
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
    from_edm = {"config.init_from": "edm", "config.diffusion.distil": True}
    few = {"consistency": consistency | common, "distilled": consistency | common | from_edm}
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
