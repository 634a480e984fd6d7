"""Handlers that go on for ever though their timeout is over, and what a worker still does."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta

import pytest

from kanthorq_django import subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState, Worker
from kanthorq_django.subscribers import find, sync
from kanthorq_django.worker import loop, process
from kanthorq_django.worker.flight import Flight, Flights
from kanthorq_django.worker.lanes import deafness, loop_watch
from kanthorq_django.worker.lanes.call import Call
from kanthorq_django.worker.lanes.orm_thread import OrmThread
from kanthorq_django.worker.lanes.thread_lane import ThreadLane
from kanthorq_django.worker.options import WorkerOptions
from tests.concurrency import wait_until
from tests.worker.working import PATIENCE, accept, announce, wait_for_state, working

pytestmark = pytest.mark.django_db(transaction=True)


class Deaf:
    """A handler that a test has to end itself."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.may_end = threading.Event()

        @subscribe(
            "deaf.>",
            stream="work",
            consumer="deaf",
            visibility_timeout=timedelta(seconds=1),
            timeout=timedelta(milliseconds=200),
        )
        def handle(message: Message) -> None:
            self.begun.append(message.attempt)
            self.may_end.wait(2 * PATIENCE)


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    made = Deaf()
    yield made
    made.may_end.set()


def test_a_deaf_handler_takes_two_places_of_a_worker(deaf: Deaf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "STILL_RUNNING", timedelta(milliseconds=50))
    accept("quick")
    announce(1, "deaf.due")
    with working("deaf", "quick", concurrency=3):
        wait_until(lambda: Task.objects.filter(lease_epoch__gte=6).exists(), PATIENCE)
        assert deaf.begun == [1, 2]
        announce(3)
        wait_for_state(TaskState.COMPLETED, 3)
        deaf.may_end.set()
        wait_for_state(TaskState.COMPLETED, 4)  # by the next attempt, as it is free to begin
    assert deaf.begun == [1, 2, 3]


def test_a_worker_that_only_deaf_handlers_are_left_of_has_started_all_that_it_may(deaf: Deaf):
    accept("quick")
    announce(1, "deaf.due")
    options = {"max_tasks": 3, "concurrency": 3, "shutdown_timeout": timedelta(0)}
    with working("deaf", "quick", **options) as worker:
        wait_until(lambda: len(deaf.begun) == 2, PATIENCE)
        announce(1)
        wait_until(lambda: Task.objects.completed().exists(), PATIENCE)
        wait_until(lambda: not Worker.objects.exists(), PATIENCE)
        assert worker.has_stragglers


def test_a_worker_all_of_whose_places_are_taken_by_deaf_handlers_ends(
    deaf: Deaf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(deafness, "DEAF_AFTER", 0.2)
    monkeypatch.setattr(deafness, "CHECKED_EVERY", 0.0)
    announce(2, "deaf.due")
    with working("deaf", concurrency=2, shutdown_timeout=timedelta(0)) as worker:
        wait_until(lambda: not Worker.objects.exists() and len(deaf.begun) == 2, PATIENCE)
    assert worker.has_failed
    assert worker.has_stragglers
    assert "All handlers that may run are deaf to their timeouts" in caplog.text


def test_handlers_that_were_frozen_with_their_worker_are_not_deaf(
    monkeypatch: pytest.MonkeyPatch, looks: list[None]
):
    monkeypatch.setattr(deafness, "CHECKED_EVERY", 0.0)
    has_begun, may_end = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="frozen", timeout=timedelta(seconds=50))
    def handle(message: Message) -> None:
        has_begun.set()
        may_end.wait(2 * PATIENCE)

    announce()
    clock = time.monotonic
    with working("frozen", concurrency=1) as worker:
        assert has_begun.wait(PATIENCE)
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 100)  # as after a SIGSTOP
        before = len(looks)
        wait_until(lambda: len(looks) > before + 5 or worker.has_failed, PATIENCE)
        may_end.set()
        assert not worker.has_failed
        wait_for_state(TaskState.COMPLETED)


async def hold_out(event: threading.Event) -> None:
    """Wait for ``event``, whoever interrupts."""
    while not event.is_set():
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("deaf_count", [0, 1])
def test_a_worker_goes_on_one_of_whose_places_is_taken_by_what_has_not_begun(
    deaf_count: int, monkeypatch: pytest.MonkeyPatch, looks: list[None]
):
    monkeypatch.setattr(deafness, "DEAF_AFTER", 0.0)
    monkeypatch.setattr(deafness, "CHECKED_EVERY", 0.0)
    may_begin, may_end = threading.Event(), threading.Event()
    begun: list[None] = []
    waiting: list[None] = []

    @subscribe(
        "deaf.>", stream="work", consumer="deaf", batch=2, timeout=timedelta(milliseconds=50)
    )
    async def hang(messages: list[Message]) -> None:
        begun.append(None)
        await hold_out(may_end)

    @subscribe("work.>", stream="work", consumer="late")
    async def ignore(message: Message) -> None:
        pass

    async def is_ready(_: OrmThread) -> bool:
        if len(begun) == deaf_count:
            waiting.append(None)
            await hold_out(may_begin)
        return True

    monkeypatch.setattr(OrmThread, "is_ready", is_ready)
    announce(2 * deaf_count, "deaf.due")  # a batch takes one place
    with working("deaf", "late", concurrency=deaf_count + 1) as worker:
        wait_until(lambda: len(begun) == deaf_count, PATIENCE)
        announce()
        wait_until(lambda: waiting, PATIENCE)
        before = len(looks)
        wait_until(lambda: len(looks) > before + 5 or worker.has_failed, PATIENCE)
        assert not worker.has_failed
        may_begin.set()
        may_end.set()
        wait_for_state(TaskState.COMPLETED, 1, consumer__name="late")


