"""One event is published once: idempotency keys, save(), and objects that are used again."""

from contextlib import nullcontext
from typing import Any
from uuid import uuid4

import pytest
from django.db import connection, transaction

from kanthorq_django import publish, publish_many, signals
from kanthorq_django.exceptions import IdempotencyConflict, InvalidEvent
from kanthorq_django.models import Event, Task
from kanthorq_django.models.publishing import idempotency, notifications
from tests.announcements import Ear, forget_notifications
from tests.factories import StreamFactory
from tests.ledger.models import Entry
from tests.receivers import heard_by

pytestmark = pytest.mark.django_db

COLUMNS = [field.attname for field in Event._meta.concrete_fields]


def columns(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in COLUMNS}


@pytest.mark.parametrize("key", ["k", "Größe 🛒 100%", "x" * 255])
def test_a_used_idempotency_key_returns_the_stored_event_and_inserts_nothing(key: str) -> None:
    first = publish("order.paid", {"total": 3}, metadata={"try": 1}, idempotency_key=key)
    again = publish("order.paid", {"total": 3}, metadata={"try": 2}, idempotency_key=key)
    assert again == first
    assert (first.created, again.created) == (True, False)
    assert again.metadata == {"try": 1}
    assert Event.objects.get() == first


@pytest.mark.parametrize("count", [1, 2])
def test_an_event_in_whose_place_another_is_returned_stays_as_it_was_given(count: int) -> None:
    keys = [f"k{n}" for n in range(count)]
    stored = [publish("order.paid", idempotency_key=key) for key in keys]
    given = [Event(subject="order.paid", idempotency_key=key) for key in keys]
    for _ in range(2):
        assert publish_many(given) == stored
        assert [event._state.adding for event in given] == [True] * count
        assert {event.stream_id for event in given} == {None}


