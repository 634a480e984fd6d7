"""Step 3 of 5, claim: tasks, their columns, and what operators may do with them.

The claim itself is in delivery/claim.py. Next, a worker handles what was leased: see
worker/executor.py. What the holder of a lease may do stands in delivery/lease.py; the moves
themselves in domain/states.py, how many are made at once in moves.py.
"""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from asgiref.sync import sync_to_async
from django.db import models
from django.db.models import Case, F, Q, Value, When
from django.db.models.functions import Coalesce, Now
from django.utils.translation import gettext_lazy as _

from kanthorq_django import signals
from kanthorq_django.domain import states
from kanthorq_django.domain.callables import alters_data
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.states import CLAIMABLE, FINAL, TaskState
from kanthorq_django.exceptions import UnguardedMove
from kanthorq_django.models.consumer import Consumer
from kanthorq_django.models.delivery.lease import Lease
from kanthorq_django.models.delivery.turns import present_turn_key
from kanthorq_django.models.event import Event
from kanthorq_django.models.fields import (
    CreatedAtField,
    always_readable,
    microseconds_of,
    moment_of,
)
from kanthorq_django.models.guarded import GuardedModel, unguarded_columns
from kanthorq_django.models.moves import MovableQuerySet, bulk_verb
from kanthorq_django.models.publishing.envelope import KEY_SIZE_MAX

# The life of a task, which verbs, messages and workers move, each by a guarded statement.
LIFE = frozenset(
    {
        "state",
        "schedule_at",
        "turn_key",
        "lease_epoch",
        "attempt_count",
        "attempted_at",
        "attempted_errors",
        "cancel_requested_at",
        "cancel_attempt_count",
        "result",
        "finalized_at",
    }
)

# Nothing happens to tasks in these states until a person or code asks for it.
SET_ASIDE = (TaskState.DISCARDED, TaskState.CANCELLED, TaskState.PENDING)

STATE_LABELS = {
    TaskState.PENDING: _("Pending"),
    TaskState.AVAILABLE: _("Available"),
    TaskState.RUNNING: _("Running"),
    TaskState.CANCELLING: _("Cancelling"),
    TaskState.COMPLETED: _("Completed"),
    TaskState.RETRYABLE: _("Retryable"),
    TaskState.CANCELLED: _("Cancelled"),
    TaskState.DISCARDED: _("Discarded"),
}


class TaskQuerySet(MovableQuerySet["Task"]):
    def pending(self) -> Self:
        return self.filter(state=TaskState.PENDING)

    def available(self) -> Self:
        return self.filter(state=TaskState.AVAILABLE)

    def running(self) -> Self:
        return self.filter(state=TaskState.RUNNING)

    def stuck(self) -> Self:
        """Return running tasks whose lease ran out, by the database's clock."""
        return self.running().filter(schedule_at__lte=Now())

    def cancelling(self) -> Self:
        return self.filter(state=TaskState.CANCELLING)

    def retryable(self) -> Self:
        return self.filter(state=TaskState.RETRYABLE)

    def completed(self) -> Self:
        return self.filter(state=TaskState.COMPLETED)

    def cancelled(self) -> Self:
        return self.filter(state=TaskState.CANCELLED)

    def discarded(self) -> Self:
        return self.filter(state=TaskState.DISCARDED)

    def final(self) -> Self:
        return self.filter(state__in=FINAL)

    def with_events(self, *, without: Sequence[str] = ()) -> Self:
        """Read the events by one more query, but for their columns ``without``.

        For pages and listings: joined, a task whose event was deleted by SQL would be left out.
        """
        events = Event.objects.using(self.db).defer(*without)
        return self.prefetch_related(models.Prefetch("event", events))

    @bulk_verb
    def cancel(self, *, running: bool = False) -> Outcome:
        """End waiting tasks; with ``running``, ask those that run to stop as well.

        A consumer with a cancellation handler gets to run it, whatever the task waited for.
        Returns event ids: ``updated``, ``requested`` (running, newly asked), ``noop``.
        """
        has_handler = Q(consumer__in=Consumer.objects.filter(has_cancel_handler=True))
        return self._move(
            states.CANCEL,
            signals.cancelled,
            request_running=running,
            state=Case(
                When(has_handler, then=Value(int(TaskState.CANCELLING))),
                default=Value(int(TaskState.CANCELLED)),
            ),
            # A cancelling task can be ended by whoever has its epoch: not by its last lease.
            lease_epoch=F("lease_epoch") + 1,
            schedule_at=Case(When(has_handler, then=Now()), default=F("schedule_at")),
            finalized_at=Case(When(has_handler, then=None), default=Now()),
            cancel_attempt_count=0,
            # Since when its end is waited for; an earlier request counts.
            cancel_requested_at=Coalesce("cancel_requested_at", Now()),
        )

    @bulk_verb
    def resume(self) -> Outcome:
        """Let discarded and cancelled tasks run again at once; their history is kept.

        At least one more attempt is always allowed. Returns event ids as ``cancel()`` does.
        """
        return self._move(
            states.RESUME,
            signals.resumed,
            state=TaskState.AVAILABLE,
            schedule_at=Now(),
            finalized_at=None,
            cancel_requested_at=None,
            turn_key=present_turn_key(),
        )

    @bulk_verb
    def release(self) -> Outcome:
        """Let pending tasks run. Returns event ids as ``cancel()`` does."""
        return self._move(
            states.RELEASE, signals.released, state=TaskState.AVAILABLE, schedule_at=Now()
        )

    @bulk_verb
    def reset(self) -> Outcome:
        """Let final tasks run again as if they never had; only ``lease_epoch`` goes on.

        Returns event ids as ``cancel()`` does.
        """
        return self._move(
            states.RESET,
            signals.reset,
            state=TaskState.AVAILABLE,
            schedule_at=Now(),
            finalized_at=None,
            attempt_count=0,
            attempted_at=None,
            attempted_errors=[],
            cancel_attempt_count=0,
            cancel_requested_at=None,
            result=None,
            turn_key=present_turn_key(),
        )

    async def acancel(self, *, running: bool = False) -> Outcome:
        return await sync_to_async(self.cancel)(running=running)

    async def aresume(self) -> Outcome:
        return await sync_to_async(self.resume)()

    async def arelease(self) -> Outcome:
        return await sync_to_async(self.release)()

    async def areset(self) -> Outcome:
        return await sync_to_async(self.reset)()

    alters_data(acancel, aresume, arelease, areset, queryset_only=True)


