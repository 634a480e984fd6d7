"""What a look for due tasks reads, and that it misses nothing."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now

from kanthorq_django import publish, sql
from kanthorq_django.models import Task, TaskState
from kanthorq_django.models.delivery.cursor import NO_FLOOR, peek
from kanthorq_django.models.fields import EPOCH
from kanthorq_django.subscribers import sync
from kanthorq_django.worker.pulling import floors
from kanthorq_django.worker.pulling.floors import Floors
from tests.concurrency import begin_elsewhere
from tests.factories import ConsumerFactory, TaskFactory
from tests.worker.working import PATIENCE, accept, announce, wait_for_state, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = timedelta(hours=1)
CLAIMED = [TaskState.AVAILABLE, TaskState.RUNNING, TaskState.RETRYABLE, TaskState.CANCELLING]


def look(known: Floors, horizon: timedelta = timedelta(0)) -> int | None:
    """Look once, as a worker does; return when the first task is due."""
    (row,) = peek(known.begin(), CLAIMED, "default", horizon=horizon)
    known.learn([row])
    due_at: int | None = row.due_at
    return due_at


def test_the_first_look_begins_at_the_beginning():
    consumer = TaskFactory.create(
        state=TaskState.AVAILABLE, schedule_at=Now() - 100 * HOUR
    ).consumer
    known = Floors([consumer.pk])
    assert known[consumer.pk] == NO_FLOOR
    assert look(known) is not None


@pytest.mark.parametrize("keys", [{}, {"resource_key": "a", "turn_key": "a"}])
def test_the_first_of_those_that_will_be_due_is_told(keys: dict[str, str]):
    moments = [Now() + minutes * HOUR / 60 for minutes in (30, 10, 50)]
    consumer = ConsumerFactory.create()
    for moment in moments:
        TaskFactory.create(consumer=consumer, schedule_at=moment, **keys)
    first = Task.objects.order_by("schedule_at")[0].schedule_at
    (row,) = peek({consumer.pk: NO_FLOOR}, CLAIMED, "default", horizon=HOUR)
    told = row.turn_at if keys else row.due_at
    assert EPOCH + told * timedelta(microseconds=1) == first


def test_the_next_ones_begin_where_nothing_was_due(monkeypatch):
    monkeypatch.setattr(floors, "FULL_EVERY", 3600.0)
    task = TaskFactory.create(state=TaskState.AVAILABLE, schedule_at=Now() + HOUR)
    known = Floors([task.consumer_id])
    assert look(known) is None
    Task.objects.update(schedule_at=Now() - HOUR)  # as no statement of ours does
    assert look(known) is None
    Task.objects.update(schedule_at=Now() - timedelta(seconds=1))
    assert look(known) is not None


def test_a_look_from_the_beginning_comes_back(monkeypatch):
    monkeypatch.setattr(floors, "FULL_EVERY", 0.0)
    monkeypatch.setattr(floors, "FULL_SHARE", 0.0)
    task = TaskFactory.create(state=TaskState.AVAILABLE, schedule_at=Now() + HOUR)
    known = Floors([task.consumer_id])
    assert look(known) is None
    Task.objects.update(schedule_at=Now() - HOUR)
    assert look(known) is not None


def test_a_floor_stays_below_what_is_due(monkeypatch):
    monkeypatch.setattr(floors, "FULL_EVERY", 3600.0)
    task = TaskFactory.create(state=TaskState.AVAILABLE, schedule_at=Now() - HOUR)
    known = Floors([task.consumer_id])
    assert look(known) == look(known) is not None


def test_a_look_goes_no_further_than_the_next_one():
    task = TaskFactory.create(state=TaskState.AVAILABLE, schedule_at=Now() + HOUR)
    known = Floors([task.consumer_id])
    assert look(known, HOUR / 2) is None
    assert look(known, HOUR * 2) is not None


def test_a_burst_ends_only_after_a_look_from_the_beginning(monkeypatch):
    monkeypatch.setattr(floors, "FULL_EVERY", 3600.0)
    accept("early")
    (consumer,) = sync(["early"])
    announce(2)
    first, _ = consumer.pull()
    Task.objects.filter(pk=first.pk).update(schedule_at=Now() - HOUR)
    Task.objects.exclude(pk=first.pk).update(schedule_at=Now() - timedelta(seconds=1))
    assert work_off("early", concurrency=1, batch_size=1) == 2


def test_a_worker_finds_what_is_due_since_long_ago():
    accept("late")
    (consumer,) = sync(["late"])
    announce()
    (task,) = consumer.pull()
    with working("late"):
        Task.objects.filter(pk=task.pk).update(schedule_at=Now() - HOUR)
        wait_for_state(TaskState.COMPLETED)


@pytest.mark.parametrize("options", [{}, {"serialize": True}])
@pytest.mark.parametrize("moment", ["-infinity", "4714-12-01 00:00+00 BC", "0003-01-01 00:00+00"])
def test_a_worker_finds_what_sql_made_due_before_all_years(moment: str, options: dict[str, Any]):
    accept("eternal", **options)
    accept("innocent")
    (consumer, innocent) = sync(["eternal", "innocent"])
    publish("work.due", stream="work", resource_key="a")
    consumer.pull_page(10)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE kanthorq_django_task SET schedule_at = %s::timestamptz", [moment])
    work_off("eternal", "innocent")
    for each in (consumer, innocent):
        assert Task.objects.completed().filter(consumer=each).count() == 1


def test_dead_entries_are_not_read_again_and_again():
    """While a snapshot is held, an index keeps the entries of all that was finished since."""
    accept("held")
    (consumer,) = sync(["held"])
    known = Floors([consumer.pk])
    with held_snapshot():
        announce(5_000)
        while tasks := consumer.pull(1_000):
            _finish_long_ago([task.pk for task in tasks])
        look(known)
        without = blocks_read({consumer.pk: NO_FLOOR})
        assert without > 10 * blocks_read({consumer.pk: known[consumer.pk]})


def _finish_long_ago(ids: list[int]) -> None:
    tasks = Task.objects.filter(pk__in=ids)
    tasks.update(schedule_at=Now() - HOUR)
    tasks.update(state=TaskState.COMPLETED, finalized_at=Now())


def blocks_read(given: dict[int, int]) -> int:
    """Return how much of the database a look has to read."""
    params: dict[str, Any] = {
        "consumer_ids": list(given),
        "floors": list(given.values()),
        "states": CLAIMED,
        "horizon": timedelta(0),
    }
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql.load('peek')}", params)
        (explained,) = cursor.fetchone()
    (plan,) = explained if isinstance(explained, list) else json.loads(explained)
    return int(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"])


@contextmanager
def held_snapshot() -> Iterator[None]:
    """Let somebody else keep an old snapshot for the block."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("SELECT FROM kanthorq_django_stream")
            held.set()
            release.wait(PATIENCE)

    holding = begin_elsewhere(hold)
    assert held.wait(PATIENCE)
    try:
        yield
    finally:
        release.set()
        holding.result(PATIENCE)
