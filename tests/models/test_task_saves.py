"""What ``save()`` writes of a task that others move meanwhile."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.db.models.functions import Now

from kanthorq_django import publish
from kanthorq_django.exceptions import LeaseLost, UnguardedMove
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task, TaskState
from kanthorq_django.models.task import LIFE
from tests.factories import ConsumerFactory, TaskFactory
from tests.ledger.models import Entry

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def consumer() -> Consumer:
    return ConsumerFactory.create()


def test_the_holder_of_a_lost_lease_that_saves_its_task_commits_nothing(consumer: Consumer):
    publish("order.paid", stream=consumer.stream.name)
    first = Message(*consumer.pull())
    assert first.task.pk
    Task.objects.update(schedule_at=Now() - timedelta(seconds=1))
    second = Message(*consumer.claim())
    with transaction.atomic():
        Entry.objects.create(event_id=first.event.pk, note="second")
        second.ack()
    with pytest.raises(LeaseLost):
        save_and_ack(first)
    assert Entry.objects.get().note == "second"


@transaction.atomic
def save_and_ack(message: Message) -> None:
    message.task.save()
    Entry.objects.create(event_id=message.event.pk, note="first")
    message.ack()


def test_saving_a_stale_task_keeps_what_moved_and_writes_the_rest(consumer: Consumer):
    publish("order.paid", stream=consumer.stream.name)
    message = Message(*consumer.pull())
    stale = Task.objects.get()
    Task.objects.all().cancel(running=True)
    message.nack("failed")
    moved = Task.objects.values(*LIFE).get()

    stale.resource_key = "key"
    stale.save()

    assert Task.objects.get().resource_key == "key"
    assert Task.objects.values(*LIFE).get() == moved


@pytest.mark.parametrize(
    ("column", "value"),
    [("state", TaskState.CANCELLED), ("lease_epoch", 7), ("attempted_errors", [{}])],
)
def test_what_is_assigned_to_the_life_of_a_task_is_refused(column: str, value: Any):
    TaskFactory.create(state=TaskState.RUNNING)
    task = Task.objects.get()
    setattr(task, column, value)
    with pytest.raises(UnguardedMove, match=column):
        task.save()
    task.refresh_from_db()
    task.save()

    setattr(task, column, value)
    if column != "state":
        task.save(update_fields=[column])
        assert getattr(Task.objects.get(), column) == value


def test_a_deferred_task_is_saved_without_what_was_not_read():
    TaskFactory.create(resource_key="before")
    task = Task.objects.only("resource_key").get()
    task.resource_key = "after"
    task.save()
    assert Task.objects.get().resource_key == "after"
