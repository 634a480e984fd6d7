"""Rebase: letting consumers go on after a restore or a move into another PostgreSQL cluster.

Transaction ids mean something only in the cluster that issued them, so a cursor of another one is
refused by a pull: see delivery/cursor.py.
"""

from typing import NamedTuple

from django.db import OperationalError, connections, transaction
from psycopg.errors import LockNotAvailable

from kanthorq_django import sql
from kanthorq_django.domain import subjects
from kanthorq_django.exceptions import RebaseRefused
from kanthorq_django.models.audit import Order
from kanthorq_django.models.consumer import Consumer
from kanthorq_django.models.delivery.cursor import is_standby
from kanthorq_django.models.isolation import read_committed
from kanthorq_django.models.worker import DEAD_AFTER, Worker

LOCK_TIMEOUT = "10s"


class Rebased(NamedTuple):
    """What a rebase did for one consumer."""

    name: str
    event_count: int  # events that its filters select and that it had not read
    task_count: int  # tasks added for them; fewer where a task existed


def rebase(using: str, *, dry_run: bool = False, order: Order | None = None) -> list[Rebased]:
    """Let all consumers go on in this cluster, after a restore or a move of the database.

    Each gets the tasks that it owes and does not have; nothing is lost and nothing repeated,
    and a second run adds nothing. It is one transaction, for which publishers wait; with
    ``dry_run`` it counts, and is rolled back. An operator's ``order`` is recorded with it.
    Returns the consumers in the order of their names. Raises RebaseRefused while a worker is
    alive or a transaction that published stays open, inside a transaction, and on a standby.
    """
    _check(using)
    with read_committed(using):
        _lock_consumers(using)  # first, as where events are deleted
        _lock_out_publishers(using)
        rebased = _rebase(using)
        if order is not None:
            tasks = sum(consumer.task_count for consumer in rebased)
            counts = {"consumers": len(rebased), "tasks": tasks}
            order.record("rebase", using=using, counts=counts, ids=[each.name for each in rebased])
        transaction.set_rollback(dry_run, using=using)
    return rebased


def _check(using: str) -> None:
    connection = connections[using]
    if connection.in_atomic_block or not connection.get_autocommit():
        raise RebaseRefused("rebase() needs a transaction of its own; one is open.")
    if is_standby(using):
        raise RebaseRefused(f"The database {using!r} is a standby; rebase the primary.")
    if alive := sorted(map(str, Worker.objects.using(using).alive())):
        raise RebaseRefused(
            f"Workers are alive: {', '.join(alive)}. Stop them first; one that was killed, or "
            "came along with a restore, counts as dead after "
            f"{DEAD_AFTER.total_seconds():.0f} seconds."
        )


def _lock_out_publishers(using: str) -> None:
    """Raise RebaseRefused if an open one keeps us waiting: all others would wait behind us."""
    with connections[using].cursor() as cursor:
        cursor.execute("SET LOCAL statement_timeout = 0")  # it reads every event
        cursor.execute("SELECT set_config('lock_timeout', %s, true)", [LOCK_TIMEOUT])
        try:
            cursor.execute(sql.load("rebase_lock"))
        except OperationalError as error:
            if not isinstance(error.__cause__, LockNotAvailable):
                raise
            raise RebaseRefused(
                "A transaction that has published is still open; end it first. It is in "
                "pg_stat_activity, or in pg_prepared_xacts."
            ) from error
        cursor.execute("SET LOCAL lock_timeout = 0")


def _lock_consumers(using: str) -> list[Consumer]:
    return list(Consumer.objects.using(using).select_for_update(no_key=True).order_by("pk"))


def _rebase(using: str) -> list[Rebased]:
    boundary = sql.rows(using, "rebase_boundary", {})[0].boundary
    consumers = _lock_consumers(using)  # once more: one may have joined
    rebased = [_add_tasks(consumer, boundary) for consumer in consumers]
    params = {"consumer_ids": [consumer.pk for consumer in consumers]}
    (row,) = sql.rows(using, "rebase_cursors", params)
    sql.rows(using, "rebase_events", {"snapshot": row.snapshot})
    return sorted(rebased)


def _add_tasks(consumer: Consumer, boundary: int | None) -> Rebased:
    params = {
        "consumer_id": consumer.pk,
        "includes": subjects.to_regex(consumer.subject_includes),
        "excludes": subjects.to_regex(consumer.subject_excludes),
        "boundary": boundary,
    }
    (row,) = sql.rows(consumer.using, "rebase_consumer", params)
    return Rebased(consumer.name, row.event_count, row.task_count)
