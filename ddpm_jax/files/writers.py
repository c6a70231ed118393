"""Writers of the files of a run: log lines, metrics.jsonl, pictures, .npz files."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from ddpm_jax import processes

CRC = "crc32"  # name of the check of a line or a result
written: dict[str, None] = {}  # the files that this process has written, in their order
ADVICE = {  # by the reason why a file could not be written
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), "; free some space, then run the same command again"
    ),
    errno.EFBIG: "; it is larger than the system allows (ulimit -f)",
}


class WriteError(OSError):
    """A file that could not be written: one line with its path, the reason and what to do."""

    def __str__(self) -> str:
        return f"{self.filename} could not be written: {self.strerror}{ADVICE.get(self.errno, '')}"


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError into a `WriteError` of this file: that of a full disk names no file."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def sync(path: str | os.PathLike) -> None:
    """Waits until a file or folder is on the disk, where the system can say so: it then survives a power failure."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # a folder that can be written but not read, some network file systems
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def free_space(folder: str | os.PathLike) -> float:
    """Free bytes of the disk of a folder, which need not exist yet; inf if unknown, as on some network mounts."""
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    disk = shutil.disk_usage(path)
    return disk.free if disk.total else math.inf


def make_folder_of(path: str) -> None:
    """Makes the folder of a file, if needed; the error names the file."""
    with named(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)


def replace(
    path: str, write: Callable[[str], None], *, listed: bool = True, synced: bool = True
) -> None:
    """Calls write(temporary path) and renames the file: a reader never sees half of it. Only the first process writes.

    Args:
      listed: adds the path to `written`.
      synced: the file is on the disk when this returns.

    Raises:
      WriteError: it could not be written; an earlier file of this name is as it was.
    """
    if not processes.is_first():
        return
    root, extension = os.path.splitext(path)
    temporary = f"{root}.tmp{extension}"
    try:
        if os.path.lexists(temporary):  # left by a kill, or a link of a stranger
            os.remove(temporary)
        write(temporary)
        if synced:
            sync(temporary)
        os.replace(temporary, path)
        if synced:
            sync(os.path.dirname(os.path.abspath(path)))
        if listed:
            written[os.path.abspath(path)] = None
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), path) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ---- numbers ---------------------------------------------------------------------------------------


def read_metrics(path: str) -> list[dict]:
    """The lines of a metrics.jsonl, in the order of their steps.

    A last line that a kill cut short is left out. Damaged or doubled lines are left out too, with a warning for each.
    """
    rows: list[dict] = []
    for number, row in read_lines(path):
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            logging.warning("%s, line %d has no step and is left out", path, number)
        elif not all(isinstance(value, int | float | None) for value in row.values()):
            logging.warning("%s, line %d holds more than numbers and is left out", path, number)
        elif rows and step <= rows[-1]["step"]:
            logging.warning("%s, line %d repeats step %d and is left out", path, number, step)
        else:
            rows.append(row)
    return rows


def read_lines(path: str) -> Iterator[tuple[int, dict]]:
    """(number, object) of each line of a file that `append_line` wrote, without damaged ones, of which it warns."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    rows = [_parsed(line) for line in lines]
    checked = any(CRC in row for row in rows if row)  # older versions wrote none
    for number, (line, row) in enumerate(zip(lines, rows, strict=True), 1):
        crc = row.pop(CRC, None) if row else None
        if row and (not checked or crc == _crc(row)):
            yield number, row
        elif line.endswith(b"\n"):  # otherwise a kill cut it short
            logging.warning("%s, line %d is damaged and left out", path, number)


def _parsed(line: bytes) -> dict | None:
    try:
        return parse_object(line)
    except ValueError:
        return None


def _crc(row: dict) -> int:
    return zlib.crc32(json.dumps(row).encode())


def to_line(row: Mapping) -> str:
    """A JSON object with its CRC-32, as one line."""
    return json.dumps({**row, CRC: _crc(json.loads(json.dumps(row)))}) + "\n"


def append_line(path: str, row: Mapping) -> None:
    """Appends a JSON object as one line; on a full disk nothing is appended, not half a line.

    Raises:
      WriteError: it could not be written.
    """
    line = to_line(row).encode()
    with named(path), open(path, "ab", buffering=0) as file:
        size, done = file.tell(), 0
        try:
            while done < len(line):
                done += file.write(line[done:])
        except OSError:
            if done:
                file.truncate(size)
            raise


def rewind_metrics(path: str, step: int, log_every: int) -> None:
    """Drops the lines after `step`, which a run resumed there writes again; warns if some, each `log_every` steps, are missing."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    last = rows[-1]["step"] if rows else 0
    if step - last >= log_every:
        logging.warning("%s has no line from step %d to step %d", path, last + 1, step)
    save_text(path, "".join(map(to_line, rows)))


def save_bytes(path: str, content: bytes) -> None:
    """Writes a file atomically."""

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(content)

    replace(path, write)


def save_text(path: str, text: str) -> None:
    """Writes a text file atomically."""
    save_bytes(path, text.encode())


def finite(node):
    if isinstance(node, dict):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def save_json(path: str, tree) -> None:
    """Writes an indented JSON file atomically; numbers that are not finite become null."""
    make_folder_of(path)
    save_text(path, json.dumps(finite(tree), indent=1, ensure_ascii=False) + "\n")


