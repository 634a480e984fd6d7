"""Keeping database connections usable in threads that live for weeks."""

import contextlib
import math
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import psycopg
from django.db import Error, IntegrityError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.dispatch import receiver
from psycopg.errors import DeadlockDetected, ReadOnlySqlTransaction, SerializationFailure

from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.sql.transactions import is_idle
from kanthorq_django.worker.database_errors import is_about_values
from kanthorq_django.worker.warden import Bounded

# How the server, a pooler, or psycopg's pool, says that it has no connection left; there is no code
# before one is made. In another language than English a worker only waits, as for a server that is
# away.
_REFUSALS = (
    *("too many connections", "too many clients", "connection slots", "no more connections"),
    "couldn't get a connection",
)
SCARCE_FOR = 10.0  # seconds after a refusal
_refused_at = float("-inf")

# Of a worker, with a connection each: puller, renewer, acknowledger, listener, and where coroutines
# have Django's ORM work.
OWN_THREADS = 5
_POOL_SIZE_DEFAULT = 4  # psycopg_pool's
CHECK_AFTER_IDLE = 1.0  # seconds a connection may rest before it is tried out
READ_ONLY_FOR = 1.0  # seconds at least between two sessions that may not write
# Seconds at least between two times that a thread's sessions are replaced for what failed on them:
# they double while that goes on. Where handlers fail a thousand times a second, most of the time
# would go into connecting; and a new session may be spoilt as soon as the last one was.
REPLACED_FIRST, REPLACED_EVERY = 0.03, 1.0
CAUSES_MAX = 10  # errors that are looked at for one of the database among their causes


class _Own(threading.local):
    """What a thread knows of its own connections."""

    used_at = 0.0
    are_suspect = False  # something has failed for which its sessions may be to blame
    replaced_at = float("-inf")  # when they were replaced for that
    replace_after = 0.0  # seconds after which they may be again
    # None: to be asked for anew. Django's answer takes longer than a handler that does nothing.
    connections: Sequence[BaseDatabaseWrapper] | None = None


_own = _Own()

# Whether what they begin may write, as it was when they were first made: a pool gives them again.
_access: WeakKeyDictionary[Any, "_Access"] = WeakKeyDictionary()
_read_only_until = float("-inf")  # the last moment at which a write was refused for that


@receiver(connection_created)
def _note_connection(connection: BaseDatabaseWrapper, **_: object) -> None:
    _own.connections = None
    if connection.vendor == "postgresql":
        raw = connection.connection
        _access.setdefault(raw, _Access(_access_of(raw), time.monotonic()))


# libpq's own defaults wait for hours on a host that is gone without a word.
CONNECTION_OPTIONS = {
    "connect_timeout": 10,  # seconds
    "keepalives_idle": 30,  # seconds
    "keepalives_interval": 10,  # seconds
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}


def expect_dead_hosts() -> None:
    """Give this process's connections time limits where the project's settings have none."""
    for connection in connections.all():
        if connection.vendor == "postgresql":
            options = connection.settings_dict.setdefault("OPTIONS", {})
            options.update(CONNECTION_OPTIONS | options)


def pool_size(connection: BaseDatabaseWrapper) -> float:
    """Return how many connections Django's pool has at most; infinite without a pool."""
    options = connection.settings_dict["OPTIONS"].get("pool")
    if not isinstance(options, dict):
        return _POOL_SIZE_DEFAULT if options else math.inf
    return int(options.get("max_size") or options.get("min_size", _POOL_SIZE_DEFAULT))


def expect_small_pools(concurrency: int) -> None:
    """Have threads share connections from the start where a pool has not one for each of them.

    To find out by a refusal takes the pool's ``timeout``, which may be longer than leases last.
    """
    global _refused_at  # noqa: PLW0603  # it concerns all threads
    if any(pool_size(each) < concurrency + OWN_THREADS for each in connections.all()):
        _refused_at = math.inf


