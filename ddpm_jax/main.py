"""The command line: flags, and nothing else.

python -m ddpm_jax.main --config=configs/cifar10.py                  trains; the same again resumes
python -m ddpm_jax.main --mode=sample --workdir=runs/cifar10         draws images
"""

import os
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ddpm_jax import checkpoints, config, data, parallel, sample, train

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py or FILE.py:VARIANT with a get_config(); fields: --config.seed=1 …"
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample"], "What to do.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; runs/<name of the config> if not given."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "This is one of several processes: calls jax.distributed.initialize()."
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 64, "sample: how many images.", lower_bound=1)
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "sample: which parameters.")
_SEED = flags.DEFINE_integer("seed", 0, "sample: image i depends on the seed and i alone.")
_VARIANCE = flags.DEFINE_string("variance", None, "sample: reverse variance; else the config's.")
_CLIP = flags.DEFINE_bool("clip", None, "sample: clip x_0 to [-1, 1]; else as the config says.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "sample: images at a time; else 64.", 1)
_OUT = flags.DEFINE_string("out", None, "sample: the .npz to write, with a grid as .png beside it.")

USER_ERRORS = (
    config.ConfigError,
    data.DataError,
    checkpoints.CheckpointError,
    train.TrainingError,
    sample.SampleError,
    app.UsageError,
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
    logging.set_verbosity(logging.WARNING)  # jax, orbax and matplotlib have much to say
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Every option begins with --")
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    parallel.enable_compilation_cache()
    workdir = _workdir()
    if _MODE.value == "train":
        if CONFIG.value is None:
            raise app.UsageError("training needs --config=configs/NAME.py")
        train.train(CONFIG.value, workdir)
    else:
        if CONFIG.value is not None:
            train.refuse_another_config(CONFIG.value, os.path.join(workdir, "config.json"))
        sample.sample(
            workdir,
            num_samples=_NUM_SAMPLES.value,
            weights=_WEIGHTS.value,
            seed=_SEED.value,
            batch_size=BATCH_SIZE.value or 64,
            out=_OUT.value,
            variance=_VARIANCE.value,
            clip_x0=_CLIP.value,
        )


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with the folder above configs/ importable, and every mistake as one line."""
    given = [
        value for key, _, value in (a.lstrip("-").partition("=") for a in argv) if key == "config"
    ]
    for filename in (value.split(":")[0] for value in given):
        if not os.path.isfile(filename):
            folder = os.path.dirname(filename) or "."
            names = os.listdir(folder) if os.path.isdir(folder) else []
            near = config.nearest(os.path.basename(filename), names)
            _exit(f"there is no config file {filename!r}{near}")
        sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(filename))))
    try:
        return flags.FLAGS(argv)
    except (
        flags.Error
    ) as error:  # a traceback inside a config file comes as text: its last line counts
        _exit(str(error).strip().splitlines()[-1])
    except (KeyError, AttributeError) as error:
        frames = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
        if frames & {value.split(":")[0] for value in given}:
            raise  # a mistake in the config file itself
        _exit("no such field of the config: " + str(error.args[0]).replace("\n", "; "))


def _exit(line: str):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def run(main) -> None:
    """app.run(main), where a user's mistake ends as one line with status 2, and the rest as a traceback."""

    def guarded(argv):
        try:
            main(argv)
        except USER_ERRORS as error:
            line, status = (
                f"error: {error}",
                2 if isinstance(error, (config.ConfigError, app.UsageError)) else 1,
            )
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
