"""Checkpoints that are complete, verified and never silently lost; the only file that imports orbax.

A checkpoint is the directory `<directory>/<step>`, written as `<step>.tmp` and then renamed. In it, orbax keeps the leaves
in `state` as a flat dictionary {"params/conv_in/kernel": array}, and `meta.json` has dtype, shape and SHA-256 of every leaf
and the SHA-256 of every file: orbax itself restores a flipped byte as a wrong number.

With several processes, all call `save` and `restore` with the same host values on a shared file system. Process 0
writes; all read by themselves, and agree on what all could read.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from ddpm_jax import processes, watch
from ddpm_jax.files.writers import free_space, sync

# orbax writes to absl's logger: dozens of INFO lines per checkpoint, warnings that synchronous saving is slow
# (0.11.25), and a traceback for a full disk, which it also raises.
logging.get_absl_logger().addFilter(
    lambda line: not line.pathname.startswith(os.path.dirname(ocp.__file__))
)

RENAMED = {"memory": "loss_state"}  # first parts of leaf names in older checkpoints, and today's


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; one line that names it and what to do."""


def save(
    directory: str | os.PathLike,
    state: Any,
    *,
    step: int,
    keep: int = 3,
    values: Mapping[str, float] | None = None,
    keep_best: str | None = None,
) -> str:
    """Saves `state`, a pytree of arrays, as `directory/<step>`; returns once it is complete and on the disk.

    A directory of that name is left alone if it holds exactly this state; otherwise it is renamed to `<step>.damaged` or
    `<step>.replaced`. Of the checkpoints up to `step`, the newest `keep` stay, and the best; while saving, there is one more.

    Args:
      values: numbers on which checkpoints are compared, saved in `meta.json`.
      keep_best: the name of a value; the best checkpoint has its lowest, of "-NAME" its highest.

    Returns:
      the value by which this checkpoint is now the best, in words; empty if it is not.

    Raises:
      CheckpointError: a value is not finite, or the checkpoint cannot be written (disk full, no
        permission). The earlier checkpoints are then as they were.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    directory, words = Path(directory).absolute(), ""
    with watch.finishing:
        if processes.is_first() and _write(directory, state, step, values or {}):
            best, value = prune(directory, step=step, keep=keep, keep_best=keep_best)
            words = f"{keep_best.removeprefix('-')} {value:.6g}" if best == step else ""
    processes.barrier(f"saved {directory / str(step)}")
    return words


def _write(directory: Path, state: Any, step: int, values: Mapping[str, float]) -> bool:
    """Writes a checkpoint, in one process; False if exactly this one exists. Raises as `save`."""
    path, temporary = directory / f"{step}", directory / f"{step}.tmp"
    arrays = {name: np.asarray(leaf) for name, leaf in _flatten(jax.device_get(state)).items()}
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
            raise CheckpointError(
                f"{path}: not saved, since {name} is not finite; the run has diverged, "
                "so restart it from an earlier checkpoint with other settings"
            )
    leaves = _describe(arrays)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove(directory.glob("[0-9]*.tmp"))  # left by killed saves and deletions
        fault = _fault(path, leaves) if path.exists() else None
        if path.exists() and fault is None:
            return False
        if (needed := size_of(arrays)) > (free := free_space(directory)):
            raise OSError(f"it takes {needed:,} bytes, and {free:,} are free")
        sys.unraisablehook = _without_closed_loops(sys.unraisablehook)
        with _checkpointer() as checkpointer:
            # It refuses arrays of size 0; `meta.json` describes them completely.
            args = ocp.args.StandardSave({n: a for n, a in arrays.items() if a.size})
            checkpointer.save(temporary / "state", args=args)
        meta = {"leaves": leaves, "files": _sha256_files(temporary), "values": values}
        meta["sha256"] = _sha256_json(meta)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        for part in (*temporary.rglob("*"), temporary):
            sync(part)
        if fault is not None:  # only now, so that a failed save leaves the old directory alone
            aside = _set_aside(path, fault[1])
            logging.warning("%s is saved again (%s); the old one is now %s", path, fault[0], aside)
        temporary.rename(path)
        sync(directory)
    except BaseException as error:  # OSError, or the error that orbax raises for it
        _remove([temporary])
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        raise CheckpointError(
            f"{path}: not saved ({_line(error)}); earlier checkpoints are untouched: "
            "free space or correct the permissions, then run the same command again"
        ) from error
    return True


def prune(
    directory: str | os.PathLike, *, step: int, keep: int, keep_best: str | None = None
) -> tuple[int | None, float]:
    """Deletes checkpoints as a save does, and returns the step and the value of the best."""
    directory = Path(directory).absolute()
    best, value = best_of(directory, keep_best) or (None, 0.0)
    newest = [s for s in complete_steps(directory) if s <= step][-keep:]
    old = (s for s in _steps(directory) if newest and s < newest[0] and s != best)
    _remove(directory / str(s) for s in old)
    return best, value


def restore(
    directory: str | os.PathLike, template: Any, *, step: int | None = None, partial: bool = False
) -> tuple[Any, int] | None:
    """Returns the newest good checkpoint and its step, or None if there is no checkpoint at all.

    Changes nothing on disk, so a run may be read while it trains. A damaged checkpoint is reported
    by a warning and passed over for the one before it.

    Args:
      template: the expected tree of `jax.ShapeDtypeStruct`, as `jax.eval_shape` returns it; the
        result has its structure, with NumPy arrays as leaves.
      step: reads this checkpoint only.
      partial: the template may lack leaves that are saved.

    Raises:
      CheckpointError: the checkpoint does not fit the template, every checkpoint is damaged, or the requested step does
        not exist.
    """
    directory = Path(directory).absolute()
    expected, structure = _flatten(template), jax.tree.structure(template)
    damaged: dict[int, str] = {}

    def untried() -> list[int]:
        return [s for s in _steps(directory) if s not in damaged and step in (None, s)]

    # Listed again each time: a running training adds checkpoints and deletes old ones.
    while steps := processes.from_first(untried):
        newest, error = steps[-1], None
        path = directory / str(newest)
        try:
            arrays = _read(path, expected, partial)
        except Exception as caught:  # a damaged file can raise anything
            error = caught
        refused = isinstance(error, (CheckpointError, MemoryError))
        if processes.any_process(refused):
            raise error if refused else CheckpointError(f"{path}: another process cannot use it")
        if not processes.any_process(error is not None):
            return jax.tree.unflatten(structure, [arrays[name] for name in expected]), newest
        if processes.from_first(path.exists):
            damaged[newest] = _line(error) if error else "another process could not read it"
            logging.warning("%s is damaged and passed over: %s", path, damaged[newest])
    if damaged:
        reasons = "; ".join(f"{s} ({reason})" for s, reason in damaged.items())
        raise CheckpointError(
            f"{directory}: no good checkpoint, damaged: {reasons}; "
            "restore a copy, or move them away to start from scratch"
        )
    if step is not None:
        steps = ", ".join(map(str, _steps(directory))) or "none"
        raise CheckpointError(f"{directory}: no checkpoint of step {step}; there are: {steps}")
    return None


def set_aside_damaged(directory: str | os.PathLike, *, above: int) -> list[str]:
    """Renames checkpoints above a step, which `restore` has passed over, to `<step>.damaged`; returns lines that say so."""
    directory = Path(directory).absolute()
    paths = [directory / str(step) for step in _steps(directory) if step > above]
    return [f"{path} is damaged; it is now {_set_aside(path, 'damaged')}" for path in paths]


def latest_step(directory: str | os.PathLike) -> int | None:
    """The newest of the `complete_steps`, or None."""
    return max(complete_steps(directory), default=None)


def complete_steps(directory: str | os.PathLike) -> list[int]:
    """The steps that were saved completely (their arrays are not verified), in ascending order."""
    directory = Path(directory).absolute()
    return [s for s in _steps(directory) if _is_complete(directory / str(s))]


def best_of(directory: str | os.PathLike, name: str | None) -> tuple[int, float] | None:
    """The step and the value of the checkpoint with the lowest value of this name, of "-NAME" the highest.

    Of equal ones it is the first. None if the name is None, or no complete checkpoint has such a value.
    """
    if name is None:
        return None
    sign, found = -1 if name.startswith("-") else 1, []
    for step in complete_steps(directory):
        meta = _read_meta(Path(directory).absolute() / str(step))
        values = meta.get("values")  # older checkpoints have none
        value = values.get(name.removeprefix("-")) if isinstance(values, dict) else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append((sign * value, step))
    value, step = min(found, default=(0.0, None))
    return None if step is None else (step, sign * value)


def size_of(state: Any) -> int:
    """The bytes that a checkpoint of a pytree of arrays takes; zstd saves 8 % at most once the moments are not zero."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _flatten(tree: Any) -> dict[str, Any]:
    """A tree as {"params/conv_in/kernel": leaf}, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError("two leaves of the state have the same path: a key contains '/'")
    return flat


def _describe(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    """{name: [dtype, shape, SHA-256]} of arrays; 570 MB take 0.2 s on 2 cores, since hashlib releases the GIL."""

    def sha256(array: np.ndarray) -> str:
        return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()

    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256, arrays.values())
        return {
            name: [str(array.dtype), list(array.shape), digest]
            for (name, array), digest in zip(arrays.items(), digests, strict=True)
        }


def _sha256_files(path: Path) -> dict[str, str]:
    """{file: SHA-256} of all non-empty files."""

    def sha256(file: Path) -> str:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    files = sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size)
    with ThreadPoolExecutor() as pool:
        return {
            str(f.relative_to(path)): s for f, s in zip(files, pool.map(sha256, files), strict=True)
        }


def _sha256_json(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _checkpointer() -> ocp.Checkpointer:
    """A synchronous Checkpointer that waits for no other process; a CheckpointManager refuses a step below the newest."""
    me = processes.index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _without_closed_loops(hook: Callable) -> Callable:
    """A `sys.unraisablehook` without what orbax's threads say once one of many files could not be written."""
    if getattr(hook, "is_without_closed_loops", False):
        return hook

    def unraisable(one):
        if str(one.exc_value) != "Event loop is closed":
            hook(one)

    unraisable.is_without_closed_loops = True
    return unraisable


