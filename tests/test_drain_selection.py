"""In the transaction of a test, drain turns those events into tasks that a worker would."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction

from kanthorq_django import publish, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.testing import drain
from tests.clock import now


def seen_by(*includes: str, **options: Any) -> list[Message]:
    """Subscribe to ``includes``; return a list of what is handled."""
    seen: list[Message] = []

    @subscribe(*includes, stream="kit", consumer="kit", **options)
    def handle(message: Message) -> None:
        seen.append(message)

    return seen


@pytest.mark.usefixtures("is_committed")
def test_what_a_consumer_excludes_is_left():
    seen = seen_by("order.>", excludes=["order.*.test"])
    publish("order.paid.test", stream="kit")
    event = publish("order.paid.real", stream="kit")
    assert drain("kit") == 1
    assert [message.event.pk for message in seen] == [event.pk]


@pytest.mark.usefixtures("is_committed")
def test_what_is_older_than_the_moment_at_which_a_consumer_starts_is_left():
    publish("order.paid", stream="kit")
    seen = seen_by("order.>", deliver=now())
    event = publish("order.paid", stream="kit")
    assert drain("kit") == 1
    assert [message.event.pk for message in seen] == [event.pk]


@pytest.mark.usefixtures("is_committed")
def test_a_lease_lasts_as_long_as_the_consumer_says():
    timeout = timedelta(hours=2)
    seen = seen_by("order.>", visibility_timeout=timeout)
    publish("order.paid", stream="kit")
    drain("kit")
    task = seen[0].task
    assert task.attempted_at is not None
    assert task.schedule_at - task.attempted_at == timeout


@pytest.mark.usefixtures("is_committed")
def test_one_task_of_a_key_is_leased_at_a_time():
    running = []

    @subscribe("order.>", stream="kit", consumer="kit", serialize=True)
    def handle(message: Message) -> None:
        running.append(Task.objects.filter(state=TaskState.RUNNING).count())

    for _ in range(3):
        publish("order.paid", stream="kit", resource_key="order-17")
    assert drain("kit") == 3
    assert running == [1, 1, 1]


@pytest.mark.usefixtures("is_committed")
def test_what_has_no_key_waits_for_no_turn():
    running = []

    @subscribe("order.>", stream="kit", consumer="kit", serialize=True)
    def handle(message: Message) -> None:
        running.append(Task.objects.filter(state=TaskState.RUNNING).count())

    for _ in range(3):
        publish("order.paid", stream="kit")
    assert drain("kit") == 3
    assert running == [3, 2, 1]


@pytest.mark.django_db(transaction=True)
def test_what_was_read_before_a_block_is_not_read_again_in_it():
    seen_by("order.>")
    assert drain("kit") == 0  # from here on it reads
    publish("order.paid", stream="kit")
    assert drain("kit") == 1
    Task.objects.all().delete()
    with transaction.atomic():
        assert drain("kit") == 0
