"""Many events at once: through COPY, or with idempotency keys, all of them or none."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from cryptography.fernet import Fernet
from django.db import DatabaseError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries, Settings

from kanthorq_django import publish, publish_many
from kanthorq_django.exceptions import IdempotencyConflict, InvalidBody, InvalidEvent
from kanthorq_django.models import Event, Stream
from kanthorq_django.models.publishing import idempotency, insertion
from kanthorq_django.models.publishing.inspection import Inspection
from tests.factories import StreamFactory

pytestmark = pytest.mark.django_db

COLUMNS = [field.attname for field in Event._meta.concrete_fields]
AWKWARD = [
    "",
    "\t",
    "\n",
    "\r\n",
    "\\",
    "\\\\",
    "\\N",
    "\\.",
    "\\.\n",
    "a\tb\\tc\nd\\ne",
    "\\x41\\101",
    '"quoted", {array}, (row)',
    "NULL",
    "%s %% %(a)s",
    "Größe e\u0301 注文 🛒 \u2028",
    "\x01\x1f\x7f",
    "\x00",
]


def row(stored: Event) -> dict[str, Any]:
    return {name: getattr(stored, name) for name in COLUMNS}


def stored_in_order(events: list[Event]) -> list[Event]:
    found: dict[UUID, Event] = Event.objects.in_bulk([given.pk for given in events])
    return [found[given.pk] for given in events]


def test_of_two_publications_in_one_transaction_the_second_is_the_younger() -> None:
    first, second = (
        publish_many([Event(subject="a", idempotency_key=key), Event(subject="a")])
        for key in ("first", "second")
    )
    assert first[0].created_at == first[1].created_at
    assert second[0].created_at == second[1].created_at > first[1].created_at


def test_events_come_back_as_they_are_stored_and_in_their_order() -> None:
    moment = timezone.now() + timedelta(hours=1)
    given = [
        Event(subject="order.paid", body={"total": 3}, metadata={"trace": "1f"}),
        Event(subject="order.sent", body=b"\x00\xff", resource_key="order-17"),
        Event(subject="order.due", body="text", schedule_at=moment),
        Event(subject="order.noted", idempotency_key="k", metadata={"keyed": True}),
        Event(subject="order.late", idempotency_key="a", schedule_at=moment),
    ]
    events = publish_many(given, stream="orders")
    assert events == given
    assert [row(each) for each in events] == [row(each) for each in stored_in_order(events)]
    assert {each.stream.name for each in events} == {"orders"}
    assert all(each.created for each in events)


def test_ids_stand_in_the_order_in_which_the_events_were_made() -> None:
    events = publish_many(Event(subject=f"order.{number}") for number in range(500))
    assert list(Event.objects.order_by("pk")) == events
    assert [each.subject for each in events] == [f"order.{number}" for number in range(500)]


@pytest.mark.parametrize("key", [None, "k"])
def test_copy_and_insert_keep_every_awkward_character(key: str | None) -> None:
    events = publish_many(
        [
            Event(
                subject="a\\b%s\\N",
                body=text,
                metadata={text.replace("\x00", "0"): text.replace("\x00", "0")},
                resource_key="\\N\\t%s\\",
                idempotency_key=key and f"{key}\\N\\{number}",
            )
            for number, text in enumerate(AWKWARD)
        ]
    )
    stored = stored_in_order(events)
    assert [bytes(each.body).decode() for each in stored] == AWKWARD
    assert [row(each) for each in stored] == [row(each) for each in events]
    assert {(each.subject, each.resource_key) for each in stored} == {("a\\b%s\\N", "\\N\\t%s\\")}


def test_no_events_are_no_work(django_assert_num_queries: DjangoAssertNumQueries) -> None:
    with django_assert_num_queries(0):
        assert publish_many([]) == []
        assert publish_many(iter(())) == []


def test_ten_thousand_events_take_a_handful_of_statements() -> None:
    stream = StreamFactory.create()
    given = [Event(subject="order.paid", body=b"x" * 100) for _ in range(10_000)]
    with CaptureQueriesContext(connection) as queries:
        publish_many(given, stream=stream.name)
    assert len(queries) <= 3  # and the COPY, which Django does not see
    assert Event.objects.filter(stream=stream).count() == 10_000


def test_one_bad_event_in_ten_thousand_is_named_by_its_index_and_none_is_stored() -> None:
    given = [Event(subject="order.paid", body={"n": number}) for number in range(10_000)]
    given[7_531].body = {"n": float("nan")}
    with pytest.raises(InvalidBody, match=r"^events\[7531\]: body: \$\.n is nan"):
        publish_many(given)
    assert not Event.objects.exists()
    assert not Stream.objects.exists()


def test_a_generator_that_raises_midway_stores_nothing() -> None:
    def broken() -> Iterator[Event]:
        yield Event(subject="order.paid")
        raise OSError("The file ended early.")

    with transaction.atomic(), pytest.raises(OSError, match="ended early"):
        publish_many(broken())
    publish("order.noted")
    assert Event.objects.get().subject == "order.noted"


def test_what_is_no_event_is_named() -> None:
    for given in ("ab", ["order.paid", "order.sent"], [Event(subject="a"), None]):
        with pytest.raises(InvalidEvent, match=r"events\[\d\]: An Event was expected"):
            publish_many(given)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(TypeError):
        publish_many(None)  # type: ignore[arg-type]  # that is the point
    assert not Event.objects.exists()


@pytest.mark.parametrize("events", [Event(subject="order.paid"), None, 17])
def test_what_is_no_iterable_is_refused_by_name(events: Any) -> None:
    kind = type(events).__name__
    with pytest.raises(TypeError, match=f"takes an iterable of events, not {kind}; put a single"):
        publish_many(events)
    assert not Event.objects.exists()


def test_one_event_object_cannot_be_two_events() -> None:
    twice = Event(subject="order.paid")
    with pytest.raises(InvalidEvent, match=rf"events\[2\]: id {twice.pk} stands twice"):
        publish_many([twice, Event(subject="order.sent"), twice])
    assert not Event.objects.exists()
    assert publish_many([twice]) == [twice]


def test_an_event_that_names_another_stream_is_refused() -> None:
    orders = StreamFactory.create(name="orders")
    with pytest.raises(InvalidEvent, match="names the stream 'orders', not 'default'"):
        publish_many([Event(subject="a", stream=orders), Event(subject="b")])
    events = publish_many([Event(subject="a", stream=orders), Event(subject="b")], stream="orders")
    assert {each.stream_id for each in events} == {orders.pk}


def test_known_keys_come_back_in_place_and_only_new_events_are_stored() -> None:
    known = publish("order.paid", {"total": 3}, idempotency_key="k1")
    events = publish_many(
        [
            Event(subject="order.sent", idempotency_key="k0"),
            Event(subject="order.paid", body={"total": 3}, idempotency_key="k1"),
            Event(subject="order.noted"),
        ]
    )
    assert events[1] == known
    assert [each.created for each in events] == [True, False, True]
    assert Event.objects.count() == 3


def test_the_same_batch_again_stores_nothing_and_returns_the_same_events() -> None:
    def batch() -> list[Event]:
        return [
            Event(subject=f"order.{number}", body=str(number), idempotency_key=f"k{number % 500}")
            for number in range(500)
        ]

    first, again = publish_many(batch()), publish_many(batch())
    assert again == first
    assert not any(each.created for each in again)
    assert Event.objects.count() == 500


def test_of_two_events_with_one_key_in_a_batch_the_first_is_stored() -> None:
    given = [
        Event(subject="order.paid", metadata={"place": place}, idempotency_key=key)
        for place, key in enumerate("babcab")
    ]
    events = publish_many(given)
    assert [each.created for each in events] == [True, True, False, True, False, False]
    assert [each.metadata["place"] for each in events] == [0, 1, 0, 3, 1, 0]
    assert Event.objects.count() == 3


def test_two_different_events_with_one_key_in_a_batch_are_a_conflict() -> None:
    given = [
        Event(subject="order.paid", body="a", idempotency_key="k"),
        Event(subject="order.paid", body="b", idempotency_key="k"),
        Event(subject="order.noted"),
    ]
    with transaction.atomic():
        with pytest.raises(IdempotencyConflict, match=r"events\[1\]: .* key 'k'") as conflict:
            publish_many(given)
        publish("order.kept")
    assert conflict.value.event_id == given[1].pk
    assert Event.objects.get().subject == "order.kept"


def test_a_batch_that_met_a_conflict_can_be_published_without_it() -> None:
    publish("order.paid", "other", idempotency_key="k")
    good = [Event(subject="a"), Event(subject="b", idempotency_key="new")]
    bad = Event(subject="order.paid", body="mine", idempotency_key="k")
    with transaction.atomic():
        with pytest.raises(IdempotencyConflict):
            publish_many([*good, bad])
        assert Event.objects.count() == 1
        assert publish_many(good) == good
    assert Event.objects.count() == 3


def test_large_keyed_batches_go_out_in_statements_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(idempotency, "STATEMENT_SIZE_MAX", 1_000)
    publish("order.paid", b"x" * 600, idempotency_key="k07")
    given = [
        Event(subject="order.paid", body=b"x" * 600, idempotency_key=f"k{number:02}")
        for number in range(20)
    ]
    with CaptureQueriesContext(connection) as queries:
        events = publish_many(given)
    inserts = [query["sql"] for query in queries if "INSERT" in query["sql"]]
    assert len(inserts) == 10
    assert [each.idempotency_key for each in events] == [each.idempotency_key for each in given]
    assert sum(each.created for each in events) == 19
    assert Event.objects.count() == 20


def test_no_statement_takes_more_rows_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "STATEMENT_ROWS_MAX", 3)
    with CaptureQueriesContext(connection) as queries:
        events = publish_many(Event(subject="a", idempotency_key=f"k{n}") for n in range(7))
    assert sum("INSERT INTO kanthorq_django_event" in query["sql"] for query in queries) == 3
    assert Event.objects.count() == len(events) == 7


def test_errors_of_a_copy_are_those_of_django() -> None:
    stored = publish("order.paid")
    taken = Event(subject="a")
    taken.id = taken._drawn_id = stored.pk  # as no id that is drawn can be
    with pytest.raises(DatabaseError, match="duplicate key"), transaction.atomic():
        publish_many([taken, Event(subject="b")])
    assert Event.objects.get() == stored


def test_events_of_a_copy_that_failed_are_as_they_were_given() -> None:
    stored = publish("order.paid")
    keyed = Event(subject="d", idempotency_key="d")
    events = [Event(subject="a"), Event(subject="b", stream=stored.stream), keyed]
    given = [_fields(event) for event in events]
    with pytest.raises(InvalidEvent, match=str(stored.pk)):
        publish_many([*events, Event(pk=stored.pk, subject="c")])
    assert [_fields(event) for event in events] == given
    publish_many(events[:1], stream="another")
    publish_many(events[1:])
    assert Event.objects.filter(subject__in="abd").count() == len(events)


def test_a_copy_that_failed_leaves_what_was_deferred_deferred() -> None:
    stored = publish("order.paid")
    clone = Event.objects.defer("created_at", "xid").get()
    clone._state.adding = True
    with pytest.raises(InvalidEvent, match=str(stored.pk)):
        publish_many([clone, Event(subject="order.paid")])
    assert clone.get_deferred_fields() == {"created_at", "xid"}
    assert clone == stored


class Checked(Inspection):
    """Finds nothing wrong."""

    def __init__(self, events: list[Event]) -> None:
        super().__init__(Event, events, "default")
        self.plain = [events]

    def finish(self) -> list[Event]:
        return []


def test_a_copy_that_failed_leaves_what_another_thread_published_meanwhile() -> None:
    events = [Event(subject="a"), Event(subject="b")]
    publish_many(events)
    published = [_fields(event) for event in events]
    # As by a thread that had checked the same events before.
    with pytest.raises(InvalidEvent, match=str(events[0].pk)):
        insertion.insert(events, lambda: Checked(events), "default", connection)
    assert [_fields(event) for event in events] == published


def _fields(event: Event) -> dict[str, Any]:
    # It may be tried again after a commit that got no answer: its id may be taken.
    return vars(event) | {"_state": (event._state.adding, event._state.db), "_drawn_id": None}


def test_events_whose_bodies_nobody_has_opened_yet_are_published_again(settings: Settings) -> None:
    settings.KANTHORQ = {"BODY_KEYS": [Fernet.generate_key().decode()]}
    publish_many([Event(subject="order.paid", body=b"%d" % number) for number in range(3)])
    copies = list(Event.objects.order_by("pk"))
    Event.objects.all().delete()
    for copy in copies:
        copy._state.adding = True
    publish_many(copies)
    assert [event.body for event in Event.objects.order_by("pk")] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("use_tz", [True, False])
def test_keyed_events_are_stored_where_the_server_reads_no_null_in_arrays(
    settings: Settings, *, use_tz: bool
):
    settings.USE_TZ = use_tz
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL array_nulls = off")
    later = timezone.now() + timedelta(hours=1)
    moments = [None, later, None]
    publish_many(
        [
            Event(subject="order.paid", idempotency_key=str(key), schedule_at=moment)
            for key, moment in enumerate(moments)
        ]
    )
    stored = Event.objects.order_by("idempotency_key").values_list("schedule_at", flat=True)
    assert list(stored) == moments
