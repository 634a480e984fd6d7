"""Leases in a running worker: renewed, lost, reclaimed, and bounded by the handler's timeout."""

import asyncio
import threading
import time
from datetime import timedelta

import pytest
from django.db import transaction
from django.db.models import F
from django.db.models.functions import Now

from kanthorq_django import Fixed, subscribe
from kanthorq_django.exceptions import LeaseLost, TaskCancelled
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task, TaskState
from kanthorq_django.subscribers import find, sync
from kanthorq_django.worker.acknowledger import Acknowledger
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.warden import TICK_MAX, TICK_MIN, tick_of
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.worker.working import PATIENCE, accept, announce, wait_for_state, working

pytestmark = pytest.mark.django_db(transaction=True)

SHORT = timedelta(seconds=1)  # the shortest visibility timeout there is
HOUR = timedelta(hours=1)


def stolen(task: Task) -> Task:
    """Let the lease of ``task`` run out, and claim it as another worker would."""
    Task.objects.filter(pk=task.pk).update(schedule_at=Now() - timedelta(seconds=1))
    (claimed,) = Consumer.objects.get(pk=task.consumer_id).claim()
    return claimed


def wait_until_renewed(task: Task, times: int) -> None:
    """Wait until the end of the lease has moved ``times`` times."""
    ends = set()

    def has_moved() -> bool:
        ends.add(Task.objects.get(pk=task.pk).schedule_at)
        return len(ends) > times

    wait_until(has_moved, PATIENCE)


@transaction.atomic
def write_late(message: Message) -> None:
    Entry.objects.create(event_id=message.event.pk, note="late")
    message.ack()


def test_a_lease_is_renewed_while_its_handler_runs():
    runs, end = [], threading.Event()

    @subscribe("work.>", stream="work", consumer="long", visibility_timeout=SHORT)
    def handle(message: Message) -> None:
        runs.append(message.attempt)
        end.wait(PATIENCE)

    announce()
    with working("long"):
        wait_for_state(TaskState.RUNNING)
        wait_until_renewed(Task.objects.get(), times=5)  # for longer than the first lease
        end.set()
        wait_for_state(TaskState.COMPLETED)
    assert runs == [1]
    assert Task.objects.get().attempt_count == 1


def test_a_task_whose_worker_died_runs_again():
    @subscribe("work.>", stream="work", consumer="stuck", visibility_timeout=SHORT)
    def handle(message: Message) -> int:
        return message.attempt

    announce()
    (consumer,) = sync(["stuck"])
    consumer.pull()  # by a worker that never handles it

    with working("stuck"):
        wait_for_state(TaskState.COMPLETED)
    task = Task.objects.get()
    assert (task.result, task.lease_epoch) == (2, 2)
    assert "lease ran out" in task.attempted_errors[0]["error"]


def test_the_handler_of_a_lost_lease_is_told():
    is_told, end = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="loses", visibility_timeout=SHORT)
    def handle(message: Message) -> None:
        wait_until(lambda: message.cancelled, PATIENCE)
        is_told.set()
        end.wait(PATIENCE)

    announce()
    with working("loses", pullers=("primary",)):
        wait_for_state(TaskState.RUNNING)
        other = stolen(Task.objects.get())
        assert is_told.wait(PATIENCE)
        end.set()
        Message(other).ack("by the other")
    assert Task.objects.get().result == "by the other"


def test_the_coroutine_of_a_lost_lease_is_interrupted():
    interrupted = threading.Event()

    @subscribe("work.>", stream="work", consumer="loses", visibility_timeout=SHORT)
    async def handle(message: Message) -> None:
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            interrupted.set()
            raise

    announce()
    with working("loses", pullers=("primary",)):
        wait_for_state(TaskState.RUNNING)
        other = stolen(Task.objects.get())
        assert interrupted.wait(PATIENCE)
    task = Task.objects.get()
    assert (task.state, task.lease_epoch) == (TaskState.RUNNING, other.lease_epoch)
    assert "interrupted" not in str(task.attempted_errors)


