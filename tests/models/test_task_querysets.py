"""Which tasks a verb reaches, and what it tells of them."""

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connection
from django.db.backends.postgresql.base import ServerBindingCursor
from django.db.models.functions import Now
from django.template import Context, Template

from kanthorq_django import signals
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.domain.states import FINAL, LEASED
from kanthorq_django.models import Consumer, Task, TaskState, moves
from kanthorq_django.models.task import TaskQuerySet
from tests.factories import ConsumerFactory, EventFactory, TaskFactory
from tests.receivers import heard_by

pytestmark = pytest.mark.django_db

S = TaskState
VERBS = ("cancel", "resume", "release", "reset")


def call(verb: str, tasks: TaskQuerySet, **options: Any) -> Outcome:
    outcome: Outcome = getattr(tasks, verb)(**options)
    return outcome


# Querysets


def test_a_verb_takes_what_the_queryset_selects_and_leaves_the_rest():
    ours = TaskFactory.create(resource_key="order-17")
    theirs = TaskFactory.create(resource_key="order-18")
    consumer = ours.consumer.name
    outcome = Task.objects.filter(consumer__name=consumer, resource_key="order-17").cancel()
    assert outcome == Outcome(updated=(ours.event_id,))
    theirs.refresh_from_db()
    assert theirs.state == S.AVAILABLE


def test_a_verb_reports_in_the_order_of_the_tasks():
    tasks = [TaskFactory.create() for _ in range(5)]
    outcome = Task.objects.order_by("-pk").cancel()
    assert outcome.updated == tuple(task.event_id for task in tasks)


def test_a_verb_on_nothing_does_nothing():
    assert Task.objects.none().cancel() == Outcome()
    assert Task.objects.all().reset() == Outcome()


@pytest.mark.parametrize(
    ("verb", "before", "after"),
    [
        ("cancel", S.AVAILABLE, S.CANCELLED),
        ("resume", S.CANCELLED, S.AVAILABLE),
        ("release", S.PENDING, S.AVAILABLE),
        ("reset", S.COMPLETED, S.AVAILABLE),
    ],
)
def test_a_queryset_that_was_read_before_a_verb_is_read_anew(verb: str, before: S, after: S):
    TaskFactory.create(state=before)
    tasks = Task.objects.all()
    assert [task.state for task in tasks] == [before]
    call(verb, tasks)
    assert [task.state for task in tasks] == [after]


