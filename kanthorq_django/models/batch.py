"""One batch of what an operator orders: its tasks are locked, moved, and told one by one."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kanthorq_django.domain import states
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.states import TaskState
from kanthorq_django.models.delivery.turns import hold_rules
from kanthorq_django.models.task import Task, TaskQuerySet

WORDS = ("updated", "requested", "noop")  # as the fields of Outcome


class Told(NamedTuple):
    """A task as the verb found it, and what became of it."""

    task: Task
    word: str


def move_batch(
    verb: str,
    apply: Callable[[TaskQuerySet], Outcome],
    tasks: TaskQuerySet,
    pks: Sequence[int],
    *,
    running: bool,
) -> list[Told]:
    """Apply ``verb`` to those of ``pks`` that ``tasks`` still selects, in the open transaction.

    An outcome names events, which several consumers may owe, so it cannot tell their tasks apart.
    But the tasks are locked: what becomes of each follows from the state in which it is read here.
    """
    using = tasks.db
    hold_rules(pks, using)  # before the tasks, as the verb itself does
    # All in id order, as all verbs do: two of them never deadlock.
    locked = list(
        Task.objects.using(using)
        .select_for_update(of=("self",), no_key=True)
        .only("event_id", "consumer_id", "state", "cancel_requested_at")
        .filter(pk__in=pks)
        .order_by("pk")
    )
    selected = tasks.filter(pk__in=[task.pk for task in locked])
    chosen = set(selected.order_by().values_list("pk", flat=True))
    if chosen:
        apply(Task.objects.using(using).filter(pk__in=chosen))
    return [
        Told(task, word_for(verb, task, running=running) if task.pk in chosen else "noop")
        for task in locked
    ]


def word_for(verb: str, task: Task, *, running: bool) -> str:
    """Return what ``verb`` makes of ``task``; ``running`` tasks are asked to stop, each once."""
    if states.targets(verb, TaskState(task.state)):
        return "updated"
    is_askable = task.state == TaskState.RUNNING and task.cancel_requested_at is None
    return "requested" if running and is_askable else "noop"


def counts_of(words: Iterable[str]) -> dict[str, int]:
    """Return how many of each word there are, for the audit; none is left out."""
    return dict.fromkeys(WORDS, 0) | Counter(words)
