"""KanthorQ for Django: events, streams and tasks on the project's own PostgreSQL.

Everything here can be imported before Django has loaded its apps.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from asgiref.sync import sync_to_async
from django.db import router

from kanthorq_django.domain.retry import Exponential, Fixed, Never, Polynomial, RetryPolicy
from kanthorq_django.domain.verdicts import Discard, Retry, Snooze
from kanthorq_django.subscribers import subscribe

if TYPE_CHECKING:
    from kanthorq_django.models import Event, Schedule

__version__ = "0.1.0"

__all__ = [
    "Discard",
    "Exponential",
    "Fixed",
    "Never",
    "Polynomial",
    "Retry",
    "RetryPolicy",
    "Snooze",
    "apublish",
    "apublish_many",
    "publish",
    "publish_many",
    "schedule",
    "subscribe",
]


def publish(
    subject: str,
    body: Any = b"",
    *,
    stream: str = "default",
    metadata: Mapping[str, Any] | None = None,
    resource_key: str = "",
    idempotency_key: str | None = None,
    schedule_at: datetime | None = None,
    using: str | None = None,
) -> "Event":
    """Publish one event into ``stream``, inside the current transaction if there is one.

    ``body`` is bytes as they are, str as UTF-8, anything else as JSON. ``schedule_at`` keeps
    its tasks from starting earlier. With an ``idempotency_key`` that was used in the stream
    before, the stored event is returned, ``created`` False, and nothing is inserted.

    Raises InvalidSubject, InvalidBody or InvalidEvent before anything is written, and
    IdempotencyConflict when the key belongs to an event with another subject or body.
    """
    model, publish_into = _publishing()
    event = model(
        subject=subject,
        body=body,
        metadata={} if metadata is None else metadata,
        resource_key=resource_key,
        idempotency_key=idempotency_key,
        schedule_at=schedule_at,
    )
    return publish_into(stream, [event], using or router.db_for_write(model))[0]


@functools.cache  # an import statement takes as long, each time, as a third of the checks
def _publishing() -> "tuple[type[Event], Callable[[str, Iterable[Event], str], list[Event]]]":
    from kanthorq_django.models.event import Event, publish_into

    return Event, publish_into


def publish_many(
    events: "Iterable[Event]", *, stream: str = "default", using: str | None = None
) -> "list[Event]":
    """Publish unsaved ``Event(subject=…, body=…)`` objects, all of them or none; return them.

    They come back in the order given, and are read in that in which they were constructed.
    Raises as ``publish()`` does, with the index of the first bad event in the message, and
    TypeError for what is no iterable of events, such as a single one.
    """
    from kanthorq_django.models import Event

    if isinstance(events, Event) or not isinstance(events, Iterable):
        raise TypeError(
            f"publish_many() takes an iterable of events, not {type(events).__name__}; put a "
            "single event into a list, or use publish()."
        )
    return Event.objects.using(using).publish(events, stream=stream)


async def apublish(
    subject: str,
    body: Any = b"",
    *,
    stream: str = "default",
    metadata: Mapping[str, Any] | None = None,
    resource_key: str = "",
    idempotency_key: str | None = None,
    schedule_at: datetime | None = None,
    using: str | None = None,
) -> "Event":
    """Do what ``publish()`` does, from a coroutine."""
    return await sync_to_async(publish)(
        subject,
        body,
        stream=stream,
        metadata=metadata,
        resource_key=resource_key,
        idempotency_key=idempotency_key,
        schedule_at=schedule_at,
        using=using,
    )


async def apublish_many(
    events: "Iterable[Event]", *, stream: str = "default", using: str | None = None
) -> "list[Event]":
    """Do what ``publish_many()`` does, from a coroutine."""
    return await sync_to_async(publish_many)(events, stream=stream, using=using)


def schedule(  # noqa: PLR0913  # the columns of a schedule, by keyword only
    name: str,
    *,
    rrule: str,
    dtstart: datetime | str,
    subject: str,
    timezone: str | ZoneInfo | None = None,
    exdates: Iterable[datetime | str] = (),
    body: Any = b"",
    metadata: Mapping[str, Any] | None = None,
    stream: str = "default",
    resource_key: str = "",
    catchup: str = "last",
    using: str | None = None,
) -> "Schedule":
    """Publish an event at each occurrence of the recurrence rule ``rrule`` (RFC 5545).

    Writes the row of the schedule ``name``: call it where the database may be used, as in a
    command, as often as you like. ``dtstart`` is aware, or the ISO text of such
    a moment; the rule follows the clocks of ``timezone`` (default: the project's), so local
    time stays local. ``exdates`` are left out. ``catchup`` says what becomes of occurrences
    that passed while no worker ran: ``"all"``, ``"last"`` or ``"none"``. Raises
    InvalidSchedule, and as ``publish()`` does.
    """
    from kanthorq_django.models.schedule import Schedule
    from kanthorq_django.models.scheduling.definition import Definition

    definition = Definition(
        rrule=rrule,
        dtstart=dtstart,
        timezone=timezone,
        exdates=exdates,
        subject=subject,
        body=body,
        metadata=metadata,
        stream=stream,
        resource_key=resource_key,
        catchup=catchup,
    )
    return Schedule.objects.using(using).register(name, definition)
