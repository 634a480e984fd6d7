"""How many threads of a lane run at a time: told of each call that ends, by a clock of the test."""

import pytest

from kanthorq_django.worker.lanes import crew
from kanthorq_django.worker.lanes.crew import (
    BUSY,
    LOAD_SECONDS,
    NATIVE,
    QUICK,
    SHARERS,
    SPARED_SECONDS,
    Crew,
)

SLOW = 20 * QUICK


class Clock:
    """Stands in for the module ``time``: what has passed, and what the process used of it."""

    def __init__(self) -> None:
        self.passed = self.used = 0.0

    def monotonic(self) -> float:
        return self.passed

    def process_time(self) -> float:
        return self.used

    def go_on(self, load: float, seconds: float = LOAD_SECONDS) -> None:
        self.passed += seconds
        self.used += load * seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(crew, "time", clock)
    return clock


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


@pytest.mark.parametrize(
    ("load", "size"),
    [(BUSY / 2, 8), (BUSY + 0.01, SHARERS), (NATIVE - 0.01, SHARERS), (NATIVE + 0.01, 8)],
)
def test_those_that_share_are_few_while_the_interpreter_is_busy(
    clock: Clock, load: float, size: int
) -> None:
    found, alone, small = Crew(8), Crew(8), Crew(2)
    found.share()
    small.share()
    clock.go_on(load)
    assert not any(noted(each, SLOW) for each in (found, alone, small))
    assert (found.size, alone.size, small.size) == (size, 8, 2)


def test_all_may_run_again_once_it_is_not(clock: Clock) -> None:
    found = Crew(8)
    found.share()
    clock.go_on(1.0)
    assert not noted(found, SLOW)
    clock.go_on(0.1, LOAD_SECONDS / 2)
    assert not noted(found, SLOW), "the time was too short to tell"
    clock.go_on(0.1, LOAD_SECONDS / 2)
    assert noted(found, SLOW)
    assert found.size == 8


@pytest.mark.parametrize(("more_waits", "after"), [(True, 8), (False, SHARERS)])
def test_few_that_left_the_interpreter_idle_are_not_so_few_again_soon(
    clock: Clock, more_waits: bool, after: int
) -> None:
    found = Crew(8)
    found.share()
    for load in (1.0, 0.1, 1.0):
        clock.go_on(load)
        found.note(SLOW, more_waits=more_waits)
    assert found.size == after
    clock.go_on(1.0, SPARED_SECONDS)
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
