"""Deletions by the ORM: nobody may make tasks of what goes, and they lock in one order."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.db import models

from kanthorq_django import sql
from kanthorq_django.models.isolation import check_read_committed, together
from kanthorq_django.models.stream import Stream

if TYPE_CHECKING:
    from kanthorq_django.models.consumer import Consumer


def is_whole(rows: "models.QuerySet[Any]") -> bool:
    """Tell whether ``rows`` are a query that can be deleted, so that locks are worth taking."""
    query = rows.query
    is_part = query.is_sliced or query.distinct_fields or query.combinator
    return not is_part and rows._fields is None  # type: ignore[attr-defined]  # not in the stubs


@contextmanager
def without_pulls(consumers: "models.QuerySet[Consumer]") -> Iterator[None]:
    """Run the block in a transaction in which nobody pulls for ``consumers``, or moves their tasks.

    Nothing but this lock keeps a pull from making tasks between the deletion of those there are
    and that of their consumer. Their streams are locked before, as where events are deleted.
    """
    using, chosen = consumers.db, consumers.values("pk")
    with together(using, may_idle=True):  # Django collects row by row, and tells receivers
        stored = consumers.model._base_manager.using(using).filter(pk__in=chosen)
        _lock(Stream._base_manager.using(using).filter(pk__in=stored.values("stream")), no_key=True)
        sql.rows(using, "lock_tasks", {"consumer_ids": _lock(stored, no_key=True)})
        yield


@contextmanager
def without_deliveries(streams: Any, using: str) -> Iterator[None]:
    """Run the block in a transaction in which no event of ``streams`` becomes a task.

    Nobody pulls for their consumers, and none joins them: its foreign key locks the same row.
    Raises TransactionManagementError in an open transaction that is not READ COMMITTED.
    """
    from kanthorq_django.models.consumer import Consumer

    with together(using, may_idle=True):
        check_read_committed(using, "deleted")
        locked = _lock(Stream._base_manager.using(using).filter(pk__in=streams))
        _lock(Consumer._base_manager.using(using).filter(stream__in=locked), no_key=True)
        yield


def _lock(rows: "models.QuerySet[Any]", *, no_key: bool = False) -> list[int]:
    """Lock ``rows`` in the order of their keys; return these."""
    return list(rows.select_for_update(no_key=no_key).order_by("pk").values_list("pk", flat=True))