def test_what_an_interrupted_coroutine_cleans_up_is_not_interrupted_again():
    cleaned = threading.Event()

    @subscribe("work.>", stream="work", consumer="cleans", visibility_timeout=SHORT)
    async def handle(message: Message) -> None:
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            await asyncio.sleep(1)  # several looks of the warden and the renewer
            cleaned.set()

    announce()
    with working("cleans", pullers=("primary",)):
        wait_for_state(TaskState.RUNNING)
        stolen(Task.objects.get())
        assert cleaned.wait(PATIENCE)


def test_a_plain_handler_over_its_timeout_is_told_and_its_task_claimed_again(
    caplog: pytest.LogCaptureFixture,
):
    attempts: list[int] = []
    lost = threading.Event()

    @subscribe(
        "work.>",
        stream="work",
        consumer="overdue",
        visibility_timeout=SHORT,
        timeout=timedelta(milliseconds=300),
    )
    def handle(message: Message) -> None:
        attempts.append(message.attempt)
        if message.attempt == 1:
            wait_until(lambda: message.cancelled, PATIENCE)
            wait_until(lambda: len(attempts) > 1, PATIENCE)  # its lease ran out, not renewed
            with pytest.raises(LeaseLost):
                write_late(message)
            lost.set()

    announce()
    with working("overdue", concurrency=2):
        assert lost.wait(PATIENCE)
        wait_for_state(TaskState.COMPLETED)
        wait_until(lambda: "was over before its verdict" in caplog.text, PATIENCE)
    assert attempts == [1, 2]
    assert not Entry.objects.exists()
    (told,) = [each.message for each in caplog.records if "takes longer" in each.message]
    assert "its timeout of 0:00:00.300000" in told
    _, where, *frames = told.splitlines()
    assert ", in handle" in where
    assert "wait_until(lambda: message.cancelled, PATIENCE)" in frames[0]
    (error,) = Task.objects.get().attempted_errors
    assert error["error"].endswith("Its handler's timeout is 0:00:00.300000.")


def test_a_coroutine_over_its_timeout_is_interrupted_and_retried(
    caplog: pytest.LogCaptureFixture,
):
    interrupted = threading.Event()

    @subscribe(
        "work.>",
        stream="work",
        consumer="overdue",
        timeout=timedelta(milliseconds=200),
        retry=Fixed(timedelta(0)),
    )
    async def handle(message: Message) -> None:
        if message.attempt == 1:
            try:
                await asyncio.sleep(PATIENCE)
            finally:
                interrupted.set()

    announce()
    with working("overdue"):
        wait_for_state(TaskState.COMPLETED)
    assert interrupted.is_set()
    (error,) = Task.objects.get().attempted_errors
    assert (
        error["error"]
        == "TimeoutError: The handler took longer than its timeout of 0:00:00.200000."
    )
    assert "await asyncio.sleep(PATIENCE)" in error["stack"]  # where it was
    assert "await asyncio.sleep(PATIENCE)" in caplog.text
    assert "kanthorq_django" not in error["stack"]


def test_a_long_block_after_an_ack_keeps_its_lease():
    """Its row is locked, so it cannot be renewed; nor can anybody else claim it."""
    cancelled: list[bool] = []
    is_acked, end = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="long-block", visibility_timeout=SHORT)
    def handle(message: Message) -> None:
        with transaction.atomic():
            message.ack()
            is_acked.set()
            end.wait(PATIENCE)
            cancelled.append(message.cancelled)

    announce()
    with working("long-block"):
        assert is_acked.wait(PATIENCE)
        task = Task.objects.get()
        wait_until(
            lambda: Task.objects.filter(schedule_at__lt=Now() - SHORT / 2).exists(), PATIENCE
        )
        end.set()
        wait_for_state(TaskState.COMPLETED)
    assert cancelled == [False]
    assert Task.objects.get().lease_epoch == task.lease_epoch


