"""How many tasks of one consumer this worker wants now: as many as it starts within a second.

Lanes count calls of handlers. What a call holds is known of new events, which come in batches. What
a claim finds is not: tasks that failed before run alone, and cancellations may belong to the
other lane. So claims begin small, and learn from what they found.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kanthorq_django.domain.states import TaskState
from kanthorq_django.domain.subscriptions import Subscription
from kanthorq_django.worker.lanes.call import Call
from kanthorq_django.worker.lanes.lane import Lane


class Wanted(NamedTuple):
    """How many tasks to lease at most; of due ones, in which states."""

    limit: int
    states: frozenset[TaskState] = frozenset()


class Demand:
    """What is wanted for one subscription; ``allowed`` tells how many tasks anybody may lease."""

    def __init__(
        self,
        subscription: Subscription,
        lanes: Mapping[bool, Lane],
        at_once: int,
        allowed: Callable[[], int],
    ) -> None:
        self._batch = batch = subscription.batch
        self._at_once = max(at_once, batch)
        self._allowed = allowed
        self._lane = lanes[subscription.is_async]
        self._kinds: list[_Kind] = []
        self._asked: list[_Kind] = []  # what the last claim was to find
        if batch > 1:
            self._kinds.append(_Kind(self._lane, self._at_once, is_cleanup=False))
        cleanup_lane = lanes[subscription.is_cancel_async]
        if subscription.cancel_handler and (batch > 1 or cleanup_lane is not self._lane):
            self._kinds.append(_Kind(cleanup_lane, self._at_once, is_cleanup=True))

    def of_events(self) -> Wanted:
        """Return how many new events to lease; who gets 0 is woken when there is room."""
        return Wanted(self._within_limits(self._lane.room() * self._batch))

    def of_due_tasks(self, states: frozenset[TaskState]) -> Wanted:
        """Return how many due tasks to lease, in all of ``states`` or without cancellations.

        Where these run in the other lane and it is full, they alone wait for it. (Where it is the
        main handlers' that is full, they wait as well: to find them, a claim would read all that
        is due.) Who gets 0 or fewer states is woken when there is room.
        """
        counts = [self._lane.room() * self._batch]
        self._asked = []
        for kind in self._kinds:
            if kind.is_cleanup and TaskState.CANCELLING not in states:
                continue
            count = kind.wanted()
            if count or kind.lane is self._lane:
                counts.append(count)
                self._asked.append(kind)
            else:
                states -= {TaskState.CANCELLING}
        return Wanted(self._within_limits(min(counts)), states)

    def learn(self, calls: Sequence[Call]) -> None:
        """Note what the last claim found."""
        for kind in self._asked:
            kind.learn(calls)

    def _within_limits(self, wanted: int) -> int:
        return min(wanted, self._at_once, self._allowed())


class _Kind:
    """Calls of the handler or of its cleanup, and how many claimed tasks there are for each."""

    def __init__(self, lane: Lane, most: int, *, is_cleanup: bool) -> None:
        self.lane = lane
        self.is_cleanup = is_cleanup
        self._most = most
        self._per_call = 1

    def wanted(self) -> int:
        return self.lane.room() * self._per_call

    def learn(self, calls: Sequence[Call]) -> None:
        claimed = sum(call.size for call in calls)
        count = sum(call.rounds[0][0].is_cancellation is self.is_cleanup for call in calls)
        if not count:
            possible = 2 * self._per_call  # that there was none says little of what comes
        elif self.is_cleanup:
            possible = claimed // count
        else:
            possible = 2 * claimed // count  # no batch is larger than what was claimed for it
        self._per_call = min(possible, self._most)
