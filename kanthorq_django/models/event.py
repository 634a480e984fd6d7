"""Step 1 of 5, publish: events enter a stream inside the caller's own transaction.

Next, a consumer turns them into tasks: see consumer.py.
"""

import functools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from django.core.exceptions import ObjectDoesNotExist, SynchronousOnlyOperation
from django.db import connections, models, router
from django.db.models.base import ModelState
from django.db.models.signals import post_init, pre_init
from django.utils.translation import gettext_lazy as _

from kanthorq_django import signals
from kanthorq_django.domain.callables import alters_data
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.exceptions import (
    ConfigurationError,
    EventIsImmutable,
    InvalidEvent,
    UndecodableEvent,
)
from kanthorq_django.models.deletion import is_whole, without_deliveries
from kanthorq_django.models.fields import (
    CreatedAtField,
    SubjectField,
    XidField,
    always_readable,
    moment_of,
)
from kanthorq_django.models.publishing import insertion
from kanthorq_django.models.publishing.encryption import BodyField, SealableModel, is_sealed
from kanthorq_django.models.publishing.envelope import KEY_SIZE_MAX, gathered
from kanthorq_django.models.publishing.inspection import Inspection
from kanthorq_django.models.stream import Stream, check_stream_name
from kanthorq_django.sql.result import Result

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer


class EventQuerySet(models.QuerySet["Event"]):
    def publish(self, events: Iterable["Event"], *, stream: str) -> list["Event"]:
        """Insert unsaved ``events`` into ``stream``, in the current transaction or their own.

        All of them or none: where one is refused, nothing is stored. Returns them in the order
        given; one whose idempotency key is known is replaced by the stored event.
        """
        self._for_write = True
        return publish_into(stream, events, self.db)

    def bulk_create(self, *_: Any, **__: Any) -> Any:
        """Raise EventIsImmutable: what is published has to be checked, and workers woken."""
        raise EventIsImmutable("Events are published, not bulk-created: use publish_many().")

    def update(self, *_: Any, **__: Any) -> int:
        """Raise EventIsImmutable: tasks are made and handled by what the event was."""
        raise EventIsImmutable("An event never changes once published.")

    bulk_update = update

    def delete(self) -> tuple[int, dict[str, int]]:
        """Delete these events. Raises ProtectedError while there are tasks of them.

        Pulls of their streams are waited for, and wait from then on until it is committed: who
        deletes events of several streams in one transaction does so in one order. Raises
        TransactionManagementError in an open transaction that is not READ COMMITTED.
        """
        self._for_write = True
        if not is_whole(self):
            return super().delete()  # which refuses it
        with without_deliveries(self.order_by().values("stream"), self.db):
            return super().delete()

    alters_data(publish, bulk_create, update)
    alters_data(delete, queryset_only=True)


