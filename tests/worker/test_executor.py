"""What a handler returns and raises, and what becomes of its task."""

import asyncio
import logging
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from django.db import connection, transaction

from kanthorq_django import Discard, Fixed, Never, Retry, Snooze, signals
from kanthorq_django.exceptions import LeaseLost, TaskCancelled
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.worker.executor import Ack, Ending, HandBack, Nack
from tests.factories import ConsumerFactory, TaskFactory
from tests.flights import board, fly, run, settle
from tests.ledger.models import Entry

pytestmark = pytest.mark.django_db(transaction=True)


class Unlucky(Exception):
    """What goes wrong in a handler."""


def go_wrong() -> None:
    raise Unlucky


def book(message: Message) -> None:
    Entry.objects.create(event_id=message.event.pk)


def now() -> datetime:
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        moment: datetime = cursor.fetchone()[0]
    return moment


@pytest.fixture
def task() -> Task:
    return TaskFactory.create(state=TaskState.RUNNING)


@pytest.fixture
def cancellation() -> Task:
    return TaskFactory.create(
        state=TaskState.CANCELLING,
        consumer=ConsumerFactory.create(has_cancel_handler=True, cancel_attempt_max=2),
        lease_epoch=2,
        cancel_attempt_count=1,
    )


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


def test_a_handler_that_raises_lets_its_task_wait_for_the_policy(task: Task):
    before = now()
    fly(task, lambda message: 1 / 0, retry=Fixed(delay=timedelta(minutes=3)))
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert before <= task.schedule_at - timedelta(minutes=3) <= now()
    (error,) = task.attempted_errors
    assert error["error"] == "ZeroDivisionError: division by zero"
    assert "test_executor.py" in error["stack"]


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


def test_discard_ends_the_task_with_attempts_left(task: Task):
    def handle(message: Message) -> None:
        raise Discard("no such order")

    fly(task, handle)
    task.refresh_from_db()
    assert (task.state, task.attempt_count) == (TaskState.DISCARDED, 1)
    assert last_error(task) == "Discard: no such order"


@pytest.mark.parametrize("has_handler", [False, True])
def test_a_handler_that_stops_on_request_lets_its_task_be_cancelled(has_handler: bool):
    consumer = ConsumerFactory.create(has_cancel_handler=has_handler)
    task = TaskFactory.create(state=TaskState.RUNNING, consumer=consumer)

    def handle(message: Message) -> None:
        Task.objects.filter(pk=task.pk).cancel(running=True)
        message._stop.set()
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
    [(promise, "returned an awaitable that nobody awaits"), (generate, "InvalidBody: result:")],
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

    signals.acked.connect(fail)
    try:
        fly(task, lambda message: None)
    finally:
        signals.acked.disconnect(fail)
    task.refresh_from_db()
    assert task.state == TaskState.COMPLETED
    assert "Unlucky" in caplog.text


# After an explicit verdict


@pytest.mark.parametrize(
    ("verdict", "state"),
    [
        (lambda message: message.ack("mine"), TaskState.COMPLETED),
        (lambda message: message.nack("mine"), TaskState.RETRYABLE),
    ],
)
@pytest.mark.parametrize("atomic", [False, True])
def test_what_a_handler_returns_after_its_verdict_changes_nothing(
    task: Task, verdict: Callable[[Message], None], state: TaskState, atomic: bool
):
    def handle(message: Message) -> str:
        verdict(message)
        return "ignored"

    ending = fly(task, handle, atomic=atomic)
    assert type(ending) is Ending
    task.refresh_from_db()
    assert task.state == state
    assert task.result in ("mine", None)


