"""Waits that grow: how long the parts of a worker wait after a failure, which is told once."""

import random

import psycopg

from kanthorq_django.worker.connections.database_errors import UNAVAILABLE
from kanthorq_django.worker.connections.upkeep import note_failure, replace_failed_connections
from kanthorq_django.worker.log import logger


class GrowingWait:
    """Capped, jittered waits that double from one to the next."""

    def __init__(self, first: float, longest: float) -> None:
        """Begin with ``first``; both are seconds."""
        self._first, self._longest = first, longest
        self._wait = first

    def next(self) -> float:
        """Return how many seconds to wait now."""
        wait, self._wait = self._wait, min(self._wait * 2, self._longest)
        return wait * random.uniform(0.5, 1)  # noqa: S311  # not a secret

    def reset(self) -> None:
        self._wait = self._first


class Backoff:
    """Waits that grow from failure to failure; says once what goes wrong."""

    def __init__(self, what: str, *, first: float = 0.1, longest: float = 5.0) -> None:
        """Name ``what`` may fail; ``first`` and ``longest`` waits are seconds."""
        self._what = what
        self._wait = GrowingWait(first, longest)
        self.is_failing = False

    def failed(self, error: BaseException) -> float:
        """Return how many seconds to wait before the next try."""
        note_failure(error)
        replace_failed_connections(error)
        if not self.is_failing:
            self.is_failing = True
            expected = isinstance(error, (*UNAVAILABLE, psycopg.OperationalError))
            logger.warning(
                "%s interrupted, trying again: %s",
                self._what,
                " ".join(str(error).split()),
                exc_info=None if expected else error,
            )
        return self._wait.next()

    def succeeded(self) -> None:
        if self.is_failing:
            self.is_failing = False
            logger.info("%s works again", self._what)
            self._wait.reset()