def save_result(path: str, result: Mapping) -> None:
    """Writes a result as JSON, with the CRC-32 of its content."""
    read_back = json.loads(json.dumps(finite(result)))
    save_json(path, {**read_back, CRC: _crc(read_back)})


def save_npz(path: str, arrays: Mapping[str, np.ndarray], recipe: dict | None = None) -> None:
    """Writes an uncompressed .npz atomically; its recipe is the array "recipe", as JSON."""
    arrays = arrays | ({} if recipe is None else {"recipe": json.dumps(recipe)})
    make_folder_of(path)
    replace(path, lambda temporary: np.savez(temporary, **arrays))


def read_json(path: str) -> dict:
    """The object in a JSON file; for a result without its CRC-32.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON, not an object, or a result that is not as it was written.
    """
    with open(path, encoding="utf-8") as file:
        found = parse_object(file.read())
    if CRC in found and found.pop(CRC) != _crc(found):
        raise ValueError("it is not as it was written")
    return found


def parse_object(text: str | bytes) -> dict:
    """The object that a JSON text holds; raises ValueError for any other text."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it must hold fields, not a {type(found).__name__}")
    return found


# ---- pictures --------------------------------------------------------------------------------------


def grid(images: np.ndarray, *, columns: int | None = None, pad: int = 2) -> np.ndarray:
    """Images side by side, row by row.

    Args:
      images: uint8 [N, H, W, C]; if C is not 3, the first channel is shown in grey.
      columns: images in a row; None for a square.

    Returns:
      uint8 [rows·(H + pad) + pad, columns·(W + pad) + pad, 3], white between the images. Small images are enlarged
      bicubically by an integer factor to at least 56 pixels in width.
    """
    if images.shape[-1] != 3:
        images = np.repeat(images[..., :1], 3, axis=-1)
    zoom = max(1, -(-56 // images.shape[2]))
    n, height, width, _ = images.shape
    height, width = height * zoom, width * zoom
    if zoom > 1:
        large = (Image.fromarray(image).resize((width, height)) for image in images)
        images = np.stack([np.asarray(image) for image in large])
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (height + pad) * (i // columns) + pad, (width + pad) * (i % columns) + pad
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_png(path: str, image: np.ndarray) -> None:
    """uint8 [H, W, 3] to a PNG file."""
    make_folder_of(path)
    replace(path, Image.fromarray(image).save)


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def save_grids(path: str, rows: Sequence[tuple[str, np.ndarray]], columns: int) -> None:
    """Writes `titled_grids` as a PNG."""
    save_png(path, titled_grids(rows, columns))


def titled_grids(rows: Sequence[tuple[str, np.ndarray]], columns: int) -> np.ndarray:
    """Grids one above the other, each under its title, as one picture uint8 [H, W, 3].

    Args:
      rows: (title, uint8 [N, H, W, C]) for each grid.
      columns: images in a row of every grid.
    """
    from PIL import ImageDraw

    pictures = [Image.fromarray(grid(images, columns=columns)) for _, images in rows]
    texts = [
        ImageDraw.Draw(picture).textlength(title)
        for picture, (title, _) in zip(pictures, rows, strict=True)
    ]
    width = max(*(picture.width for picture in pictures), *(round(text) + 8 for text in texts))
    canvas = Image.new("RGB", (width, sum(16 + picture.height for picture in pictures)), "white")
    top = 0
    for (title, _), picture in zip(rows, pictures, strict=True):
        ImageDraw.Draw(canvas).text((4, top + 2), title, fill="black")
        canvas.paste(picture, (0, top + 16))
        top += 16 + picture.height
    return np.asarray(canvas)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Each value averaged with up to `window` − 1 before it."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def save_loss_curve(path: str, rows: Iterable[dict]) -> None:
    """Loss, its quarters of t and the gradient norm over the steps of a metrics.jsonl, as one PNG."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    rows = [row for row in rows if row.get("loss") is not None]
    if not rows:
        return
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for name, style in (
        ("loss", {"color": "black", "linewidth": 1.8}),
        *((f"loss_t{q}", {"linewidth": 1.0}) for q in (1, 2, 3, 4)),
        ("grad_norm", {"color": "black", "linewidth": 1.0}),
    ):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            continue
        steps, values = np.array(points, np.float64).T
        label = f"quarter {name[-1]} of t" if name.startswith("loss_t") else name.replace("_", " ")
        axis = bottom if name == "grad_norm" else top
        axis.plot(steps, moving_average(values, max(1, len(values) // 50)), label=label, **style)
    for axis in (top, bottom):
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    top.set_ylabel("loss (averaged over 2 % of the run)")
    bottom.set_xlabel("step")
    replace(path, lambda temporary: figure.savefig(temporary, dpi=100))


class Panel(NamedTuple):
    """One diagram of curves over the same x."""

    title: str
    x_label: str
    y_label: str
    x: np.ndarray  # [N]
    curves: dict[str, np.ndarray]  # name: [N]
    x_scale: str = "linear"
    y_scale: str = "linear"


def save_panels(path: str, title: str, panels: Sequence[Panel]) -> None:
    """Diagrams side by side, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axis, panel in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for name, values in panel.curves.items():
            axis.plot(panel.x, values, label=name, linewidth=1.4)
        axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axis.set(xscale=panel.x_scale, yscale=panel.y_scale)
        axis.grid(alpha=0.3)
        if len(panel.curves) > 1:
            axis.legend(fontsize=8)
    make_folder_of(path)
    replace(path, lambda temporary: figure.savefig(temporary, dpi=100))
