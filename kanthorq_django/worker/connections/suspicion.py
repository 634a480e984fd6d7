"""Sessions that answer and may be broken all the same: what is noticed of them, and what follows.

One would stay so for as long as the worker runs: it has kept a default that was wrong when it
began, or a handler has set its search_path or its role, or made a table that hides one of ours.
"""

import contextlib
import threading
import time

import psycopg
from django.db import Error, IntegrityError
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.errors import DeadlockDetected, SerializationFailure

from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.worker.connections.database_errors import is_about_values
from kanthorq_django.worker.connections.own_connections import forget, is_at_rest, known_connections
from kanthorq_django.worker.warden import Bounded

# Seconds at least between two times that a thread's sessions are replaced for what failed on them:
# they double while that goes on. Where handlers fail a thousand times a second, most of the time
# would go into connecting; and a new session may be spoilt as soon as the last one was.
REPLACED_FIRST, REPLACED_EVERY = 0.03, 1.0
CAUSES_MAX = 10  # errors that are looked at for one of the database among their causes


class _Suspicion(threading.local):
    """What a thread thinks of its own sessions."""

    is_held = False  # something has failed for which they may be to blame
    replaced_at = float("-inf")  # when they were replaced for that
    replace_after = 0.0  # seconds after which they may be again


_suspicion = _Suspicion()


def suspect_sessions(error: BaseException | None) -> None:
    """Note that this thread's sessions may be to blame for ``error``, if it is the database's.

    Not even that it lost a lease is sure then.
    """
    for _ in range(CAUSES_MAX):
        if error is None:
            return
        if isinstance(error, (Error, LeaseLost)):
            _suspicion.is_held |= isinstance(error, LeaseLost) or _may_be_the_sessions(error)
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
    is_held, _suspicion.is_held = _suspicion.is_held, False
    return is_held


def add_suspicion() -> None:
    """Suspect this thread's sessions, as another thread did, which used them."""
    _suspicion.is_held = True


def are_to_be_replaced() -> bool:
    """Tell whether this thread's sessions are suspect, and it is long since others were."""
    due_at = _suspicion.replaced_at + _suspicion.replace_after
    return _suspicion.is_held and time.monotonic() >= due_at


def replace_suspect_connections() -> list[str]:
    """Let go of this thread's connections if their sessions are suspect; return their aliases.

    Those of a test that drains are inside its transaction, and are kept.
    """
    if not are_to_be_replaced():
        return []
    _suspicion.is_held = False
    found = [connection for connection in known_connections() if is_at_rest(connection)]
    for connection in found:
        forget(connection)
    if found:
        _note_replaced()
    return [connection.alias for connection in found]


def _note_replaced() -> None:
    now = time.monotonic()
    goes_on = now < _suspicion.replaced_at + 2 * REPLACED_EVERY
    doubled = min(2 * _suspicion.replace_after, REPLACED_EVERY)
    _suspicion.replace_after = doubled if goes_on else REPLACED_FIRST
    _suspicion.replaced_at = now


_HOLDS = """
    SELECT EXISTS (SELECT FROM pg_cursors WHERE name <> '')
        OR EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory')
"""


def are_held(bounded: Bounded) -> bool:
    """Tell whether a session of this thread holds what somebody is not through with.

    Where several share it: a cursor that is read page by page, or a lock.
    """
    return any(_is_held(each, bounded) for each in known_connections() if is_at_rest(each))


def _is_held(connection: BaseDatabaseWrapper, bounded: Bounded) -> bool:
    with contextlib.suppress(Error), bounded(connection), connection.cursor() as cursor:
        cursor.execute(_HOLDS)
        return bool(cursor.fetchone()[0])
    return False  # it cannot even tell
