"""Prune: deleting what everybody has dealt with, in transactions too short to be in the way.

An event goes when every consumer of its stream has read it and all its tasks have been final
for long enough, and its tasks go with it. An event that no consumer selected goes by its age.
Its idempotency key goes too: published again, it is a new event.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, Self

from django.db import connections, router
from django.db.models import Exists, OuterRef
from django.db.models.expressions import RawSQL

from kanthorq_django import signals, sql
from kanthorq_django.conf import get_settings
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.exceptions import ForeignCluster
from kanthorq_django.models.audit import OperatorAction, Order
from kanthorq_django.models.consumer import Consumer
from kanthorq_django.models.event import Event
from kanthorq_django.models.isolation import check_read_committed, together
from kanthorq_django.models.stream import Stream

BATCH = 1_000  # events that one transaction looks at
BATCH_MAX = 100_000
OLDER_THAN_MAX = timedelta(days=36_500)  # PostgreSQL can subtract it from any current time
BEFORE_ALL = ("0", "00000000-0000-0000-0000-000000000000")  # (xid, id) of no event


class Pruned(NamedTuple):
    """How many events were pruned, tasks with them, and rows of the audit for their own age."""

    events: int = 0
    tasks: int = 0
    audit: int = 0

    def plus(self, other: Self) -> Self:
        return type(self)(
            self.events + other.events, self.tasks + other.tasks, self.audit + other.audit
        )


def prune(
    older_than: timedelta,
    *,
    streams: Iterable[Stream] | None = None,
    batch: int = BATCH,
    using: str | None = None,
    on_batch: Callable[[Pruned], None] | None = None,
    order: Order | None = None,
) -> Pruned:
    """Delete events that are done with for ``older_than``, and their tasks; return how many.

    ``streams`` defaults to those that have consumers: without one nobody has read anything,
    so such a stream has to be named, and is pruned by age. Each ``batch`` of events is a
    transaction of its own, unless one is open; after it ``on_batch`` gets the sum so far. What
    an operator's ``order`` deletes is recorded in the same transactions. At the end, rows of the
    audit that are older than ``AUDIT_RETENTION`` go as well, if this role may delete them.
    Raises ForeignCluster when a cursor of these streams cannot be trusted, and
    TransactionManagementError in an open transaction that is not READ COMMITTED.
    """
    total = Pruned()
    for reader in _readers(older_than, streams, batch, using):
        for page in reader._replace(order=order).pages(is_pruning=True):
            total = total.plus(page)
            if on_batch is not None:
                on_batch(total)
    return total._replace(audit=_prune_audit(using, is_pruning=True))


def count_prunable(
    older_than: timedelta,
    *,
    streams: Iterable[Stream] | None = None,
    batch: int = BATCH,
    using: str | None = None,
) -> Pruned:
    """Return what ``prune()`` would delete now; reads only. Raises as it does."""
    total = Pruned()
    for reader in _readers(older_than, streams, batch, using):
        for page in reader.pages(is_pruning=False):
            total = total.plus(page)
    return total._replace(audit=_prune_audit(using, is_pruning=False))


def consumed_streams(using: str) -> list[Stream]:
    """Return the streams that have consumers."""
    has_consumers = Exists(Consumer.objects.filter(stream=OuterRef("pk")))
    return list(Stream.objects.using(using).filter(has_consumers).order_by("pk"))


def _prune_audit(using: str | None, *, is_pruning: bool) -> int:
    """Delete, or only count, what is too old; nothing is if this role may not delete it."""
    alias = using or router.db_for_write(OperatorAction)
    actions, retention = OperatorAction.objects.using(alias), get_settings().AUDIT_RETENTION
    with connections[alias].cursor() as cursor:
        table = connections[alias].ops.quote_name(OperatorAction._meta.db_table)
        cursor.execute("SELECT has_table_privilege(%s, 'DELETE')", [table])
        (is_allowed,) = cursor.fetchone()
    if not is_allowed:
        return 0
    return actions.prune(retention) if is_pruning else actions.past(retention).count()


def _readers(
    older_than: timedelta, streams: Iterable[Stream] | None, batch: int, using: str | None
) -> "list[_Reader]":
    if not isinstance(older_than, timedelta) or not timedelta(0) <= older_than <= OLDER_THAN_MAX:
        raise ValueError(
            f"older_than must be a timedelta from zero to {OLDER_THAN_MAX.days:,} days, "
            f"not {quoted(older_than)}."
        )
    if type(batch) is not int or not 1 <= batch <= BATCH_MAX:
        raise ValueError(f"batch must be 1 to {BATCH_MAX:,}, not {quoted(batch)}.")
    alias = using or router.db_for_write(Event)
    chosen = consumed_streams(alias) if streams is None else list(streams)
    _check_cursors(chosen, alias)
    return [_Reader(stream, older_than, batch, alias) for stream in chosen]


def _check_cursors(streams: Iterable[Stream], using: str) -> None:
    ours = RawSQL("(SELECT system_identifier FROM pg_control_system())", ())
    readers = Consumer.objects.using(using).filter(stream__in=streams)
    if foreign := readers.exclude(cluster_id=ours).order_by("name").first():
        raise ForeignCluster(
            f"The cursor of consumer {foreign.name!r} was written by another PostgreSQL cluster, "
            "so nobody can tell what it has read. Run first: manage.py kanthorq rebase"
        )


class _Reader(NamedTuple):
    """Goes through one stream, oldest transaction first, page by page."""

    stream: Stream
    older_than: timedelta
    batch: int
    using: str
    order: Order | None = None

    def pages(self, *, is_pruning: bool) -> Iterator[Pruned]:
        """Yield what went, or could go, of each page.

        A page in which nothing is old enough is the last one. An old event may still come
        after it, of a transaction that was open for long: a later prune finds it.
        """
        after = BEFORE_ALL
        while True:
            page, pruned = self._prune(after) if is_pruning else self._count(after)
            yield pruned
            if len(page) < self.batch or not any(event.is_old for event in page):
                return
            after = (page[-1].xid, page[-1].id)

    def _count(self, after: tuple[Any, Any]) -> tuple[list[Any], Pruned]:
        page = self._page(after)
        counts = [event.task_count for event in page if event.is_prunable]
        return page, Pruned(len(counts), sum(counts))

    def _prune(self, after: tuple[Any, Any]) -> tuple[list[Any], Pruned]:
        with together(self.using):
            check_read_committed(self.using, "pruned")
            sql.rows(self.using, "lock_stream", {"stream_id": self.stream.pk})
            page = self._page(after)
            ids = [event.id for event in page if event.is_prunable]
            pruned, gone = self._delete(ids)
            if self.order is not None:
                counts = {"events": pruned.events, "tasks": pruned.tasks}
                self.order.record("events.prune", using=self.using, counts=counts, ids=gone)
        if pruned.events:
            signals.tell(signals.pruned, Event, connections[self.using], count=pruned.events)
        return page, pruned

    def _page(self, after: tuple[Any, Any]) -> list[Any]:
        params = {
            "stream_id": self.stream.pk,
            "older_than": self.older_than,
            "after_xid": after[0],
            "after_id": after[1],
            "batch": self.batch,
        }
        return sql.rows(self.using, "prunable", params)

    def _delete(self, ids: list[Any]) -> tuple[Pruned, list[Any]]:
        """Return how much went, and which events: those whose tasks are locked stay."""
        if not ids:
            return Pruned(), []
        (row,) = sql.rows(self.using, "prune", {"ids": ids, "older_than": self.older_than})
        return Pruned(len(row.event_ids), row.task_count), row.event_ids
