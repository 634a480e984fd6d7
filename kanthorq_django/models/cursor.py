"""What a consumer has read of its stream, and where reading is refused."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from kanthorq_django import sql
from kanthorq_django.exceptions import ForeignCluster, StandbyDatabase

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer


class Lag(NamedTuple):
    """How far a consumer is behind its stream."""

    # Unread events, whether the filters select them or not. (It hides a method of tuples.)
    count: int  # type: ignore[assignment]
    is_bounded: bool  # there are more than ``count``; it was not counted further
    oldest: timedelta | None  # the age of the oldest event counted; None when there is none


def lag(consumer: "Consumer", limit: int) -> Lag:
    """Count the unread events of ``consumer``, at most ``limit`` of them."""
    params = {"consumer_id": consumer.pk, "limit": limit}
    (row,) = sql.rows(consumer.using, "lag", params)
    return Lag(row.count, row.is_bounded, row.oldest)


def check_cluster(consumer: "Consumer", locked: Any) -> None:
    """Raise StandbyDatabase or ForeignCluster unless the cursor means something here."""
    if locked.is_standby:
        raise StandbyDatabase(
            f"The database {consumer.using!r} is a standby; pull from the primary."
        )
    if locked.cluster_id != locked.current_cluster_id:
        raise foreign_cluster(consumer)


def foreign_cluster(consumer: "Consumer") -> ForeignCluster:
    return ForeignCluster(
        f"The cursor of consumer {consumer.name!r} was written by another PostgreSQL cluster, as "
        "after a restore or a move. Stop the workers and run: manage.py kanthorq rebase"
    )
