"""READ COMMITTED, which queues need, whatever isolation the project chose for its own work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from django.db import IntegrityError, OperationalError, connections, transaction
from psycopg.errors import SerializationFailure, UniqueViolation

from kanthorq_django.sql import LEAVE_IDLE
from kanthorq_django.sql.session import is_outside

T = TypeVar("T")


@contextmanager
def read_committed(using: str) -> Iterator[None]:
    """Run the block in a transaction in which each statement sees what committed before it.

    The server ends it, and the connection, when its client falls silent in between.
    """
    with transaction.atomic(using=using):
        with connections[using].cursor() as cursor:
            # In one round trip; a statement without parameters may be two.
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL READ COMMITTED; {LEAVE_IDLE.text}")
        yield


@contextmanager
def brief(using: str) -> Iterator[None]:
    """Run the block in a transaction that the server ends when its client falls silent in it."""
    is_ours = not connections[using].in_atomic_block
    with transaction.atomic(using=using):
        if is_ours:
            with connections[using].cursor() as cursor:
                cursor.execute(LEAVE_IDLE.text)
        yield


@contextmanager
def patient(using: str) -> Iterator[None]:
    """Let the client of a transaction that one of these began take its time for the block."""
    name = "idle_in_transaction_session_timeout"
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT current_setting(%s)", [name])
        (before,) = cursor.fetchone()
        cursor.execute(f"SET LOCAL {name} TO DEFAULT")
        yield
        cursor.execute("SELECT set_config(%s, %s, true)", [name, before])


@contextmanager
def together(using: str) -> Iterator[None]:
    """Run the block in the caller's transaction, else in one as ``read_committed()`` begins it."""
    connection = connections[using]
    is_open = connection.in_atomic_block or not connection.get_autocommit()
    with transaction.atomic(using=using) if is_open else read_committed(using):
        yield


def unconflicted(using: str, run: Callable[[], T]) -> T:
    """Return what ``run`` returns, also where a stricter default lets it meet a conflict.

    It is tried as it is first: a transaction around it would cost three round trips. Inside a
    transaction, however it was begun, the conflict is that of who began it.
    """
    try:
        return run()
    except (OperationalError, IntegrityError) as error:
        # A row that was inserted meanwhile is not seen there, and cannot be inserted either.
        is_conflict = isinstance(error.__cause__, SerializationFailure | UniqueViolation)
        if not (is_conflict and is_outside(connections[using])):
            raise
    with read_committed(using):
        return run()
