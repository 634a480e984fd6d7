"""Waking idle workers: one notification per stream and transaction, after its commit.

A NOTIFY inside the business transaction would make PostgreSQL serialise the commits of the
whole database. The payload is empty: any database user can listen. Workers poll anyway, so a
lost notification costs one poll interval.

A process that publishes without a pause spares itself most of them: whom one wakes looks once
more after ``SETTLE_SECONDS``, so events that commit within ``SPARE_SECONDS`` need no other.
"""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import psycopg
from django.db import connections, transaction
from psycopg.pq import TransactionStatus

from kanthorq_django.conf import get_settings

LONE_AFTER = 0.005  # seconds without an event after which the next one comes alone
CHANNEL = "kanthorq_"  # and the id of a stream: its events
CANCEL_CHANNEL = "kanthorq_cancel"  # some running task was asked to stop
SPARE_SECONDS = 0.003  # from one notification of a stream to the next, in one process
SETTLE_SECONDS = 0.005  # until a worker that was woken looks again; has to be the longer one

_published_at: dict[tuple[str, str], float] = {}


def channel(stream_id: int) -> str:
    """Return the name of the channel that announces events of a stream."""
    return f"{CHANNEL}{stream_id}"


def wake_after_commit(stream_ids: Iterable[int], using: str) -> None:
    """Wake the workers of these streams once the current transaction, if any, has committed."""
    for stream_id in stream_ids:
        _after_commit(_herald(using, channel(stream_id)), using)


def is_lone(stream: str, using: str) -> bool:
    """Tell whether an event may be announced along with its commit, in one round trip.

    Somebody waits for an event that comes alone, and hears of it sooner. In a burst most
    notifications are spared, so they need not be sent along. Counts as publishing.
    """
    now = time.monotonic()
    last, _published_at[using, stream] = _published_at.get((using, stream), 0.0), now
    connection = connections[using]
    return (
        now - last > LONE_AFTER
        and get_settings().NOTIFY
        and not connection.in_atomic_block
        and connection.get_autocommit()
        and _is_idle(connection.connection)
    )


def _is_idle(raw: "psycopg.Connection[Any] | None") -> bool:
    """Tell whether nobody has begun a transaction past Django, which our COMMIT would end."""
    return raw is None or raw.pgconn.transaction_status == TransactionStatus.IDLE


def notify_after_commit(name: str, using: str) -> None:
    """Notify a channel once the current transaction, if any, has committed; once for all of it."""
    _after_commit(_notifier(using, name), using)


def _after_commit(notify: Callable[[], None], using: str) -> None:
    connection = connections[using]
    if not get_settings().NOTIFY or not (connection.get_autocommit() or connection.in_atomic_block):
        return
    # A hook that still waits will do: a savepoint that rolls back takes its hooks along,
    # so the savepoints that this one was registered under are open around us or released.
    if not any(hook[1] is notify for hook in connection.run_on_commit):
        transaction.on_commit(notify, using=using, robust=True)


# One function per channel, so that a hook can be recognised. No functools.partial: Django logs
# the __qualname__ of a robust hook that failed.


@functools.cache
def _notifier(using: str, name: str) -> Callable[[], None]:
    def notify() -> None:
        with connections[using].cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, '')", [name])

    return notify


@functools.cache
def _herald(using: str, name: str) -> Callable[[], None]:
    """Return what notifies a channel unless that has just been done."""
    notify = _notifier(using, name)
    spared_until = 0.0

    def announce() -> None:
        nonlocal spared_until
        now = time.monotonic()
        if now >= spared_until:
            # Noted before, so that whoever is woken looks again later than this.
            spared_until = now + SPARE_SECONDS
            notify()

    return announce
