"""An explicit nack: when the task is tried again, and what is kept of the reason."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db.models.functions import Now

from kanthorq_django import Fixed, subscribe
from kanthorq_django.domain.retry import RetryPolicy
from kanthorq_django.exceptions import (
    AlreadyAcknowledged,
)
from kanthorq_django.models import TaskState
from tests.clock import now
from tests.factories import ConsumerFactory
from tests.messages import leased, stored, verdicts_heard

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """The names of the verdicts that were announced."""
    with verdicts_heard() as names:
        yield names


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
    assert "test_message_nack.py" in noted["stack"]


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
