"""The rows of a statement: read all at once, or each value when somebody asks for it."""

import functools
import threading
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.adapt import Transformer
from psycopg.pq import Format
from psycopg.pq.abc import PGresult

from kanthorq_django.sql.session import adaptation_of, detached


class Result:
    """The rows of a statement, each decoded when it is asked for, by whatever thread."""

    def __init__(self, result: PGresult, connection: BaseDatabaseWrapper) -> None:
        """Take a result of ``connection``; its rows live on the client."""
        self._result = result
        self._adaptation = Transformer(detached(connection.connection))
        self._layout = _layout_of(result)
        self._lock = threading.Lock()
        self._loaders: dict[tuple[str, ...], list[tuple[int, Callable[[bytes], Any]]]] = {}

    def __len__(self) -> int:
        return self._result.ntuples

    def __getitem__(self, index: int) -> Any:
        with self._lock:
            self._adaptation.set_pgresult(self._result)
            return self._adaptation.load_row(index, self._layout.row._make)

    def values(self, index: int, columns: tuple[str, ...]) -> list[Any]:
        """Return these values of one row, without decoding the others."""
        loaders = self._loaders.get(columns) or self._loaders_of(columns)
        found = self._result.get_value
        return [
            None if (raw := found(index, place)) is None else load(raw) for place, load in loaders
        ]

    def _loaders_of(self, columns: tuple[str, ...]) -> list[tuple[int, Callable[[bytes], Any]]]:
        places = [self._layout.places[column] for column in columns]
        with self._lock:
            self._loaders[columns] = [(place, self._loader_of(place)) for place in places]
        return self._loaders[columns]

    def _loader_of(self, place: int) -> Callable[[bytes], Any]:
        result = self._result
        given = Format(result.fformat(place))
        load: Callable[[bytes], Any]
        load = self._adaptation.get_loader(result.ftype(place), given).load
        return load

    def column(self, name: str) -> list[Any]:
        """Return a column without decoding the others."""
        ((place, load),) = self._loaders_of((name,))
        found, indexes = self._result.get_value, range(len(self))
        values = (found(index, place) for index in indexes)
        return [None if raw is None else load(raw) for raw in values]


def rows_of(
    result: PGresult, connection: BaseDatabaseWrapper, make: Callable[[Sequence[Any]], Any] = tuple
) -> list[Any]:
    """Return the rows of a result that ``connection`` has got, each as ``make`` makes it."""
    adaptation = adaptation_of(connection.connection)
    adaptation.set_pgresult(result)
    rows: list[Any] = adaptation.load_rows(0, result.ntuples, make)
    return rows


def integers_of(result: PGresult) -> tuple[int, ...] | None:
    """Return the first row of a result of integers as text, None when there is none."""
    if not result.ntuples:
        return None
    # Without psycopg's loaders: to ask for them takes a publisher longer than to read three.
    found = result.get_value
    return tuple([int(found(0, place) or b"NULL") for place in range(result.nfields)])


def named_rows_of(result: PGresult, connection: BaseDatabaseWrapper) -> list[Any]:
    """Return the rows of a result that ``connection`` has got, columns as attributes."""
    return rows_of(result, connection, _layout_of(result).row._make)


class _Layout(NamedTuple):
    """Where each column of a result stands, and a type for its rows."""

    places: Mapping[str, int]
    row: Any  # the columns are known at run time only


def _layout_of(result: PGresult) -> _Layout:
    # psycopg's own description makes an object of each, which takes as long as a short statement.
    return _layout(tuple(map(result.fname, range(result.nfields))))


@functools.cache
def _layout(names: tuple[bytes | None, ...]) -> _Layout:
    columns = [(name or b"").decode() for name in names]
    places = {column: place for place, column in enumerate(columns)}
    return _Layout(places, namedtuple("Row", columns))
