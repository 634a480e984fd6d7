"""What a type checker tells users of the public names; `assert_type` fails in mypy, not here."""

from typing import assert_type
from uuid import UUID

import pytest

from kanthorq_django import publish, publish_many, subscribe
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.task import TaskQuerySet
from kanthorq_django.testing import drain

pytestmark = pytest.mark.django_db


def test_verbs_and_relations_keep_their_types() -> None:
    @subscribe("order.>", consumer="refunds")
    def refund(message: Message) -> int:
        assert_type(message.event, Event)
        assert_type(message.task, Task)
        return 17

    @refund.on_cancel()
    def undo(message: Message) -> None: ...

    event = assert_type(publish("order.cancelled", {"order": 17}), Event)
    assert_type(publish_many([Event(subject="order.refunded")]), list[Event])
    assert_type(drain("refunds"), int)

    assert_type(event.tasks.filter(resource_key=""), TaskQuerySet)
    assert_type(event.tasks.completed(), TaskQuerySet)
    assert_type(event.stream.consumers.get(), Consumer)
    assert_type(event.stream.events.first(), Event | None)
    consumer = Consumer.objects.get(name="refunds")
    outcome = assert_type(consumer.tasks.completed().cancel(), Outcome)
    assert_type(outcome.noop, tuple[UUID, ...])
    assert_type(consumer.reset([event.pk]), Outcome)
    assert event.tasks.available().get().event == event
    assert_type(refund(Message(event.tasks.get())), int)
