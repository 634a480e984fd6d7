"""Statements that travel together, bound to what the server keeps of them where it may."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.abc import PQGen
from psycopg.adapt import PyFormat
from psycopg.errors import error_from_result
from psycopg.generators import execute, fetch, send
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from kanthorq_django.sql.session import Prepared, Session, adaptation_of, may_bind, session_of

_IDLE = TransactionStatus.IDLE  # outside of any transaction
_PLACEHOLDER = re.compile(r"%(?:%|\((\w+)\)s)")


class Statement(NamedTuple):
    """SQL with named parameters, and whether it is run so often that its plan is to be kept.

    What travels with such a one is kept along with it. One that reads ``by_index`` does so by
    whatever plan the server keeps; the settings that it takes for it are as before afterwards. Rows
    that come ``in_binary`` where they are bound have no jsonb, which Django reads as text.
    """

    text: str
    is_repeated: bool = False
    by_index: bool = False
    in_binary: bool = False


# The server may keep a plan that it made while a table was nearly empty, or had never been looked
# at: no index seemed worth the while, or one as good as another. Ours all read in the order of an
# index; where rows have to be sorted it is the wrong one. And as it knows of no LIMIT, it takes a
# look into a long stream for work that is worth a compiler's time, each time.
_SETTINGS = ("enable_seqscan", "enable_bitmapscan", "enable_sort", "jit")


def _for_each_setting(text: str) -> Statement:
    return Statement(f"SELECT {', '.join(text.format(name) for name in _SETTINGS)};")


_NOTED = "set_config('kanthorq.{0}', current_setting('{0}'), true)"
_OFF = "set_config('{0}', 'off', true)"
BY_INDEX = _for_each_setting(_OFF)
_BY_INDEX_FROM_HERE = _for_each_setting(f"{_NOTED}, {_OFF}")
_AS_BEFORE = _for_each_setting("set_config('{0}', current_setting('kanthorq.{0}'), true)")


def run(
    connection: BaseDatabaseWrapper,
    statements: Sequence[Statement],
    params: Mapping[str, Any],
    *,
    is_lasting: bool = False,
) -> list[PGresult]:
    """Run ``statements`` in one round trip; return the result of each.

    Those that are repeated are bound by libpq's protocol, past the cursors of psycopg and Django:
    what these do for any statement takes longer than to publish. Where the server may keep
    nothing, or where the project's log or wrappers of statements are to see what is run, they go
    as one text; and the first few times, unless the connection ``is_lasting``.
    """
    session = _session_to_bind(connection, statements, is_lasting=is_lasting)
    if session is None:
        return _run_text(connection, statements, params)
    try:
        return _run_bound(connection.connection, session, statements, params)
    except psycopg.Error:
        with connection.wrap_database_errors:
            raise


def run_apart(
    connection: BaseDatabaseWrapper, statements: Sequence[Statement], params: Mapping[str, Any]
) -> list[PGresult] | None:
    """Run ``statements`` in one round trip, each in a transaction of its own.

    All are run, whatever becomes of the others, and the error of the first is raised. Returns
    their results, of which others than the first may be errors, or missing. None, and nothing is
    run, where they cannot be bound: as one text they would be one transaction.
    The connection has to be outside of any transaction.
    """
    session = _session_to_bind(connection, statements, may_learn=False)
    raw = connection.connection
    if session is None or not raw.autocommit:
        return None
    with connection.wrap_database_errors:
        groups = bind_apart(raw, session, statements, params)
        if any(_is_forgotten(_failed(group)) for group in groups):
            session.prepared.clear()
            if _failed(groups[0]):
                groups = bind_apart(raw, session, statements, params)
        if failed := _failed(groups[0]):
            raise error_from_result(failed, encoding=raw.info.encoding)
    return [_failed(group) or group[0] for group in groups]


def _session_to_bind(
    connection: BaseDatabaseWrapper,
    statements: Sequence[Statement],
    *,
    is_lasting: bool = False,
    may_learn: bool = True,
) -> Session | None:
    """Make sure of a connection; return what is known of it, None where nothing may be bound.

    Whether it may is learnt in the course of some uses, of which this is one if it ``may_learn``.
    """
    connection.close_if_health_check_failed()
    connection.ensure_connection()  # refuses to block an event loop, and what tests forbid
    connection.validate_thread_sharing()
    connection.validate_no_broken_transaction()
    if not any(statement.is_repeated for statement in statements):
        return None
    session = session_of(connection.connection)
    if session.is_direct is None and not may_learn:
        return None
    return session if may_bind(connection, session, is_lasting=is_lasting) else None


def _run_text(
    connection: BaseDatabaseWrapper, statements: Sequence[Statement], params: Mapping[str, Any]
) -> list[PGresult]:
    """Do what ``run()`` does by a cursor, wrapped as Django does its own."""
    own: Any = psycopg.ClientCursor(connection.connection)
    make = connection.make_debug_cursor if connection.queries_logged else connection.make_cursor
    with make(own) as cursor:
        cursor.execute(" ".join(statement.text for statement in statements), params or None)
        if own.pgresult is None:
            own.fetchone()  # has a pipeline of the caller's get its answers
        results = [own.pgresult]
        while own.nextset():
            results.append(own.pgresult)
        return [result for result in results if result]


def _run_bound(
    raw: "psycopg.Connection[Any]",
    session: Session,
    statements: Sequence[Statement],
    params: Mapping[str, Any],
) -> list[PGresult]:
    """Bind ``statements``, after a BEGIN where psycopg would send one by itself."""
    was_outside = raw.pgconn.transaction_status == _IDLE
    begin = [_begin(raw)] if was_outside and not raw.autocommit else []
    sent, places = _with_settings(begin, statements)
    results = bind(raw, session, sent, params)
    failed = _failed(results)
    if _is_forgotten(failed):
        session.prepared.clear()
        if was_outside:  # nothing is sent behind a COMMIT, so nothing was committed
            if raw.pgconn.transaction_status != _IDLE:
                psycopg.ClientCursor(raw).execute("ROLLBACK")
            results = bind(raw, session, sent, params)
            failed = _failed(results)
    if failed:
        raise error_from_result(failed, encoding=raw.info.encoding)
    return [results[place] for place in places]


def _with_settings(
    begin: Sequence[Statement], statements: Sequence[Statement]
) -> tuple[list[Statement], list[int]]:
    """Return what to send, and at which places of it ``statements`` are."""
    sent, places = [*begin], []
    for statement in statements:
        if statement.by_index:
            sent.append(_BY_INDEX_FROM_HERE)
        places.append(len(sent))
        sent.append(statement)
        if statement.by_index:
            sent.append(_AS_BEFORE)
    return sent, places


def _begin(raw: "psycopg.Connection[Any]") -> Statement:
    """Return what psycopg begins a transaction with where it does so by itself."""
    parts = ["BEGIN"]
    if raw.isolation_level is not None:
        parts.append(f"ISOLATION LEVEL {raw.isolation_level.name.replace('_', ' ')}")
    if raw.read_only is not None:
        parts.append("READ ONLY" if raw.read_only else "READ WRITE")
    if raw.deferrable is not None:
        parts.append("DEFERRABLE" if raw.deferrable else "NOT DEFERRABLE")
    return Statement(" ".join(parts) + ";")


# What the server says of a statement that it does not keep any more, after a DISCARD ALL, and of
# one whose columns have another type by now.
_FORGOTTEN, _OUTDATED = b"26000", b"0A000"
_REVALIDATE = b"RevalidateCachedQuery"
_SQLSTATE, _FUNCTION = DiagnosticField.SQLSTATE, DiagnosticField.SOURCE_FUNCTION

# Other values as text: the server knows the types, and takes no integer of another size, nor a
# moment without a zone, for what it expects.
_AS_BINARY = frozenset({bytes, UUID})
# To look up a member of an enumeration takes longer than to encode a value.
_BINARY, _TEXT = PyFormat.BINARY, PyFormat.TEXT
_ROWS = {True: Format.BINARY, False: Format.TEXT}


def bind(
    raw: "psycopg.Connection[Any]",
    session: Session,
    statements: Sequence[Statement],
    params: Mapping[str, Any],
) -> list[PGresult]:
    """Bind ``params`` to all ``statements``, which the server keeps; wait for the results.

    They are one transaction, unless they begin and commit others. After one that failed, none was
    run. An error that came with the end of the transaction is a result of its own.
    """
    return _send(raw, [_calls(raw, session, statements, params)])[0]


def bind_apart(
    raw: "psycopg.Connection[Any]",
    session: Session,
    statements: Sequence[Statement],
    params: Mapping[str, Any],
) -> list[list[PGresult]]:
    """Do the same, each statement in a transaction of its own; return the results of each."""
    return _send(raw, [[call] for call in _calls(raw, session, statements, params)])


# A statement's name, its values, their formats, and that of its rows.
_Call = tuple[bytes, Sequence[Any], Sequence[Any], Format]


def _calls(
    raw: "psycopg.Connection[Any]",
    session: Session,
    statements: Sequence[Statement],
    params: Mapping[str, Any],
) -> list[_Call]:
    adaptation, calls = session.adaptation, []
    for statement in statements:
        name, wanted = _prepared(raw, session, statement.text)
        given = [params[param] for param in wanted]
        formats = [_BINARY if type(value) in _AS_BINARY else _TEXT for value in given]
        values = adaptation.dump_sequence(given, formats)
        calls.append((name, values, adaptation.formats, _ROWS[statement.in_binary]))
    return calls


def _send(
    raw: "psycopg.Connection[Any]", groups: Sequence[Sequence[_Call]]
) -> list[list[PGresult]]:
    """Send groups of calls, each a transaction; return the results of each."""
    pgconn = raw.pgconn
    with raw.lock:
        try:
            if len(groups) == len(groups[0]) == 1:  # a pipeline costs a publisher 12 us more
                pgconn.send_query_prepared(*groups[0][0])
                return [raw.wait(execute(pgconn))]
            return _send_in_pipeline(raw, groups)
        except BaseException:
            _settle(raw)
            raise


def _send_in_pipeline(
    raw: "psycopg.Connection[Any]", groups: Sequence[Sequence[_Call]]
) -> list[list[PGresult]]:
    pgconn = raw.pgconn
    pgconn.enter_pipeline_mode()
    for calls in groups:
        for call in calls:
            pgconn.send_query_prepared(*call)
        pgconn.pipeline_sync()
    found = raw.wait(_collected(pgconn, len(groups)))
    _settle(raw)
    return found


def _collected(pgconn: PGconn, sync_count: int) -> PQGen[list[list[PGresult]]]:
    """Send what was queued; return all results, those that came before each sync apart.

    Where the connection is lost, of the groups that have ended, and of one that says why.
    """
    yield from send(pgconn)
    groups: list[list[PGresult]] = [[]]
    with suppress(psycopg.OperationalError):  # the connection is lost; the server may say why
        while len(groups) <= sync_count and pgconn.status != ConnStatus.BAD:
            result = yield from fetch(pgconn)
            if result is None:
                continue  # it ends those of one statement
            if result.status == ExecStatus.PIPELINE_SYNC:
                groups.append([])
            else:
                groups[-1].append(result)
    *ended, last = groups
    if _failed(last):
        return groups
    if not ended:
        raise psycopg.OperationalError(pgconn.error_message.decode(errors="replace"))
    return ended


def _settle(raw: "psycopg.Connection[Any]") -> None:
    """Let the connection be used as others are, or by nobody if answers are still to come."""
    pgconn = raw.pgconn
    with suppress(psycopg.Error):
        if not raw.closed and pgconn.pipeline_status:
            pgconn.exit_pipeline_mode()
    if pgconn.pipeline_status or pgconn.transaction_status == TransactionStatus.ACTIVE:
        with suppress(psycopg.Error):
            raw.close()


def _is_forgotten(failed: PGresult | None) -> bool:
    """Tell whether a statement failed as the server does not keep it any more, or not as it was."""
    if failed is None:
        return False
    state = failed.error_field(_SQLSTATE)
    # Of all that is not supported; the text of the error is in the server's language.
    is_outdated = state == _OUTDATED and failed.error_field(_FUNCTION) == _REVALIDATE
    return state == _FORGOTTEN or is_outdated


def _failed(results: Sequence[PGresult]) -> PGresult | None:
    """Return the first of ``results`` that is an error."""
    for each in results:
        if each.status == ExecStatus.FATAL_ERROR:
            return each
    return None


def _prepared(raw: "psycopg.Connection[Any]", session: Session, text: str) -> Prepared:
    """Return how to call ``text``, which the server of ``raw`` keeps from now on."""
    if (prepared := session.prepared.get(text)) is None:
        name = f"kanthorq_{next(session.numbers)}".encode()
        wanted, params = numbered(text)
        with raw.lock:
            try:
                raw.pgconn.send_prepare(name, wanted.encode())
                failed = _failed(raw.wait(execute(raw.pgconn)))
            finally:
                _settle(raw)
        if failed:
            raise error_from_result(failed, encoding=raw.info.encoding)
        prepared = session.prepared[text] = Prepared(name, params)
    return prepared


@functools.cache
def numbered(text: str) -> tuple[str, tuple[str, ...]]:
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


def rows_of(
    result: PGresult, connection: BaseDatabaseWrapper, make: Callable[[Sequence[Any]], Any] = tuple
) -> list[Any]:
    """Return the rows of a result that ``connection`` has got, each as ``make`` makes it."""
    adaptation = adaptation_of(connection.connection)
    adaptation.set_pgresult(result)
    rows: list[Any] = adaptation.load_rows(0, result.ntuples, make)
    return rows


def first_of(result: PGresult, connection: BaseDatabaseWrapper) -> tuple[Any, ...] | None:
    """Return the first row of a result that ``connection`` has got, None when there is none."""
    adaptation = adaptation_of(connection.connection)
    adaptation.set_pgresult(result)
    return adaptation.load_row(0, tuple) if result.ntuples else None
