"""Rows for tests; a test names only what it is about."""

from datetime import timedelta
from typing import Any

from django.db.models.functions import Now
from factory.declarations import LazyAttribute, SelfAttribute, Sequence, SubFactory
from factory.django import DjangoModelFactory

from kanthorq_django import publish_many
from kanthorq_django.domain.states import FINAL, LEASED
from kanthorq_django.models import Consumer, Event, Stream, Task, TaskState


class StreamFactory(DjangoModelFactory[Stream]):
    class Meta:
        model = Stream

    name = Sequence(lambda number: f"stream-{number}")


class EventFactory(DjangoModelFactory[Event]):
    """Published as the application would publish it."""

    class Meta:
        model = Event

    stream = SubFactory(StreamFactory)
    subject = "order.paid"
    body = Sequence(lambda number: {"number": number})

    @classmethod
    def _create(cls, model_class: type[Event], *args: Any, **kwargs: Any) -> Event:
        stream = kwargs.pop("stream")
        return publish_many([Event(**kwargs)], stream=stream.name)[0]


class ConsumerFactory(DjangoModelFactory[Consumer]):
    class Meta:
        model = Consumer

    stream = SubFactory(StreamFactory)
    name = Sequence(lambda number: f"consumer-{number}")

    @classmethod
    def _create(cls, model_class: type[Consumer], *args: Any, **kwargs: Any) -> Consumer:
        created = super()._create(model_class, *args, **kwargs)
        return Consumer.objects.get(pk=created.pk)  # with what the database filled in


class TaskFactory(DjangoModelFactory[Task]):
    """A task in ``state``, as it would be stored: leased while running, finalized when final."""

    class Meta:
        model = Task

    state = TaskState.AVAILABLE
    consumer = SubFactory(ConsumerFactory)
    event = SubFactory(EventFactory, stream=SelfAttribute("..consumer.stream"))
    resource_key = SelfAttribute("event.resource_key")
    attempt_count = LazyAttribute(
        lambda task: 0 if task.state in (TaskState.PENDING, TaskState.AVAILABLE) else 1
    )
    lease_epoch = SelfAttribute("attempt_count")
    schedule_at = LazyAttribute(
        lambda task: Now() + timedelta(minutes=1) if task.state in LEASED else Now()
    )
    finalized_at = LazyAttribute(lambda task: Now() if task.state in FINAL else None)

    @classmethod
    def _create(cls, model_class: type[Task], *args: Any, **kwargs: Any) -> Task:
        created = super()._create(model_class, *args, **kwargs)
        return Task.objects.select_related("consumer", "event").get(pk=created.pk)
