"""A running task is deleted: its ack raises LeaseLost, nothing commits, the worker goes on."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.db.models.functions import Now

from kanthorq_django import Fixed, publish_many, signals, subscribe
from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.subscribers import sync
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.receivers import heard_by
from tests.worker.working import PATIENCE, accept, announce, wait_for_state, working

pytestmark = pytest.mark.django_db(transaction=True)

CONSUMER = "deleted"
LOST = "lost its lease, alone or with its batch; rolled back"
RETRY = Fixed(timedelta(0))
OVER = "was over before its verdict; nothing was written."


class Door:
    """Where the handler of the first event waits until its task has been deleted."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def enter(self, message: Message) -> None:
        if message.event.json() == 0:
            self.reached.set()
            assert self.opened.wait(PATIENCE)


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "kanthorq_django.worker")
    return caplog


@contextmanager
def first_task_deleted(door: Door, count: int = 2) -> Iterator[list[Event]]:
    """Delete the first of ``count`` tasks while it runs, and wait until the others are done."""
    events = announce(count)
    with working(CONSUMER, concurrency=1):
        assert door.reached.wait(PATIENCE)
        Task.objects.get(event=events[0]).delete()
        door.opened.set()
        wait_for_state(TaskState.COMPLETED, count - 1)
    yield events
    assert not Task.objects.filter(event=events[0]).exists()


def write(message: Message) -> None:
    Entry.objects.create(event_id=message.event.pk)


def met_by(verdict: Callable[[], None]) -> type[BaseException] | None:
    """Return what kind of exception, if any, ``verdict`` raised."""
    try:
        verdict()
    except BaseException as error:  # noqa: BLE001  # that it is nothing else is what is tested
        return type(error)
    return None


def is_calm(logged: pytest.LogCaptureFixture) -> bool:
    return all(record.levelno < logging.ERROR for record in logged.records)


def written() -> set[Any]:
    return set(Entry.objects.values_list("event_id", flat=True))


@pytest.mark.parametrize("verdict", [Message.ack, lambda message: message.nack("no")])
def test_a_plain_handlers_own_verdict_raises_lease_lost_and_nothing_else(
    door: Door, logged: pytest.LogCaptureFixture, verdict: Callable[[Message], None]
):
    met = []

    @subscribe("work.>", stream="work", consumer=CONSUMER)
    def handle(message: Message) -> None:
        door.enter(message)
        if message.event.json() == 0:
            met.append(met_by(lambda: verdict(message)))

    with first_task_deleted(door):
        assert met == [LeaseLost]
    assert OVER in logged.text
    assert is_calm(logged)


def test_a_handlers_own_block_is_rolled_back(door: Door, logged: pytest.LogCaptureFixture):
    @subscribe("work.>", stream="work", consumer=CONSUMER)
    def handle(message: Message) -> None:
        with transaction.atomic():
            write(message)
            door.enter(message)
            message.ack()

    with first_task_deleted(door) as (_, other):
        assert written() == {other.pk}
    assert LOST in logged.text
    assert is_calm(logged)


def test_a_coroutines_own_ack_raises_lease_lost_and_nothing_else(
    door: Door, logged: pytest.LogCaptureFixture
):
    met: list[BaseException] = []

    @subscribe("work.>", stream="work", consumer=CONSUMER)
    async def handle(message: Message) -> None:
        await asyncio.to_thread(door.enter, message)
        try:
            await message.aack()
        except BaseException as error:
            met.append(error)
            raise

    with first_task_deleted(door):
        assert [type(error) for error in met] == [LeaseLost]
    assert LOST in logged.text
    assert is_calm(logged)


