"""How events are written once they are checked: one by one statement, many by COPY.

Those with idempotency keys, each once: see idempotency.py.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Model
from django.db.models.expressions import RawSQL
from psycopg.errors import UniqueViolation

from kanthorq_django import sql
from kanthorq_django.exceptions import IdempotencyConflict, InvalidEvent
from kanthorq_django.models.isolation import unconflicted
from kanthorq_django.models.publishing import idempotency, notifications
from kanthorq_django.models.publishing.copying import copied
from kanthorq_django.models.publishing.event_row import (
    EarlyNotes,
    columns_of,
    mark_stored,
    stored_by,
)
from kanthorq_django.models.publishing.inspection import SLICE_SIZE, Inspection
from kanthorq_django.models.stream import Stream
from kanthorq_django.sql.session import encoding_of, is_utf8
from kanthorq_django.sql.transactions import is_outside

if TYPE_CHECKING:
    from kanthorq_django.models.event import Event


def insert(
    events: Sequence["Event"],
    inspect: Callable[[], Inspection],
    stream: str,
    connection: BaseDatabaseWrapper,
) -> list["Event"]:
    """Insert events; return them, or those stored before under their idempotency keys.

    ``inspect`` begins to check them. Workers of the stream are woken once they are committed.
    Raises InvalidEvent and IdempotencyConflict; nothing is stored then.
    """
    try:
        return unconflicted(connection.alias, _insert, events, inspect, stream, connection)
    except InvalidEvent:
        raise
    except BaseException:
        for event in events:
            if isinstance(event, Model):  # what was given may be anything
                # The event may be stored although no answer came: its id may be taken.
                event._drawn_id = None
        raise


def _insert(
    events: Sequence["Event"],
    inspect: Callable[[], Inspection],
    stream: str,
    connection: BaseDatabaseWrapper,
) -> list["Event"]:
    inspection = inspect()
    try:
        return _insert_inspected(events, inspection, stream, connection)
    except BaseException:
        inspection.take_back()
        raise


def _insert_inspected(
    events: Sequence["Event"],
    inspection: Inspection,
    stream: str,
    connection: BaseDatabaseWrapper,
) -> list["Event"]:
    # Of many events, each slice is checked while the server stores the one before. If one is
    # refused late, the transaction is rolled back, so it has to be their own: within another a
    # savepoint would be needed, and PostgreSQL keeps no more than 64 of a transaction at hand.
    # Where few are plain, nothing could be sent before all are checked.
    is_whole = len(events) > SLICE_SIZE and is_outside(connection) and inspection.begins_plain()
    if not is_whole:
        inspection.finish()
    using, pace = connection.alias, notifications.pace(connection.alias, stream)
    pace.begin()
    if len(events) > 1:
        stored = _insert_many(events, inspection, stream, using, is_whole=is_whole)
        is_new = any(event.created for event in stored)
    elif not pace.goes_on and (announced := _insert_announced(events[0], stream, connection, pace)):
        return [announced]
    else:
        stored = [_insert_one(events[0], stream, connection)]
        is_new = stored[0].created
    if is_new:
        notifications.announcer(using, stored[0].stream_id).wake_after_commit(pace, connection)
    return stored


def _insert_announced(
    event: "Event", stream: str, connection: BaseDatabaseWrapper, pace: notifications.Pace
) -> "Event | None":
    """Insert, commit and notify in one round trip; None, and nothing is stored, if that cannot be.

    That nobody could be notified is no failure to publish.
    """
    announcer = notifications.announcer_with_commit(pace, connection)
    if announcer is None or not _is_new(event):
        return None
    using, began_at = connection.alias, time.monotonic()
    params = columns_of(event) | {"stream": stream, "channel": announcer.channel}
    done = sql.integers_apart(connection, "publish", "notify", params)
    if done is None or done.values is None:
        return None
    stored = mark_stored(event, stored_by(done.values, using), using)
    if done.is_followed and notifications.announcer(using, stored.stream_id) is announcer:
        announcer.spare(began_at)
        pace.rest()
    else:
        notifications.announcer(using, stored.stream_id).wake_after_commit(pace, connection)
    return stored


def _is_new(event: "Event") -> bool:
    """Tell whether no stored event can have the key or the id of ``event``."""
    return event.idempotency_key is None and event._drawn_id is event.id


def _insert_one(event: "Event", stream: str, connection: BaseDatabaseWrapper) -> "Event":
    """One statement: the lookup of the stream costs no round trip of its own."""
    using, params = connection.alias, columns_of(event)
    params["stream"] = stream
    statement = "publish" if _is_new(event) else "publish_once"
    for _ in range(idempotency.TRIES):
        stored = sql.integers(connection, statement, params)
        if stored is not None:
            return mark_stored(event, stored_by(stored, using), using)
        registered = Stream.objects.using(using).register_by_event(stream)
        if known := idempotency.known_of([event], registered, using):
            return known[event.pk]
        _refuse_taken([event], using)
    raise idempotency.unreadable(event, stream)


def _insert_many(
    events: Sequence["Event"],
    inspection: Inspection,
    stream: str,
    using: str,
    *,
    is_whole: bool,
) -> list["Event"]:
    is_doubtful = not is_whole and _is_doubtful(events, using)
    copied_first: list[Event] = []
    early = EarlyNotes(copied_first)
    try:
        with transaction.atomic(using=using, savepoint=is_doubtful):
            registered = Stream.objects.using(using).register_by_event(stream)
            moment = sql.rows(using, "publish_moment", {"stream_id": registered.pk})[0]
            stored = stored_by(moment, using)
            _copy(
                _kept_in(copied_first, inspection.plain),
                moment,
                using,
                meanwhile=lambda: early.note(stored, using),
            )
            rest = inspection.finish()
            keyed = [event for event in rest if event.idempotency_key is not None]
            _copy((each for each in rest if each.idempotency_key is None), moment, using)
            known = idempotency.insert_keyed(keyed, registered, moment, using)
    except BaseException as error:
        early.take_back()
        if is_whole or is_doubtful:
            _explain(error, events, using)
        raise
    for event in rest:
        if event.pk not in known:
            mark_stored(event, stored, using)
    return [known.get(event.pk, event) for event in events] if known else list(events)


def _kept_in(seen: list["Event"], slices: Iterable[Sequence["Event"]]) -> Iterator["Event"]:
    for events in slices:
        seen += events
        yield from events


def _is_doubtful(events: Sequence["Event"], using: str) -> bool:
    """Tell whether ``events``, which are checked, may still be refused when some are written.

    A conflict of keys, an id that is taken, and text that the connection cannot encode are found
    only then: only a savepoint takes them back and leaves the caller's transaction usable.
    """
    return not all(map(_is_new, events)) or _is_converted(using)


def _explain(error: BaseException, events: Sequence["Event"], using: str) -> None:
    """Raise in the place of ``error`` what says which of several ``events`` it is about."""
    if isinstance(error, IdempotencyConflict):
        index = next(i for i, event in enumerate(events) if event.pk == error.event_id)
        raise IdempotencyConflict(f"events[{index}]: {error}", error.event_id) from error
    if isinstance(error.__cause__, UniqueViolation):
        _refuse_taken(events, using)


def _refuse_taken(events: Sequence["Event"], using: str) -> None:
    """Raise InvalidEvent if an event is stored that has the id of one of ``events``."""
    from kanthorq_django.models.event import Event

    places = {  # by id; what was not checked yet, and so not sent, may be anything
        event.pk: index
        for index, event in enumerate(events)
        if isinstance(event, Event) and isinstance(event.pk, UUID)
    }
    among = RawSQL("SELECT unnest(%s::uuid[])", [list(places)])
    stored = Event.objects.using(using).filter(pk__in=among)
    taken = set(stored.values_list("pk", flat=True))
    for pk, index in places.items():
        if pk in taken:
            place = f"events[{index}]: " if len(events) > 1 else ""
            raise InvalidEvent(f"{place}id {pk} is that of an event which is stored already.")


def _is_converted(using: str) -> bool:
    """Tell whether text does not travel as UTF-8, so that there may be some that cannot."""
    raw = connections[using].connection
    return raw is not None and not is_utf8(raw)


def _copy(
    events: Iterable["Event"],
    moment: Any,
    using: str,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Store ``events``; ``meanwhile`` is called when all are sent, and most not stored yet."""
    left = iter(events)
    if (first := next(left, None)) is None:
        return
    connection = connections[using]
    # Django wraps psycopg's errors for execute(), but not for copy().
    with (
        connection.wrap_database_errors,
        connection.cursor() as cursor,
        cursor.copy(sql.load("publish_many")) as copy,
    ):
        encoding = encoding_of(connection.connection)
        for chunk in copied(chain([first], left), moment, using, encoding):
            copy.write(chunk)
        if meanwhile is not None:
            meanwhile()
