import sys
from datetime import UTC, datetime, timedelta

import pytest
from django.core.management.base import CommandError
from django.db.models.functions import Now
from pytest_django import Settings

from kanthorq_django.management.verbs import prune as pruning
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.audit import OperatorAction
from kanthorq_django.models.maintenance.retention import Pruned
from tests.commands.console import Terminal, kanthorq
from tests.factories import ConsumerFactory, EventFactory, StreamFactory, TaskFactory

pytestmark = pytest.mark.django_db

EVERYTHING = f"{10**15}:{10**15}:"  # a cursor that has read even this test's transaction


@pytest.fixture
def consumer() -> Consumer:
    return ConsumerFactory.create(name="refunds", stream__name="orders", cursor=EVERYTHING)


def finished(consumer: Consumer, count: int = 1) -> list[Task]:
    """Tasks, with their events, that have been done for eight days."""
    tasks = TaskFactory.create_batch(count, consumer=consumer, state=TaskState.COMPLETED)
    ago = Now() - timedelta(days=8)
    Event._base_manager.filter(tasks__in=tasks).update(created_at=ago)
    Task.objects.filter(pk__in=[task.pk for task in tasks]).update(finalized_at=ago)
    return tasks


def test_what_was_pruned_is_counted(consumer: Consumer):
    finished(consumer, 3)
    TaskFactory.create(consumer=consumer)

    ran = kanthorq("prune", "--older-than", "7d", "--yes")

    assert ran.lines == ["3 events and 3 tasks pruned"]
    assert ran.err == ""
    assert Event.objects.count() == Task.objects.count() == 1


def test_a_dry_run_deletes_nothing(consumer: Consumer):
    finished(consumer, 3)

    ran = kanthorq("prune", "--older-than", "7d", "--dry-run", "--batch", 2)

    assert ran.lines == ["3 events and 3 tasks would be pruned"]
    assert Event.objects.count() == 3


def test_without_a_terminal_and_without_yes_it_refuses(consumer: Consumer):
    finished(consumer)

    with pytest.raises(CommandError, match="add --yes, or --dry-run"):
        kanthorq("prune", "--older-than", "7d")

    assert Event.objects.exists()


def test_nobody_is_asked_when_there_is_nothing_to_prune(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch, settings: Settings
):
    settings.KANTHORQ = {"AUDIT_RETENTION": timedelta(microseconds=1)}
    monkeypatch.setattr(sys, "stdin", Terminal())
    TaskFactory.create(consumer=consumer)
    OperatorAction.objects.create(operator="ops", action="tasks.cancel")

    ran = kanthorq("prune", "--older-than", "7d")

    assert (ran.lines, ran.err) == (["0 events and 0 tasks pruned, and 1 row of the audit"], "")
    assert Event.objects.count() == 1
    assert not OperatorAction.objects.exists()


def test_a_stream_without_consumers_is_left_alone_and_told(consumer: Consumer):
    EventFactory.create(stream=StreamFactory.create(name="audit"))

    ran = kanthorq("prune", "--older-than", "0s", "--yes")

    assert "Stream 'audit' has no consumers and is left alone" in ran.err
    assert Event.objects.filter(stream__name="audit").exists()


def test_a_named_stream_without_consumers_is_pruned_by_age():
    EventFactory.create(stream=StreamFactory.create(name="audit"))

    ran = kanthorq("prune", "--older-than", "0s", "--stream", "audit", "--yes")

    assert ran.lines == ["1 event and 0 tasks pruned"]


def test_the_consumer_that_keeps_old_events_is_named(consumer: Consumer):
    ConsumerFactory.create(name="slow", stream=consumer.stream)
    finished(consumer)

    ran = kanthorq("prune", "--older-than", "7d", "--yes")

    assert ran.lines == ["0 events and 0 tasks pruned"]
    assert "Consumer 'slow' has not read events that are 8d old; they stay." in ran.err


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ((), "--older-than"),
        (("--older-than", "7"), "is not a duration"),
        (("--older-than", "7d", "--batch", "0"), "from 1 to 100,000"),
        (("--older-than", "7d", "--stream", "ordres"), "did you mean 'orders'"),
    ],
)
@pytest.mark.usefixtures("consumer")
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], fact: str):
    with pytest.raises(CommandError, match=fact):
        kanthorq("prune", *arguments, "--yes")


def test_a_cursor_of_another_cluster_is_refused_with_the_way_out(consumer: Consumer):
    finished(consumer)
    Consumer.objects.update(cluster_id=17)

    with pytest.raises(CommandError, match=r"manage\.py kanthorq rebase"):
        kanthorq("prune", "--older-than", "7d", "--yes")


def test_what_goes_from_the_audit_is_told(settings: Settings):
    settings.KANTHORQ = {"AUDIT_RETENTION": timedelta(hours=1)}
    ago = datetime.now(UTC) - timedelta(hours=2)
    old = OperatorAction.objects.create(operator="ops", action="tasks.cancel", created_at=ago)
    OperatorAction.objects.create(operator="ops", action="tasks.cancel")

    dry = kanthorq("prune", "--older-than", "7d", "--dry-run")
    assert OperatorAction.objects.count() == 2
    ran = kanthorq("prune", "--older-than", "7d", "--yes")

    assert dry.lines == ["0 events and 0 tasks would be pruned, and 1 row of the audit"]
    assert ran.lines == ["0 events and 0 tasks pruned, and 1 row of the audit"]
    assert not OperatorAction.objects.filter(pk=old.pk).exists()


def test_many_are_counted_with_separators(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pruning, "prune", lambda *_, **__: Pruned(1, 79_944, 2))

    ran = kanthorq("prune", "--older-than", "7d", "--yes")

    assert ran.lines == ["1 event and 79,944 tasks pruned, and 2 rows of the audit"]
