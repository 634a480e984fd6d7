"""Leases that are lost, and leases that are made longer."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connection
from django.db.models.functions import Now
from django.utils import timezone
from pytest_django import Settings

from kanthorq_django import publish
from kanthorq_django.exceptions import (
    AlreadyAcknowledged,
    LeaseLost,
)
from kanthorq_django.message import Message
from kanthorq_django.models import Event, Task, TaskState
from tests.clock import now
from tests.factories import ConsumerFactory, TaskFactory
from tests.messages import leased, stored

pytestmark = pytest.mark.django_db(transaction=True)


def run_out(message: Message) -> None:
    Task.objects.filter(pk=message.task.pk).update(schedule_at=Now() - timedelta(seconds=1))


def taken_over(message: Message) -> Message:
    """Let the lease run out and another worker claim the task."""
    run_out(message)
    (task,) = message.task.consumer.claim()
    return Message(task)


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


@pytest.mark.parametrize("verdict", ["ack", "nack"])
@pytest.mark.parametrize(
    ("asked", "state"),
    [
        ({}, TaskState.DISCARDED),
        ({"cancel_requested_at": Now()}, TaskState.CANCELLED),
    ],
)
def test_a_verdict_on_a_task_that_ended_in_a_claim_raises_lease_lost(
    asked: dict[str, Any], state: TaskState, verdict: str
):
    message = leased(consumer=ConsumerFactory.create(attempt_max=1), attempted_at=Now(), **asked)
    run_out(message)
    assert message.task.consumer.claim() == []
    assert stored(message).state == state
    with pytest.raises(LeaseLost):
        message.ack() if verdict == "ack" else message.nack("late")


@pytest.mark.parametrize("is_done", [False, True])
def test_a_verdict_on_a_lease_that_was_given_again_after_a_crash_raises_lease_lost(
    *, is_done: bool
):
    message = leased(attempted_at=Now() - timedelta(hours=1))
    Task.objects.update(attempted_at=Now())  # of the commit that the crash took back
    if is_done:
        Message(stored(message)).ack("by the new one")
    before = stored(message)
    for verb in (message.ack, lambda: message.nack("late"), lambda: message.extend(timedelta(1))):
        with pytest.raises(LeaseLost):
            verb()
    after = stored(message)
    assert (after.state, after.result) == (before.state, before.result)
    assert after.schedule_at == before.schedule_at


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


@pytest.mark.parametrize(("verb", "given"), [("ack", ()), ("nack", ("no",))])
def test_extend_of_a_settled_message_says_what_ended_its_lease(verb: str, given: tuple[str, ...]):
    message = leased()
    getattr(message, verb)(*given)
    with pytest.raises(LeaseLost, match=rf"no lease to extend: {verb}\(\) has ended"):
        message.extend(timedelta(hours=1))


def test_extend_of_a_lease_that_ran_out_takes_it_up_again():
    message = leased()
    run_out(message)
    before = now()
    message.extend(timedelta(hours=1))
    assert stored(message).schedule_at >= before + timedelta(hours=1)


def test_extend_of_a_cleanup_that_ran_out_takes_it_up_again_as_it_needs_no_turn():
    task = TaskFactory.create(
        state=TaskState.CANCELLING, cancel_attempt_count=1, resource_key="a", turn_key="a"
    )
    message = Message(task)
    run_out(message)
    before = now()
    message.extend(timedelta(hours=1))
    assert stored(message).schedule_at >= before + timedelta(hours=1)


def test_extend_leaves_the_cleanup_alone_that_follows_a_nack():
    message = leased(
        consumer=ConsumerFactory.create(has_cancel_handler=True),
        attempted_at=Now(),
        cancel_requested_at=Now(),
    )
    message.nack("no")
    due = stored(message).schedule_at
    assert not message.is_open()
    with pytest.raises(LeaseLost, match=r"nack\(\) has ended"):
        message.extend(timedelta(hours=1))
    assert stored(message).schedule_at == due


def test_aextend_extends():
    message = leased()
    before = now()
    async_to_sync(message.aextend)(timedelta(hours=1))
    assert stored(message).schedule_at >= before + timedelta(hours=1)


@pytest.mark.parametrize("hour", [0, 1])
def test_a_lease_is_told_apart_in_the_hour_that_occurs_twice(settings: Settings, hour: int):
    task = TaskFactory.create(state=TaskState.RUNNING)
    began_at = datetime(2026, 10, 25, hour, 30, tzinfo=UTC)  # both are 02:30 in Berlin
    Task.objects.filter(pk=task.pk).update(attempted_at=began_at)
    settings.USE_TZ, settings.TIME_ZONE = False, "Europe/Berlin"
    connection.close()  # a new one has that zone
    try:
        message = Message(Task.objects.get(pk=task.pk))
        assert message.is_open()
        message.ack()
        message.ack()  # the same verdict again asks the row
    finally:
        connection.close()


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/Caracas"])
def test_an_activated_zone_moves_no_moment_where_times_have_no_zone(settings: Settings, zone: str):
    settings.USE_TZ, settings.TIME_ZONE = False, "Europe/Berlin"
    connection.close()  # a new one has that zone
    try:
        consumer = ConsumerFactory.create()
        with timezone.override(zone):  # as for a visitor; what Django reads, it leaves alone
            event = publish("order.created", stream=consumer.stream.name)
            (task,) = consumer.pull()
            stored = Task.objects.get()
            assert event.created_at == task.event.created_at == Event.objects.get().created_at
            assert (task.attempted_at, task.lease) == (stored.attempted_at, stored.lease)
            Message(stored).ack()
    finally:
        connection.close()
    assert Task.objects.get().state == TaskState.COMPLETED


def test_extend_of_a_lease_that_ran_out_while_it_had_its_keys_turn_raises():
    """Another task of that key may have the turn by now."""
    consumer = ConsumerFactory.create(serialize="on")
    message = leased(consumer=consumer, resource_key="order-17", turn_key="order-17")
    run_out(message)
    with pytest.raises(LeaseLost):
        message.extend(timedelta(minutes=1))
    assert Task.objects.stuck().count() == 1