class Event(SealableModel):
    """A ``subject``, an opaque ``body``, a ``metadata`` object: fixed once published."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # Without a constraint: its check would lock the stream's row for every event, and
    # concurrent publishers would turn that lock into a shared one, row by row.
    stream = models.ForeignKey(
        Stream,
        models.PROTECT,
        related_name="events",
        db_index=False,
        db_constraint=False,
        verbose_name=_("stream"),
    )
    # The transaction that published it: what the snapshot cursor goes by. It stays out of
    # fixtures: where they are loaded, the number is another transaction's or nobody's yet.
    xid = XidField(
        db_default=models.Func(function="pg_current_xact_id"), editable=False, serialize=False
    )
    subject = SubjectField(_("subject"))
    body = BodyField(default=b"", editable=True)
    metadata = models.JSONField(default=dict, blank=True)
    resource_key = models.CharField(max_length=KEY_SIZE_MAX, blank=True, default="")
    idempotency_key = models.CharField(  # noqa: DJ001  # null: none
        _("idempotency key"), max_length=KEY_SIZE_MAX, blank=True, null=True
    )
    schedule_at = always_readable(models.DateTimeField(null=True, blank=True))
    created_at = CreatedAtField()

    # False on an event that publish() found already stored under its idempotency key.
    created = True

    # The id that was drawn for this instance alone. Any other that it may have could be stored.
    _drawn_id: UUID | None = None

    objects = models.Manager.from_queryset(EventQuerySet)()

    if TYPE_CHECKING:
        stream_id: int

    class Meta:
        verbose_name = _("event")
        verbose_name_plural = _("events")
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

    def __init__(self, *args: Any, **given: Any) -> None:
        if args or not _PUBLISHABLE.issuperset(given) or _is_watched():
            super().__init__(*args, **given)
            return
        # What Django does field by field takes as long as all else that publishing does.
        held = _BLANK.copy()
        held["id"] = held["_drawn_id"] = uuid7()
        held["metadata"] = {}
        held.update(given)
        held["_state"] = ModelState()
        self.__dict__ = held

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_drawn_id", None)  # the copy has the same id: it was not drawn for that
        return state

    def __str__(self) -> str:
        # A deferred subject is not read for this: an error may name very many events.
        subject = self.__dict__.get("subject")
        return str(self.pk) if subject is None else f"{subject} {self.pk}"

    def __repr__(self) -> str:
        # Bodies may be confidential; they stay out of logs and tracebacks.
        return f"<Event: {self}>"

    def save(self, *_: Any, using: str | None = None, **__: Any) -> None:
        """Publish this unsaved event into its stream.

        Raises EventIsImmutable if it is stored, InvalidEvent without a stream, else as ``publish``.
        With a known idempotency key it becomes the stored event, ``created`` False.
        """
        if not self._state.adding:
            raise EventIsImmutable(f"Event {self.pk} never changes once published.")
        try:
            stream = self.stream.name
        except ObjectDoesNotExist as error:
            raise InvalidEvent("The event has no stream; use publish(), or give it one.") from error
        alias = using or router.db_for_write(type(self), instance=self)
        (stored,) = Event.objects.using(alias).publish([self], stream=stream)
        if stored is not self:
            self.__dict__.update(stored.__dict__)

    def delete(
        self, using: str | None = None, keep_parents: bool = False
    ) -> tuple[int, dict[str, int]]:
        """Delete this event as the queryset's ``delete()`` does."""
        alias = using or router.db_for_write(type(self), instance=self)
        with without_deliveries([self.stream_id], alias):
            return super().delete(using=alias, keep_parents=keep_parents)

    @classmethod
    def from_row(cls, rows: Result, index: int, consumer: "Consumer") -> Self:
        """Return the event of a pull's or a claim's row. Raises DoesNotExist if it was deleted."""
        using = consumer._state.db
        pk, xid, subject, body, metadata, key, once, due_at, created_at = rows.values(index, _READ)
        if xid is None:
            raise cls.DoesNotExist(f"Event {pk} of consumer {consumer.name!r} was deleted.")
        values = {  # all columns in their order, as from_db() expects
            "id": pk,
            "stream_id": consumer.stream_id,
            "xid": xid,
            "subject": subject,
            "body": body,
            "metadata": {} if metadata == "{}" else json.loads(metadata),
            "resource_key": key,
            "idempotency_key": once,
            "schedule_at": None if due_at is None else moment_of(due_at, using),
            "created_at": moment_of(created_at, using),
        }
        if is_sealed(body) or _is_watched():
            return cls.from_db(using, values.keys(), values.values())
        event = cls.__new__(cls)  # as in __init__(): Django takes longer than most handlers
        event._state = ModelState()
        event._state.adding, event._state.db = False, using
        event.__dict__.update(values)
        return event

    def json(self) -> Any:
        """Return the body as the JSON value that was published.

        Raises UndecodableEvent if it is not JSON, or is encrypted and no key fits.
        """
        body = bytes(self.body)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UndecodableEvent(f"The body of event {self.pk} is not JSON: {error}") from error


def publish_into(stream: str, events: Iterable[Event], using: str) -> list[Event]:
    """Publish as the queryset does, without one: to make it takes as long as to check an event."""
    try:
        stored = store_into(stream, events, using)
    except SynchronousOnlyOperation as error:
        raise SynchronousOnlyOperation(
            "publish() and publish_many() cannot be called from an async context; use "
            "`await apublish(…)` or `await apublish_many(…)`."
        ) from error
    if signals.published.receivers:
        tell_of_new(stored, using)
    return stored


def store_into(stream: str, events: Iterable[Event], using: str) -> list[Event]:
    """Insert ``events`` into ``stream``, or find them by their keys; tell no receiver of it."""
    check_stream_name(stream)
    given = gathered(events)
    connection = connections[using]
    if connection.vendor != "postgresql":
        raise ConfigurationError(
            f"The database {using!r} is not PostgreSQL, so no event can be published there."
        )
    if not given:
        return []
    inspect = functools.partial(Inspection, Event, given, stream)
    return insertion.insert(given, inspect, stream, connection)


def tell_of_new(stored: Iterable[Event], using: str) -> None:
    """Tell receivers of ``published`` which of ``stored`` are new."""
    if created := [event for event in stored if event.created]:
        signals.tell(signals.published, Event, connections[using], events=created)


# What code gives to an event that it publishes, and what is left blank until then.
_PUBLISHABLE = {"subject", "body", "metadata", "resource_key", "idempotency_key", "schedule_at"}
_BLANK = {
    field.attname: field.get_default()
    for field in Event._meta.concrete_fields
    if field.name not in {"id", "metadata"}
}

# Its columns in the rows of a pull and of a claim.
_READ = (
    "event_id",
    "event_xid",
    "event_subject",
    "event_body",
    "event_metadata",
    "resource_key",
    "event_idempotency_key",
    "event_schedule_at",
    "event_created_at",
)


def _is_watched() -> bool:
    """Tell whether signals have to be sent for each instance that is made."""
    # Most projects have no receiver of these at all, and has_listeners() takes its time.
    return bool(
        (pre_init.receivers and pre_init.has_listeners(Event))
        or (post_init.receivers and post_init.has_listeners(Event))
    )
