"""Many events in a transaction of their own are checked while the server stores those before."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils.functional import SimpleLazyObject, lazy
from psycopg import Copy
from pytest_django import DjangoAssertNumQueries

from kanthorq_django import publish, publish_many
from kanthorq_django.exceptions import IdempotencyConflict, InvalidBody, InvalidEvent
from kanthorq_django.models import Event, Stream
from kanthorq_django.models.publishing.inspection import SLICE_SIZE, Inspection

pytestmark = pytest.mark.django_db(transaction=True)

COUNT = 3 * SLICE_SIZE + 7
LATE = COUNT - 2  # the index of what is refused: in the last slice


def made(count: int = COUNT) -> list[Event]:
    return [Event(subject="order.paid", body=b"%d" % number) for number in range(count)]


def test_one_that_is_refused_late_takes_all_before_it_back() -> None:
    given = made()
    given[LATE].body = {"n": float("nan")}
    with pytest.raises(InvalidBody, match=rf"^events\[{LATE}\]: body: \$\.n is nan"):
        publish_many(given)
    assert not Event.objects.exists()
    assert not Stream.objects.exists()
    given[LATE].body = b"mended"
    assert publish_many(given) == given
    assert Event.objects.count() == COUNT
    assert [event.created for event in given] == [True] * COUNT


@pytest.mark.parametrize("what", ["order.paid", None, 17, Stream(name="orders")])
def test_what_is_no_event_is_named_by_its_index(what: Any) -> None:
    given = [*made(), what]
    with pytest.raises(InvalidEvent, match=rf"^events\[{COUNT}\]: An Event was expected"):
        publish_many(given)
    assert not Event.objects.exists()


def test_one_event_that_stands_in_two_slices_is_refused() -> None:
    given = made()
    given[LATE] = given[1]
    with pytest.raises(InvalidEvent, match=rf"events\[{LATE}\]: id {given[1].pk} stands twice"):
        publish_many(given)
    assert not Event.objects.exists()


def test_the_first_are_sent_before_the_last_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    write, is_plain = Copy.write, Inspection._is_plain

    def noting_write(copy: Copy, content: Any) -> None:
        seen.append("sent")
        write(copy, content)

    def noting_is_plain(inspection: Inspection, event: Event) -> bool:
        if event is given[-1]:
            seen.append("checked all")
        return is_plain(inspection, event)

    monkeypatch.setattr(Copy, "write", noting_write)
    monkeypatch.setattr(Inspection, "_is_plain", noting_is_plain)
    given = made()
    publish_many(given)
    assert seen[0] == "sent"
    seen.clear()
    given = made()
    with transaction.atomic():
        publish_many(given)
    assert seen[0] == "checked all"


def test_where_few_are_plain_no_transaction_waits_for_the_checks(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    given = [Event(subject="order.paid", body={"n": number}) for number in range(COUNT)]
    given[LATE].body = {"n": float("nan")}
    with django_assert_num_queries(0), pytest.raises(InvalidBody, match=rf"^events\[{LATE}\]: "):
        publish_many(given)
    given[LATE].body = {"n": LATE}
    assert publish_many(given) == given
    assert Event.objects.count() == COUNT


def test_in_the_callers_transaction_all_are_checked_before_anything_is_sent(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    given = made()
    given[LATE].subject = "no subject"
    with transaction.atomic():
        kept = publish("order.kept")
        with django_assert_num_queries(0), pytest.raises(InvalidEvent, match=f"{LATE}"):
            publish_many(given)
        with CaptureQueriesContext(connection) as queries:
            publish_many(made())
    assert not [query for query in queries if "SAVEPOINT" in query["sql"]]
    assert Event.objects.filter(pk=kept.pk).exists()
    assert Event.objects.count() == COUNT + 1


def test_a_transaction_that_was_begun_past_django_is_the_callers(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    given = made()
    given[LATE].subject = "no subject"
    connection.ensure_connection()
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("CREATE TEMPORARY TABLE kept ON COMMIT DROP AS SELECT 1 AS one")
        with django_assert_num_queries(0), pytest.raises(InvalidEvent, match=f"{LATE}"):
            publish_many(given)
        cursor.execute("SELECT one FROM kept")
        cursor.execute("ROLLBACK")


def test_keys_may_stand_in_any_slice() -> None:
    known = publish("order.paid", b"%d" % LATE, idempotency_key=f"k{LATE}")
    given = made()
    for number in (0, 1, SLICE_SIZE, LATE):
        given[number].idempotency_key = f"k{number}"
    stored = publish_many(given)
    assert stored[LATE] == known
    assert stored[:LATE] == given[:LATE]
    assert [event.created for event in stored] == [n != LATE for n in range(COUNT)]
    assert Event.objects.count() == COUNT


def test_all_may_have_keys() -> None:
    given = made(SLICE_SIZE + 1)
    for number, event in enumerate(given):
        event.idempotency_key = f"k{number}"
    assert publish_many(given) == given
    assert Event.objects.exclude(idempotency_key=None).count() == len(given)


def test_a_conflict_of_keys_takes_all_back_and_is_named() -> None:
    publish("order.paid", "other", idempotency_key="k")
    given = made()
    given[LATE].idempotency_key = "k"
    with pytest.raises(IdempotencyConflict, match=rf"^events\[{LATE}\]: ") as conflict:
        publish_many(given)
    assert conflict.value.event_id == given[LATE].pk
    assert Event.objects.count() == 1


def test_a_taken_id_is_named_by_its_index() -> None:
    taken = publish("order.noted")
    given = made()
    given[LATE] = Event(pk=taken.pk, subject="order.paid")
    with pytest.raises(InvalidEvent, match=rf"^events\[{LATE}\]: id {taken.pk} is that of"):
        publish_many(given)
    assert Event.objects.get() == taken


def with_stream_ids() -> list[Event]:
    stream = Stream.objects.create(name="default")
    return [Event(subject="order.paid", stream_id=stream.pk) for _ in range(COUNT)]


def copies_of_stored() -> list[Event]:
    publish_many(made())
    copies = list(Event.objects.all())
    for event in copies:
        event.pk, event._state.adding = None, True
    return copies


def with_lazy_texts() -> list[Event]:
    text = lazy(lambda: str(Event.objects.count()), str)()
    return [*made(), Event(subject="order.counted", body=[text])]


@pytest.mark.parametrize("given", [with_stream_ids, copies_of_stored, with_lazy_texts])
@pytest.mark.timeout(30)
def test_what_needs_the_connection_is_not_checked_while_it_copies(
    given: Callable[[], list[Event]],
) -> None:
    """A query would wait for the end of the COPY, which waits for the query."""
    events = given()
    before = Event.objects.count()
    assert publish_many(events) == events
    assert Event.objects.count() == before + len(events)
    assert all(event.created and not event._state.adding for event in events)


@pytest.mark.timeout(30)
def test_nor_is_a_lazy_key_compared_meanwhile() -> None:
    given = made()
    key: Any = SimpleLazyObject(lambda: Stream.objects.get().name)
    given[LATE].resource_key = key
    assert publish_many(given) == given
    assert Event.objects.get(resource_key="default") == given[LATE]


def test_bodies_of_all_kinds_are_stored_in_their_places() -> None:
    given = [
        Event(subject="order.paid", body={"n": number} if number % 3 else b"%d" % number)
        for number in range(COUNT)
    ]
    assert publish_many(given) == given
    stored = Event.objects.order_by("pk")
    assert [each.json() for each in stored] == [
        {"n": number} if number % 3 else number for number in range(COUNT)
    ]
    assert {(each.xid, each.created_at) for each in given} == {
        (each.xid, each.created_at) for each in stored
    }
