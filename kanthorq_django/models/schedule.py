"""Schedules: a recurrence rule that publishes one event at each of its occurrences.

Any worker publishes what is due; a lock on the row decides which. The event, its idempotency
key made of schedule and occurrence, and the step to the next occurrence are one transaction,
so crashes and many workers neither skip an occurrence nor publish it twice.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any
from uuid import UUID

from asgiref.sync import sync_to_async
from django.core.exceptions import ValidationError
from django.db import models, router
from django.db.models import Q
from django.db.models.functions import Now
from django.utils.translation import gettext_lazy as _

from kanthorq_django.domain.callables import alters_data
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.domain.names import NAME_SIZE_MAX
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.recurrence import Recurrence
from kanthorq_django.domain.rules import TEXT_SIZE_MAX, RecurrenceProblem, parse
from kanthorq_django.domain.wording import in_words
from kanthorq_django.exceptions import InvalidSchedule, KanthorqError, UndecodableEvent
from kanthorq_django.models.fields import CreatedAtField, SubjectField, database_now
from kanthorq_django.models.guarded import unguarded_columns
from kanthorq_django.models.isolation import together, undeadlocked
from kanthorq_django.models.moves import RowVersion, SelectingQuerySet, bulk_verb
from kanthorq_django.models.publishing.encryption import BodyField, SealableModel
from kanthorq_django.models.publishing.envelope import KEY_SIZE_MAX
from kanthorq_django.models.scheduling import occurrences
from kanthorq_django.models.scheduling.definition import (
    DEFINING,
    STORED_FORMS,
    TIMING,
    Catchup,
    Definition,
    MomentField,
    problems,
    recurrence_of,
    zone_of,
)
from kanthorq_django.models.scheduling.occurrences import MISSED_AFTER, MOMENT, just_before
from kanthorq_django.models.scheduling.progress import PROGRESS, ProgressModel
from kanthorq_django.models.stream import Stream

# From a schedule and the time to its ``cancelled_at`` and ``next_at``.
_Change = Callable[["Schedule", datetime], tuple[datetime | None, datetime | None]]


class ScheduleQuerySet(SelectingQuerySet["Schedule"]):
    def register(self, name: str, definition: Definition) -> "Schedule":
        """Insert the schedule ``name``, or apply what changed of it.

        A new or changed rule counts from now on; any other change leaves what is due, or was
        missed, as it is. A cancelled schedule stays cancelled. Raises InvalidSchedule or
        InvalidEvent before anything is written.
        """
        self._for_write = True
        columns = definition.columns()
        Schedule(name=name, **columns).check_definition()
        with together(self.db, may_idle=True):
            columns["stream"] = Stream.objects.using(self.db).register(definition.stream)
            rows = self.select_for_update(of=("self",), no_key=True)
            rows = rows.select_related("stream")  # which a replica may not have yet
            kept, is_new = rows.get_or_create(name=name, defaults=columns)
            if not is_new:
                kept.redefine(columns)
        return kept

    def bulk_create(self, objs: Iterable["Schedule"], *args: Any, **options: Any) -> Any:
        """Insert schedules that occur from now on.

        Raises InvalidSchedule or InvalidEvent, before any is written, if one cannot be kept.
        """
        made = list(objs)
        for schedule in made:
            schedule.prepare(self.db)
        created = super().bulk_create(made, *args, **options)
        for schedule in made:
            schedule._note_written(PROGRESS, self.db)
        return created

    @bulk_verb
    def cancel(self) -> Outcome:
        """Publish no further occurrences; events published before go on normally.

        Returns schedule ids: ``updated``, and ``noop`` for those cancelled before.
        """
        return self._move(Q(cancelled_at=None), lambda schedule, now: (now, None))

    @bulk_verb
    def resume(self) -> Outcome:
        """Go on from now; what passed meanwhile is left out. Returns ids as ``cancel()`` does."""
        return self._move(
            Q(cancelled_at__isnull=False),
            lambda schedule, now: (None, schedule.upcoming_from(now)),
        )

    async def acancel(self) -> Outcome:
        return await sync_to_async(self.cancel)()

    async def aresume(self) -> Outcome:
        return await sync_to_async(self.resume)()

    alters_data(acancel, aresume, queryset_only=True)

    def publish_due(self, *, limit: int | None = None) -> int:
        """Publish the occurrences that are due; return how many events that made.

        Of a schedule that catches up with all that it missed, at most a hundred. With a ``limit``
        it is enough when so many schedules have had their turn. One that fails, say by a receiver
        of ``published``, keeps no other from it: when they have had theirs, an ExceptionGroup of
        the failures is raised.
        """
        if self.query.is_sliced:  # which has other rows once some of them have stepped on
            raise TypeError("Cannot publish_due a query once a slice has been taken; use limit=.")
        self._for_write = True
        # By their keys: not every query can lock its rows and read their streams with them.
        plain = self._plain().values("pk")
        plain.query.select_for_update = False  # it would wait for whoever publishes now
        chosen = Schedule.objects.using(self.db).filter(pk__in=plain)
        return occurrences.publish_due(chosen, limit)

    alters_data(publish_due)

    def seconds_to_next(self) -> float | None:
        """Return in how many seconds the next occurrence is due; None if there is none."""
        waiting = self.filter(next_at__isnull=False, cancelled_at=None).order_by("next_at")
        first = waiting.values_list("next_at", Now(output_field=MomentField())).first()
        return None if first is None else (first[0] - first[1]).total_seconds()

    def _move(self, sources: Q, change: _Change) -> Outcome:
        self._for_write = True
        return undeadlocked(self.db, partial(self._move_all, sources, change))

    def _move_all(self, sources: Q, change: _Change) -> Outcome:
        with together(self.db, may_idle=True):
            versioned = self._plain().order_by().annotate(row_version=RowVersion())
            # A join may repeat a schedule.
            found: dict[UUID, int] = dict(versioned.values_list("pk", "row_version"))
            stored = Schedule._base_manager.using(self.db).filter(sources, pk__in=found)
            rows = stored.select_for_update(of=("self",), no_key=True).order_by("pk")
            locked = {each.pk: each for each in rows.annotate(row_version=RowVersion())}
            gone = self._gone({pk: each.row_version for pk, each in locked.items()}, found)
            updated, now = sorted(locked.keys() - gone), database_now(self.db)
            for pk in updated:
                schedule = locked[pk]
                schedule.cancelled_at, schedule.next_at = change(schedule, now)
                schedule.save(update_fields=["cancelled_at", "next_at"])
        return Outcome(tuple(updated), noop=tuple(sorted(found.keys() - set(updated))))


class Schedule(ProgressModel, SealableModel):
    """A recurrence rule and the event that it publishes at each occurrence."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    name = models.CharField(_("name"), max_length=NAME_SIZE_MAX, unique=True)
    stream = models.ForeignKey(
        Stream, models.PROTECT, related_name="schedules", verbose_name=_("stream")
    )
    subject = SubjectField(_("subject"))
    body = BodyField(default=b"", blank=True, editable=True)
    metadata = models.JSONField(default=dict, blank=True)
    resource_key = models.CharField(
        _("resource key"), max_length=KEY_SIZE_MAX, blank=True, default=""
    )

    rrule = models.CharField(_("recurrence rule"), max_length=TEXT_SIZE_MAX)
    dtstart = MomentField(_("starts at"))
    # The rule follows the clocks of this zone: local time stays local across their changes.
    timezone = models.CharField(_("time zone"), max_length=64)
    exdates = models.JSONField(_("left out"), default=list, blank=True)  # moments in ISO 8601
    catchup = models.CharField(
        _("missed occurrences"), max_length=4, choices=Catchup.choices, default=Catchup.LAST
    )

    # Null when the rule has ended, or while the schedule is cancelled.
    next_at = MomentField(null=True, blank=True, editable=False)
    last_at = MomentField(null=True, blank=True, editable=False)
    cancelled_at = MomentField(null=True, blank=True, editable=False)
    created_at = CreatedAtField()

    objects = models.Manager.from_queryset(ScheduleQuerySet)()

    class Meta:
        verbose_name = _("schedule")
        verbose_name_plural = _("schedules")
        permissions = [
            ("cancel_schedule", "Can cancel schedules"),
            ("resume_schedule", "Can resume schedules"),
        ]
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

    def save(self, *, update_fields: Iterable[str] | None = None, **options: Any) -> None:
        """Insert or update this row; a rule that is new or changed counts from now on.

        A copy, and a row that is not there any more, is inserted as a schedule that is new.
        What workers and operators have moved meanwhile, where it occurs next and last and whether
        it is cancelled, stays as they left it, unless it was set here, or ``update_fields`` names
        it. To that end Django is told what to write, so receivers of ``post_save`` always get
        ``update_fields`` of a stored row. Raises InvalidSchedule or InvalidEvent if what is new or
        was changed cannot be kept.
        """
        named = None if update_fields is None else set(update_fields)
        using = options.pop("using", None) or router.db_for_write(type(self), instance=self)
        if self._state.adding or options.get("force_insert"):
            self.prepare(using)
            super().save(update_fields=named, using=using, **options)
        elif named is not None and named <= PROGRESS:
            super().save(update_fields=named, using=using, **options)
        else:
            with together(using, may_idle=True):
                self._update_or_insert(named, using, **options)
        self._note_written(PROGRESS if named is None else named, using)

    def _update_or_insert(self, named: set[str] | None, using: str, **options: Any) -> None:
        """Write the ``named`` columns, or all that were read or set here; insert a missing row."""
        rows = Schedule._base_manager.using(using).select_for_update(of=("self",), no_key=True)
        is_partial = using == self._state.db and bool(self.unread_columns())
        if (stored := rows.filter(pk=self.pk).first()) is not None:
            columns = self._read_or_set(stored) if named is None else named
            changed = self._changed(columns, stored)
            self._normalize(changed)
            named = columns | self._catch_up(columns, changed & TIMING, stored, using)
        elif named is None and not (is_partial or options.get("force_update")):
            self.prepare(using)
            options["force_insert"] = True
        super().save(update_fields=named, using=using, **options)

    def _read_or_set(self, stored: "Schedule") -> set[str]:
        """Return what ``save()`` writes: not what may have moved, unless it was set here."""
        return unguarded_columns(self, PROGRESS) | self._set_here(vars(stored))

    def _changed(self, columns: set[str], stored: "Schedule") -> set[str]:
        """Return those of ``columns`` that have to be checked: not what stays as it is.

        Nor what SQL will make of the row, but for when it occurs, which has to be known here.
        """
        held = {name: self._held(name) for name in columns & DEFINING}
        return {
            name
            for name, value in held.items()
            if value != stored._held(name)
            and (name in TIMING or not hasattr(value, "resolve_expression"))
        }

    def _catch_up(
        self, columns: set[str], changed: set[str], stored: "Schedule", using: str
    ) -> set[str]:
        """Learn how far the locked row is; return what a ``changed`` rule moves."""
        held, row = vars(self), vars(stored)
        others = PROGRESS - columns - self._set_here(row)
        moved = {name for name in others if name not in held or held[name] != row[name]}
        self._take_over({name: row[name] for name in moved})
        timing = {name: getattr(self, name) for name in changed}
        with suppress(KanthorqError):  # of what was stored past save()
            stored._normalize(changed)
        if not stored.differs_from(timing):
            return set()
        if self.next_at == stored.next_at:  # else it was set here
            row.update(timing, **{name: getattr(self, name) for name in columns & PROGRESS})
            stored.set_next_at(using)
            self._take_over({"next_at": stored.next_at})
        return {"next_at"}

    def prepare(self, using: str) -> None:
        """Check a new schedule, and set when it occurs first, unless that was set here.

        A copy of another one has not occurred yet, whenever that did. Raises InvalidSchedule or
        InvalidEvent if it cannot be kept.
        """
        self._normalize()
        self._take_over(dict.fromkeys({"next_at", "last_at"} - self._set_here()))
        if self.next_at is None:
            self.set_next_at(using)
            self._take_over({"next_at": self.next_at})

    @property
    def life(self) -> str:
        """Whether it is ``active``, ``cancelled``, or ``ended``: without a next occurrence."""
        if self.cancelled_at is not None:
            return "cancelled"
        return "ended" if self.next_at is None else "active"

    def clean(self) -> None:
        """Tell a form which fields are wrong, beside those whose columns tell it themselves."""
        told = {
            column: str(problem)
            for column, problem in problems(self)
            if column != "subject" and self._held(column) not in (None, "")
        }
        if told:
            raise ValidationError(told)

    def check_definition(self, columns: Set[str] | None = None) -> None:
        """Raise InvalidSchedule or InvalidEvent if one of ``columns``, or any, cannot be kept."""
        for _column, problem in problems(self, columns):
            raise problem

    def _normalize(self, columns: Set[str] | None = None) -> None:
        """Check ``columns``, or all, and bring them into the form in which they are stored."""
        self.check_definition(columns)
        for column, stored_form in STORED_FORMS.items():
            if columns is None or column in columns:
                setattr(self, column, stored_form(self))

    def differs_from(self, columns: Mapping[str, Any]) -> bool:
        """Tell whether any of ``columns`` has another value here."""
        return any(self._held(name) != value for name, value in columns.items())

    def _held(self, column: str) -> Any:
        """Return a column's value; of a body that no key opens, the error, which equals nothing."""
        try:
            return getattr(self, column)
        except UndecodableEvent as error:
            return error

    def redefine(self, columns: Mapping[str, Any]) -> None:
        """Take over and save ``columns``, if any of them differs."""
        if self.differs_from(columns):
            for name, value in columns.items():
                setattr(self, name, value)
            self.save(update_fields=columns)

    def set_next_at(self, using: str) -> None:
        """Set, but do not save, when it occurs next: from now on by the clock of ``using``.

        A start of just now still counts: by the time it gets here, timezone.now() has passed.
        """
        now = database_now(using)
        is_just_now = now - MISSED_AFTER <= self.dtstart <= now and self.last_at is None
        start = self.dtstart.replace(microsecond=0) if is_just_now else now
        if self.last_at is not None and now <= self.last_at < now + MISSED_AFTER:
            start = self.last_at + MOMENT  # the clock was set back a little
        self.next_at = None if self.cancelled_at else self.upcoming_from(start)

    def recurrence(self) -> Recurrence:
        """Return the rule, ready to be asked. Raises InvalidSchedule naming it and the fault."""
        try:
            return recurrence_of(self)
        except RecurrenceProblem as error:
            raise InvalidSchedule(f"Schedule {quoted(self.name)}: {error}.") from error
        except InvalidSchedule as error:
            raise InvalidSchedule(f"Schedule {quoted(self.name)}: {error}") from error

    def upcoming_from(self, moment: datetime) -> datetime | None:
        """Return the first occurrence at or after ``moment``; None if there is none."""
        return self.recurrence().after(moment - MOMENT)

    def upcoming(self, count: int = 5) -> list[datetime]:
        """Return the next occurrences, in UTC.

        An empty list while cancelled, once ended, or when the rule cannot be read any more. Raises
        ValueError for a ``count`` that is none.
        """
        if type(count) is not int or count < 0:
            raise ValueError(f"count must be 0 or more, not {quoted(count)}.")
        if self.next_at is None or self.cancelled_at is not None:
            return []
        try:
            return list(islice(self.recurrence().occurrences(just_before(self.next_at)), count))
        except InvalidSchedule:
            return []

    def local(self, moment: datetime) -> datetime:
        """Return ``moment`` as the clocks of the schedule's zone show it; UTC without that zone."""
        try:
            return moment.astimezone(zone_of(self.timezone))
        except (InvalidSchedule, OverflowError):
            return moment.astimezone(UTC)

    def in_words(self) -> str:
        """Return the rule as a phrase, such as ``every week on Monday at 09:00``.

        Searches for nothing. A rule that cannot be read any more is returned as it is.
        """
        try:
            return in_words(parse(self.rrule), self.local(self.dtstart))
        except RecurrenceProblem:
            return self.rrule