@pytest.mark.parametrize("count", [1, 2])
def test_a_key_whose_event_is_pruned_before_it_is_looked_at_is_free(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    first = publish("order.paid", idempotency_key="k0")
    look = idempotency.known_of

    def prune_first(*args: Any) -> Any:
        Event.objects.filter(pk=first.pk).delete()
        return look(*args)

    monkeypatch.setattr(idempotency, "known_of", prune_first)
    events = [Event(subject="order.paid", idempotency_key=f"k{n}") for n in range(count)]
    published = publish_many(events)
    assert [event.created for event in published] == [True] * count
    assert set(Event.objects.all()) == set(published)


@pytest.mark.parametrize("count", [1, 2])
def test_a_key_of_an_event_that_cannot_be_read_is_a_conflict(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    publish("order.paid", idempotency_key="k0")
    monkeypatch.setattr(idempotency, "known_of", lambda *_: {})
    events = [Event(subject="order.paid", idempotency_key=f"k{n}") for n in range(count)]
    with pytest.raises(IdempotencyConflict, match=r"'k0' was used .* cannot read"):
        publish_many(events)
    assert Event.objects.count() == 1


def test_an_idempotency_key_belongs_to_its_stream() -> None:
    first = publish("order.paid", stream="a", idempotency_key="k")
    second = publish("order.paid", stream="b", idempotency_key="k")
    assert first != second
    assert second.created


@pytest.mark.parametrize(("subject", "body"), [("order.paid", "b"), ("order.sent", "a")])
def test_a_used_key_with_another_subject_or_body_is_a_conflict(subject: str, body: str) -> None:
    first = publish("order.paid", "a", stream="orders", idempotency_key="k")
    with pytest.raises(
        IdempotencyConflict, match=f"key 'k' was used in stream 'orders' for event {first.pk}"
    ):
        publish(subject, body, stream="orders", idempotency_key="k")
    assert Event.objects.get().body == b"a"


def test_a_conflict_leaves_the_callers_transaction_usable() -> None:
    publish("order.paid", "a", idempotency_key="k")
    with transaction.atomic():
        Entry.objects.create(event_id=uuid4(), note="before")
        with pytest.raises(IdempotencyConflict):
            publish("order.paid", "b", idempotency_key="k")
        publish("order.noted")
    assert Entry.objects.count() == 1
    assert Event.objects.count() == 2


def test_a_receiver_learns_of_new_events_only() -> None:
    heard: list[list[Event]] = []

    def hear(events: list[Event], **_: object) -> None:
        heard.append(events)

    with heard_by(hear, signals.published):
        first = publish("order.paid", idempotency_key="k")
        publish("order.paid", idempotency_key="k")
        (_, second) = publish_many(
            [Event(subject="order.paid", idempotency_key="k"), Event(subject="order.sent")]
        )
    assert heard == [[first], [second]]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("is_open", [False, True])
def test_what_a_receiver_raises_is_the_callers_while_it_can_be_rolled_back(
    is_open: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def hear(**_: object) -> None:
        raise ValueError("a receiver's own")

    with (
        heard_by(hear, signals.published, signals.cancelled),
        pytest.raises(ValueError, match="own") if is_open else nullcontext(),
    ):
        with transaction.atomic() if is_open else nullcontext():
            publish("order.paid")
        Task.objects.all().cancel()
    assert Event.objects.count() == (0 if is_open else 1)
    assert caplog.text.count("Error calling") == (0 if is_open else 2)


@pytest.mark.django_db(transaction=True)
def test_keyed_events_keep_their_bodies_whatever_strings_the_server_expects() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET standard_conforming_strings = off")
    bodies = [bytes(range(256)), b"\\x00", b""]
    events = [
        Event(subject="order.paid", body=body, idempotency_key=str(number))
        for number, body in enumerate(bodies)
    ]
    try:
        publish_many(events)
        stored = Event.objects.order_by("idempotency_key").values_list("body", flat=True)
        assert [bytes(body) for body in stored] == bodies
    finally:
        connection.close()


def test_save_and_create_publish_into_the_events_stream() -> None:
    stream = StreamFactory.create()
    saved = Event(stream=stream, subject="order.paid", body={"total": 3})
    saved.save()
    created = Event.objects.create(stream=stream, subject="order.sent")
    assert list(Event.objects.order_by("pk")) == [saved, created]
    assert columns(saved) == columns(Event.objects.get(pk=saved.pk))


def test_an_event_without_a_stream_is_not_saved_and_told_what_to_do() -> None:
    with pytest.raises(InvalidEvent, match=r"has no stream; use publish\(\)"):
        Event.objects.create(subject="order.paid")
    assert not Event.objects.exists()


def test_create_with_a_used_key_becomes_the_stored_event() -> None:
    stream = StreamFactory.create()
    first = Event.objects.create(stream=stream, subject="order.paid", idempotency_key="k")
    again = Event.objects.create(stream=stream, subject="order.paid", idempotency_key="k")
    assert columns(again) == columns(first)
    assert not again.created
    assert not again._state.adding


def test_get_or_create_publishes_once() -> None:
    stream = StreamFactory.create()
    wanted: dict[str, Any] = {
        "stream": stream,
        "idempotency_key": "k",
        "defaults": {"subject": "order.paid"},
    }
    first, is_new = Event.objects.get_or_create(**wanted)
    again, is_new_again = Event.objects.get_or_create(**wanted)
    assert (is_new, is_new_again) == (True, False)
    assert first == again == Event.objects.get()


def test_a_copy_in_djangos_way_is_a_new_event() -> None:
    original = publish("order.paid", {"total": 3}, stream="orders")
    copy = Event.objects.get(pk=original.pk)
    copy.pk = None
    copy._state.adding = True
    copy.save()
    assert copy.pk not in (None, original.pk)
    assert {event.json()["total"] for event in Event.objects.all()} == {3}
    assert Event.objects.count() == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("count", [1, 2])
def test_a_copy_of_an_event_that_was_found_by_its_key_is_new_and_announced(
    ear: Ear, count: int
) -> None:
    publish("order.paid", stream="a", idempotency_key="k")
    copies = [publish("order.paid", stream="a", idempotency_key="k") for _ in range(count)]
    heard: list[Event] = []
    ear.heard()
    forget_notifications()  # else this one may be spared, so soon after the last

    def hear(events: list[Event], **_: object) -> None:
        heard.extend(events)

    for copy in copies:
        copy.pk, copy.idempotency_key, copy._state.adding = None, None, True
    # In a transaction, where an event is announced only if it is new.
    with heard_by(hear, signals.published), transaction.atomic():
        publish_many(copies, stream="a")
    assert heard == copies
    assert [copy.created for copy in copies] == [True] * count
    assert ear.heard() == ["a"]


@pytest.mark.django_db(transaction=True)
def test_a_copy_that_was_not_stored_after_all_is_as_before() -> None:
    first = publish("order.paid", idempotency_key="k")
    copy = publish("order.paid", idempotency_key="k")
    copy.idempotency_key, copy._state.adding = None, True  # its id is taken
    with pytest.raises(InvalidEvent):
        publish_many([copy, Event(subject="order.sent")])
    assert (copy.pk, copy.created, copy._state.adding) == (first.pk, False, True)


def test_an_event_that_was_published_is_not_published_again() -> None:
    event = publish("order.paid")
    with pytest.raises(InvalidEvent, match=f"Event {event.pk} has been published already"):
        publish_many([event])
    for stored in (Event.objects.get(), Event.objects.defer("stream").get()):
        with pytest.raises(InvalidEvent, match="published already"):
            publish_many([stored])


@pytest.mark.django_db(transaction=True)
def test_a_new_event_among_known_ones_wakes_workers(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_notifications()
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 0)
    for keys in (["known"], ["known", "new"]):
        publish_many([Event(subject="a", idempotency_key=key) for key in keys], stream="a")
        assert ear.heard() == ["a"]