def refresh_connections(bounded: Bounded, *, are_suspect: bool = False) -> None:
    """Leave this thread only with connections that a handler can use right away.

    A handler may have left one broken, and the server may have been restarted while a thread was
    idle; what is left inside a transaction ``leave_connections()`` sees to. CONN_MAX_AGE is meant
    for requests: a worker's connections live as long as they work. ``bounded`` limits the time
    that a probe may take; ``are_suspect`` says that something failed on them which another thread
    has noticed.

    Raises OperationalError when a connection was lost and there is no new one to be had: a
    handler that is started now would use up an attempt for nothing.
    """
    now = time.monotonic()
    _own.are_suspect |= are_suspect
    has_rested = now - _own.used_at > CHECK_AFTER_IDLE
    lost = []
    for connection in _known_connections():
        if not _is_sound(connection, bounded, has_rested=has_rested):
            lost.append(connection.alias)
            _forget(connection)
    lost += replace_suspect_connections()
    _own.used_at = now
    for alias in lost:
        with bounded(connections[alias]):
            connections[alias].ensure_connection()


def _known_connections() -> Sequence[BaseDatabaseWrapper]:
    if _own.connections is None:
        _own.connections = connections.all(initialized_only=True)
    return _own.connections


def _is_sound(connection: BaseDatabaseWrapper, bounded: Bounded, *, has_rested: bool) -> bool:
    try:
        if connection.in_atomic_block or _is_outdated(connection):
            return False
        if connection.connection is None:
            return not connection.errors_occurred
        if has_rested or connection.errors_occurred:
            with bounded(connection):
                is_usable = connection.is_usable()
            connection.errors_occurred = False
            return is_usable
    except Exception:  # noqa: BLE001  # whatever is wrong with it, a new one is better
        return False
    return True


def _forget(connection: BaseDatabaseWrapper) -> None:
    """Close it, and drop its wrapper: only a new one does not know of a block never left."""
    with contextlib.suppress(Exception):
        if connection.vendor == "postgresql":
            connection.connection.close()  # or a pool would hand it out again
    with contextlib.suppress(Exception):
        connection.close()
    del connections[connection.alias]
    _own.connections = None


