"""The verdicts on a cancellation, whose leases are told apart by epoch and counter."""

from datetime import timedelta

import pytest
from django.db import transaction
from django.db.models.functions import Now

from kanthorq_django.exceptions import AlreadyAcknowledged, LeaseLost
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task, TaskState
from tests.factories import ConsumerFactory, TaskFactory
from tests.ledger.models import Entry

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def consumer() -> Consumer:
    return ConsumerFactory.create(has_cancel_handler=True, cancel_attempt_max=2)


@pytest.fixture
def message(consumer: Consumer) -> Message:
    """The first attempt of a cancellation handler."""
    TaskFactory.create(consumer=consumer)
    Task.objects.all().cancel()
    return claimed(consumer)


def claimed(consumer: Consumer) -> Message:
    Task.objects.update(schedule_at=Now() - timedelta(seconds=1))
    (task,) = consumer.claim()
    return Message(task)


def state() -> TaskState:
    return TaskState(Task.objects.get().state)


def test_ack_ends_the_cancellation_once(message: Message):
    message.ack()
    message.ack()
    with pytest.raises(AlreadyAcknowledged):
        message.nack("too late")
    assert state() == TaskState.CANCELLED


def test_nack_lets_the_cancellation_be_tried_again_once(message: Message):
    message.nack("no", delay=timedelta(hours=1))
    message.nack("no")
    with pytest.raises(AlreadyAcknowledged):
        message.ack()
    assert state() == TaskState.CANCELLING
    assert len(Task.objects.get().attempted_errors) == 1


def test_nack_of_the_last_attempt_gives_the_cancellation_up(message: Message, consumer: Consumer):
    message.nack("first")
    last = claimed(consumer)
    last.nack("second")
    last.nack("second")
    with pytest.raises(AlreadyAcknowledged):
        last.ack()
    assert state() == TaskState.DISCARDED


@pytest.mark.parametrize("nacked", [False, True])
def test_no_late_verdict_reaches_the_next_attempt(
    message: Message, consumer: Consumer, nacked: bool
):
    if nacked:
        message.nack("no")
    successor = claimed(consumer)
    with pytest.raises(LeaseLost):
        message.ack()
    with pytest.raises(LeaseLost):
        message.nack("late")
    assert state() == TaskState.CANCELLING
    successor.ack()
    with pytest.raises(LeaseLost):
        message.ack()
    assert state() == TaskState.CANCELLED


def undo(message: Message) -> None:
    with transaction.atomic():
        Entry.objects.create(event_id=message.event.pk)
        message.ack()


def test_a_stale_cancellation_commits_nothing(message: Message, consumer: Consumer):
    successor = claimed(consumer)
    with pytest.raises(LeaseLost):
        undo(message)
    undo(successor)
    assert Entry.objects.count() == 1
    assert state() == TaskState.CANCELLED


def test_a_cancellation_whose_block_rolls_back_may_be_acked_again(message: Message):
    with transaction.atomic():
        message.ack()
        transaction.set_rollback(True)
    assert state() == TaskState.CANCELLING
    undo(message)
    assert state() == TaskState.CANCELLED
