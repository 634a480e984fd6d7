import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from django.core.management.base import CommandError

from kanthorq_django.models import Event, Stream
from tests.commands.console import kanthorq
from tests.factories import EventFactory, StreamFactory

pytestmark = pytest.mark.django_db


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    given = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given))
    return given


def published(out: str) -> Event:
    return Event.objects.get(pk=UUID(out.strip()))


def test_the_event_id_alone_is_printed():
    StreamFactory.create(name="orders")

    ran = kanthorq("publish", "order.paid", "hello", "--stream", "orders")

    event = published(ran.out)
    assert (event.subject, bytes(event.body), event.stream.name) == (
        "order.paid",
        b"hello",
        "orders",
    )
    assert ran.err == ""


def test_a_body_is_not_needed():
    assert bytes(published(kanthorq("publish", "order.paid").out).body) == b""


def test_every_option_reaches_the_event():
    ran = kanthorq(
        "publish", "order.paid", '{"order": 17}', "--json", "--metadata", '{"by": "ops"}',
        "--resource-key", "order-17", "--idempotency-key", "once",
        "--schedule-at", "2026-12-24T18:00+01:00",
    )  # fmt: skip

    event = published(ran.out)
    assert event.json() == {"order": 17}
    assert event.metadata == {"by": "ops"}
    assert (event.resource_key, event.idempotency_key) == ("order-17", "once")
    assert event.schedule_at == datetime(2026, 12, 24, 17, tzinfo=UTC)


def test_stdin_is_stored_byte_by_byte(stdin: io.BytesIO):
    stdin.write(b"\xff\x00binary\n")
    stdin.seek(0)

    event = published(kanthorq("publish", "report.ready", "-").out)
    assert bytes(event.body) == b"\xff\x00binary\n"


def test_a_file_is_stored_byte_by_byte(tmp_path: Path):
    file = tmp_path / "report.pdf"
    file.write_bytes(b"%PDF\xff")

    event = published(kanthorq("publish", "report.ready", "--file", file).out)
    assert bytes(event.body) == b"%PDF\xff"


def test_a_known_idempotency_key_prints_the_stored_event():
    stored = EventFactory.create(stream__name="orders", idempotency_key="once", body="same")

    ran = kanthorq(
        "publish", "order.paid", "same", "--stream", "orders", "--idempotency-key", "once"
    )

    assert ran.out.strip() == str(stored.pk)
    assert "idempotency key is known" in ran.err
    assert Event.objects.count() == 1


def test_a_new_stream_is_told_with_the_one_that_may_have_been_meant():
    StreamFactory.create(name="orders")

    ran = kanthorq("publish", "order.paid", "--stream", "ordres")

    assert published(ran.out).stream.name == "ordres"
    assert "did you mean 'orders'?" in ran.err


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        (["order..paid"], "has an empty token"),
        (["order.*"], "a subject cannot hold wildcards; '*' and '>' are for filters"),
        (["order.paid", "--stream", "no name"], "cannot name a stream"),
        (["order.paid", '{"a":', "--json"], "The body is not JSON"),
        (["order.paid", "NaN", "--json"], "body: $ is nan"),
        (["order.paid", '"\\ud800"', "--json"], "half a surrogate pair"),
        (["order.paid", "--metadata", "[]"], "metadata must be a dict"),
        (["order.paid", "--metadata", "{"], "--metadata is not JSON"),
        (["order.paid", "--resource-key", "k" * 256], "resource_key has 256 characters"),
        (["order.paid", "--idempotency-key", ""], "idempotency_key has 0 characters"),
        (["order.paid", "x" * 262_145], "262,145 bytes"),
        (["order.paid", "--schedule-at", "2026-12-24T18:00"], "write it as 2026-12-24T18:00+01:00"),
        (["order.paid", "--schedule-at", "2026-12-24"], "write it as 2026-12-24T00:00+01:00"),
        (["order.paid", "--schedule-at", "tomorrow"], "is not a time"),
        (["order.paid", "--schedule-at", "2026-13-24T18:00Z"], "is not a time"),
        (["order.paid", "--file", "/nowhere/at/all"], "cannot be read"),
        (["order.paid", "text", "--file", "/nowhere"], "not allowed with argument"),
        (["order.paid", "--json", "--text"], "not allowed with argument"),
        (["order.paid", "--database", "nowhere"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(args: list[str], fact: str):
    with pytest.raises(CommandError) as refused:
        kanthorq("publish", *args)

    assert fact in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Event.objects.exists()
    assert not Stream.objects.exists()


def test_text_from_stdin_must_be_utf_8(stdin: io.BytesIO):
    stdin.write(b"\xff")
    stdin.seek(0)

    with pytest.raises(CommandError, match="not UTF-8"):
        kanthorq("publish", "order.paid", "-", "--text")


def test_an_endless_stdin_is_refused_at_the_limit(stdin: io.BytesIO):
    stdin.write(b"x" * 262_145)
    stdin.seek(0)

    with pytest.raises(CommandError, match="more than 262,144 bytes"):
        kanthorq("publish", "order.paid", "-")


def test_a_closed_stdin_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", None)

    with pytest.raises(CommandError, match="stdin is closed"):
        kanthorq("publish", "order.paid", "-")


def test_json_is_stored_as_publish_stores_it():
    event = published(kanthorq("publish", "order.paid", '{"a":1,\n"b":"ü"}', "--json").out)

    assert json.loads(bytes(event.body)) == {"a": 1, "b": "ü"}
