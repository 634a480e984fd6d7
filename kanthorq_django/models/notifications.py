"""Waking idle workers: one notification per stream and transaction, after its commit.

A NOTIFY inside the business transaction would make PostgreSQL serialise the commits of the
whole database. The payload is empty: any database user can listen. Workers poll anyway, so a
lost notification costs one poll interval.
"""

import functools
from collections.abc import Callable, Iterable

from django.db import connections, transaction

from kanthorq_django.conf import get_settings


def channel(stream_id: int) -> str:
    """Return the name of the channel that announces events of a stream."""
    return f"kanthorq_{stream_id}"


def wake_after_commit(stream_ids: Iterable[int], using: str) -> None:
    """Wake the workers of these streams once the current transaction, if any, has committed."""
    connection = connections[using]
    if not get_settings().NOTIFY or not (connection.get_autocommit() or connection.in_atomic_block):
        return
    for stream_id in stream_ids:
        wake = _wake(using, stream_id)
        # A hook that still waits will do: a savepoint that rolls back takes its hooks along,
        # so the savepoints that this one was registered under are open around us or released.
        if not any(hook[1] is wake for hook in connection.run_on_commit):
            transaction.on_commit(wake, using=using, robust=True)


@functools.cache
def _wake(using: str, stream_id: int) -> Callable[[], None]:
    """One function per stream, so that a hook can be recognised."""

    # No functools.partial: Django logs the __qualname__ of a robust hook that failed.
    def wake() -> None:
        with connections[using].cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, '')", [channel(stream_id)])

    return wake
