"""A report on a run, or on several runs compared, as one self-contained HTML page.

    python -m ddpm_jax.main --mode=report --workdir=runs/digits
    python -m ddpm_jax.main --mode=report --workdir=runs/digits,runs/mine

The first command writes report.html into the run directory, the second comparison.html into the current
directory; --out names another file. The page opens from disk without a network. It shows everything the
run directories hold, and the command for each result that is missing. No checkpoint is read and no device is
requested, so a report can be written while the run trains.

`find` reads run directories, `arrange` and `results` turn them into plain data, `charts` draws curves, and
page.html.j2 renders the page.
"""

from __future__ import annotations

import os
from typing import Annotated

import jinja2

from ddpm_jax.commands.report import arrange
from ddpm_jax.commands.report.find import find
from ddpm_jax.files import config as config_lib
from ddpm_jax.files import writers
from ddpm_jax.files.results import out_path
from ddpm_jax.files.run_data import RunError

GENERATOR = "ddpm_jax report"  # name in the page's <meta name="generator">


def report(
    workdir: str,
    *,
    out: Annotated[
        str | None,
        "The .html to write. Default: report.html in the run directory, or comparison.html here for several.",
    ] = None,
    allow_code: Annotated[
        bool, "Imports modules outside ddpm_jax and experiments that a run names, for its schedule."
    ] = False,
) -> str:
    """Writes a report on a run, or on several runs with commas, as one page of HTML.

    Args:
      workdir: a run directory, or several separated by commas.
      out: path of the .html file. The default is report.html in the run directory, or comparison.html in
        the current directory for several runs.

    Returns:
      The path of the page.

    Raises:
      ConfigError, RunError: a directory is not a run, nothing is logged yet, or `out` is another file.
    """
    workdir = config_lib.path(workdir)
    several = "," in workdir and not os.path.isdir(workdir)
    parts = [part.strip() for part in workdir.split(",")] if several else [workdir]
    workdirs = [config_lib.path(part) for part in parts if part] or [workdir]
    for n, path in enumerate(workdirs):
        if os.path.realpath(path) in map(os.path.realpath, workdirs[:n]):
            raise RunError(f"{path} is listed twice; list each run once")
    if out is not None:
        out = out_path(out, ".html")
    else:
        default = "comparison.html" if workdirs[1:] else os.path.join(workdirs[0], "report.html")
        out = os.path.abspath(default)
    _check_out(out)
    text = render(arrange.page([find(path, allow_code=allow_code) for path in workdirs]))
    writers.save_text(out, text)
    print(f"{out} ({len(text.encode()) / 1e6:.1f} MB)", flush=True)
    return out


def render(page: dict) -> str:
    """The HTML of a page of plain data; all its text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ddpm_jax.commands.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(page, generator=GENERATOR)


def _check_out(out: str) -> None:
    """Refuses to overwrite a file that is not a report."""
    if os.path.exists(out):
        with open(out, encoding="utf-8", errors="replace") as file:
            if GENERATOR not in file.read(1000):
                raise RunError(f"{out} is not a report; choose another --out")
