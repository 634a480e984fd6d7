"""Verbs over a great many tasks."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from django.db import connection, transaction
from django.db.models import Count, F, Window
from django.db.models.functions import Now, RowNumber
from django.test.utils import CaptureQueriesContext

from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.models import Consumer, Task, TaskState, moves
from kanthorq_django.models.batch import move_batch
from kanthorq_django.models.moves import CHUNK_SIZE
from kanthorq_django.models.task import TaskQuerySet
from tests.concurrency import (
    DEADLINE_SECONDS,
    begin_elsewhere,
    elsewhere,
    is_waited_for,
    wait_until,
)
from tests.factories import ConsumerFactory, TaskFactory

MEMORY_BASE = 4 * 2**20  # bytes: one chunk of rows
MEMORY_PER_TASK = 512  # bytes: its id, as it was given and as it is told, and no row

INSERT = """
    INSERT INTO kanthorq_django_task (consumer_id, event_id, state)
    SELECT %s, gen_random_uuid(), 1 FROM generate_series(1, %s)
"""


def fill(count: int) -> Consumer:
    consumer: Consumer = ConsumerFactory.create()
    with connection.cursor() as cursor:
        cursor.execute(INSERT, [consumer.pk, count])
    return consumer


def by_queryset(consumer: Consumer) -> Callable[[], Outcome]:
    return Task.objects.filter(consumer=consumer).cancel


def by_event_ids(consumer: Consumer) -> Callable[[], Outcome]:
    ids = list(Task.objects.filter(consumer=consumer).values_list("event_id", flat=True))
    return lambda: consumer.cancel(ids)


@pytest.mark.django_db
@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", [by_queryset, by_event_ids])
def test_a_great_many_tasks_are_cancelled_in_one_call_and_in_bounded_memory(
    way: Callable[[Consumer], Callable[[], Outcome]], count: int
):
    cancel = way(fill(count))
    tracemalloc.start()
    try:
        outcome = cancel()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(outcome.updated)) == count
    assert outcome.noop == ()
    assert Task.objects.cancelled().count() == count
    assert peak_bytes < MEMORY_BASE + count * MEMORY_PER_TASK


@pytest.mark.django_db
@pytest.mark.parametrize("count", [CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1])
def test_every_task_is_moved_whatever_the_last_chunk_holds(count: int):
    consumer = fill(count)
    assert len(Task.objects.filter(consumer=consumer).cancel().updated) == count
    assert not Task.objects.exclude(state=TaskState.CANCELLED).exists()


@pytest.mark.django_db
def test_the_number_of_statements_grows_with_the_chunks_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kanthorq_django.models.moves.CHUNK_SIZE", 10)

    def statements(count: int) -> int:
        tasks = Task.objects.filter(consumer=fill(count))
        with CaptureQueriesContext(connection) as captured:
            tasks.cancel()
        return len(captured)

    assert statements(10) == statements(1)
    assert statements(20) - statements(10) <= 4


@pytest.mark.django_db
def test_server_side_cursors_may_be_off_as_behind_a_pooler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(connection.settings_dict, "DISABLE_SERVER_SIDE_CURSORS", True)
    assert len(Task.objects.filter(consumer=fill(CHUNK_SIZE + 1)).cancel().updated) > CHUNK_SIZE


@pytest.mark.django_db(transaction=True)
def test_a_verb_meets_no_conflict_where_the_project_prefers_repeatable_read(
    monkeypatch: pytest.MonkeyPatch,
):
    connection.ensure_connection()
    monkeypatch.setattr(
        connection.connection, "isolation_level", psycopg.IsolationLevel.REPEATABLE_READ
    )
    tasks = Task.objects.filter(consumer=fill(3))
    move_chunk = TaskQuerySet._move_chunk

    def after_another_one(self: TaskQuerySet, *args: Any, **options: Any) -> Outcome:
        elsewhere(lambda: Task.objects.update(resource_key="moved"))
        return move_chunk(self, *args, **options)

    monkeypatch.setattr(TaskQuerySet, "_move_chunk", after_another_one)
    assert len(tasks.cancel().updated) == 3


def cancel_a_batch() -> None:
    pks = list(Task.objects.order_by("-pk").values_list("pk", flat=True))
    with transaction.atomic():
        move_batch("cancel", TaskQuerySet.cancel, Task.objects.all(), pks, running=False)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("act", [lambda: Task.objects.order_by("-pk").cancel(), cancel_a_batch])
def test_verbs_lock_tasks_in_the_order_of_their_ids(act: Callable[[], object]):
    fill(2)
    first, second = Task.objects.order_by("pk")
    # What an update writes lies behind the other one, and would be locked last.
    Task.objects.filter(pk=first.pk).update(resource_key="moved")
    with transaction.atomic():
        assert Task.objects.select_for_update().get(pk=first.pk)
        acted = begin_elsewhere(act)
        wait_until(is_waited_for)
        assert Task.objects.select_for_update(nowait=True).get(pk=second.pk)
    acted.result(DEADLINE_SECONDS)
    assert Task.objects.cancelled().count() == 2


@pytest.mark.django_db(transaction=True)
def test_a_verb_leaves_alone_what_its_queryset_does_not_select_any_more(
    monkeypatch: pytest.MonkeyPatch,
):
    consumer = fill(3)
    lock = TaskQuerySet._lock

    def after_another_one(self: TaskQuerySet, *args: Any) -> Any:
        elsewhere(lambda: Task.objects.filter(pk=first.pk).update(resource_key="moved"))
        return lock(self, *args)

    first = Task.objects.earliest("pk")
    monkeypatch.setattr(TaskQuerySet, "_lock", after_another_one)
    outcome = Task.objects.filter(consumer=consumer, resource_key="").cancel()
    assert (len(outcome.updated), outcome.noop) == (2, (first.event_id,))
    first.refresh_from_db()
    assert first.state == TaskState.AVAILABLE


@pytest.mark.django_db
def test_a_union_is_moved_as_a_whole():
    first, second, other = TaskFactory.create_batch(3, state=TaskState.AVAILABLE)
    both = Task.objects.filter(pk=first.pk).union(Task.objects.filter(pk=second.pk))
    assert set(both.cancel().updated) == {first.event_id, second.event_id}
    assert Task.objects.available().get() == other


@pytest.mark.django_db
@pytest.mark.parametrize(
    "shaped",
    [
        lambda tasks: tasks.values("pk", "event_id"),
        lambda tasks: tasks.values_list("event_id", flat=True),
        lambda tasks: tasks.values_list("pk", "state").union(Task.objects.none()),
        lambda tasks: tasks.order_by("-schedule_at").only("state")[:10],
    ],
)
def test_a_union_is_moved_whatever_its_parts_select(shaped: Callable[[Any], Any]):
    first, second, other = TaskFactory.create_batch(3, state=TaskState.AVAILABLE)
    parts = [shaped(Task.objects.filter(pk=task.pk)) for task in (first, second)]
    assert set(parts[0].union(parts[1]).cancel().updated) == {first.event_id, second.event_id}
    assert parts[0].union(parts[1]).intersection(parts[0]).resume().updated == (first.event_id,)
    assert other in Task.objects.available()


@pytest.mark.django_db
def test_a_queryset_that_locks_what_it_joins_is_moved_and_leaves_that_alone():
    task = TaskFactory.create(state=TaskState.AVAILABLE)
    joined = Task.objects.select_related("consumer").filter(consumer=task.consumer)
    with CaptureQueriesContext(connection) as queries:
        locking = joined.select_for_update(of=("self", "consumer"))
        assert locking.cancel().updated == (task.event_id,)
    assert not any('OF "kanthorq_django_consumer"' in query["sql"] for query in queries)


def ranked(order: Any) -> Window:
    return Window(RowNumber(), partition_by="consumer", order_by=order)


@pytest.mark.django_db
@pytest.mark.parametrize("size", [2, 100])
def test_what_a_window_selects_is_moved_whatever_else_is_locked(
    monkeypatch: pytest.MonkeyPatch, size: int
):
    monkeypatch.setattr(moves, "CHUNK_SIZE", size)
    consumer = fill(5)
    newest = Task.objects.latest("pk")
    older = Task.objects.annotate(rank=ranked(F("pk").desc())).filter(rank__gt=1)
    assert len(older.cancel().updated) == 4
    assert Task.objects.available().get() == newest

    many = Task.objects.annotate(count=Window(Count("pk"), partition_by="consumer"))
    assert len(many.filter(count=5, consumer=consumer).resume().updated) == 4


@pytest.mark.django_db
def test_what_a_verb_has_done_so_far_does_not_change_what_its_queryset_selects(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(moves, "CHUNK_SIZE", 1)
    fill(3)
    first = Task.objects.earliest("pk")
    Task.objects.update(state=TaskState.CANCELLED, finalized_at=Now())
    Task.objects.filter(pk=first.pk).update(state=TaskState.DISCARDED)
    failed = Consumer.objects.filter(tasks__state=TaskState.DISCARDED)
    assert len(Task.objects.filter(consumer__in=failed).resume().updated) == 3


@pytest.mark.django_db(transaction=True)
def test_what_was_changed_and_what_a_verb_has_done_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
):
    fill(3)
    lock = TaskQuerySet._lock

    def after_another_one(self: TaskQuerySet, *args: Any) -> Any:
        elsewhere(lambda: Task.objects.filter(pk=first.pk).update(resource_key="moved"))
        return lock(self, *args)

    first = Task.objects.earliest("pk")
    monkeypatch.setattr(TaskQuerySet, "_lock", after_another_one)
    left, right = Task.objects.filter(resource_key=""), Task.objects.filter(resource_key="other")
    assert left.union(right).cancel().noop == (first.event_id,)
