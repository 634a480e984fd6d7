"""How events that were checked are written: one by one statement, many by COPY.

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
from kanthorq_django.models import idempotency, notifications
from kanthorq_django.models.copying import copied
from kanthorq_django.models.event_row import EarlyNotes, columns_of, noted, stored_by
from kanthorq_django.models.isolation import unconflicted
from kanthorq_django.models.stream import Stream
from kanthorq_django.sql.session import encoding_of, is_utf8
from kanthorq_django.sql.transactions import is_outside

if TYPE_CHECKING:
    from kanthorq_django.models.event import Event


# Yields events in slices, each once it is checked; anew each time it is called.
Inspection = Callable[[], Iterable[Sequence["Event"]]]


def insert(
    events: Sequence["Event"],
    inspection: Inspection,
    stream: str,
    connection: BaseDatabaseWrapper,
) -> list["Event"]:
    """Insert events; return them, or those stored before under their idempotency keys.

    Workers of the stream are woken once they are committed. Raises IdempotencyConflict, and what
    the ``inspection`` raises.
    """
    try:
        return unconflicted(connection.alias, _insert, events, inspection, stream, connection)
    except BaseException:
        for event in events:
            if isinstance(event, Model):  # if not, it is what is refused
                # May be taken: what got no answer may be stored all the same.
                event._drawn_id = None
        raise


def _insert(
    events: Sequence["Event"],
    inspection: Inspection,
    stream: str,
    connection: BaseDatabaseWrapper,
) -> list["Event"]:
    using, pace = connection.alias, notifications.pace(connection.alias, stream)
    pace.begin()
    if len(events) > 1:
        stored = _insert_many(events, inspection, stream, using)
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
    stored = noted(event, stored_by(done.values, using), using)
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
            return noted(event, stored_by(stored, using), using)
        registered = Stream.objects.using(using).register_by_event(stream)
        if known := idempotency.known_of([event], registered, using):
            return known[event.pk]
        _refuse_taken([event], using)
    raise idempotency.unreadable(event, stream)


def _insert_many(
    events: Sequence["Event"], inspection: Inspection, stream: str, using: str
) -> list["Event"]:
    batch = _Batch(inspection)
    is_whole = is_outside(connections[using])  # what fails is all taken back
    is_doubtful = not is_whole and _is_doubtful(events, using)
    try:
        with transaction.atomic(using=using, savepoint=is_doubtful):
            stored, known = _copy_and_insert(batch, stream, using)
    except BaseException as error:
        batch.early.take_back()
        if is_whole or is_doubtful:
            _explain(error, events, using)
        raise
    if not batch.keyed:
        return batch.plain
    created = {
        event.pk: noted(event, stored, using) for event in batch.keyed if event.pk not in known
    }
    return [known.get(event.pk) or created.get(event.pk) or event for event in events]


def _is_doubtful(events: Sequence["Event"], using: str) -> bool:
    """Tell whether ``events``, which are checked, may still be refused when some are written.

    A conflict of keys, an id that is taken, and text that the connection cannot encode are found
    only then: only a savepoint takes them back and leaves the caller's transaction usable.
    """
    return not all(map(_is_new, events)) or _is_converted(using)


class _Batch:
    """Events as they are checked, parted by the way in which they are written."""

    def __init__(self, inspection: Inspection) -> None:
        self._inspection = inspection
        self.plain: list[Event] = []
        self.keyed: list[Event] = []
        self.early = EarlyNotes(self.plain)

    def slices_of_plain(self) -> Iterator[list["Event"]]:
        """Yield those that need no look at others; in ``keyed`` are then all that do."""
        for checked in self._inspection():
            plain = [event for event in checked if event.idempotency_key is None]
            if len(plain) < len(checked):
                self.keyed += [event for event in checked if event.idempotency_key is not None]
            if plain:
                self.plain += plain
                yield plain


def _copy_and_insert(
    batch: _Batch, stream: str, using: str
) -> tuple[dict[str, Any], dict[UUID, "Event"]]:
    """Write all events; return what is stored of new ones, and known ones as they are."""
    registered = Stream.objects.using(using).register_by_event(stream)
    moment = sql.rows(using, "publish_moment", {"stream_id": registered.pk})[0]
    stored = stored_by(moment, using)
    slices = batch.slices_of_plain()
    if first := next(slices, None):
        plain = chain(first, chain.from_iterable(slices))
        _copy(plain, moment, using, meanwhile=lambda: batch.early.note(stored, using))
    return stored, idempotency.insert_keyed(batch.keyed, registered, moment, using)


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
    events: Iterable["Event"], moment: Any, using: str, meanwhile: Callable[[], None]
) -> None:
    """Store ``events``; ``meanwhile`` is called when all are sent, and most not stored yet."""
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
