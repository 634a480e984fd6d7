"""One event at a time: what is stored, what comes back, and whose transaction it is in."""

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now
from django.utils import timezone
from django.utils.functional import lazystr
from pytest_django import DjangoAssertNumQueries, Settings

from kanthorq_django import publish, publish_many
from kanthorq_django.exceptions import UndecodableEvent
from kanthorq_django.models import Event, Stream, stream
from kanthorq_django.models.publishing import notifications
from tests.factories import StreamFactory

pytestmark = pytest.mark.django_db

COLUMNS = [field.attname for field in Event._meta.concrete_fields]


def columns(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in COLUMNS}


def test_a_published_event_comes_back_as_it_is_stored() -> None:
    moment = timezone.now() + timedelta(hours=1)
    event = publish(
        "order.paid",
        {"total": 3},
        stream="orders",
        metadata={"trace": "1f"},
        resource_key="order-17",
        idempotency_key="payment-5",
        schedule_at=moment,
    )

    assert columns(event) == columns(Event.objects.get())
    assert event.stream.name == "orders"
    assert event.subject == "order.paid"
    assert event.metadata == {"trace": "1f"}
    assert event.resource_key == "order-17"
    assert event.idempotency_key == "payment-5"
    assert event.schedule_at == moment
    assert event.created


def test_a_subject_is_enough() -> None:
    event = publish("order.paid")
    stored = Event.objects.get()
    assert (stored.pk, stored.stream.name) == (event.pk, "default")
    assert (stored.body, stored.metadata, stored.resource_key) == (b"", {}, "")
    assert stored.idempotency_key is None
    assert stored.schedule_at is None


def test_an_id_is_known_before_the_commit_and_grows() -> None:
    events = [publish("order.paid") for _ in range(3)]
    assert all(event.pk.version == 7 for event in events)
    assert list(Event.objects.order_by("pk")) == events


@pytest.mark.parametrize(
    "body", [b"", b"\x00\xff\\N\t", bytearray(b"ab"), memoryview(b"ab"), memoryview(b"a-b-")[::2]]
)
def test_bytes_are_stored_as_they_are(body: bytes) -> None:
    publish("order.paid", body)
    assert bytes(Event.objects.get().body) == bytes(body)


@pytest.mark.parametrize("body", ["", "Größe 🛒", "nul \x00 and \n", "\\N\t\\x41", "%s %(a)s"])
def test_a_str_is_stored_as_utf_8(body: str) -> None:
    publish("order.paid", body)
    assert bytes(Event.objects.get().body).decode() == body


@pytest.mark.parametrize(
    "body",
    [
        None,
        True,
        0,
        2**53 + 1,
        10**300,
        -0.5,
        [],
        {},
        {"nested": [{"ä": "\u2028 \\u0000 \x1f"}, None]},
        ["x"] * 1_000,
        [[]] * 1_000,
    ],
)
def test_anything_else_is_stored_as_json_and_read_back(body: object) -> None:
    event = publish("order.paid", body)
    assert event.json() == Event.objects.get().json() == body


def test_json_takes_what_django_serializes() -> None:
    moment = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
    given = {
        "id": UUID(int=7),
        "at": moment,
        "day": date(2026, 11, 20),
        "price": Decimal("1.10"),
        "for": timedelta(minutes=1),
        "label": lazystr("later"),
        "pair": (1, 2),
        3: "three",
    }
    publish("order.paid", given)
    assert Event.objects.get().json() == {
        "id": str(UUID(int=7)),
        "at": "2026-11-20T09:30:00Z",
        "day": "2026-11-20",
        "price": "1.10",
        "for": "P0DT00H01M00S",
        "label": "later",
        "pair": [1, 2],
        "3": "three",
    }


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, "plain text"])
def test_a_body_that_is_not_json_says_so_and_is_kept(body: object) -> None:
    event = publish("order.paid", body)
    with pytest.raises(UndecodableEvent, match=f"body of event {event.pk} is not JSON"):
        Event.objects.get().json()
    assert Event.objects.get() == event


def test_metadata_come_back_as_json_and_are_the_publishers_no_more() -> None:
    given: dict[str, Any] = {"at": date(2026, 11, 20), "tags": ["a"], "pi": 3.5}
    event = publish("order.paid", metadata=given)
    given["tags"].append("b")
    assert event.metadata == {"at": "2026-11-20", "tags": ["a"], "pi": 3.5}
    assert Event.objects.get().metadata == event.metadata


def test_metadata_are_any_mapping() -> None:
    publish("order.paid", metadata=MappingProxyType({"trace": "1f"}))
    assert Event.objects.get().metadata == {"trace": "1f"}


def test_created_at_is_the_time_of_the_statement() -> None:
    event = publish("order.paid")
    with connection.cursor() as cursor:
        cursor.execute("SELECT now(), statement_timestamp()")
        transaction_began, now = cursor.fetchone()
    assert transaction_began < event.created_at < now


