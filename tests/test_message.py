"""Explicit verdicts, outside of any transaction."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import SynchronousOnlyOperation
from django.db import transaction
from django.dispatch import Signal

from kanthorq_django import signals
from kanthorq_django.exceptions import (
    AlreadyAcknowledged,
    InvalidBody,
    TaskCancelled,
)
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task, TaskState
from tests.clock import now
from tests.factories import TaskFactory
from tests.messages import leased, stored, verdicts_heard
from tests.receivers import heard_by

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """The names of the verdicts that were announced."""
    with verdicts_heard() as names:
        yield names


# Ack


def test_ack_completes_the_task():
    message = leased()
    before = now()

    message.ack()

    task = stored(message)
    assert task.state == TaskState.COMPLETED
    assert task.finalized_at is not None
    assert before <= task.finalized_at <= now()
    assert (task.attempt_count, task.lease_epoch, task.attempted_errors) == (1, 1, [])
    assert message.has_verdict()
    assert message.is_settled()


@pytest.mark.parametrize("result", [{"paid": [1, 2.5, None]}, [], 0, False, "", "ü\u2028"])
def test_ack_stores_its_result_as_json(result: Any):
    message = leased()
    message.ack(result)
    assert stored(message).result == result


def test_ack_without_a_result_stores_none():
    message = leased()
    message.ack()
    assert Task.objects.filter(pk=message.task.pk, result__isnull=True).exists()


@pytest.mark.parametrize(
    "result", [{1, 2}, b"bytes", float("nan"), "\x00", "\ud800", "x" * 300_000, object()]
)
def test_ack_refuses_a_result_that_is_not_json_and_writes_nothing(result: Any):
    message = leased()
    with pytest.raises(InvalidBody, match="result"):
        message.ack(result)
    assert stored(message).state == TaskState.RUNNING
    assert not message.has_verdict()
    message.ack()
    assert stored(message).state == TaskState.COMPLETED


def test_a_second_ack_changes_nothing(heard: list[str]):
    message = leased()
    message.ack("first")
    first = stored(message)
    message.ack("second")
    assert Task.objects.filter(pk=first.pk).values().get() == {
        name: getattr(first, name) for name in Task.objects.values().get()
    }
    assert heard == ["acked"]


def test_nack_after_ack_raises(heard: list[str]):
    message = leased()
    message.ack()
    with pytest.raises(AlreadyAcknowledged, match="ack"):
        message.nack("too late")
    assert stored(message).state == TaskState.COMPLETED
    assert heard == ["acked"]


@pytest.mark.parametrize(("verb", "given"), [("ack", ()), ("nack", ("no",))])
def test_a_receiver_that_raises_takes_back_no_verdict_that_lasts(
    verb: str, given: tuple[str, ...], caplog: pytest.LogCaptureFixture
):
    def raise_something(**_: Any) -> None:
        raise ValueError("of the receiver")

    message, again = leased(), leased()
    signal: Signal = getattr(signals, f"{verb}ed")
    with heard_by(raise_something, signal):
        getattr(message, verb)(*given)
        with pytest.raises(ValueError, match="of the receiver"), transaction.atomic():
            getattr(again, verb)(*given)
    assert "of the receiver" in caplog.text
    assert stored(message).state in {TaskState.COMPLETED, TaskState.RETRYABLE}
    assert stored(again).state == TaskState.RUNNING


def test_ctrl_c_gets_out_of_a_receiver():
    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    message = leased()
    with heard_by(interrupt, signals.acked), pytest.raises(KeyboardInterrupt):
        message.ack()
    assert stored(message).state == TaskState.COMPLETED


# What a handler is told


def test_a_message_knows_its_attempt_and_its_lease():
    message = leased(attempt_count=3, lease_epoch=7)
    assert (message.attempt, message.lease_epoch) == (3, 7)
    assert message.event == message.task.event
    assert "attempt 3" in repr(message)
    assert "number" not in repr(message)  # the body


def test_a_message_of_a_cancellation_counts_the_attempts_of_that():
    task = TaskFactory.create(
        state=TaskState.CANCELLING, attempt_count=3, lease_epoch=4, cancel_attempt_count=2
    )
    assert Message(task).attempt == 2


def test_a_handler_that_is_not_to_stop_goes_on():
    message = leased()
    assert not message.cancelled
    message.raise_if_cancelled()


def test_a_handler_that_is_to_stop_can_ask_and_be_interrupted():
    message = leased()
    message._stop.set("somebody asked for it")
    message._stop.set("its lease is over")
    assert message.cancelled
    with pytest.raises(TaskCancelled, match="is to stop: somebody asked for it"):
        message.raise_if_cancelled()


# From coroutines


def test_aack_acks():
    message = leased()
    async_to_sync(message.aack)({"by": "coroutine"})
    task = stored(message)
    assert (task.state, task.result) == (TaskState.COMPLETED, {"by": "coroutine"})
    with pytest.raises(AlreadyAcknowledged):
        async_to_sync(message.anack)("no")


def test_anack_nacks():
    message = leased()
    before = now()
    async_to_sync(message.anack)("no", delay=timedelta(hours=1))
    task = stored(message)
    assert task.state == TaskState.RETRYABLE
    assert task.schedule_at >= before + timedelta(hours=1)
    with pytest.raises(AlreadyAcknowledged):
        async_to_sync(message.aack)()


@pytest.mark.parametrize(
    ("verb", "given"), [("ack", ()), ("nack", ("no",)), ("extend", (timedelta(minutes=1),))]
)
def test_a_verb_that_would_block_the_loop_names_the_one_to_await(verb: str, given: tuple[Any, ...]):
    message = leased()

    @async_to_sync
    async def end() -> None:
        getattr(message, verb)(*given)

    with pytest.raises(SynchronousOnlyOperation, match=rf"use `await message\.a{verb}"):
        end()
    assert stored(message).state == TaskState.RUNNING


@pytest.mark.parametrize("verb", ["ack", "nack", "extend", "aack", "anack", "aextend"])
def test_no_template_ends_a_message(verb: str):
    assert getattr(Message, verb).alters_data


@pytest.mark.parametrize("verb", ["pull", "claim", "cancel", "resume", "release", "reset"])
def test_no_template_moves_tasks_of_a_consumer(verb: str):
    assert getattr(Consumer, verb).alters_data
