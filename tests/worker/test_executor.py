"""What a handler returns and raises, and what becomes of its task."""

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from django.db import transaction

from kanthorq_django import Discard, Fixed, Never, Retry, Snooze, signals
from kanthorq_django.exceptions import TaskCancelled
from kanthorq_django.message import ASKED, LEASE_OVER, Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.worker.endings import Ack, HandBack, Nack
from tests.clock import now
from tests.factories import ConsumerFactory, TaskFactory
from tests.flights import board, fly, run, settle
from tests.ledger.models import Entry
from tests.receivers import heard_by

pytestmark = pytest.mark.django_db(transaction=True)


class Unlucky(Exception):
    """What goes wrong in a handler."""


def book(message: Message) -> None:
    Entry.objects.create(event_id=message.event.pk)


@pytest.fixture
def task() -> Task:
    return TaskFactory.create(state=TaskState.RUNNING)


def last_error(task: Task) -> str:
    return str(task.attempted_errors[-1]["error"])


# Implicit verdicts


def test_a_handler_that_returns_completes_its_task(task: Task):
    assert isinstance(fly(task, lambda message: None), Ack)
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, None)


def test_what_a_handler_returns_is_kept_as_json(task: Task):
    fly(task, lambda message: {"refunded": 12})
    task.refresh_from_db()
    assert task.result == {"refunded": 12}


def test_what_a_coroutine_returns_is_kept_as_json(task: Task):
    async def handle(message: Message) -> list[int]:
        await asyncio.sleep(0)
        return [message.attempt]

    fly(task, handle)
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, [1])


def test_a_result_that_is_not_json_fails_the_attempt(task: Task):
    assert isinstance(fly(task, lambda message: object()), Nack)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert last_error(task).startswith("InvalidBody: result:")
    assert last_error(task).endswith("kept with its task; let it return JSON, or nothing.")


def test_a_handler_that_raises_lets_its_task_wait_for_the_policy(task: Task):
    before = now()
    fly(task, lambda message: 1 / 0, retry=Fixed(delay=timedelta(minutes=3)))
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert before <= task.schedule_at - timedelta(minutes=3) <= now()
    (error,) = task.attempted_errors
    assert error["error"] == "ZeroDivisionError: division by zero"
    assert "test_executor.py" in error["stack"]
    assert "kanthorq_django" not in error["stack"]


@pytest.mark.parametrize("options", [{}, {"atomic": True}])
def test_the_traceback_of_a_failure_begins_in_the_handler(
    task: Task, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
):
    def handle(message: Message) -> None:
        message.ack(object())

    fly(task, handle, **options)
    task.refresh_from_db()
    stack = task.attempted_errors[0]["stack"]
    first, *others = stack.rpartition("Traceback")[2].splitlines()[1:]
    assert ", in handle" in first
    assert ", in ack" in "".join(others)  # what the handler called is told, also ours
    assert stack in caplog.text


def test_the_traceback_of_a_coroutine_begins_in_it(task: Task):
    async def handle(message: Message) -> None:
        await asyncio.sleep(0)
        raise Unlucky

    fly(task, handle)
    task.refresh_from_db()
    assert ", in handle" in task.attempted_errors[0]["stack"].splitlines()[1]


def test_what_arose_in_the_library_keeps_its_whole_traceback(task: Task):
    fly(task, lambda message: Retry(timedelta(0)), atomic=True)
    task.refresh_from_db()
    assert ", in execute" in task.attempted_errors[0]["stack"].splitlines()[1]


def test_the_last_attempt_that_fails_discards_the_task():
    task = TaskFactory.create(
        state=TaskState.RUNNING, consumer=ConsumerFactory.create(attempt_max=1)
    )
    fly(task, lambda message: 1 / 0, retry=Never())
    task.refresh_from_db()
    assert task.state == TaskState.DISCARDED
    assert last_error(task) == "ZeroDivisionError: division by zero"


def test_many_acks_are_written_together_each_with_its_result():
    endings = []
    for number in range(3):
        task = TaskFactory.create(state=TaskState.RUNNING)
        endings.append(run(board(task, partial(lambda number, message: number, number))))
    Task.objects.filter(pk=endings[1].message.task.pk).update(lease_epoch=2)
    settle(*endings)
    ordered = Task.objects.order_by("pk").values_list("state", "result")
    assert list(ordered) == [
        (TaskState.COMPLETED, 0),
        (TaskState.RUNNING, None),  # taken over
        (TaskState.COMPLETED, 2),
    ]


# Verdicts by exceptions


def test_retry_waits_as_long_as_it_says_and_counts(task: Task):
    def handle(message: Message) -> None:
        raise Retry(timedelta(minutes=9), "rate limit")

    before = now()
    fly(task, handle)
    task.refresh_from_db()
    assert (task.state, task.attempt_count) == (TaskState.RETRYABLE, 1)
    assert before <= task.schedule_at - timedelta(minutes=9) <= now()
    assert last_error(task) == "Retry: rate limit"


