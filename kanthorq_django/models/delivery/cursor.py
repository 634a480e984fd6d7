"""What a consumer has read of its stream, and where that is refused.

In an open transaction, on a standby, and in another cluster than the one that wrote the cursor.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import DataError, InternalError, connections

from kanthorq_django import sql
from kanthorq_django.conf import get_settings
from kanthorq_django.domain import subjects
from kanthorq_django.domain.states import TaskState
from kanthorq_django.exceptions import ForeignCluster, PullInsideTransaction, StandbyDatabase
from kanthorq_django.models.delivery.leased import BODIES_SIZE_MAX, Leased, pulled_by
from kanthorq_django.sql.result import Result
from kanthorq_django.sql.transactions import is_outside

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer
    from kanthorq_django.models.task import Task

logger = logging.getLogger("kanthorq_django")

# What pulls move, and rebase(), and nobody else.
COLUMNS = frozenset({"cursor", "window", "position_xid", "position_id", "cluster_id"})

NO_FLOOR = 0  # microseconds since 1970, as floors are: see peek.sql


class Lag(NamedTuple):
    """How far a consumer is behind its stream."""

    # Unread events, whether the filters select them or not. (It hides a method of tuples.)
    count: int  # type: ignore[assignment]
    is_bounded: bool  # there are more than ``count``; it was not counted further
    oldest: timedelta | None  # the age of the oldest event counted; None when there is none


class Page(NamedTuple):
    """What one pull did: what it leased, and whether there was nothing for it to read."""

    leased: list[Leased]
    is_idle: bool
    is_full: bool = False  # it stopped where the room was filled, or the bodies became too many

    @property
    def tasks(self) -> "list[Task]":
        return [leased.task for leased in self.leased]


def lag(consumer: "Consumer", limit: int) -> Lag:
    """Count the unread events of ``consumer``, at most ``limit`` of them."""
    params = {"consumer_id": consumer.pk, "limit": limit}
    (row,) = sql.rows(consumer.using, "lag", params)
    return Lag(row.count, row.is_bounded, row.oldest)


def has_unread(consumer: "Consumer") -> bool:
    """Tell whether a pull has something to do; it writes nothing, not even a lock."""
    return any(row.has_events for row in peek({consumer.pk: NO_FLOOR}, [], consumer.using))


def peek(
    floors: Mapping[int, int],
    states: Iterable[TaskState],
    using: str,
    *,
    horizon: timedelta = timedelta(0),
) -> list[Any]:
    """Look once for consumers, by their ids; writes nothing.

    Returns a row for each: ``id``, ``has_events``, ``looked_at``, ``due_at`` of its first task in
    ``states`` that is due within ``horizon``, not looked for before its floor, and ``turn_at`` of
    the first that waits for a turn.
    Moments and floors are microseconds since 1970.
    """
    params = {
        "consumer_ids": list(floors),
        "floors": list(floors.values()),
        "states": sorted(states),
        "horizon": horizon,
    }
    return sql.rows_by_one_plan(using, "peek", params)


def read_page(consumer: "Consumer", limit: int, size_max: int = BODIES_SIZE_MAX) -> Page:
    """Turn the next page of events into tasks, move the cursor past it, and commit.

    At most ``limit`` tasks, whose bodies have no more than ``size_max`` bytes, or a single one.
    One round trip. Raises ForeignCluster.
    """
    while True:
        locked, rows = _lock_and_read(consumer, limit, size_max)
        if not locked:
            return Page([], is_idle=True)  # another puller is at it
        if not locked[0].is_ours:
            raise _foreign_cluster(consumer)
        is_read, is_idle, is_full = rows.values(0, ("is_read", "is_idle", "is_full"))
        if is_read:
            return Page(pulled_by(consumer, rows), is_idle, is_full)
        consumer.subject_includes = json.loads(locked[0].subject_includes)
        consumer.subject_excludes = json.loads(locked[0].subject_excludes)


def _lock_and_read(consumer: "Consumer", limit: int, size_max: int) -> tuple[list[Any], Result]:
    """Read a page, if nobody else does so, and if the filters are still those we know.

    Returns the consumer's row, if it could be locked. Raises ForeignCluster.
    """
    params = {
        "consumer_id": consumer.pk,
        "subject_includes": json.dumps(consumer.subject_includes),
        "subject_excludes": json.dumps(consumer.subject_excludes),
        "includes": subjects.to_regex(consumer.subject_includes),
        "excludes": subjects.to_regex(consumer.subject_excludes),
        "limit": limit,
        "size_max": size_max,
        "visibility_timeout": consumer.visibility_timeout,
        "page_size": max(limit, get_settings().PAGE_SIZE),
    }
    try:
        return sql.transaction_of(consumer.using, "lock_consumer", "pull", params)
    except DataError as error:
        if sql.is_failed_cast(error, "another cluster"):
            raise _foreign_cluster(consumer) from error
        raise


def mend(consumer: "Consumer") -> bool:
    """Let the cursor know of open transactions that the server had forgotten.

    Returns False if there are none, so that the cursor is of another cluster; True also if another
    puller is at it.

    Seen with PostgreSQL 18.4: prepared before a checkpoint that a full disk cut short, they were
    gone after the recovery, and there again after the next start.
    """
    params = {"consumer_id": consumer.pk}
    with sql.begun(consumer.using, "lock_consumer", params) as locked:
        if not locked:
            return True  # another puller is at it
        xids = [row.xid for row in sql.rows(consumer.using, "mend_cursor", params)]
    if xids:
        logger.warning(
            "The server has open transactions again that consumer %s saw ended: %s. Their events "
            "will be read if they commit.",
            consumer.name,
            xids,
            extra={"consumer": consumer.name},
        )
    return bool(xids)


def check_no_transaction(using: str) -> None:
    """Raise PullInsideTransaction unless a pull can have a transaction of its own."""
    if not is_outside(connections[using]):
        raise PullInsideTransaction(
            "pull() needs a transaction of its own: it would skip what the open one publishes."
        )


@contextmanager
def refused_by_standby(using: str) -> Iterator[None]:
    """Raise StandbyDatabase if the block fails because the database takes no writes.

    Asking first would cost every pull a round trip.
    """
    try:
        yield
    except InternalError as error:
        if is_standby(using):
            raise StandbyDatabase(
                f"The database {using!r} is a standby; pull from the primary."
            ) from error
        raise


def is_standby(using: str) -> bool:
    """Ask the database whether it is a standby, or still recovers."""
    with connections[using].cursor() as cursor:
        cursor.execute("SELECT pg_is_in_recovery()")
        return bool(cursor.fetchone()[0])


def _foreign_cluster(consumer: "Consumer") -> ForeignCluster:
    return ForeignCluster(
        f"The cursor of consumer {consumer.name!r}, or an event of its stream, was written by "
        "another PostgreSQL cluster, as after a restore or a move. Stop the workers and run: "
        "manage.py kanthorq rebase"
    )
