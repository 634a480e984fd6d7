"""Waking idle workers: one notification per stream and transaction, after its commit.

A NOTIFY inside the business transaction would make PostgreSQL serialise the commits of the
whole database. The payload is empty: any database user can listen. Workers poll anyway, so a
lost notification costs one poll interval.

A process that publishes without a pause spares itself most of them, and more of them the longer
it goes on, for they cost all others who publish. A worker that is woken looks again
``SETTLE_SECONDS`` after each look that found something, and in any case after ``SETTLE_LONGEST``:
by then everything is committed that was not announced for its sake.
"""

import functools
import math
import time
from collections.abc import Callable

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from kanthorq_django.conf import get_settings
from kanthorq_django.sql.transactions import is_outside

LONE_AFTER = 0.005  # seconds in which nothing is published, after which an event comes alone
CHANNEL_PREFIX = "kanthorq_"  # before the id of a stream: its events
CANCEL_CHANNEL = "kanthorq_cancel"  # some running task was asked to stop
SPARE_SECONDS = 0.003  # from one notification of a stream to the next, in one process
SPARE_LONGEST = 0.05  # the same, after it has been doubled again and again
SETTLE_SECONDS = 0.005  # until a worker that was woken, or has found something, looks again
SETTLE_LONGEST = 0.06  # until it looks in any case; has to be longer than what is spared
# Streams, or channels, of which a process remembers what it sent: also of those that were rolled
# back and never are. One that is forgotten while it is used costs a notification more.
REMEMBERED_MAX = 4_096


def channel(stream_id: int) -> str:
    """Return the name of the channel that announces events of a stream."""
    return f"{CHANNEL_PREFIX}{stream_id}"


class Pace:
    """Whether this process publishes into a stream without a pause, and who announces that."""

    def __init__(self) -> None:
        self.goes_on = False
        self.announcer: Announcer | None = None  # of the last event
        self._quiet_since = -math.inf

    def begin(self) -> None:
        """Note that something is being published."""
        # From the end of the last one: how long the database takes is no pause.
        self.goes_on = time.monotonic() - self._quiet_since < LONE_AFTER

    def rest(self) -> None:
        """Note that nothing is being published, for now."""
        self._quiet_since = time.monotonic()


class Announcer:
    """Announces what this process does to one stream, each thing after its commit."""

    def __init__(self, using: str, stream_id: int) -> None:
        self.channel = channel(stream_id)
        self._using = using
        self._pace = Pace()
        self._spared_until = self._pause = 0.0
        self._hook = self._announce  # one object: a hook that waits can be recognised

    def wake_after_commit(self, pace: Pace, connection: BaseDatabaseWrapper) -> None:
        """Wake the workers of the stream once the current transaction, if any, has committed."""
        self._pace, pace.announcer = pace, self
        pace.rest()
        if connection.in_atomic_block or not self._is_spared(time.monotonic()):
            _after_commit(self._hook, connection)

    def spare(self, since: float) -> None:
        """Note that a notification was sent, at ``since`` or later: others may be spared now.

        Whom it woke looks again later than that.
        """
        doubled = min(2 * self._pause, SPARE_LONGEST) if self._pace.goes_on else 0.0
        self._pause = max(SPARE_SECONDS, doubled)
        self._spared_until = since + self._pause

    def _announce(self) -> None:
        now = time.monotonic()
        if not self._is_spared(now):
            notify(self.channel, self._using)
            self.spare(now)
        self._pace.rest()

    def _is_spared(self, now: float) -> bool:
        return self._pace.goes_on and now < self._spared_until


@functools.lru_cache(REMEMBERED_MAX)
def pace(using: str, stream: str) -> Pace:
    """Return the one pace of a stream, by its name: its id is known only from the database."""
    return Pace()


@functools.lru_cache(REMEMBERED_MAX)
def announcer(using: str, stream_id: int) -> Announcer:
    """Return the one announcer of a stream."""
    return Announcer(using, stream_id)


def announcer_with_commit(pace: Pace, connection: BaseDatabaseWrapper) -> Announcer | None:
    """Return who may announce an event in one round trip with its commit; None if nobody.

    Somebody waits for an event that comes alone, and hears of it sooner. In a burst most
    notifications are spared, so they need not be sent along. Of the first event of a stream the
    process does not know yet whom to tell.
    """
    is_alone = not pace.goes_on and get_settings().NOTIFY
    # What somebody has begun past Django is not committed yet.
    return pace.announcer if is_alone and is_outside(connection) else None


def notify_after_commit(name: str, connection: BaseDatabaseWrapper) -> None:
    """Notify a channel once the current transaction, if any, has committed; once for all of it."""
    _after_commit(_notifier(connection.alias, name), connection)


def _after_commit(hook: Callable[[], None], connection: BaseDatabaseWrapper) -> None:
    # Of what was begun past Django nobody tells when it commits: workers poll.
    if not (get_settings().NOTIFY and (connection.in_atomic_block or is_outside(connection))):
        return
    # A hook that still waits will do: a savepoint that rolls back takes its hooks along,
    # so the savepoints that this one was registered under are open around us or released.
    if not any(waiting[1] is hook for waiting in connection.run_on_commit):
        connection.on_commit(hook, robust=True)


# One function per channel, so that a hook can be recognised. No functools.partial: Django logs
# the __qualname__ of a robust hook that failed.


@functools.lru_cache(REMEMBERED_MAX)
def _notifier(using: str, name: str) -> Callable[[], None]:
    return lambda: notify(name, using)


def notify(name: str, using: str) -> None:
    """Notify the channel ``name`` now, or with the commit of an open transaction."""
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, '')", [name])