def test_a_join_that_repeats_a_task_does_not_repeat_it_in_the_outcome(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("kanthorq_django.models.moves.CHUNK_SIZE", 3)
    consumer = ConsumerFactory.create()
    ConsumerFactory.create(stream=consumer.stream)
    tasks = [TaskFactory.create(consumer=consumer) for _ in range(3)]
    twice = Task.objects.filter(event__stream__consumers__isnull=False)
    assert twice.count() == 6
    assert twice.cancel() == Outcome(updated=tuple(task.event_id for task in tasks))


def test_tasks_are_locked_and_told_in_the_order_of_ids_whatever_theirs_is(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    """Two verbs that lock chunks in opposite orders would deadlock."""
    monkeypatch.setattr(moves, "CHUNK_SIZE", 2)
    tasks = [TaskFactory.create(consumer=consumer) for _ in range(5)]
    for queryset in (Task.objects.reverse(), Task.objects.order_by("-schedule_at").reverse()):
        assert queryset.cancel().updated == tuple(task.event_id for task in tasks)
        queryset.resume()


@pytest.mark.parametrize("verb", VERBS)
def test_one_task_of_each_cannot_be_moved(verb: str):
    TaskFactory.create()
    with pytest.raises(TypeError, match=rf"Cannot {verb} a query after \.distinct\(\*fields\)"):
        call(verb, Task.objects.order_by("consumer").distinct("consumer"))
    assert Task.objects.get().state == S.AVAILABLE


@pytest.mark.parametrize("verb", VERBS)
def test_a_slice_cannot_be_moved(verb: str):
    TaskFactory.create()
    with pytest.raises(TypeError, match=f"Cannot {verb} a query once a slice"):
        call(verb, Task.objects.all()[:5])
    with pytest.raises(TypeError, match="slice"):
        async_to_sync(getattr(Task.objects.all()[:5], f"a{verb}"))()
    assert Task.objects.get().state == S.AVAILABLE


@pytest.mark.parametrize("verb", [*VERBS, *(f"a{verb}" for verb in VERBS)])
def test_a_manager_has_no_verb_that_would_move_everything(verb: str):
    with pytest.raises(AttributeError):
        getattr(Task.objects, verb)
    consumer: Any = TaskFactory.create().consumer
    with pytest.raises(AttributeError):
        getattr(consumer.tasks, verb)


@pytest.mark.parametrize("verb", [*VERBS, *(f"a{verb}" for verb in VERBS)])
def test_a_template_cannot_call_a_verb(verb: str):
    task = TaskFactory.create(state=S.PENDING)
    tasks = Context({"tasks": Task.objects.all(), "consumer": task.consumer})
    Template("{{ tasks.%s }} {{ consumer.%s }}" % (verb, verb)).render(tasks)  # noqa: UP031  # braces
    task.refresh_from_db()
    assert task.state == S.PENDING


@pytest.mark.parametrize(
    ("verb", "state"),
    [
        ("acancel", S.AVAILABLE),
        ("aresume", S.CANCELLED),
        ("arelease", S.PENDING),
        ("areset", S.COMPLETED),
    ],
)
def test_the_twins_for_coroutines_do_the_same(verb: str, state: TaskState):
    task, other = TaskFactory.create_batch(2, state=state)
    outcome = async_to_sync(getattr(Task.objects.filter(pk=task.pk), verb))()
    assert outcome == Outcome(updated=(task.event_id,))
    outcome = async_to_sync(getattr(other.consumer, verb))([other.event_id])
    assert outcome == Outcome(updated=(other.event_id,))


@pytest.mark.parametrize("verb", VERBS)
def test_a_coroutine_that_calls_a_verb_is_told_of_its_twin(verb: str):
    async def forget() -> None:
        getattr(Task.objects.all(), verb)()

    with pytest.raises(SynchronousOnlyOperation, match=rf"use `await a{verb}\(…\)`"):
        async_to_sync(forget)()


def test_acancel_asks_running_tasks_as_well():
    task = TaskFactory.create(state=S.RUNNING)
    outcome = async_to_sync(Task.objects.all().acancel)(running=True)
    assert outcome == Outcome(requested=(task.event_id,))
    outcome = async_to_sync(task.consumer.acancel)([task.event_id], running=True)
    assert outcome == Outcome(noop=(task.event_id,))


@pytest.mark.parametrize(
    ("verb", "signal", "state"),
    [
        ("cancel", signals.cancelled, S.AVAILABLE),
        ("resume", signals.resumed, S.CANCELLED),
        ("release", signals.released, S.PENDING),
        ("reset", signals.reset, S.COMPLETED),
    ],
)
def test_a_verb_is_announced_with_its_outcome(verb: str, signal: Any, state: TaskState):
    task = TaskFactory.create(state=state)
    heard = []

    def hear(**given: Any) -> None:
        heard.append((given["sender"], given["outcome"], given["using"]))

    with heard_by(hear, signal):
        call(verb, Task.objects.all())
    assert heard == [(Task, Outcome(updated=(task.event_id,)), "default")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pending", {S.PENDING}),
        ("available", {S.AVAILABLE}),
        ("running", {S.RUNNING}),
        ("cancelling", {S.CANCELLING}),
        ("retryable", {S.RETRYABLE}),
        ("completed", {S.COMPLETED}),
        ("cancelled", {S.CANCELLED}),
        ("discarded", {S.DISCARDED}),
        ("final", FINAL),
    ],
)
def test_a_queryset_is_named_for_the_state_of_its_tasks(name: str, expected: set[TaskState]):
    for state in TaskState:
        TaskFactory.create(state=state)
    found: Callable[[], TaskQuerySet] = getattr(Task.objects, name)
    assert set(found().values_list("state", flat=True)) == expected


def test_stuck_tasks_are_running_ones_whose_lease_ran_out():
    TaskFactory.create(state=S.RUNNING)
    stuck = TaskFactory.create(state=S.RUNNING, schedule_at=Now())
    for state in set(TaskState) - LEASED:
        TaskFactory.create(state=state, schedule_at=Now())
    assert Task.objects.stuck().get() == stuck


# By event ids


@pytest.fixture
def consumer() -> Consumer:
    return ConsumerFactory.create()


def test_a_consumer_moves_its_tasks_of_the_events_named(consumer: Consumer):
    first, second, unnamed = (TaskFactory.create(consumer=consumer) for _ in range(3))
    others = TaskFactory.create(
        event=first.event, consumer=ConsumerFactory.create(stream=consumer.stream)
    )
    outcome = consumer.cancel([second.event_id, str(first.event_id)])
    assert outcome == Outcome(updated=(first.event_id, second.event_id))
    for untouched in (unnamed, others):
        untouched.refresh_from_db()
        assert untouched.state == S.AVAILABLE


@pytest.mark.parametrize(
    ("verb", "state"),
    [
        ("cancel", S.RETRYABLE),
        ("resume", S.DISCARDED),
        ("release", S.PENDING),
        ("reset", S.CANCELLED),
    ],
)
def test_ids_that_nobody_knows_are_noop_too_in_the_order_given(
    consumer: Consumer, verb: str, state: TaskState
):
    moved = TaskFactory.create(consumer=consumer, state=state)
    left = TaskFactory.create(consumer=consumer, state=S.CANCELLING)
    unknown = [uuid7() for _ in range(3)][::-1]
    given = [unknown[0], moved.event_id, unknown[1], left.event_id, unknown[2]]
    outcome = getattr(consumer, verb)(given)
    assert outcome == Outcome(updated=(moved.event_id,), noop=(left.event_id, *unknown))


def test_an_event_without_a_task_of_this_consumer_is_noop(consumer: Consumer):
    event = EventFactory.create(stream=consumer.stream)
    assert consumer.cancel([event.pk]) == Outcome(noop=(event.pk,))


def test_an_id_given_twice_is_told_once(consumer: Consumer):
    task = TaskFactory.create(consumer=consumer)
    unknown = uuid7()
    given: list[UUID | str] = [task.event_id, str(task.event_id).upper(), unknown, unknown]
    assert consumer.cancel(given) == Outcome(updated=(task.event_id,), noop=(unknown,))


def test_ids_may_come_from_a_generator(consumer: Consumer):
    tasks = [TaskFactory.create(consumer=consumer) for _ in range(2)]
    outcome = consumer.cancel(task.event_id for task in tasks)
    assert outcome.updated == tuple(task.event_id for task in tasks)
    assert consumer.cancel([]) == Outcome()


def test_cancel_by_ids_asks_running_tasks_as_well(consumer: Consumer):
    task = TaskFactory.create(consumer=consumer, state=S.RUNNING)
    assert consumer.cancel([task.event_id]) == Outcome(noop=(task.event_id,))
    assert consumer.cancel([task.event_id], running=True) == Outcome(requested=(task.event_id,))


def test_more_ids_than_the_server_binds_parameters(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(connection.settings_dict["OPTIONS"], "server_side_binding", True)
    monkeypatch.setattr(connection.connection, "cursor_factory", ServerBindingCursor)
    task = TaskFactory.create(consumer=consumer)
    unknown = [uuid4() for _ in range(65_536)]
    outcome = consumer.cancel([*unknown, task.event_id])
    assert outcome == Outcome(updated=(task.event_id,), noop=tuple(unknown))


@pytest.mark.parametrize("bad", ["no-id", 17, None, "", b"\x00", object()])
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_id_is_refused_before_anything_moves(consumer: Consumer, verb: str, bad: Any):
    task = TaskFactory.create(consumer=consumer)
    with pytest.raises(ValueError, match="event id"):
        getattr(consumer, verb)([task.event_id, bad])
    task.refresh_from_db()
    assert task.state == S.AVAILABLE


def test_consumers_can_be_told_apart_by_the_database_as_other_rows_are():
    """A join to tasks repeats them, and PostgreSQL compares no snapshots."""
    task = TaskFactory.create()
    TaskFactory.create(consumer=task.consumer)
    found = Consumer.objects.filter(tasks__state=task.state)
    assert list(found.distinct()) == [task.consumer]
    assert list(found.union(Consumer.objects.all())) == [task.consumer]
    assert found.distinct().get().cursor == Consumer.objects.get().cursor == "1:1:"
    assert Task.objects.select_related("consumer").distinct().count() == 2
    assert len(Task.objects.select_related("consumer").order_by("pk").distinct()) == 2
