"""What a type checker tells users of the public names; `assert_type` fails in mypy, not here."""

from datetime import datetime
from typing import assert_type
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from kanthorq_django import apublish, publish, publish_many, schedule, subscribe
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
    assert_type(refund.__name__, str)
    with pytest.raises(AttributeError):
        refund("no message")  # type: ignore[arg-type]  # a checker refuses it too


def test_moments_are_typed() -> None:
    event = publish("order.cancelled")
    assert_type(event.created_at, datetime)
    assert_type(Task(event=event).created_at, datetime)
    kept = schedule(
        "report",
        rrule="FREQ=DAILY",
        dtstart=event.created_at,
        subject="report.due",
        timezone=ZoneInfo("Asia/Tokyo"),
        exdates=["2030-01-01T00:00:00Z"],
    )
    assert_type(kept.dtstart, datetime)
    assert assert_type(kept.next_at, datetime | None)
    with pytest.raises(TypeError):
        apublish("order.paid", streem="s")  # type: ignore[call-arg, unused-coroutine]
