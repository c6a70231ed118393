"""The command line: flags, and nothing else.

python -m ddpm_jax.main --config=configs/cifar10.py                  trains; the same again resumes
python -m ddpm_jax.main --mode=sample --workdir=runs/cifar10         draws images
python -m ddpm_jax.main --mode=nll --workdir=runs/cifar10            bits/dim of the test split
python -m ddpm_jax.main --help                                       all modes; --mode=nll --help its flags
"""

import contextlib
import errno
import inspect
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from absl import app, flags, logging

import ddpm_jax
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
    writers,
)

PROGRAM = "python -m ddpm_jax.main"


class Command(NamedTuple):
    """What a mode does, and the flags that it accepts: keyword arguments of its function."""

    function: Callable
    about: str
    flags: tuple[str, ...]


_RUN = ("weights", "steps", "clip", "out", "batch_size")
_CHAIN = (*_RUN, "spacing", "guidance", "labels")
_SAMPLER = (*_CHAIN, "seed", "sampler", "eta", "order", "singlestep", "variance")
_IMAGES = ("images", "num_images", "split", "data_dir")
_NLL = (*_RUN, "seed", "variance", "num_images", "split", "data_dir", "cdf")

COMMANDS = {
    "train": Command(
        train.train,
        "Trains what --config says; the same command again resumes.",
        ("change", "distributed"),
    ),
    "sample": Command(
        sample.sample,
        "Draws images from the last checkpoint of a run.",
        (*_SAMPLER, "num_samples", "latents", "trajectory"),
    ),
    "progressive": Command(
        sample.progressive,
        "Draws samples together with the x_0 that the model predicts on the way.",
        (*_SAMPLER, "num_samples"),
    ),
    "nearest": Command(
        edit.nearest,
        "Shows samples beside the training images nearest to them.",
        (*_SAMPLER, "num_samples", "images", "data_dir", "neighbours"),
    ),
    "encode": Command(
        edit.encode, "Writes the latents x_T that DDIM leads back to images.", (*_CHAIN, *_IMAGES)
    ),
    "reconstruct": Command(
        edit.reconstruct,
        "Encodes and decodes images, and prints what is lost for several numbers of steps.",
        (*_CHAIN, *_IMAGES),
    ),
    "interpolate": Command(
        edit.interpolate,
        "Draws what lies between two images, or between two latents.",
        (*_SAMPLER, *_IMAGES, "from_t"),
    ),
    "denoise": Command(
        edit.denoise,
        "Adds noise to images up to a time, and takes it away again.",
        (*_SAMPLER, *_IMAGES, "from_t"),
    ),
    "inpaint": Command(
        edit.inpaint,
        "Fills in a part of images, and keeps the rest.",
        (*_CHAIN, *_IMAGES, "seed", "variance", "mask", "resample", "jump"),
    ),
    "eval": Command(
        score.score,
        "Measures samples by FID and other metrics.",
        (*_SAMPLER, *_IMAGES, "num_samples", "metrics", "features", "num_seeds"),
    ),
    "nll": Command(
        evaluate.nll, "Measures the variational bound of images in bits/dim, term by term.", _NLL
    ),
    "rate_distortion": Command(
        evaluate.rate_distortion, "Measures rate and distortion along the reverse chain.", _NLL
    ),
    "best_steps": Command(
        evaluate.best_steps, "Chooses the --steps=S of the T steps with the lowest bound.", _NLL
    ),
    "report": Command(
        report.report, "Writes a run, or several with commas, on one page of HTML.", ("out",)
    ),
}
_ARGUMENT = {"clip": "clip_x0"}  # the name of a flag's parameter, where it is another

# ---- flags -----------------------------------------------------------------------------------------

