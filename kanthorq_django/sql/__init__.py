"""What the ORM cannot say: one file per verb, bound parameters only.

Every deciding time in them is ``statement_timestamp()``, which Django's ``Now()`` is too;
``now()`` stands still inside a transaction, and inside a whole test.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from typing import Any, NamedTuple

from django.db import Error, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.errors import InvalidTextRepresentation
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

from kanthorq_django.sql.binding import Statement
from kanthorq_django.sql.result import Result, integers_of, named_rows_of, rows_of
from kanthorq_django.sql.round_trip import BY_INDEX, run, run_apart
from kanthorq_django.sql.transactions import is_outside

# What workers and publishers repeat all day: the server keeps these statements with their plans.
# None that takes long arrays: a plan that is kept expects ten elements, and is ten times slower
# with a thousand. (The arrays of ack_group are as long as GROUP_COMMIT says; it is written to bear
# hundreds.)
REPEATED = frozenset(
    {
        "ack_group",
        "ack_last",
        "ack_one",
        "claim",
        "last_lease",
        "lock_consumer",
        "notify",
        "peek",
        "publish",
        "publish_once",
        "pull",
    }
)

# Those that have to bring settings against bad plans along (see round_trip.py), as they also run in
# the application's transactions. Pulls and looks set them in transactions of their own.
_READ_BY_INDEX = frozenset({"ack_group", "ack_last", "ack_one", "claim", "last_lease"})

# Those whose rows carry bodies. As text each byte travels as two digits: a row of 10,000 bytes
# takes three times as long from the table to Python, one of 100 bytes less than twice as long.
_IN_BINARY = frozenset({"claim", "pull"})

# Stands in statements that lock tasks, in the place of SKIP LOCKED: load() puts that there for
# those who must not wait.
WAITING = "/* SKIP LOCKED */"

BEGIN_READ_COMMITTED = Statement("BEGIN ISOLATION LEVEL READ COMMITTED;")
COMMIT = Statement("COMMIT;")
ROLLBACK = Statement("ROLLBACK;")
# All workers wait for what our own transactions lock. If the client of one is frozen, or gone
# without a word, the server ends the transaction after these milliseconds.
LEAVE_IDLE = Statement("SET LOCAL idle_in_transaction_session_timeout = 5000;")
# Makes PostgreSQL keep the first plan of a statement. By itself it makes five before it keeps one,
# and each takes a pull longer than to read; for a look it never keeps one, as it overestimates the
# cost of that plan.
BY_ONE_PLAN = Statement(
    f"{BY_INDEX.text[:-1]}, set_config('plan_cache_mode', 'force_generic_plan', true);"
)

_OPEN = frozenset({TransactionStatus.INTRANS, TransactionStatus.INERROR})

# All of them at once: an upgrade under a running process replaces the files, whose next release
# may take other parameters than the code that was imported, and one without a file descriptor
# left has to write its verdicts all the same.
_TEXTS = {
    file.name.removesuffix(".sql"): file.read_text(encoding="utf-8")
    for file in files(__package__).iterdir()
    if file.name.endswith(".sql")
}


@functools.cache
def load(name: str, *, skip_locked: bool = False) -> str:
    """Return the text of ``<name>.sql``, as it was when this module was imported."""
    text = _TEXTS[name]
    if skip_locked and WAITING not in text:
        raise ValueError(f"{name}.sql does not lock tasks.")
    return text.replace(WAITING, "SKIP LOCKED" if skip_locked else "")


def _statement(name: str, *, skip_locked: bool = False) -> Statement:
    return _marked(name, load(name, skip_locked=skip_locked))


@functools.cache
def _marked(name: str, text: str) -> Statement:
    return Statement(text, name in REPEATED, name in _READ_BY_INDEX, name in _IN_BINARY)


def rows(
    using: str, name: str, params: Mapping[str, Any], *, skip_locked: bool = False
) -> list[Any]:
    """Run ``<name>.sql`` on the database ``using``; return its rows, columns as attributes.

    ``skip_locked`` leaves out tasks that somebody has locked, instead of waiting for them.
    """
    connection = connections[using]
    (result,) = run(connection, (_statement(name, skip_locked=skip_locked),), params)
    return named_rows_of(result, connection)


def rows_by_one_plan(using: str, name: str, params: Mapping[str, Any]) -> list[Any]:
    """Do what ``rows()`` does, by a plan that the server makes once: see ``BY_ONE_PLAN``.

    Inside a transaction it is just ``rows()``: the settings would last until that transaction ends.
    """
    connection = connections[using]
    if not is_outside(connection):
        return rows(using, name, params)
    return named_rows_of(
        _alone(connection, (BY_ONE_PLAN, _statement(name)), params)[-1], connection
    )


def integers(
    connection: BaseDatabaseWrapper, name: str, params: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """Run ``<name>.sql``; return its first row, which is all integers, None when there is none."""
    (result,) = run(connection, (_statement(name),), params)
    return integers_of(result)


def ids(using: str, name: str, params: Mapping[str, Any], *, skip_locked: bool = False) -> set[int]:
    """Run ``<name>.sql`` as ``rows()`` does; return its one column."""
    connection = connections[using]
    (result,) = run(connection, (_statement(name, skip_locked=skip_locked),), params)
    return {pk for (pk,) in rows_of(result, connection)}


def lazy_rows(using: str, name: str, params: Mapping[str, Any]) -> Result:
    """Run ``<name>.sql`` on the database ``using``; return rows that are decoded when asked for."""
    connection = connections[using]
    (found,) = run(connection, (_statement(name),), params)
    return Result(found, connection)


def lazy_rows_alone(using: str, name: str, params: Mapping[str, Any]) -> Result:
    """Do what ``lazy_rows()`` does; where no transaction is open, in a READ COMMITTED one.

    At a stricter level, which the project may have as its default, the statement would meet
    conflicts, and what it has read would make concurrent publishers fail.
    """
    connection = connections[using]
    if not is_outside(connection):
        return lazy_rows(using, name, params)
    (found,) = _alone(connection, (_statement(name),), params)
    return Result(found, connection)


def transaction_of(
    using: str, name: str, then: str, params: Mapping[str, Any]
) -> tuple[list[Any], Result]:
    """Run ``<name>.sql``, then ``<then>.sql``, in a READ COMMITTED transaction of their own.

    Each sees what has been committed before it begins, and all of it is one round trip: between
    its statements no client can fall silent. Returns the rows of both.
    The connection has to be in autocommit mode, outside of any transaction.
    """
    connection = connections[using]
    statements = (BY_ONE_PLAN, _statement(name), _statement(then))
    _, first, second = _alone(connection, statements, params)
    return named_rows_of(first, connection), Result(second, connection)


def _alone(
    connection: BaseDatabaseWrapper, statements: Sequence[Statement], params: Mapping[str, Any]
) -> list[PGresult]:
    """Run ``statements`` in a READ COMMITTED transaction of their own, in one round trip."""
    all_of_it = (BEGIN_READ_COMMITTED, *statements, COMMIT)
    with _rolled_back_if_failed(connection):
        return run(connection, all_of_it, params, is_lasting=True)[1:-1]


@contextmanager
def begun(using: str, name: str, params: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Run the block in a READ COMMITTED transaction of its own that begins with ``<name>.sql``.

    Yields the rows of that statement. Both are one round trip; Django's ``atomic()`` would need
    three. The server ends it when its client falls silent. The connection has to be in autocommit
    mode, outside of any transaction.
    """
    connection = connections[using]
    statements = (BEGIN_READ_COMMITTED, LEAVE_IDLE, BY_INDEX, _statement(name))
    with _rolled_back_if_failed(connection):
        *_, found = run(connection, statements, params)
        yield named_rows_of(found, connection)
    run(connection, (COMMIT,), {})


