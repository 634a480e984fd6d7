"""Step 1 of 5, publish: events enter a stream inside the caller's own transaction.

Next, a consumer turns them into tasks: see consumer.py.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.conf import settings as django_settings
from django.core.serializers.json import DjangoJSONEncoder
from django.db import connections, models, router, transaction
from django.utils import timezone

from kanthorq_django import signals, sql
from kanthorq_django.conf import get_settings
from kanthorq_django.domain import subjects
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.exceptions import (
    ConfigurationError,
    EventIsImmutable,
    IdempotencyConflict,
    InvalidEvent,
    InvalidSubject,
    UndecodableEvent,
)
from kanthorq_django.models.body import encode_body, encode_metadata
from kanthorq_django.models.fields import CreatedAtField, SubjectField, XidField
from kanthorq_django.models.notifications import wake_after_commit
from kanthorq_django.models.stream import Stream

if TYPE_CHECKING:
    from kanthorq_django.models.task import Task

KEY_SIZE_MAX = 255  # characters of a resource key or an idempotency key


class EventQuerySet(models.QuerySet["Event"]):
    def publish(self, events: Iterable["Event"], *, stream: str) -> list["Event"]:
        """Insert unsaved ``events`` into ``stream`` in the current transaction, or in one of their own.

        All of them or none: everything is checked before the first is written. Returns them
        in the order given; one whose idempotency key is known is replaced by the stored event.
        """
        given = list(events)
        using = self._writable_alias()
        for index, event in enumerate(given):
            _prepare(event, index if len(given) > 1 else None)
        if not given:
            return []
        insert = _insert_one if len(given) == 1 else _insert_many
        stored = insert(given, stream, using)
        wake_after_commit({event.stream_id for event in stored}, using)
        signals.published.send(Event, events=stored, using=using)
        return stored

    def _writable_alias(self) -> str:
        using: str = self._db or router.db_for_write(self.model)
        if connections[using].vendor != "postgresql":
            raise ConfigurationError(
                f"The database {using!r} is not PostgreSQL, so no event can be published there."
            )
        return using

    def bulk_create(self, *_: Any, **__: Any) -> Any:
        raise EventIsImmutable("Events are published, not bulk-created: use publish_many().")

    def update(self, **_: Any) -> int:
        raise EventIsImmutable("An event never changes once published.")

    update.alters_data = True  # type: ignore[attr-defined]


class Event(models.Model):
    """A ``subject``, an opaque ``body`` and a ``metadata`` object; it never changes once published."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # Without a constraint: its check would lock the stream's row for every event, and
    # concurrent publishers would turn that lock into a shared one, row by row.
    stream = models.ForeignKey(
        Stream, models.PROTECT, related_name="events", db_index=False, db_constraint=False
    )
    # The transaction that published it: what the snapshot cursor goes by.
    xid = XidField(db_default=models.Func(function="pg_current_xact_id"), editable=False)
    subject = SubjectField()
    body = models.BinaryField(default=b"", editable=True)
    metadata = models.JSONField(default=dict, blank=True)
    resource_key = models.CharField(max_length=KEY_SIZE_MAX, blank=True, default="")
    idempotency_key = models.CharField(max_length=KEY_SIZE_MAX, blank=True, null=True)  # noqa: DJ001  # null: none
    schedule_at = models.DateTimeField(null=True, blank=True)
    created_at = CreatedAtField()

    # False on an event that publish() found already stored under its idempotency key.
    created = True

    objects = models.Manager.from_queryset(EventQuerySet)()

    if TYPE_CHECKING:
        stream_id: int
        tasks: models.Manager[Task]

    class Meta:
        permissions = [("view_body", "Can view the bodies of events")]
        constraints = [
            models.UniqueConstraint(
                fields=["stream", "idempotency_key"],
                condition=models.Q(idempotency_key__isnull=False),
                name="kanthorq_event_idempotency",
            ),
        ]
        indexes = [
            # The pull reads a stream by it; xid only grows, so inserts append to its right edge.
            models.Index(fields=["stream", "xid", "id"], name="kanthorq_event_unread"),
        ]

    def __str__(self) -> str:
        return f"{self.subject} {self.pk}"

    def __repr__(self) -> str:
        # Bodies may be confidential; they stay out of logs and tracebacks.
        return f"<Event: {self}>"

    def json(self) -> Any:
        """Return the body as the JSON value that was published.

        Raises UndecodableEvent if it is not JSON.
        """
        try:
            return json.loads(bytes(self.body))
        except ValueError as error:
            raise UndecodableEvent(f"The body of event {self.pk} is not JSON: {error}") from error

    def save(self, *_: Any, using: str | None = None, **__: Any) -> None:
        """Publish this unsaved event into its stream. Raises EventIsImmutable if it is stored."""
        if not self._state.adding:
            raise EventIsImmutable(f"Event {self.pk} never changes once published.")
        Event.objects.using(using).publish([self], stream=self.stream.name)


def _prepare(event: Event, index: int | None) -> None:
    """Check ``event`` and bring its fields into the form in which they are stored."""
    try:
        _check(event)
    except InvalidEvent as error:
        if index is None:
            raise
        raise type(error)(f"events[{index}]: {error}") from error


