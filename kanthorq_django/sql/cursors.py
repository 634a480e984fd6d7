"""Which cursor runs a statement: Django's own, or one whose statements the server keeps prepared.

Django binds parameters on the client and prepares nothing, so that it works behind poolers. But
to plan a pull takes longer than to run it.
"""

from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

# What workers repeat all day, and publishers. Not what takes arrays: the plan that the server
# keeps expects ten elements, and is ten times slower with a thousand.
REPEATED = frozenset({"ack_one", "claim", "peek", "publish", "pull"})
# So often a connection has to be used before it is worth a look; requests often have a new one.
USES_BEFORE = 5

_uses: WeakKeyDictionary["psycopg.Connection[Any]", int] = WeakKeyDictionary()
_direct: WeakKeyDictionary["psycopg.Connection[Any]", bool] = WeakKeyDictionary()


def cursor_for(using: str, name: str) -> Any:
    """Return an open cursor for ``<name>.sql`` on the database ``using``."""
    connection = connections[using]
    connection.ensure_connection()
    if name in REPEATED and _may_prepare(connection):
        return _wrapped(connection, psycopg.Cursor(connection.connection))
    return connection.cursor()


def client_cursor(using: str) -> Any:
    """Return an open cursor that takes several statements at once, with parameters."""
    connection = connections[using]
    connection.ensure_connection()
    return _wrapped(connection, psycopg.ClientCursor(connection.connection))


def _wrapped(connection: BaseDatabaseWrapper, cursor: Any) -> Any:
    """Wrap ``cursor`` as Django does its own: errors, query log and wrappers stay the same."""
    connection.validate_thread_sharing()
    if connection.queries_logged:
        return connection.make_debug_cursor(cursor)
    return connection.make_cursor(cursor)


def _may_prepare(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether the server may keep statements for ``connection``.

    A project's own ``OPTIONS["prepare_threshold"]`` decides. Without one, it is done wherever the
    connection leads to the server itself: a pooler hands out process ids of its own.
    """
    raw = connection.connection
    if raw.prepare_threshold is not None:
        return True
    if "prepare_threshold" in connection.settings_dict["OPTIONS"]:
        return False
    if raw in _direct:
        return False  # else it would have a threshold by now
    uses = _uses[raw] = _uses.get(raw, 0) + 1
    if uses < USES_BEFORE or not issubclass(raw.cursor_factory, psycopg.ClientCursor):
        return False
    with connection.wrap_database_errors:
        _direct[raw] = is_direct(raw)
    if _direct[raw]:
        raw.prepare_threshold = 0  # it concerns our cursors only: those of Django never prepare
    return _direct[raw]


def is_direct(raw: "psycopg.Connection[Any]") -> bool:
    """Ask whether the connection leads to the server itself, and not to a pooler before it."""
    found = psycopg.ClientCursor(raw).execute("SELECT pg_backend_pid()").fetchone()
    return found == (raw.info.backend_pid,)