CONFIG = flags.DEFINE_string(
    "config",
    None,
    "The config file, as FILE.py or FILE.py:VARIANT; NAME stands for configs/NAME.py. Every field of"
    " it can be changed, as with --config.training.num_steps=5000.",
)
# What `parse_flags` makes of --config.FIELD=VALUE.
_FIELDS = flags.DEFINE_multi_string("config_field", [], "A field of the config, as FIELD=VALUE.")
_MODE = flags.DEFINE_enum("mode", "train", list(COMMANDS), "What to do; --help lists the modes.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run directory. Default: runs/ and the name of the config."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This process is one of several that train together; it calls jax.distributed.initialize().",
)
flags.DEFINE_enum(
    "weights",
    "ema",
    ["ema", "raw"],
    "The parameters to use: ema, their moving average, or raw, the last ones.",
)
flags.DEFINE_integer(
    "seed",
    0,
    "The seed of all noise; image i depends on the seed and on i alone.",
    0,
    2**32 - 1,
)
flags.DEFINE_string(
    "steps",
    None,
    "The steps of the chain: their number, such as 50; ddim50, quad50 or logsnr50 for a number with its"
    " spacing; 10,15,20 for that many in each third; or the times themselves, as [0,20,41]. best_steps takes"
    " one number, reconstruct several to compare, or chains with semicolons, as '10,15,20;45'.",
)
flags.DEFINE_enum(
    "spacing",
    None,
    list(schedules.SPACINGS),
    "How a plain number of steps is spread over the chain.",
)
flags.DEFINE_enum("sampler", None, list(samplers.SAMPLERS), "The sampler that draws the images.")
flags.DEFINE_integer("order", None, "The order of dpm_solver: 1, 2 or 3.")
flags.DEFINE_bool(
    "singlestep", None, "Lets dpm_solver take its steps in groups, not one after another."
)
flags.DEFINE_float(
    "guidance",
    None,
    "The scale of classifier-free guidance: 1 is the model with labels, 0 the one without, and more than 1"
    " exaggerates the labels.",
)
flags.DEFINE_string(
    "labels",
    None,
    "The classes of the images: cycle through all, random, one class as 3, or several as 3,5,7;"
    " classes that have names also by them, as cat,dog.",
)
flags.DEFINE_string(
    "latents", None, "An .npz that --mode=encode wrote, to be decoded in place of noise."
)
flags.DEFINE_bool(
    "trajectory", False, "Also writes the chain of the first images, as a strip and an animation."
)
flags.DEFINE_string(
    "images", None, "The images: data for the run's own, a folder of pictures or an .npz."
)
flags.DEFINE_string(
    "from_t", None, "The time up to which noise is added, or several as 250,500,750."
)
flags.DEFINE_string(
    "mask",
    None,
    f"What is filled in: the white of a picture, or one of {', '.join(edit.MASKS)}.",
)
flags.DEFINE_integer("resample", None, "How often inpaint walks each part of the chain.", 1)
flags.DEFINE_integer("jump", None, "How many steps inpaint goes back for each --resample.", 1)
flags.DEFINE_string("metrics", None, f"The metrics, with commas: {', '.join(score.METRICS)}.")
flags.DEFINE_string(
    "features",
    None,
    "The network of the features: inception, inception:FILE, or MODULE:FILE for a module with"
    " load(path) -> Extractor.",
)
flags.DEFINE_integer(
    "num_seeds",
    None,
    "How many seeds to draw with, from --seed on; a metric is then a mean with its spread.",
    1,
)
flags.DEFINE_integer(
    "neighbours", None, "How many training images are shown beside each sample.", 1
)
flags.DEFINE_string(
    "variance",
    None,
    "The variance of the reverse chain: fixed_small, fixed_large, analytic, or what was learned.",
)


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


