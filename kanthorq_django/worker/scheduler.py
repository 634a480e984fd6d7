"""A worker's turn at the schedules: whoever comes first publishes what is due."""

import time
from collections.abc import Iterable

from kanthorq_django.domain.failures import one_line
from kanthorq_django.models import Schedule
from kanthorq_django.models.scheduling.occurrences import TURN_SIZE, Unpublished
from kanthorq_django.worker.backoff import Backoff
from kanthorq_django.worker.log import logger

LOOK_EVERY = 5.0  # seconds after which a schedule that was added meanwhile is noticed
OTHERS_AT_IT = 1.0  # seconds to leave what is due to the worker that has it locked


class Scheduler:
    """Publishes due occurrences; it knows when the next one is, so it hardly ever asks."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._next_look = time.monotonic()
        self._backoff = Backoff("scheduler", longest=LOOK_EVERY)
        self._told: set[str] = set()  # names of schedules in trouble, which is said once

    @property
    def seconds(self) -> float:
        """In how many seconds its next turn is due."""
        return max(0.0, self._next_look - time.monotonic())

    def turn(self) -> int:
        """Publish what is due, or some of it; return how many events that made."""
        schedules = Schedule.objects.using(self._using)
        count = schedules.publish_due(limit=TURN_SIZE)  # tasks wait meanwhile
        seconds = schedules.seconds_to_next()
        if seconds is not None and seconds <= 0 and not count:
            seconds = OTHERS_AT_IT
        rest = LOOK_EVERY if seconds is None else min(max(seconds, 0.0), LOOK_EVERY)
        self._next_look = time.monotonic() + rest
        self._backoff.succeeded()
        self._told.clear()
        return count

    def postpone(self, error: Exception) -> None:
        """Come back later after ``error``, which must not keep events from their consumers."""
        self._tell(error.exceptions if isinstance(error, ExceptionGroup) else ())
        self._next_look = time.monotonic() + self._backoff.failed(error)

    def _tell(self, errors: Iterable[Exception]) -> None:
        for error in errors:
            if isinstance(error, Unpublished) and error.name not in self._told:
                self._told.add(error.name)
                logger.warning("A schedule could not publish; %s", one_line(str(error)))
