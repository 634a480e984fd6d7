"""How often a claim has a cancellation handler run, and what it blames for an attempt."""

from datetime import timedelta
from typing import Any

import pytest
from django.db.models.functions import Now

from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task, TaskState
from kanthorq_django.models.delivery.claim import LEASE_RAN_OUT, NO_ATTEMPT_LEFT, claim_due
from kanthorq_django.models.delivery.lease import hand_back
from tests.clock import now
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db

MINUTE = timedelta(minutes=1)
PAST = Now() - MINUTE


def due(consumer: Consumer, state: TaskState = TaskState.AVAILABLE, **options: Any) -> Task:
    return TaskFactory.create(**{"schedule_at": PAST} | options, consumer=consumer, state=state)


def fail_to_cancel(consumer: Consumer, attempts: int) -> None:
    """Let the only task's cancellation handler fail so often, and its back-off pass."""
    for _ in range(attempts):
        (claimed,) = consumer.claim()
        Message(claimed).nack("boom")
        Task.objects.update(schedule_at=PAST)


@pytest.fixture
def careful() -> Consumer:
    """A consumer with a cancellation handler."""
    return ConsumerFactory.create(
        has_cancel_handler=True, cancel_attempt_max=2, visibility_timeout=7 * MINUTE
    )


def test_a_stuck_task_that_was_asked_to_cancel_goes_on_with_its_cancellation(careful: Consumer):
    due(careful, TaskState.RUNNING, cancel_requested_at=Now(), cancel_attempt_count=5)
    (claimed,) = careful.claim()
    assert (claimed.state, claimed.cancel_attempt_count) == (TaskState.CANCELLING, 1)
    assert claimed.lease_epoch == 2
    assert claimed.attempted_errors[-1]["verb"] == "handle"


def test_a_cancellation_that_begins_after_an_attempt_blames_no_lease(careful: Consumer):
    due(careful, TaskState.RETRYABLE, attempted_at=PAST)
    Task.objects.all().cancel()
    (claimed,) = careful.claim()
    assert claimed.attempted_errors == []


def test_a_cancellation_counts_attempts_of_its_own(careful: Consumer):
    due(careful, attempt_count=9)
    Task.objects.all().cancel()
    epochs = []
    for attempt in (1, 2):
        before = now()
        (claimed,) = careful.claim()
        assert (claimed.state, claimed.attempt_count) == (TaskState.CANCELLING, 9)
        assert claimed.cancel_attempt_count == attempt
        assert before <= claimed.schedule_at - 7 * MINUTE <= now()
        epochs.append(claimed.lease_epoch)
        assert careful.claim() == []
        Task.objects.update(schedule_at=PAST)
    assert epochs == sorted(set(epochs))


def test_the_attempt_of_a_cleanup_is_told_and_not_that_of_the_handler(careful: Consumer):
    due(careful, TaskState.CANCELLING, attempt_count=9)
    (leased,) = claim_due(careful, 1, [TaskState.CANCELLING])
    assert (leased.is_cancellation, leased.attempt) == (True, 1)


def test_a_cancellation_without_attempts_left_is_discarded_and_says_why(careful: Consumer):
    task = due(careful, TaskState.CANCELLING, cancel_attempt_count=2, attempted_at=PAST)
    assert careful.claim() == []
    task.refresh_from_db()
    assert task.state == TaskState.DISCARDED
    assert task.finalized_at is not None
    error = task.attempted_errors[-1]
    assert (error["verb"], error["attempt"]) == ("cancel", 2)
    assert error["error"].startswith("The lease ran out")


def test_a_cancellation_that_waited_while_its_attempts_were_lowered_blames_no_lease(
    careful: Consumer,
):
    task = due(careful, TaskState.CANCELLING)
    Consumer.objects.update(cancel_attempt_max=3)
    fail_to_cancel(careful, attempts=2)
    Consumer.objects.update(cancel_attempt_max=2)
    assert careful.claim() == []
    task.refresh_from_db()
    assert (task.state, task.cancel_attempt_count) == (TaskState.DISCARDED, 2)
    errors = [(error["attempt"], error["error"]) for error in task.attempted_errors]
    assert errors == [(1, "boom"), (2, "boom"), (2, NO_ATTEMPT_LEFT)]


