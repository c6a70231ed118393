"""The command line: flags, and nothing else.

python -m ddpm_jax.main --config=configs/cifar10.py                  trains; the same again resumes
python -m ddpm_jax.main --mode=sample --workdir=runs/cifar10         draws images
python -m ddpm_jax.main --mode=nll --workdir=runs/cifar10            bits/dim of the test split

Other modes. Samples: progressive (x_0 as seen on the way), nearest (training images beside samples).
Given images: encode, reconstruct, interpolate, denoise, inpaint. Metrics of samples: eval. Likelihood:
rate_distortion, best_steps (of a shortened chain). All of a run on one page, or several side by side: report.
"""

import os
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ddpm_jax import (
    checkpoints,
    config,
    data,
    edit,
    evaluate,
    parallel,
    report,
    runs,
    sample,
    samplers,
    schedules,
    score,
    train,
)

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py or FILE.py:VARIANT with a get_config(); fields: --config.seed=1 …"
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    [
        *("train", "sample", "progressive", "nearest", "encode", "reconstruct", "interpolate"),
        *("denoise", "inpaint", "eval", "nll", "rate_distortion", "best_steps"),
        "report",
    ],
    "What to do; all but train read a run directory.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; runs/<name of the config> if not given."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "This is one of several processes: calls jax.distributed.initialize()."
)
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "Which parameters.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of all noise: image i depends on the seed and i alone.", 0, 2**32 - 1
)
_STEPS = flags.DEFINE_string(
    "steps",
    None,
    "Of the chain: 50, ddim50, quad50, logsnr50, 10,15,20 or [0,20,41]; best_steps: how many;"
    " reconstruct: several numbers, as 10,20,50, or chains with semicolons, as '10,15,20;45'.",
)
_SPACING = flags.DEFINE_enum(
    "spacing",
    None,
    list(schedules.SPACINGS),
    "How a plain number of steps is spread over the chain.",
)
_SAMPLER = flags.DEFINE_enum("sampler", None, list(samplers.SAMPLERS), "Else ancestral.")
_ORDER = flags.DEFINE_integer("order", None, "Of dpm_solver: 1, 2 (else) or 3.")
_SINGLESTEP = flags.DEFINE_bool(
    "singlestep", None, "dpm_solver two steps at a time; else multistep."
)
_GUIDANCE = flags.DEFINE_float(
    "guidance",
    None,
    "Of labels: 1 (else) is the model of the labels, 0 the one without, 3 exaggerates.",
)
_LABELS = flags.DEFINE_string(
    "labels", None, "cycle (else), random, a class as 3, or several as 3,5,7."
)
_LATENTS = flags.DEFINE_string("latents", None, "An .npz of --mode=encode, to be decoded.")
_TRAJECTORY = flags.DEFINE_bool("trajectory", False, "Also the chain, as a strip and an animation.")
_IMAGES = flags.DEFINE_string(
    "images", None, "data (the run's own), a folder of pictures or an .npz."
)
_FROM_T = flags.DEFINE_string(
    "from_t", None, "Time up to which noise is added; several as 250,500."
)
_MASK = flags.DEFINE_string(
    "mask", None, f"A picture whose white is filled in, or {', '.join(edit.MASKS)}."
)
_RESAMPLE = flags.DEFINE_integer(
    "resample", None, "How often inpaint walks each part of the chain.", 1
)
_JUMP = flags.DEFINE_integer("jump", None, "Steps that inpaint goes back for it.", 1)
_METRICS = flags.DEFINE_string("metrics", None, f"Some of {', '.join(score.METRICS)}; else fid.")
_FEATURES = flags.DEFINE_string(
    "features", None, "inception, inception:FILE, or MODULE:FILE with a load(path) -> Extractor."
)
_NUM_SEEDS = flags.DEFINE_integer(
    "num_seeds", None, "Seeds from --seed on, for mean and spread.", 1
)
_NEIGHBOURS = flags.DEFINE_integer("neighbours", None, "Training images shown for each sample.", 1)
_VARIANCE = flags.DEFINE_string("variance", None, "Of the reverse chain; else the config's.")


