"""What ``sync()`` makes of what code declares, and what a consumer then gets."""

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.db import connection, transaction
from pytest_django import DjangoAssertNumQueries

from kanthorq_django import Fixed, publish, subscribe
from kanthorq_django.domain.subscriptions import Registry, Subscription
from kanthorq_django.exceptions import ConfigurationError
from kanthorq_django.models import Consumer, Event, Stream, Task
from kanthorq_django.models.registration import Registration
from kanthorq_django.subscribers import find, sync
from tests.concurrency import elsewhere

SECOND = timedelta(seconds=1)


def handle(message: Any) -> None:
    """Does nothing, well."""


def declare(*includes: str, consumer: str = "repayments", **options: Any) -> Subscription:
    """Subscribe a fresh handler and return what was noted of it."""

    def refund(message: Any) -> None:
        """A handler of its own, so that it can have attributes of its own."""

    subscribe(*includes or (">",), consumer=consumer, **options)(refund)
    return find(consumer)


def synced(*includes: str, **options: Any) -> Consumer:
    """Declare the consumer anew, as a new version of the code does, and sync it."""
    declare(*includes, **options)
    (consumer,) = sync(["repayments"])
    return consumer


@pytest.mark.django_db
def test_sync_inserts_what_is_declared() -> None:
    consumer = synced(
        "order.cancelled",
        "order.refunded.>",
        stream="orders",
        excludes=("order.refunded.x",),
        attempt_max=3,
        visibility_timeout=5 * SECOND,
        timeout=SECOND,
        parked=True,
    )
    stored = Consumer.objects.get(name="repayments")
    assert consumer == stored
    assert stored.stream.name == "orders"
    assert stored.subject_includes == ["order.cancelled", "order.refunded.>"]
    assert stored.subject_excludes == ["order.refunded.x"]
    assert (stored.attempt_max, stored.cancel_attempt_max) == (3, 3)
    assert (stored.visibility_timeout, stored.timeout) == (5 * SECOND, SECOND)
    assert stored.parked
    assert not stored.has_cancel_handler


@pytest.mark.django_db
def test_sync_applies_what_changed() -> None:
    first = synced("order.>", attempt_max=3, timeout=SECOND)
    declare(
        "invoice.*",
        "order.paid",
        excludes=("invoice.draft",),
        attempt_max=5,
        visibility_timeout=7 * SECOND,
        parked=True,
    )
    handler: Any = find("repayments").handler
    handler.on_cancel(retry=Fixed(attempt_max=2))(handle)
    (second,) = sync(["repayments"])

    assert second.pk == first.pk
    stored = Consumer.objects.get(name="repayments")
    assert stored.subject_includes == ["invoice.*", "order.paid"]
    assert stored.subject_excludes == ["invoice.draft"]
    assert (stored.attempt_max, stored.timeout, stored.parked) == (5, None, True)
    assert stored.visibility_timeout == 7 * SECOND
    assert (stored.has_cancel_handler, stored.cancel_attempt_max) == (True, 2)

    synced("invoice.*")
    stored.refresh_from_db()
    assert (stored.has_cancel_handler, stored.cancel_attempt_max) == (False, 16)


@pytest.mark.django_db(transaction=True)
def test_who_holds_the_row_keeps_nobody_from_starting_whose_code_is_the_same():
    given = Registration("orders", includes=["order.>"])
    consumer = Consumer.objects.register("reader", given)
    with transaction.atomic():
        Consumer.objects.select_for_update().get(pk=consumer.pk)
        assert elsewhere(lambda: Consumer.objects.register("reader", given)) == consumer


def row_version(consumer: Consumer) -> tuple[Any, ...]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT ctid, xmin FROM kanthorq_django_consumer WHERE id = %s", [consumer.pk]
        )
        version: tuple[Any, ...] = cursor.fetchone()
    return version


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({}, ""),
        ({"serialize": True}, "on"),
        ({"serialize": "strict"}, "strict"),
        ({"batch": 10, "grouped": True}, "on"),
    ],
)
def test_sync_applies_how_tasks_of_a_key_take_turns(options: dict[str, Any], stored: str) -> None:
    synced(serialize=True if stored == "strict" else "strict")
    assert synced(**options).serialize == stored


@pytest.mark.django_db
def test_sync_does_not_write_what_has_not_changed() -> None:
    consumer = synced("order.>", excludes=("order.x",))
    version = row_version(consumer)
    synced("order.>", excludes=("order.x",), deliver="new", retry=Fixed(), atomic=True)
    assert row_version(consumer) == version
    synced("order.>", excludes=("order.y",))
    assert row_version(consumer) != version


@pytest.mark.django_db
def test_sync_registers_all_that_is_declared_or_what_it_is_told(declared: Registry) -> None:
    declare(consumer="first", stream="a")
    declare(consumer="second", stream="b")
    assert [consumer.name for consumer in sync(["second"])] == ["second"]
    assert not Consumer.objects.filter(name="first").exists()
    names = {subscription.consumer for subscription in declared.all()}
    assert {consumer.name for consumer in sync()} == names
    assert set(Consumer.objects.values_list("name", flat=True)) == names


