"""What one thread or coroutine of a lane does at a stretch: rounds of messages, in order.

Nearly always that is one message. A batch is one round of many; a message that failed before
is a round of its own, so a poison message sinks its batch once and then only itself.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from kanthorq_django.domain.subscriptions import Subscription
from kanthorq_django.worker.flight import Flight

Round = tuple[Flight, ...]


@dataclass(slots=True)  # frozen ones take four times as long to make
class Call:
    """Rounds that are run one after the other; all of one kind, plain or coroutine."""

    rounds: tuple[Round, ...]

    @property
    def flights(self) -> list[Flight]:
        return [flight for round_ in self.rounds for flight in round_]

    @property
    def size(self) -> int:
        """How many messages it handles."""
        return sum(map(len, self.rounds))

    @property
    def is_async(self) -> bool:
        return self.rounds[0][0].is_async

    @property
    def may_share(self) -> bool:
        """Whether it is one message whose handler commits with its ack, so others may join in."""
        if len(self.rounds) > 1 or len(self.rounds[0]) > 1 or self.is_async:
            return False
        (flight,) = self.rounds[0]
        subscription = flight.subscription
        return subscription.atomic and subscription.batch == 1 and not flight.is_cancellation

    def may_join(self, other: "Call") -> bool:
        """Whether it may be handled in the transaction of ``other``, which may share its own."""
        mine, theirs = self.rounds[0][0].subscription, other.rounds[0][0].subscription
        return mine is theirs and self.may_share


def calls(flights: Iterable[Flight], subscription: Subscription) -> list[Call]:
    """Return how leased tasks are to be run: one by one, in batches, or in groups by key."""
    alone: list[Flight] = []
    together: list[Flight] = []
    for flight in flights:
        is_single = subscription.batch == 1 or flight.is_cancellation
        (alone if is_single else together).append(flight)
    found = [Call(((flight,),)) for flight in alone]
    if subscription.grouped:
        keyed = [flight for flight in together if flight.leased.resource_key]
        found += _grouped(keyed, subscription.batch)
        together = [flight for flight in together if not flight.leased.resource_key]
    # In any order, so that a failure between fresh ones tears no batch.
    together.sort(key=_has_failed)
    return found + [Call((round_,)) for round_ in _rounds(together, subscription.batch)]


def _grouped(flights: list[Flight], size: int) -> Iterator[Call]:
    """One call for each key: what has the same key must not run side by side."""
    in_order = sorted(flights, key=lambda flight: (_key(flight), flight.lease.task_id))
    for _, found in groupby(in_order, key=_key):
        yield Call(tuple(_rounds(list(found), size)))


def _rounds(flights: list[Flight], size: int) -> Iterator[Round]:
    for has_failed, found in groupby(flights, key=_has_failed):
        of_a_kind = list(found)
        step = 1 if has_failed else size
        for start in range(0, len(of_a_kind), step):
            yield tuple(of_a_kind[start : start + step])


def _key(flight: Flight) -> str:
    return flight.leased.resource_key


def _has_failed(flight: Flight) -> bool:
    return flight.message.attempt > 1