def test_a_handler_that_has_acknowledged_may_take_its_time_to_return():
    """Its task is nobody's any more, which the renewals of its worker's leases find."""
    cancelled: list[bool] = []
    is_acked, end = threading.Event(), threading.Event()

    @subscribe("work.>", stream="work", consumer="acks-early", visibility_timeout=SHORT)
    def handle(message: Message) -> None:
        is_first = message.event.json() == 0
        if is_first:
            message.ack()
            is_acked.set()
        end.wait(PATIENCE)
        if is_first:
            cancelled.append(message.cancelled)

    announce(2)
    with working("acks-early", concurrency=2):
        assert is_acked.wait(PATIENCE)
        wait_for_state(TaskState.RUNNING)
        wait_until_renewed(Task.objects.running().get(), times=4)
        end.set()
        wait_for_state(TaskState.COMPLETED, 2)
    assert cancelled == [False]


def test_a_locked_row_does_not_stop_the_renewal_of_others():
    end = threading.Event()

    @subscribe("work.>", stream="work", consumer="both", visibility_timeout=SHORT)
    def handle(message: Message) -> None:
        end.wait(PATIENCE)

    announce(2)
    with working("both", concurrency=2):
        wait_for_state(TaskState.RUNNING, 2)
        locked, free = Task.objects.order_by("pk")
        with transaction.atomic():
            Task.objects.select_for_update(of=("self",)).get(pk=locked.pk)
            wait_until_renewed(free, times=4)
        end.set()
        wait_for_state(TaskState.COMPLETED, 2)
    assert Task.objects.get(pk=free.pk).attempt_count == 1


def test_a_verdict_whose_row_is_locked_when_the_worker_ends_is_written_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
):
    """Or the task would run once more, when its lease is over."""
    is_inside, end, is_last = threading.Event(), threading.Event(), threading.Event()
    finish = Acknowledger.finish

    def finish_and_tell(self: Acknowledger, seconds: float) -> bool:
        is_last.set()
        return finish(self, seconds)

    @subscribe("work.>", stream="work", consumer="locked", visibility_timeout=HOUR)
    def handle(message: Message) -> None:
        is_inside.set()
        end.wait(PATIENCE)

    monkeypatch.setattr(Acknowledger, "finish", finish_and_tell)
    announce()
    with working("locked") as loop:
        assert is_inside.wait(PATIENCE)
        with transaction.atomic():
            Task.objects.select_for_update().get()
            end.set()
            loop.stop()
            wait_until(is_last.is_set, PATIENCE)
            wait_until(loop._acknowledger._endings.empty, PATIENCE)
    assert Task.objects.get().state == TaskState.COMPLETED


def test_a_running_task_that_is_asked_to_cancel_learns_of_it():
    @subscribe("work.>", stream="work", consumer="asked", visibility_timeout=SHORT)
    def handle(message: Message) -> None:
        wait_until(lambda: message.cancelled, PATIENCE)
        message.raise_if_cancelled()

    announce()
    with working("asked"):
        wait_for_state(TaskState.RUNNING)
        outcome = Task.objects.all().cancel(running=True)
        assert len(outcome.requested) == 1
        wait_for_state(TaskState.CANCELLED)
    assert TaskCancelled.__name__ in Task.objects.get().attempted_errors[0]["error"]


def test_a_task_that_is_no_longer_ours_when_its_turn_comes_is_not_started():
    runs: list[int] = []
    end = threading.Event()

    @subscribe("work.>", stream="work", consumer="queued", visibility_timeout=SHORT)
    def handle(message: Message) -> None:
        runs.append(message.event.json())
        if message.event.json() == 30:
            end.wait(PATIENCE)  # in the only thread

    announce(32)  # first a pace that lets the worker lease more than it can start
    with working("queued", concurrency=1, pullers=("primary",)) as loop:
        wait_for_state(TaskState.COMPLETED, 30)
        wait_for_state(TaskState.RUNNING, 2)
        other = stolen(Task.objects.get(event__body=b"31"))
        wait_until(lambda: any(flight.stop.is_set() for flight in loop._flights), PATIENCE)
        end.set()
        wait_for_state(TaskState.COMPLETED, 31)
    assert runs == list(range(31))
    other.refresh_from_db()
    assert (other.state, other.attempt_count) == (TaskState.RUNNING, 2)