class _OrWord(flags.ArgumentParser):
    """Another parser, and one word beside what it takes."""

    def __init__(self, parser: flags.ArgumentParser, word: str):
        self._parser, self._word = parser, word
        self.syntactic_help = f"{parser.syntactic_help}, or {word}"

    def parse(self, argument):
        if argument == self._word:
            return argument
        try:
            return self._parser.parse(argument)
        except ValueError:
            kind = {"bool": "true, false"}.get(self._parser.flag_type(), "a number")
            raise ValueError(f"{argument!r} is neither {kind} nor {self._word!r}") from None

    def flag_type(self):
        return f"{self._parser.flag_type()} or {self._word}"


_ETA = flags.DEFINE(
    _OrWord(flags.FloatParser(), "hat"),
    "eta",
    None,
    "Of ddim: 0 (else) to 1, or hat for Song et al.'s.",
)
_CLIP = flags.DEFINE_flag(
    flags.BooleanFlag(
        "clip", None, "x_0 to [-1, 1]; --clip=dynamic by percentile; else the config's."
    )
)
flags.FLAGS["clip"].parser = _OrWord(flags.BooleanParser(), "dynamic")
_OUT = flags.DEFINE_string(
    "out",
    None,
    "What to write, and a picture beside it: .npz of images, .json of measurements;"
    " or the .html of a report.",
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time.", 1)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "How many images to draw.", 1)
_NUM_IMAGES = flags.DEFINE_integer("num_images", None, "How many to measure; else all.", 1)
_SPLIT = flags.DEFINE_string("split", "test", "Of the data.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data are; else as the config says.")
_CHANGE = flags.DEFINE_list(
    "change",
    [],
    "Training may go on although this differs from the run that is continued: data, for other images.",
)
_CDF = flags.DEFINE_string("cdf", None, "Of the decoder: normal, or tanh as in Ho et al.'s code.")

# Which flags a mode hears. A flag that it would not hear is refused.
_RUN_FLAGS = ("weights", "steps", "clip", "out", "batch_size")
_CHAIN_FLAGS = (*_RUN_FLAGS, "spacing", "guidance", "labels")
_SAMPLER_FLAGS = (*_CHAIN_FLAGS, "seed", "sampler", "eta", "order", "singlestep", "variance")
_IMAGE_FLAGS = ("images", "num_images", "split", "data_dir")
_NLL_FLAGS = (*_RUN_FLAGS, "seed", "variance", "num_images", "split", "data_dir", "cdf")
_HEARD = {
    "train": ("change",),
    "sample": (*_SAMPLER_FLAGS, "num_samples", "latents", "trajectory"),
    "progressive": (*_SAMPLER_FLAGS, "num_samples"),
    "nearest": (*_SAMPLER_FLAGS, "num_samples", "images", "data_dir", "neighbours"),
    "encode": (*_CHAIN_FLAGS, *_IMAGE_FLAGS),
    "reconstruct": (*_CHAIN_FLAGS, *_IMAGE_FLAGS),
    "interpolate": (*_SAMPLER_FLAGS, *_IMAGE_FLAGS, "from_t"),
    "denoise": (*_SAMPLER_FLAGS, *_IMAGE_FLAGS, "from_t"),
    "inpaint": (
        *(*_CHAIN_FLAGS, *_IMAGE_FLAGS),
        *("seed", "variance", "mask", "resample", "jump"),
    ),
    "eval": (
        *(*_SAMPLER_FLAGS, *_IMAGE_FLAGS),
        *("num_samples", "metrics", "features", "num_seeds"),
    ),
    "nll": _NLL_FLAGS,
    "rate_distortion": _NLL_FLAGS,
    "best_steps": _NLL_FLAGS,
    "report": ("out",),
}
_CALLED = {"clip": "clip_x0"}  # as the functions call them, where the flag is shorter

USER_ERRORS = (
    config.ConfigError,
    data.DataError,
    checkpoints.CheckpointError,
    train.TrainingError,
    runs.RunError,
    app.UsageError,
    OSError,  # its text names the file
)


def _workdir() -> str:
    if _WORKDIR.value:
        return _WORKDIR.value
    if CONFIG.value is None:
        raise app.UsageError("give --config=configs/NAME.py, or --workdir=DIR of a run")
    filename = config_flags.get_config_filename(flags.FLAGS["config"])
    name, _, variant = os.path.basename(filename).partition(":")
    return os.path.join("runs", "_".join(filter(None, [os.path.splitext(name)[0], variant])))


def main(argv) -> None:
    del argv  # checked by `parse_flags`
    if _DISTRIBUTED.value:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise app.UsageError(f"--distributed: {error}") from error
    parallel.enable_compilation_cache()
    workdir, mode = _workdir(), _MODE.value
    options = _options(mode)
    if mode == "train":
        if CONFIG.value is None:
            raise app.UsageError("training needs --config=configs/NAME.py")
        train.train(CONFIG.value, workdir, **options)
        return
    if mode == "report":  # before a device is asked for: a run that trains may hold it
        report.report(workdir, **options)
        return
    if jax.process_count() > 1:
        raise app.UsageError(f"--mode={mode} runs in one process; leave out --distributed")
    if CONFIG.value is not None:
        train.refuse_another_config(CONFIG.value, os.path.join(workdir, "config.json"))
    for needs, name, why in (
        ("best_steps", "steps", "--steps=S, how many of the T steps to choose"),
        ("denoise", "from_t", "--from_t=T, the time up to which noise is added, such as 250"),
    ):
        if mode == needs and name not in options:
            raise app.UsageError(f"--mode={mode} needs {why}")
    if mode == "eval":
        score.score(workdir, **options)
        return
    home = next(room for room in (sample, edit, evaluate) if hasattr(room, mode))
    getattr(home, mode)(workdir, **options)


def _options(mode: str) -> dict:
    """The flags that were given, as keyword arguments of the function that the mode is named after.

    Raises:
      UsageError: one that the mode does not hear.
    """
    given = {}
    for name in sorted({name for heard in _HEARD.values() for name in heard}):
        if not flags.FLAGS[name].present:
            continue
        if name not in _HEARD[mode]:
            modes = ", ".join(other for other, heard in _HEARD.items() if name in heard)
            near = {"seed": "config.seed", "batch_size": "config.training.batch_size"}
            near = near.get(name) if mode == "train" else None
            hint = f"; for training write --{near}" if near else ""
            raise app.UsageError(f"--{name} is for --mode={modes}, not for {mode}{hint}")
        given[_CALLED.get(name, name)] = flags.FLAGS[name].value
    return given


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with the folder above configs/ importable, and every mistake as one line."""
    given = []
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            given.append((value if equals else following).split(":")[0])
    for filename in given:
        if not os.path.isfile(filename):
            folder = os.path.dirname(filename) or "."
            names = os.listdir(folder) if os.path.isdir(folder) else []
            near = config.nearest(os.path.basename(filename), names)
            _exit(f"there is no config file {filename!r}{near}")
        sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(filename))))
    try:
        rest = flags.FLAGS(argv)
    except (
        flags.Error
    ) as error:  # a traceback inside a config file comes as text: its last line counts
        _exit(str(error).strip().splitlines()[-1])
    except (KeyError, AttributeError) as error:
        frames = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
        if frames & set(given):
            raise  # a mistake in the config file itself
        _exit("no such field of the config: " + str(error.args[0]).replace("\n", "; "))
    if len(rest) > 1:
        _exit(f"what is {rest[1]!r}? Every option begins with --")
    return rest


def _exit(line: str):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def run(main) -> None:
    """app.run(main), where a user's mistake ends as one line, and the rest as a traceback.

    Exit status 2: the command or its config is wrong; 1: the data, files or the run are; 130: Ctrl-C.
    """

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # jax, orbax and matplotlib have much to say
        try:
            main(argv)
        except KeyboardInterrupt:
            line, status = "stopped by Ctrl-C; the same command continues", 130
        except USER_ERRORS as error:
            line = f"error: {error}"
            status = 2 if isinstance(error, (config.ConfigError, app.UsageError)) else 1
        except Exception:
            if jax.process_count() == 1:
                raise
            line, status = traceback.format_exc(), 1
        else:
            return
        print(line, file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            os._exit(
                status
            )  # an orderly exit would wait for the other processes, and they for this one
        sys.exit(status)

    app.run(guarded, flags_parser=parse_flags)


if __name__ == "__main__":
    run(main)
