"""What is leased is soon started, also where tasks that come together do not run together."""

import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
from django.db.models.functions import Now

from kanthorq_django import Fixed, publish_many, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.subscribers import sync
from tests.concurrency import wait_until
from tests.worker.working import PATIENCE, announce, wait_for_state, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)

COUNT = 300
CONCURRENCY = 4
AT_ONCE = Fixed(timedelta(0))


class Gate:
    """Holds handlers up, and counts how many wait in it."""

    def __init__(self) -> None:
        self.entered: list[None] = []
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def enter(self) -> None:
        self.entered.append(None)
        assert self._open.wait(2 * PATIENCE)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()


def make_tasks(consumer: str, state: TaskState, attempt_count: int = 0) -> None:
    """Give ``consumer`` tasks that nobody leases, and which are due in ``state``."""
    sync([consumer])
    announce(COUNT)
    Consumer.objects.get(name=consumer).pull(COUNT)
    Task.objects.update(state=TaskState.AVAILABLE, schedule_at=Now(), attempt_count=attempt_count)
    if state == TaskState.CANCELLING:
        Task.objects.all().cancel()
    else:
        Task.objects.update(state=state)


def most_leased(gate: Gate, looks: list[None]) -> int:
    """Return how many tasks a worker leases while its handlers are held up."""
    wait_until(lambda: len(gate.entered) == CONCURRENCY, PATIENCE)
    seen = len(looks)
    wait_until(lambda: len(looks) >= seen + 4, PATIENCE)
    return Task.objects.filter(schedule_at__gt=Now()).count()


def test_cancellations_of_the_other_lane_are_leased_as_it_starts_them(
    gate: Gate, looks: list[None]
):
    @subscribe("work.>", stream="work", consumer="mixed")
    async def handle(message: Message) -> None:
        pass

    @handle.on_cancel()
    def undo(message: Message) -> None:
        gate.enter()

    make_tasks("mixed", TaskState.CANCELLING)
    with working("mixed", concurrency=CONCURRENCY):
        leased_count = most_leased(gate, looks)
        gate.open()
    assert leased_count == CONCURRENCY


def test_cancellations_that_fill_their_lane_keep_no_new_events_from_the_other(
    gate: Gate, looks: list[None]
):
    @subscribe("work.>", stream="work", consumer="mixed")
    async def handle(message: Message) -> None:
        pass

    @handle.on_cancel()
    def undo(message: Message) -> None:
        gate.enter()

    make_tasks("mixed", TaskState.CANCELLING)
    with working("mixed", concurrency=CONCURRENCY):
        most_leased(gate, looks)
        announce(20)
        wait_for_state(TaskState.COMPLETED, 20)
        gate.open()
        wait_for_state(TaskState.CANCELLED, COUNT)


@pytest.mark.parametrize("serialize", [False, True])
def test_where_the_lane_of_cleanup_is_full_only_cancellations_wait_for_it(
    gate: Gate, serialize: bool
):
    @subscribe("long.>", stream="work", consumer="long")
    def take_long(message: Message) -> None:
        gate.enter()

    @subscribe("work.>", stream="work", consumer="mixed", retry=AT_ONCE, serialize=serialize)
    async def handle(message: Message) -> None:
        if message.attempt == 1:
            raise ValueError("so that it is tried again")

    @handle.on_cancel()
    def undo(message: Message) -> None:
        pass

    make_tasks("mixed", TaskState.CANCELLING)
    cancellations = Task.objects.all()
    cancellations.update(schedule_at=Now() + timedelta(hours=1))
    sync(["long"])
    announce(CONCURRENCY, "long.due")
    with working("long", "mixed", concurrency=CONCURRENCY):
        wait_until(lambda: len(gate.entered) == CONCURRENCY, PATIENCE)
        cancellations.filter(state=TaskState.CANCELLING).update(schedule_at=Now())
        publish_many(
            [Event(subject="work.due", resource_key=f"key-{number}") for number in range(20)],
            stream="work",
        )
        wait_for_state(TaskState.COMPLETED, 20)
        assert cancellations.cancelling().count() == COUNT
        gate.open()
        wait_for_state(TaskState.CANCELLED, COUNT)


@pytest.mark.parametrize("state", [TaskState.CANCELLING, TaskState.RETRYABLE])
def test_what_a_batch_handler_gets_alone_is_leased_as_it_is_started(
    gate: Gate, looks: list[None], state: TaskState
):
    @subscribe("work.>", stream="work", consumer="batched", batch=100)
    def handle(messages: list[Message]) -> None:
        gate.enter()

    @handle.on_cancel()
    def undo(message: Message) -> None:
        gate.enter()

    make_tasks("batched", state, attempt_count=1)
    with working("batched", concurrency=CONCURRENCY):
        leased_count = most_leased(gate, looks)
        gate.open()
    assert leased_count <= 2 * CONCURRENCY


def test_due_tasks_that_never_ran_soon_come_in_full_batches():
    sizes: list[int] = []

    @subscribe("work.>", stream="work", consumer="batched", batch=32)
    def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))

    make_tasks("batched", TaskState.AVAILABLE)
    assert work_off("batched", concurrency=1) == COUNT
    assert sizes.count(32) >= COUNT // 32 - 3
