"""What a COPY in the binary format stores is what a single INSERT stores."""

from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import connection

from kanthorq_django import publish, publish_many
from kanthorq_django.models import Event
from kanthorq_django.models.publishing import copying

pytestmark = pytest.mark.django_db

ROW = """
    SELECT subject, encode(body, 'hex'), metadata::text, resource_key, idempotency_key,
        extract(epoch FROM schedule_at), created_at IS NOT NULL, stream_id
    FROM kanthorq_django_event WHERE id = %s
"""
EVENTS: list[dict[str, Any]] = [
    {},
    {"body": bytes(range(256))},
    {"body": "bloße Straße, 日本, 🎻"},
    {"metadata": {"ü": ["\\", '"', "\t", None, 1.5e300, {"a": True}]}},
    {"resource_key": "日本 \\N \\. %(key)s"},
    {"body": b"", "resource_key": "é" * 255},
]
MOMENTS = ["0002-01-03T00:00:00.000001+00:00", "1999-12-31T23:59:59+05:30", "9998-12-30T00:00Z"]


def row(event: Event) -> tuple[Any, ...]:
    with connection.cursor() as cursor:
        cursor.execute(ROW, [event.pk])
        found: tuple[Any, ...] = cursor.fetchone()
        return found


def twice(given: dict[str, Any]) -> tuple[Event, Event]:
    """Publish an event alone, and its like among others."""
    alone = publish("order.ümlaut", **given)
    _, among, _ = publish_many([Event(subject="order.ümlaut", **each) for each in ({}, given, {})])
    return alone, among


@pytest.mark.parametrize("given", EVENTS)
def test_a_copied_event_is_stored_as_an_inserted_one(given: dict[str, Any]):
    alone, among = twice(given)

    assert row(alone) == row(among)
    assert Event.objects.get(pk=among.pk).created_at == among.created_at


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_moment_is_the_same_to_the_microsecond(moment: str):
    alone, among = twice({"schedule_at": datetime.fromisoformat(moment)})

    assert row(alone) == row(among)


# In Berlin the clocks of these nights show the one twice and the other never.
@pytest.mark.parametrize("moment", ["2026-10-25T02:30:00", "2026-03-29T02:30:00", "2026-06-01"])
@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.django_db(transaction=True)
def test_a_moment_without_a_zone_is_what_the_server_takes_it_for(
    settings: Any, moment: str, fold: int
):
    settings.USE_TZ, settings.TIME_ZONE = False, "Europe/Berlin"
    connection.close()  # a new one has that zone
    try:
        alone, among = twice({"schedule_at": datetime.fromisoformat(moment).replace(fold=fold)})

        assert row(alone) == row(among)
    finally:
        connection.close()


def test_events_of_many_chunks_are_all_stored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copying, "CHUNK_SIZE", 200)
    bodies = [b"x" * (number % 300) for number in range(500)]

    published = publish_many([Event(subject="a", body=body) for body in bodies])

    stored = Event.objects.in_bulk([event.pk for event in published])
    assert [bytes(stored[event.pk].body) for event in published] == bodies


def test_no_chunk_holds_more_large_bodies_than_fill_it():
    """Each is joined in memory, where the events are as well."""
    given = [Event(subject="a", body=b"x" * 2**15) for _ in range(100)]
    moment = SimpleNamespace(stream_id=1, microseconds=0)

    chunks = list(copying.copied(given, moment, "default", "utf-8"))

    assert max(map(len, chunks)) < 2 * copying.CHUNK_SIZE
