"""Messages of leased tasks, what is told and stored of them, and blocks that end badly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import transaction

from kanthorq_django import signals
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from tests.factories import TaskFactory
from tests.ledger.models import Entry
from tests.receivers import heard_by


def leased(**options: Any) -> Message:
    return Message(TaskFactory.create(state=TaskState.RUNNING, **options))


def stored(message: Message) -> Task:
    return Task.objects.get(pk=message.task.pk)


def state_of(message: Message) -> TaskState:
    return TaskState(Task.objects.values_list("state", flat=True).get(pk=message.task.pk))


def book(message: Message) -> Entry:
    return Entry.objects.create(event_id=message.event.pk)


@contextmanager
def rolled_back_by(error: type[Exception], text: str | None = None) -> Iterator[None]:
    """A block that ends with ``error``."""
    with pytest.raises(error, match=text), transaction.atomic():
        yield


@contextmanager
def verdicts_heard() -> Iterator[list[str]]:
    """Yield the names of the verdicts that are announced while the block runs."""
    names: list[str] = []

    def hear_ack(**_: Any) -> None:
        names.append("acked")

    def hear_nack(**_: Any) -> None:
        names.append("nacked")

    with heard_by(hear_ack, signals.acked), heard_by(hear_nack, signals.nacked):
        yield names
