"""Handlers that are deaf to their timeouts: Python cannot end what runs in a thread."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta

from kanthorq_django.worker.flight import Flight, Flights
from kanthorq_django.worker.lanes.lane import Lane

# Attempts of one task that run here at a time, all but the last beyond their timeouts; and until it
# is offered again where there are so many.
AT_ONCE_MAX = 2
STILL_RUNNING = timedelta(seconds=5)
DEAF_AFTER = 30.0  # seconds beyond its timeout that a handler is still expected to end
CHECKED_EVERY = 5.0  # seconds


class Deafness:
    """What is known of it in one worker process."""

    def __init__(self, flights: Flights, lanes: Mapping[bool, Lane]) -> None:
        """Look at ``flights``, which run in ``lanes``, by whether their handlers are coroutines."""
        self._flights = flights
        self._lanes = lanes
        self._checked_at = -math.inf
        self._late_since: dict[Flight, float] = {}  # when handlers were first seen to be overdue

    def still_running(self, flights: Iterable[Flight]) -> set[Flight]:
        """Return those whose tasks run here as often as they may.

        They would take one thread after the other, and be as deaf to their timeouts in each.
        """
        if not (overdue := self._flights.overdue()):
            return set()
        counts = Counter(flight.lease.task_id for flight in overdue)
        return {flight for flight in flights if counts[flight.lease.task_id] >= AT_ONCE_MAX}

    def is_total(self) -> bool:
        """Tell whether handlers that should have ended long ago take all places of a lane.

        By how long they were seen to be late: who was frozen along with this process may yet end.
        """
        now = time.monotonic()
        if now < self._checked_at + CHECKED_EVERY:
            return False
        self._checked_at = now
        known, late = self._late_since, self._flights.overdue()
        self._late_since = {flight: known.get(flight, now) for flight in late}
        return any(self._takes_all_of(kind, now - DEAF_AFTER) for kind in self._lanes)

    def _takes_all_of(self, kind: bool, moment: float) -> bool:
        """Tell it of a lane, some of whose places may wait to begin, or have just ended."""
        lane = self._lanes[kind]
        is_blocked = lane.is_blocked_since(moment)  # then one takes all: none begins behind it
        if not (lane.is_full or is_blocked):
            return False
        begun = [
            flight
            for flight in self._flights
            if flight.is_async is kind and flight.started_at is not None
        ]
        if len({flight.place for flight in begun}) < (1 if is_blocked else lane.concurrency):
            return False
        return all(self._late_since.get(flight, math.inf) <= moment for flight in begun)
