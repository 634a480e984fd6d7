"""From which moment on a look for due tasks has to begin.

Every write of a due time sets it to the moment of the writing, or later. So where a look found
nothing due, nothing can be later but what is committed by then: by a transaction that was open
for longer than the margin. Looks that begin at the beginning, now and then, find those.
"""

import time
from collections.abc import Iterable
from typing import Any

from kanthorq_django.models.delivery.cursor import NO_FLOOR

MARGIN = 10_000_000  # microseconds that a transaction may be open and is found at once
FULL_EVERY = 1.0  # seconds between looks from the beginning, at least
FULL_SHARE = 20  # times as long as such a look takes, where it takes long


class Floors:
    """What a worker knows about its consumers: nothing is due before, in microseconds since 1970.

    Without them each look wades through the entries of all tasks that were finished since the
    oldest snapshot that somebody holds.
    """

    def __init__(self, consumer_ids: Iterable[int]) -> None:
        self._floors = dict.fromkeys(consumer_ids, NO_FLOOR)
        self._began_at = 0.0
        self._is_full = False
        self._next_full = 0.0

    def __getitem__(self, consumer_id: int) -> int:
        return self._floors[consumer_id]

    def begin(self) -> dict[int, int]:
        """Return where the next look begins for each consumer."""
        self._began_at = time.monotonic()
        self._is_full = self._began_at >= self._next_full
        return dict.fromkeys(self._floors, NO_FLOOR) if self._is_full else dict(self._floors)

    def learn(self, rows: Iterable[Any]) -> None:
        """Note what the look found."""
        if self._is_full:
            now = time.monotonic()
            self._next_full = now + max(FULL_EVERY, FULL_SHARE * (now - self._began_at))
        for row in rows:
            found = row.looked_at if row.due_at is None else row.due_at
            self._floors[row.id] = min(found, row.looked_at - MARGIN)

    def forget(self) -> bool:
        """Begin the next look at the beginning; tell whether the last one did."""
        self._next_full = 0.0
        return self._is_full