def test_retry_of_the_last_attempt_discards_the_task():
    consumer = ConsumerFactory.create(attempt_max=1)
    task = TaskFactory.create(state=TaskState.RUNNING, consumer=consumer)

    def handle(message: Message) -> None:
        raise Retry(timedelta(minutes=9))

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.DISCARDED


def test_snooze_waits_and_neither_counts_nor_is_an_error(task: Task):
    def handle(message: Message) -> None:
        raise Snooze(timedelta(minutes=9))

    before = now()
    assert isinstance(fly(task, handle), HandBack)
    task.refresh_from_db()
    assert (task.state, task.attempt_count) == (TaskState.AVAILABLE, 0)
    assert task.attempted_errors == []
    assert before <= task.schedule_at - timedelta(minutes=9) <= now()


def test_discard_ends_the_task_with_attempts_left(task: Task, caplog: pytest.LogCaptureFixture):
    def handle(message: Message) -> None:
        raise Discard("no such order")

    fly(task, handle)
    task.refresh_from_db()
    assert (task.state, task.attempt_count) == (TaskState.DISCARDED, 1)
    assert last_error(task) == "Discard: no such order"
    assert level_of(caplog, "was discarded by its handler: no such order") == "WARNING"


@pytest.mark.parametrize("has_handler", [False, True])
def test_a_handler_that_stops_on_request_lets_its_task_be_cancelled(has_handler: bool):
    consumer = ConsumerFactory.create(has_cancel_handler=has_handler)
    task = TaskFactory.create(state=TaskState.RUNNING, consumer=consumer)

    def handle(message: Message) -> None:
        Task.objects.filter(pk=task.pk).cancel(running=True)
        message._stop.set("somebody asked for it")
        message.raise_if_cancelled()

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == (TaskState.CANCELLING if has_handler else TaskState.CANCELLED)
    assert last_error(task).startswith("TaskCancelled")


def test_a_handler_that_stops_unasked_is_tried_again(task: Task):
    def handle(message: Message) -> None:
        raise TaskCancelled

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE


def test_a_handler_that_finishes_before_its_cancellation_completes(task: Task):
    fly(task, lambda message: Task.objects.filter(pk=task.pk).cancel(running=True) and None)
    task.refresh_from_db()
    assert task.state == TaskState.COMPLETED
    assert task.cancel_requested_at is not None


# What no handler should do


def exit_at_once(message: Message) -> None:
    sys.exit("leaving")


def exhaust_memory(message: Message) -> None:
    raise MemoryError


def interrupt(message: Message) -> None:
    raise KeyboardInterrupt


async def exit_a_coroutine(message: Message) -> None:
    sys.exit("leaving")


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (exit_at_once, "SystemExit: leaving"),
        (exit_a_coroutine, "SystemExit: leaving"),
        (exhaust_memory, "MemoryError"),
        (interrupt, "KeyboardInterrupt"),
    ],
)
def test_a_handler_that_tries_to_end_the_process_only_fails(
    task: Task, handler: Callable[[Message], Any], error: str
):
    fly(task, handler)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert last_error(task) == error


async def promise() -> None:
    """A coroutine that nobody awaits."""


def generate() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (promise, "returned an awaitable that nobody awaits"),
        (generate, "InvalidBody: result: Object of type generator"),
        (lambda: Retry(timedelta(seconds=1)), "handle returned Retry(…), which does nothing"),
        (lambda: Discard("no"), "returned Discard(…), which does nothing; raise it"),
    ],
)
@pytest.mark.parametrize("atomic", [False, True])
def test_a_handler_that_returns_what_would_never_run_fails(
    task: Task, returned: Callable[[], Any], error: str, atomic: bool
):
    def handle(message: Message) -> Any:
        book(message)
        return returned()

    fly(task, handle, atomic=atomic)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert error in last_error(task)
    assert Entry.objects.count() == (0 if atomic else 1)


def test_a_signal_receiver_that_fails_costs_no_verdict(
    task: Task, caplog: pytest.LogCaptureFixture
):
    def fail(**_: Any) -> None:
        raise Unlucky

    with heard_by(fail, signals.acked):
        fly(task, lambda message: None)
    task.refresh_from_db()
    assert task.state == TaskState.COMPLETED
    assert "Unlucky" in caplog.text


# Logs


def test_an_outcome_is_logged_with_fields_to_search_for(
    task: Task, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="kanthorq_django.worker"):
        fly(task, lambda message: None)
    record: Any = next(record for record in caplog.records if "handled" in record.message)
    assert record.consumer == task.consumer.name
    assert record.event_id == str(task.event_id)
    assert (record.subject, record.attempt) == ("order.paid", 1)
    assert record.milliseconds >= 0
    assert not record.is_cancellation


