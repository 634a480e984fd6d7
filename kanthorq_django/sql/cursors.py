"""Cursors for several statements at once, of which the server keeps the plans where it may.

Django prepares nothing, so that it works behind poolers. But to plan a pull takes longer than to
run it.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID
from weakref import WeakKeyDictionary

import psycopg
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import pq
from psycopg.adapt import AdaptersMap, PyFormat, Transformer
from psycopg.errors import InvalidSqlStatementName, error_from_result
from psycopg.generators import execute
from psycopg.pq import TransactionStatus

# What workers repeat all day, and publishers. Not what takes arrays: the plan that the server
# keeps expects ten elements, and is ten times slower with a thousand.
REPEATED = frozenset(
    {"ack_last", "ack_one", "claim", "lock_consumer", "notify_stream", "peek", "publish", "pull"}
)
# So often a connection has to be used before it is worth a look; requests often have a new one.
USES_BEFORE = 5

_IDLE = TransactionStatus.IDLE  # outside of any transaction
_PLACEHOLDER = re.compile(r"%(?:%|\((\w+)\)s)")


class _Kept(NamedTuple):
    """A statement that a server keeps: its name there, and those of its parameters in order."""

    name: str
    params: tuple[str, ...]

    @property
    def call(self) -> str:
        given = ", ".join(f"%({param})s" for param in self.params)
        return f"EXECUTE {self.name} ({given});" if given else f"EXECUTE {self.name};"


class Detached(NamedTuple):
    """What values are adapted by, without the connection, which may be closed by then.

    Loaders of psycopg 3.2 and 3.3.0 that are written in C crash the process on a closed one.
    """

    adapters: AdaptersMap
    connection: None = None


class _Session:
    """What has been learnt of a connection; not the connection itself, or it would never go."""

    def __init__(self, raw: "psycopg.Connection[Any]") -> None:
        self.use_count = 0
        self.is_direct: bool | None = None  # leads to the server itself
        self.kept: dict[str, _Kept] = {}
        self.called: dict[str, str] = {}  # how whole queries call what is kept
        self.adaptation = Transformer(Detached(raw.adapters))

    def forget(self) -> None:
        """Note that the server has thrown away what it kept."""
        self.kept.clear()
        self.called.clear()


_sessions: WeakKeyDictionary["psycopg.Connection[Any]", _Session] = WeakKeyDictionary()


def _session(raw: "psycopg.Connection[Any]") -> _Session:
    session = _sessions.get(raw)
    if session is None:
        session = _sessions[raw] = _Session(raw)
    return session


def _kept_by(raw: "psycopg.Connection[Any]", session: _Session, text: str) -> _Kept:
    """Return how to call ``text``, which the server of ``raw`` keeps from now on."""
    if (kept := session.kept.get(text)) is None:
        name = f"kanthorq_{len(session.kept)}"
        numbered, params = _numbered(text)
        psycopg.ClientCursor(raw).execute(f"PREPARE {name} AS {numbered}")
        kept = session.kept[text] = _Kept(name, params)
    return kept


class KeepingCursor(psycopg.ClientCursor[Any]):
    """A cursor whose server keeps the statements of these texts, prepared.

    EXECUTE is SQL, so it goes along with BEGIN and COMMIT in one round trip; what psycopg itself
    prepares needs one for each. Django's log and wrappers see the whole text.
    """

    def __init__(self, connection: "psycopg.Connection[Any]", texts: Sequence[str]) -> None:
        super().__init__(connection)
        self._texts = texts

    def execute(self, query: Any, *args: Any, **options: Any) -> Any:
        was_outside = self.connection.pgconn.transaction_status == _IDLE
        try:
            return super().execute(self._called(query), *args, **options)
        except InvalidSqlStatementName:
            # DISCARD ALL, as some pools reset what they hand out.
            _session(self.connection).forget()
            if not was_outside:
                raise
            # What has been run, nothing or BEGIN and a statement before, is begun anew.
            if self.connection.pgconn.transaction_status != _IDLE:
                super().execute("ROLLBACK")
            return super().execute(self._called(query), *args, **options)

    def _called(self, query: str) -> str:
        session = _session(self.connection)
        if (called := session.called.get(query)) is None:
            called = query
            for text in self._texts:
                called = called.replace(text, _kept_by(self.connection, session, text).call)
            session.called[query] = called
        return called


# Other values as text: the server knows the types, and takes no integer of another size, nor a
# moment without a zone, for what it expects.
_AS_BINARY = frozenset({bytes, UUID})
# To look up a member of an enumeration takes longer than to encode a value.
_BINARY, _TEXT = PyFormat.BINARY, PyFormat.TEXT


def first_row(
    connection: BaseDatabaseWrapper, text: str, params: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """Run one statement on its own; return its first row as it comes, None when there is none.

    Where the server keeps it, it is bound by libpq's protocol: what cursors of psycopg and Django
    do for any statement takes longer than to publish. For threads, not for an event loop.
    """
    if connection.connection is None:
        connection.ensure_connection()
    raw = connection.connection
    session = _session(raw)
    may_prepare = _may_prepare(connection, session)
    is_noted = connection.execute_wrappers or connection.queries_logged
    if not may_prepare or is_noted or not _may_go_as_it_is(raw):
        with _cursor_on(connection, [text] if may_prepare else ()) as cursor:
            cursor.execute(text, params)
            # Past Django's wrapper, which takes long: the row is on the client already.
            found: tuple[Any, ...] | None = cursor.cursor.fetchone()
            return found
    connection.validate_no_broken_transaction()
    with connection.wrap_database_errors:
        try:
            return bind(raw, session, text, params)
        except InvalidSqlStatementName:  # as above
            session.forget()
            if raw.pgconn.transaction_status != _IDLE:
                raise
            return bind(raw, session, text, params)


def bind(
    raw: "psycopg.Connection[Any]", session: _Session, text: str, params: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """Bind ``params`` to a statement that the server keeps; return its first row, if any."""
    kept, adaptation = _kept_by(raw, session, text), session.adaptation
    given = [params[name] for name in kept.params]
    formats = [_BINARY if type(value) in _AS_BINARY else _TEXT for value in given]
    with raw.lock:
        dumped = adaptation.dump_sequence(given, formats)
        raw.pgconn.send_query_prepared(kept.name.encode(), dumped, adaptation.formats)
        (result,) = raw.wait(execute(raw.pgconn))
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise error_from_result(result, encoding=raw.info.encoding)
        adaptation.set_pgresult(result)
        return adaptation.load_row(0, tuple) if result.ntuples else None


@functools.cache
def _numbered(text: str) -> tuple[str, tuple[str, ...]]:
    """Return ``text`` with numbers for parameters, as PREPARE wants it, and their names."""
    names: list[str] = []

    def number(found: re.Match[str]) -> str:
        name = found[1]
        if name is None:
            return "%"
        if name not in names:
            names.append(name)
        return f"${names.index(name) + 1}"

    return _PLACEHOLDER.sub(number, text), tuple(names)


def cursor_for(using: str, kept: Sequence[str] = ()) -> Any:
    """Return an open cursor on the database ``using`` that takes several statements at once.

    The server keeps those whose texts are ``kept``, where it may.
    """
    connection = connections[using]
    connection.ensure_connection()  # which also refuses to block an event loop
    may_prepare = kept and _may_prepare(connection, _session(connection.connection))
    return _cursor_on(connection, kept if may_prepare else ())


def _cursor_on(connection: BaseDatabaseWrapper, kept: Sequence[str]) -> Any:
    raw = connection.connection
    return _wrapped(connection, KeepingCursor(raw, kept) if kept else psycopg.ClientCursor(raw))


def _may_go_as_it_is(raw: "psycopg.Connection[Any]") -> bool:
    """Tell whether a statement may be sent as it is: psycopg's cursors send BEGIN where needed."""
    pgconn = raw.pgconn
    return raw.autocommit == (pgconn.transaction_status == _IDLE) and not pgconn.pipeline_status


