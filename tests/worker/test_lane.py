"""What a lane lets begin, and what it gives back: the moments that no handler can bring about."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest

from kanthorq_django import subscribe
from kanthorq_django.message import Message
from kanthorq_django.subscribers import find, sync
from kanthorq_django.worker.endings import Ending, HandBack
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.lanes import lane, thread_lane
from kanthorq_django.worker.lanes.call import Call, calls
from kanthorq_django.worker.lanes.coroutine_lane import CoroutineLane
from kanthorq_django.worker.lanes.lane import Accept
from kanthorq_django.worker.lanes.thread_lane import ThreadLane
from tests.worker.working import PATIENCE, accept, announce

pytestmark = pytest.mark.django_db(transaction=True)


def make_lane(
    concurrency: int,
    accept: Accept = lambda endings: None,
    wake: Callable[[], None] = lambda: None,
) -> ThreadLane:
    return ThreadLane(concurrency, accept, wake, nullcontext, is_alone=True)


class Tried:
    """A lane whose threads are not started, and a call of several rounds that it let begin."""

    def __init__(self) -> None:
        self.settled: list[Ending] = []
        self.lane = make_lane(1, self._accept)
        accept("batched", batch=2)
        (consumer,) = sync(["batched"])
        announce(6)
        subscription = find("batched")
        flights = [Flight(task, subscription, time.monotonic()) for task in consumer.pull(6)]
        found = calls(flights, subscription)
        self.call = Call(tuple(each.rounds[0] for each in found))
        self.lane.submit([self.call])
        assert self.lane._next() is self.call
        self.rounds = self.lane._rounds(self.call)

    def _accept(self, endings: Sequence[Ending]) -> None:
        self.settled += endings

    def end(self) -> None:
        """Let the call end."""
        self.lane._note_stretch(1, 1.0)


@pytest.fixture
def tried() -> Tried:
    return Tried()


def test_a_round_that_is_about_to_begin_as_its_lane_closes_is_handed_back(tried: Tried):
    first = next(tried.rounds)
    assert tried.lane._startable(first) == first
    second = next(tried.rounds)
    assert tried.lane.drain() == list(tried.call.rounds[2])
    assert tried.lane._startable(second) == ()
    assert [type(ending) for ending in tried.settled] == [HandBack] * 2
    assert {ending.lease for ending in tried.settled} == {flight.lease for flight in second}
    assert tried.lane.started_count == len(first)
    assert next(tried.rounds, None) is None


def test_a_call_that_has_ended_is_held_no_longer(tried: Tried):
    assert list(tried.rounds) == list(tried.call.rounds)
    assert not tried.lane._remainders


def test_no_more_coroutines_run_at_once_than_may(tried: Tried, monkeypatch: pytest.MonkeyPatch):
    found = CoroutineLane(1, lambda endings: None, lambda: None, nullcontext)
    monkeypatch.setattr(found, "_call_soon", lambda step: None)  # its loop does not exist yet
    found.submit([tried.call] * 2)
    assert found._next() is tried.call
    assert found._next() is None
    with found._lock:
        found._ended(1)
    assert found._next() is tried.call


def test_who_was_refused_is_woken_once_as_soon_as_there_is_room(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
):
    woken: list[None] = []
    monkeypatch.setattr(tried.lane, "_wake", lambda: woken.append(None))
    assert tried.lane.room() == 0
    assert woken == []
    tried.end()
    assert len(woken) == 1
    tried.lane.submit([tried.call])
    assert tried.lane._next() is tried.call
    tried.end()
    assert len(woken) == 1


def test_who_was_refused_is_woken_as_what_waits_is_started(tried: Tried):
    woken: list[None] = []
    found = make_lane(4, wake=lambda: woken.append(None))
    found.submit([tried.call] * 3)
    assert found.room() == 0  # until half of it has gone
    assert found._next() is tried.call
    assert len(woken) == 1
    assert found.room() == 1


@pytest.mark.parametrize("way", ["_next", "surplus", "drain"])
def test_bodies_that_wait_no_longer_take_no_room(
    way: str, tried: Tried, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lane, "WAIT_LONGEST", -1.0)
    tried.end()
    tried.call.rounds[0][0].leased.body_size = 7
    tried.lane.submit([tried.call])
    assert tried.lane._waiting_bytes == 7 * tried.call.size
    getattr(tried.lane, way)()
    assert tried.lane._waiting_bytes == 0


@pytest.mark.parametrize(
    ("has_begun", "waits_longest", "is_given_back"),
    [(False, -1.0, True), (True, -1.0, False), (False, 60.0, False)],
)
def test_others_get_a_call_none_of_whose_rounds_begins_for_long(
    has_begun: bool,
    waits_longest: float,
    is_given_back: bool,
    tried: Tried,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(lane, "WAIT_LONGEST", waits_longest)
    if has_begun:
        next(tried.rounds)
    assert tried.lane.surplus() == (tried.call.flights if is_given_back else [])


@pytest.mark.parametrize(("concurrency", "size"), [(2, 1), (5, 4)])
def test_what_arrives_all_the_time_does_not_keep_the_last_thread_from_it(
    concurrency: int, size: int, monkeypatch: pytest.MonkeyPatch
):
    """Those that may run are blocked: whoever watches them has to see that."""
    monkeypatch.setattr(thread_lane, "STALLED_AFTER", 0.1)
    released = threading.Event()

    @subscribe("work.>", stream="work", consumer="steady")
    def block(message: Message) -> None:
        released.wait(PATIENCE)

    (consumer,) = sync(["steady"])
    announce(1)
    flights = [Flight(task, find("steady"), time.monotonic()) for task in consumer.pull(1)]
    (call,) = calls(flights, find("steady"))
    found = make_lane(concurrency)
    found._crew.size = size
    found.start()
    try:
        deadline = time.monotonic() + PATIENCE / 4
        while not found.is_full and time.monotonic() < deadline:
            found.submit([call])
            time.sleep(0.002)
        assert found.is_full
    finally:
        found.drain()
        released.set()
        found.finish(PATIENCE)
