"""The command line: flags, and nothing else.

python -m ddpm_jax.main --config=configs/cifar10.py                  trains; the same again resumes
python -m ddpm_jax.main --mode=sample --workdir=runs/cifar10         draws images
python -m ddpm_jax.main --mode=nll --workdir=runs/cifar10            bits/dim of the test split

Other modes: progressive (x_0 as seen on the way), rate_distortion, best_steps (of a shortened chain).
"""

import os
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ddpm_jax import checkpoints, config, data, evaluate, parallel, runs, sample, train

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py or FILE.py:VARIANT with a get_config(); fields: --config.seed=1 …"
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "sample", "progressive", "nll", "rate_distortion", "best_steps"],
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
    "steps", None, "Of the chain: 50, ddim50, quad50, 10,15,20 or [0,20,41]; best_steps: how many."
)
_VARIANCE = flags.DEFINE_string("variance", None, "Of the reverse chain; else the config's.")
_CLIP = flags.DEFINE_bool("clip", None, "Clip x_0 to [-1, 1]; else as the config says.")
_OUT = flags.DEFINE_string(
    "out", None, "What to write, and a picture beside it: .npz of images, .json of measurements."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time.", 1)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "How many images to draw.", 1)
_NUM_IMAGES = flags.DEFINE_integer("num_images", None, "How many to measure; else all.", 1)
_SPLIT = flags.DEFINE_string("split", "test", "Of the data.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data are; else as the config says.")
_CDF = flags.DEFINE_string("cdf", None, "Of the decoder: normal, or tanh as in Ho et al.'s code.")

# Which flags a mode hears. A flag that it would not hear is refused.
_RUN_FLAGS = ("weights", "seed", "steps", "variance", "clip", "out")
_NLL_FLAGS = (*_RUN_FLAGS, "batch_size", "num_images", "split", "data_dir", "cdf")
_HEARD = {
    "train": (),
    "sample": (*_RUN_FLAGS, "batch_size", "num_samples"),
    "progressive": (*_RUN_FLAGS, "batch_size", "num_samples"),
    "nll": _NLL_FLAGS,
    "rate_distortion": _NLL_FLAGS,
    "best_steps": _NLL_FLAGS,
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
        train.train(CONFIG.value, workdir)
        return
    if jax.process_count() > 1:
        raise app.UsageError(f"--mode={mode} runs in one process; leave out --distributed")
    if CONFIG.value is not None:
        train.refuse_another_config(CONFIG.value, os.path.join(workdir, "config.json"))
    if mode == "best_steps" and "steps" not in options:
        raise app.UsageError("--mode=best_steps needs --steps=S, how many of the T steps to choose")
    home = sample if mode in ("sample", "progressive") else evaluate
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
