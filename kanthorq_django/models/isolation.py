"""READ COMMITTED, which queues need, whatever isolation the project chose for its own work."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from django.db import connections, transaction
from django.db.backends.postgresql.psycopg_any import IsolationLevel


@contextmanager
def read_committed(using: str) -> Iterator[None]:
    """Run the block in a transaction in which each statement sees what committed before it."""
    with transaction.atomic(using=using):
        with connections[using].cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        yield


def never_stricter(using: str) -> AbstractContextManager[None]:
    """Do the same where the settings ask for more, else nothing: it costs three round trips.

    Inside the caller's transaction it does nothing either; the level is the caller's then.
    """
    connection = connections[using]
    level = connection.settings_dict["OPTIONS"].get("isolation_level")
    is_stricter = level not in (None, IsolationLevel.READ_COMMITTED)
    if is_stricter and not connection.in_atomic_block:
        return read_committed(using)
    return nullcontext()
