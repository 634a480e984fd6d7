"""Explicit verdicts, outside of any transaction."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connection
from django.db.models.functions import Now

from kanthorq_django import Fixed, signals, subscribe
from kanthorq_django.domain.retry import RetryPolicy
from kanthorq_django.exceptions import (
    AlreadyAcknowledged,
    InvalidBody,
    LeaseLost,
    TaskCancelled,
)
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)


def leased(**options: Any) -> Message:
    return Message(TaskFactory.create(state=TaskState.RUNNING, **options))


def stored(message: Message) -> Task:
    return Task.objects.get(pk=message.task.pk)


def run_out(message: Message) -> None:
    Task.objects.filter(pk=message.task.pk).update(schedule_at=Now() - timedelta(seconds=1))


def taken_over(message: Message) -> Message:
    """Let the lease run out and another worker claim the task."""
    run_out(message)
    (task,) = message.task.consumer.claim()
    return Message(task)


def now() -> datetime:
    """The database's clock, the only one that decides."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        moment: datetime = cursor.fetchone()[0]
    return moment


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """The names of the verdicts that were announced."""
    names: list[str] = []

    def hear_ack(**_: Any) -> None:
        names.append("acked")

    def hear_nack(**_: Any) -> None:
        names.append("nacked")

    signals.acked.connect(hear_ack)
    signals.nacked.connect(hear_nack)
    yield names
    signals.acked.disconnect(hear_ack)
    signals.nacked.disconnect(hear_nack)


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


# Nack


def test_nack_lets_the_task_wait_for_the_delay_it_names():
    message = leased()
    before = now()

    message.nack("the bank is closed", delay=timedelta(hours=1))

    task = stored(message)
    assert task.state == TaskState.RETRYABLE
    assert before <= task.schedule_at - timedelta(hours=1) <= now()
    assert task.finalized_at is None
    (error,) = task.attempted_errors
    assert before <= datetime.fromisoformat(error.pop("at")) <= now()
    assert error == {"attempt": 1, "verb": "handle", "error": "the bank is closed", "stack": ""}


def test_nack_without_a_delay_follows_the_retry_policy_of_the_consumer():
    message = leased()
    name = message.task.consumer.name
    subscribe(">", consumer=name, retry=Fixed(delay=timedelta(minutes=7)))(lambda message: None)
    before = now()

    message.nack("no")

    assert before <= stored(message).schedule_at - timedelta(minutes=7) <= now()


def test_nack_of_a_consumer_without_code_waits_as_by_default():
    message = leased(attempt_count=3)
    before = now()
    message.nack("no")
    wait = stored(message).schedule_at - before
    assert timedelta(seconds=81 * 0.9) <= wait <= timedelta(seconds=81 * 1.1 + 30)


class Broken(RetryPolicy):
    def wait(self, attempt: int) -> timedelta:
        raise ZeroDivisionError


class Nonsense(Fixed):
    def next_delay(self, attempt: int, *, chance: float | None = None) -> timedelta:
        return 5  # type: ignore[return-value]  # what a project may get wrong


@pytest.mark.parametrize("policy", [Broken(), Nonsense()])
def test_a_retry_policy_that_fails_gives_way_to_the_default_one(
    policy: RetryPolicy, caplog: pytest.LogCaptureFixture
):
    message = leased()
    name = message.task.consumer.name
    subscribe(">", consumer=name, retry=policy)(lambda message: None)

    message.nack("no")

    assert stored(message).state == TaskState.RETRYABLE
    assert f"The retry policy of {name} failed" in caplog.text


def test_nack_notes_an_exception_with_its_traceback():
    message = leased()
    try:
        int("seven")
    except ValueError as error:
        message.nack(error)
    (noted,) = stored(message).attempted_errors
    assert noted["error"] == "ValueError: invalid literal for int() with base 10: 'seven'"
    assert noted["stack"].startswith("Traceback")
    assert "test_message.py" in noted["stack"]


def test_nack_takes_reasons_that_no_database_would():
    message = leased()
    message.nack(ValueError("a\x00b\ud800c"))
    (noted,) = stored(message).attempted_errors
    assert noted["error"] == "ValueError: a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"


def test_nack_keeps_only_the_newest_errors(settings):
    settings.KANTHORQ = {"ERRORS_MAX": 3}
    past = [{"error": str(number)} for number in range(3)]
    message = leased(attempted_errors=past)
    message.nack("newest")
    errors = [error["error"] for error in stored(message).attempted_errors]
    assert errors == ["1", "2", "newest"]


def test_nack_of_the_last_attempt_discards_the_task():
    message = leased(attempt_count=5, consumer=ConsumerFactory.create(attempt_max=5))
    message.nack("for the last time")
    task = stored(message)
    assert task.state == TaskState.DISCARDED
    assert task.finalized_at is not None
    assert task.attempted_errors[-1]["attempt"] == 5


def test_nack_of_a_resumed_task_that_is_over_its_attempts_discards_it_again():
    message = leased(attempt_count=6, consumer=ConsumerFactory.create(attempt_max=5))
    message.nack("again")
    assert stored(message).state == TaskState.DISCARDED


