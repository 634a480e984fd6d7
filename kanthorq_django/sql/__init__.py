"""What the ORM cannot say: one file per verb, bound parameters only.

Every deciding time in them is ``statement_timestamp()``, which Django's ``Now()`` is too;
``now()`` stands still inside a transaction, and inside a whole test.
"""

import functools
import threading
from collections import namedtuple
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from django.db import connections

# Stands in statements that lock tasks, where those that must not wait say so.
WAITING = "/* SKIP LOCKED */"


@functools.cache
def load(name: str, *, skip_locked: bool = False) -> str:
    """Return the text of ``<name>.sql``."""
    text = files(__package__).joinpath(f"{name}.sql").read_text(encoding="utf-8")
    if skip_locked and WAITING not in text:
        raise ValueError(f"{name}.sql does not lock tasks.")
    return text.replace(WAITING, "SKIP LOCKED" if skip_locked else "")


def rows(
    using: str, name: str, params: Mapping[str, Any], *, skip_locked: bool = False
) -> list[Any]:
    """Run ``<name>.sql`` on the database ``using``; return its rows, columns as attributes.

    ``skip_locked`` leaves out tasks that somebody has locked, instead of waiting for them.
    """
    with connections[using].cursor() as cursor:
        cursor.execute(load(name, skip_locked=skip_locked), params)
        row = _row_type(tuple(column.name for column in cursor.description))
        return [row._make(values) for values in cursor.fetchall()]


def ids(using: str, name: str, params: Mapping[str, Any], *, skip_locked: bool = False) -> set[int]:
    """Run ``<name>.sql`` as ``rows()`` does; return its one column."""
    with connections[using].cursor() as cursor:
        cursor.execute(load(name, skip_locked=skip_locked), params)
        return {pk for (pk,) in cursor.fetchall()}


class Result:
    """The rows of a statement, each decoded when it is asked for, by whatever thread."""

    def __init__(self, using: str, name: str, params: Mapping[str, Any]) -> None:
        """Run ``<name>.sql`` on the database ``using``."""
        # Not closed: its rows live on the client, and go with the last one who may ask for them.
        cursor = connections[using].cursor()
        cursor.execute(load(name), params)
        self._cursor = cursor.cursor
        self._columns = {column.name: index for index, column in enumerate(cursor.description)}
        self._row = _row_type(tuple(self._columns))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._cursor.rowcount)

    def __getitem__(self, index: int) -> Any:
        with self._lock:
            self._cursor.scroll(index, mode="absolute")
            return self._row._make(self._cursor.fetchone())

    def integers(self, column: str) -> list[int | None]:
        """Return a column of integers without decoding the others."""
        value, place = self._cursor.pgresult.get_value, self._columns[column]
        found = (value(index, place) for index in range(len(self)))
        return [None if text is None else int(text) for text in found]


@functools.cache
def _row_type(columns: tuple[str, ...]) -> Any:
    return namedtuple("Row", columns)  # the columns are known at run time only
