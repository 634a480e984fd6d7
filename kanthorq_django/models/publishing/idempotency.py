"""Idempotency keys: under each an event is stored once, however often it is published."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from kanthorq_django import sql
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.exceptions import IdempotencyConflict
from kanthorq_django.models.maintenance.privileges import may_read_bodies
from kanthorq_django.models.publishing.event_row import columns_of
from kanthorq_django.models.stream import Stream

if TYPE_CHECKING:
    from kanthorq_django.models.event import Event

STATEMENT_SIZE_MAX = 8 * 2**20  # bytes of bodies in one statement, which hex doubles
STATEMENT_ROWS_MAX = 1_000
TRIES = 3  # to insert: the event whose key was met may be pruned before we look at it


def insert_keyed(
    events: Sequence["Event"], stream: Stream, moment: Any, using: str
) -> dict[UUID, "Event"]:
    """Insert events with idempotency keys; return those stored before, by the ids they replace.

    In the order of their keys: two publishers of the same keys then wait for each other and
    never deadlock. Of two events with one key the first given is the one.
    """
    known: dict[UUID, Event] = {}
    for chunk in _chunks(sorted(events, key=lambda event: event.idempotency_key or "")):
        known |= _insert_chunk(chunk, stream, moment, using)
    return known


def _insert_chunk(
    left: list["Event"], stream: Stream, moment: Any, using: str
) -> dict[UUID, "Event"]:
    known: dict[UUID, Event] = {}
    for _ in range(TRIES):
        rows = [columns_of(event) for event in left]
        params: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        # As text: in an array psycopg escapes bytes for standard_conforming_strings alone.
        params["body"] = [body.hex() for body in params["body"]]
        moments = params["schedule_at"]
        params["schedule_at"] = [str(each or "") for each in moments] if any(moments) else []
        params |= {"stream_id": moment.stream_id, "microseconds": moment.microseconds}
        new = {row.id for row in sql.rows(using, "publish_keyed", params)}
        known |= known_of([event for event in left if event.pk not in new], stream, using)
        left = [event for event in left if event.pk not in new and event.pk not in known]
        if not left:
            return known
    raise unreadable(left[0], stream.name)


def unreadable(event: "Event", stream: str) -> IdempotencyConflict:
    """Return the error to raise: neither inserted nor found, as row-level security may have it."""
    return IdempotencyConflict(
        f"The idempotency key {quoted(event.idempotency_key)} was used in stream {stream!r} for "
        "an event that this role cannot read.",
        event.pk,
    )


def _chunks(events: Iterable["Event"]) -> Iterator[list["Event"]]:
    chunk: list[Event] = []
    size = 0
    for event in events:
        chunk.append(event)
        size += len(event.body)
        if size >= STATEMENT_SIZE_MAX or len(chunk) == STATEMENT_ROWS_MAX:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def known_of(events: Sequence["Event"], stream: Stream, using: str) -> Mapping[UUID, "Event"]:
    """Return the event stored under the key of each of ``events``, by the id it replaces.

    One that was pruned by now is left out: its key is free again. Raises IdempotencyConflict if
    it is not the same event: a key names one event for ever.
    """
    keys = [event.idempotency_key for event in events if event.idempotency_key is not None]
    if not keys:
        return {}
    stored = type(events[0]).objects.using(using).filter(stream=stream, idempotency_key__in=keys)
    has_bodies = may_read_bodies(using)
    by_key = {
        event.idempotency_key: event for event in (stored if has_bodies else stored.defer("body"))
    }
    found: dict[UUID, Event] = {}
    for event in events:
        known = by_key.get(event.idempotency_key)
        if known is None:
            continue
        if not has_bodies:
            known.body = event.body  # the role may not compare: the subject has to do
        if (known.subject, bytes(known.body)) != (event.subject, bytes(event.body)):
            raise IdempotencyConflict(
                f"The idempotency key {quoted(event.idempotency_key)} was used in stream "
                f"{stream.name!r} for event {known.pk}, which has another subject or body.",
                event.pk,
            )
        known.created = False
        found[event.pk] = known
    return found
