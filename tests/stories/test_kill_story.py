"""Workers are killed with -9 at random moments; every business row is there exactly once."""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from uuid import UUID

import pytest

from kanthorq_django import publish_many
from kanthorq_django.models import Event, Task
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.processes import PATIENCE, RunningWorker, runworker
from tests.quick_run import sooner

pytestmark = pytest.mark.django_db(transaction=True)

CONSUMERS = ("atomic", "transactional")
ROUNDS, EVENTS = 4, 150
LONGEST_LIFE = 0.4  # seconds that a worker may work before it is killed


def publish_orders() -> set[UUID]:
    events = [Event(subject="entry.made", body=number) for number in range(EVENTS)]
    return {event.pk for event in publish_many(events, stream="ledger")}


@contextmanager
def doomed(chance: random.Random) -> Iterator[RunningWorker]:
    """A worker that waits for work, and is killed at the end of the block."""
    concurrency = chance.randrange(1, 9)
    with runworker(*CONSUMERS, "--concurrency", concurrency) as worker:
        worker.wait_until_started()
        yield worker


def kill_at_random_moments(workers: Iterable[RunningWorker], chance: random.Random) -> None:
    for worker in workers:
        time.sleep(chance.uniform(0, LONGEST_LIFE))  # the moment is what the story is about
        os.killpg(worker.pid, signal.SIGKILL)


def are_all_final(count: int) -> bool:
    return Task.objects.count() == Task.objects.completed().count() == count


@pytest.mark.parametrize("run", sooner([0, 1], 0))
def test_every_row_is_there_exactly_once_whenever_workers_are_killed(run: int):
    seed = random.SystemRandom().randrange(2**32)
    sys.stdout.write(f"seed {seed}\n")  # pytest shows it when the story ends badly
    chance = random.Random(seed)  # noqa: S311  # not a secret
    published: set[UUID] = set()
    for _ in range(ROUNDS):
        with doomed(chance) as first, doomed(chance) as second:
            published |= publish_orders()
            wait_until(lambda: Task.objects.running().exists(), PATIENCE)
            kill_at_random_moments((first, second), chance)

    with runworker(*CONSUMERS, "--poll-interval", 0.1):
        wait_until(lambda: are_all_final(2 * len(published)), PATIENCE)
    for note in CONSUMERS:
        times = Counter(Entry.objects.filter(note=note).values_list("event_id", flat=True))
        assert set(times) == published
        assert set(times.values()) == {1}
    repeated = Task.objects.filter(attempt_count__gt=1).count()
    sys.stdout.write(f"{repeated} tasks needed more than one attempt\n")