@pytest.mark.parametrize("waiting_count", [0, 1])
def test_a_worker_ends_whose_event_loop_a_deaf_handler_blocks(
    waiting_count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(deafness, "DEAF_AFTER", 0.2)
    monkeypatch.setattr(deafness, "CHECKED_EVERY", 0.0)
    monkeypatch.setattr(loop_watch, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(loop_watch, "BLOCKED_AFTER", 0.3)
    may_end = threading.Event()
    begun: list[None] = []

    @subscribe("work.>", stream="work", consumer="blocks", timeout=timedelta(milliseconds=50))
    async def block(message: Message) -> None:
        begun.append(None)
        may_end.wait(2 * PATIENCE)

    announce(1 + waiting_count)
    with working("blocks", concurrency=2, shutdown_timeout=timedelta(0)) as worker:
        try:
            wait_until(lambda: worker.has_failed, PATIENCE)
            assert len(begun) == 1
        finally:
            may_end.set()
    assert "All handlers that may run are deaf to their timeouts" in caplog.text


def test_what_waits_behind_deaf_handlers_does_not_hide_them(monkeypatch: pytest.MonkeyPatch):
    """As the later groups of a key do, for as long as the first one runs."""
    monkeypatch.setattr(deafness, "DEAF_AFTER", 0.0)
    monkeypatch.setattr(deafness, "CHECKED_EVERY", 0.0)
    accept("deaf", timeout=timedelta(minutes=1))
    (consumer,) = sync(["deaf"])
    announce(2)
    begun, waiting = [Flight(task, find("deaf"), time.monotonic()) for task in consumer.pull(2)]
    flights = Flights(lambda: None)
    flights.add([begun, waiting])
    lane = ThreadLane(1, lambda endings: None, lambda: None, nullcontext, is_alone=True)
    lane.submit([Call(((begun,), (waiting,)))])
    watch = deafness.Deafness(flights, {False: lane})
    assert lane._next() is not None
    assert begun.start()
    assert not watch.is_total()
    assert begun.started_at is not None
    begun.started_at -= 61
    assert watch.is_total()


def test_one_handler_on_time_keeps_a_worker_and_one_of_another_lane_does_not(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(deafness, "DEAF_AFTER", 0.0)
    monkeypatch.setattr(deafness, "CHECKED_EVERY", 0.0)
    accept("deaf", timeout=timedelta(minutes=1))

    @subscribe("work.>", stream="work", consumer="awaits", timeout=timedelta(minutes=1))
    async def wait(message: Message) -> None: ...

    both, other = sync(["deaf", "awaits"])
    announce(2)
    now = time.monotonic()
    first, second = (Flight(task, find("deaf"), now) for task in both.pull(2))
    elsewhere = Flight(other.pull(1)[0], find("awaits"), now)
    flights = Flights(lambda: None)
    flights.add([first, second, elsewhere])
    lane = ThreadLane(2, lambda endings: None, lambda: None, nullcontext, is_alone=True)
    lane.submit([Call(((each,),)) for each in (first, second)])
    watch = deafness.Deafness(flights, {False: lane})
    for place, flight in enumerate((first, second, elsewhere)):
        flight.started_at, flight.thread = now, place + 1
    first.started_at = now - 61
    assert lane._next() is not None
    assert lane._next() is not None
    assert not watch.is_total()
    second.started_at = now - 61
    assert watch.is_total()


@pytest.mark.parametrize("has_stragglers", [True, False])
def test_its_process_ends_with_status_1_also_if_the_handlers_ended_after_all(
    has_stragglers: bool, monkeypatch: pytest.MonkeyPatch
):
    def run(worker: loop.WorkerLoop) -> int:
        worker.has_failed = True
        return 0

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(loop.WorkerLoop, "run", run)
    monkeypatch.setattr(loop.WorkerLoop, "has_stragglers", has_stragglers)
    monkeypatch.setattr(process, "leave", leave)
    with pytest.raises(SystemExit) as ended:
        process.run_process(WorkerOptions(), print)
    assert ended.value.code == 1