class Task(GuardedModel):
    """What one consumer owes to one event.

    ``schedule_at`` is the earliest moment at which a worker may claim the task: its due time,
    the end of its back-off, or the end of the current lease.
    """

    # Without constraints: checking them quadruples the time of an insert, and only the pull
    # inserts tasks, for an event and a consumer that it has just read.
    consumer = models.ForeignKey(
        Consumer,
        models.CASCADE,
        related_name="tasks",
        db_index=False,
        db_constraint=False,
        verbose_name=_("consumer"),
    )
    event = models.ForeignKey(
        Event, models.PROTECT, related_name="tasks", db_index=False, db_constraint=False
    )
    resource_key = models.CharField(
        _("resource key"), max_length=KEY_SIZE_MAX, blank=True, db_default="", default=""
    )
    # The resource key, if the consumer serializes its tasks by it.
    turn_key = models.CharField(  # noqa: DJ001  # null: none
        _("turn key"), max_length=KEY_SIZE_MAX, null=True, blank=True
    )
    state = models.SmallIntegerField(
        _("state"),
        choices=[(state.value, label) for state, label in STATE_LABELS.items()],
        default=TaskState.AVAILABLE.value,
    )
    schedule_at = always_readable(models.DateTimeField(db_default=Now()))
    lease_epoch = models.BigIntegerField(_("lease epoch"), default=0, db_default=0)
    attempt_count = models.PositiveIntegerField(default=0, db_default=0)
    attempted_at = always_readable(models.DateTimeField(null=True, blank=True))
    # [{"at": ISO time, "attempt": from 1, "verb": "handle" | "cancel", "error": …, "stack": …}]
    attempted_errors = models.JSONField(
        default=list, db_default=Value([], models.JSONField()), blank=True
    )
    cancel_requested_at = always_readable(models.DateTimeField(null=True, blank=True))
    cancel_attempt_count = models.PositiveIntegerField(default=0, db_default=0)
    result = models.JSONField(null=True, blank=True)
    finalized_at = always_readable(models.DateTimeField(null=True, blank=True))
    created_at = CreatedAtField()

    GUARDED = LIFE

    objects = models.Manager.from_queryset(TaskQuerySet)()

    if TYPE_CHECKING:
        consumer_id: int
        event_id: UUID

    class Meta:
        verbose_name = _("task")
        verbose_name_plural = _("tasks")
        permissions = [
            ("cancel_task", "Can cancel tasks"),
            ("resume_task", "Can resume tasks"),
            ("release_task", "Can release tasks"),
            ("reset_task", "Can reset tasks"),
        ]
        constraints = [
            # The event first: the same index leads from an event to its tasks, as prune goes,
            # and new ones append to its right edge, because event ids are sorted by time.
            models.UniqueConstraint(fields=["event", "consumer"], name="kanthorq_task_once"),
            models.CheckConstraint(
                condition=Q(state__in=[state.value for state in TaskState]),
                name="kanthorq_task_known_state",
            ),
            models.CheckConstraint(
                condition=Q(
                    state__in=[state.value for state in sorted(FINAL)], finalized_at__isnull=False
                )
                | (
                    ~Q(state__in=[state.value for state in sorted(FINAL)])
                    & Q(finalized_at__isnull=True)
                ),
                name="kanthorq_task_final_iff_finalized",
            ),
        ]
        indexes = [
            # One range per consumer serves scheduled, available, retryable, stuck, cancelling.
            models.Index(
                fields=["consumer", "schedule_at", "id"],
                condition=Q(state__in=[state.value for state in sorted(CLAIMABLE)])
                & (Q(turn_key__isnull=True) | Q(state=TaskState.CANCELLING.value)),
                name="kanthorq_task_due",
            ),
            # Whose turn it is: the keys of a consumer, and the first task of each.
            models.Index(
                fields=["consumer", "turn_key", "id"],
                condition=Q(turn_key__isnull=False, state__in=[1, 2, 102]),
                name="kanthorq_task_turns",
            ),
            # Whether any of them may be due.
            models.Index(
                fields=["consumer", "schedule_at"],
                condition=Q(turn_key__isnull=False, state__in=[1, 2, 102]),
                name="kanthorq_task_turn_due",
            ),
            # Whether a key is busy.
            models.Index(
                fields=["consumer", "turn_key"],
                condition=Q(turn_key__isnull=False, state=TaskState.RUNNING.value),
                name="kanthorq_task_turn_taken",
            ),
            # Operators cancel by what a task is about; most tasks have no key and no entry.
            models.Index(
                fields=["resource_key", "consumer"],
                condition=~Q(resource_key=""),
                name="kanthorq_task_resource_key",
            ),
            # What operators look for among millions of completed tasks. A healthy task is never in
            # these states, so the index costs it nothing.
            models.Index(
                fields=["state", "consumer", "id"],
                condition=Q(state__in=[state.value for state in SET_ASIDE]),
                name="kanthorq_task_set_aside",
            ),
        ]

    def __str__(self) -> str:
        return f"task {self.pk} of event {self.event_id}"

    def save(self, *, update_fields: Iterable[str] | None = None, **options: Any) -> None:
        """Save what stands beside the life of a stored task, which may have moved meanwhile.

        An instance that is stale would give a lease twice, or undo what was done; so would a new
        one under the key of another, which is inserted or not at all. Raises UnguardedMove if the
        life was changed here. ``update_fields`` may name it, as ``update()`` may: whoever does so
        sees to it that nobody else moves the task.
        """
        is_adding = self._state.adding and not options.get("force_update")
        is_new = is_adding or self.pk is None or options.get("force_insert")
        written = None if update_fields is None else set(update_fields)
        if written is None and is_new:
            options["force_insert"] = True
        elif written is None:
            self._check_unmoved()
            written = unguarded_columns(self, LIFE)
        super().save(update_fields=written, **options)
        self._know(LIFE if written is None else written)

    def _check_unmoved(self) -> None:
        if moved := sorted(self._assigned()):
            raise UnguardedMove(
                f"save() does not move a task: {', '.join(moved)}. Use cancel(), resume(), "
                "release() or reset(), or name the columns in update_fields."
            )

    @property
    def known_event(self) -> Event | None:
        """The event; None if it was deleted by SQL, which no constraint prevents."""
        try:
            return self.event
        except Event.DoesNotExist:
            return None

    @property
    def lease(self) -> Lease:
        """Its last lease, which may be over."""
        began = self.attempted_at
        since = None if began is None else microseconds_of(began, self._state.db)
        return Lease(self.pk, self.lease_epoch, since)

    @classmethod
    def from_row(cls, row: Any, consumer: Consumer) -> Self:
        """Return the task of a pull's or a claim's row, with its consumer attached."""
        using = consumer._state.db
        values = _AS_PULLED | row._asdict()
        values.setdefault("consumer_id", consumer.pk)
        values.setdefault("created_at", values["attempted_at"])
        for name in _MOMENTS:
            if values[name] is not None:
                values[name] = moment_of(values[name], using)
        for name in ("attempted_errors", "result"):
            if values[name] is not None:
                values[name] = json.loads(values[name])
        task = cls.from_db(using, _COLUMNS, [values[name] for name in _COLUMNS])
        task.consumer = consumer
        return task


_MOMENTS = ("schedule_at", "attempted_at", "cancel_requested_at", "finalized_at", "created_at")
# What a pull's row leaves out: it is the same for all that a pull leases.
_AS_PULLED = {
    "turn_key": None,
    "state": TaskState.RUNNING.value,
    "attempt_count": 1,
    "lease_epoch": 1,
    "attempted_errors": "[]",
    "cancel_attempt_count": 0,
    "cancel_requested_at": None,
    "finalized_at": None,
    "result": None,
}
_COLUMNS: Sequence[str] = tuple(field.attname for field in Task._meta.concrete_fields)
