"""An event as a row: what is written of it, and what it only gets when it is stored."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kanthorq_django.models.fields import moment_of
from kanthorq_django.models.publishing.encryption import seal

if TYPE_CHECKING:
    from kanthorq_django.models.event import Event

_ABSENT = object()  # what a deferred field holds


def columns_of(event: "Event") -> dict[str, Any]:
    """Return the parameters that publish.sql and its like take of a checked ``event``."""
    return {
        "id": event.id,
        "subject": event.subject,
        "body": seal(event.id, event.body),
        # Not escaped: a character that the connection cannot encode is refused here. Escaped, it
        # would be stored, and no pull over such a connection could read the event.
        "metadata": json.dumps(event.metadata, ensure_ascii=False) if event.metadata else "{}",
        "resource_key": event.resource_key,
        "idempotency_key": event.idempotency_key,
        "schedule_at": event.schedule_at,
    }


def stored_by(moment: tuple[Any, ...], using: str) -> dict[str, Any]:
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


def mark_stored(event: "Event", stored: Mapping[str, Any], using: str) -> "Event":
    """Let ``event`` hold what it got when it was stored; return it."""
    event.__dict__.update(stored)
    event._state.adding, event._state.db = False, using
    return event


class EarlyNotes:
    """Events marked as stored before they are committed, and what they were before that."""

    def __init__(self, events: Sequence["Event"]) -> None:
        self._events = events
        self._stored: Mapping[str, Any] = {}
        # In flat lists: so many objects, one for each event, would set off the garbage collector.
        self._given: list[Any] = []
        self._were_adding: list[bool] = []
        self._databases: list[str | None] = []

    def note(self, stored: Mapping[str, Any], using: str) -> None:
        """Mark the events as stored, and keep what they held until now."""
        self._stored = stored
        self._given = [
            event.__dict__.get(name, _ABSENT) for event in self._events for name in stored
        ]
        self._were_adding = [event._state.adding for event in self._events]
        self._databases = [event._state.db for event in self._events]
        for event in self._events:
            mark_stored(event, stored, using)

    def take_back(self) -> None:
        """Let the events be as they were given, so that they can be published again.

        But for those that another thread has published, and marked, meanwhile.
        """
        given, xid = iter(self._given), self._stored.get("xid")
        # Nothing is kept of them, and so nothing taken back, unless note() was called.
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