def test_one_statement_publishes_into_a_known_stream(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    stream = StreamFactory.create()
    with django_assert_num_queries(1):
        publish("order.paid", {"total": 3}, stream=stream.name)


def test_a_stream_that_may_be_a_slip_of_the_pen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    Stream.objects.register("orders")
    Stream.objects.register("orders-archive")
    publish("mail.due", stream="mails")
    assert not caplog.messages
    publish("order.paid", stream="ordrs")
    publish_many([Event(subject="order.paid")] * 1, stream="order")
    publish("order.paid", stream="ordrs")
    assert caplog.messages == [
        "An event made the stream 'ordrs'; was 'orders' meant?",
        "An event made the stream 'order'; was 'orders' or 'ordrs' meant?",
    ]


def test_streams_that_are_many_are_alike_on_purpose(caplog: pytest.LogCaptureFixture) -> None:
    for number in range(stream.COMPARED_MAX + 1):
        Stream.objects.register(f"tenant-{number}")
    publish("order.paid", stream="tenant-100")
    assert not caplog.messages


def test_a_stream_is_registered_on_its_first_use() -> None:
    publish("order.paid", stream="orders")
    publish("order.sent", stream="orders")
    publish_many([Event(subject="mail.sent"), Event(subject="mail.read")], stream="mails")
    assert sorted(Stream.objects.values_list("name", flat=True)) == ["mails", "orders"]


def test_an_event_goes_with_the_rollback_of_the_callers_transaction() -> None:
    with transaction.atomic():
        publish("order.paid")
        publish_many([Event(subject="a"), Event(subject="b")])
        transaction.set_rollback(True)
    assert not Event.objects.exists()


def test_an_event_goes_with_the_rollback_of_a_savepoint_alone() -> None:
    kept = publish("order.placed")
    with transaction.atomic():
        publish("order.paid")
        transaction.set_rollback(True)
    also_kept = publish("order.sent")
    assert list(Event.objects.order_by("pk")) == [kept, also_kept]


def test_publishing_in_a_broken_transaction_fails_as_django_does_and_stores_nothing() -> None:
    stream = StreamFactory.create()
    for publishing in (
        lambda: publish("order.paid", stream=stream.name),
        lambda: publish("order.paid", stream="new"),
        lambda: publish_many([Event(subject="a"), Event(subject="b")], stream=stream.name),
    ):
        with transaction.atomic():
            transaction.set_rollback(True)
            with pytest.raises(transaction.TransactionManagementError):
                publishing()
    assert not Event.objects.exists()
    assert list(Stream.objects.all()) == [stream]


def test_an_aware_moment_in_any_zone_is_stored_as_that_moment() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    moments = [
        datetime(2026, 7, 1, 12, tzinfo=berlin),
        datetime(2026, 10, 25, 2, 30, fold=0, tzinfo=berlin),  # occurs twice
        datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=berlin),
        datetime(2026, 3, 29, 2, 30, tzinfo=berlin),  # is skipped: the offset before it counts
    ]
    events = [publish("order.due", schedule_at=moment) for moment in moments]
    stored = Event.objects.in_bulk([event.pk for event in events])
    assert [stored[event.pk].schedule_at for event in events] == [
        datetime(2026, 7, 1, 10, tzinfo=UTC),
        datetime(2026, 10, 25, 0, 30, tzinfo=UTC),
        datetime(2026, 10, 25, 1, 30, tzinfo=UTC),
        datetime(2026, 3, 29, 1, 30, tzinfo=UTC),
    ]


@pytest.mark.parametrize("year", [2, 1970, 9998])
def test_a_moment_at_the_edge_is_stored_and_read_back(year: int) -> None:
    moment = datetime(year, 6, 1, tzinfo=UTC)
    publish("order.due", schedule_at=moment)
    assert Event.objects.get().schedule_at == moment


def test_events_are_found_by_their_time_and_transaction() -> None:
    first, second = publish("order.paid"), publish("order.sent")
    assert first.xid == second.xid
    assert set(Event.objects.filter(xid=first.xid, created_at__lt=Now())) == {first, second}
    assert json.dumps(first.xid).isdigit()


@pytest.mark.parametrize("body", [b"x" * 262_144, "ä" * 131_072, "x" * 262_144])
def test_a_body_at_the_limit_is_published(body: Any) -> None:
    publish("order.paid", body)
    assert len(Event.objects.get().body) == 262_144


def test_a_body_of_nine_million_bytes_is_published_if_the_project_wants_it(
    settings: Settings,
) -> None:
    settings.KANTHORQ = {"BODY_SIZE_MAX": 9_000_000}
    body = b"\xff" * 9_000_000
    publish("order.paid", body)
    publish_many([Event(subject="a", body=body, idempotency_key=str(n)) for n in range(2)])
    assert [len(event.body) for event in Event.objects.all()] == [9_000_000] * 3


def test_numbers_that_javascript_would_round_are_kept() -> None:
    publish("order.paid", {"n": 2**63, "price": Decimal("0.10")}, metadata={"n": 2**63})
    stored = Event.objects.get()
    assert stored.json() == {"n": 2**63, "price": "0.10"}
    assert stored.metadata == {"n": 2**63}
    assert json.loads(bytes(stored.body))["n"] == 9_223_372_036_854_775_808


@pytest.mark.django_db(transaction=True)
def test_a_lone_event_leaves_a_transaction_that_was_begun_by_hand_to_its_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notifications, "LONE_AFTER", -1)
    Stream.objects.register("a")
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        publish("b.c", stream="a")
        cursor.execute("ROLLBACK")
    assert not Event.objects.exists()
