"""Tasks as a pull or a claim leased them: model instances are built when somebody looks at them.

Most handlers never look at their task, and some not at their event; building both takes longer
than all else that a worker does for a task.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import UUID

from django.db import DEFAULT_DB_ALIAS
from django.dispatch import Signal
from django.utils.functional import cached_property

from kanthorq_django import signals
from kanthorq_django.domain.interrupts import is_interrupt
from kanthorq_django.domain.states import TaskState
from kanthorq_django.models.delivery.lease import Lease
from kanthorq_django.models.event import Event
from kanthorq_django.sql.result import Result

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer
    from kanthorq_django.models.task import Task

logger = logging.getLogger("kanthorq_django")

# Read for each row: to look up a member of an enumeration takes longer.
_CANCELLING = TaskState.CANCELLING.value

# Bytes of bodies that one pull or claim leases at most, but for a single one that is larger; a
# claim leases so much of tasks that were given a turn, and so much of others. An answer comes as a
# whole, after its leases were committed: where it does not fit into memory, its tasks have lost an
# attempt. More at a time would gain nothing: to transfer this takes far longer than a round trip.
BODIES_SIZE_MAX = 16 * 2**20


class Leased:
    """A leased task: what its holder has to know at once, and the rest when asked for."""

    def __init__(
        self,
        lease: Lease,
        attempt: int,
        consumer: "Consumer",
        rows: Result,
        index: int,
        *,
        is_cancellation: bool,
    ) -> None:
        self.lease = lease
        # Counted from 1, and for cancellations anew.
        self.attempt = attempt
        self.is_cancellation = is_cancellation
        self.consumer = consumer
        self._rows = rows
        self._index = index

    @classmethod
    def of(cls, task: "Task") -> "Leased":
        """Return the same for a task that exists as an instance."""
        leased = cls.__new__(cls)  # all is known: no cached property has to look at a row
        is_cancellation = task.state == TaskState.CANCELLING
        leased.__dict__.update(
            lease=task.lease,
            attempt=task.cancel_attempt_count if is_cancellation else task.attempt_count,
            is_cancellation=is_cancellation,
            event_id=task.event_id,
            resource_key=task.resource_key,
            task=task,
            event=task.event,
            subject=task.event.subject,
            body_size=0,
        )
        return leased

    @property
    def using(self) -> str:
        """The database of the task."""
        known = self.__dict__.get("task") or self.consumer
        return known._state.db or DEFAULT_DB_ALIAS

    @cached_property
    def consumer(self) -> "Consumer":
        return self.task.consumer

    @cached_property
    def event_id(self) -> UUID:
        pk: UUID
        (pk,) = self._rows.values(self._index, ("event_id",))
        return pk

    @cached_property
    def subject(self) -> str | None:
        """The subject of its event; None if somebody has deleted that."""
        subject: str | None
        (subject,) = self._rows.values(self._index, ("event_subject",))
        return subject

    @cached_property
    def body_size(self) -> int:
        """Bytes of a body, on average of all that came together, which stay until all are done."""
        size: int | None
        (size,) = self._rows.values(0, ("body_size",))
        return size or 0

    @cached_property
    def resource_key(self) -> str:
        key: str
        (key,) = self._rows.values(self._index, ("resource_key",))
        return key

    @cached_property
    def event(self) -> Event:
        """Its event. Raises DoesNotExist if somebody has deleted that."""
        return Event.from_row(self._rows, self._index, self.consumer)

    @cached_property
    def task(self) -> "Task":
        from kanthorq_django.models.task import Task

        task = Task.from_row(self._rows[self._index], self.consumer)
        with suppress(Event.DoesNotExist):  # there is no constraint: somebody may have deleted it
            task.event = self.event
        return task


def pulled_by(consumer: "Consumer", rows: Result) -> list[Leased]:
    """Return what the rows of a pull of ``consumer`` lease to us: all of them alike, and new."""
    consumer._state.db = consumer.using  # as save() does: tasks follow their consumer
    (since,) = rows.values(0, ("attempted_at",)) if len(rows) else (None,)
    return [
        Leased(Lease(pk, 1, since), 1, consumer, rows, index, is_cancellation=False)
        for index, pk in enumerate(rows.column("id"))
        if pk is not None
    ]


def claimed_by(consumer: "Consumer", rows: Result) -> list[Leased]:
    """Return what the rows of a claim of ``consumer`` lease to us; some have no task."""
    consumer._state.db = consumer.using  # as in pulled_by()
    names = ("id", "lease_epoch", "attempted_at", "attempt", "state")
    columns = zip(*map(rows.column, names), strict=True)
    return [
        Leased(
            Lease(pk, epoch, since),
            attempt,
            consumer,
            rows,
            index,
            is_cancellation=state == _CANCELLING,
        )
        for index, (pk, epoch, since, attempt, state) in enumerate(columns)
        if pk is not None
    ]


def tell_of(signal: Signal, consumer: "Consumer", leased: Iterable[Leased]) -> None:
    """Tell receivers what was leased, which has been committed, whatever goes wrong here."""
    from kanthorq_django.models.consumer import Consumer

    if not signal.has_listeners(Consumer):
        return
    try:
        tasks = [each.task for each in leased]
    except BaseException as error:
        if is_interrupt(error):
            raise
        # A receiver of post_init, say.
        logger.exception("Tasks of consumer %s could not be told of.", consumer.name)
    else:
        signals.tell_of_what_lasts(signal, Consumer, consumer=consumer, tasks=tasks)
