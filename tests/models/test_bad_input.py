"""What cannot be published: a typed error that names the field and the limit, before any SQL."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import connection, transaction
from django.db.models import F, Value
from django.db.models.functions import Concat
from django.test.utils import CaptureQueriesContext
from django.utils.functional import lazystr
from pytest_django import Settings

from kanthorq_django import publish, publish_many
from kanthorq_django.exceptions import (
    ConfigurationError,
    IdempotencyConflict,
    InvalidBody,
    InvalidEvent,
    InvalidSubject,
    KanthorqError,
)
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Stream, Task, TaskState
from tests.clock import BrokenZone
from tests.factories import ConsumerFactory, StreamFactory, TaskFactory
from tests.ledger.models import Entry

pytestmark = pytest.mark.django_db


@contextmanager
def refusal(error: type[Exception], problem: str) -> Iterator[None]:
    """Expect ``error``, no statement, nothing written, and a transaction that can go on."""
    business = uuid4()
    with transaction.atomic():
        Entry.objects.create(event_id=business, note="before")
        with CaptureQueriesContext(connection) as queries, pytest.raises(error, match=problem):
            yield
        assert [query["sql"] for query in queries] == []
        Entry.objects.create(event_id=business, note="after")
    assert Entry.objects.filter(event_id=business).count() == 2
    assert not Event.objects.exists()
    assert not Stream.objects.exists()


def deep(levels: int) -> Any:
    nested: Any = 1
    for _ in range(levels):
        nested = [nested]
    return nested


def empty_within(levels: int, kind: type[Any]) -> Any:
    """Return so many levels, the innermost of which is empty."""
    nested: Any = kind()
    for _ in range(levels - 1):
        nested = {"k": nested} if kind is dict else kind([nested])
    return nested


def circular() -> Any:
    nested: dict[str, Any] = {}
    nested["self"] = nested
    return nested


@pytest.mark.parametrize(
    ("subject", "problem"),
    [
        ("", "it is empty"),
        (" ", "space"),
        (".order", "empty token"),
        ("order.", "empty token"),
        ("order..paid", "empty token"),
        ("order.*", "wildcard"),
        ("order.>", "wildcard"),
        ("order paid", "space"),
        ("order\npaid", r"'\\n' is not printable"),
        ("order\x00paid", r"'\\x00' is not printable"),
        ("order\ud800paid", r"'\\ud800' is not printable"),
        ("order\u202epaid", r"'\\u202e' is not printable"),
        ("order\u200bpaid", r"'\\u200b' is not printable"),
        ("cafe\u0301", "NFC"),
        ("x" * 256, "256 bytes of UTF-8, the limit is 255"),
        ("x" * 10_240, "10240 bytes of UTF-8, the limit is 255"),
        (None, "must be a str, not NoneType"),
        (5, "must be a str, not int"),
        (b"order", "must be a str, not bytes"),
    ],
)
def test_a_bad_subject_is_refused(subject: Any, problem: str) -> None:
    with refusal(InvalidSubject, f"(?i)subject .*is not valid: .*{problem}"):
        publish(subject)
    with refusal(InvalidSubject, rf"events\[1\]: The subject .*{problem}"):
        publish_many([Event(subject="order"), Event(subject=subject)])


def test_a_message_about_a_long_subject_is_short() -> None:
    with pytest.raises(InvalidSubject) as raised:
        publish("x" * 1_000_000)
    assert len(str(raised.value)) < 250


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


BAD_JSON = [
    ({1, 2}, "Object of type set"),
    ({"a": [0, 1, {"b": {2}}]}, r"\$\.a\[2\]\.b: Object of type set"),
    ({"file": b"bytes"}, r"\$\.file: Object of type bytes"),
    ({"a": object()}, r"\$\.a: Object of type object"),
    ({"a": Unprintable()}, r"\$\.a: Object of type Unprintable"),
    ({"entry": Entry()}, r"\$\.entry: Object of type Entry"),
    ({"z": 1 + 2j}, r"\$\.z: Object of type complex"),
    ({"rows": Entry.objects.all()}, r"\$\.rows: Object of type QuerySet"),
    ({"model": Entry}, r"\$\.model: Object of type ModelBase"),
    ({"at": datetime(2026, 1, 1, tzinfo=UTC).timetz()}, r"\$\.at: .*timezone-aware times"),
    ({"price": float("nan")}, r"\$\.price is nan"),
    ([1, float("inf")], r"\$\[1\] is inf"),
    ({"a": {"b": -float("inf")}}, r"\$\.a\.b is -inf"),
    ({"name": "a\x00b"}, r"\$\.name holds a NUL"),
    ({"a\x00b": 1}, r"a key of \$ holds a NUL"),
    ({"a": lazystr("a\x00b")}, r"\$\.a holds a NUL"),
    ({"name": "a\ud800b"}, r"\$\.name holds half a surrogate pair"),
    ({"a\udfffb": 1}, r"a key of \$ holds half a surrogate pair"),
    ({"a": lazystr("\ud800")}, r"\$\.a holds half a surrogate pair"),
    ({"n": 10**5_000}, r"\$\.n: .*4300 digits"),
    ({"a": {(1, 2): 3}}, r"a key of \$\.a is a tuple"),
    ({"a": {float("nan"): 1}}, "Out of range float"),
    ({"a": deep(101)}, "nested deeper than 100"),
    ({"a": deep(100_000)}, "nested deeper than 100"),
    (circular(), "nested deeper than 100"),
]


@pytest.mark.parametrize(("body", "problem"), BAD_JSON)
def test_a_body_that_json_cannot_take_is_refused_by_its_place(body: Any, problem: str) -> None:
    with refusal(InvalidBody, f"^body: .*{problem}"):
        publish("order.paid", body)
    with refusal(InvalidBody, rf"^events\[1\]: body: .*{problem}"):
        publish_many([Event(subject="a"), Event(subject="b", body=body)])


TOO_DEEP = r"nested deeper than 100 \(KANTHORQ\['DEPTH_MAX'\]\)"


@pytest.mark.parametrize("kind", [list, dict, tuple])
def test_an_empty_level_of_an_event_is_a_level(kind: type[Any]) -> None:
    with refusal(InvalidBody, f"^body: .* {TOO_DEEP}"):
        publish("a", empty_within(101, kind))
    with refusal(InvalidBody, f"^metadata: .* {TOO_DEEP}"):
        publish("a", metadata={"k": empty_within(100, kind)})

    publish("a", empty_within(100, kind), metadata={"k": empty_within(99, kind)})


@pytest.mark.parametrize("kind", [list, dict, tuple])
def test_an_empty_level_of_a_result_is_a_level(kind: type[Any]) -> None:
    message = Message(TaskFactory.create(state=TaskState.RUNNING))
    with pytest.raises(InvalidBody, match=f"^result: .* {TOO_DEEP}"):
        message.ack(empty_within(101, kind))

    message.ack(empty_within(100, kind))

    assert Task.objects.completed().exists()


def test_a_body_that_is_the_fault_itself_needs_no_place() -> None:
    with refusal(InvalidBody, r"^body: Object of type Entry is not JSON serializable\.$"):
        publish("order.paid", Entry())


@pytest.mark.parametrize(
    ("metadata", "problem"), [pair for pair in BAD_JSON if isinstance(pair[0], dict)]
)
def test_metadata_that_json_cannot_take_are_refused_by_their_place(
    metadata: Any, problem: str
) -> None:
    with refusal(InvalidBody, f"^metadata: .*{problem}"):
        publish("order.paid", metadata=metadata)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ([], "metadata must be a dict, not list"),
        ([("a", 1)], "metadata must be a dict, not list"),
        ("{}", "metadata must be a dict, not str"),
        (5, "metadata must be a dict, not int"),
        (True, "metadata must be a dict, not bool"),
        ({1: "a"}, "metadata: the key 1 is not a str"),
        ({None: "a"}, "metadata: the key None is not a str"),
    ],
)
def test_metadata_that_are_no_object_are_refused(metadata: Any, problem: str) -> None:
    with refusal(InvalidBody, problem):
        publish("order.paid", metadata=metadata)


def test_half_a_surrogate_pair_in_a_text_is_refused() -> None:
    with refusal(InvalidBody, r"body: \$ holds half a surrogate pair"):
        publish("order.paid", "a\ud800b")


def test_a_view_of_memory_that_was_released_is_refused() -> None:
    released = memoryview(b"bytes")
    released.release()
    with refusal(InvalidBody, "^The body .*released memoryview"):
        publish("order.paid", released)


@pytest.mark.parametrize("body", [b"x" * 262_145, "x" * 262_145, "ä" * 131_073, ["x" * 262_141]])
def test_a_body_above_the_limit_is_refused_with_its_size(body: Any) -> None:
    with refusal(
        InvalidBody, r"body has 262,14\d bytes, the limit is 262,144 \(KANTHORQ\['BODY_SIZE_MAX'\]"
    ):
        publish("order.paid", body)


def test_metadata_above_the_limit_are_refused_with_their_size() -> None:
    with refusal(InvalidBody, r"metadata has 16,394 bytes, the limit is 16,384 \(KANTHORQ\['META"):
        publish("order.paid", metadata={"a": "x" * 16_385})


def test_the_project_sets_the_limits(settings: Settings) -> None:
    settings.KANTHORQ = {"BODY_SIZE_MAX": 5, "METADATA_SIZE_MAX": 10}
    publish("order.paid", b"12345", metadata={"a": 123})
    with pytest.raises(InvalidBody, match="body has 6 bytes, the limit is 5"):
        publish("order.paid", b"123456")
    with pytest.raises(InvalidBody, match="metadata has 11 bytes, the limit is 10"):
        publish("order.paid", metadata={"a": 1234})


@pytest.mark.parametrize("name", ["resource_key", "idempotency_key"])
@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (5, "must be a str, not int"),
        (b"k", "must be a str, not bytes"),
        ("x" * 256, "has 256 characters, it must have [01] to 255"),
        ("x" * 1_024, "has 1024 characters"),
        ("a\x00b", "not printable"),
        ("a\nb", "not printable"),
        ("a\ud800b", "not printable"),
    ],
)
def test_a_bad_key_is_refused_by_its_name(name: str, key: Any, problem: str) -> None:
    with refusal(InvalidEvent, f"^{name} .*{problem}"):
        publish("order.paid", **{name: key})


def test_an_idempotency_key_may_not_be_empty_but_a_resource_key_may() -> None:
    with refusal(InvalidEvent, "idempotency_key has 0 characters, it must have 1 to 255"):
        publish("order.paid", idempotency_key="")
    with refusal(InvalidEvent, "resource_key must be a str, not NoneType"):
        publish("order.paid", resource_key=None)  # type: ignore[arg-type]  # that is the point
    publish("order.paid", resource_key="")


EAST, WEST = timezone(timedelta(hours=14)), timezone(-timedelta(hours=12))


@pytest.mark.parametrize(
    ("moment", "problem"),
    [
        (datetime(2026, 11, 20, 9, 30), "is naive; use an aware datetime"),  # noqa: DTZ001  # so it is
        (date(2026, 11, 20), "must be a datetime, not date"),
        ("2026-11-20T09:30:00Z", "must be a datetime, not str"),
        (1_700_000_000, "must be a datetime, not int"),
        (True, "must be a datetime, not bool"),
        (timedelta(hours=1), "must be a datetime, not timedelta"),
        (datetime.max.replace(tzinfo=UTC), "must be in the years 2 to 9998"),
        (datetime.max.replace(tzinfo=WEST), "must be in the years 2 to 9998"),
        (datetime.min.replace(tzinfo=UTC), "must be in the years 2 to 9998"),
        (datetime.min.replace(tzinfo=EAST), "must be in the years 2 to 9998"),
        (datetime(2026, 1, 1, tzinfo=BrokenZone()), r"zone .*RuntimeError\('no offset\\nfor"),
    ],
)
def test_a_bad_moment_is_refused(moment: Any, problem: str) -> None:
    with refusal(InvalidEvent, f"schedule_at .*{problem}"):
        publish("order.due", schedule_at=moment)


def test_a_naive_moment_is_welcome_in_a_project_without_time_zones(settings: Settings) -> None:
    settings.USE_TZ = False
    moment = datetime(2026, 11, 20, 9, 30)  # noqa: DTZ001  # as this project has it
    with refusal(InvalidEvent, "in the years 2 to 9998"):
        publish("order.due", schedule_at=datetime.max)  # noqa: DTZ901  # as this project has it
    publish("order.due", schedule_at=moment)


UUID4 = UUID("7d9c3d6e-0000-4000-8000-000000000000")
UUID7 = UUID("01a1f9d1-0000-7000-8000-000000000000")


@pytest.mark.parametrize("given", ["5", 5, -1, 0, 2**63, UUID4, str(UUID7), ""])
def test_an_id_that_publishing_does_not_make_is_refused(given: Any) -> None:
    with refusal(InvalidEvent, "id must be a UUIDv7"):
        publish_many([Event(pk=given, subject="order.paid")])
    with refusal(InvalidEvent, r"events\[1\]: id must be a UUIDv7"):
        publish_many([Event(subject="a"), Event(pk=given, subject="b")])


@pytest.mark.parametrize(
    "stream", ["", " ", "a b", "a\x00b", "a\ud800", "a/b", "x" * 129, None, 5, b"orders", ["a"]]
)
def test_a_bad_stream_name_is_refused(stream: Any) -> None:
    publishings: list[Callable[[], object]] = [
        lambda: publish("order.paid", stream=stream),
        lambda: publish_many([], stream=stream),
        lambda: publish_many([Event(subject="a")], stream=stream),
        lambda: publish_many([Event(subject="a"), Event(subject="b")], stream=stream),
        lambda: Stream.objects.register(stream),
        lambda: Stream.objects.create(name=stream),
    ]
    for publishing in publishings:
        with refusal(ConfigurationError, "cannot name a stream"):
            publishing()


def test_what_went_wrong_can_be_caught_by_family() -> None:
    assert issubclass(InvalidSubject, InvalidEvent)
    assert issubclass(InvalidBody, InvalidEvent)
    assert issubclass(IdempotencyConflict, InvalidEvent)
    assert issubclass(InvalidEvent, ValueError)
    assert issubclass(InvalidEvent, KanthorqError)


def test_an_event_without_a_stream_cannot_save_itself() -> None:
    with refusal(InvalidEvent, "no stream"):
        Event(subject="order.paid").save()
    assert not Task.objects.exists()


@pytest.mark.parametrize("update_fields", [None, ["stream"], ["stream_id", "name"]])
def test_a_consumer_does_not_move_to_another_stream(update_fields: list[str] | None) -> None:
    consumer = ConsumerFactory.create()
    kept, consumer.stream = consumer.stream, StreamFactory.create()
    with pytest.raises(ConfigurationError, match=f"reads the stream '{kept.name}'"):
        consumer.save(update_fields=update_fields)
    consumer.stream = kept
    consumer.save(update_fields=update_fields)
    consumer.stream_id, consumer.attempt_max = str(kept.pk), 7  # as of a form
    consumer.save(update_fields=(name for name in ["stream", "attempt_max"]))
    consumer.refresh_from_db()
    assert (consumer.stream, consumer.attempt_max) == (kept, 7)


@pytest.mark.parametrize(
    "move",
    [
        lambda consumer, stream: Consumer.objects.filter(pk=consumer.pk).update(stream=stream),
        lambda consumer, stream: Consumer.objects.distinct().update(stream_id=str(stream.pk)),
        lambda consumer, stream: Consumer.objects.update(stream=stream, serialize="on"),
        lambda consumer, stream: stream.consumers.add(consumer),
        lambda consumer, stream: stream.consumers.set([consumer]),
    ],
)
def test_nor_does_an_update_move_it(move: Callable[[Consumer, Stream], Any]) -> None:
    consumer, stream = ConsumerFactory.create(), StreamFactory.create()
    kept = consumer.stream
    refused = pytest.raises(ConfigurationError, match=f"reads the stream '{kept.name}'")
    with refused, transaction.atomic():
        move(consumer, stream)
    Consumer.objects.update(stream=kept, attempt_max=7)
    consumer.stream = stream
    with refused, transaction.atomic():
        Consumer.objects.bulk_update([consumer], ["stream", "attempt_max"])
    consumer.refresh_from_db()
    assert (consumer.stream, consumer.attempt_max, consumer.serialize) == (kept, 7, "")
    assert Consumer.objects.bulk_update([consumer], ["stream", "attempt_max"]) == 1


def test_a_stream_may_be_compared_with_what_a_queryset_adds_to_its_rows() -> None:
    consumer = ConsumerFactory.create()
    annotated = Consumer.objects.annotate(same=F("stream"), other=F("stream") + 1)
    assert annotated.update(stream=F("same")) == 1
    with pytest.raises(ConfigurationError, match="cannot move"):
        annotated.update(stream=F("other"))
    assert Consumer.objects.get() == consumer


@pytest.mark.parametrize("name", ["stream", "serialize"])
def test_nothing_is_inserted_over_what_cursors_and_tasks_had_to_follow(name: str) -> None:
    consumer, stream = ConsumerFactory.create(), StreamFactory.create()
    same = Consumer(name=consumer.name, stream=stream, serialize="on", subject_includes=[">"])
    over: dict[str, Any] = {"update_conflicts": True, "unique_fields": ["name"]}
    with pytest.raises(ConfigurationError, match=f"cannot change '{name}' of consumers that exist"):
        Consumer.objects.bulk_create([same], update_fields=["attempt_max", name], **over)
    with pytest.raises(ConfigurationError, match=f"cannot change '{name}'"):
        Consumer.objects.bulk_create([same], None, False, True, [name], ["name"])
    Consumer.objects.bulk_create([same], update_fields=["attempt_max"], **over)
    kept = Consumer.objects.get()
    assert (kept.stream, kept.serialize) == (consumer.stream, "")


@pytest.mark.parametrize(
    "write",
    [
        lambda: Stream.objects.bulk_create(iter([Stream(name="fine"), Stream(name="no name")])),
        lambda: Stream.objects.update(name="no name"),
        lambda: Consumer.objects.bulk_create([Consumer(stream_id=1, name="no name")]),
        lambda: Consumer.objects.update(name="no name"),
    ],
)
def test_what_is_no_name_is_not_written_past_save(write: Callable[[], Any]) -> None:
    with refusal(ConfigurationError, "'no name' cannot name a"):
        write()


def test_what_is_a_name_is_written() -> None:
    Stream.objects.bulk_create(Stream(name=name) for name in ["one"])
    Stream.objects.update(name=Concat("name", Value("-a")))
    (stream,) = Stream.objects.all()
    Consumer.objects.bulk_create([Consumer(stream=stream, name="two")])
    Consumer.objects.update(name=Concat("name", Value("-b")))
    assert (stream.name, Consumer.objects.get().name) == ("one-a", "two-b")
