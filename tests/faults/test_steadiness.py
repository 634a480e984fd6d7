"""What tells whether a process grows, and what a soak says at its end."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import remains
from tests.faults.invariants import Violation
from tests.faults.steadiness import Look, Steadiness
from tests.faults.test_invariants import SOUND
from tests.faults.verdict import KINDS, Verdict

MIB = 2**20


def looks(*, minutes: float, leak: float = 0.0, files: float = 0.0, threads: float = 0.0):
    """Look every four seconds at what warms up, jitters, and grows by so much per minute."""
    chance = random.Random(7)  # noqa: S311  # repeatable on purpose
    steadiness = Steadiness()
    for second in range(0, round(minutes * 60), 4):
        minute = second / 60
        warm = 50 + 12 * min(1.0, minute) + chance.uniform(0, 1)
        steadiness.looks.append(
            Look(
                second,
                round((warm + leak * minute) * MIB),
                round(14 + chance.randrange(4) + files * minute),
                round(12 + threads * minute),
            )
        )
    return steadiness


@pytest.mark.parametrize("minutes", [2, 5, 30])
def test_what_warms_up_and_jitters_is_steady(minutes: float):
    assert looks(minutes=minutes).wrong() == []


@pytest.mark.parametrize(
    ("minutes", "growth", "word"),
    [
        (30, {"leak": 0.5}, "memory"),
        (5, {"leak": 5.0}, "memory"),
        (30, {"files": 1.0}, "left behind"),
        (30, {"threads": 1.0}, "left behind"),
    ],
)
def test_what_grows_is_found(minutes: float, growth: dict[str, float], word: str):
    (found,) = looks(minutes=minutes, **growth).wrong()

    assert found.startswith(word)


def test_nothing_seen_is_not_taken_for_steady():
    assert Steadiness().wrong() != []


def test_a_process_that_is_looked_at_holds_something():
    steadiness = Steadiness()

    steadiness.look(os.getpid(), 0)

    (look,) = steadiness.looks
    assert look.bytes > MIB
    assert look.files > 2
    assert look.threads >= 1


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        (Violation("I1 delivered once", "lost after its commit: event e"), "lost"),
        (Violation("I1 delivered once", "never delivered to plain: event e"), "lost"),
        (Violation("I1 delivered once", "2 tasks of ('plain', 'e')"), "doubled"),
        (Violation("I3 exactly-once effects", "task 1"), "doubled"),
        (Violation("I4 nothing is stuck", "task 1 is not final"), "stuck"),
        (Violation("I6 nothing is left", "connection 7"), "left"),
        (Violation("I9 strict order", "('strict', 'a')"), "other"),
    ],
)
def test_a_verdict_counts_what_is_wrong_by_its_kind(
    what: Violation, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tests.faults.verdict.judge", lambda _: [what])
    verdict = Verdict()

    verdict.judge(SOUND)

    assert {name: verdict.counts[name] for name in KINDS} == dict.fromkeys(KINDS, 0) | {kind: 1}
    assert verdict.line(seed=1, minutes=2).startswith("FAILED SEED=1 MINUTES=2 ")
    assert f" {kind}=1" in verdict.line(seed=1, minutes=2)


def test_a_verdict_says_that_memory_grew():
    verdict = Verdict()
    assert verdict.line(seed=1, minutes=2).startswith("passed")

    verdict.add("memory: grew by 9 bytes")

    assert "NOT FLAT" in verdict.line(seed=1, minutes=2)
    assert verdict.line(seed=1, minutes=2).startswith("FAILED")


def test_what_a_soak_leaves_behind_is_found_and_swept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remains, "NOTICED_WITHIN", 0.0)
    (tmp_path / "tmp").mkdir()
    forgotten = tmp_path / "tmp" / "forgotten"
    forgotten.touch()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    marked = subprocess.Popen(sleep, env=os.environ | {remains.MARK: str(tmp_path)})
    housed = subprocess.Popen(sleep, cwd=tmp_path)
    try:
        found = remains.found(tmp_path, "no-such-network")
        remains.sweep(tmp_path, "no-such-network")
        assert [marked.wait(10), housed.wait(10)] == [-9, -9]
    finally:
        for process in (marked, housed):
            process.kill()
            process.wait()
    assert sorted(what.split()[0] for what in found) == ["file", "process", "process"]
    assert remains.found(tmp_path, "no-such-network") == [f"file {forgotten}"]
