"""The connections of a thread that lives for weeks: which they are, and how one is let go of."""

import contextlib
import threading
from collections.abc import Sequence

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.dispatch import receiver


class _Own(threading.local):
    # None: to be asked for anew. Django's answer takes longer than a handler that does nothing.
    connections: Sequence[BaseDatabaseWrapper] | None = None
    missing: frozenset[str] = frozenset()  # aliases of those that the worker is to make


_own = _Own()


@receiver(connection_created)
def _ask_anew(**_: object) -> None:
    _own.connections = None


def known_connections() -> Sequence[BaseDatabaseWrapper]:
    """Return this thread's connections, to all databases: a handler may meddle with any of them."""
    if _own.connections is None:
        _own.connections = connections.all()
    return _own.connections


def is_at_rest(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether it is one to PostgreSQL that is alive and in no block."""
    if connection.vendor != "postgresql" or connection.in_atomic_block:
        return False
    return connection.connection is not None and not connection.connection.closed


def forget(connection: BaseDatabaseWrapper) -> None:
    """Close it, and drop its wrapper: only a new one does not know of a block never left."""
    with contextlib.suppress(Exception):
        if connection.vendor == "postgresql":
            connection.connection.close()  # or a pool would hand it out again
    with contextlib.suppress(Exception):
        connection.close()
    # Who removed it may have another one in its place by now.
    if any(each is connection for each in connections.all(initialized_only=True)):
        del connections[connection.alias]
    _own.connections = None


def missing_aliases() -> frozenset[str]:
    """Return what the worker is to connect to before a handler that uses it does."""
    if _own.missing:
        _own.missing &= frozenset(connections)  # a project may take one away that it has added
    return _own.missing


def miss(*aliases: str) -> None:
    """Note that the worker is to connect to these first."""
    _own.missing |= frozenset(aliases)


def supply(alias: str) -> None:
    """Connect to it, for a handler. Raises OperationalError where that cannot be."""
    connections[alias].ensure_connection()
    _own.missing -= {alias}
