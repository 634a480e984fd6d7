"""Keeping database connections usable in threads that live for weeks."""

import logging
import random
import threading
import time
from datetime import timedelta

from django.db import InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

logger = logging.getLogger("kanthorq_django.worker")

# What the database's absence looks like; everything else is a defect and is not retried.
UNAVAILABLE = (OperationalError, InterfaceError)

CHECK_AFTER_IDLE = 1.0  # seconds a connection may rest before it is tried out
_rested = threading.local()


def refresh_connections() -> None:
    """Leave this thread only with connections that a handler can use right away.

    A handler may have left one broken or inside a transaction, and the server may have been
    restarted while a thread was idle. CONN_MAX_AGE is meant for requests: a worker's
    connections live as long as they work.
    """
    now = time.monotonic()
    has_rested = now - getattr(_rested, "since", 0.0) > CHECK_AFTER_IDLE
    for connection in connections.all(initialized_only=True):
        if connection.connection is None:
            continue
        if _is_dangling(connection) or not (
            _is_fresh(connection, has_rested=has_rested) or connection.is_usable()
        ):
            connection.close()
        connection.errors_occurred = False
    _rested.since = now


def _is_dangling(connection: BaseDatabaseWrapper) -> bool:
    return connection.in_atomic_block or not connection.get_autocommit()


def _is_fresh(connection: BaseDatabaseWrapper, *, has_rested: bool) -> bool:
    return not (has_rested or connection.errors_occurred)


def note_use() -> None:
    """Remember that this thread's connections have just been in use."""
    _rested.since = time.monotonic()


class Backoff:
    """Capped, jittered waits between tries while the database is away; logs once per change."""

    FIRST = timedelta(milliseconds=100)
    LONGEST = timedelta(seconds=5)

    def __init__(self, what: str, stop: threading.Event) -> None:
        self._what = what
        self._stop = stop
        self._wait = self.FIRST

    def failed(self, error: Exception) -> None:
        """Drop this thread's connections and wait; returns early when the worker stops."""
        if self._wait == self.FIRST:
            logger.warning("%s interrupted, trying again: %s", self._what, error)
        connections.close_all()
        jitter = random.uniform(0.5, 1)  # noqa: S311  # not a secret
        self._stop.wait(self._wait.total_seconds() * jitter)
        self._wait = min(self._wait * 2, self.LONGEST)

    def succeeded(self) -> None:
        if self._wait != self.FIRST:
            logger.warning("%s works again", self._what)
            self._wait = self.FIRST
