"""Waking idle workers: one notification per stream and transaction, after its commit.

A NOTIFY inside the business transaction would make PostgreSQL serialise the commits of the
whole database. The payload is empty: any database user can listen. Workers poll anyway, so a
lost notification costs one poll interval.
"""

import functools
from collections.abc import Callable, Iterable

from django.db import connections, transaction

from kanthorq_django.conf import get_settings

CANCEL_CHANNEL = "kanthorq_cancel"  # some running task was asked to stop


def channel(stream_id: int) -> str:
    """Return the name of the channel that announces events of a stream."""
    return f"kanthorq_{stream_id}"


def wake_after_commit(stream_ids: Iterable[int], using: str) -> None:
    """Wake the workers of these streams once the current transaction, if any, has committed."""
    for stream_id in stream_ids:
        notify_after_commit(channel(stream_id), using)


def notify_after_commit(name: str, using: str) -> None:
    """Notify a channel once the current transaction, if any, has committed; once for all of it."""
    connection = connections[using]
    if not get_settings().NOTIFY or not (connection.get_autocommit() or connection.in_atomic_block):
        return
    notify = _notifier(using, name)
    # A hook that still waits will do: a savepoint that rolls back takes its hooks along,
    # so the savepoints that this one was registered under are open around us or released.
    if not any(hook[1] is notify for hook in connection.run_on_commit):
        transaction.on_commit(notify, using=using, robust=True)


@functools.cache
def _notifier(using: str, name: str) -> Callable[[], None]:
    """One function per channel, so that a hook can be recognised."""

    # No functools.partial: Django logs the __qualname__ of a robust hook that failed.
    def notify() -> None:
        with connections[using].cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, '')", [name])

    return notify
