"""Results that survive interruptions and are never mixed with those of other settings."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from ddpm_jax import data, processes
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import locks, writers
from ddpm_jax.files.run_data import RunError

RECIPE = "recipe.json"  # in a folder of results: the settings that affect them
FOLDERS = ("eval", "samples")  # folders in a run directory that commands write to
PNG_THREADS, PNG_WAITING = (
    2,
    1024,
)  # threads that write PNG files, and how many images may wait for them
CRC_SIZE = 4  # bytes of a CRC-32
CHOSEN = "by a fixed permutation"  # the name of `data.choose` in recipes


def out_path(out: str, extension: str, workdir: str | None = None) -> str:
    """The absolute path of an output file.

    Args:
      out: path as the user writes it.
      workdir: a run directory, whose result folders are created when needed, as `runs` is.

    Raises:
      RunError: wrong extension, or a folder that does not exist.
    """
    path = os.path.abspath(config_lib.path(out))
    if not path.endswith(extension):
        raise RunError(f"--out must end in {extension}, got {out}")
    folder = os.path.dirname(path)
    workdir = workdir and os.path.abspath(config_lib.path(workdir))
    made = [os.path.join(workdir, name) for name in FOLDERS] if workdir else []
    if not os.path.isdir(folder) and folder not in [*made, os.path.abspath("runs")]:
        raise RunError(
            f"there is no folder {folder} to write {path} in; create it, or choose another --out"
        )
    return path


def read_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz that this program wrote.

    Raises:
      RunError: the file is missing or cannot be read.
    """
    try:
        with data.open_npz(path) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise RunError(f"there is no file {path}") from None
    except (PermissionError, IsADirectoryError) as error:
        raise RunError(f"{path} cannot be opened: {error.strerror}") from None
    except Exception:  # zipfile, zlib and NumPy each raise their own
        line = f"{path} cannot be read as an .npz; move it away, or choose another --out"
        raise RunError(line) from None


