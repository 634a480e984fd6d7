"""Connections that a handler has switched to other modes, and sessions that may not write.

Where a new one would differ.
"""

import time
from typing import Any, NamedTuple

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.dispatch import receiver
from psycopg.errors import ReadOnlySqlTransaction

READ_ONLY_FOR = 1.0  # seconds at least between two sessions that may not write

_READ_ONLY = b"default_transaction_read_only"


class _Access(NamedTuple):
    """How a connection works, also whether it may write, and since when it has been like that."""

    modes: tuple[object, ...]
    since: float


_KEY = "_kanthorq_access"
_NEVER = float("-inf")
_refused_at = _NEVER  # the last moment at which a write was refused for that


@receiver(connection_created)
def _note_access(connection: BaseDatabaseWrapper, **_: object) -> None:
    if connection.vendor == "postgresql":
        raw = connection.connection
        # As it was when it was first made: a pool gives it again.
        vars(raw).setdefault(_KEY, _Access(_modes_of(raw), time.monotonic()))


def note_refused_write(error: BaseException | None) -> None:
    """Remember that a session may not write, if ``error`` is that."""
    global _refused_at  # noqa: PLW0603  # what one thread meets concerns all
    if isinstance(error, Error) and isinstance(error.__cause__, ReadOnlySqlTransaction):
        _refused_at = time.monotonic()


def is_altered(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether a handler has had it work differently for all that come after it.

    Without asking: whether a session may write the server reports whenever it changes.
    """
    made_with = _made_with(connection)
    return made_with is not None and made_with.modes != _modes_of(connection.connection)


def is_outdated(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether its session may not write, and a new one might, as some write was refused.

    A session keeps the default that the database or the role had when it began.
    """
    if _refused_at == _NEVER:
        return False
    made_with = _made_with(connection)
    if made_with is None or made_with.since > _refused_at - READ_ONLY_FOR:
        return False
    status = connection.connection.pgconn.parameter_status
    return any(status(name) == b"on" for name in (_READ_ONLY, b"in_hot_standby"))


def _made_with(connection: BaseDatabaseWrapper) -> _Access | None:
    raw = connection.connection
    if connection.vendor != "postgresql" or raw is None or raw.closed:
        return None
    # A dictionary of weak references takes longer than all else that is asked after a handler.
    made_with: _Access | None = vars(raw).get(_KEY)
    return made_with


def _modes_of(raw: Any) -> tuple[object, ...]:
    status = raw.pgconn.parameter_status(_READ_ONLY)
    return raw.read_only, status, raw.isolation_level, raw.row_factory, raw.cursor_factory
