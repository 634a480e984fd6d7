"""Streams go only when nobody publishes into them."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction
from django.db.models import ProtectedError
from django.db.transaction import TransactionManagementError
from django.test.utils import CaptureQueriesContext
from django.utils.timezone import now

from kanthorq_django import publish, publish_many, schedule
from kanthorq_django.models import Event, Stream, stream
from tests.concurrency import (
    DEADLINE_SECONDS,
    begin_elsewhere,
    elsewhere,
    is_waited_for,
    wait_until,
)
from tests.factories import ConsumerFactory, EventFactory, StreamFactory

pytestmark = pytest.mark.django_db(transaction=True)


def one() -> object:
    return publish("a", stream="s")


def once() -> object:
    return publish("a", stream="s", idempotency_key="k")


def many() -> object:
    return publish_many([Event(subject="a"), Event(subject="b")], stream="s")


def subscribed() -> object:
    return ConsumerFactory.create(stream=StreamFactory.create(name="s"))


def scheduled() -> object:
    return schedule("nightly", rrule="FREQ=DAILY", dtstart=now(), subject="a", stream="s")


def by_instance() -> object:
    return Stream.objects.get(name="s").delete()


def by_queryset() -> object:
    return Stream.objects.filter(name="s").delete()


@pytest.mark.parametrize("delete", [by_instance, by_queryset])
@pytest.mark.parametrize("publish_some", [one, once, many])
def test_a_stream_into_which_somebody_publishes_stays(
    publish_some: Callable[[], object], delete: Callable[[], object]
):
    Stream.objects.register("s")
    with transaction.atomic():
        publish_some()
        deleted = begin_elsewhere(delete)
        wait_until(is_waited_for)
    with pytest.raises(ProtectedError):
        deleted.result(DEADLINE_SECONDS)
    assert Event.objects.filter(stream__name="s").exists()


@pytest.mark.parametrize("delete", [by_instance, by_queryset])
@pytest.mark.parametrize("publish_some", [one, once, many])
def test_what_is_published_while_a_stream_is_deleted_begins_it_anew(
    publish_some: Callable[[], object], delete: Callable[[], object]
):
    Stream.objects.register("s")
    with transaction.atomic():
        delete()
        published = begin_elsewhere(publish_some)
        wait_until(is_waited_for)
    published.result(DEADLINE_SECONDS)
    assert Event.objects.filter(stream__name="s").count() == Event.objects.count() > 0


@pytest.mark.parametrize("delete", [by_instance, by_queryset])
def test_a_stream_is_not_deleted_by_who_cannot_see_what_is_published_meanwhile(
    delete: Callable[[], object],
):
    Stream.objects.register("s")
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert Stream.objects.exists()
        elsewhere(one)
        with pytest.raises(TransactionManagementError, match="READ COMMITTED"):
            delete()
    assert Event.objects.filter(stream__name="s").exists()


def test_a_deletion_waits_for_publishers_only_so_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "PUBLISHERS_WAIT", stream.PUBLISHERS_WAIT / 1_000)
    with transaction.atomic():
        publish("a", stream="s")
        with pytest.raises(OperationalError, match="lock timeout"):
            elsewhere(by_queryset)


@pytest.mark.parametrize("delete", [by_instance, by_queryset])
@pytest.mark.parametrize(
    ("factory", "kind"), [(EventFactory, "events"), (ConsumerFactory, "consumers")]
)
def test_what_keeps_a_stream_is_said_without_collecting_all_of_it(
    delete: Callable[[], object], factory: Any, kind: str
):
    factory.create_batch(30, stream=StreamFactory.create(name="s"))

    with CaptureQueriesContext(connection) as queries:
        with pytest.raises(ProtectedError) as refused:
            delete()
        assert str(refused.value)

    assert refused.value.args[0] == f"Stream 's' has {kind}."
    assert len(refused.value.protected_objects) == 1
    assert len(queries) < 15


@pytest.mark.parametrize("delete", [by_instance, by_queryset])
@pytest.mark.parametrize("belong", [one, subscribed, scheduled])
def test_what_keeps_a_stream_is_shown_where_no_query_may_be_made(
    delete: Callable[[], object], belong: Callable[[], object]
):
    belong()
    with pytest.raises(ProtectedError) as refused:
        delete()

    with CaptureQueriesContext(connection) as queries:
        assert "Stream 's' has" in str(refused.value)

    assert not queries.captured_queries


def test_an_event_is_shown_by_what_is_loaded():
    event = EventFactory.create(subject="order.paid")
    deferred = Event.objects.only("stream").get()

    with CaptureQueriesContext(connection) as queries:
        assert (str(event), str(deferred)) == (f"order.paid {event.pk}", str(event.pk))

    assert not queries.captured_queries
