"""The smallest part of `python -m tests.faults`, and nonsense as input; FUZZ=2000 gives each property its share of 2,000 cases."""

import os
import signal

import pytest

from tests.faults import damages, fuzz, kills, process
from tests.faults.report import Case, table
from tests.faults.room import Room
from tests.faults.worker import Worker

pytestmark = pytest.mark.once

CASES = int(os.environ.get("FUZZ", "220"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    yield str(tmp_path_factory.mktemp("faults"))
    process.close()


@pytest.fixture(scope="module")
def room(scratch):
    subject = damages.subject(scratch)
    with Worker(scratch) as worker:
        yield Room(scratch, worker, subject)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_training_that_is_killed_ends_as_if_nothing_had_happened(sent, scratch):
    case = kills.kill("train", 1, scratch, sent)
    assert case.is_good, case


@pytest.mark.slow
@pytest.mark.parametrize("one", fuzz.PROPERTIES, ids=lambda one: one.__name__)
def test_nonsense_ends_with_one_line_of_error(one, room):
    fuzz.run(one, room, max(1, CASES * fuzz.PROPERTIES[one] // sum(fuzz.PROPERTIES.values())))


@pytest.mark.slow
def test_the_harness_notices_a_fault(room, monkeypatch):
    """A damage that is used silently, a traceback, the end of the interpreter."""
    damager = damages.Damager(room.folder.parent, 0, room.worker)
    monkeypatch.setitem(damages.KINDS, "new content", lambda path, *_: path.write_text("{}"))
    monkeypatch.setitem(damages.READ_BY, "data.json", ("sample",))  # which does not read it
    assert damager.run("data.json", "new content", "sample").outcome == "wrong"
    monkeypatch.setattr(damages, "COMMANDS", damages.COMMANDS | {"crash": ["--mode=eval", *CRASH]})
    damager.expected["crash"] = damager.undamaged("sample")
    assert damager.run("log.txt", "empty", "crash").outcome == "crash -11"
    assert room.worker.run(["--version"]).status == 0  # a new process


CRASH = ("--workdir={}", "--metrics=fid", "--features=tests.faults.crash:x")


def test_table():
    cases = [Case("a", "repaired", "", 3), Case("a", "refused", ""), Case("b", "crash -11", "")]
    assert [case.is_good for case in cases] == [True, True, False]
    lines = table(cases).splitlines()
    assert lines[2:] == [
        "| a | 4 | 1 | 1 | 0 | 0 | 0 | 0 |",
        "| b | 1 | 0 | 0 | 0 | 0 | 0 | 1 |",
        "| **all** | 5 | 1 | 1 | 0 | 0 | 0 | 1 |",
    ]
