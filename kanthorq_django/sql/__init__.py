"""What the ORM cannot say: one file per verb, bound parameters only.

Every deciding time in them is ``statement_timestamp()``, which Django's ``Now()`` is too;
``now()`` stands still inside a transaction, and inside a whole test.
"""

import functools
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.resources import files
from typing import Any

from django.db import Error
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.adapt import Transformer
from psycopg.errors import InvalidTextRepresentation
from psycopg.pq import TransactionStatus

from kanthorq_django.sql.cursors import REPEATED, Detached, cursor_for, first_row

# Stands in statements that lock tasks, where those that must not wait say so.
WAITING = "/* SKIP LOCKED */"

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
# What our own transactions lock, all workers wait for: one whose client is frozen, or gone without
# a word, must not hold it for longer. In milliseconds.
LEAVE_IDLE = "SET LOCAL idle_in_transaction_session_timeout = 5000"


# The server may keep a plan that it made while a table was nearly empty, or had never been looked
# at: no index seemed worth the while. Ours all read in the order of an index.
BY_INDEX = "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off"
# PostgreSQL takes the plan of a look for dearer than it is, and would make a new one each time:
# five times the time that the look itself takes.
ONE_PLAN = "SET LOCAL plan_cache_mode = force_generic_plan"


@functools.cache
def load(name: str, *, skip_locked: bool = False) -> str:
    """Return the text of ``<name>.sql``."""
    text = files(__package__).joinpath(f"{name}.sql").read_text(encoding="utf-8")
    if skip_locked and WAITING not in text:
        raise ValueError(f"{name}.sql does not lock tasks.")
    return text.replace(WAITING, "SKIP LOCKED" if skip_locked else "")


def _cursor(using: str, *names: str) -> Any:
    """Return an open cursor for these statements; in a project's log they are as they stand."""
    return cursor_for(using, [load(name) for name in names if name in REPEATED])


def rows(
    using: str, name: str, params: Mapping[str, Any], *, skip_locked: bool = False
) -> list[Any]:
    """Run ``<name>.sql`` on the database ``using``; return its rows, columns as attributes.

    ``skip_locked`` leaves out tasks that somebody has locked, instead of waiting for them.
    """
    with _cursor(using, name) as cursor:
        cursor.execute(load(name, skip_locked=skip_locked), params)
        return _rows(cursor)


def rows_by_one_plan(using: str, name: str, params: Mapping[str, Any]) -> list[Any]:
    """Do what ``rows()`` does, by a plan that is made once; outside of any transaction."""
    with _cursor(using, name) as cursor:
        cursor.execute(f"{BY_INDEX}; {ONE_PLAN}; {load(name)}", params)
        return _rows(cursor)


