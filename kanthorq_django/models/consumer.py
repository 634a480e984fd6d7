"""Step 2 of 5, pull: consumers turn the events they select into tasks of their own.

The cursor is a snapshot, not a position: an event is new to a consumer exactly when its
transaction was not visible in the stored snapshot and is visible now. Commit order is not
insertion order; a position would skip what commits late, and one that waits for the oldest
open transaction would stall behind every long write.

Next, tasks that are due later, or again, are claimed: see task.py.
"""

import functools
import logging
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any
from uuid import UUID

from asgiref.sync import sync_to_async
from django.db import models, router, transaction
from django.db.models.expressions import RawSQL
from django.utils.functional import cached_property
from django.utils.translation import gettext_lazy as _

from kanthorq_django import signals
from kanthorq_django.domain import subjects
from kanthorq_django.domain.callables import alters_data
from kanthorq_django.domain.names import NAME_SIZE_MAX
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.states import CLAIMABLE, TaskState
from kanthorq_django.domain.subscriptions import ATTEMPT_MAX, VISIBILITY_TIMEOUT
from kanthorq_django.exceptions import ForeignCluster
from kanthorq_django.models.deletion import without_pulls
from kanthorq_django.models.delivery import cursor as cursors
from kanthorq_django.models.delivery.claim import claim_due
from kanthorq_django.models.delivery.cursor import Lag, Page
from kanthorq_django.models.delivery.leased import BODIES_SIZE_MAX, tell_of
from kanthorq_django.models.delivery.turns import Serialize, Turns, align_turns
from kanthorq_django.models.fields import (
    CreatedAtField,
    SnapshotField,
    SubjectFiltersField,
    XidField,
    check_filters,
)
from kanthorq_django.models.guarded import unguarded_columns
from kanthorq_django.models.registration import (
    ConsumerQuerySet,
    cannot_move,
    check_consumer_name,
)
from kanthorq_django.models.stream import Stream

if TYPE_CHECKING:
    from kanthorq_django.models.task import Task, TaskQuerySet

logger = logging.getLogger("kanthorq_django")

LIMIT_MAX = 1_000_000  # tasks that one pull or claim leases
BEGINNING = "1:1:"  # the snapshot in which nothing has happened yet


def _everything() -> list[str]:
    return [">"]


