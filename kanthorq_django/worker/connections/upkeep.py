"""Keeping database connections usable in threads that live for weeks."""

import contextlib
import threading
import time
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from kanthorq_django.sql.transactions import is_idle
from kanthorq_django.worker.connections.absences import refused_aliases, tried
from kanthorq_django.worker.connections.access_modes import (
    is_altered,
    is_outdated,
    note_refused_write,
)
from kanthorq_django.worker.connections.left_wrappers import has_left_wrappers
from kanthorq_django.worker.connections.loans import ANYBODY, has_used, lend, note_use, take_back
from kanthorq_django.worker.connections.own_connections import (
    forget,
    is_at_rest,
    known_connections,
    miss,
    missing_aliases,
    supply,
)
from kanthorq_django.worker.connections.scarcity import are_scarce, note_refused_connection
from kanthorq_django.worker.connections.suspicion import (
    add_suspicion,
    replace_suspect_connections,
    suspect_sessions,
    take_suspicion,
)
from kanthorq_django.worker.warden import Bounded

CHECK_AFTER_IDLE = 1.0  # seconds a connection may rest before it is tried out

# libpq's own defaults wait for hours on a host that is gone without a word.
CONNECTION_OPTIONS = {
    "connect_timeout": 10,  # seconds
    "keepalives_idle": 30,  # seconds
    "keepalives_interval": 10,  # seconds
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}


class _LastUse(threading.local):
    at = 0.0  # when the connections of this thread were last used


_last_use = _LastUse()


def expect_dead_hosts() -> None:
    """Give this process's connections time limits where the project's settings have none."""
    for connection in connections.all():
        if connection.vendor == "postgresql":
            options = connection.settings_dict.setdefault("OPTIONS", {})
            options.update(CONNECTION_OPTIONS | options)


def refresh_connections(
    bounded: Bounded,
    *,
    borrower: str = ANYBODY,
    using: str | None = None,
    are_suspect: bool = False,
) -> None:
    """Leave this thread only with connections that a handler can use right away.

    A handler may have left one broken, and the server may have been restarted while a thread was
    idle; what is left inside a transaction ``leave_connections()`` sees to. CONN_MAX_AGE is meant
    for requests: a worker's connections live as long as they work. ``bounded`` limits the time
    that a probe may take; ``are_suspect`` says that something failed on them which another thread
    has noticed.

    Raises OperationalError when a connection was lost and there is no new one to be had: a
    handler that is started now would use up an attempt for nothing. A database other than
    ``using``, that of the tasks, is made sure of for a ``borrower`` that has used it before; it is
    OtherDatabaseAway then.
    """
    take_back()
    if are_suspect:
        add_suspicion()
    if lost := [*_forget_unsound(bounded), *replace_suspect_connections()]:
        miss(*lost)
    if missing_aliases() or refused_aliases():
        _connect_to_missing(bounded, borrower, using)
    lend(borrower)


def _connect_to_missing(bounded: Bounded, borrower: str, using: str | None) -> None:
    missing = missing_aliases()
    for alias in missing.union(refused_aliases()).intersection(connections):
        connection, is_missing = connections[alias], alias in missing
        if using in {None, alias}:  # the tasks' own, or it may be
            if is_missing:
                with bounded(connection):
                    supply(alias)
        elif has_used(borrower, alias) or (borrower == ANYBODY and is_missing):
            with tried(connection), bounded(connection):
                supply(alias)


def _forget_unsound(bounded: Bounded) -> list[str]:
    """Let go of connections that no handler is to have; return their aliases."""
    now = time.monotonic()
    has_rested = now - _last_use.at > CHECK_AFTER_IDLE
    found = [
        connection
        for connection in known_connections()
        if not _is_sound(connection, bounded, has_rested=has_rested)
    ]
    for connection in found:
        forget(connection)
    _last_use.at = now
    return [connection.alias for connection in found]


def _is_sound(connection: BaseDatabaseWrapper, bounded: Bounded, *, has_rested: bool) -> bool:
    try:
        if connection.in_atomic_block:
            return False
        if connection.connection is None:
            return not connection.errors_occurred
        if _is_closed(connection.connection) or is_outdated(connection):
            return False
        if has_rested or connection.errors_occurred:
            with bounded(connection):
                is_usable = connection.is_usable()
            connection.errors_occurred = False
            return is_usable
    except Exception:  # noqa: BLE001  # whatever is wrong with it, a new one is better
        return False
    return True


def leave_connections() -> None:
    """Note that a handler has used this thread's connections; close what it left in disorder.

    What it locked in a block that it left open would stay locked for as long as the thread has
    nothing else to do, and what the next handlers write would never be committed, or be refused.
    """
    for connection in known_connections():
        if has_left_wrappers(connection) or _is_in_disorder(connection):
            forget(connection)
    _last_use.at = time.monotonic()


def _is_in_disorder(connection: BaseDatabaseWrapper) -> bool:
    if connection.connection is None:  # as to databases that no handler has used
        if connection.errors_occurred:
            note_use(connection)
        return False
    return _is_left_open(connection) or is_altered(connection) or is_outdated(connection)


def _is_left_open(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether it is in a transaction; one that is lost ``refresh_connections()`` replaces."""
    raw = connection.connection
    if _is_closed(raw):
        return False
    is_autocommit: bool = connection.settings_dict["AUTOCOMMIT"]
    if connection.in_atomic_block or connection.autocommit != is_autocommit:
        return True
    if connection.vendor != "postgresql" or not connection.autocommit:
        return False
    # By a BEGIN of the handler's own, or by psycopg itself.
    return not (raw.autocommit and is_idle(raw))


def _is_closed(raw: Any) -> bool:
    return getattr(raw, "closed", False)  # psycopg's knows, others do not tell


def spare_connections() -> None:
    """Give this thread's connections back if they are scarce: so all parts get their turn."""
    if are_scarce():
        replace_suspect_connections()
        connections.close_all()
        take_suspicion()  # there is none left, or a pool may give it to anybody


def drop_connections() -> None:
    """Close this thread's connections after a failure, which a pool would give to others."""
    for connection in connections.all(initialized_only=True):
        if is_at_rest(connection):
            with contextlib.suppress(Exception):
                connection.connection.close()
    connections.close_all()
    take_suspicion()


def note_failure(error: BaseException | None) -> None:
    """Remember what ``error`` says of connections: that none was left, or that one may not write.

    What one thread meets concerns all.
    """
    note_refused_connection(error)
    note_refused_write(error)


def replace_failed_connections(error: BaseException) -> None:
    """Let go of this thread's connections whose sessions may be to blame for ``error``.

    Or may not write, where new ones might.
    """
    suspect_sessions(error)
    replace_suspect_connections()
    for connection in known_connections():
        if is_outdated(connection):
            forget(connection)
