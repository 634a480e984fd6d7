"""Waking idle workers: one notification per stream and transaction, after its commit.

A NOTIFY inside the business transaction would make PostgreSQL serialise the commits of the
whole database. The payload is empty: any database user can listen. Workers poll anyway, so a
lost notification costs one poll interval.
"""

import functools
from collections.abc import Iterable

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
    savepoints = set(connection.savepoint_ids)
    for stream_id in stream_ids:
        wake = _wake(using, stream_id)
        # A hook that waits under the same savepoints shares our fate: it will do for both.
        if not any(
            hook is wake and hook_savepoints <= savepoints
            for hook_savepoints, hook, _ in connection.run_on_commit
        ):
            transaction.on_commit(wake, using=using, robust=True)


@functools.cache
def _wake(using: str, stream_id: int) -> "functools.partial[None]":
    """One object per stream, so that a hook can be recognised."""
    return functools.partial(_notify, using, stream_id)


def _notify(using: str, stream_id: int) -> None:
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT pg_notify(%s, '')", [channel(stream_id)])