@pytest.mark.parametrize("raised", [Unlucky(), Snooze(timedelta(1)), Discard(), SystemExit()])
@pytest.mark.parametrize(
    ("verdict", "state"),
    [
        (lambda message: message.ack("mine"), TaskState.COMPLETED),
        (lambda message: message.nack("mine"), TaskState.RETRYABLE),
    ],
)
def test_what_a_handler_raises_after_its_verdict_changes_nothing_but_is_logged(
    task: Task,
    raised: BaseException,
    verdict: Callable[[Message], None],
    state: TaskState,
    caplog: pytest.LogCaptureFixture,
):
    def handle(message: Message) -> None:
        verdict(message)
        raise raised

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == state
    assert "raised after it was settled" in caplog.text


def test_a_coroutine_may_end_its_task_itself(task: Task):
    async def handle(message: Message) -> None:
        await message.aack("by itself")

    fly(task, handle)
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, "by itself")


# Verdicts that were rolled back


def test_a_handler_that_returns_after_its_ack_rolled_back_is_nacked_with_that_reason(task: Task):
    def handle(message: Message) -> None:
        try:
            with transaction.atomic():
                book(message)
                message.ack()
                go_wrong()
        except Unlucky:
            return

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert last_error(task) == ("The transaction in which the message was ended was rolled back.")
    assert not Entry.objects.exists()


def test_a_handler_whose_ack_rolled_back_may_ack_again(task: Task):
    def handle(message: Message) -> None:
        try:
            with transaction.atomic():
                message.ack("first")
                go_wrong()
        except Unlucky:
            message.ack("second")

    assert type(fly(task, handle)) is Ending
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, "second")


def test_a_handler_that_raises_out_of_its_block_is_nacked_with_its_exception(task: Task):
    def handle(message: Message) -> None:
        with transaction.atomic():
            book(message)
            message.ack()
            raise Unlucky("after the ack")

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert last_error(task) == "Unlucky: after the ack"
    assert not Entry.objects.exists()


def ack_in_a_lost_savepoint(message: Message) -> None:
    book(message)
    try:
        with transaction.atomic():
            message.ack()
            go_wrong()
    except Unlucky:
        return


def test_an_ack_lost_with_its_savepoint_is_nacked_though_the_outer_block_commits(task: Task):
    def handle(message: Message) -> None:
        with transaction.atomic():
            ack_in_a_lost_savepoint(message)

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert "rolled back" in last_error(task)
    assert Entry.objects.count() == 1  # the handler's own block, and its own risk


def test_an_atomic_handler_commits_nothing_without_its_ack(task: Task):
    fly(task, ack_in_a_lost_savepoint, atomic=True)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert "rolled back" in last_error(task)
    assert not Entry.objects.exists()


# Atomic handlers


def test_an_atomic_handler_commits_with_its_ack(task: Task):
    seen: list[TaskState] = []

    def handle(message: Message) -> str:
        book(message)
        transaction.on_commit(lambda: seen.append(TaskState(Task.objects.get().state)))
        return "booked"

    assert type(fly(task, handle, atomic=True)) is Ending
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, "booked")
    assert seen == [TaskState.COMPLETED]
    assert Entry.objects.count() == 1


def test_an_atomic_handler_that_raises_leaves_nothing_behind(task: Task):
    def handle(message: Message) -> None:
        book(message)
        raise Unlucky

    fly(task, handle, atomic=True)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert not Entry.objects.exists()


def test_an_atomic_handler_without_its_lease_leaves_nothing_behind(task: Task):
    def handle(message: Message) -> None:
        book(message)
        Task.objects.update(lease_epoch=2)

    ending = fly(task, handle, atomic=True)
    assert isinstance(ending, Nack)
    task.refresh_from_db()
    # The update was the handler's own write, so even that is gone; the nack then was in time.
    assert (task.state, task.lease_epoch) == (TaskState.RETRYABLE, 1)
    assert last_error(task).startswith("LeaseLost")
    assert not Entry.objects.exists()


def test_a_failing_commit_hook_of_an_atomic_handler_does_not_undo_the_ack(task: Task):
    def fail() -> None:
        raise Unlucky

    def handle(message: Message) -> None:
        book(message)
        transaction.on_commit(fail)

    fly(task, handle, atomic=True)
    task.refresh_from_db()
    assert (task.state, task.attempted_errors) == (TaskState.COMPLETED, [])
    assert Entry.objects.count() == 1