@contextlib.contextmanager
def in_progress(
    out: str, recipe: dict, *, named: bool = True, check: Callable | None = None
) -> Iterator[tuple[str, dict | None]]:
    """A folder OUT.partial/ for unfinished work, locked and removed at the end by the first process.

    Args:
      out: the .npz that will be written, with its recipe as the JSON string `recipe`.
      recipe: the settings that affect the result. An existing folder or .npz must have the
        same, apart from paths.
      named: the user has named `out`, so a result of another recipe is refused. Otherwise it is renamed to
        OUT.replaced, and the result is computed again.
      check: arrays of an existing .npz, finished or OUT.partial/tally.npz -> whether they are still valid.

    Yields:
      the folder, and the arrays of an existing .npz, or None.

    Raises:
      RunError: existing results have another recipe.
      CheckpointError: another process is working on it.
    """
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    folder = f"{out}.partial"
    remove = []  # in the first process
    with contextlib.ExitStack() as stack:

        def prepare() -> bool:
            # Another program may be working on it.
            remove.append(stack.enter_context(locks.lock(folder)))
            try:
                return _prepare(out, folder, recipe, named, check)
            finally:
                if os.listdir(folder) == [locks.LOCK]:  # refused, and it was empty before
                    remove[0]()

        finished = read_npz(out) if processes.from_first(prepare) else None
        yield folder, finished and {k: v for k, v in finished.items() if k != "recipe"}
        processes.barrier(f"{out} is written")  # nobody reads the folder any more
        if processes.is_first():
            for name in set(os.listdir(folder)) - {RECIPE, locks.LOCK}:
                path = os.path.join(folder, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
            os.remove(os.path.join(folder, RECIPE))  # last: until then it says what the others are
            remove[0]()


def _prepare(out: str, folder: str, recipe: dict, named: bool, check: Callable | None) -> bool:
    """Sets aside results of other settings, and says whether `out` is finished; arguments as for `in_progress`."""

    def matches(saved) -> bool:
        return isinstance(saved, dict) and _without_paths(saved) == _without_paths(recipe)

    def set_aside(path):
        line = f"{path} was made with other settings or from other images"
        if named:
            raise RunError(f"{line}; move it, or choose another --out")
        aside = free_name(f"{path}.replaced")
        print(f"{line}: it is now {aside}", flush=True)
        if path == out:
            os.rename(out, aside)
            return
        os.mkdir(aside)  # the folder itself holds the lock
        for name in set(os.listdir(folder)) - {locks.LOCK}:
            os.rename(os.path.join(folder, name), os.path.join(aside, name))

    recipe_path, is_finished = os.path.join(folder, RECIPE), os.path.exists(out)
    if is_finished:
        arrays = read_npz(out)
        saved = None
        with contextlib.suppress(ValueError):
            saved = writers.parse_object(str(arrays.pop("recipe", "")))
        if not matches(saved) or (check and not check(arrays)):
            set_aside(out)
            is_finished = False
    if os.path.exists(recipe_path):
        try:
            saved = writers.read_json(recipe_path)
        except ValueError:
            line = f"{recipe_path} cannot be read; delete {folder} and run again"
            raise RunError(line) from None
        tally = os.path.join(folder, "tally.npz")
        valid = not check or not os.path.exists(tally) or check(read_npz(tally))
        if not matches(saved) or not valid:
            set_aside(folder)
    elif set(os.listdir(folder)) - {
        locks.LOCK,
        "recipe.tmp.json",
    }:  # nothing says what these rows are
        set_aside(folder)
    writers.save_text(recipe_path, json.dumps(recipe))
    return is_finished


@contextlib.contextmanager
def png_folder(out: str, recipe: dict, *, named: bool) -> Iterator[Callable]:
    """A folder beside an .npz, named like it, with its images as 000000.png, 000001.png and so on.

    Threads of the first process write the files; the context ends when all are complete and on the disk. Files that exist
    are left as they are, unless they are empty, as a power failure leaves them.

    Args:
      out, recipe, named: as for `in_progress`; the folder holds recipe.json.

    Yields:
      a function (first, images uint8 [N, H, W, C]) that writes the images with the numbers first, first + 1, …

    Raises:
      RunError: a folder of another recipe, images of more than four channels.
    """
    if not processes.is_first():
        yield lambda first, images: None
        return
    folder, recipe = out.removesuffix(".npz"), json.loads(json.dumps(recipe))
    path = os.path.join(folder, RECIPE)
    if os.path.exists(folder) and not _has_recipe(path, recipe):
        line = f"{folder} holds other files than the PNG files of these settings"
        if named:
            raise RunError(f"{line}; move it, or choose another --out")
        aside = free_name(f"{folder}.replaced")
        print(f"{line}: it is now {aside}", flush=True)
        os.rename(folder, aside)
    writers.make_folder_of(path)
    writers.save_text(path, json.dumps(recipe))
    writers.written[folder] = writers.written.pop(path)  # instead of thousands of files
    names = {file.name for file in os.scandir(folder) if file.stat(follow_symlinks=False).st_size}
    for name in os.listdir(folder):
        if name.endswith(".tmp.png"):  # left by a kill
            os.remove(os.path.join(folder, name))
    waiting = collections.deque()
    with ThreadPoolExecutor(PNG_THREADS) as pool:

        def write(first: int, images: np.ndarray) -> None:
            if images.shape[-1] > 4:
                raise RunError(f"a PNG file has at most four channels, not {images.shape[-1]}")
            for number, image in enumerate(images, first):
                if (name := f"{number:06d}.png") not in names:
                    waiting.append(pool.submit(_save_png, os.path.join(folder, name), image))
                if len(waiting) > PNG_WAITING:
                    waiting.popleft().result()

        yield write
        for job in waiting:
            job.result()
        files = [file.path for file in os.scandir(folder)]
        collections.deque(pool.map(writers.sync, files), maxlen=0)
    writers.sync(folder)


def _save_png(path: str, image: np.ndarray) -> None:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    writers.replace(path, picture.save, listed=False, synced=False)  # thousands of them


def _has_recipe(path: str, recipe: dict) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return _without_paths(writers.read_json(path)) == _without_paths(recipe)
    return False


def _without_paths(recipe: dict) -> dict:
    """A recipe without the paths of the run and its data, which may move."""
    result = {}
    for name, value in recipe.items():
        if value is None or (name == "frames" and value == 0):  # older recipes list what is unused
            continue
        kind = value.partition(":")[0] if isinstance(value, str) else None
        if isinstance(value, dict):
            value = _without_paths(value)
        elif kind in data.WITH_PATH:
            value = kind
        result[name] = "" if name == "workdir" else value
    return result


def free_name(path: str, ending: str = "") -> str:
    """The path with its ending, or PATH2, PATH3, … if it is taken."""
    names = (f"{path}{n}{ending}" for n in ("", *range(2, 10_000)))
    return next(name for name in names if not os.path.exists(name))


class GrowingFile:
    """Rows saved as they are computed: in one file, each with its CRC-32 behind it. The first process writes them.

    Rows are valid even after a kill. From the first damaged row on, rows are dropped, to be computed again.

    Attributes:
      count: number of rows.
    """

    def __init__(self, path: str, row_shape: tuple[int, ...], dtype):
        self._path, self._shape, self._dtype = path, tuple(row_shape), np.dtype(dtype)
        self._size = math.prod(row_shape) * self._dtype.itemsize
        self.count = processes.from_first(self._valid_rows)

    def _valid_rows(self) -> int:
        """Keeps the rows before the first damaged one, and returns their number."""
        path = self._path
        with writers.named(path), open(path, "a+b") as file:
            whole = file.tell() // (self._size + CRC_SIZE)
            file.seek(0)
            checks = (
                self._is_valid(number, file.read(self._size + CRC_SIZE)) for number in range(whole)
            )
            count = next((n for n, valid in enumerate(checks) if not valid), whole)
            file.truncate(count * (self._size + CRC_SIZE))
        if count < whole:
            lost = whole - count
            print(
                f"WARNING: {path} is damaged: {lost} of {whole} rows are computed again", flush=True
            )
        return count

    def _crc(self, number: int, row: bytes) -> bytes:
        """The CRC-32 of a row at its place; a row in another place has another one."""
        return zlib.crc32(row, zlib.crc32(number.to_bytes(8, "little"))).to_bytes(
            CRC_SIZE, "little"
        )

    def _is_valid(self, number: int, stored: bytes) -> bool:
        return self._crc(number, stored[: self._size]) == stored[self._size :]

    def append(self, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, self._dtype).reshape(-1, *self._shape)
        if processes.is_first():
            with writers.named(self._path), open(self._path, "ab") as file:
                for number, row in enumerate(rows, self.count):
                    content = row.tobytes()
                    file.write(content + self._crc(number, content))
        self.count += len(rows)

    def rows(self) -> np.ndarray:
        """All rows, [count, …]."""
        processes.barrier(f"{self._path} is written")
        stored = np.fromfile(self._path, np.uint8).reshape(-1, self._size + CRC_SIZE)
        processes.barrier(f"{self._path} is read")
        rows = np.ascontiguousarray(stored[:, : self._size])
        return rows.view(self._dtype).reshape(-1, *self._shape)


class Rows:
    """Rows in memory, used like a `GrowingFile`."""

    def __init__(self, dtype):
        self.count, self._rows = 0, [np.empty(0, dtype)]

    def append(self, rows: np.ndarray) -> None:
        self.count += len(rows)
        self._rows.append(rows)

    def rows(self) -> np.ndarray:
        return np.concatenate(self._rows)