@contextmanager
def _rolled_back_if_failed(connection: BaseDatabaseWrapper) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if _status(connection) in _OPEN:
            with suppress(Error):  # where the connection is lost, the transaction is as well
                run(connection, (ROLLBACK,), {})
        raise


def _status(connection: BaseDatabaseWrapper) -> TransactionStatus:
    raw = connection.connection
    return TransactionStatus.UNKNOWN if raw is None else raw.info.transaction_status


class Apart(NamedTuple):
    """The first row of a statement that has been committed, and whether the next one succeeded."""

    values: tuple[int, ...] | None
    is_followed: bool


def integers_apart(
    connection: BaseDatabaseWrapper, name: str, then: str, params: Mapping[str, Any]
) -> Apart | None:
    """Do what ``integers()`` does, commit, and run ``<then>.sql``, all in one round trip.

    None, and nothing is run, where statements cannot be bound: see ``run_apart()``. The connection
    has to be in autocommit mode, outside of any transaction.
    """
    results = run_apart(connection, (_statement(name), _statement(then)), params)
    if results is None:
        return None
    first, *others = results
    is_followed = any(other.status == ExecStatus.TUPLES_OK for other in others)
    done = Apart(integers_of(first), is_followed)
    if connection.connection.closed:  # after the first was committed: no error tells Django
        connection.close()
    return done


def commit_with(using: str, name: str, params: Mapping[str, Any]) -> None:
    """Run ``<name>.sql`` as the last statement of the open transaction, and commit it.

    Both are one round trip, so that what the statement locks is never left locked by a client
    that falls silent in between. If it fails, nothing is committed. Django's ``atomic()`` finds
    nothing left to commit, and runs its hooks.
    """
    run(connections[using], (_statement(name), COMMIT), params)


def is_failed_cast(error: Error, text: str) -> bool:
    """Tell whether a statement failed because it cast a value with ``text`` in it.

    Some of ours do so on purpose: plain SQL has no other way to raise an error that says why.
    """
    return isinstance(error.__cause__, InvalidTextRepresentation) and text in str(error)
