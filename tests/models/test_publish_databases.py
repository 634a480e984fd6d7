"""Which database events go into, and which take none."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import DatabaseError, connections, transaction
from django.utils.connection import ConnectionDoesNotExist

from kanthorq_django import publish, publish_many
from kanthorq_django.exceptions import ConfigurationError
from kanthorq_django.models import Event, Stream

pytestmark = pytest.mark.django_db(databases=["default", "other"])


def test_a_database_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConnectionDoesNotExist, match="nowhere"):
        publish("order.paid", using="nowhere")
    with pytest.raises(ConnectionDoesNotExist, match="nowhere"):
        publish_many([Event(subject="a"), Event(subject="b")], using="nowhere")


@pytest.fixture
def sqlite_alias() -> Iterator[str]:
    databases: dict[str, Any] = connections.settings
    given = {"lite": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
    databases["lite"] = connections.configure_settings(given | {"default": {}})["lite"]
    yield "lite"
    del databases["lite"]
    del connections["lite"]


def test_a_database_that_is_not_postgresql_is_refused(sqlite_alias: str) -> None:
    with pytest.raises(ConfigurationError, match="'lite' is not PostgreSQL"):
        publish("order.paid", using=sqlite_alias)


@pytest.mark.parametrize("count", [1, 2])
def test_an_event_of_another_database_is_copied_with_what_was_not_read_of_it(count: int) -> None:
    due_at = datetime(2026, 11, 30, tzinfo=UTC)
    given = [Event(subject="order.paid", schedule_at=due_at) for _ in range(count)]
    publish_many(given, stream="orders", using="other")
    copies = list(Event.objects.using("other").defer("schedule_at", "stream"))
    for event in copies:
        event._state.adding = True
    publish_many(copies, stream="orders")
    assert [event.schedule_at for event in Event.objects.all()] == [due_at] * count


def test_another_database_keeps_its_own_events() -> None:
    event = publish("order.paid", stream="orders", using="other")
    publish_many([Event(subject="a"), Event(subject="b")], stream="orders", using="other")
    assert event._state.db == "other"
    assert Event.objects.using("other").count() == 3
    assert not Event.objects.using("default").exists()
    assert not Stream.objects.using("default").exists()


def test_an_event_is_saved_where_its_stream_is() -> None:
    event = Event(subject="a", stream=Stream.objects.using("other").register("orders"))
    event.save()
    assert Event.objects.using("other").get() == event
    assert not Stream.objects.using("default").exists()


def test_a_database_that_takes_no_writes_says_so_itself() -> None:
    publishings: list[Callable[[], object]] = [
        lambda: publish("order.paid", using="other"),
        lambda: publish_many([Event(subject="a"), Event(subject="b")], using="other"),
    ]
    for publishing in publishings:
        with transaction.atomic(using="other"):
            with connections["other"].cursor() as cursor:
                cursor.execute("SET LOCAL transaction_read_only = on")
            with pytest.raises(DatabaseError, match="read-only transaction"):
                publishing()
            transaction.set_rollback(True, using="other")
    assert not Event.objects.using("other").exists()
