"""Which transaction is open on a connection, begun by Django's means or past them.

And how to keep it from being committed.
"""

from typing import Any

import psycopg
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus


def is_idle(raw: "psycopg.Connection[Any]") -> bool:
    """Tell whether nobody has begun a transaction, or a pipeline, past Django."""
    pgconn = raw.pgconn
    return pgconn.transaction_status == TransactionStatus.IDLE and not pgconn.pipeline_status


def is_aborted(raw: "psycopg.Connection[Any]") -> bool:
    """Tell whether a statement has failed in the transaction, so that it can only roll back."""
    return raw.pgconn.transaction_status == TransactionStatus.INERROR


def is_outside(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether ``connection`` is in no transaction, by Django's means or past them."""
    is_managed = connection.in_atomic_block or not connection.get_autocommit()
    raw = connection.connection
    return not is_managed and (raw is None or is_idle(raw))


def own_blocks(using: str) -> list[Any]:
    """Return the application's open blocks; a TestCase's own never commit, and are none of it."""
    blocks = connections[using].atomic_blocks
    return [block for block in blocks if not getattr(block, "_from_testcase", False)]


def open_transaction(using: str) -> tuple[object, object] | None:
    """Return what tells the application's open transaction from others, None without one.

    The block alone would not: a function under ``@transaction.atomic`` has the same one each time.
    """
    own = own_blocks(using)
    return (own[0], connections[using].connection) if own else None


def forbid_commit(using: str) -> None:
    """Let no open block commit, even if the error that says why is swallowed."""
    connection, own = connections[using], own_blocks(using)
    if own:
        transaction.set_rollback(True, using=using)
    if (inner := len(own) - 1) > 0:
        # A block without a savepoint to roll back to marks the block around it for rollback.
        connection.savepoint_ids[-inner:] = [None] * inner  # type: ignore[list-item]  # Django's too