def _wrapped(connection: BaseDatabaseWrapper, cursor: Any) -> Any:
    """Wrap ``cursor`` as Django does its own: errors, query log and wrappers stay the same."""
    connection.validate_thread_sharing()
    if connection.queries_logged:
        return connection.make_debug_cursor(cursor)
    return connection.make_cursor(cursor)


def _may_prepare(connection: BaseDatabaseWrapper, session: _Session) -> bool:
    """Tell whether the server may keep statements for ``connection``.

    It is done wherever the connection leads to the server itself: a pooler hands out process ids
    of its own. Not where the project sets ``OPTIONS["prepare_threshold"]``: None forbids it, and
    with a number psycopg prepares by itself, and deallocates ours along with its own.
    """
    if session.is_direct is not None:
        return session.is_direct
    raw = connection.connection
    if "prepare_threshold" in connection.settings_dict["OPTIONS"]:
        return False
    session.use_count += 1
    if session.use_count < USES_BEFORE or not issubclass(raw.cursor_factory, psycopg.ClientCursor):
        return False
    with connection.wrap_database_errors:
        session.is_direct = is_direct(raw)
    return session.is_direct


def is_direct(raw: "psycopg.Connection[Any]") -> bool:
    """Ask whether the connection leads to the server itself, and not to a pooler before it."""
    found = psycopg.ClientCursor(raw).execute("SELECT pg_backend_pid()").fetchone()
    return found == (raw.info.backend_pid,)
