"""Workers publish what schedules owe; killed with -9 halfway, they publish each occurrence once."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection, transaction
from django.utils import timezone

from kanthorq_django import schedule
from kanthorq_django.models import Event, Schedule
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.processes import PATIENCE, RunningWorker, runworker

pytestmark = pytest.mark.django_db(transaction=True)

CONSUMER = "atomic"  # of the stream "ledger": workers need something to work for
MINUTE = timedelta(minutes=1)


def overdue(count: int, stream: str, catchup: str = "all") -> set[str]:
    """Make a schedule that missed its only ``count`` occurrences; return them as events tell."""
    first = timezone.now().astimezone(UTC).replace(second=0, microsecond=0) - count * MINUTE
    last = first + (count - 1) * MINUTE
    schedule(
        "minutely",
        rrule=f"FREQ=MINUTELY;UNTIL={last:%Y%m%dT%H%M%SZ}",
        dtstart=first,
        timezone="Europe/Berlin",
        subject="entry.due",
        stream=stream,
        catchup=catchup,
    )
    Schedule.objects.update(next_at=first)
    return {(first + number * MINUTE).isoformat() for number in range(count)}


def published() -> Counter[str]:
    """Return how often each occurrence was published."""
    return Counter(event.metadata["occurrence"] for event in Event.objects.all())


def has_ended() -> bool:
    return Schedule.objects.filter(next_at=None, cancelled_at=None).exists()


@contextmanager
def publishers_waiting() -> Iterator[None]:
    """Let everybody read events, and those who publish wait with what they have locked."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {Event._meta.db_table} IN SHARE MODE")
        yield


def is_anybody_waiting() -> bool:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = %s::regclass",
            [Event._meta.db_table],
        )
        return bool(cursor.fetchone()[0])


def kill(worker: RunningWorker) -> None:
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def test_a_worker_publishes_what_is_due_and_its_handler_runs():
    (occurrence,) = overdue(1, "ledger", catchup="last")

    with runworker(CONSUMER, "--poll-interval", 0.1):
        wait_until(lambda: Entry.objects.exists() and has_ended(), PATIENCE)

    event = Event.objects.get()
    assert event.metadata == {"schedule": "minutely", "occurrence": occurrence}
    assert Entry.objects.get().event_id == event.pk
    assert Schedule.objects.get().last_at == datetime.fromisoformat(occurrence)


def test_one_of_two_workers_is_killed_in_the_middle_of_a_backlog():
    expected = overdue(10_000, "reports")

    with runworker(CONSUMER) as doomed, runworker(CONSUMER) as other:
        with publishers_waiting():
            doomed.wait_until_started()
            other.wait_until_started()
        wait_until(lambda: Event.objects.count() >= 300, PATIENCE)
        kill(doomed)
        assert Event.objects.count() < len(expected), "the backlog was too short to be halfway"
        wait_until(has_ended, 2 * PATIENCE)

    assert published() == dict.fromkeys(expected, 1)


def test_a_worker_that_is_killed_inside_its_transaction_leaves_all_of_it_to_the_other():
    expected = overdue(250, "reports")

    with ExitStack() as later:
        with publishers_waiting(), runworker(CONSUMER) as doomed:
            wait_until(is_anybody_waiting, PATIENCE)
            other = later.enter_context(runworker(CONSUMER))
            other.wait_until_started()
            kill(doomed)
        wait_until(has_ended, PATIENCE)

    assert published() == dict.fromkeys(expected, 1)
