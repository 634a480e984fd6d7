"""Handlers that keep the interpreter busy are left to few threads, for as long as those get on."""

import math
import threading
import time

import pytest
from pytest_django import Settings

from kanthorq_django import publish_many, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Event, Task
from kanthorq_django.worker.lanes import crew, lane, thread_lane
from kanthorq_django.worker.lanes.thread_lane import ThreadLane
from tests.concurrency import wait_until
from tests.worker.working import PATIENCE, announce, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)

ENOUGH = 400  # calls until a lane takes its handlers for quick


def test_one_thread_runs_what_is_quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crew, "QUICK", 1.0)
    monkeypatch.setattr(thread_lane, "STALLED_AFTER", PATIENCE)
    lock, running, peaks = threading.Lock(), 0, list[int]()

    @subscribe("work.>", stream="work", consumer="quick")
    def handle(message: Message) -> None:
        nonlocal running
        with lock:
            running += 1
            peaks.append(running)
        time.sleep(0.001)  # long enough for others to join in
        with lock:
            running -= 1

    announce(ENOUGH + 100)
    assert work_off("quick", concurrency=8) == ENOUGH + 100

    assert max(peaks[:50]) > 1
    assert set(peaks[ENOUGH:]) == {1}


def test_what_blocks_after_a_rest_does_not_wait_for_the_first_of_it(
    monkeypatch: pytest.MonkeyPatch,
):
    """Nobody watches a lane that was idle: its first handler may block before anybody does."""
    monkeypatch.setattr(thread_lane, "RELENT_EVERY", 2 * PATIENCE)
    monkeypatch.setattr(lane, "WAIT_LONGEST", 2 * PATIENCE)
    quick, meeting = list[int](), threading.Barrier(8)

    @subscribe("work.>", stream="work", consumer="quick")
    def handle(message: Message) -> None:
        if message.event.subject == "work.meet":
            meeting.wait(PATIENCE / 2)
        else:
            quick.append(1)

    with working("quick", concurrency=8) as loop:
        announce(10 * ENOUGH)
        wait_until(lambda: len(quick) == 10 * ENOUGH, PATIENCE)
        resting = loop._lanes[False]
        assert isinstance(resting, ThreadLane)
        wait_until(lambda: resting.is_idle and not resting._is_watched, PATIENCE)
        resting._crew.size = 1  # whatever this machine makes of it
        announce(8, "work.meet")
        wait_until(lambda: Task.objects.completed().count() == 10 * ENOUGH + 8, PATIENCE)

    assert not Task.objects.exclude(attempt_count=1).exists(), "some had to be tried again"


def test_all_threads_are_there_when_the_next_handlers_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crew, "QUICK", 0.1)
    meeting = threading.Barrier(8)

    @subscribe("work.>", stream="work", consumer="quick")
    def handle(message: Message) -> None:
        if bytes(message.event.body) == b"meet":
            meeting.wait(PATIENCE)

    bodies = [*range(10 * ENOUGH), *["meet"] * 8]
    publish_many([Event(subject="work.due", body=body) for body in bodies], stream="work")
    work_off("quick", concurrency=8)

    assert Task.objects.completed().count() == len(bodies)
    assert not Task.objects.exclude(attempt_count=1).exists(), "some had to be tried again"


class Peaks:
    """A handler of messages that notes how many of it run at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self.seen: list[int] = []

    def __call__(self, message: Message) -> None:
        with self._lock:
            self._running += 1
            self.seen.append(self._running)
        time.sleep(0.001)  # long enough for others to join in
        with self._lock:
            self._running -= 1


def always_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a process be taken for busy whatever it has used of however short a time."""
    monkeypatch.setattr(crew, "LOAD_SECONDS", 1e-9)
    monkeypatch.setattr(crew, "BUSY", 0.0)
    monkeypatch.setattr(crew, "NATIVE", math.inf)


def shared_peaks(settings: Settings, *others: str, group: int) -> list[int]:
    settings.KANTHORQ = {"GROUP_COMMIT": group}
    peaks = Peaks()
    subscribe("work.>", stream="work", consumer="sharing", atomic=True)(peaks)
    announce(ENOUGH)
    assert work_off("sharing", *others, concurrency=8) == ENOUGH
    return peaks.seen[-ENOUGH // 4 :]  # when who had begun before has ended


def test_four_threads_share_transactions_where_the_interpreter_is_busy(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(thread_lane, "STALLED_AFTER", PATIENCE)
    always_busy(monkeypatch)
    assert max(shared_peaks(settings, group=5)) == crew.SHARERS


@pytest.mark.parametrize(("group", "busy"), [(5, 1e9), (1, 0.0)])
def test_all_threads_run_where_it_is_not_busy_or_nothing_is_shared(
    group: int, busy: float, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    always_busy(monkeypatch)
    monkeypatch.setattr(crew, "BUSY", busy)
    assert max(shared_peaks(settings, group=group)) > crew.SHARERS


def test_all_threads_run_where_it_may_be_coroutines_that_keep_it_busy(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(thread_lane, "STALLED_AFTER", PATIENCE)
    always_busy(monkeypatch)

    @subscribe("rest.>", stream="work", consumer="coroutines")
    async def rest(message: Message) -> None: ...

    assert max(shared_peaks(settings, "coroutines", group=5)) > crew.SHARERS


def test_all_threads_come_where_the_four_that_share_block(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    settings.KANTHORQ = {"GROUP_COMMIT": 5}
    always_busy(monkeypatch)
    meeting = threading.Barrier(8)

    @subscribe("work.>", stream="work", consumer="sharing", atomic=True)
    def handle(message: Message) -> None:
        if bytes(message.event.body) == b"meet":
            meeting.wait(PATIENCE)

    bodies = [*range(ENOUGH), *["meet"] * 8]
    publish_many([Event(subject="work.due", body=body) for body in bodies], stream="work")
    work_off("sharing", concurrency=8)

    assert Task.objects.completed().count() == len(bodies)
    assert not Task.objects.exclude(attempt_count=1).exists(), "some had to be tried again"
