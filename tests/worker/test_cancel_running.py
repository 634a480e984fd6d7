"""Cancelling that reaches running work, and the cleanup that follows."""

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.db.models.functions import Now

from kanthorq_django import Fixed, Never, publish_many, subscribe
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.exceptions import TaskCancelled
from kanthorq_django.message import Message
from kanthorq_django.models import Event, Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.subscribers import sync
from tests.ledger.models import Entry
from tests.worker.working import PATIENCE, announce, wait_for_state, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)

SOON = Fixed(delay=timedelta(milliseconds=20))
LONG = timedelta(hours=1)


class Export:
    """A handler that runs until it is told to stop."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.stopped = threading.Event()

    def handler(self) -> Callable[[Message], None]:
        def run(message: Message) -> None:
            self.started.set()
            while not message.cancelled:
                threading.Event().wait(0.005)
            self.stopped.set()
            message.raise_if_cancelled()

        return run


def note(text: str, message: Message) -> None:
    Entry.objects.create(event_id=message.event.pk, note=text)


@pytest.mark.parametrize("listen", [True, False])
def test_a_request_reaches_a_running_handler(listen: bool):
    export = Export()
    # Without LISTEN it is known with the next renewal: after a third of a short lease.
    lease = LONG if listen else timedelta(seconds=1)
    subscribe("work.>", stream="work", consumer="export", visibility_timeout=lease)(
        export.handler()
    )
    (event,) = announce()

    with working("export", listen=listen):
        assert export.started.wait(PATIENCE)
        outcome = Task.objects.filter(consumer__name="export").cancel(running=True)
        assert outcome == Outcome(requested=(event.pk,))
        assert export.stopped.wait(PATIENCE)
        wait_for_state(TaskState.CANCELLED)
    assert Task.objects.get().attempt_count == 1


def test_a_request_reaches_a_worker_that_pulls_nothing():
    export = Export()
    subscribe("work.>", stream="work", consumer="export", visibility_timeout=LONG)(export.handler())
    announce()
    (consumer,) = sync(["export"])
    consumer.pull()
    Task.objects.running().update(state=TaskState.RETRYABLE, schedule_at=Now())
    with working("export", listen=True, pullers=("retry", "visibility")):
        assert export.started.wait(PATIENCE)
        Task.objects.running().cancel(running=True)
        assert export.stopped.wait(PATIENCE)
        wait_for_state(TaskState.CANCELLED)


def test_a_notification_has_a_worker_look_for_requests_once(monkeypatch: pytest.MonkeyPatch):
    looks: list[None] = []

    def counted(*args: Any) -> list[lease.Lease]:
        looks.append(None)
        return asked_to_cancel(*args)

    asked_to_cancel = lease.asked_to_cancel
    monkeypatch.setattr(lease, "asked_to_cancel", counted)
    export = Export()
    subscribe("work.>", stream="work", consumer="export", visibility_timeout=LONG)(export.handler())
    announce(2)
    with working("export", concurrency=2, listen=True):
        wait_for_state(TaskState.RUNNING, 2)
        seen = len(looks)
        Task.objects.filter(pk=Task.objects.earliest("pk").pk).cancel(running=True)
        wait_for_state(TaskState.CANCELLED)
        threading.Event().wait(0.2)  # in which many more could follow
        assert seen < len(looks) < seen + 10
        Task.objects.all().cancel(running=True)
        wait_for_state(TaskState.CANCELLED, 2)


def test_asking_twice_is_a_no_op():
    export = Export()
    subscribe("work.>", stream="work", consumer="export")(export.handler())
    (event,) = announce()
    with working("export", listen=True):
        assert export.started.wait(PATIENCE)
        Task.objects.all().cancel(running=True)
        assert Task.objects.running().cancel(running=True).requested == ()
        wait_for_state(TaskState.CANCELLED)
    assert Task.objects.all().cancel(running=True) == Outcome(noop=(event.pk,))


def test_an_async_handler_is_interrupted_at_its_next_await():
    started, cleaned = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="export")
    async def export(message: Message) -> None:
        started.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.set()

    announce()
    with working("export", listen=True):
        assert started.wait(PATIENCE)
        Task.objects.all().cancel(running=True)
        assert cleaned.wait(PATIENCE)
        wait_for_state(TaskState.CANCELLED)


def test_a_coroutine_is_interrupted_when_all_that_is_left_of_its_batch_is_to_stop():
    has_acked = threading.Event()

    @subscribe("work.>", stream="work", consumer="export", batch=4)
    async def export(messages: list[Message]) -> None:
        await messages[0].aack()
        has_acked.set()
        await asyncio.sleep(3600)

    announce(4)
    with working("export", listen=True, concurrency=4, batch_size=4):
        assert has_acked.wait(PATIENCE)
        Task.objects.running().cancel(running=True)
        wait_for_state(TaskState.CANCELLED, 3)
    assert Task.objects.completed().count() == 1


def test_a_handler_that_finishes_first_completes():
    started, may_end = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="export")
    def export(message: Message) -> str:
        started.set()
        may_end.wait(PATIENCE)
        return "done"

    announce()
    with working("export", listen=True):
        assert started.wait(PATIENCE)
        Task.objects.all().cancel(running=True)
        may_end.set()
        wait_for_state(TaskState.COMPLETED)
    task = Task.objects.get()
    assert task.result == "done"
    assert task.cancel_requested_at is not None


@pytest.mark.parametrize("failure", [ValueError("no"), TaskCancelled("stopped")])
def test_a_handler_that_fails_after_the_request_is_not_retried(failure: Exception):
    started = threading.Event()

    @subscribe("work.>", stream="work", consumer="export", retry=SOON)
    def export(message: Message) -> None:
        started.set()
        while not message.cancelled:
            threading.Event().wait(0.005)
        raise failure

    announce()
    with working("export", listen=True):
        assert started.wait(PATIENCE)
        Task.objects.all().cancel(running=True)
        wait_for_state(TaskState.CANCELLED)
    task = Task.objects.get()
    assert task.attempt_count == 1
    assert [entry["verb"] for entry in task.attempted_errors] == ["handle"]


def test_cleanup_runs_after_a_running_task_was_cancelled_and_is_retried_until_it_succeeds():
    export = Export()
    subscriber = subscribe("work.>", stream="work", consumer="export", atomic=True, attempt_max=1)(
        export.handler()
    )

    @subscriber.on_cancel(retry=SOON)
    def remove_files(message: Message) -> None:
        note(f"cleanup {message.attempt}", message)
        if message.attempt < 3:
            raise OSError(f"disk is busy {message.attempt}")

    announce()
    with working("export", listen=True):
        assert export.started.wait(PATIENCE)
        Task.objects.all().cancel(running=True)
        wait_for_state(TaskState.CANCELLED)
    task = Task.objects.get()
    assert task.cancel_attempt_count == 3  # of its own, though the handler had only one
    assert [entry["verb"] for entry in task.attempted_errors] == ["handle", "cancel", "cancel"]
    assert [entry["attempt"] for entry in task.attempted_errors] == [1, 1, 2]
    # atomic=True: what a failed cleanup wrote was rolled back.
    assert list(Entry.objects.values_list("note", flat=True)) == ["cleanup 3"]


def test_cleanup_that_never_succeeds_ends_discarded_with_both_histories():
    @subscribe("work.>", stream="work", consumer="export", retry=Fixed(delay=LONG))
    def export(message: Message) -> None:
        raise ValueError("export failed")

    @export.on_cancel(retry=Fixed(delay=timedelta(0), attempt_max=2))
    def remove_files(message: Message) -> None:
        raise OSError("disk is gone")

    (event,) = announce()
    work_off("export")
    assert Task.objects.all().cancel() == Outcome(updated=(event.pk,))
    assert Task.objects.get().state == TaskState.CANCELLING  # whatever its schedule_at was
    work_off("export")
    task = Task.objects.get()
    assert task.state == TaskState.DISCARDED
    assert [entry["error"] for entry in task.attempted_errors] == [
        "ValueError: export failed",
        "OSError: disk is gone",
        "OSError: disk is gone",
    ]


def test_an_async_cleanup_follows_a_plain_handler():
    @subscribe("work.>", stream="work", consumer="export", parked=True)
    def export(message: Message) -> None:
        raise AssertionError("never run")

    seen = []

    @export.on_cancel()
    async def remove_files(message: Message) -> None:
        await asyncio.sleep(0)
        seen.append(message.event.pk)

    (event,) = announce()
    work_off("export")
    Task.objects.pending().cancel()
    work_off("export")
    assert seen == [event.pk]
    assert Task.objects.get().state == TaskState.CANCELLED


def test_removing_the_cleanup_from_the_code_strands_nothing():
    @subscribe("work.>", stream="work", consumer="export", parked=True)
    def export(message: Message) -> None: ...

    @export.on_cancel(retry=Never())
    def remove_files(message: Message) -> None: ...

    announce(3)
    work_off("export")
    Task.objects.pending().cancel()
    assert Task.objects.cancelling().count() == 3

    subscribe("work.>", stream="work", consumer="export", parked=True)(export)
    work_off("export")
    assert Task.objects.cancelled().count() == 3


def test_a_worker_that_dies_leaves_the_cancellation_to_another_one():
    """The lease runs out while the request stands: no retry, but the cleanup."""
    handled, cleaned = [], []

    @subscribe("work.>", stream="work", consumer="export", visibility_timeout=timedelta(seconds=1))
    def export(message: Message) -> None:
        handled.append(message.attempt)

    @export.on_cancel()
    def remove_files(message: Message) -> None:
        cleaned.append(message.attempt)

    announce()
    (consumer,) = sync(["export"])
    (task,) = consumer.pull()  # this process holds the lease, and will never renew it
    Task.objects.filter(pk=task.pk).cancel(running=True)
    with working("export"):
        wait_for_state(TaskState.CANCELLED)
    assert (handled, cleaned) == ([], [1])


def test_everything_with_a_resource_key_is_cancelled_at_once():
    @subscribe("work.>", stream="work", consumer="export", parked=True)
    def export(message: Message) -> None: ...

    mine, other = publish_many(
        [Event(subject="work.a", resource_key=key) for key in ("order-17", "order-18")],
        stream="work",
    )
    work_off("export")
    outcome = Task.objects.filter(consumer__name="export", resource_key="order-17").cancel()
    assert outcome == Outcome(updated=(mine.pk,))
    assert Task.objects.pending().get().event_id == other.pk


def test_a_request_that_is_rolled_back_reaches_nobody():
    export = Export()
    subscribe("work.>", stream="work", consumer="export")(export.handler())
    announce()
    with working("export", listen=True):
        assert export.started.wait(PATIENCE)
        with transaction.atomic():
            Task.objects.all().cancel(running=True)
            transaction.set_rollback(True)
        assert not export.stopped.is_set()
        assert Task.objects.get().cancel_requested_at is None
        Task.objects.all().cancel(running=True)
        wait_for_state(TaskState.CANCELLED)
