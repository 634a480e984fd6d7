"""What a schedule publishes when it is due: one event for each occurrence, however often tried."""

import logging
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta
from itertools import islice, takewhile
from typing import TYPE_CHECKING
from uuid import UUID

from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.db.models.functions import Now
from psycopg.errors import SerializationFailure
from psycopg.pq import TransactionStatus

from kanthorq_django import signals
from kanthorq_django.domain.interrupts import is_interrupt
from kanthorq_django.domain.recurrence import Recurrence
from kanthorq_django.domain.rules import RecurrenceProblem
from kanthorq_django.exceptions import IdempotencyConflict, InvalidSchedule, KanthorqError
from kanthorq_django.models.event import Event, store_into, tell_of_new
from kanthorq_django.models.fields import database_now
from kanthorq_django.models.isolation import brief, patient, unconflicted
from kanthorq_django.models.scheduling.definition import Catchup, occurrence_metadata

if TYPE_CHECKING:
    from kanthorq_django.models.schedule import Schedule, ScheduleQuerySet

logger = logging.getLogger("kanthorq_django.schedule")

TURN_SIZE = 20  # schedules published in one transaction
BATCH_SIZE = 100  # occurrences of one schedule published in one transaction
# An occurrence is published a little after its time; later than this it counts as missed.
MISSED_AFTER = timedelta(minutes=1)
MOMENT = timedelta(microseconds=1)


class Unpublished(Exception):
    """What is due of one schedule could not be published; it is still due."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name

    def __str__(self) -> str:
        return ": ".join(self.args)


def just_before(next_at: datetime) -> datetime:
    """Return the moment from which a search finds ``next_at`` first.

    Rules go by whole seconds; ``update(next_at=F("dtstart"))`` brings the start's fraction along.
    """
    return next_at.replace(microsecond=0) - MOMENT


def publish_due(schedules: "ScheduleQuerySet", limit: int | None) -> int:
    """Give each of ``schedules`` that is due its turn; see ``ScheduleQuerySet.publish_due()``."""
    count, served, failures = 0, set[UUID](), dict[UUID, Unpublished]()
    while limit is None or len(served) < limit:
        passed_over = served | failures.keys()
        made, new = unconflicted(schedules.db, _publish_some, schedules, passed_over)
        if not (made or new):
            break
        count += sum(made.values())
        served |= made.keys()
        failures |= new
    if failures:
        raise ExceptionGroup("Schedules could not publish", list(failures.values()))
    return count


def _publish_some(
    schedules: "ScheduleQuerySet", passed_over: Collection[UUID]
) -> tuple[dict[UUID, int], dict[UUID, Unpublished]]:
    """Give some schedules their turn; return how many events each made, and who failed."""
    made, failures = dict[UUID, int](), dict[UUID, Unpublished]()
    with brief(schedules.db):
        due = schedules.filter(next_at__lte=Now(), cancelled_at=None).exclude(pk__in=passed_over)
        locked = due.select_for_update(of=("self",), no_key=True, skip_locked=True)
        rows = list(locked.select_related("stream").order_by("next_at", "pk")[:TURN_SIZE])
        now = database_now(schedules.db)
        for schedule in rows:
            try:
                made[schedule.pk] = publish_occurrences(schedule, now)
            except Unpublished as error:
                failures[schedule.pk] = error
    return made, failures


def publish_occurrences(schedule: "Schedule", now: datetime) -> int:
    """Publish what is due by ``now`` and step on; return how many events that made.

    The caller holds the lock on the row. A definition that cannot be published any more
    stops the schedule, with an error in the log. Raises Unpublished for any other trouble that
    this schedule has for itself, such as a receiver of ``published`` that raises or exits.
    """
    using, events = schedule._state.db or DEFAULT_DB_ALIAS, None
    try:
        with transaction.atomic(using=using):
            events = _store(schedule, now, using)
            with patient(using) if signals.published.has_listeners(Event) else nullcontext():
                tell_of_new(events, using)
            return sum(event.created for event in events)
    except BaseException as error:
        if is_interrupt(error):
            raise
        if events is None and isinstance(error, KanthorqError | RecurrenceProblem):
            logger.exception("Schedule %s cannot go on and is cancelled.", schedule.name)
            schedule.cancelled_at, schedule.next_at = now, None
            schedule.save(update_fields=["cancelled_at", "next_at"])
            return 0
        if _concerns_all(error, using):
            raise
        raise Unpublished(schedule.name, f"{type(error).__name__}: {error}") from error


def _concerns_all(error: BaseException, using: str) -> bool:
    """Tell whether the transaction itself has failed, and not what one schedule did in it."""
    connection = connections[using]
    raw = connection.connection
    is_open = raw is not None and raw.info.transaction_status == TransactionStatus.INTRANS
    is_conflict = isinstance(error.__cause__, SerializationFailure)
    return is_conflict or connection.needs_rollback or not is_open


def _store(schedule: "Schedule", now: datetime, using: str) -> list[Event]:
    """Store the events of what is due, and step on."""
    recurrence = schedule.recurrence()
    if not isinstance(schedule.metadata, dict):
        kind = type(schedule.metadata).__name__
        raise InvalidSchedule(f"Schedule {schedule.name!r}: metadata must be a dict, not {kind}.")
    moments = _due(schedule, recurrence, now)
    due = [_event(schedule, moment) for moment in moments]
    try:
        events = store_into(schedule.stream.name, due, using)
    except IdempotencyConflict:
        # Published before, of another definition: somebody has set back when it occurs next.
        events = store_into(schedule.stream.name, _unpublished(due, schedule, using), using)
    passed = moments[-1] if moments and schedule.catchup == Catchup.ALL else now
    schedule.next_at = recurrence.after(passed)
    schedule.last_at = moments[-1] if moments else schedule.last_at
    schedule.save(update_fields=["next_at", "last_at"])
    return events


def _unpublished(due: Sequence[Event], schedule: "Schedule", using: str) -> list[Event]:
    keys = [event.idempotency_key for event in due]
    stored = Event.objects.using(using).filter(stream=schedule.stream, idempotency_key__in=keys)
    known = set(stored.values_list("idempotency_key", flat=True))
    return [event for event in due if event.idempotency_key not in known]


def _due(schedule: "Schedule", recurrence: Recurrence, now: datetime) -> Sequence[datetime]:
    assert schedule.next_at is not None  # noqa: S101  # it was selected by it
    after = just_before(schedule.next_at)
    if schedule.catchup == Catchup.ALL:
        due = takewhile(lambda moment: moment <= now, recurrence.occurrences(after))
        return list(islice(due, BATCH_SIZE))
    last = recurrence.latest(now, after)
    if last is None or (schedule.catchup == Catchup.NONE and now - last > MISSED_AFTER):
        return []
    return [last]


def _event(schedule: "Schedule", moment: datetime) -> Event:
    return Event(
        subject=schedule.subject,
        body=bytes(schedule.body),
        metadata=schedule.metadata | occurrence_metadata(schedule, moment),
        resource_key=schedule.resource_key,
        idempotency_key=f"schedule:{schedule.pk}:{moment.isoformat()}",
    )