def _check(event: object) -> None:
    if not isinstance(event, Event):
        raise InvalidEvent(f"An Event was expected, not {type(event).__name__}.")
    if not event._state.adding:
        raise InvalidEvent(f"Event {event.pk} has been published already.")
    if problem := subjects.subject_problem(event.subject):
        raise InvalidSubject(f"The subject {str(event.subject)[:80]!a} is not valid: {problem}.")
    limits = get_settings()
    event.body = encode_body(event.body, size_max=limits.BODY_SIZE_MAX)
    encode_metadata(event.metadata, size_max=limits.METADATA_SIZE_MAX)
    _check_key("resource_key", event.resource_key, size_min=0)
    if event.idempotency_key is not None:
        _check_key("idempotency_key", event.idempotency_key, size_min=1)
    _check_schedule_at(event.schedule_at)


def _check_key(name: str, key: object, *, size_min: int) -> None:
    if not isinstance(key, str):
        raise InvalidEvent(f"{name} must be a str, not {type(key).__name__}.")
    if not size_min <= len(key) <= KEY_SIZE_MAX:
        raise InvalidEvent(
            f"{name} has {len(key)} characters, it must have {size_min} to {KEY_SIZE_MAX}."
        )
    if not (key.isprintable() or key == ""):
        raise InvalidEvent(f"{name} {key[:80]!a} holds a character that is not printable.")


def _check_schedule_at(moment: object) -> None:
    if moment is None:
        return
    if not isinstance(moment, datetime):
        raise InvalidEvent(f"schedule_at must be a datetime, not {type(moment).__name__}.")
    if django_settings.USE_TZ and timezone.is_naive(moment):
        raise InvalidEvent(
            f"schedule_at {moment} is naive; use an aware datetime, as USE_TZ is on."
        )


def _insert_one(events: Sequence[Event], stream: str, using: str) -> list[Event]:
    """One statement: the lookup of the stream costs no round trip of its own."""
    (event,) = events
    params = _columns(event) | {"stream": stream}
    if rows := sql.rows(using, "publish", params):
        return [_stored(event, rows[0], using)]
    with transaction.atomic(using=using, savepoint=False):
        stream_row = Stream.objects.using(using).register(stream)
        if rows := sql.rows(using, "publish", params):
            return [_stored(event, rows[0], using)]
        return [_known(event, stream_row, using)]


def _insert_many(events: Sequence[Event], stream: str, using: str) -> list[Event]:
    with transaction.atomic(using=using, savepoint=False):
        stream_row = Stream.objects.using(using).register(stream)
        moment = sql.rows(using, "publish_moment", {"stream_id": stream_row.pk})[0]
        keyed = [event for event in events if event.idempotency_key is not None]
        _copy([event for event in events if event.idempotency_key is None], moment, using)
        new = _insert_keyed(keyed, stream_row, using)
        return [
            _stored(event, moment, using)
            if event.idempotency_key is None or event.pk in new
            else _known(event, stream_row, using)
            for event in events
        ]


def _copy(events: Sequence[Event], moment: Any, using: str) -> None:
    if not events:
        return
    with connections[using].cursor() as cursor, cursor.copy(sql.load("publish_many")) as copy:
        for event in events:
            copy.write_row(
                (
                    event.pk,
                    moment.stream_id,
                    event.subject,
                    event.body,
                    json.dumps(event.metadata, cls=DjangoJSONEncoder) if event.metadata else "{}",
                    event.resource_key,
                    event.schedule_at,
                    moment.created_at,
                )
            )


def _insert_keyed(events: Sequence[Event], stream: Stream, using: str) -> set[UUID]:
    """Insert events with idempotency keys; return the ids of those whose key was new."""
    if not events:
        return set()
    columns = [_columns(event) for event in events]
    params = {f"{name}s": [row[name] for row in columns] for name in columns[0]}
    return {row.id for row in sql.rows(using, "publish_keyed", params | {"stream_id": stream.pk})}


def _columns(event: Event) -> dict[str, Any]:
    return {
        "id": event.pk,
        "subject": event.subject,
        "body": event.body,
        "metadata": json.dumps(event.metadata, cls=DjangoJSONEncoder),
        "resource_key": event.resource_key,
        "idempotency_key": event.idempotency_key,
        "schedule_at": event.schedule_at,
    }


def _stored(event: Event, row: Any, using: str) -> Event:
    event.stream_id, event.xid, event.created_at = row.stream_id, row.xid, row.created_at
    event._state.adding, event._state.db = False, using
    return event


def _known(event: Event, stream: Stream, using: str) -> Event:
    """Return the event stored under the same key.

    Raises IdempotencyConflict if it is not the same event: a key names one event for ever.
    """
    known = Event.objects.using(using).get(stream=stream, idempotency_key=event.idempotency_key)
    if (known.subject, bytes(known.body)) != (event.subject, bytes(event.body)):
        raise IdempotencyConflict(
            f"The idempotency key {event.idempotency_key!a} was used in stream {stream.name!r} "
            f"for event {known.pk}, which has another subject or body."
        )
    known.created = False
    return known