def values(
    connection: BaseDatabaseWrapper, name: str, params: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """Run ``<name>.sql``, which is repeated all day; return its first row, None if there is none.

    The values are as they come. The quickest of these functions, but not for an event loop.
    """
    return first_row(connection, load(name), params)


def ids(using: str, name: str, params: Mapping[str, Any], *, skip_locked: bool = False) -> set[int]:
    """Run ``<name>.sql`` as ``rows()`` does; return its one column."""
    with _cursor(using, name) as cursor:
        cursor.execute(load(name, skip_locked=skip_locked), params)
        return {pk for (pk,) in cursor.fetchall()}


class Result:
    """The rows of a statement, each decoded when it is asked for, by whatever thread."""

    def __init__(self, cursor: Any) -> None:
        """Take the rows at which Django's ``cursor`` stands.

        It is not to be closed: its rows live on the client, and go with the last one who may ask
        for them.
        """
        self._cursor = cursor.cursor
        names = _columns(self._cursor)
        self._columns = {name: place for place, name in enumerate(names)}
        self._row = _row_type(names)
        self._lock = threading.Lock()
        self._loaders: dict[tuple[str, ...], list[tuple[int, Callable[[bytes], Any]]]] = {}

    def __len__(self) -> int:
        return int(self._cursor.rowcount)

    def __getitem__(self, index: int) -> Any:
        with self._lock:
            self._cursor.scroll(index, mode="absolute")
            return self._row._make(self._cursor.fetchone())

    def values(self, index: int, columns: tuple[str, ...]) -> list[Any]:
        """Return these values of one row, without decoding the others."""
        loaders = self._loaders.get(columns) or self._loaders_of(columns)
        found = self._cursor.pgresult.get_value
        return [
            None if (raw := found(index, place)) is None else load(raw) for place, load in loaders
        ]

    def _loaders_of(self, columns: tuple[str, ...]) -> list[tuple[int, Callable[[bytes], Any]]]:
        result = self._cursor.pgresult
        transformer = Transformer(Detached(self._cursor.adapters))
        places = [self._columns[column] for column in columns]
        self._loaders[columns] = [
            (place, transformer.get_loader(result.ftype(place), result.fformat(place)).load)
            for place in places
        ]
        return self._loaders[columns]

    def integers(self, column: str) -> list[int | None]:
        """Return a column of integers without decoding the others."""
        value, place = self._cursor.pgresult.get_value, self._columns[column]
        found = (value(index, place) for index in range(len(self)))
        return [None if text is None else int(text) for text in found]


def result(using: str, name: str, params: Mapping[str, Any]) -> Result:
    """Run ``<name>.sql`` on the database ``using``; return its rows as they are."""
    cursor = _cursor(using, name)
    cursor.execute(load(name), params)
    return Result(cursor)


def transaction_of(
    using: str, name: str, then: str, params: Mapping[str, Any]
) -> tuple[list[Any], Result]:
    """Run ``<name>.sql``, then ``<then>.sql``, in a READ COMMITTED transaction of their own.

    Each sees what has been committed before it begins, and all of it is one round trip: between
    its statements no client can fall silent. Returns the rows of both.
    The connection has to be in autocommit mode, outside of any transaction.
    """
    cursor = _cursor(using, name, then)
    try:
        cursor.execute(f"{BEGIN}; {BY_INDEX}; {load(name)} {load(then)} COMMIT", params)
    except BaseException:
        with suppress(Error):  # where the connection is lost, the transaction is as well
            cursor.execute("ROLLBACK")
        raise
    first = _rows(cursor)
    cursor.cursor.nextset()
    return first, Result(cursor)


@contextmanager
def begun(using: str, name: str, params: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Run the block in a READ COMMITTED transaction of its own that begins with ``<name>.sql``.

    Yields the rows of that statement. Both are one round trip; Django's ``atomic()`` would need
    three. The server ends it when its client falls silent. The connection has to be in autocommit
    mode, outside of any transaction.
    """
    with _cursor(using, name) as cursor:
        try:
            cursor.execute(f"{BEGIN}; {LEAVE_IDLE}; {BY_INDEX}; {load(name)}", params)
            yield _rows(cursor)
        except BaseException:
            with suppress(Error):  # where the connection is lost, the transaction is as well
                cursor.execute("ROLLBACK")
            raise
        cursor.execute("COMMIT")


class TransactionEnded(Exception):
    """The transaction was committed, unless the commit itself was refused; the cause says why."""


def values_committed(
    using: str, name: str, then: str, params: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """Run ``<name>.sql``, commit, and run ``<then>.sql``, all in one round trip.

    Returns the first row of the first. The connection has to be in autocommit mode, outside of
    any transaction. Raises TransactionEnded from the error when the first did not fail.
    """
    with _cursor(using, name, then) as cursor:
        try:
            cursor.execute(f"BEGIN; {load(name)} COMMIT; {load(then)}", params)
        except BaseException as error:
            if cursor.connection.info.transaction_status == TransactionStatus.IDLE:
                raise TransactionEnded(str(error)) from error
            with suppress(Error):
                cursor.execute("ROLLBACK")
            raise
        cursor.nextset()
        found: tuple[Any, ...] | None = cursor.fetchone()
        return found


def commit_with(using: str, name: str, params: Mapping[str, Any]) -> None:
    """Run ``<name>.sql`` as the last statement of the open transaction, and commit it.

    Both are one round trip, so that what the statement locks is never left locked by a client
    that falls silent in between. If it fails, nothing is committed. Django's ``atomic()`` finds
    nothing left to commit, and runs its hooks.
    """
    with _cursor(using, name) as cursor:
        cursor.execute(f"{load(name)} COMMIT", params)


def is_failed_cast(error: Error, text: str) -> bool:
    """Tell whether ``error`` is that of a statement of ours that cast what has ``text`` in it."""
    return isinstance(error.__cause__, InvalidTextRepresentation) and text in str(error)


def _rows(cursor: Any) -> list[Any]:
    """Return the rows of the first statement that has any: what was set before it has none."""
    own = cursor.cursor  # past Django's wrappers: all of it is on the client
    while not own.pgresult.nfields and own.nextset():
        pass
    row = _row_type(_columns(own))
    return [row._make(values) for values in own.fetchall()]


def _columns(own: Any) -> tuple[str, ...]:
    # psycopg's own description makes an object of each, which takes as long as a short statement.
    result = own.pgresult
    return tuple(result.fname(place).decode() for place in range(result.nfields))


@functools.cache
def _row_type(columns: tuple[str, ...]) -> Any:
    return namedtuple("Row", columns)  # the columns are known at run time only
