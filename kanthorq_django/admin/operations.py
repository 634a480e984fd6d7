"""What operators do to tasks: in batches, logged in the transaction that does it, told id by id."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self
from uuid import UUID

from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.utils.functional import Promise
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from kanthorq_django.admin.display import disclosed, number
from kanthorq_django.domain import states
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.states import TaskState
from kanthorq_django.models import Task
from kanthorq_django.models.audit import SAMPLE_SIZE, Order
from kanthorq_django.models.batch import counts_of, move_batch
from kanthorq_django.models.isolation import together, undeadlocked
from kanthorq_django.models.task import STATE_LABELS, TaskQuerySet

BATCH_SIZE = 1_000  # tasks that are locked, moved and logged in one transaction


@dataclass(frozen=True, slots=True)
class Operation:
    """A verb of tasks, as a person sees it; ``effect`` says what becomes of the tasks.

    Who has the permission of that ``verb`` may use each ``action`` of it. ``loss`` says what no
    other verb brings back.
    """

    action: str
    verb: str
    name: str | Promise
    effect: str | Promise
    apply: Callable[[TaskQuerySet], Outcome]
    stops_running: bool = False
    loss: str | Promise = ""

    @property
    def button(self) -> str | Promise:
        return self.name

    @property
    def is_asked_first(self) -> bool:
        """Tell whether a click too many among the ticked rows would do harm."""
        return bool(self.loss) or self.stops_running

    def can_move(self, state: int) -> bool:
        """Tell whether the verb leaves ``state``."""
        return bool(states.targets(self.verb, TaskState(state)))

    def can_stop(self, state: int, *, is_asked: bool) -> bool:
        """Tell whether a task in ``state`` would be asked to stop; each is asked once."""
        return self.stops_running and state == TaskState.RUNNING and not is_asked


OPERATIONS = {
    operation.action: operation
    for operation in (
        Operation(
            "cancel",
            "cancel",
            _("Cancel"),
            _("Tasks that wait will not run. Tasks that run are left alone."),
            TaskQuerySet.cancel,
        ),
        Operation(
            "cancel_running",
            "cancel",
            _("Cancel or stop"),
            _("Tasks that wait will not run. Tasks that run are asked to stop."),
            partial(TaskQuerySet.cancel, running=True),
            stops_running=True,
        ),
        Operation(
            "resume",
            "resume",
            _("Resume"),
            _("Cancelled and discarded tasks run again at once; their history is kept."),
            TaskQuerySet.resume,
        ),
        Operation(
            "release",
            "release",
            _("Release"),
            _("Pending tasks run at once."),
            TaskQuerySet.release,
        ),
        Operation(
            "reset",
            "reset",
            _("Reset"),
            _(
                "Final tasks run again at once, completed ones too; their attempts, errors and "
                "results are forgotten."
            ),
            TaskQuerySet.reset,
            loss=_(
                "What is forgotten is lost for good. What handlers did of completed tasks, such as "
                "a payment, they do once more."
            ),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Report:
    """How many tasks were updated, asked to stop, and left alone; some of these by name.

    ``last`` is the id of the last task that was looked at, and all up to it were; ``sample``
    has event ids of some that were changed.
    """

    updated: int = 0
    requested: int = 0
    noop: int = 0
    spared: tuple[tuple[UUID, int], ...] = ()
    last: int = 0
    sample: tuple[UUID, ...] = ()

    def __add__(self, other: Self) -> Self:
        return replace(
            self,
            updated=self.updated + other.updated,
            requested=self.requested + other.requested,
            noop=self.noop + other.noop,
            spared=(self.spared + other.spared)[:SAMPLE_SIZE],
            last=max(self.last, other.last),
            sample=(self.sample + other.sample)[:SAMPLE_SIZE],
        )

    def __str__(self) -> str:
        text = ngettext("%s task updated", "%s tasks updated", self.updated)
        parts = [text % number(self.updated)]
        if self.requested:
            text = ngettext("%s asked to stop", "%s asked to stop", self.requested)
            parts.append(text % number(self.requested))
        if self.noop:
            text = ngettext("%s left alone", "%s left alone", self.noop)
            parts.append(text % number(self.noop))
        return ", ".join(parts) + "."

    @property
    def by_event(self) -> SafeString:
        """The ids of the events whose tasks were left alone, in which states, or changed."""
        spared = [f"{pk} ({STATE_LABELS[TaskState(state)]})" for pk, state in self.spared]
        changed = [str(pk) for pk in self.sample]
        return disclosed(gettext("Left alone, by event:"), spared, self.noop) + disclosed(
            gettext("Changed, by event:"), changed, self.updated + self.requested
        )


def carry_out(
    operation: Operation,
    tasks: TaskQuerySet,
    order: Order,
    *,
    after: int = 0,
    seconds_max: float | None = None,
) -> tuple[Report, bool]:
    """Apply ``operation`` to ``tasks`` with ids above ``after``; return what it did, and if to all.

    Each batch is a transaction of its own, so memory and locks stay bounded; once
    ``seconds_max`` are over no further batch is begun.
    """
    deadline = None if seconds_max is None else time.monotonic() + seconds_max
    report = Report(last=after)
    for pks in _batches(tasks, after):
        report += undeadlocked(tasks.db, partial(_move, operation, tasks, pks, order))
        if deadline is not None and time.monotonic() >= deadline:
            return report, not tasks.filter(pk__gt=report.last).exists()
    return report, True


def _batches(tasks: TaskQuerySet, after: int) -> Iterator[list[int]]:
    """Yield ids in their order; each batch is looked up after the one before it was moved."""
    in_order = tasks.order_by("pk").values_list("pk", flat=True)
    while pks := list(in_order.filter(pk__gt=after)[:BATCH_SIZE]):
        yield pks
        after = pks[-1]


def _move(operation: Operation, tasks: TaskQuerySet, pks: Sequence[int], order: Order) -> Report:
    using = tasks.db
    with together(using):
        told = move_batch(
            operation.verb, operation.apply, tasks, pks, running=operation.stops_running
        )
        counts = counts_of(word for _, word in told)
        changed = [task for task, word in told if word != "noop"]
        spared = [task for task, word in told if word == "noop"]
        _log(operation, changed, order)
        ids = tuple(task.event_id for task in changed[:SAMPLE_SIZE])
        order.record(f"tasks.{operation.action}", using=using, counts=counts, ids=ids)
    return Report(
        **counts,
        spared=tuple((task.event_id, task.state) for task in spared[:SAMPLE_SIZE]),
        last=pks[-1],
        sample=ids,
    )


def _log(operation: Operation, tasks: Iterable[Task], order: Order) -> None:
    content_type = ContentType.objects.get_for_model(Task)
    LogEntry.objects.bulk_create(
        LogEntry(
            user_id=order.user_id,
            content_type=content_type,
            object_id=str(task.pk),
            object_repr=str(task)[:200],
            action_flag=CHANGE,
            change_message=order.told(
                f"{operation.verb} (was {TaskState(task.state).label.lower()})"
            ),
        )
        for task in tasks
    )
