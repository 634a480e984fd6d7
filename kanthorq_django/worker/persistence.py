"""Tries to write, again and again, until the database takes what it is given or never will."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from django.db import DatabaseError, connections

from kanthorq_django.domain.interrupts import is_interrupt
from kanthorq_django.worker.backoff import Backoff
from kanthorq_django.worker.connections.database_errors import is_about_values, is_unavailable
from kanthorq_django.worker.connections.suspicion import (
    replace_suspect_connections,
    suspect_sessions,
)
from kanthorq_django.worker.connections.upkeep import CHECK_AFTER_IDLE, drop_connections
from kanthorq_django.worker.warden import Bounded

Write = Callable[[Sequence[Any]], None]


class Persistence:
    """That of one thread, on its connection to the database ``using``."""

    def __init__(self, what: str, using: str, bounded: Bounded, *, is_patient: bool) -> None:
        """One that ``is_patient`` waits where a right or a table is missing; others raise."""
        self._using = using
        self._bounded = bounded
        self._is_patient = is_patient
        self._backoff = Backoff(what)
        self._is_over = threading.Event()
        self._used_at = time.monotonic()

    def wait(self, seconds: float) -> bool:
        """Wait; return whether nothing is to be tried any more."""
        return self._is_over.wait(seconds)

    def give_up(self) -> None:
        """Try nothing any more, from whatever thread."""
        self._is_over.set()

    def refusal_of(self, write: Write, given: Sequence[Any]) -> BaseException | None:
        """Have ``write`` write what is given; return why the database will never take it.

        None where it was written, and where there is nothing to write or no time for it any more.
        """
        is_intact = False  # no right, table or schema was missing after the last failure
        while given and not self._is_over.is_set():
            error = self._failure_of(write, given)
            if error is None:
                self._backoff.succeeded()
                self._used_at = time.monotonic()
                return None
            if _is_about_given(error) or (is_intact and not is_unavailable(error)):
                return error
            # What was missing may have come back in between: then it takes the same now.
            is_intact = not is_unavailable(error) and self._takes_nothing(write)
            if not is_intact:
                self._wait_after(error)
        return None

    def _failure_of(self, write: Write, given: Sequence[Any]) -> BaseException | None:
        """Run ``write``; return what went wrong, also in a new session if its own is suspect.

        Or was lost while it rested: that the server was restarted meanwhile is no trouble.
        """
        error = self._try(write, given)
        if error is None:
            return None
        if is_unavailable(error):
            if not self._was_lost_at_rest():
                return error
            drop_connections()
        elif not replace_suspect_connections():
            return error
        return self._try(write, given)

    def _was_lost_at_rest(self) -> bool:
        raw = connections[self._using].connection
        has_rested = time.monotonic() - self._used_at > CHECK_AFTER_IDLE
        return has_rested and not self._backoff.is_failing and getattr(raw, "closed", False)

    def _try(self, write: Write, given: Sequence[Any]) -> BaseException | None:
        try:
            with self._bounded(connections[self._using]):
                write(given)
        except BaseException as error:  # nothing that is written may end this thread
            if is_interrupt(error):
                raise
            suspect_sessions(error)
            return error
        return None

    def _takes_nothing(self, write: Write) -> bool:
        """Tell whether ``write`` goes well where it is given nothing.

        Where it does not, a right, a table or a schema is missing, maybe for a moment, and nothing
        that was given is to blame.
        """
        return self._failure_of(write, ()) is None

    def _wait_after(self, error: BaseException) -> None:
        """Let the database come back, or give back what it has taken away, in a new session."""
        if not (self._is_patient or is_unavailable(error)):
            raise error
        drop_connections()
        self._is_over.wait(self._backoff.failed(error))


def _is_about_given(error: BaseException) -> bool:
    """Tell whether ``error`` can only be about what was to be written."""
    if is_unavailable(error):
        return False
    return is_about_values(error) or not isinstance(error, DatabaseError)
