"""What the ORM cannot say: one file per verb, bound parameters only.

Every deciding time in them is ``statement_timestamp()``, which Django's ``Now()`` is too;
``now()`` stands still inside a transaction, and inside a whole test.
"""

import functools
from collections import namedtuple
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from django.db import connections


@functools.cache
def load(name: str) -> str:
    """Return the text of ``<name>.sql``."""
    return files(__package__).joinpath(f"{name}.sql").read_text(encoding="utf-8")


def rows(
    using: str, name: str, params: Mapping[str, Any], *, skip_locked: bool = False
) -> list[Any]:
    """Run ``<name>.sql`` on the database ``using``; return its rows, columns as attributes.

    ``skip_locked`` leaves out tasks that somebody has locked, instead of waiting for them.
    """
    text = load(name)
    if skip_locked:
        text = text.replace("FOR NO KEY UPDATE OF task", "FOR NO KEY UPDATE OF task SKIP LOCKED")
    with connections[using].cursor() as cursor:
        cursor.execute(text, params)
        row = _row_type(tuple(column.name for column in cursor.description))
        return [row._make(values) for values in cursor.fetchall()]


@functools.cache
def _row_type(columns: tuple[str, ...]) -> Any:
    return namedtuple("Row", columns)  # the columns are known at run time only
