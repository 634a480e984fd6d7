"""Why a command could not do what was asked, in one sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError
from django.db import Error, IntegrityError, OperationalError

from kanthorq_django.domain.quoting import printable
from kanthorq_django.exceptions import KanthorqError

ERROR_SIZE_MAX = 500  # characters of the database's own words

UNDEFINED_TABLE, UNDEFINED_COLUMN, READ_ONLY = "42P01", "42703", "25006"
LOCK_NOT_AVAILABLE = "55P03"


@contextmanager
def one_sentence(database: str) -> Iterator[None]:
    """Turn what KanthorQ or the database refuses into a CommandError; ``--traceback`` shows all."""
    try:
        yield
    except (KanthorqError, ImproperlyConfigured) as error:
        raise CommandError(str(error)) from error
    except Error as error:
        raise CommandError(explain(error, database)) from error


def explain(error: Error, database: str) -> str:
    """Return what an error of the database means to an operator."""
    sqlstate = getattr(error.__cause__, "sqlstate", None)
    if sqlstate in {UNDEFINED_TABLE, UNDEFINED_COLUMN}:
        return (
            f"The database {database!r} lacks KanthorQ's current tables; run: "
            f"manage.py migrate kanthorq_django --database {database}"
        )
    if sqlstate == READ_ONLY:
        return f"The database {database!r} is read-only, as a standby is; use the primary."
    if sqlstate == LOCK_NOT_AVAILABLE:
        return (
            f"Another session holds a lock in the database {database!r} for too long; pg_locks "
            "tells which one."
        )
    text = printable(" ".join(str(error).split()), ERROR_SIZE_MAX)
    if sqlstate is None and isinstance(error, OperationalError):
        return f"The database {database!r} cannot be reached: {text}"
    if isinstance(error, IntegrityError):
        return f"Other rows of the database {database!r} forbid it: {text}"
    return f"The database {database!r} refused: {text}"
