"""Cursors for several statements at once, of which the server keeps the plans where it may.

Django prepares nothing, so that it works behind poolers. But to plan a pull takes longer than to
run it.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.errors import InvalidSqlStatementName
from psycopg.pq import TransactionStatus

# What workers repeat all day, and publishers. Not what takes arrays: the plan that the server
# keeps expects ten elements, and is ten times slower with a thousand.
REPEATED = frozenset(
    {"ack_last", "ack_one", "claim", "lock_consumer", "notify_stream", "peek", "publish", "pull"}
)
# So often a connection has to be used before it is worth a look; requests often have a new one.
USES_BEFORE = 5

_PLACEHOLDER = re.compile(r"%(?:%|\((\w+)\)s)")

_uses: WeakKeyDictionary["psycopg.Connection[Any]", int] = WeakKeyDictionary()
_direct: WeakKeyDictionary["psycopg.Connection[Any]", bool] = WeakKeyDictionary()
# How each connection calls what its server keeps, by text.
_calls: WeakKeyDictionary["psycopg.Connection[Any]", dict[str, str]] = WeakKeyDictionary()


class KeepingCursor(psycopg.ClientCursor[Any]):
    """A cursor whose server keeps the statements of these texts, prepared.

    EXECUTE is SQL, so it goes along with BEGIN and COMMIT in one round trip; what psycopg itself
    prepares needs one for each. Django's log and wrappers see the whole text.
    """

    def __init__(self, connection: "psycopg.Connection[Any]", texts: Sequence[str]) -> None:
        super().__init__(connection)
        self._texts = texts

    def execute(self, query: Any, *args: Any, **options: Any) -> Any:
        try:
            return super().execute(self._called(query), *args, **options)
        except InvalidSqlStatementName:
            # DISCARD ALL, as some pools reset what they hand out; nothing has been run yet.
            _calls.pop(self.connection, None)
            if self.connection.info.transaction_status != TransactionStatus.IDLE:
                if not query.startswith("BEGIN"):
                    raise
                super().execute("ROLLBACK")
            return super().execute(self._called(query), *args, **options)

    def _called(self, query: str) -> str:
        for text in self._texts:
            query = query.replace(text, self._call_of(text))
        return query

    def _call_of(self, text: str) -> str:
        calls = _calls.setdefault(self.connection, {})
        if text not in calls:
            name = f"kanthorq_{len(calls)}"
            numbered, names = _numbered(text)
            super().execute(f"PREPARE {name} AS {numbered}")
            calls[text] = f"EXECUTE {name} ({', '.join(f'%({each})s' for each in names)});"
        return calls[text]


@functools.cache
def _numbered(text: str) -> tuple[str, list[str]]:
    """Return ``text`` with numbers for parameters, as PREPARE wants it, and their names."""
    names: list[str] = []

    def number(found: re.Match[str]) -> str:
        name = found[1]
        if name is None:
            return "%"
        if name not in names:
            names.append(name)
        return f"${names.index(name) + 1}"

    return _PLACEHOLDER.sub(number, text), names


def cursor_for(using: str, kept: Sequence[str] = ()) -> Any:
    """Return an open cursor on the database ``using`` that takes several statements at once.

    The server keeps those whose texts are ``kept``, where it may.
    """
    connection = connections[using]
    connection.ensure_connection()
    raw = connection.connection
    is_keeping = kept and _may_prepare(connection)
    return _wrapped(
        connection, KeepingCursor(raw, kept) if is_keeping else psycopg.ClientCursor(raw)
    )


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
    if (known := _direct.get(raw)) is not None:
        return known
    if "prepare_threshold" in connection.settings_dict["OPTIONS"]:
        return raw.prepare_threshold is not None
    uses = _uses[raw] = _uses.get(raw, 0) + 1
    if uses < USES_BEFORE or not issubclass(raw.cursor_factory, psycopg.ClientCursor):
        return False
    with connection.wrap_database_errors:
        _direct[raw] = is_direct(raw)
    return _direct[raw]


def is_direct(raw: "psycopg.Connection[Any]") -> bool:
    """Ask whether the connection leads to the server itself, and not to a pooler before it."""
    found = psycopg.ClientCursor(raw).execute("SELECT pg_backend_pid()").fetchone()
    return found == (raw.info.backend_pid,)
