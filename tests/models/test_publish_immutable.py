"""An event never changes once published, whichever door is tried."""

from collections.abc import Callable

import pytest
from asgiref.sync import async_to_sync
from django.db import transaction
from django.db.models import ProtectedError
from django.template import Context, Template

from kanthorq_django import publish, publish_many
from kanthorq_django.exceptions import EventIsImmutable, KanthorqError
from kanthorq_django.models import Event, Task
from tests.factories import EventFactory, StreamFactory, TaskFactory

pytestmark = pytest.mark.django_db

SECRET = "4111-1111-1111-1111"  # noqa: S105  # what must not be shown


def save(event: Event) -> None:
    event.subject = "order.changed"
    event.save()


def save_some_fields(event: Event) -> None:
    Event.objects.get(pk=event.pk).save(update_fields=["subject"])


def forced_save(event: Event) -> None:
    event.save(force_update=True)


def update(event: Event) -> None:
    Event.objects.filter(pk=event.pk).update(subject="order.changed")


def bulk_update(event: Event) -> None:
    event.subject = "order.changed"
    Event.objects.bulk_update([event], ["subject"])


def bulk_create(event: Event) -> None:
    Event.objects.bulk_create([Event(stream=event.stream, subject="order.new")])


def bulk_upsert(event: Event) -> None:
    Event.objects.bulk_create(
        [event], update_conflicts=True, unique_fields=["id"], update_fields=["subject"]
    )


def update_or_create(event: Event) -> None:
    Event.objects.update_or_create(pk=event.pk, defaults={"subject": "order.changed"})


def update_through_its_stream(event: Event) -> None:
    event.stream.events.update(subject="order.changed")


@pytest.mark.parametrize(
    "change",
    [
        save,
        save_some_fields,
        forced_save,
        update,
        bulk_update,
        bulk_create,
        bulk_upsert,
        update_or_create,
        update_through_its_stream,
    ],
)
def test_no_way_of_djangos_changes_an_event(change: Callable[[Event], None]) -> None:
    event = publish("order.paid", {"total": 3})
    with transaction.atomic():
        with pytest.raises(EventIsImmutable):
            change(event)
        publish("order.noted")  # the transaction is still usable
    stored = Event.objects.get(pk=event.pk)
    assert (stored.subject, stored.json()) == ("order.paid", {"total": 3})
    assert Event.objects.count() == 2


def test_the_async_twins_change_nothing_either() -> None:
    @async_to_sync
    async def try_all() -> None:
        event = Event(subject="order.paid")
        for change in (
            Event.objects.aupdate(subject="order.changed"),
            Event.objects.abulk_create([event]),
            Event.objects.abulk_update([event], ["subject"]),
        ):
            with pytest.raises(EventIsImmutable):
                await change

    try_all()
    assert not Event.objects.exists()


def test_update_or_create_creates_what_is_not_there() -> None:
    stream = StreamFactory.create()
    event, created = Event.objects.update_or_create(
        stream=stream, idempotency_key="k", defaults={"subject": "order.paid"}
    )
    assert created
    assert Event.objects.get() == event


def test_the_error_is_one_of_ours() -> None:
    assert issubclass(EventIsImmutable, KanthorqError)


def test_an_event_with_tasks_is_protected() -> None:
    task = TaskFactory.create()
    with pytest.raises(ProtectedError):
        task.event.delete()
    with pytest.raises(ProtectedError):
        Event.objects.filter(pk=task.event_id).delete()
    assert Task.objects.get().event == Event.objects.get()


def test_an_event_without_tasks_may_be_deleted() -> None:
    EventFactory.create().delete()
    assert not Event.objects.exists()


def test_a_stream_with_events_is_protected() -> None:
    event = EventFactory.create()
    with pytest.raises(ProtectedError):
        event.stream.delete()


def test_neither_repr_nor_str_shows_what_an_event_carries() -> None:
    event = publish("order.paid", {"card": SECRET}, metadata={"card": SECRET})
    for shown in (event, Event.objects.get(), Event.objects.all(), [event]):
        assert SECRET not in f"{shown!r} {shown!s}"
    assert str(event) == f"order.paid {event.pk}"
    assert repr(event) == f"<Event: order.paid {event.pk}>"


def test_a_template_cannot_publish_or_change_events() -> None:
    event = Event(subject="order.paid")
    template = Template("{{ events.update }}{{ events.publish }}{{ events.bulk_create }}")
    assert template.render(Context({"events": Event.objects.all()})) == ""
    assert publish_many([event]) == [event]