@pytest.mark.parametrize(
    ("attempt_max", "level", "told"),
    [(1, "ERROR", "no luck, its last attempt ("), (2, "WARNING", "no luck (")],
)
def test_a_nack_is_logged_as_the_failure_it_is(
    task: Task, caplog: pytest.LogCaptureFixture, attempt_max: int, level: str, told: str
):
    fly(task, lambda message: message.nack("no luck"), attempt_max=attempt_max)
    (record,) = caplog.records
    assert record.levelname == level
    assert f"failed, as its handler says: {told}" in record.message


def test_an_ack_after_a_nack_that_was_rolled_back_is_no_failure(
    task: Task, caplog: pytest.LogCaptureFixture
):
    def handle(message: Message) -> None:
        with suppress(Unlucky), transaction.atomic():
            message.nack("no luck")
            raise Unlucky
        message.ack()

    with caplog.at_level(logging.INFO, logger="kanthorq_django.worker"):
        fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.COMPLETED
    assert "handled and settled" in caplog.text
    assert "failed" not in caplog.text


def level_of(caplog: pytest.LogCaptureFixture, told: str) -> str:
    (record,) = [each for each in caplog.records if told in each.getMessage()]
    return record.levelname


@pytest.mark.parametrize(
    ("attempt_max", "told", "level"),
    [
        (1, "asked to be tried again in 0:00:05, its last attempt", "ERROR"),
        (2, "asked to be tried again in 0:00:05 (", "INFO"),
    ],
)
def test_only_the_last_retry_that_a_handler_asks_for_is_an_error(
    task: Task, caplog: pytest.LogCaptureFixture, attempt_max: int, told: str, level: str
):
    def handle(message: Message) -> None:
        raise Retry(timedelta(seconds=5))

    caplog.set_level(logging.INFO, "kanthorq_django.worker")
    fly(task, handle, attempt_max=attempt_max)
    assert level_of(caplog, told) == level


@pytest.mark.parametrize(
    ("attempt_max", "told", "level"),
    [
        (1, "failed: Unlucky, its last attempt (", "ERROR"),
        (2, "failed: Unlucky, next in 7 s (", "WARNING"),
    ],
)
def test_a_failure_says_whether_it_was_the_last(
    task: Task, caplog: pytest.LogCaptureFixture, attempt_max: int, told: str, level: str
):
    def fail(message: Message) -> None:
        raise Unlucky

    fly(task, fail, attempt_max=attempt_max, retry=Fixed(timedelta(seconds=7)))
    assert level_of(caplog, told) == level
    assert f"attempt 1 of {attempt_max} for event {task.event_id} failed" in caplog.text


@pytest.mark.parametrize("attempt_max", [1, 2])
def test_a_failure_after_a_request_to_cancel_is_not_said_to_be_tried_again(
    task: Task, caplog: pytest.LogCaptureFixture, attempt_max: int
):
    def fail(message: Message) -> None:
        Task.objects.filter(pk=task.pk).cancel(running=True)
        message._stop.set(ASKED)
        raise Unlucky

    fly(task, fail, attempt_max=attempt_max)
    task.refresh_from_db()
    assert task.state == TaskState.CANCELLED
    assert level_of(caplog, "failed: Unlucky, cancelled as asked (") == "WARNING"


@pytest.mark.parametrize(
    ("is_raised", "level", "told"),
    [
        (True, "INFO", "asked to be tried again in 0:00:01 ("),
        (False, "WARNING", "failed, as its handler says: not yet ("),
    ],
)
def test_nor_is_its_last_attempt_an_error_where_its_handler_says_so(
    task: Task, caplog: pytest.LogCaptureFixture, is_raised: bool, level: str, told: str
):
    def handle(message: Message) -> None:
        Task.objects.filter(pk=task.pk).cancel(running=True)
        message._stop.set(ASKED)
        if is_raised:
            raise Retry(timedelta(seconds=1))
        message.nack("not yet")

    fly(task, handle, attempt_max=1)
    task.refresh_from_db()
    assert task.state == TaskState.CANCELLED
    assert level_of(caplog, told) == level


@pytest.mark.parametrize(
    ("options", "reason", "told"),
    [
        ({"timeout": timedelta(seconds=2)}, "", "returned, but its time is up"),
        ({"visibility_timeout": timedelta(seconds=2)}, "", "returned, but its lease is over"),
        ({}, LEASE_OVER, "returned, but its lease is over"),
        ({}, "", "handled"),
    ],
)
def test_what_returns_late_is_not_said_to_be_handled(
    task: Task, caplog: pytest.LogCaptureFixture, options: dict[str, Any], reason: str, told: str
):
    caplog.set_level(logging.INFO, logger="kanthorq_django.worker")
    flight = board(task, lambda message: None, **options)
    flight.start()
    flight.started_at = time.monotonic() - 3
    flight.renewed(flight.started_at)
    if reason:
        flight.give_up(reason)
    run(flight)
    assert f"{task.event_id} {told} (" in caplog.text
