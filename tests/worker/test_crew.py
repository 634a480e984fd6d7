"""How many threads of a lane run at a time: told of each call that ends, without a clock's help."""

import pytest

from kanthorq_django.worker import crew
from kanthorq_django.worker.crew import QUICK, SHARERS, Crew

SLOW = 20 * QUICK


def noted(found: Crew, seconds: float) -> bool:
    return found.note(seconds, more_waits=True)


def test_all_run_until_calls_are_known_to_be_quick() -> None:
    found = Crew(8)
    sizes = []
    for _ in range(400):
        assert not noted(found, QUICK / 10)
        sizes.append(found.size)
    assert sizes[0] == 8
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)


def test_that_more_may_run_is_told_once() -> None:
    found = Crew(8)
    for _ in range(400):
        noted(found, QUICK / 10)
    told = [noted(found, SLOW) for _ in range(100)]
    assert told.count(True) == 1
    assert found.size == 8


def test_one_slow_call_changes_nothing() -> None:
    found = Crew(8)
    for _ in range(1_000):
        noted(found, QUICK / 10)
    assert not noted(found, 3600.0)
    assert found.size == 1


def test_those_that_share_are_few_while_the_interpreter_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crew, "LOAD_SECONDS", 0.0)
    monkeypatch.setattr(crew, "BUSY", 0.0)
    found, alone, small = Crew(8), Crew(8), Crew(2)
    found.share()
    small.share()
    assert not any(noted(each, SLOW) for each in (found, alone, small))
    assert (found.size, alone.size, small.size) == (SHARERS, 8, 2)
    monkeypatch.setattr(crew, "BUSY", 1e9)
    assert noted(found, SLOW)
    assert found.size == 8


@pytest.mark.parametrize(("more_waits", "after"), [(True, 8), (False, SHARERS)])
def test_few_that_left_the_interpreter_idle_are_not_so_few_again_soon(
    more_waits: bool, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "LOAD_SECONDS", 0.0)
    found = Crew(8)
    found.share()
    for busy in (0.0, 1e9, 0.0):
        monkeypatch.setattr(crew, "BUSY", busy)
        found.note(SLOW, more_waits=more_waits)
    assert found.size == after


def test_what_computes_outside_of_the_interpreter_is_not_kept_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crew, "LOAD_SECONDS", 0.0)
    monkeypatch.setattr(crew, "BUSY", 0.0)
    monkeypatch.setattr(crew, "NATIVE", 0.0)
    found = Crew(8)
    found.share()
    noted(found, SLOW)
    assert found.size == 8


def test_few_are_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "LOAD_SECONDS", 0.0)
    monkeypatch.setattr(crew, "SPARED_SECONDS", 0.0)
    found = Crew(8)
    found.share()
    for busy in (0.0, 1e9, 0.0):
        monkeypatch.setattr(crew, "BUSY", busy)
        noted(found, SLOW)
    assert found.size == SHARERS


def test_those_that_did_not_get_on_are_joined_by_all() -> None:
    found = Crew(8)
    for _ in range(400):
        noted(found, QUICK / 10)
    found.forget()
    assert found.size == 8
    assert not noted(found, QUICK / 10), "the opinion begins anew"
    assert found.size == 8
