"""A task between its lease and its verdict, as the threads of one worker process share it."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

from kanthorq_django.domain.subscriptions import Handler, Subscription
from kanthorq_django.domain.verdicts import Snooze
from kanthorq_django.message import Message, Stop
from kanthorq_django.models import Consumer, Task
from kanthorq_django.models.delivery.lease import Lease
from kanthorq_django.models.delivery.leased import Leased

# Before what this worker's code, older or newer, does not know of is offered again.
ELSEWHERE = timedelta(seconds=30)
# Leases after which nobody else seems to know of it either: some ten minutes.
LEASES_MAX = 20


class Flight:
    """One leased task. ``leased_at`` was read before the lease was asked for, so it is no later."""

    __slots__ = (
        "_proven_at",
        "_renewed_at",
        "interrupt",
        "is_cancellation",
        "lease",
        "leased",
        "message",
        "started_at",
        "stop",
        "subscription",
        "thread",
    )

    def __init__(self, task: Task | Leased, subscription: Subscription, leased_at: float) -> None:
        self.subscription = subscription
        self.stop = Stop()
        self.leased = task if isinstance(task, Leased) else Leased.of(task)
        self.message = Message(self.leased, stop=self.stop)
        self.lease: Lease = self.message.lease
        self.is_cancellation: bool = self.message.is_cancellation
        self.started_at: float | None = None
        self.thread: int | None = None  # that it was started in
        # How to interrupt the handler itself, which only a coroutine allows; one for each call.
        self.interrupt: Callable[[], None] | None = None
        self._renewed_at = self._proven_at = leased_at

    @property
    def handler(self) -> Handler:
        """What to run. Raises Snooze for a cancellation that only other code can handle."""
        if not self.is_cancellation:
            return self.subscription.handler
        if self.subscription.cancel_handler is None:
            raise Snooze(ELSEWHERE)
        return self.subscription.cancel_handler

    def is_for_others(self, consumer: Consumer) -> bool:
        """Tell whether the filters of ``consumer`` select the subject, and those of our code not.

        Never where its key has an order to keep, in which it would lose its place.
        """
        subject = self.leased.subject
        if subject is None or self.subscription.selects(subject):
            return False
        is_free = self.subscription.serialize != "strict" and self.lease.epoch <= LEASES_MAX
        return is_free and consumer.selects(subject)

    @property
    def is_async(self) -> bool:
        subscription = self.subscription
        return subscription.is_cancel_async if self.is_cancellation else subscription.is_async

    @property
    def place(self) -> object:
        """What it takes of its lane's room, alone or with others, once it is started."""
        return self.interrupt or self.thread

    @property
    def timeout(self) -> timedelta | None:
        subscription = self.subscription
        return subscription.cancel_timeout if self.is_cancellation else subscription.timeout

    @property
    def attempt_max(self) -> int:
        subscription = self.subscription
        return subscription.cancel_attempt_max if self.is_cancellation else subscription.attempt_max

    @property
    def is_last_attempt(self) -> bool:
        return self.message.attempt >= self.attempt_max

    def start(self) -> bool:
        """Note the start. False when the lease may be gone, so that nothing may be started."""
        self.started_at, self.thread = time.monotonic(), threading.get_ident()
        return not (self.stop.is_set() or self.is_expired(self.started_at))

    def renewed(self, asked_at: float) -> None:
        """Note that the lease was extended at ``asked_at`` or later."""
        self._renewed_at = self._proven_at = asked_at

    def proven(self, asked_at: float) -> None:
        """Note that the lease was ours, but its row locked: a handler that acks in a long block."""
        self._proven_at = asked_at

    def is_expired(self, now: float) -> bool:
        """Tell whether the lease has run out unless it was renewed without our knowing."""
        until = self._proven_at + self.subscription.visibility_timeout.total_seconds()
        return now >= until and not self.message.is_settled()

    def needs_renewal(self, now: float) -> bool:
        third = self.subscription.visibility_timeout.total_seconds() / 3
        return now >= self._renewed_at + third

    def is_overdue(self, now: float) -> bool:
        """Tell whether the handler has used up its timeout: its lease is not renewed any more."""
        return (
            self.timeout is not None
            and self.started_at is not None
            and now >= self.started_at + self.timeout.total_seconds()
        )

    def give_up(self, reason: str) -> None:
        """Tell the handler to stop, and why; what it still writes meets the fence."""
        self.stop.set(reason)
        if self.interrupt is not None:
            self.interrupt()


class Flights:
    """Every flight of this process, from its lease until its verdict is written."""

    def __init__(self, emptied: Callable[[], None]) -> None:
        """Call ``emptied`` whenever the last flight has gone."""
        self._emptied = emptied
        self._lock = threading.Lock()
        self._flights: dict[Lease, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        with self._lock:
            return iter(list(self._flights.values()))

    def overdue(self) -> list[Flight]:
        """Return those whose handlers have used up their timeouts."""
        now = time.monotonic()
        return [flight for flight in self if flight.is_overdue(now)]

    def add(self, flights: Iterable[Flight]) -> None:
        with self._lock:
            self._flights.update({flight.lease: flight for flight in flights})

    def remove(self, leases: Iterable[Lease]) -> list[Flight]:
        """Forget flights; return those that were still known."""
        with self._lock:
            known = [self._flights.pop(lease) for lease in leases if lease in self._flights]
            is_empty = not self._flights
        if is_empty:
            self._emptied()
        return known
