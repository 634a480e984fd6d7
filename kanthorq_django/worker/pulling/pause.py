"""How long a consumer is left alone, as others are at its rows or its statements fail."""

import time

from kanthorq_django.models import Consumer
from kanthorq_django.worker.backoff import Backoff, GrowingWait

PAUSE_FIRST, PAUSE_LONGEST = 0.05, 1.0  # seconds, where others are at the same rows


class Pause:
    """The pause of one consumer."""

    def __init__(self, consumer: Consumer, longest: float) -> None:
        self._contention = GrowingWait(PAUSE_FIRST, longest)
        self._failure = Backoff(f"consumer {consumer.name}", first=0.5)
        self._until = 0.0
        self._is_contended = False

    @property
    def seconds(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def relent(self) -> None:
        """End the pause if it was for contention."""
        if self._is_contended:
            self._contention.reset()
            self._until = 0.0

    def update(self, failure: Exception | None, *, has_progressed: bool) -> None:
        """Note what became of a visit, and how long to wait with the next one."""
        self._is_contended = failure is None
        wait = self._failure.failed(failure) if failure else self._contention.next()
        if not failure:
            self._failure.succeeded()
        if has_progressed:
            self._contention.reset()
        else:
            self._until = time.monotonic() + wait
