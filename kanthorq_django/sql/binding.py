"""Statements bound by libpq's protocol to what the server keeps, in one round trip.

Past the cursors of psycopg and Django, so what these see to is seen to here as well: that a
connection is left as others expect it, and that an error says what the server said.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg.abc import PQGen
from psycopg.adapt import PyFormat
from psycopg.errors import error_from_result
from psycopg.generators import execute, fetch, send
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from kanthorq_django.sql.session import Prepared, Session

_PLACEHOLDER = re.compile(r"%(?:%|\((\w+)\)s)")


class Statement(NamedTuple):
    """SQL with named parameters.

    ``is_repeated``: it is run so often that the server is to keep it and its plan; what travels
    with it is kept as well. ``by_index``: settings travel with it that make any plan read by an
    index, and afterwards are as before. ``in_binary``: its rows come in binary form where it is
    bound; they may have no jsonb, which Django reads as text.
    """

    text: str
    is_repeated: bool = False
    by_index: bool = False
    in_binary: bool = False


# What the server says of a statement that it does not keep any more, after a DISCARD ALL, and of
# one whose columns have another type by now.
_FORGOTTEN, _OUTDATED = b"26000", b"0A000"
_REVALIDATE = b"RevalidateCachedQuery"
_SQLSTATE, _FUNCTION = DiagnosticField.SQLSTATE, DiagnosticField.SOURCE_FUNCTION

# All other values travel as text, which the server reads as the type that it expects. In binary it
# would refuse an integer of another size, and a moment without a zone.
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

    They are one transaction, unless they begin and commit others. Those behind one that failed
    are not run. An error at the end of the transaction, as of a deferred constraint, is one more
    result.
    """
    if len(statements) == 1:  # a pipeline costs a publisher 12 us more
        return _send(raw, _call(raw, session, statements[0], params))
    calls = [_call(raw, session, statement, params) for statement in statements]
    return _send_in_pipeline(raw, [calls])[0]


def bind_apart(
    raw: "psycopg.Connection[Any]",
    session: Session,
    statements: Sequence[Statement],
    params: Mapping[str, Any],
) -> list[list[PGresult]]:
    """Do the same, each statement in a transaction of its own; return the results of each."""
    groups = [[_call(raw, session, statement, params)] for statement in statements]
    return _send_in_pipeline(raw, groups)


# A statement's name, its values, their formats, and that of its rows.
_Call = tuple[bytes, Sequence[Any], Sequence[Any] | None, Format]


def _call(
    raw: "psycopg.Connection[Any]",
    session: Session,
    statement: Statement,
    params: Mapping[str, Any],
) -> _Call:
    prepared = session.prepared.get(statement.text) or _prepare(raw, session, statement.text)
    given = [params[param] for param in prepared.params]
    formats = [_BINARY if type(value) in _AS_BINARY else _TEXT for value in given]
    transformer = session.adaptation.transformer
    values = transformer.dump_sequence(given, formats)
    return prepared.name, values, transformer.formats, _ROWS[statement.in_binary]


def _send(raw: "psycopg.Connection[Any]", call: _Call) -> list[PGresult]:
    pgconn = raw.pgconn
    with raw.lock:
        try:
            pgconn.send_query_prepared(*call)
            return raw.wait(execute(pgconn))
        except BaseException:
            _leave_usable(raw)
            raise


def _send_in_pipeline(
    raw: "psycopg.Connection[Any]", groups: Sequence[Sequence[_Call]]
) -> list[list[PGresult]]:
    """Send groups of calls, each a transaction; return the results of each."""
    pgconn = raw.pgconn
    with raw.lock:
        try:
            pgconn.enter_pipeline_mode()
            for calls in groups:
                for call in calls:
                    pgconn.send_query_prepared(*call)
                pgconn.pipeline_sync()
            return raw.wait(_collected(pgconn, len(groups)))
        finally:
            _leave_usable(raw)


def _collected(pgconn: PGconn, sync_count: int) -> PQGen[list[list[PGresult]]]:
    """Send what was queued; return the results of each group, which a sync ends.

    If the connection is lost, those of the groups that have ended; and of the next one, if its
    last result is the error that says why.
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
    if failed_of(last):
        return groups
    if not ended:
        raise psycopg.OperationalError(pgconn.error_message.decode(errors="replace"))
    return ended


def _leave_usable(raw: "psycopg.Connection[Any]") -> None:
    """End a pipeline; close the connection if answers are still to come, which others would get."""
    pgconn = raw.pgconn
    with suppress(psycopg.Error):
        if not raw.closed and pgconn.pipeline_status:
            pgconn.exit_pipeline_mode()
    if pgconn.pipeline_status or pgconn.transaction_status == TransactionStatus.ACTIVE:
        with suppress(psycopg.Error):
            raw.close()


def is_forgotten(failed: PGresult | None) -> bool:
    """Tell whether a statement failed as the server does not keep it any more, or not as it was."""
    if failed is None:
        return False
    state = failed.error_field(_SQLSTATE)
    # Of all that is not supported; the text of the error is in the server's language.
    is_outdated = state == _OUTDATED and failed.error_field(_FUNCTION) == _REVALIDATE
    return state == _FORGOTTEN or is_outdated


def failed_of(results: Sequence[PGresult]) -> PGresult | None:
    """Return the first of ``results`` that is an error."""
    for each in results:
        if each.status == ExecStatus.FATAL_ERROR:
            return each
    return None


def _prepare(raw: "psycopg.Connection[Any]", session: Session, text: str) -> Prepared:
    """Have the server of ``raw`` keep ``text`` from now on; return how to call it."""
    name = f"kanthorq_{next(session.numbers)}".encode()
    wanted, params = numbered(text)
    with raw.lock:
        try:
            raw.pgconn.send_prepare(name, wanted.encode())
            failed = failed_of(raw.wait(execute(raw.pgconn)))
        finally:
            _leave_usable(raw)
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
