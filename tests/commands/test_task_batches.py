"""A batch of tasks is one transaction with one row of the audit, whoever owes them."""

import tracemalloc
from collections.abc import Callable
from io import StringIO
from itertools import repeat

import pytest
from django.core.management import call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext

from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.management import lists
from kanthorq_django.management.verbs.tasks import moving
from kanthorq_django.models import Consumer, TaskState
from kanthorq_django.models.audit import OperatorAction
from kanthorq_django.models.task import TaskQuerySet
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory, StreamFactory, TaskFactory

pytestmark = pytest.mark.django_db

ALL = ("tasks", "cancel", "--all", "--running", "--yes")


@pytest.fixture
def consumers() -> list[Consumer]:
    return list(ConsumerFactory.create_batch(5, stream=StreamFactory.create()))


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks each call of the verb got."""
    sizes: list[int] = []
    move: Callable[..., Outcome] = moving.Cancel.move

    def count(self: moving.Cancel, tasks: TaskQuerySet, *, running: bool) -> Outcome:
        sizes.append(tasks.count())
        return move(self, tasks, running=running)

    monkeypatch.setattr(moving.Cancel, "move", count)
    return sizes


def test_tasks_of_many_consumers_are_moved_and_recorded_at_once(
    consumers: list[Consumer], moved: list[int]
):
    event = EventFactory.create(stream=consumers[0].stream)
    for consumer in consumers:
        TaskFactory.create(consumer=consumer, event=event)

    ran = kanthorq(*ALL, "--reason", "tidy up")

    assert sorted(ran.words) == sorted(["updated", str(event.pk), each.name] for each in consumers)
    told = OperatorAction.objects.get()
    assert told.counts == {"updated": 5, "requested": 0, "noop": 0}
    assert (told.sample, told.reason) == ([str(event.pk)] * 5, "tidy up")
    assert moved == [5]


def test_the_number_of_statements_does_not_grow_with_that_of_consumers(
    consumers: list[Consumer],
):
    def statements_for(owing: list[Consumer]) -> int:
        for consumer in owing:
            TaskFactory.create(consumer=consumer)
        with CaptureQueriesContext(connection) as queries:
            kanthorq("tasks", "cancel", "--state", "available", "--yes")
        return len(queries)

    assert statements_for(consumers[:1]) == statements_for(consumers)


def test_an_event_is_told_apart_by_what_became_of_it_for_each_consumer(consumers: list[Consumer]):
    event = EventFactory.create(stream=consumers[0].stream)
    states = (TaskState.RUNNING, TaskState.AVAILABLE, TaskState.COMPLETED, TaskState.PENDING)
    for consumer, state in zip(consumers, states, strict=False):
        TaskFactory.create(consumer=consumer, event=event, state=state)

    ran = kanthorq(*ALL)

    words = ("requested", "updated", "noop", "updated")
    assert ran.words == [
        [word, str(event.pk), consumer.name]
        for word, consumer in zip(words, consumers, strict=False)
    ]
    assert OperatorAction.objects.get().counts == {"updated": 2, "requested": 1, "noop": 1}


def test_what_the_verb_cannot_move_is_not_sent_to_it(consumers: list[Consumer], moved: list[int]):
    TaskFactory.create(consumer=consumers[0])
    TaskFactory.create_batch(3, consumer=consumers[1], state=TaskState.COMPLETED)

    ran = kanthorq(*ALL)

    assert [word for word, *_ in ran.words] == ["updated", "noop", "noop", "noop"]
    assert moved == [1]
    kanthorq(*ALL)
    assert moved == [1]


def test_json_of_many_tasks_needs_no_more_memory_than_that_of_a_few(
    consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
):
    class Nowhere(StringIO):
        def write(self, text: str) -> int:
            return len(text)

    task = TaskFactory.create(consumer=consumers[0])

    def peak_of(count: int) -> int:
        line = moving.Line("noop", task.event_id, "refunds")
        monkeypatch.setattr(moving.Cancel, "_lines", lambda *_, **__: repeat(line, count))
        tracemalloc.start()
        try:
            call_command("kanthorq", *ALL, "--json", stdout=Nowhere())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_of(60_000) < peak_of(30_000) + 500_000


def test_json_is_whole_also_where_lists_go_through_files(
    consumers: list[Consumer], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lists, "MEMORY_SIZE_MAX", 100)
    monkeypatch.setattr(lists, "CHUNK_SIZE", 7)
    monkeypatch.setattr(moving, "BATCH", 2)
    for state in (TaskState.AVAILABLE, TaskState.RUNNING) * 3:
        TaskFactory.create(consumer=consumers[0], state=state)

    told = kanthorq(*ALL, "--json").json

    assert list(told) == ["verb", "dry_run", "updated", "requested", "noop"]
    assert [len(told[word]) for word in ("updated", "requested", "noop")] == [3, 3, 0]