def _is_left_open(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether it is in a transaction; one that is lost ``refresh_connections()`` replaces."""
    raw = connection.connection
    is_lost = raw is None or getattr(raw, "closed", False)  # psycopg's knows, others do not tell
    return not is_lost and _is_dangling(connection)


def _is_dangling(connection: BaseDatabaseWrapper) -> bool:
    raw = connection.connection
    if connection.in_atomic_block or raw is None:
        return connection.in_atomic_block
    if connection.autocommit != connection.settings_dict["AUTOCOMMIT"]:
        return True
    if connection.vendor != "postgresql" or not connection.autocommit:
        return False
    # By a BEGIN of the handler's own, or by psycopg itself.
    return not (raw.autocommit and is_idle(raw))


def _is_altered(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether a handler has made its session one that may not write, or may.

    Without asking: the server reports the setting whenever it changes.
    """
    raw = connection.connection
    if connection.vendor != "postgresql" or raw is None or raw.closed:
        return False
    made_with = _access.get(raw)
    return made_with is not None and made_with.modes != _access_of(raw)


def _is_outdated(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether its session may not write, and a new one might, as some write was refused.

    A session keeps the default that the database or the role had when it began.
    """
    raw = connection.connection
    if connection.vendor != "postgresql" or raw is None or raw.closed:
        return False
    made_with = _access.get(raw)
    if made_with is None or made_with.since > _read_only_until - READ_ONLY_FOR:
        return False
    return any(
        raw.pgconn.parameter_status(name) == b"on"
        for name in (b"default_transaction_read_only", b"in_hot_standby")
    )


class _Access(NamedTuple):
    """Whether what a connection begins may write, and since when it has been like that."""

    modes: tuple[object, ...]
    since: float


def _access_of(raw: Any) -> tuple[object, ...]:
    return raw.read_only, raw.pgconn.parameter_status(b"default_transaction_read_only")


def note_refusal(error: BaseException | None) -> None:
    """Remember that the server had no connection left, or none that may write, if that is it."""
    global _refused_at, _read_only_until  # noqa: PLW0603  # what one thread meets concerns all
    if isinstance(error, OperationalError) and any(text in str(error) for text in _REFUSALS):
        _refused_at = max(_refused_at, time.monotonic())
    if isinstance(error, Error) and isinstance(error.__cause__, ReadOnlySqlTransaction):
        _read_only_until = time.monotonic()


def are_scarce() -> bool:
    """Tell whether the server has refused us a connection of late."""
    return time.monotonic() < _refused_at + SCARCE_FOR


def spare_connections() -> None:
    """Give this thread's connections back if they are scarce: so all parts get their turn."""
    if are_scarce():
        replace_suspect_connections()
        connections.close_all()
        _own.are_suspect = False  # there is none left, or a pool may give it to anybody


def suspect_sessions(error: BaseException | None) -> None:
    """Note that this thread's sessions may be to blame for ``error``, if it is the database's.

    A session that answers may be broken all the same, and would stay so for as long as the worker
    runs: it has kept a default that was wrong when it began, or a handler has set its search_path
    or its role, or made a table that hides one of ours. Not even that it lost a lease is sure then.
    """
    for _ in range(CAUSES_MAX):
        if error is None:
            return
        if isinstance(error, (Error, LeaseLost)):
            _own.are_suspect |= isinstance(error, LeaseLost) or _may_be_the_sessions(error)
            return
        error = error.__cause__ or error.__context__


def _may_be_the_sessions(error: Error) -> bool:
    """Tell whether another session might have had the server answer otherwise.

    What breaks a constraint met the right table, and many handlers go by that; who meets a conflict
    or a deadlock is to try again.
    """
    cause = error.__cause__
    is_conflict = isinstance(cause, SerializationFailure | DeadlockDetected)
    is_sure = isinstance(error, IntegrityError) or is_about_values(error) or is_conflict
    return isinstance(cause, psycopg.Error) and not is_sure  # else it is Django's own


def take_suspicion() -> bool:
    """Tell whether this thread's sessions are suspect, and forget it: they are another thread's."""
    are_suspect, _own.are_suspect = _own.are_suspect, False
    return are_suspect


def are_to_be_replaced() -> bool:
    """Tell whether this thread's sessions are suspect, and it is long since others were."""
    return _own.are_suspect and time.monotonic() >= _own.replaced_at + _own.replace_after


def replace_suspect_connections() -> list[str]:
    """Let go of this thread's connections if their sessions are suspect; return their aliases.

    Those of a test that drains are inside its transaction, and are kept.
    """
    if not are_to_be_replaced():
        return []
    _own.are_suspect = False
    found = [connection for connection in _known_connections() if _is_at_rest(connection)]
    for connection in found:
        _forget(connection)
    if found:
        _note_replaced()
    return [connection.alias for connection in found]


def _note_replaced() -> None:
    now = time.monotonic()
    goes_on = now < _own.replaced_at + 2 * REPLACED_EVERY
    _own.replace_after = min(2 * _own.replace_after, REPLACED_EVERY) if goes_on else REPLACED_FIRST
    _own.replaced_at = now


def _is_at_rest(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether it is one to PostgreSQL that is alive and in no block."""
    if connection.vendor != "postgresql" or connection.in_atomic_block:
        return False
    return connection.connection is not None and not connection.connection.closed


def drop_connections() -> None:
    """Close this thread's connections after a failure, which a pool would give to others."""
    for connection in connections.all(initialized_only=True):
        if _is_at_rest(connection):
            with contextlib.suppress(Exception):
                connection.connection.close()
    connections.close_all()
    _own.are_suspect = False


_HOLDS = """
    SELECT EXISTS (SELECT FROM pg_cursors WHERE name <> '')
        OR EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory')
"""


def are_held(bounded: Bounded) -> bool:
    """Tell whether a session of this thread holds what somebody is not through with.

    Where several share it: a cursor that is read page by page, or a lock.
    """
    return any(_is_held(each, bounded) for each in _known_connections() if _is_at_rest(each))


def _is_held(connection: BaseDatabaseWrapper, bounded: Bounded) -> bool:
    with contextlib.suppress(Error), bounded(connection), connection.cursor() as cursor:
        cursor.execute(_HOLDS)
        return bool(cursor.fetchone()[0])
    return False  # it cannot even tell


def leave_connections() -> None:
    """Note that a handler has used this thread's connections; close what it left in disorder.

    What it locked in a block that it left open would stay locked for as long as the thread has
    nothing else to do, and what the next handlers write would never be committed, or be refused.
    """
    for connection in _known_connections():
        if _is_left_open(connection) or _is_altered(connection) or _is_outdated(connection):
            _forget(connection)
    _own.used_at = time.monotonic()


def replace_failed_connections(error: BaseException) -> None:
    """Let go of this thread's connections whose sessions may be to blame for ``error``.

    Or may not write, where new ones might.
    """
    suspect_sessions(error)
    replace_suspect_connections()
    for connection in _known_connections():
        if _is_outdated(connection):
            _forget(connection)
