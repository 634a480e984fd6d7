"""Statements that travel together, of which the server keeps the plans where it may.

Django prepares nothing, so that it works behind poolers. But to plan a pull takes longer than to
run it.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID
from weakref import WeakKeyDictionary

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap, PyFormat, Transformer
from psycopg.errors import InvalidSqlStatementName, error_from_result
from psycopg.generators import execute, fetch, send
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

# So often a connection has to be used before it is worth a look; requests often have a new one.
USES_BEFORE = 5

_IDLE = TransactionStatus.IDLE  # outside of any transaction
_HAS_PIPELINES = psycopg.Pipeline.is_supported()  # libpq has had them since version 14
_PLACEHOLDER = re.compile(r"%(?:%|\((\w+)\)s)")


class Statement(NamedTuple):
    """SQL with named parameters, and whether the server is to keep its plan.

    It keeps those that travel with it as well.
    """

    text: str
    is_kept: bool = False


class Detached(NamedTuple):
    """What values are adapted by, without the connection, which may be closed by then.

    Loaders of psycopg 3.2 and 3.3.0 that are written in C crash the process on a closed one.
    """

    adapters: AdaptersMap
    connection: None = None


class _Kept(NamedTuple):
    """A statement that a server keeps: its name there, and those of its parameters in order."""

    name: bytes
    params: tuple[str, ...]


class _Session:
    """What has been learnt of a connection; not the connection itself, or it would never go."""

    def __init__(self, raw: "psycopg.Connection[Any]") -> None:
        self.use_count = 0
        self.is_direct: bool | None = None  # leads to the server itself
        self.kept: dict[str, _Kept] = {}
        self.numbers = itertools.count()  # none twice: some may be kept yet, and some forgotten
        self.adaptation = Transformer(Detached(raw.adapters))


_sessions: WeakKeyDictionary["psycopg.Connection[Any]", _Session] = WeakKeyDictionary()


def _session(raw: "psycopg.Connection[Any]") -> _Session:
    session = _sessions.get(raw)
    if session is None:
        session = _sessions[raw] = _Session(raw)
    return session


def run(
    connection: BaseDatabaseWrapper, statements: Sequence[Statement], params: Mapping[str, Any]
) -> list[PGresult]:
    """Run ``statements`` in one round trip; return the result of each.

    Those to be kept are bound by libpq's protocol, past the cursors of psycopg and Django: what
    these do for any statement takes longer than to publish. Where the server may keep nothing, or
    where the project's log or wrappers of statements are to see what is run, they go as one text.
    """
    connection.close_if_health_check_failed()
    if connection.connection is None:
        connection.ensure_connection()
    raw = connection.connection
    session = _session(raw)
    is_any_kept = any(statement.is_kept for statement in statements)
    if not (is_any_kept and _may_bind(connection, session)):
        return _run_text(connection, statements, params)
    connection.validate_no_broken_transaction()
    with connection.wrap_database_errors:
        return _bind_anew(raw, session, statements, params)


def _bind_anew(
    raw: "psycopg.Connection[Any]",
    session: _Session,
    statements: Sequence[Statement],
    params: Mapping[str, Any],
) -> list[PGresult]:
    """Do what ``bind()`` does, after a BEGIN where psycopg would send one.

    Outside of a transaction it does not matter that the server has forgotten what it kept.
    """
    was_outside = raw.pgconn.transaction_status == _IDLE
    begin = [_begin(raw)] if was_outside and not raw.autocommit else []
    try:
        results = bind(raw, session, [*begin, *statements], params)
    except InvalidSqlStatementName:
        # DISCARD ALL, as some pools reset what they hand out.
        session.kept.clear()
        if not was_outside:
            raise
        if raw.pgconn.transaction_status != _IDLE:
            psycopg.ClientCursor(raw).execute("ROLLBACK")
        results = bind(raw, session, [*begin, *statements], params)
    return results[len(begin) :]


def _begin(raw: "psycopg.Connection[Any]") -> Statement:
    """Return what psycopg begins a transaction with, where it does so by itself."""
    parts = ["BEGIN"]
    if raw.isolation_level is not None:
        parts.append(f"ISOLATION LEVEL {raw.isolation_level.name.replace('_', ' ')}")
    if raw.read_only is not None:
        parts.append("READ ONLY" if raw.read_only else "READ WRITE")
    if raw.deferrable is not None:
        parts.append("DEFERRABLE" if raw.deferrable else "NOT DEFERRABLE")
    return Statement(" ".join(parts))


def _run_text(
    connection: BaseDatabaseWrapper, statements: Sequence[Statement], params: Mapping[str, Any]
) -> list[PGresult]:
    """Do what ``run()`` does by a cursor, wrapped as Django does its own."""
    connection.validate_thread_sharing()
    own: Any = psycopg.ClientCursor(connection.connection)
    make = connection.make_debug_cursor if connection.queries_logged else connection.make_cursor
    with make(own) as cursor:
        cursor.execute(" ".join(statement.text for statement in statements), params or None)
        results = [own.pgresult]
        while own.nextset():
            results.append(own.pgresult)
        return [result for result in results if result]


# Other values as text: the server knows the types, and takes no integer of another size, nor a
# moment without a zone, for what it expects.
_AS_BINARY = frozenset({bytes, UUID})
# To look up a member of an enumeration takes longer than to encode a value.
_BINARY, _TEXT = PyFormat.BINARY, PyFormat.TEXT


def bind(
    raw: "psycopg.Connection[Any]",
    session: _Session,
    statements: Sequence[Statement],
    params: Mapping[str, Any],
) -> list[PGresult]:
    """Bind ``params`` to all ``statements``, which the server keeps; wait for the results.

    They are one transaction, unless they begin and commit others. Raises the first error, after
    which none was run.
    """
    kept = [_kept(raw, session, statement.text) for statement in statements]
    pgconn, adaptation = raw.pgconn, session.adaptation
    with raw.lock:
        pgconn.enter_pipeline_mode()
        try:
            for name, wanted in kept:
                given = [params[param] for param in wanted]
                formats = [_BINARY if type(value) in _AS_BINARY else _TEXT for value in given]
                dumped = adaptation.dump_sequence(given, formats)
                pgconn.send_query_prepared(name, dumped, adaptation.formats)
            pgconn.pipeline_sync()
            results = raw.wait(_collected(pgconn, len(statements)))
            pgconn.exit_pipeline_mode()
        except BaseException:
            _leave_pipeline(raw)
            raise
    _check(results, raw)
    return results


def _check(results: Iterable[PGresult], raw: "psycopg.Connection[Any]") -> None:
    """Raise the error of the first of ``results`` that is one."""
    for result in results:
        if result.status == ExecStatus.FATAL_ERROR:
            raise error_from_result(result, encoding=raw.info.encoding)


def _collected(pgconn: PGconn, count: int) -> PQGen[list[PGresult]]:
    """Send what was queued; return the results of so many statements, fewer if one was fatal."""
    yield from send(pgconn)
    results = []
    for _ in range(count):
        if result := (yield from fetch(pgconn)):
            results.append(result)
            yield from fetch(pgconn)  # nothing, which ends those of one statement
    yield from fetch(pgconn)  # the sync
    return results


def _leave_pipeline(raw: "psycopg.Connection[Any]") -> None:
    """Let the connection be used as others are, or by nobody if answers are still to come."""
    try:
        raw.pgconn.exit_pipeline_mode()
    except psycopg.Error:
        with suppress(psycopg.Error):
            raw.close()


def _kept(raw: "psycopg.Connection[Any]", session: _Session, text: str) -> _Kept:
    """Return how to call ``text``, which the server of ``raw`` keeps from now on."""
    if (kept := session.kept.get(text)) is None:
        name = f"kanthorq_{next(session.numbers)}".encode()
        numbered, params = _numbered(text)
        with raw.lock:
            raw.pgconn.send_prepare(name, numbered.encode())
            _check(raw.wait(execute(raw.pgconn)), raw)
        kept = session.kept[text] = _Kept(name, params)
    return kept


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


def _may_bind(connection: BaseDatabaseWrapper, session: _Session) -> bool:
    raw = connection.connection
    return (
        _may_prepare(connection, session)
        and not connection.execute_wrappers
        and not connection.queries_logged
        and not raw.pgconn.pipeline_status
    )


def _may_prepare(connection: BaseDatabaseWrapper, session: _Session) -> bool:
    """Tell whether the server may keep statements for ``connection``.

    It is done wherever the connection leads to the server itself: a pooler hands out process ids
    of its own. Not where the project sets ``OPTIONS["prepare_threshold"]``: None forbids it, and
    with a number psycopg prepares by itself, and deallocates ours along with its own. Nor where
    its pool resets connections: what is lost would be missed in the middle of a transaction.
    """
    if session.is_direct is not None:
        return session.is_direct
    options = connection.settings_dict["OPTIONS"]
    pool = options.get("pool")
    is_reset = isinstance(pool, Mapping) and "reset" in pool
    if "prepare_threshold" in options or is_reset or not _HAS_PIPELINES:
        return False
    raw = connection.connection
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


def rows_of(
    result: PGresult, connection: BaseDatabaseWrapper, make: Callable[[Sequence[Any]], Any] = tuple
) -> list[Any]:
    """Return the rows of a result that ``connection`` has got, each as ``make`` makes it."""
    adaptation = _session(connection.connection).adaptation
    adaptation.set_pgresult(result)
    return adaptation.load_rows(0, result.ntuples, make)
