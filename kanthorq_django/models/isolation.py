"""READ COMMITTED, which queues need, whatever isolation the project chose for its own work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import ParamSpec, TypeVar

from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError
from psycopg.errors import DeadlockDetected, SerializationFailure, UniqueViolation

from kanthorq_django.sql import LEAVE_IDLE
from kanthorq_django.sql.transactions import is_outside

DEADLOCKS_MAX = 5  # in a row that a verb survives

_SET_LOCAL = "SELECT set_config(%s, %s, true)"

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def read_committed(using: str, *, may_idle: bool = False) -> Iterator[None]:
    """Run the block in a transaction in which each statement sees what committed before it.

    The server ends it, and the connection, when its client falls silent in between, unless it
    ``may_idle``: where receivers of signals run in it, which take their time.
    """
    begin = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"
    with transaction.atomic(using=using):
        with connections[using].cursor() as cursor:
            # In one round trip; a statement without parameters may be two.
            cursor.execute(begin if may_idle else f"{begin}; {LEAVE_IDLE.text}")
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
    """Let the client of a ``brief()`` transaction take its time for the block."""
    name = "idle_in_transaction_session_timeout"
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT current_setting(%s)", [name])
        (before,) = cursor.fetchone()
        cursor.execute(f"SET LOCAL {name} TO DEFAULT")
        yield
        cursor.execute(_SET_LOCAL, [name, before])


@contextmanager
def together(using: str, *, may_idle: bool = False) -> Iterator[None]:
    """Run the block in the caller's transaction, else in one as ``read_committed()`` begins it."""
    connection = connections[using]
    is_open = connection.in_atomic_block or not connection.get_autocommit()
    with transaction.atomic(using=using) if is_open else read_committed(using, may_idle=may_idle):
        yield


@contextmanager
def waiting_at_most(using: str, lock_timeout: timedelta) -> Iterator[None]:
    """Run the block as ``together()`` does; none of its statements waits longer for a lock.

    Where the project waits less long, it stays at that.
    """
    name, longest = "lock_timeout", lock_timeout // timedelta(milliseconds=1)
    with together(using, may_idle=True), connections[using].cursor() as cursor:
        cursor.execute("SELECT setting::int FROM pg_settings WHERE name = %s", [name])
        (before,) = cursor.fetchone()
        is_longer = before == 0 or before > longest  # 0 is for ever
        cursor.execute(_SET_LOCAL, [name, str(longest if is_longer else before)])
        yield
        cursor.execute(_SET_LOCAL, [name, str(before)])  # the transaction may be the caller's


def check_read_committed(
    using: str,
    verb: str,
    *,
    what: str = "Events",
    unseen: str = "consumers that began to read them",
) -> None:
    """Raise TransactionManagementError in a transaction that cannot see who is new since it began.

    ``verb`` says what would have been done.
    """
    with connections[using].cursor() as cursor:
        cursor.execute("SHOW transaction_isolation")
        level = cursor.fetchone()[0]
    if level != "read committed":
        raise TransactionManagementError(
            f"{what} are {verb} in a READ COMMITTED transaction, not in a {level.upper()} one: it "
            f"would not see {unseen} meanwhile."
        )


def unconflicted(using: str, run: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Return what ``run`` returns, also where a stricter default lets it meet a conflict.

    It is tried as it is first: a transaction around it would cost three round trips. Inside a
    transaction, however it was begun, the conflict is that of who began it.
    """
    try:
        return run(*args, **options)
    except (OperationalError, IntegrityError) as error:
        # A row that was inserted meanwhile is not seen there, and cannot be inserted either.
        is_conflict = isinstance(error.__cause__, SerializationFailure | UniqueViolation)
        if not (is_conflict and is_outside(connections[using])):
            raise
    with read_committed(using):
        return run(*args, **options)


def undeadlocked(using: str, run: Callable[[], T]) -> T:
    """Return what ``run`` returns; it is run again where it was the victim of a deadlock.

    All of ours lock rows in the order of their ids. But a handler may end its messages in any
    order. Inside the caller's transaction the deadlock is the caller's.
    """
    for _ in range(DEADLOCKS_MAX):
        try:
            return run()
        except OperationalError as error:
            is_deadlock = isinstance(error.__cause__, DeadlockDetected)
            if not (is_deadlock and is_outside(connections[using])):
                raise
    return run()
