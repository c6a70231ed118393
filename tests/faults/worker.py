"""Many command lines in one process, which stays: much faster than a start of the program for each.

`Worker` starts `python -m tests.faults.worker`, which reads a JSON line for each command line and writes one for its
end. A command line that hangs, or that ends the interpreter, costs a new start, and is a fault.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback

from tests.faults.process import Ended
from tests.faults.tiny import ROOT, environment

LIMIT = 900.0  # seconds until a command line counts as hanging
MEMORY = 4 * 2**30  # bytes that no command line may need


class Worker:
    """A process that runs command lines, as a context."""

    def __init__(self, scratch):
        self._scratch, self._process = scratch, None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def run(self, argv: list[str], *, check: bool = False, hurt: dict | None = None) -> Ended:
        """Runs a command line.

        Args:
          check: a training is checked and not run.
          hurt: arguments of `hurt.Hurt`, with the name of an error as `signal`.
        """
        if self._process is None:
            self._start()
        request = json.dumps({"argv": argv, "check": check, "hurt": hurt})
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], LIMIT)
            answer = self._process.stdout.readline() if ready else None
        except BrokenPipeError:
            answer = ""
        if answer:
            answer = json.loads(answer)
            if answer.pop("held") > MEMORY / 2:  # compiled programs stay in memory
                self.close()
            return Ended(**answer)
        status = self.close()
        return Ended(None if answer is None else status, "", "the interpreter ended", LIMIT)

    def close(self) -> int | None:
        """Ends the process; returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        time.sleep(0.1)  # a crash has its own status
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return process.returncode

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker"],
            cwd=ROOT,
            env=environment(self._scratch),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )


# ---- in the process --------------------------------------------------------------------------------


@contextlib.contextmanager
def _captured():
    """Standard output and error as texts in a list, those of libraries in C too."""
    texts, saved = [], [os.dup(1), os.dup(2)]
    files = [tempfile.TemporaryFile("w+", errors="replace") for _ in saved]  # noqa: SIM115
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        os.fdopen(os.dup(n), "w", buffering=1, errors="backslashreplace") for n in (1, 2)
    )
    try:
        yield texts
    finally:
        streams, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), (out, err)
        for stream in streams:
            with contextlib.suppress(Exception):
                stream.flush()
        for number, (old, file) in enumerate(zip(saved, files, strict=True), 1):
            os.dup2(old, number)
            os.close(old)
            file.seek(0)
            texts.append(file.read())
            file.close()


def _end(request: dict) -> dict:
    """Runs a command line as the program does, and describes its end."""
    from absl import logging

    from ddpm_jax import main
    from ddpm_jax.files import console

    status, hook, before = 0, HURT, _memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    with _captured() as texts:
        logging.get_absl_handler().python_handler.stream = sys.stderr
        hook.set(request["hurt"])
        try:
            if request["check"]:
                try:
                    main.check(request["argv"])
                except Exception as error:
                    line = main.explain(error)
                    if line is None:
                        raise
                    print(f"error: {line}", file=sys.stderr)
                    status = 1
            else:
                main.main(request["argv"])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            hook.set(None)
            console.json_lines(None)
    used = _memory("VmHWM") - before
    if used > MEMORY:
        texts[1] += f"\nMEMORY: {used / 2**30:.1f} GiB"
        status = 1
    return {
        "status": status,
        "out": texts[0],
        "err": texts[1],
        "seconds": 0.0,
        "held": _memory("VmRSS"),
    }


def _memory(field: str) -> int:
    """The memory that this process holds, VmRSS, or its peak, VmHWM, in bytes.

    `getrusage` also counts the parent's before exec, 10 GB when all tests run.
    """
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


class _Hook:
    """An audit hook that can be changed; Python's cannot be removed."""

    def __init__(self):
        self._hurt = None

    def set(self, values: dict | None) -> None:
        from tests.faults.hurt import Hurt

        self._hurt = Hurt(**values) if values else None

    def __call__(self, event, args):
        if self._hurt is not None:
            self._hurt(event, args)


HURT = _Hook()

if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MEMORY,) * 2)
    sys.addaudithook(HURT)
    for count, line in enumerate(sys.stdin):
        print(json.dumps(_end(json.loads(line))), file=channel, flush=True)
        if count % 20 == 0:
            gc.collect()
    os._exit(0)