def test_a_cancellation_that_failed_and_then_lost_its_lease_blames_the_lease(careful: Consumer):
    task = due(careful, TaskState.CANCELLING)
    fail_to_cancel(careful, attempts=1)
    (claimed,) = careful.claim()
    assert claimed.cancel_attempt_count == 2
    Task.objects.update(schedule_at=PAST)
    assert careful.claim() == []
    task.refresh_from_db()
    assert [error["attempt"] for error in task.attempted_errors] == [1, 2]
    assert task.attempted_errors[-1]["error"].startswith("The lease ran out")


def test_each_cleanup_whose_lease_ran_out_leaves_a_reason(careful: Consumer):
    task = due(careful, TaskState.CANCELLING)
    Consumer.objects.update(cancel_attempt_max=9)
    for _ in range(2):
        assert careful.claim()
        Task.objects.update(schedule_at=PAST)
    fail_to_cancel(careful, attempts=1)
    Message(*careful.claim()).ack()
    task.refresh_from_db()
    told = [(error["attempt"], error["error"]) for error in task.attempted_errors]
    assert told == [(1, LEASE_RAN_OUT), (2, LEASE_RAN_OUT), (3, "boom")]


def test_a_cleanup_that_was_handed_back_blames_no_lease(careful: Consumer):
    task = due(careful, TaskState.CANCELLING)
    fail_to_cancel(careful, attempts=1)
    (claimed,) = careful.claim()
    assert hand_back([Message(claimed).lease], "default")
    Task.objects.update(schedule_at=PAST)
    assert careful.claim()
    task.refresh_from_db()
    assert [error["error"] for error in task.attempted_errors] == ["boom"]


def test_a_cleanup_that_was_handed_back_while_its_attempts_were_lowered_blames_no_lease(
    careful: Consumer,
):
    task = due(careful, TaskState.CANCELLING)
    fail_to_cancel(careful, attempts=1)
    assert hand_back([claimed.lease for claimed in careful.claim()], "default")
    Task.objects.update(schedule_at=PAST)
    Consumer.objects.update(cancel_attempt_max=1)
    assert careful.claim() == []
    task.refresh_from_db()
    assert [error["error"] for error in task.attempted_errors] == ["boom", NO_ATTEMPT_LEFT]


@pytest.mark.parametrize("at", ["long ago", "2030-02-31", None, 7, ["then"]])
def test_a_history_with_odd_moments_stops_no_claim(careful: Consumer, at: Any):
    told = {"at": at, "attempt": 1, "verb": "cancel", "error": "boom", "stack": ""}
    task = due(
        careful,
        TaskState.CANCELLING,
        cancel_attempt_count=1,
        attempted_at=PAST,
        attempted_errors=[told],
    )
    (claimed,) = careful.claim()
    assert [error["error"] for error in claimed.attempted_errors] == ["boom", LEASE_RAN_OUT]
    assert claimed == task


def test_a_later_cancellation_that_lost_its_lease_blames_the_lease(careful: Consumer):
    task = due(careful, TaskState.CANCELLING)
    Consumer.objects.update(cancel_attempt_max=1)
    fail_to_cancel(careful, attempts=1)
    Task.objects.filter(pk=task.pk).resume()
    Task.objects.filter(pk=task.pk).cancel()
    (claimed,) = careful.claim()
    assert claimed.cancel_attempt_count == 1
    Task.objects.update(schedule_at=PAST)
    assert careful.claim() == []
    task.refresh_from_db()
    assert task.attempted_errors[-1]["error"].startswith("The lease ran out")


def test_a_cancellation_whose_handler_is_gone_from_the_code_just_ends(careful: Consumer):
    task = due(careful, TaskState.CANCELLING, cancel_attempt_count=1)
    Consumer.objects.update(has_cancel_handler=False)
    assert careful.claim() == []
    task.refresh_from_db()
    assert (task.state, task.attempted_errors) == (TaskState.CANCELLED, [])
    assert task.finalized_at is not None