@pytest.mark.parametrize(("has_handler", "expected"), [(False, "CANCELLED"), (True, "CANCELLING")])
def test_nack_of_a_task_that_was_asked_to_cancel_ends_in_its_cancellation(
    has_handler: bool, expected: str
):
    consumer = ConsumerFactory.create(has_cancel_handler=has_handler)
    message = leased(consumer=consumer, cancel_requested_at=Now())
    message.nack("stopped", delay=timedelta(hours=1))
    task = stored(message)
    assert task.state == TaskState[expected]
    assert (task.finalized_at is None) == has_handler
    assert bool(consumer.claim()) == has_handler  # at once, not after the delay


@pytest.mark.parametrize("delay", [timedelta(-1), 5, "1", timedelta.max])
def test_nack_refuses_a_delay_that_is_none_and_writes_nothing(delay: Any):
    message = leased()
    with pytest.raises(ValueError, match="delay"):
        message.nack("no", delay=delay)
    assert stored(message).state == TaskState.RUNNING
    assert not message.has_verdict()


def test_a_second_nack_changes_nothing(heard: list[str]):
    message = leased()
    message.nack("first", delay=timedelta(minutes=1))
    first = stored(message)
    message.nack("second", delay=timedelta(hours=1))
    second = stored(message)
    assert (second.attempted_errors, second.schedule_at) == (
        first.attempted_errors,
        first.schedule_at,
    )
    assert heard == ["nacked"]


@pytest.mark.parametrize("attempt_max", [1, 2])
@pytest.mark.parametrize("was_asked", [False, True])
@pytest.mark.parametrize("has_handler", [False, True])
def test_ack_after_nack_raises_wherever_the_nack_led(
    attempt_max: int, was_asked: bool, has_handler: bool
):
    consumer = ConsumerFactory.create(attempt_max=attempt_max, has_cancel_handler=has_handler)
    message = leased(consumer=consumer, cancel_requested_at=Now() if was_asked else None)
    message.nack("no")
    ended = stored(message).state
    with pytest.raises(AlreadyAcknowledged, match="nack"):
        message.ack()
    message.nack("the same again")
    assert stored(message).state == ended


# Lost leases


def test_no_verdict_of_a_lease_that_was_taken_over_is_written():
    message = leased()
    successor = taken_over(message)
    before = stored(message)
    for verdict in (message.ack, lambda: message.nack("late")):
        with pytest.raises(LeaseLost, match="another worker claimed it"):
            verdict()
    after = stored(message)
    assert (after.state, after.lease_epoch) == (TaskState.RUNNING, 2)
    assert after.attempted_errors == before.attempted_errors
    assert not message.has_verdict()
    successor.ack("by the new one")
    assert stored(message).result == "by the new one"


@pytest.mark.parametrize("verdict", ["ack", "nack"])
def test_a_stale_verdict_after_the_successor_ended_the_task_raises(verdict: str):
    message = leased()
    taken_over(message).ack("by the new one")
    with pytest.raises(LeaseLost):
        message.ack() if verdict == "ack" else message.nack("late")
    assert stored(message).result == "by the new one"


def test_a_lease_that_ran_out_but_was_not_taken_over_may_still_end_its_task():
    message = leased()
    run_out(message)
    message.ack()
    assert stored(message).state == TaskState.COMPLETED


@pytest.mark.parametrize("verdict", ["ack", "nack"])
def test_a_verdict_on_a_deleted_task_raises_lease_lost(verdict: str):
    message = leased()
    Task.objects.all().delete()
    with pytest.raises(LeaseLost, match="deleted"):
        message.ack() if verdict == "ack" else message.nack("late")


@pytest.mark.parametrize("verdict", ["ack", "nack"])
def test_a_verdict_on_a_task_that_was_reset_raises_lease_lost(verdict: str):
    message = leased()
    message.ack()
    Task.objects.all().reset()
    with pytest.raises(LeaseLost, match="reset"):
        message.ack() if verdict == "ack" else message.nack("late")
    assert stored(message).state == TaskState.AVAILABLE


def test_the_last_lease_cannot_end_a_cancellation_that_began_after_it():
    message = leased(consumer=ConsumerFactory.create(has_cancel_handler=True))
    message.nack("no")
    Task.objects.all().cancel()
    with pytest.raises(AlreadyAcknowledged):
        message.ack()
    assert stored(message).state == TaskState.CANCELLING


# Extending


def test_extend_moves_the_end_of_the_lease_but_never_nearer():
    message = leased()
    before = now()
    message.extend(timedelta(minutes=10))
    end = stored(message).schedule_at
    assert before <= end - timedelta(minutes=10) <= now()
    message.extend(timedelta(seconds=1))
    assert stored(message).schedule_at == end


@pytest.mark.parametrize("duration", [timedelta(-1), 5, timedelta.max])
def test_extend_refuses_what_is_no_duration(duration: Any):
    with pytest.raises(ValueError, match="duration"):
        leased().extend(duration)


def test_extend_of_a_lost_lease_raises_and_leaves_the_other_lease_alone():
    message = leased()
    taken_over(message)
    end = stored(message).schedule_at
    with pytest.raises(LeaseLost):
        message.extend(timedelta(hours=1))
    assert stored(message).schedule_at == end


def test_extend_of_a_settled_message_raises():
    message = leased()
    message.ack()
    with pytest.raises(LeaseLost):
        message.extend(timedelta(hours=1))


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
    message._stop.set()
    assert message.cancelled
    with pytest.raises(TaskCancelled):
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


def test_aextend_extends():
    message = leased()
    before = now()
    async_to_sync(message.aextend)(timedelta(hours=1))
    assert stored(message).schedule_at >= before + timedelta(hours=1)
