"""How events that were checked are written: one by one statement, many by COPY, each key once."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.expressions import RawSQL
from psycopg.errors import UniqueViolation

from kanthorq_django import sql
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.exceptions import IdempotencyConflict, InvalidEvent
from kanthorq_django.models import notifications
from kanthorq_django.models.copying import copied
from kanthorq_django.models.encryption import seal
from kanthorq_django.models.fields import moment_of
from kanthorq_django.models.isolation import unconflicted
from kanthorq_django.models.privileges import may_read_bodies
from kanthorq_django.models.stream import Stream
from kanthorq_django.sql.session import encoding_of, is_utf8

if TYPE_CHECKING:
    from kanthorq_django.models.event import Event

STATEMENT_SIZE_MAX = 8 * 2**20  # bytes of bodies in one statement; PostgreSQL takes 1 GiB, twice
STATEMENT_ROWS_MAX = 1_000
TRIES = 3  # to insert: the event whose key was met may be pruned before we look at it

_ABSENT = object()  # what a deferred field holds


def insert(
    events: Sequence["Event"], stream: str, connection: BaseDatabaseWrapper
) -> list["Event"]:
    """Insert checked events; return them, or those stored before under their idempotency keys.

    Workers of the stream are woken once they are committed. Raises IdempotencyConflict.
    """
    try:
        return unconflicted(connection.alias, partial(_insert, events, stream, connection))
    except BaseException:
        for event in events:
            event._drawn_id = None  # it may be taken: what got no answer may be stored all the same
        raise


def _insert(
    events: Sequence["Event"], stream: str, connection: BaseDatabaseWrapper
) -> list["Event"]:
    using, pace = connection.alias, notifications.pace(connection.alias, stream)
    pace.begin()
    if len(events) > 1:
        stored = _insert_many(events, stream, using)
    elif announced := _insert_announced(events[0], stream, connection, pace):
        return [announced]
    else:
        stored = [_insert_one(events[0], stream, connection)]
    if any(event.created for event in stored):
        notifications.herald(using, stored[0].stream_id).wake_after_commit(pace, connection)
    return stored


def _insert_announced(
    event: "Event", stream: str, connection: BaseDatabaseWrapper, pace: notifications.Pace
) -> "Event | None":
    """Insert, commit and notify in one round trip; None, and nothing is stored, if that cannot be.

    That nobody could be notified is no failure to publish.
    """
    herald = notifications.companion(pace, connection)
    if herald is None or not _is_new(event):
        return None
    using, began_at = connection.alias, time.monotonic()
    params = _columns(event) | {"stream": stream, "channel": herald.channel}
    done = sql.values_apart(connection, "publish", "notify", params)
    if done is None or done.values is None:
        return None
    stored = _noted(event, _stored(done.values, using), using)
    if done.is_followed and notifications.herald(using, stored.stream_id) is herald:
        herald.spare(began_at)
        pace.rest()
    else:
        notifications.herald(using, stored.stream_id).wake_after_commit(pace, connection)
    return stored


def _is_new(event: "Event") -> bool:
    """Tell whether no stored event can have the key or the id of ``event``."""
    return event.idempotency_key is None and event._drawn_id is event.id


def _insert_one(event: "Event", stream: str, connection: BaseDatabaseWrapper) -> "Event":
    """One statement: the lookup of the stream costs no round trip of its own."""
    using, params = connection.alias, _columns(event)
    params["stream"] = stream
    statement = "publish" if _is_new(event) else "publish_once"
    for _ in range(TRIES):
        stored = sql.values(connection, statement, params)
        if stored is not None:
            return _noted(event, _stored(stored, using), using)
        registered = Stream.objects.using(using).register(stream)
        if known := _known([event], registered, using):
            return known[event.pk]
        _refuse_taken([event], using)
    raise _unreadable(event, stream)


def _insert_many(events: Sequence["Event"], stream: str, using: str) -> list["Event"]:
    plain = [event for event in events if event.idempotency_key is None]
    keyed = [event for event in events if event.idempotency_key is not None]
    # A conflict of keys, an id that is taken, and text that the connection cannot encode are found
    # after rows were written: only a savepoint takes them back and leaves the caller's transaction
    # usable.
    are_given = any(event._drawn_id is not event.id for event in plain)
    is_doubtful = bool(keyed) or are_given or _is_converted(using)
    early = _EarlyNotes(plain)
    try:
        with transaction.atomic(using=using, savepoint=is_doubtful):
            stored, known = _copy_and_insert(plain, keyed, stream, early, using)
    except BaseException as error:
        early.take_back()
        if is_doubtful:
            _explain(error, events, using)
        raise
    if not keyed:
        return plain
    created = {event.pk: _noted(event, stored, using) for event in keyed if event.pk not in known}
    return [known.get(event.pk) or created.get(event.pk) or event for event in events]


def _copy_and_insert(
    plain: Sequence["Event"],
    keyed: Sequence["Event"],
    stream: str,
    early: "_EarlyNotes",
    using: str,
) -> tuple[dict[str, Any], dict[UUID, "Event"]]:
    """Write all events; return what is stored of new ones, and known ones as they are."""
    registered = Stream.objects.using(using).register(stream)
    moment = sql.rows(using, "publish_moment", {"stream_id": registered.pk})[0]
    stored = _stored(moment, using)
    _copy(plain, moment, using, meanwhile=lambda: early.note(stored, using))
    return stored, _insert_keyed(keyed, registered, moment, using)


def _explain(error: BaseException, events: Sequence["Event"], using: str) -> None:
    """Raise in the place of ``error`` what says which of several ``events`` it is about."""
    if isinstance(error, IdempotencyConflict):
        index = next(i for i, event in enumerate(events) if event.pk == error.event_id)
        raise IdempotencyConflict(f"events[{index}]: {error}", error.event_id) from error
    if isinstance(error.__cause__, UniqueViolation):
        _refuse_taken(events, using)


def _refuse_taken(events: Sequence["Event"], using: str) -> None:
    """Raise InvalidEvent if an event is stored that has the id of one of ``events``."""
    among = RawSQL("SELECT unnest(%s::uuid[])", [[event.pk for event in events]])
    stored = type(events[0]).objects.using(using).filter(pk__in=among)
    taken = set(stored.values_list("pk", flat=True))
    for index, event in enumerate(events):
        if event.pk in taken:
            place = f"events[{index}]: " if len(events) > 1 else ""
            raise InvalidEvent(f"{place}id {event.pk} is that of an event which is stored already.")


def _is_converted(using: str) -> bool:
    """Tell whether text does not travel as UTF-8, so that there may be some that cannot."""
    raw = connections[using].connection
    return raw is not None and not is_utf8(raw)


def _copy(
    events: Sequence["Event"], moment: Any, using: str, meanwhile: Callable[[], None]
) -> None:
    """Store ``events``; ``meanwhile`` is called when all are sent, and most not stored yet."""
    if not events:
        return
    connection = connections[using]
    # Django wraps psycopg's errors for execute(), but not for copy().
    with (
        connection.wrap_database_errors,
        connection.cursor() as cursor,
        cursor.copy(sql.load("publish_many")) as copy,
    ):
        for chunk in copied(events, moment, using, encoding_of(connection.connection)):
            copy.write(chunk)
        meanwhile()


def _insert_keyed(
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
        rows = [_columns(event) for event in left]
        params: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        # As text: in an array psycopg escapes bytes for standard_conforming_strings alone.
        params["body"] = [body.hex() for body in params["body"]]
        params |= {"stream_id": moment.stream_id, "microseconds": moment.microseconds}
        new = {row.id for row in sql.rows(using, "publish_keyed", params)}
        known |= _known([event for event in left if event.pk not in new], stream, using)
        left = [event for event in left if event.pk not in new and event.pk not in known]
        if not left:
            return known
    raise _unreadable(left[0], stream.name)


def _unreadable(event: "Event", stream: str) -> IdempotencyConflict:
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


def _columns(event: "Event") -> dict[str, Any]:
    return {
        "id": event.id,
        "subject": event.subject,
        "body": seal(event.id, event.body),
        # As text that the connection refuses where no pull could read it.
        "metadata": json.dumps(event.metadata, ensure_ascii=False) if event.metadata else "{}",
        "resource_key": event.resource_key,
        "idempotency_key": event.idempotency_key,
        "schedule_at": event.schedule_at,
    }


def _stored(moment: tuple[Any, ...], using: str) -> dict[str, Any]:
    """Return what an event only gets when it is stored, from a row of publish.sql and its like."""
    stream_id, xid, microseconds = moment
    created_at = moment_of(microseconds, using)
    return {
        "_drawn_id": None,
        "stream_id": stream_id,
        "xid": xid,
        "created_at": created_at,
        "created": True,  # of a copy of an event that was found by its key it was False
    }


def _noted(event: "Event", stored: Mapping[str, Any], using: str) -> "Event":
    """Return ``event`` as it is stored now."""
    event.__dict__.update(stored)
    event._state.adding, event._state.db = False, using
    return event


class _EarlyNotes:
    """Events noted as stored before they are committed, and what they were before that."""

    def __init__(self, events: Sequence["Event"]) -> None:
        self._events = events
        self._stored: Mapping[str, Any] = {}
        # In flat lists: an object for each event would set off collections of all garbage.
        self._given: list[Any] = []
        self._were_adding: list[bool] = []
        self._databases: list[str | None] = []

    def note(self, stored: Mapping[str, Any], using: str) -> None:
        self._stored = stored
        self._given = [
            event.__dict__.get(name, _ABSENT) for event in self._events for name in stored
        ]
        self._were_adding = [event._state.adding for event in self._events]
        self._databases = [event._state.db for event in self._events]
        for event in self._events:
            _noted(event, stored, using)

    def take_back(self) -> None:
        """Let the events be as they were given, so that they can be published again.

        But for those that another thread has published, and noted, meanwhile.
        """
        given, xid = iter(self._given), self._stored.get("xid")
        states = zip(self._events, self._were_adding, self._databases, strict=False)
        for event, was_adding, using in states:
            before = dict(zip(self._stored, given, strict=False))
            if event.__dict__.get("xid") == xid:
                for name, value in before.items():
                    _put_back(event, name, value)
                event._state.adding, event._state.db = was_adding, using


def _put_back(event: "Event", name: str, value: Any) -> None:
    """Set a field to what it held, which is nothing where it was deferred."""
    if value is _ABSENT:
        event.__dict__.pop(name, None)
    else:
        event.__dict__[name] = value


def _known(events: Sequence["Event"], stream: Stream, using: str) -> Mapping[UUID, "Event"]:
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