# Stale workers


@pytest.mark.parametrize("ends", [lambda message: "late", lambda message: 1 / 0])
def test_an_implicit_verdict_of_a_lost_lease_changes_nothing(
    task: Task, ends: Callable[[Message], Any]
):
    def handle(message: Message) -> Any:
        Task.objects.update(lease_epoch=2, attempt_count=2)
        return ends(message)

    fly(task, handle)
    task.refresh_from_db()
    assert (task.state, task.lease_epoch, task.attempt_count) == (TaskState.RUNNING, 2, 2)
    assert task.attempted_errors == []
    assert task.result is None


def test_a_handler_that_meets_its_lost_lease_is_logged_as_such(
    task: Task, caplog: pytest.LogCaptureFixture
):
    def handle(message: Message) -> None:
        Task.objects.update(lease_epoch=2)
        message.ack()

    fly(task, handle)
    assert "lost its lease" in caplog.text
    task.refresh_from_db()
    assert task.state == TaskState.RUNNING


def test_a_handler_that_swallows_its_lost_lease_does_not_end_the_task(task: Task):
    def handle(message: Message) -> None:
        Task.objects.update(lease_epoch=2)
        with pytest.raises(LeaseLost):
            message.ack()

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.RUNNING


# Cancellation handlers


def cancelled_by(task: Task, undo: Callable[[Message], Any]) -> Ending:
    """Run ``undo`` as the cancellation handler of the task's consumer."""
    flight = board(task, lambda message: 1 / 0, retry=Fixed(delay=timedelta(0)))
    flight.subscription.handler.on_cancel(retry=Fixed(delay=timedelta(minutes=4)))(undo)  # type: ignore[attr-defined]
    ending = run(flight)
    settle(ending)
    return ending


def test_a_cancellation_handler_that_returns_ends_the_cancellation(cancellation: Task):
    cancelled_by(cancellation, lambda message: "not kept")
    cancellation.refresh_from_db()
    assert (cancellation.state, cancellation.result) == (TaskState.CANCELLED, None)
    assert cancellation.finalized_at is not None


def test_a_cancellation_handler_that_raises_is_tried_again_by_its_own_policy(cancellation: Task):
    before = now()
    cancelled_by(cancellation, lambda message: 1 / 0)
    cancellation.refresh_from_db()
    assert (cancellation.state, cancellation.lease_epoch) == (TaskState.CANCELLING, 3)
    assert before <= cancellation.schedule_at - timedelta(minutes=4) <= now()
    (error,) = cancellation.attempted_errors
    assert (error["verb"], error["attempt"]) == ("cancel", 1)


def test_a_cancellation_handler_may_give_up_or_snooze(cancellation: Task):
    def snooze(message: Message) -> None:
        raise Snooze(timedelta(minutes=9))

    def give_up(message: Message) -> None:
        raise Discard("cannot be undone")

    cancelled_by(cancellation, snooze)
    cancellation.refresh_from_db()
    assert (cancellation.state, cancellation.cancel_attempt_count) == (TaskState.CANCELLING, 0)
    assert cancellation.lease_epoch == 3
    cancelled_by(cancellation, give_up)
    cancellation.refresh_from_db()
    assert cancellation.state == TaskState.DISCARDED
    assert last_error(cancellation) == "Discard: cannot be undone"


def test_a_cancellation_that_only_other_code_can_handle_runs_nothing_here(cancellation: Task):
    ran = []

    def handle(message: Message) -> None:
        ran.append(message)

    fly(cancellation, handle)
    cancellation.refresh_from_db()
    assert ran == []
    assert (cancellation.state, cancellation.cancel_attempt_count) == (TaskState.CANCELLING, 0)
    assert cancellation.schedule_at > now()


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