def _read_meta(path: Path, *, with_files: bool = False) -> dict[str, Any]:
    """The contents of `meta.json`; raises anything if it, or one of the files that it lists, is damaged."""
    meta = json.loads((path / "meta.json").read_text())
    if meta.pop("sha256") != _sha256_json(meta):
        raise ValueError("meta.json has changed since it was written")
    if with_files:  # of a damaged one orbax 0.12 leaves a traceback for each of the other leaves
        found = _sha256_files(path)
        for name, sha256 in meta["files"].items():
            if found.get(name) != sha256:
                raise ValueError(f"{name} has changed since it was written")
    return meta


def _read(path: Path, expected: dict, partial: bool) -> dict[str, np.ndarray]:
    """All leaves under their current names; raises anything if the checkpoint is damaged."""
    try:
        meta = _read_meta(path, with_files=True)  # what is damaged need not fit
        _check_template(path, _as_today(meta["leaves"]), expected, partial)
        arrays = _as_today(_read_arrays(path, meta["leaves"]))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except OSError as error:  # of the disk or the network: perhaps it can be read another time
        raise CheckpointError(f"{path} cannot be read: {error}; run again, or move it") from error
    if arrays.get("step", int(path.name)) != int(path.name):  # no digest holds the directory's name
        raise ValueError(f"it holds step {arrays['step']}: the directory was renamed")
    return arrays


