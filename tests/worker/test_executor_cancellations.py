"""What a cancellation handler returns and raises, and what becomes of its task."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from kanthorq_django import Discard, Fixed, Snooze
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.worker.endings import Ending
from tests.clock import now
from tests.factories import ConsumerFactory, TaskFactory
from tests.flights import board, fly, run, settle

pytestmark = pytest.mark.django_db(transaction=True)


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


# Cancellation handlers


def cancelled_by(task: Task, undo: Callable[[Message], Any], **options: Any) -> Ending:
    """Run ``undo`` as the cancellation handler of the task's consumer."""
    flight = board(task, lambda message: 1 / 0, retry=Fixed(delay=timedelta(0)), **options)
    flight.subscription.handler.on_cancel(retry=Fixed(delay=timedelta(minutes=4)))(undo)  # type: ignore[attr-defined]
    ending = run(flight)
    settle(ending)
    return ending


@pytest.mark.parametrize("result", ["not kept", {"not JSON"}])
@pytest.mark.parametrize("atomic", [False, True])
def test_a_cancellation_handler_that_returns_ends_the_cancellation(
    cancellation: Task, result: object, atomic: bool
):
    cancelled_by(cancellation, lambda message: result, atomic=atomic)
    cancellation.refresh_from_db()
    assert (cancellation.state, cancellation.result) == (TaskState.CANCELLED, None)
    assert cancellation.finalized_at is not None


@pytest.mark.parametrize("atomic", [False, True])
def test_a_cancellation_handler_whose_return_nobody_awaits_is_named(
    cancellation: Task, atomic: bool, caplog: pytest.LogCaptureFixture
):
    async def clean_up() -> None: ...

    def undo(message: Message) -> object:
        return clean_up()

    cancelled_by(cancellation, undo, atomic=atomic)
    cancellation.refresh_from_db()
    assert cancellation.state == TaskState.CANCELLING
    assert "undo returned an awaitable that nobody awaits" in last_error(cancellation)
    assert "cleanup 1 of " in caplog.text


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


def test_a_cancellation_that_only_other_code_can_handle_runs_nothing_here(
    cancellation: Task, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "kanthorq_django.worker")
    ran = []

    def handle(message: Message) -> None:
        ran.append(message)

    fly(cancellation, handle)
    cancellation.refresh_from_db()
    assert ran == []
    assert (cancellation.state, cancellation.cancel_attempt_count) == (TaskState.CANCELLING, 0)
    assert cancellation.schedule_at > now()
    assert "was left to other code" in caplog.text
    assert "snoozed" not in caplog.text, "nobody asked for it"