flags.DEFINE(
    _OrWord(flags.FloatParser(), "hat"),
    "eta",
    None,
    "The noise of ddim: from 0, none, to 1, that of the ancestral chain; or hat for Song et al.'s σ̂.",
)
flags.DEFINE_flag(
    flags.BooleanFlag(
        "clip",
        None,
        "Clips predictions of x_0 to [-1, 1]; --noclip does not, and --clip=dynamic clips by percentile.",
    )
)
flags.FLAGS["clip"].parser = _OrWord(flags.BooleanParser(), "dynamic")
flags.DEFINE_string(
    "out",
    None,
    "The file to write, in an existing folder: .npz of images, .json of measurements or .html of a"
    " report, with pictures of the same name beside it.",
)
flags.DEFINE_integer("batch_size", None, "How many images are computed at a time.", 1)
flags.DEFINE_integer("num_samples", None, "How many images to draw.", 1)
flags.DEFINE_integer("num_images", None, "How many images to use.", 1)
flags.DEFINE_string("split", "test", "The split of the data, such as train or test.")
flags.DEFINE_list(
    "change",
    [],
    "What may differ from the run that is continued: data, for other images than it began with.",
)
flags.DEFINE_string("data_dir", None, "The folder where the data are.")
flags.DEFINE_string(
    "cdf", None, "The distribution function of the decoder: normal, or tanh as in Ho et al.'s code."
)

# Defaults in words, of a flag or of a mode's flag, where the signature of the function has None or nothing.
_DEFAULTS = {
    "batch_size": "what suits the device",
    "benchmark.batch_size": "as in the config",
    "best_steps.steps": "none, it must be given",
    "cdf": "normal",
    "clip": "as in the config",
    "data_dir": "as in the config",
    "denoise.from_t": "none, it must be given",
    "encode.steps": "50",
    "eta": "0",
    "from_t": "latents are interpolated, without noise",
    "guidance": "1",
    "images": "samples are drawn",
    "interpolate.images": "latents drawn from noise, or data with --from_t",
    "interpolate.sampler": "ddim, or ancestral with --from_t",
    "interpolate.steps": "50, or all T with --from_t",
    "jump": "10",
    "labels": "those of the images",
    "num_images": "all",
    "num_samples": "64, or as many as there are --latents",
    "eval.num_samples": "50000",
    "order": "2",
    "out": "a file in the run directory, named after what was asked",
    "reconstruct.steps": "10,20,50,100",
    "report.out": "report.html in the run directory, or comparison.html here for several",
    "resample": "10",
    "sampler": "ancestral",
    "singlestep": "false",
    "spacing": "uniform",
    "split": "test",
    "steps": "all T",
    "variance": "as in the config",
}
_ABSL = {"h", "help", "helpshort", "helpfull"}  # absl's help has other flags than ours

USER_ERRORS = (
    config.ConfigError,
    data.DataError,
    checkpoints.CheckpointError,
    train.TrainingError,
    runs.RunError,
    app.UsageError,
    OSError,  # its text names the file
)


# ---- what a mode does --------------------------------------------------------------------------------


def given_config():
    """The config of --config with its --config.FIELD=VALUE, or None.

    A data set other than that of the config file has its own image_shape, unless one is given.

    Raises:
      ConfigError, UsageError: one line.
    """
    changes = dict(text.split("=", 1) for text in _FIELDS.value)
    if CONFIG.value is None:
        if changes:
            field = next(iter(changes))
            raise app.UsageError(f"--config.{field} needs --config=configs/NAME.py beside it")
        return None
    result = config.from_file(CONFIG.value)
    before = config.fields(result).get("data.name")
    for field, text in changes.items():
        config.override(result, field, text)
    after = config.fields(result).get("data.name")
    own_data = after != before and after not in data.BUILT_IN
    if own_data and "data.image_shape" not in changes:
        config.override(result, "data.image_shape", "None")
    return result


def _workdir() -> str:
    if _WORKDIR.value:
        return config.path(_WORKDIR.value)
    if CONFIG.value is None:
        raise app.UsageError("give --config=configs/NAME.py, or --workdir=DIR of a run")
    name, _, variant = os.path.basename(config.find_file(CONFIG.value)).partition(":")
    return os.path.join("runs", "_".join(filter(None, [os.path.splitext(name)[0], variant])))


