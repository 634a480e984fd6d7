"""The column types of our own, as forms, filters and validation use them."""

import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import connection, transaction
from django.db.models import QuerySet

from kanthorq_django import publish, publish_many
from kanthorq_django.exceptions import ConfigurationError, InvalidFilter
from kanthorq_django.models import Consumer, Event, Stream
from tests.factories import ConsumerFactory, StreamFactory

pytestmark = pytest.mark.django_db


def messages_of(invalid: Event | Consumer, field: str) -> str:
    with pytest.raises(ValidationError) as raised:
        invalid.full_clean()
    return " ".join(raised.value.message_dict[field])


@pytest.mark.parametrize("subject", ["order..paid", "order.*", "a b", "x" * 256, ""])
def test_validation_refuses_a_bad_subject(subject: str) -> None:
    assert messages_of(Event(stream=StreamFactory.create(), subject=subject), "subject")


def test_validation_says_what_is_wrong_with_a_subject() -> None:
    event = Event(stream=StreamFactory.create(), subject="order.*")
    assert "'order.*' is not a subject: a subject cannot hold wildcards" in messages_of(
        event, "subject"
    )


BAD_FILTERS = pytest.mark.parametrize(
    ("filters", "problem"),
    [
        (["order..paid"], "'order..paid' is not a filter: it has an empty token"),
        ([">.a"], "'>' may only stand last"),
        ([5], "5 is not a filter: it must be a str"),
        ("order.>", "Subject filters are a list"),
        ({"order": 1}, "Subject filters are a list"),
        (["x" * 250] * 201, "too much for PostgreSQL: they have 50,250 characters in all"),
    ],
)


@BAD_FILTERS
def test_validation_refuses_bad_filters(filters: list[str], problem: str) -> None:
    consumer = ConsumerFactory.build(stream=StreamFactory.create(), subject_includes=filters)
    assert problem in messages_of(consumer, "subject_includes")


@BAD_FILTERS
def test_bad_filters_are_stored_by_nobody(filters: list[str], problem: str) -> None:
    """A pull by them would fail, again and again."""
    consumer = ConsumerFactory.create()
    consumer.subject_excludes = filters
    with pytest.raises(InvalidFilter, match=re.escape(problem)):
        consumer.save()
    with pytest.raises(InvalidFilter, match=re.escape(problem)):
        Consumer.objects.create(stream=consumer.stream, name="b", subject_includes=filters)
    assert connection.is_usable()
    with pytest.raises(InvalidFilter, match=re.escape(problem)), transaction.atomic():
        Consumer.objects.update(subject_includes=filters)
    assert Consumer.objects.get() == consumer
    consumer.refresh_from_db()
    assert (consumer.subject_includes, consumer.subject_excludes) == ([">"], [])


def test_a_row_with_an_old_bad_filter_is_saved_for_its_other_columns() -> None:
    consumer = ConsumerFactory.create()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE kanthorq_django_consumer SET subject_includes = '[5]'")
    consumer.refresh_from_db()
    consumer.attempt_max = 3
    consumer.save(update_fields=["attempt_max"])
    assert Consumer.objects.get().attempt_max == 3
    with pytest.raises(InvalidFilter):
        consumer.save()


@pytest.mark.parametrize("name", ["a b", "emails\nforged", "x" * 129, "", None])
def test_what_cannot_name_a_consumer_is_stored_by_nobody(name: Any) -> None:
    consumer = ConsumerFactory.create()
    refused = pytest.raises(ConfigurationError, match="cannot name a consumer")
    with refused:
        Consumer.objects.create(stream=consumer.stream, name=name)
    kept, consumer.name = consumer.name, name
    with refused:
        consumer.save()
    assert Consumer.objects.get().name == kept


def test_a_row_with_an_old_bad_name_is_saved_for_its_other_columns() -> None:
    consumer = ConsumerFactory.create()
    QuerySet(Consumer).update(name="a b")  # which checks nothing
    consumer.refresh_from_db()
    consumer.attempt_max = 3
    consumer.save(update_fields=["attempt_max"])
    assert Consumer.objects.get().attempt_max == 3


def test_valid_rows_pass_validation() -> None:
    stream = StreamFactory.create()
    Event(stream=stream, subject="order.paid", body=b"{}").full_clean()
    ConsumerFactory.build(stream=stream, subject_includes=["order.>", "*"]).full_clean()


def test_a_transaction_id_is_a_number_to_filter_and_sort_by() -> None:
    event = publish("order.paid")
    assert event.xid is not None
    found = Event.objects.order_by("-xid")
    assert found.get(xid=event.xid) == event
    assert found.get(xid__in=[event.xid, str(event.xid)]) == event
    assert not found.filter(xid__gt=event.xid).exists()
    assert not found.filter(xid=None).exists()
    assert list(found.values_list("xid", flat=True)) == [event.xid]


def test_a_transaction_id_beyond_32_bits_is_one_number() -> None:
    consumer = ConsumerFactory.create()
    event = publish("order.paid")
    huge = 2**63 - 1
    Consumer.objects.filter(pk=consumer.pk).update(
        position_xid=huge, position_id=event.pk, window=f"{huge}:{huge}:"
    )
    consumer.refresh_from_db()
    assert (consumer.position_xid, consumer.window) == (huge, f"{huge}:{huge}:")


# PostgreSQL reads none of these offsets, and reads those of all zones that there are.
@pytest.mark.parametrize(
    "offset",
    [
        timedelta(hours=16),
        timedelta(hours=23, minutes=59),
        -timedelta(hours=23, minutes=59),
        timedelta(microseconds=5),
        -timedelta(microseconds=1),
        timedelta(hours=15, minutes=59, seconds=59),
        -timedelta(hours=15, minutes=59, seconds=59),
    ],
    ids=str,
)
def test_a_moment_is_stored_whatever_its_offset(offset: timedelta) -> None:
    moment = datetime(2030, 1, 1, 12, 0, 0, 7, tzinfo=timezone(offset))
    alone = publish("order.due", schedule_at=moment)
    copied = publish_many([Event(subject="order.due", schedule_at=moment) for _ in range(2)])
    keyed = publish_many(
        [Event(subject="order.due", schedule_at=moment, idempotency_key=key) for key in "ab"]
    )
    for event in (alone, *copied, *keyed):
        assert event.schedule_at == Event.objects.get(pk=event.pk).schedule_at == moment


def test_a_stream_is_called_by_its_name() -> None:
    assert str(Stream.objects.register("orders")) == "orders"
