"""Statements that travel together, bound to what the server keeps of them where it may.

How they are bound is in binding.py.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.errors import error_from_result
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGresult

from kanthorq_django.sql.binding import Statement, bind, bind_apart, failed_of, is_forgotten
from kanthorq_django.sql.session import Session, may_bind, session_of

_IDLE = TransactionStatus.IDLE  # outside of any transaction

# The server may keep a plan that it made while a table was nearly empty, or had no statistics yet:
# a scan of the table, or the wrong index. All our statements can read in the order of an index, so
# what else a plan may do is switched off: to scan, and to sort. And to compile: a plan that is kept
# knows no LIMIT, so it takes a look into a long stream for enough work to compile for, each time.
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
    statements: tuple[Statement, ...],
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
    trip = _trip(statements)
    session = _session_to_bind(connection, trip, is_lasting=is_lasting)
    if session is None:
        return _run_text(connection, statements, params)
    try:
        return _run_bound(connection.connection, session, trip, params)
    except psycopg.Error:
        with connection.wrap_database_errors:
            raise


def run_apart(
    connection: BaseDatabaseWrapper, statements: tuple[Statement, ...], params: Mapping[str, Any]
) -> list[PGresult] | None:
    """Run ``statements`` in one round trip, each in a transaction of its own.

    All are run, whatever becomes of the others, and the error of the first is raised. Returns
    their results, of which others than the first may be errors, or missing. None, and nothing is
    run, where they cannot be bound: as one text they would be one transaction.
    The connection has to be outside of any transaction.
    """
    session = _session_to_bind(connection, _trip(statements), may_learn=False)
    raw = connection.connection
    if session is None or not raw.autocommit:
        return None
    with connection.wrap_database_errors:
        groups = bind_apart(raw, session, statements, params)
        if any(is_forgotten(failed_of(group)) for group in groups):
            session.prepared.clear()
            if failed_of(groups[0]):
                groups = bind_apart(raw, session, statements, params)
        if failed := failed_of(groups[0]):
            raise error_from_result(failed, encoding=raw.info.encoding)
    return [failed_of(group) or group[0] for group in groups]


def _session_to_bind(
    connection: BaseDatabaseWrapper,
    trip: "_Trip",
    *,
    is_lasting: bool = False,
    may_learn: bool = True,
) -> Session | None:
    """Make sure of a connection; return what is known of it, None where nothing may be bound.

    Whether it may is learnt in the course of some uses, of which this is one if it ``may_learn``.
    """
    if connection.health_check_enabled:  # type: ignore[attr-defined]  # not in the stubs
        connection.close_if_health_check_failed()
    connection.ensure_connection()  # refuses to block an event loop, and what tests forbid
    connection.validate_thread_sharing()
    if connection.needs_rollback:
        connection.validate_no_broken_transaction()
    if not trip.is_repeated:
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
            own.fetchone()  # where the caller is in a pipeline, this waits for the answers
        results = [own.pgresult]
        while own.nextset():
            results.append(own.pgresult)
        return [result for result in results if result]


def _run_bound(
    raw: "psycopg.Connection[Any]",
    session: Session,
    trip: "_Trip",
    params: Mapping[str, Any],
) -> list[PGresult]:
    """Bind the statements of ``trip``, after a BEGIN where psycopg would send one by itself."""
    was_outside = raw.pgconn.transaction_status == _IDLE
    if was_outside and not raw.autocommit:
        trip = trip.after(_begin(raw))
    sent = trip.sent
    results = bind(raw, session, sent, params)
    failed = failed_of(results)
    if failed and is_forgotten(failed):
        session.prepared.clear()
        if was_outside:  # nothing is sent behind a COMMIT, so nothing was committed
            if raw.pgconn.transaction_status != _IDLE:
                psycopg.ClientCursor(raw).execute("ROLLBACK")
            results = bind(raw, session, sent, params)
            failed = failed_of(results)
    if failed:
        raise error_from_result(failed, encoding=raw.info.encoding)
    return results if len(sent) == len(trip.places) else [results[place] for place in trip.places]


class _Trip(NamedTuple):
    """What is sent where statements are bound, and at which places of it they stand."""

    sent: tuple[Statement, ...]
    places: tuple[int, ...]
    is_repeated: bool

    def after(self, first: Statement) -> "_Trip":
        """Return a trip on which ``first`` goes before all else."""
        places = tuple(place + 1 for place in self.places)
        return _Trip((first, *self.sent), places, self.is_repeated)


@functools.cache
def _trip(statements: tuple[Statement, ...]) -> _Trip:
    sent: list[Statement] = []
    places = []
    for statement in statements:
        around = statement.by_index
        if around:
            sent.append(_BY_INDEX_FROM_HERE)
        places.append(len(sent))
        sent.append(statement)
        if around:
            sent.append(_AS_BEFORE)
    is_repeated = any(statement.is_repeated for statement in statements)
    return _Trip(tuple(sent), tuple(places), is_repeated)


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
