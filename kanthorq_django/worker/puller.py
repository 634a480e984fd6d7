"""Decides whose tasks are fetched next: one look for all consumers, then pulls and claims."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

from kanthorq_django import sql
from kanthorq_django.exceptions import PullRefused
from kanthorq_django.models import Consumer, Task
from kanthorq_django.worker.options import WorkerOptions

logger = logging.getLogger("kanthorq_django.worker")


class Look(NamedTuple):
    """What a look found for one consumer; ``due_in`` is seconds, None when no task waits."""

    has_events: bool
    due_in: float | None

    @property
    def has_work(self) -> bool:
        return self.has_events or self.is_due

    @property
    def is_due(self) -> bool:
        return self.due_in is not None and self.due_in <= 0


class Haul(NamedTuple):
    """What was fetched; contended means that another worker was at the same rows."""

    tasks: list[Task]
    has_progressed: bool
    is_contended: bool

    def plus(self, other: "Haul") -> "Haul":
        return Haul(
            self.tasks + other.tasks,
            self.has_progressed or other.has_progressed,
            self.is_contended or other.is_contended,
        )


class Puller:
    """Fetches leased tasks for the consumers of one worker, in turn, so that none starves."""

    def __init__(self, consumers: list[Consumer], options: WorkerOptions, using: str) -> None:
        self._consumers = {consumer.pk: consumer for consumer in consumers}
        self._options = options
        self._using = using
        self._turn = 0
        self._refusals: dict[int, str] = {}

    def look(self) -> dict[int, Look]:
        """Return what there is to do for each consumer; one statement that writes nothing."""
        params = {
            "consumer_ids": list(self._consumers),
            "states": sorted(self._options.claims),
        }
        return {
            row.id: Look(row.has_events and self._options.pulls, row.due_in_seconds)
            for row in sql.rows(self._using, "peek", params)
        }

    def in_turn(self) -> Iterator[Consumer]:
        """Yield every consumer once, starting with another one each time."""
        self._turn += 1
        consumers = list(self._consumers.values())
        start = self._turn % len(consumers)
        yield from consumers[start:] + consumers[:start]

    def fetch(self, consumer: Consumer, look: Look, room: int) -> Haul:
        """Lease at most ``room`` tasks: old obligations and new events take turns to come first."""
        limit = min(room, self._options.batch_size)
        steps = [self._claim] * look.is_due + [self._pull] * look.has_events
        if self._turn % 2:
            steps.reverse()
        haul = Haul([], has_progressed=False, is_contended=False)
        for step in steps:
            if len(haul.tasks) < limit:
                haul = haul.plus(step(consumer, limit - len(haul.tasks)))
        return haul

    def _claim(self, consumer: Consumer, limit: int) -> Haul:
        tasks = consumer.claim(limit, states=self._options.claims)
        return Haul(tasks, has_progressed=bool(tasks), is_contended=not tasks)

    def _pull(self, consumer: Consumer, limit: int) -> Haul:
        try:
            page = consumer.pull_page(limit)
        except PullRefused as error:
            if self._options.burst:
                raise
            self._refuse(consumer, str(error))
            return Haul([], has_progressed=False, is_contended=False)
        self._refusals.pop(consumer.pk, None)
        return Haul(page.tasks, has_progressed=not page.is_idle, is_contended=page.is_idle)

    def _refuse(self, consumer: Consumer, reason: str) -> None:
        """Say once why a consumer is not read; the next look tries again, as after a failover."""
        if self._refusals.get(consumer.pk) != reason:
            self._refusals[consumer.pk] = reason
            logger.error("%s", reason, extra={"consumer": consumer.name})
