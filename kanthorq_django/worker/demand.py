"""How many tasks of one consumer this worker wants now: as many as it starts within a second.

Lanes count calls of handlers. What a call holds depends on what is leased: a batch of new events,
or a single task that failed before, or a cancellation, which may belong to the other lane.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto

from kanthorq_django.domain.states import TaskState
from kanthorq_django.domain.subscriptions import Subscription
from kanthorq_django.worker.call import Call
from kanthorq_django.worker.lane import Lane


class Work(Enum):
    """What one statement leases."""

    EVENTS = auto()  # new ones, as tasks
    TASKS = auto()  # that are due
    CLEANUPS = auto()  # due cancellations, where they are wanted in other numbers than tasks


class Demand:
    """What is wanted for one subscription; ``allowed`` tells how many tasks anybody may lease."""

    def __init__(
        self,
        subscription: Subscription,
        lanes: Mapping[bool, Lane],
        at_once: int,
        allowed: Callable[[], int],
    ) -> None:
        batch = subscription.batch
        self._lane = lanes[subscription.is_async]
        self._cleanup_lane = lanes[subscription.is_cancel_async]
        self._at_once = max(at_once, batch)
        self._allowed = allowed
        self._batch = batch
        # Groups are bounded by their keys: each is one call, whatever it holds.
        self._is_learning = batch > 1 and not subscription.grouped
        self._per_call = 1 if self._is_learning else batch
        self._is_split = subscription.cancel_handler is not None and (
            batch > 1 or self._cleanup_lane is not self._lane
        )

    def claims(self, states: frozenset[TaskState]) -> list[tuple[Work, frozenset[TaskState]]]:
        """Return how tasks in ``states`` are to be claimed: all at once, or cancellations apart."""
        cancelling = states & {TaskState.CANCELLING}
        if not (self._is_split and cancelling):
            return [(Work.TASKS, states)]
        return [(Work.CLEANUPS, cancelling), (Work.TASKS, states - cancelling)]

    def count(self, work: Work) -> int:
        """Return how many tasks to lease at most; who gets 0 is woken when there is room."""
        if not (allowed := self._allowed()):
            return 0
        if work is Work.CLEANUPS:
            wanted = self._cleanup_lane.room()
        else:
            wanted = self._lane.room() * (self._batch if work is Work.EVENTS else self._per_call)
        return max(0, min(wanted, self._at_once, allowed))

    def learn(self, work: Work, calls: Sequence[Call]) -> None:
        """Note how many tasks each call got of what was claimed: those that failed run alone."""
        if self._is_learning and work is Work.TASKS and calls:
            per_call = sum(call.size for call in calls) // len(calls)
            self._per_call = min(2 * per_call, self._batch)
