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
    distilled    17 intervals, weights alike, student of edm; Song et al. 2023 6, after edm

The columns are squared Fréchet distances of 64 classifier features between 500 samples and the training images, named by
sampler and network calls: `ddim_10` has 10 evenly spaced steps that end at the image (trailing), `dpm_10` is DPM-Solver++ of
second order with even steps in log-SNR, `heun_9` has five steps of two calls, the last of one. `at_16k` … `at_48k` are
ddim_20 after so many images. `bound` is in bits/dim, of 64 test images.

Expected: with ten calls or fewer, students and consistency models are best, since each was trained for them; with 50 and
more all methods are alike; second-order samplers need about half the calls of DDIM.
Measured on an AMD EPYC server, jax 0.10.2; 99 minutes on two cores, each with its own seeds. Mean ± standard deviation over five seeds.
500 training images have a distance of 2.6, the 297 test images of 9.2.

    row         ddim_1    ddim_2    ddim_4    ddim_10   ddim_20   ddim_50   ddim_250  ancestral_50  _250      bound
    ddpm        91 ± 9    290 ± 16  67.4±3.6  23.9±0.9  17.0±1.2  14.4±1.0  13.7±0.9  19.2±2.1      15.7±2.4  4.70±0.03
    eps         89 ± 20   78 ± 21   32.1±10.4 14.7±3.0  11.3±1.6  10.1±1.2  9.7±1.0   11.8±1.7      7.1±1.3   4.53±0.03
    v           680 ± 7   105 ± 1   29.2±1.6  13.0±1.4  9.8±1.3   8.6±1.3   8.1±1.3   10.6±1.7      6.9±1.0   4.59±0.03
    x_0         634 ± 13  98 ± 5    26.4±2.0  11.5±2.0  8.6±1.1   7.3±0.8   6.7±0.5   8.9±1.6       5.3±1.1   115 ± 7
    min_snr     459 ± 25  62.4±5.9  20.9±2.5  9.6±1.4   7.6±0.8   6.8±0.8   6.5±0.7   9.5±1.4       5.5±0.6   5.21±0.04
    hybrid      83 ± 3    71.2±6.9  28.7±3.6  13.9±1.4  11.1±1.0  10.0±0.8  9.5±0.7   10.8±1.8      6.8±0.8   4.42±0.03
    edm         647 ± 21  249 ± 12  123 ± 8   25.2±2.6  13.5±1.4  9.2±0.9   7.6±0.6   10.8±0.6      12.1±1.3  4.54±0.06
    flow        624 ± 15  95 ± 6    30.6±3.0  12.4±1.1  9.3±0.7   8.1±0.4   7.5±0.3   —             —         5.35±0.03
    flow_logit  475 ± 24  68.4±4.3  24.1±2.1  9.6±0.6   7.6±0.5   6.7±0.5   6.3±0.5   —             —         6.50±0.11
    dit         728 ± 2   151 ± 6   49.9±2.4  27.2±1.3  22.7±1.1  21.2±0.9  20.4±1.0  25.3±1.2      21.2±1.4  4.69±0.01

                heun_3    heun_9    heun_19   heun_49   dpm_4     dpm_10    dpm_20    at_16k    at_32k    at_48k
    ddpm        92 ± 9    25.9±3.5  17.0±1.2  14.1±0.8  162 ± 18  13.4±1.8  13.5±1.0  51.5±3.3  31.2±1.6  22.3±1.3
    eps         89 ± 20   20.4±7.9  11.1±2.8  9.5±1.1   53.3±14.0 11.2±1.1  9.5±0.8   35.9±2.0  19.4±0.8  13.5±1.3
    v           683 ± 7   15.0±0.7  8.2±1.3   7.9±1.3   34.7±1.9  12.7±1.2  8.1±1.2   32.2±1.4  16.7±1.5  11.6±1.1
    x_0         534 ± 21  16.4±2.2  9.9±0.5   7.9±0.6   30.8±2.5  12.2±1.5  7.5±0.5   18.1±1.0  11.4±1.2  9.3±1.4
    min_snr     458 ± 25  6.9±0.9   6.1±0.7   6.3±0.6   15.9±2.5  9.5±0.6   6.5±0.7   24.1±1.1  12.8±0.8  9.6±1.1
    hybrid      83 ± 3    17.0±2.4  10.1±1.4  9.4±0.8   49.0±8.3  11.3±0.8  9.3±0.6   36.0±1.9  19.3±0.6  13.3±1.2
    edm         646 ± 21  17.5±2.0  5.7±0.5   7.0±0.6   61.7±7.6  9.1±1.2   7.6±0.7   36.3±1.7  20.7±2.0  17.6±1.0
    flow        287 ± 7   11.5±0.8  8.4±0.3   7.6±0.3   —         —         —         28.1±1.6  15.3±0.8  11.6±2.4
    flow_logit  220 ± 20  10.4±1.0  7.0±0.6   6.3±0.6   —         —         —         20.7±1.6  11.3±1.1  9.2±0.5
    dit         729 ± 2   31.0±0.7  21.1±0.8  20.3±0.9  61.6±3.1  22.8±0.3  19.7±1.1  67.9±4.5  36.5±0.9  27.7±1.4

                its own calls; renoise_1, _2, _4
    v_32        8.6±1.3
    v_16        8.8±1.2
    v_8         9.2±1.2
    v_4         10.0±1.3
    v_2         11.5±1.3
    v_1         13.8±1.6
    consistency 23.3±2.7, 16.7±2.4, 27.3±2.2
    distilled   9.7±0.5, 8.2±0.3, 14.2±1.3

