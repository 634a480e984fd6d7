"""Waking idle workers: one notification per stream and transaction, after its commit.

A NOTIFY inside the business transaction would make PostgreSQL serialise the commits of the
whole database. The payload is empty: any database user can listen. Workers poll anyway, so a
lost notification costs one poll interval.

A process that publishes without a pause spares itself most of them, and more of them the longer
it goes on, for they cost all others who publish. Whom one wakes looks again ``SETTLE_SECONDS``
after each look that found something, and in any case after ``SETTLE_LONGEST``: by then whatever
was spared is committed.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import psycopg
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from kanthorq_django.conf import get_settings

LONE_AFTER = 0.005  # seconds in which nothing is published, after which an event comes alone
CHANNEL = "kanthorq_"  # and the id of a stream: its events
CANCEL_CHANNEL = "kanthorq_cancel"  # some running task was asked to stop
SPARE_SECONDS = 0.003  # from one notification of a stream to the next, in one process
SPARE_LONGEST = 0.05  # the same, after it has been doubled again and again
SETTLE_SECONDS = 0.005  # until a worker that was woken, or has found something, looks again
SETTLE_LONGEST = 0.06  # until it looks in any case; has to be longer than what is spared


def channel(stream_id: int) -> str:
    """Return the name of the channel that announces events of a stream."""
    return f"{CHANNEL}{stream_id}"


class Herald:
    """Announces what this process does to one stream, each thing after its commit."""

    def __init__(self, using: str) -> None:
        self._using, self._channel = using, ""
        self._goes_on = False
        self._quiet_since, self._spared_until, self._pause = -math.inf, 0.0, 0.0
        self._hook = self._announce  # one object: a hook that waits can be recognised

    def begin(self) -> None:
        """Note that something is being published."""
        # From the end of the last one: how long the database takes is no pause.
        self._goes_on = time.monotonic() - self._quiet_since < LONE_AFTER

    def goes_along(self, connection: BaseDatabaseWrapper) -> bool:
        """Tell whether what has begun is to be announced in one round trip with its commit.

        Somebody waits for an event that comes alone, and hears of it sooner. In a burst most
        notifications are spared, so they need not be sent along. Whoever is told so does it, and
        then calls ``rest()``.
        """
        goes_along = (
            not self._goes_on
            and get_settings().NOTIFY
            and not connection.in_atomic_block
            and connection.get_autocommit()
            and _is_idle(connection.connection)
        )
        if goes_along:
            self._spare()
        return goes_along

    def wake_after_commit(self, stream_id: int, connection: BaseDatabaseWrapper) -> None:
        """Wake the workers of the stream once the current transaction, if any, has committed."""
        self._channel = channel(stream_id)
        _after_commit(self._hook, connection)

    def rest(self) -> None:
        """Note that nothing is published any more, for now."""
        self._quiet_since = time.monotonic()

    def _announce(self) -> None:
        if not self._goes_on or time.monotonic() >= self._spared_until:
            self._spare()
            notify(self._channel, self._using)
        self.rest()

    def _spare(self) -> None:
        """Note that a notification is sent: before, so that whom it wakes looks again later."""
        self._pause = min(2 * self._pause, SPARE_LONGEST) if self._goes_on else SPARE_SECONDS
        self._spared_until = time.monotonic() + self._pause


@functools.cache
def herald(using: str, stream: str) -> Herald:
    """Return the one herald of a stream."""
    return Herald(using)


def _is_idle(raw: "psycopg.Connection[Any] | None") -> bool:
    """Tell whether nobody has begun a transaction past Django, which our COMMIT would end."""
    return raw is None or raw.pgconn.transaction_status == TransactionStatus.IDLE


def notify_after_commit(name: str, connection: BaseDatabaseWrapper) -> None:
    """Notify a channel once the current transaction, if any, has committed; once for all of it."""
    _after_commit(_notifier(connection.alias, name), connection)


def _after_commit(hook: Callable[[], None], connection: BaseDatabaseWrapper) -> None:
    if not (get_settings().NOTIFY and (connection.autocommit or connection.in_atomic_block)):
        return
    # A hook that still waits will do: a savepoint that rolls back takes its hooks along,
    # so the savepoints that this one was registered under are open around us or released.
    if not any(waiting[1] is hook for waiting in connection.run_on_commit):
        connection.on_commit(hook, robust=True)


# One function per channel, so that a hook can be recognised. No functools.partial: Django logs
# the __qualname__ of a robust hook that failed.


@functools.cache
def _notifier(using: str, name: str) -> Callable[[], None]:
    return lambda: notify(name, using)


def notify(name: str, using: str) -> None:
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, '')", [name])