def main(argv) -> None:
    del argv  # checked by `parse_flags`
    mode = _MODE.value
    options = given_options(f"--mode={mode}", COMMANDS[mode].flags)
    if options.pop("distributed", False):
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise app.UsageError(f"--distributed: {error}") from error
    parallel.enable_compilation_cache()
    workdir, settings = _workdir(), given_config()
    if mode == "train":
        if settings is None:
            raise app.UsageError("training needs --config=configs/NAME.py")
        train.train(settings, workdir, **options)
        return
    if settings is not None and mode != "report":
        train.refuse_another_config(settings, os.path.join(workdir, "config.json"))
    for needs, name, why in (
        ("best_steps", "steps", "--steps=S, how many of the T steps to choose"),
        ("denoise", "from_t", "--from_t=T, the time up to which noise is added, such as 250"),
    ):
        if mode == needs and name not in options:
            raise app.UsageError(f"--mode={mode} needs {why}")
    with _advice_on_writing(workdir):
        COMMANDS[mode].function(workdir, **options)


@contextlib.contextmanager
def _advice_on_writing(workdir: str):
    """Says what to do about a run directory that may be read and not written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise runs.RunError(
            f"{error}; if the run directory {workdir} cannot be written, give --out=FILE in a folder that"
            " can, or a copy of the run as --workdir"
        ) from error


def given_options(what: str, accepted: Sequence[str]) -> dict:
    """The flags that were given, as keyword arguments of a function.

    Args:
      what: what runs, for messages, such as --mode=sample.
      accepted: the flags that it accepts.

    Raises:
      UsageError: one that it does not accept.
    """
    given = {}
    for name in sorted({name for command in COMMANDS.values() for name in command.flags}):
        if not flags.FLAGS[name].present:
            continue
        if name not in accepted:
            modes = ", ".join(mode for mode, command in COMMANDS.items() if name in command.flags)
            near = {"seed": "config.seed", "batch_size": "config.training.batch_size"}
            near = near.get(name) if what == "--mode=train" else None
            hint = f"; for training write --{near}" if near else ""
            raise app.UsageError(
                f"--{name} is for --mode={modes}, not for {what.removeprefix('--mode=')}{hint}"
            )
        given[_ARGUMENT.get(name, name)] = flags.FLAGS[name].value
    return given


# ---- help ------------------------------------------------------------------------------------------


def help_text() -> str:
    """What --help prints: the modes, or the flags of the --mode that is given, or a config's fields."""
    mode = flags.FLAGS["mode"]
    settings = given_config()
    if not mode.present and settings is None:
        modes = "\n".join(f"  {name:16} {command.about}" for name, command in COMMANDS.items())
        return (
            f"{PROGRAM} --config=configs/NAME.py [--workdir=DIR] [--config.FIELD=VALUE …]\n"
            f"{PROGRAM} --mode=MODE --workdir=DIR [--FLAG=VALUE …]\n\n"
            f"Modes (default: train):\n\n{modes}\n\n"
            f"{PROGRAM} --mode=MODE --help                lists the flags of a mode.\n"
            f"{PROGRAM} --config=configs/NAME.py --help   lists the fields of a config.\n"
            f"{PROGRAM} --version                         prints the version.\n"
        )
    command = COMMANDS[mode.value]
    text = f"{PROGRAM} --mode={mode.value}\n\n{command.about}\n\n" + help_on(
        ("config", "workdir", *command.flags), command.function, mode.value
    )
    if settings is not None:
        text += f"\nThe fields of {CONFIG.value}, with their values:\n\n"
        for field, value in config.fields(settings).items():
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            text += f"  --config.{field}={value}\n"
    return text


