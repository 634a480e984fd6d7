"""How many threads of a lane run at a time: told of each call that ends, without a clock's help."""

import pytest

from kanthorq_django.worker import crew
from kanthorq_django.worker.crew import QUICK, SHARERS, Crew

SLOW = 20 * QUICK


def test_all_run_until_calls_are_known_to_be_quick() -> None:
    found = Crew(8)
    sizes = []
    for _ in range(400):
        assert not found.note(QUICK / 10)
        sizes.append(found.size)
    assert sizes[0] == 8
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)


def test_that_more_may_run_is_told_once() -> None:
    found = Crew(8)
    for _ in range(400):
        found.note(QUICK / 10)
    told = [found.note(SLOW) for _ in range(100)]
    assert told.count(True) == 1
    assert found.size == 8


def test_one_slow_call_changes_nothing() -> None:
    found = Crew(8)
    for _ in range(1_000):
        found.note(QUICK / 10)
    assert not found.note(3600.0)
    assert found.size == 1


def test_those_that_share_are_few_while_the_interpreter_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crew, "LOAD_SECONDS", 0.0)
    monkeypatch.setattr(crew, "BUSY", 0.0)
    found, alone, small = Crew(8), Crew(8), Crew(2)
    found.share()
    small.share()
    assert not any(each.note(SLOW) for each in (found, alone, small))
    assert (found.size, alone.size, small.size) == (SHARERS, 8, 2)
    monkeypatch.setattr(crew, "BUSY", 1e9)
    assert found.note(SLOW)
    assert found.size == 8


def test_those_that_did_not_get_on_are_joined_by_all() -> None:
    found = Crew(8)
    for _ in range(400):
        found.note(QUICK / 10)
    found.forget()
    assert found.size == 8
    assert not found.note(QUICK / 10), "the opinion begins anew"
    assert found.size == 8
