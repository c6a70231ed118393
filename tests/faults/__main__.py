"""python -m tests.faults [--all] [--fuzz=N]: hurts the program, and prints a table of how it ended."""

from __future__ import annotations

import argparse
import math
import os
import queue
import random
import sys
import tempfile
import threading
import time

from tests.faults import damages, disks, fuzz, kills
from tests.faults.report import Case, table
from tests.faults.room import Room
from tests.faults.worker import Worker

AT_ONCE = 2  # programs


def cases(scratch: str, many: bool, parts, minutes: float) -> list[Case]:
    """Runs all cases, two at a time, and prints those that fail; begins none after `minutes`."""
    kills.base(scratch)
    chosen = []
    if "kills" in parts:
        chosen += [lambda _, __, one=one: one() for one in kills.all_cases(scratch, many)]
    if "disks" in parts:
        chosen += [lambda worker, _, one=one: one(worker) for one in disks.all_cases(scratch, many)]
    if "damages" in parts:
        for case in damages.all_cases(scratch, many):
            chosen.append(lambda _, damager, case=case: damager.run(*case))
    random.Random(0).shuffle(chosen)  # so that a part of them is of all kinds
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for one in chosen:
        waiting.put(one)
    end = time.monotonic() + 60 * minutes
    found: list[Case] = []

    def work(number: int) -> None:
        with Worker(scratch) as worker:
            damager = damages.Damager(scratch, number, worker)
            while time.monotonic() < end:
                try:
                    one = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    case = one(worker, damager)
                except Exception as error:  # of the harness itself
                    case = Case("the harness", "wrong", f"{type(error).__name__}: {error}")
                if case.weight:
                    found.append(case)
                if len(found) % 50 == 0:
                    print(f"{len(found)} cases", file=sys.stderr, flush=True)
                if not case.is_good:
                    print(f"{case.outcome}: {case.about}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found, key=lambda case: case.what)


def fuzzed(scratch: str, examples: int) -> list[Case]:
    """Checks every property of `fuzz` with its share of the examples."""
    found, shares = [], sum(fuzz.PROPERTIES.values())
    subject = damages.subject(scratch)
    with Worker(scratch) as worker:
        room = Room(scratch, worker, subject)
        for one, share in fuzz.PROPERTIES.items():
            count, what = max(1, examples * share // shares), f"input: {one.__name__}"
            try:
                fuzz.run(one, room, count)
                found.append(Case(what, "repaired", "", count))
            except (AssertionError, BaseExceptionGroup) as error:
                about = "\n".join([str(error), *getattr(error, "__notes__", ())])
                found.append(Case(what, "wrong", about))
                print(f"{what}: {about}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every case, not only those of CI")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="N cases of nonsense")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after them")
    parser.add_argument("--parts", default="kills,disks,damages", help="with commas")
    parser.add_argument("--scratch", help="a folder for the runs; default: a temporary one")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        scratch = os.path.abspath(flags.scratch or folder)
        os.makedirs(scratch, exist_ok=True)
        begin = time.perf_counter()
        if flags.fuzz:
            found = fuzzed(scratch, flags.fuzz)
        else:
            found = cases(scratch, flags.all, flags.parts.split(","), flags.minutes)
    print(table(found))
    print(f"\n{time.perf_counter() - begin:.0f} s")
    sys.exit(not all(case.is_good for case in found))


if __name__ == "__main__":
    main()