def _read_arrays(path: Path, leaves: dict[str, list]) -> dict[str, np.ndarray]:
    """All leaves, verified; raises anything if one is damaged."""
    arrays = {name: np.empty(shape, jnp.dtype(dtype)) for name, (dtype, shape, _) in leaves.items()}
    with _checkpointer() as checkpointer:
        args = ocp.args.StandardRestore({n: a for n, a in arrays.items() if a.size})
        arrays |= checkpointer.restore(path / "state", args=args)
    for name, found in _describe(arrays).items():
        if found != leaves[name]:
            raise ValueError(f"{name} does not have its saved SHA-256")
    return arrays


def _check_template(path: Path, leaves: dict, expected: dict, partial: bool) -> None:
    """Raises a CheckpointError that names the first leaf that differs from the template."""
    saved = {name: f"{dtype}{shape}" for name, (dtype, shape, _) in leaves.items()}
    wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in expected.items()}
    for name in wanted if partial else wanted | saved:
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{path}: {name} is saved as {saved.get(name, 'nothing')} and expected as "
                f"{wanted.get(name, 'nothing')}: the config differs from the one that wrote this "
                "checkpoint"
            )


def _as_today(leaves: dict[str, Any]) -> dict[str, Any]:
    """The leaves under their current names."""
    parts = {name: name.partition("/") for name in leaves}
    return {RENAMED.get(a, a) + slash + b: leaves[name] for name, (a, slash, b) in parts.items()}


def _steps(directory: Path) -> list[int]:
    """The steps with a directory, complete or not, in ascending order."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def _is_complete(path: Path) -> bool:
    try:
        return bool(_read_meta(path))
    except Exception:
        return False


def _fault(path: Path, leaves: dict[str, list]) -> tuple[str, str] | None:
    """Why `path` does not hold exactly `leaves`, and the suffix to rename it by; None if it does."""
    try:
        meta = _read_meta(path, with_files=True)
        if meta["leaves"] == leaves and _read_arrays(path, leaves):
            return None
        return "it holds other values", "replaced"
    except Exception as error:
        return _line(error), "damaged"


def _set_aside(path: Path, suffix: str) -> Path:
    """Renames a checkpoint to `<step>.<suffix>`, with a number if that is taken; the new path."""
    free = (Path(f"{path}.{suffix}{n}") for n in ("", *range(2, 1000)))
    return path.rename(next(name for name in free if not name.exists()))


def _remove(paths: Iterable[Path]) -> None:
    """Renames directories before deleting them: a kill in between leaves no half checkpoint."""
    for path in list(paths):
        try:
            if path.is_dir():
                shutil.rmtree(path.rename(path.with_suffix(".tmp")))
        except OSError as error:
            logging.warning("%s could not be deleted: %s", path, error)


def _line(error: Exception) -> str:
    """An error on one line of bounded length, with its start and its end, where orbax names what and why."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line if len(line) <= 240 else f"{line[:80]} … {line[-160:]}"
