"""What ``save()`` writes of a task that others move meanwhile."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.core import serializers
from django.db import IntegrityError, transaction
from django.db.models.functions import Now

from kanthorq_django import publish
from kanthorq_django.exceptions import LeaseLost, UnguardedMove
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task, TaskState
from kanthorq_django.models.task import LIFE
from tests.factories import ConsumerFactory, EventFactory, TaskFactory
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


def assigned_after_creation() -> Task:
    task = TaskFactory.build(consumer=ConsumerFactory.create(), event=EventFactory.create())
    task.save()
    task.state = TaskState.PENDING
    return task


def assigned_while_deferred() -> Task:
    TaskFactory.create()
    task = Task.objects.defer("state").get()
    task.state = TaskState.PENDING
    return task


def assigned_before_another_column_was_read() -> Task:
    TaskFactory.create()
    task = Task.objects.defer("result").get()
    task.state = TaskState.PENDING
    assert task.result is None
    return task


def assigned_before_a_refresh_of_others() -> Task:
    TaskFactory.create()
    task = Task.objects.get()
    task.state = TaskState.PENDING
    task.refresh_from_db(fields=["resource_key"])
    return task


@pytest.mark.parametrize(
    "assigned",
    [
        assigned_after_creation,
        assigned_while_deferred,
        assigned_before_another_column_was_read,
        assigned_before_a_refresh_of_others,
    ],
)
def test_what_was_assigned_is_refused_however_the_task_was_read(assigned: Callable[[], Task]):
    task = assigned()
    with pytest.raises(UnguardedMove, match="state"):
        task.save()
    task.save(update_fields=["state"])
    task.resource_key = "key"
    task.save()
    assert Task.objects.values_list("state", "resource_key").get() == (TaskState.PENDING, "key")


def test_what_was_assigned_and_is_stored_by_now_is_known_once_it_is_read():
    TaskFactory.create(attempt_count=1)
    task = Task.objects.get()
    task.attempt_count = 2
    Task.objects.update(attempt_count=2)
    task.refresh_from_db()
    task.resource_key = "key"
    task.save()
    assert Task.objects.get().resource_key == "key"


def test_a_new_task_takes_neither_the_place_nor_the_lease_of_another():
    leased = TaskFactory.create(state=TaskState.RUNNING)
    new = Task(pk=leased.pk, consumer=leased.consumer, event=leased.event)
    with pytest.raises(IntegrityError):
        new.save()
    with pytest.raises(UnguardedMove):
        new.save(force_update=True)
    assert Task.objects.values_list("state", "lease_epoch").get() == (TaskState.RUNNING, 1)


def test_a_fixture_takes_the_place_of_what_is_stored():
    TaskFactory.create()
    dump = serializers.serialize("json", [*Consumer.objects.all(), *Task.objects.all()])
    Task.objects.update(resource_key="moved")
    Consumer.objects.update(attempt_max=3)
    for loaded in serializers.deserialize("json", dump):
        loaded.save()
    assert Task.objects.get().resource_key == ""
    assert Consumer.objects.get().attempt_max == 16


def test_a_copy_without_a_key_is_a_new_task():
    task = TaskFactory.create(state=TaskState.AVAILABLE)
    task.pk, task.event = None, EventFactory.create(stream=task.event.stream)
    task.save()
    assert Task.objects.count() == 2


def test_a_deferred_task_is_saved_without_what_was_not_read():
    TaskFactory.create(resource_key="before")
    task = Task.objects.only("resource_key").get()
    task.resource_key = "after"
    task.save()
    assert Task.objects.get().resource_key == "after"