def test_attempts_and_back_off_are_the_consumers_own():
    @subscribe("work.>", stream="work", consumer="soon", attempt_max=3, retry=Fixed(timedelta(0)))
    def give_up_soon(message: Message) -> None:
        raise ValueError(message.attempt)

    @subscribe("work.>", stream="work", consumer="late", retry=Fixed(timedelta(hours=1)))
    def wait_long(message: Message) -> None:
        raise ValueError(message.attempt)

    announce()
    with working("soon", "late"):
        wait_for_state(TaskState.DISCARDED, consumer__name="soon")
        wait_for_state(TaskState.RETRYABLE, consumer__name="late")
    soon = Task.objects.get(consumer__name="soon")
    assert [error["error"] for error in soon.attempted_errors] == [
        "ValueError: 1",
        "ValueError: 2",
        "ValueError: 3",
    ]
    late = Task.objects.filter(consumer__name="late")
    assert late.get(schedule_at__gt=Now() + timedelta(minutes=50)).attempt_count == 1
    assert late.filter(schedule_at__lte=F("attempted_at") + timedelta(minutes=61)).exists()


def test_a_lease_stands_from_when_its_last_renewal_was_asked_for():
    accept("long", visibility_timeout=9 * SHORT)
    (consumer,) = sync(["long"])
    announce()
    (task,) = consumer.pull()
    began_at = time.monotonic() - 3_600
    flight = Flight(task, find("long"), began_at)

    def at(*seconds: float) -> tuple[list[bool], list[bool]]:
        """Tell when it needs renewal, and when it is expired."""
        moments = [began_at + each for each in seconds]
        return [*map(flight.needs_renewal, moments)], [*map(flight.is_expired, moments)]

    assert at(2.9, 3.1, 8.9, 9.1) == ([False, True, True, True], [False, False, False, True])
    flight.renewed(began_at + 5)
    assert at(7.9, 8.1, 13.9, 14.1) == ([False, True, True, True], [False, False, False, True])
    flight.proven(began_at + 10)  # ours, and locked: to be tried again at once
    assert at(10.0, 18.9, 19.1) == ([True, True, True], [False, False, True])
    assert not flight.start(), "its lease may be gone"


@pytest.mark.parametrize(
    ("visibility_timeout", "timeout", "cancel_timeout", "seconds"),
    [
        (6 * SHORT, None, None, 1.0),  # in time for a lease that is renewed after a third
        (HOUR, 8 * SHORT, None, 2.0),
        (HOUR, None, 8 * SHORT, 2.0),
        (HOUR, 8 * SHORT, 4 * SHORT, 1.0),
        (HOUR, HOUR, HOUR, TICK_MAX),
        (HOUR, SHORT / 1_000, None, TICK_MIN),
    ],
)
def test_the_shortest_of_all_times_tells_how_often_leases_are_looked_at(
    visibility_timeout: timedelta,
    timeout: timedelta | None,
    cancel_timeout: timedelta | None,
    seconds: float,
):
    accept("patient", visibility_timeout=HOUR)
    accept("other", visibility_timeout=visibility_timeout, timeout=timeout)
    subscriptions = [find("patient"), find("other")]
    subscriptions[1].cancel_timeout = cancel_timeout
    assert tick_of(subscriptions) == tick_of(subscriptions[::-1]) == seconds


def test_without_a_subscription_leases_are_looked_at_seldom():
    assert tick_of([]) == TICK_MAX