@pytest.mark.django_db
def test_sync_of_an_unknown_consumer_writes_nothing(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    declare()
    with django_assert_num_queries(0), pytest.raises(ConfigurationError, match="'nobody'"):
        sync(["repayments", "nobody"])


@pytest.mark.django_db
def test_a_consumer_that_code_forgot_keeps_its_row(declared: Registry) -> None:
    consumer = synced("order.>")
    declared.remove("repayments")
    sync()
    assert Consumer.objects.get(name="repayments") == consumer


@pytest.mark.django_db
def test_a_consumer_does_not_move_to_another_stream() -> None:
    consumer = synced("order.>", stream="orders")
    declare("invoice.>", stream="invoices")
    with pytest.raises(
        ConfigurationError, match="reads the stream 'orders' and cannot move to 'invoices'"
    ):
        sync(["repayments"])
    stored = Consumer.objects.get(name="repayments")
    assert (stored.stream, stored.subject_includes) == (consumer.stream, ["order.>"])
    assert not Stream.objects.filter(name="invoices").exists()


@pytest.mark.django_db
def test_the_transaction_of_a_refused_sync_is_still_usable() -> None:
    synced("order.>", stream="orders")
    declare("order.>", stream="invoices")
    with transaction.atomic():
        with pytest.raises(ConfigurationError):
            sync(["repayments"])
        Stream.objects.register("kept")
    assert Stream.objects.filter(name="kept").exists()


@pytest.mark.django_db(databases=["default", "other"])
def test_sync_writes_into_the_database_that_it_is_told() -> None:
    declare()
    (consumer,) = sync(["repayments"], using="other")
    assert consumer._state.db == "other"
    assert not Consumer.objects.exists()


def pulled(consumer: Consumer) -> list[str]:
    subjects = []
    while tasks := consumer.pull(2):
        subjects += [task.event.subject for task in tasks]
    return subjects


@pytest.mark.django_db(transaction=True)
def test_a_new_consumer_starts_with_the_first_event() -> None:
    publish("order.one")
    consumer = synced(deliver="all")
    publish("order.two")
    assert pulled(consumer) == ["order.one", "order.two"]


@pytest.mark.django_db(transaction=True)
def test_a_consumer_may_start_with_what_comes_after_it() -> None:
    publish("order.one")
    consumer = synced(deliver="new")
    publish("order.two")
    assert pulled(consumer) == ["order.two"]


@pytest.mark.django_db(transaction=True)
def test_a_consumer_that_starts_new_gets_what_its_own_transaction_publishes_after_it() -> None:
    with transaction.atomic():
        publish("order.one")
        consumer = synced(deliver="new")
        publish("order.two")
    # A transaction is new as a whole or not at all: nothing of it may be lost.
    assert "order.two" in pulled(consumer)


@pytest.mark.django_db(transaction=True)
def test_a_consumer_may_start_at_a_moment() -> None:
    publish("order.one")
    second = publish("order.two")
    consumer = synced(deliver=second.created_at)
    publish("order.three")
    assert pulled(consumer) == ["order.two", "order.three"]


@pytest.mark.django_db
@pytest.mark.parametrize("offset", [timedelta(hours=16), -timedelta(microseconds=1)], ids=str)
def test_a_moment_to_start_at_is_stored_whatever_its_offset(offset: timedelta) -> None:
    moment = datetime(2026, 1, 1, 12, tzinfo=timezone(offset))
    assert synced(deliver=moment).deliver_from == moment


@pytest.mark.django_db(transaction=True)
def test_deliver_counts_for_a_new_consumer_only() -> None:
    publish("order.one")
    synced(deliver="all")
    consumer = synced(deliver="new")
    assert pulled(consumer) == ["order.one"]


@pytest.mark.django_db(transaction=True)
def test_changed_filters_count_from_then_on() -> None:
    consumer = synced("order.*")
    for subject in ("order.one", "invoice.one"):
        publish(subject)
    assert pulled(consumer) == ["order.one"]

    consumer = synced(">", excludes=("order.>",))
    for subject in ("order.two", "invoice.two"):
        publish(subject)
    assert pulled(consumer) == ["invoice.two"]
    assert Task.objects.count() == 2


@pytest.mark.django_db(transaction=True)
def test_a_consumer_that_parks_makes_pending_tasks_from_then_on() -> None:
    publish("order.one")
    assert pulled(synced()) == ["order.one"]
    publish("order.two")
    assert pulled(synced(parked=True)) == []
    assert Task.objects.pending().get().event == Event.objects.get(subject="order.two")


@pytest.mark.django_db(transaction=True)
def test_sync_of_what_has_not_changed_waits_for_nobody() -> None:
    """A worker could not start while a pull, or a report, holds the row."""
    consumer = synced("order.>")

    def sync_impatiently() -> list[Consumer]:
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '50ms'")
        return sync(["repayments"])

    with transaction.atomic():
        Consumer.objects.select_for_update().get(pk=consumer.pk)
        assert elsewhere(sync_impatiently) == [consumer]
