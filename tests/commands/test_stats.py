from datetime import timedelta

import pytest
from django.db.models.functions import Now

from kanthorq_django.models import Consumer, Task, TaskState, Worker
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory, TaskFactory

pytestmark = pytest.mark.django_db


@pytest.fixture
def consumer() -> Consumer:
    return ConsumerFactory.create(name="refunds", stream__name="orders")


def test_streams_have_their_events_and_ages(consumer: Consumer):
    EventFactory.create_batch(3, stream=consumer.stream)

    (stream,) = kanthorq("stats", "--json").json["streams"]

    assert (stream["name"], stream["events"]) == ("orders", 3)
    assert stream["oldest_seconds"] >= stream["newest_seconds"] >= 0


def test_consumers_have_their_tasks_by_state(consumer: Consumer):
    for number, state in enumerate(TaskState, start=1):
        TaskFactory.create_batch(number, consumer=consumer, state=state)

    (told,) = kanthorq("stats", "--json").json["consumers"]

    assert (told["name"], told["stream"]) == ("refunds", "orders")
    assert told["tasks"] == {
        state.name.lower(): number for number, state in enumerate(TaskState, start=1)
    }


def test_lag_counts_unread_events(consumer: Consumer):
    EventFactory.create_batch(2, stream=consumer.stream)

    (told,) = kanthorq("stats", "--json").json["consumers"]

    assert (told["lag"], told["lag_is_bounded"]) == (2, False)
    assert told["oldest_unread_seconds"] >= 0


def test_stuck_tasks_and_the_longest_wait_are_told(consumer: Consumer):
    TaskFactory.create(
        consumer=consumer, state=TaskState.RUNNING, schedule_at=Now() - timedelta(minutes=2)
    )
    TaskFactory.create(consumer=consumer, schedule_at=Now() + timedelta(hours=1))

    (told,) = kanthorq("stats", "--json").json["consumers"]

    assert told["stuck"] == 1
    assert 120 <= told["oldest_due_seconds"] < 180


def test_throughput_is_of_the_last_five_minutes(consumer: Consumer):
    old, *_ = TaskFactory.create_batch(11, consumer=consumer, state=TaskState.COMPLETED)
    Task.objects.filter(pk=old.pk).update(finalized_at=Now() - timedelta(minutes=6))

    (told,) = kanthorq("stats", "--json").json["consumers"]

    assert told["completed_per_minute"] == 2


def test_workers_are_listed_alive_or_not(consumer: Consumer):
    Worker.objects.create(host="here", pid=1, concurrency=10, consumers=["refunds"])
    gone = Worker.objects.create(host="there", pid=2, concurrency=5)
    Worker.objects.filter(pk=gone.pk).update(seen_at=Now() - timedelta(minutes=5))

    workers = kanthorq("stats", "--json").json["workers"]

    assert [(worker["host"], worker["alive"]) for worker in workers] == [
        ("here", True),
        ("there", False),
    ]


def test_the_same_numbers_stand_in_aligned_tables(consumer: Consumer):
    TaskFactory.create_batch(1, consumer=consumer)
    Worker.objects.create(host="here", pid=1, concurrency=10, consumers=["refunds"])

    ran = kanthorq("stats")

    _, stream, _, head, told, _, _, worker = ran.lines
    assert stream.split()[:2] == ["orders", "1"]
    by_head = dict(zip(head.split(), told.split(), strict=True))
    assert by_head["CONSUMER"] == "refunds"
    assert (by_head["LAG"], by_head["AVAILABLE"], by_head["COMPLETED"]) == ("1", "1", "0")
    assert worker.split()[:3] == ["1@here", "yes", "10"]
    assert "\x1b" not in ran.out


def test_an_empty_database_has_tables_without_rows():
    assert kanthorq("stats", "--json").json == {"streams": [], "consumers": [], "workers": []}
    assert len(kanthorq("stats").lines) == 5
