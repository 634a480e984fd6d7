"""For the tests of projects: run the handlers of what a test has published, in its own thread.

Works inside Django's ``TestCase``, whose transaction never commits, as well as outside of one.
"""

import time
from collections.abc import Iterable

from asgiref.sync import async_to_sync
from django.db import connections, router

from kanthorq_django import sql
from kanthorq_django.domain import subjects
from kanthorq_django.models import Consumer, Task
from kanthorq_django.subscribers import find, sync
from kanthorq_django.worker.acknowledger import Acknowledger
from kanthorq_django.worker.executor import Ending, aexecute, execute
from kanthorq_django.worker.flight import Flight

BATCH_SIZE = 1_000


def drain(*consumers: str) -> int:
    """Handle all that is due for ``consumers`` (none named: for all); return how many handlers ran.

    Also what handlers publish meanwhile. A failing handler is nacked as in a worker, its
    error stands in ``task.attempted_errors``; what waits for a retry is left to wait.
    """
    using: str = router.db_for_write(Consumer)
    rows = sync(consumers or None, using=using)
    acknowledger = Acknowledger(using, written=lambda leases: None)
    count = 0
    while tasks := [task for row in rows for task in _lease_due(row, using)]:
        for task in tasks:
            acknowledger.write([_handle(task)])
        count += len(tasks)
    return count


def _lease_due(consumer: Consumer, using: str) -> Iterable[Task]:
    yield from consumer.claim(BATCH_SIZE)
    if connections[using].in_atomic_block:
        yield from _pull_uncommitted(consumer, using)
    else:
        yield from consumer.pull(BATCH_SIZE)


def _pull_uncommitted(consumer: Consumer, using: str) -> list[Task]:
    params = {
        "consumer_id": consumer.pk,
        "includes": subjects.to_regex(consumer.subject_includes),
        "excludes": subjects.to_regex(consumer.subject_excludes),
        "limit": BATCH_SIZE,
    }
    return [Task.from_row(row, consumer) for row in sql.rows(using, "pull_uncommitted", params)]


def _handle(task: Task) -> Ending:
    flight = Flight(task, find(task.consumer.name), time.monotonic())
    flight.start()
    return async_to_sync(aexecute)(flight) if flight.is_async else execute(flight)