@pytest.mark.parametrize("group_commit", [1, 20])
def test_an_atomic_handler_is_rolled_back(
    door: Door, logged: pytest.LogCaptureFixture, settings: Any, group_commit: int
):
    settings.KANTHORQ = {"GROUP_COMMIT": group_commit}

    @subscribe("work.>", stream="work", consumer=CONSUMER, atomic=True)
    def handle(message: Message) -> None:
        write(message)
        door.enter(message)

    with first_task_deleted(door) as (_, other):
        assert written() == {other.pk}
    assert LOST in logged.text
    assert is_calm(logged)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_implicit_ack_is_logged_and_the_worker_goes_on(
    door: Door, logged: pytest.LogCaptureFixture, is_async: bool
):
    def handle(message: Message) -> None:
        door.enter(message)

    async def handle_async(message: Message) -> None:
        await asyncio.to_thread(door.enter, message)

    subscribe("work.>", stream="work", consumer=CONSUMER)(handle_async if is_async else handle)
    with first_task_deleted(door) as (deleted, _):
        assert str(deleted.pk) in logged.text
    assert OVER in logged.text
    assert is_calm(logged)


def test_only_the_deleted_one_of_a_batch_loses_its_lease(
    door: Door, logged: pytest.LogCaptureFixture
):
    met: list[type[BaseException] | None] = []

    @subscribe("work.>", stream="work", consumer=CONSUMER, batch=3)
    def handle(messages: list[Message]) -> None:
        for message in messages:
            door.enter(message)
        met.extend(met_by(message.ack) for message in messages)

    with first_task_deleted(door, count=3):
        assert met == [LeaseLost, None, None]
    assert OVER in logged.text
    assert is_calm(logged)


def test_an_atomic_batch_is_rolled_back_and_the_others_run_again_uncounted(
    door: Door, logged: pytest.LogCaptureFixture
):
    sizes = []

    @subscribe("work.>", stream="work", consumer=CONSUMER, batch=3, atomic=True)
    def handle(messages: list[Message]) -> None:
        sizes.append(len(messages))
        for message in messages:
            write(message)
            door.enter(message)

    with first_task_deleted(door, count=3) as (_, *others):
        assert written() == {event.pk for event in others}
    assert sizes == [3, 2]
    assert Entry.objects.count() == 2
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}
    assert LOST in logged.text
    assert is_calm(logged)


@pytest.mark.parametrize("options", [{}, {"grouped": True}], ids=["batched", "grouped"])
def test_an_event_that_was_deleted_fails_alone(options: dict[str, Any]):
    told: list[Task] = []

    def note(tasks: list[Task], **_: object) -> None:
        told.extend(tasks)

    @subscribe(
        "work.>", stream="work", consumer=CONSUMER, batch=4, attempt_max=2, retry=RETRY, **options
    )
    def handle(messages: list[Message]) -> None:
        for message in messages:
            message.event.json()
            message.ack()

    sync([CONSUMER])
    events = publish_many(
        [Event(subject="work.due", body=number, resource_key="key") for number in range(4)],
        stream="work",
    )
    Consumer.objects.get().pull(4)
    Task.objects.update(state=TaskState.AVAILABLE, attempt_count=0, schedule_at=Now())
    Event.objects.filter(pk=events[-1].pk)._raw_delete("default")  # past the protection
    with heard_by(note, signals.claimed), working(CONSUMER):
        wait_for_state(TaskState.COMPLETED, 3)
        wait_for_state(TaskState.DISCARDED, 1)
    error = Task.objects.discarded().get().attempted_errors[-1]["error"]
    assert error == f"Event.DoesNotExist: Event {events[-1].pk} of consumer 'deleted' was deleted."
    assert {task.pk for task in told} == set(Task.objects.values_list("pk", flat=True))


def test_a_deleted_consumer_is_told_of_once_and_keeps_no_other_from_work(
    caplog: pytest.LogCaptureFixture,
):
    accept("kept")
    accept("deleted")
    with working("kept", "deleted"):
        announce()
        wait_until(lambda: Task.objects.completed().count() == 2)
        Consumer.objects.get(name="deleted").delete()
        sync(["deleted"])
        announce()
        wait_until(lambda: "Consumer deleted was deleted" in caplog.text)
        announce()
        wait_until(lambda: Task.objects.completed().filter(consumer__name="kept").count() == 3)
    assert caplog.text.count("was deleted") == 1