def help_on(names: Sequence[str], function: Callable, mode: str = "") -> str:
    """Flags with their help, and with defaults from the signature of a function or in words."""
    parameters = inspect.signature(function).parameters
    lines = []
    for name in names:
        flag, default = flags.FLAGS[name], None
        argument = _ARGUMENT.get(name, name)
        if argument in parameters:
            default = parameters[argument].default
        if default in (None, inspect.Parameter.empty):
            default = _DEFAULTS.get(f"{mode}.{name}", _DEFAULTS.get(name, flag.default))
        choices = getattr(flag.parser, "enum_values", None)
        text = re.sub(r"^<.*?>: ", "", flag.help)  # absl puts the choices there
        default = str(default).lower() if isinstance(default, bool) else default
        text += "" if default is None else f" Default: {default}."
        word = f"--[no]{name}" if flag.boolean else f"--{name}={'|'.join(choices or ['VALUE'])}"
        lines += [f"  {word}", textwrap.indent(textwrap.fill(text, 92), " " * 6)]
    return "\n".join(lines) + "\n"


# ---- the command line ------------------------------------------------------------------------------


def parse_flags(argv: list[str], usage: Callable[[], str] = help_text) -> list[str]:
    """absl's parser for flags and --config.FIELD=VALUE, with every mistake as one line.

    Args:
      usage: what --help prints.
    """
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    rest, wants_help = [], False
    following = iter([*argv, None])
    argument = next(following)
    while argument is not None:
        ahead = next(following)
        name, equals, value = argument.partition("=")
        field = re.fullmatch(r"--?(no)?config\.(.+)", name)
        if name.lstrip("-") in _ABSL and name.startswith("-"):
            wants_help = True
        elif name in ("-version", "--version"):
            print(f"ddpm_jax {ddpm_jax.__version__}")
            sys.exit(0)
        elif field:
            if not equals:
                value = "false" if field[1] else "true"
                if not field[1] and ahead is not None and not ahead.startswith("--"):
                    value, ahead = ahead, next(following)
            rest.append(f"--config_field={field[2]}={value}")
        else:
            rest.append(argument)
        argument = ahead
    try:
        left = flags.FLAGS(rest)
        if wants_help:
            print(usage(), end="")
            sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        _exit(f"there is no flag --{error.flagname}{_near_flag(error.flagname, rest)}")
    except (flags.Error, config.ConfigError, app.UsageError) as error:
        _exit(str(error).strip().splitlines()[-1])
    if len(left) > 1:
        word = left[1]
        hint = f"; for that write --mode={word}" if word in COMMANDS else ""
        _exit(f"what is {word!r}? Every option begins with --{hint}")
    return left


def _near_flag(name: str, argv: list[str]) -> str:
    """ "; did you mean …?" of an unknown flag: a field of the config, or a flag of the mode."""
    given = dict(argument.lstrip("-").partition("=")[::2] for argument in argv[1:])
    mode = given.get("mode", "train")
    if "config" in given:
        try:
            fields = config.fields(config.from_file(given["config"]))
        except config.ConfigError:
            fields = {}
        exact = [field for field in fields if name in (field, field.rpartition(".")[2])]
        if exact or "." in name:
            return config.near_field(name, fields)
    names = ["config", "workdir", "mode", *COMMANDS.get(mode, COMMANDS["train"]).flags]
    if mode == "train":
        names += [flag for command in COMMANDS.values() for flag in command.flags]
    whole = [flag for flag in dict.fromkeys(names) if flag in name.split("_")]
    return config.nearest(whole[0] if whole else name, names, prefix="--")


def _exit(line: str):
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def run(main, usage: Callable[[], str] = help_text) -> None:
    """app.run(main), where a user's mistake ends as one line, and the rest as a traceback.

    Exit status 2: the command or its config is wrong; 1: the data, files or the run are; 130: Ctrl-C.

    Args:
      usage: what --help prints.
    """

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)  # jax, orbax and matplotlib have much to say
        try:
            main(argv)
        except KeyboardInterrupt as error:
            print(str(error) or "stopped by Ctrl-C", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(130)  # an orderly exit would wait for what the device is doing
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

    sys.stdout, sys.stderr = (writers.Heedless(stream) for stream in (sys.stdout, sys.stderr))
    app.run(guarded, flags_parser=lambda argv: parse_flags(argv, usage))


if __name__ == "__main__":
    run(main)