class Consumer(models.Model):
    """A stream, the filters that select from it, a cursor, and how its tasks are run."""

    stream = models.ForeignKey(
        Stream, models.PROTECT, related_name="consumers", verbose_name=_("stream")
    )
    name = models.CharField(_("name"), max_length=NAME_SIZE_MAX, unique=True)
    subject_includes = SubjectFiltersField(default=_everything)
    subject_excludes = SubjectFiltersField(default=list, blank=True)
    attempt_max = models.PositiveSmallIntegerField(_("attempt max"), default=ATTEMPT_MAX)
    visibility_timeout = models.DurationField(_("visibility timeout"), default=VISIBILITY_TIMEOUT)
    timeout = models.DurationField(_("timeout"), null=True, blank=True)
    parked = models.BooleanField(default=False)
    deliver_from = models.DateTimeField(_("deliver from"), null=True, blank=True)
    has_cancel_handler = models.BooleanField(default=False)
    cancel_attempt_max = models.PositiveSmallIntegerField(
        _("cancel attempt max"), default=ATTEMPT_MAX
    )
    serialize = models.CharField(
        _("serialize"),
        max_length=6,
        choices=Serialize.choices,
        blank=True,
        default=Serialize.OFF.value,
    )

    # All that is visible in ``cursor`` has been read. While a backlog is worked off, ``window``
    # is the snapshot being read, and (position_xid, position_id) the last event taken from it.
    cursor = SnapshotField(
        _("cursor"), db_default=models.Value(BEGINNING, SnapshotField()), editable=False
    )
    window = SnapshotField(_("window"), null=True, editable=False)
    position_xid = XidField(null=True, editable=False)
    position_id = models.UUIDField(null=True, editable=False)
    # Transaction ids mean something only in the cluster that issued them.
    cluster_id = models.BigIntegerField(
        db_default=RawSQL("(pg_control_system()).system_identifier", ()), editable=False
    )
    created_at = CreatedAtField()

    objects = models.Manager.from_queryset(ConsumerQuerySet)()

    if TYPE_CHECKING:
        stream_id: int

    class Meta:
        verbose_name = _("consumer")
        verbose_name_plural = _("consumers")
        base_manager_name = "objects"  # by which a stream's ``consumers`` are written, too
        constraints = [
            models.CheckConstraint(
                condition=models.Q(
                    window__isnull=True, position_xid__isnull=True, position_id__isnull=True
                )
                | models.Q(
                    window__isnull=False, position_xid__isnull=False, position_id__isnull=False
                ),
                name="kanthorq_consumer_window_has_position",
            ),
            models.CheckConstraint(
                condition=models.Q(attempt_max__gte=1, cancel_attempt_max__gte=1),
                name="kanthorq_consumer_attempts",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    def save(self, *, update_fields: Iterable[str] | None = None, **options: Any) -> None:
        """Save all but the cursor of a stored consumer, which pulls may have moved meanwhile.

        A new one is inserted or not at all. Raises InvalidFilter, or ConfigurationError for
        another stream or what cannot name a consumer, before anything is written.
        """
        is_new = self._state.adding and not options.get("force_update")
        named = None if update_fields is None else set(update_fields)
        alias = options.get("using") or self.using
        written = self.__dict__.keys() if named is None else named
        self._check(written, alias)
        if named is None and is_new:
            options["force_insert"] = True
        elif named is None:
            named = unguarded_columns(self, cursors.COLUMNS)
        save = functools.partial(super().save, update_fields=named, **options)
        if is_new or "serialize" not in written:
            save()
        else:
            self._save_rule(save, alias)

    def _check(self, written: Collection[str], using: str) -> None:
        if "name" in written:
            check_consumer_name(self.name)
        for name in {"subject_includes", "subject_excludes"}.intersection(written):
            check_filters(getattr(self, name))
        if self.pk and not self._state.adding and {"stream", "stream_id"}.intersection(written):
            self._check_stream(using)

    def _check_stream(self, using: str) -> None:
        """Raise ConfigurationError if saving would move it to another stream."""
        stored = Stream._base_manager.using(using).filter(consumers=self.pk).first()
        if stored is not None and stored.pk != Stream._meta.pk.to_python(self.stream_id):
            raise cannot_move(self.name, stored.name)

    def _save_rule(self, save: Callable[[], None], using: str) -> None:
        """Save; let tasks follow if that is another rule about keys."""
        with transaction.atomic(using=using):
            stored = Consumer._base_manager.using(using).filter(pk=self.pk)
            # Locked: who has changed it, and not committed yet, is waited for.
            locked = stored.select_for_update(no_key=True)
            before = locked.values_list("serialize", flat=True).first()
            save()
            if before not in {None, self.serialize}:
                align_turns(self)

    def delete(
        self, using: str | None = None, keep_parents: bool = False
    ) -> tuple[int, dict[str, int]]:
        """Delete this consumer and its tasks; a pull that is under way is waited for."""
        alias = using or self.using
        with without_pulls(Consumer._base_manager.using(alias).filter(pk=self.pk)):
            return super().delete(using=alias, keep_parents=keep_parents)

    @property
    def using(self) -> str:
        """The database that this consumer reads and writes, whichever it was fetched from."""
        return router.db_for_write(Consumer, instance=self)

    @cached_property
    def turns(self) -> Turns:
        """What this process remembers of the turns that it gave by this instance."""
        return Turns()

    def selects(self, subject: str) -> bool:
        """Tell whether this consumer's filters select ``subject``."""
        return subjects.selects(self.subject_includes, self.subject_excludes, subject)

    def lag(self, limit: int = 10_000) -> Lag:
        """Return how many events of the stream wait unread, counted up to ``limit``; read-only."""
        _check_limit(limit)
        return cursors.lag(self, limit)

    def pull(self, limit: int = 100) -> "list[Task]":
        """Turn new events into tasks; return those leased to the caller, at most ``limit``.

        Fewer come where their bodies are large. An empty list means that the consumer has caught
        up, or that another pull is at it. Events that are scheduled for later, or a consumer that
        parks its tasks, make tasks that are not returned. Raises PullRefused where reading could
        lose or repeat events, and ValueError for a ``limit`` out of its range.
        """
        _check_limit(limit)
        cursors.check_no_transaction(self.using)
        while cursors.has_unread(self):
            page = self.pull_page(limit)
            if page.leased or page.is_idle:
                return page.tasks
        return []

    def pull_page(self, limit: int, size_max: int = BODIES_SIZE_MAX) -> Page:
        """Read one page of the stream in one transaction, as ``pull()`` does until it has tasks."""
        cursors.check_no_transaction(self.using)
        try:
            with cursors.refused_by_standby(self.using):
                page = cursors.read_page(self, limit, size_max)
        except ForeignCluster:
            if not cursors.mend(self):
                raise
            return Page([], is_idle=False)
        tell_of(signals.pulled, self, page.leased)
        return page

    def claim(
        self,
        limit: int = 100,
        *,
        states: Iterable[TaskState] = CLAIMABLE,
    ) -> "list[Task]":
        """Lease at most ``limit`` tasks that are due and in ``states``; an empty list: none is.

        Tasks that used up their attempts, or were asked to cancel, end here and are not
        returned. Of tasks that are serialized, one of a key is leased at a time, or as many as
        ``turns.group_size`` says; fewer come where their bodies are large.
        Raises ValueError for a state that no claim takes, and for a ``limit`` out of its range.
        """
        wanted = _claimable(states)
        _check_limit(limit)
        return [leased.task for leased in claim_due(self, limit, wanted)]

    def cancel(self, event_ids: Iterable[UUID | str], *, running: bool = False) -> Outcome:
        """Cancel this consumer's tasks of these events; unknown ids are in ``noop`` too.

        Raises TypeError for a single id, and ValueError for what is no id.
        """
        return self._move(event_ids, lambda tasks: tasks.cancel(running=running))

    def resume(self, event_ids: Iterable[UUID | str]) -> Outcome:
        """Resume this consumer's tasks of these events; returns and raises as ``cancel()``."""
        return self._move(event_ids, lambda tasks: tasks.resume())

    def release(self, event_ids: Iterable[UUID | str]) -> Outcome:
        """Release this consumer's tasks of these events; returns and raises as ``cancel()``."""
        return self._move(event_ids, lambda tasks: tasks.release())

    def reset(self, event_ids: Iterable[UUID | str]) -> Outcome:
        """Reset this consumer's tasks of these events; returns and raises as ``cancel()``."""
        return self._move(event_ids, lambda tasks: tasks.reset())

    async def acancel(self, event_ids: Iterable[UUID | str], *, running: bool = False) -> Outcome:
        return await sync_to_async(self.cancel)(event_ids, running=running)

    async def aresume(self, event_ids: Iterable[UUID | str]) -> Outcome:
        return await sync_to_async(self.resume)(event_ids)

    async def arelease(self, event_ids: Iterable[UUID | str]) -> Outcome:
        return await sync_to_async(self.release)(event_ids)

    async def areset(self, event_ids: Iterable[UUID | str]) -> Outcome:
        return await sync_to_async(self.reset)(event_ids)

    alters_data(
        *(pull, pull_page, claim),
        *(cancel, resume, release, reset, acancel, aresume, arelease, areset),
        delete,
    )

    def _move(
        self,
        event_ids: Iterable[UUID | str],
        verb: "Callable[[TaskQuerySet], Outcome]",
    ) -> Outcome:
        from kanthorq_django.models.task import Task

        if isinstance(event_ids, str | UUID):
            raise TypeError(f"event_ids takes several ids; put {quoted(event_ids)} into a list.")
        wanted = dict.fromkeys(_event_id(given) for given in event_ids)
        # One parameter: the protocol takes no more than 65,535, where the server binds them.
        among = RawSQL("SELECT unnest(%s::uuid[])", [list(wanted)])
        tasks = Task.objects.using(self.using).filter(consumer=self, event_id__in=among)
        outcome = verb(tasks)
        known = {*outcome.updated, *outcome.requested, *outcome.noop}
        return outcome + Outcome(noop=tuple(given for given in wanted if given not in known))


def _event_id(given: UUID | str) -> UUID:
    try:
        if isinstance(given, UUID | str):
            return given if isinstance(given, UUID) else UUID(given)
    except ValueError:
        pass
    raise ValueError(f"{quoted(given)} is not an event id; it must be a UUID.")


def _check_limit(limit: int) -> None:
    if type(limit) is not int or not 1 <= limit <= LIMIT_MAX:
        raise ValueError(f"limit must be 1 to {LIMIT_MAX:,}, not {quoted(limit)}.")


def _claimable(states: Iterable[object]) -> frozenset[TaskState]:
    """Return ``states`` as a set. Raises ValueError for one that no claim takes.

    To equal one is not enough: 2.0 would be an error of the database, which spoils the caller's
    transaction.
    """
    found = set[TaskState]()
    for state in states:
        if not isinstance(state, int) or isinstance(state, bool) or state not in CLAIMABLE:
            names = ", ".join(each.name for each in sorted(CLAIMABLE))
            raise ValueError(f"states must be some of {names}, not {quoted(state)}.")
        found.add(TaskState(state))
    return frozenset(found)
