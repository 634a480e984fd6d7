"""Schedules: a recurrence rule that publishes one event at each of its occurrences.

Any worker publishes what is due; a lock on the row decides which. The event, its idempotency
key made of schedule and occurrence, and the step to the next occurrence are one transaction,
so crashes and many workers neither skip an occurrence nor publish it twice.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import connections, models, transaction
from django.db.models import Q
from django.db.models.functions import Now

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.domain.names import NAME_SIZE_MAX, name_problem
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.recurrence import Recurrence
from kanthorq_django.domain.rules import TEXT_SIZE_MAX, RecurrenceProblem
from kanthorq_django.domain.wording import in_words
from kanthorq_django.exceptions import InvalidSchedule, KanthorqError
from kanthorq_django.models.body import encode_body, encode_metadata
from kanthorq_django.models.envelope import KEY_SIZE_MAX, check_key, check_subject
from kanthorq_django.models.event import Event
from kanthorq_django.models.fields import CreatedAtField, SubjectField
from kanthorq_django.models.stream import Stream

logger = logging.getLogger("kanthorq_django.schedule")

BATCH_SIZE = 100  # occurrences of one schedule published in one transaction
TURN_SIZE = 20  # schedules published in one transaction
# An occurrence is published a little after its time; later than this it counts as missed.
MISSED_AFTER = timedelta(minutes=1)
MOMENT = timedelta(microseconds=1)
EXDATES_MAX = 1_000


_Change = Callable[["Schedule", datetime], tuple[datetime | None, datetime | None]]


class Catchup(models.TextChoices):
    """What becomes of occurrences that passed while no worker ran."""

    ALL = "all", "publish all of them"
    LAST = "last", "publish the last one"
    NONE = "none", "leave them out"


class Definition(NamedTuple):
    """What code says about a schedule."""

    rrule: str
    dtstart: datetime
    timezone: str | None
    exdates: Iterable[datetime]
    subject: str
    body: Any
    metadata: Mapping[str, Any] | None
    stream: str
    resource_key: str
    catchup: str

    def columns(self) -> dict[str, Any]:
        """Return the fields of a schedule but its stream, in the form in which they are stored."""
        given = self._asdict()
        del given["stream"]
        return given | {
            "timezone": settings.TIME_ZONE if self.timezone is None else self.timezone,
            "exdates": sorted(
                _moment("exdates", moment).astimezone(UTC).isoformat() for moment in self.exdates
            ),
            "body": encode_body(self.body, size_max=get_settings().BODY_SIZE_MAX),
            "metadata": {} if self.metadata is None else self.metadata,
        }


class ScheduleQuerySet(models.QuerySet["Schedule"]):
    def register(self, name: str, definition: Definition) -> "Schedule":
        """Insert the schedule ``name``, or apply what changed of it, from now on.

        An unchanged definition changes nothing, and a cancelled schedule stays cancelled.
        Raises InvalidSchedule or InvalidEvent before anything is written.
        """
        self._for_write = True
        columns = definition.columns()
        Schedule(name=name, **columns).check_definition()
        with transaction.atomic(using=self.db):
            columns["stream"] = Stream.objects.using(self.db).register(definition.stream)
            rows = self.select_for_update(of=("self",), no_key=True)
            kept, is_new = rows.get_or_create(name=name, defaults=columns)
            if is_new or kept.differs_from(columns):
                for column, value in columns.items():
                    setattr(kept, column, value)
                kept.next_at = kept.upcoming_from(self._now())
                kept.save(using=self.db)
        return kept

    def cancel(self) -> Outcome:
        """Publish no further occurrences; events published before go on normally.

        Returns schedule ids: ``updated``, and ``noop`` for those cancelled before.
        """
        return self._move(Q(cancelled_at=None), lambda schedule, now: (now, None))

    def resume(self) -> Outcome:
        """Go on from now; what passed meanwhile is left out. Returns ids as ``cancel()`` does."""
        return self._move(
            Q(cancelled_at__isnull=False),
            lambda schedule, now: (None, schedule.upcoming_from(now)),
        )

    for _verb in (cancel, resume):
        _verb.alters_data = True  # type: ignore[attr-defined]
        _verb.queryset_only = True  # type: ignore[attr-defined]
    del _verb

    def publish_due(self) -> int:
        """Publish the occurrences that are due; return how many events that made."""
        self._for_write = True
        with transaction.atomic(using=self.db):
            due = self.filter(next_at__lte=Now(), cancelled_at=None).order_by("next_at", "pk")
            locked = due.select_for_update(of=("self",), no_key=True, skip_locked=True)
            rows = list(locked.select_related("stream")[:TURN_SIZE])
            now = self._now()
            return sum(schedule.publish_due(now) for schedule in rows)

    def seconds_to_next(self) -> float | None:
        """Return in how many seconds the next occurrence is due; None if there is none."""
        waiting = self.filter(next_at__isnull=False, cancelled_at=None).order_by("next_at")
        first = waiting.values_list("next_at", Now()).first()
        return None if first is None else (first[0] - first[1]).total_seconds()

    def _now(self) -> datetime:
        with connections[self.db].cursor() as cursor:
            cursor.execute("SELECT statement_timestamp()")
            moment: datetime = cursor.fetchone()[0]
        return moment

    def _move(self, sources: Q, change: "_Change") -> Outcome:
        if self.query.is_sliced:
            raise TypeError("Cannot change a query once a slice has been taken.")
        self._for_write = True
        with transaction.atomic(using=self.db):
            found = list(self.order_by("pk").values_list("pk", flat=True))
            stored = Schedule._base_manager.using(self.db).filter(sources, pk__in=found)
            locked = stored.select_for_update(of=("self",), no_key=True).order_by("pk")
            updated, now = [], self._now()
            for schedule in locked:
                schedule.cancelled_at, schedule.next_at = change(schedule, now)
                schedule.save(update_fields=["cancelled_at", "next_at"])
                updated.append(schedule.pk)
        return Outcome(tuple(updated), noop=tuple(pk for pk in found if pk not in updated))


class Schedule(models.Model):
    """A recurrence rule and the event that it publishes at each occurrence."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    name = models.CharField(max_length=NAME_SIZE_MAX, unique=True)
    stream = models.ForeignKey(Stream, models.PROTECT, related_name="schedules")
    subject = SubjectField()
    body = models.BinaryField(default=b"", blank=True, editable=True)
    metadata = models.JSONField(default=dict, blank=True)
    resource_key = models.CharField(max_length=KEY_SIZE_MAX, blank=True, default="")

    rrule = models.CharField("recurrence rule", max_length=TEXT_SIZE_MAX)
    dtstart = models.DateTimeField("starts at")
    # The rule follows the clocks of this zone: local time stays local across their changes.
    timezone = models.CharField(max_length=64)
    exdates = models.JSONField("left out", default=list, blank=True)  # moments in ISO 8601
    catchup = models.CharField(max_length=4, choices=Catchup.choices, default=Catchup.LAST)

    # Null when the rule has ended, or while the schedule is cancelled.
    next_at = models.DateTimeField(null=True, blank=True, editable=False)
    last_at = models.DateTimeField(null=True, blank=True, editable=False)
    cancelled_at = models.DateTimeField(null=True, blank=True, editable=False)
    created_at = CreatedAtField()

    objects = models.Manager.from_queryset(ScheduleQuerySet)()

    class Meta:
        indexes = [
            # The look for what is due; ended and cancelled schedules have no entry.
            models.Index(
                fields=["next_at"],
                condition=Q(next_at__isnull=False),
                name="kanthorq_schedule_due",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        """Check the definition for a form, and settle when it occurs next."""
        try:
            self.check_definition()
        except KanthorqError as error:
            raise ValidationError(str(error)) from error

    def check_definition(self) -> None:
        """Raise InvalidSchedule or InvalidEvent unless this schedule can be kept."""
        if problem := name_problem(self.name):
            raise InvalidSchedule(f"{str(self.name)[:80]!a} cannot name a schedule: {problem}.")
        limits = get_settings()
        check_subject(self.subject)
        encode_body(bytes(self.body), size_max=limits.BODY_SIZE_MAX)
        encode_metadata(self.metadata, size_max=limits.METADATA_SIZE_MAX)
        check_key("resource_key", self.resource_key, size_min=0)
        if self.catchup not in Catchup.values:
            raise InvalidSchedule(
                f"catchup must be one of {', '.join(Catchup.values)}, not {self.catchup!r}."
            )
        self.recurrence()

    def differs_from(self, definition: Mapping[str, Any]) -> bool:
        """Tell whether any field of ``definition`` has another value here."""
        return any(getattr(self, name) != value for name, value in definition.items())

    def recurrence(self) -> Recurrence:
        """Return the rule, ready to be asked. Raises InvalidSchedule naming what is wrong."""
        try:
            exdates = frozenset(_moment("exdates", given) for given in self.exdates)
            dtstart = _moment("dtstart", self.dtstart)
            return Recurrence(self.rrule, dtstart, _zone(self.timezone), exdates)
        except RecurrenceProblem as error:
            raise InvalidSchedule(f"Schedule {str(self.name)!a}: {error}.") from error

    def upcoming_from(self, moment: datetime) -> datetime | None:
        """Return the first occurrence at or after ``moment``; None if there is none."""
        return self.recurrence().after(moment - MOMENT)

    def upcoming(self, count: int = 5) -> list[datetime]:
        """Return the next occurrences, in UTC; none while cancelled or once ended."""
        if self.next_at is None or self.cancelled_at is not None:
            return []
        return list(islice(self.recurrence().occurrences(self.next_at - MOMENT), count))

    def in_words(self) -> str:
        """Return the rule as a sentence, such as ``every week on Monday at 09:00``."""
        recurrence = self.recurrence()
        return in_words(recurrence.parts, recurrence.dtstart.astimezone(recurrence.zone))

    def publish_due(self, now: datetime) -> int:
        """Publish what is due by ``now`` and step on; return how many events that made.

        The caller holds the lock on this row. A definition that cannot be published any more
        stops the schedule, with an error in the log.
        """
        try:
            with transaction.atomic(using=self._state.db):
                return self._publish_due(now)
        except KanthorqError:
            logger.exception("Schedule %s cannot go on and is cancelled.", self.name)
            self.cancelled_at = now
            self.save(update_fields=["cancelled_at"])
            return 0

    def _publish_due(self, now: datetime) -> int:
        recurrence = self.recurrence()
        assert self.next_at is not None  # noqa: S101  # it was selected by it
        moments = self._to_publish(recurrence, self.next_at - MOMENT, now)
        events = Event.objects.using(self._state.db).publish(
            [self._event(moment) for moment in moments], stream=self.stream.name
        )
        passed = moments[-1] if moments and self.catchup == Catchup.ALL else now
        self.next_at = recurrence.after(passed)
        self.last_at = moments[-1] if moments else self.last_at
        self.save(update_fields=["next_at", "last_at"])
        return sum(event.created for event in events)

    def _to_publish(
        self, recurrence: Recurrence, after: datetime, now: datetime
    ) -> Sequence[datetime]:
        if self.catchup == Catchup.ALL:
            due = takewhile(lambda moment: moment <= now, recurrence.occurrences(after))
            return list(islice(due, BATCH_SIZE))
        last = recurrence.latest(now, after)
        if last is None or (self.catchup == Catchup.NONE and now - last > MISSED_AFTER):
            return []
        return [last]

    def _event(self, moment: datetime) -> Event:
        occurrence = moment.isoformat()
        return Event(
            subject=self.subject,
            body=bytes(self.body),
            metadata={**self.metadata, "schedule": self.name, "occurrence": occurrence},
            resource_key=self.resource_key,
            idempotency_key=f"schedule:{self.pk}:{occurrence}",
        )


def _moment(name: str, given: object) -> datetime:
    """Return ``given``, a datetime or its ISO text, as an aware moment."""
    try:
        moment = datetime.fromisoformat(given) if isinstance(given, str) else given
    except ValueError:
        moment = None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise InvalidSchedule(f"{name} takes aware datetimes, not {given!r:.80}.")
    return moment


def _zone(name: object) -> ZoneInfo:
    try:
        return ZoneInfo(str(name))
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidSchedule(f"{str(name)[:64]!a} is not the name of a time zone.") from error