`distilled` was trained after the others, with the same seeds. Trained again in a fresh environment by someone else, min_snr has the
same 21.639 in ddim_4 for seed 1, and the same 17.6 for seed 3.

Paired by seeds, ± standard error; a difference below two of them is called none. By Student's t five seeds need 2.8 for 95 %, which those
marked * do not reach.
* One to eight calls: students, as expected. `distilled` is 4.1 ± 0.8 better than v_1 in one call and 3.2 ± 0.6 better than v_2 in two. In two it
  is 1.5 ± 0.3 better than in one, 1.8 ± 0.7 * better than v_4 in four and not different from v_8 in eight (1.0 ± 0.6). With four
  even levels it is 6.0 ± 0.5 worse than in two, whose level is Song & Dhariwal's; with --steps=[301,602,979,1280], one of three tries at
  lower levels on these seeds, 10.9 ± 2.2.
  Consistency training is 13.6 ± 1.2 behind it in one call. v_4 is 5.8 ± 1.0 better than Min-SNR by DPM-Solver++ in 4.
* Nine to 19: the students are overtaken, against the expectation. Min-SNR by Heun in 9 calls (6.9) is 3.1 ± 0.4 better than v_4, 2.3 ± 0.3
  better than v_8, 1.3 ± 0.5 * better than `distilled` in 2 and 2.2 ± 0.7 better than EDM by DPM-Solver++ in 10. EDM by Heun in 19 (5.7) is
  1.2 ± 0.3 better still, and not different from the best of 250 calls.
* Many: the methods are not alike. In 50 calls of DDIM v is 5.8 ± 0.9 better than ddpm and 1.5 ± 0.5 better than eps; Min-SNR and flow_logit
  are 1.8 ± 0.3 and 1.9 ± 0.4 better than v, with no difference between them.
* Second order: DPM-Solver++ in 10 calls is 16.2 ± 0.6 better than DDIM for EDM, 3.5 ± 1.7 * for eps, none for v and Min-SNR; in 20 calls
  it is 1.7 ± 0.1 better for v. Heun in 9 is 2.7 ± 0.3 better than DDIM in 10 for Min-SNR, and 2.0 ± 0.4 worse for v.
* The ancestral sampler in 250 calls is better than DDIM for eps (2.6 ± 0.3), x_0 (1.4 ± 0.4) and v (1.2 ± 0.4), and worse for EDM (4.4 ± 0.7).
* Training: x_0 and flow_logit after 32,000 images are where v is after 48,000 (differences 0.2 ± 0.4, 0.3 ± 0.5), Min-SNR too
  (1.2 ± 0.8). After 16,000 x_0 is the best, 2.6 ± 1.0 * ahead of flow_logit and 6.0 ± 0.8 of Min-SNR.
* The bound: hybrid is 0.101 ± 0.001 better than eps. What gives little weight to small noise costs bits: Min-SNR 0.61 ± 0.02 more
  than v, flow 0.76 ± 0.01, flow_logit 1.91 ± 0.06; with x_0 the error of ε̂ has no limit there.
* Some spreads are large: in ddim_4 eps has 26.4 to 30.2 in four seeds, and 50.4 in the fifth.
* With weights of 1, as in Song et al. 2023, `distilled` has 49 ± 6 in one call. Its recipe is the best of four on these seeds, which
  favours it a little; see experiments/consistency.py.
* `dit` still improved (5.0 ± 0.5 over the last 16,000 images).
"""

from ddpm_jax.configs import digits
from ddpm_jax.experiments.consistency import DISTIL

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
    from_edm = {"config.init_from": "edm"}
    from_edm |= {f"config.diffusion.{name}": value for name, value in DISTIL.items()}
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
