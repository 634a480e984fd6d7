"""Rows for tests; a test names only what it is about."""

from datetime import timedelta
from typing import Any

import factory
from django.db.models.functions import Now
from factory.django import DjangoModelFactory

from kanthorq_django import publish_many
from kanthorq_django.domain.states import FINAL, LEASED
from kanthorq_django.models import Consumer, Event, Stream, Task, TaskState


class StreamFactory(DjangoModelFactory):
    class Meta:
        model = Stream

    name = factory.Sequence(lambda number: f"stream-{number}")


class EventFactory(DjangoModelFactory):
    """Published as the application would publish it."""

    class Meta:
        model = Event

    stream = factory.SubFactory(StreamFactory)
    subject = "order.paid"
    body = factory.Sequence(lambda number: {"number": number})

    @classmethod
    def _create(cls, model_class: type[Event], *args: Any, **kwargs: Any) -> Event:
        stream = kwargs.pop("stream")
        return publish_many([Event(**kwargs)], stream=stream.name)[0]


class ConsumerFactory(DjangoModelFactory):
    class Meta:
        model = Consumer

    stream = factory.SubFactory(StreamFactory)
    name = factory.Sequence(lambda number: f"consumer-{number}")

    @classmethod
    def _create(cls, model_class: type[Consumer], *args: Any, **kwargs: Any) -> Consumer:
        created = super()._create(model_class, *args, **kwargs)
        return Consumer.objects.get(pk=created.pk)  # with what the database filled in


class TaskFactory(DjangoModelFactory):
    """A task in ``state``, as it would be stored: leased while running, finalized when final."""

    class Meta:
        model = Task

    state = TaskState.AVAILABLE
    consumer = factory.SubFactory(ConsumerFactory)
    event = factory.SubFactory(EventFactory, stream=factory.SelfAttribute("..consumer.stream"))
    resource_key = factory.SelfAttribute("event.resource_key")
    attempt_count = factory.LazyAttribute(
        lambda task: 0 if task.state in (TaskState.PENDING, TaskState.AVAILABLE) else 1
    )
    lease_epoch = factory.SelfAttribute("attempt_count")
    schedule_at = factory.LazyAttribute(
        lambda task: Now() + timedelta(minutes=1) if task.state in LEASED else Now()
    )
    finalized_at = factory.LazyAttribute(lambda task: Now() if task.state in FINAL else None)

    @classmethod
    def _create(cls, model_class: type[Task], *args: Any, **kwargs: Any) -> Task:
        created = super()._create(model_class, *args, **kwargs)
        return Task.objects.select_related("consumer", "event").get(pk=created.pk)
