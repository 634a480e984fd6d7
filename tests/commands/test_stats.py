from datetime import timedelta
from typing import Any

import pytest
from django.db.models.functions import Now

from kanthorq_django.models import Consumer, Task, TaskState, Worker
from tests.commands.console import kanthorq
from tests.factories import ConsumerFactory, EventFactory, StreamFactory, TaskFactory

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


def test_many_consumers_of_a_worker_are_cut_in_the_table_and_all_in_json():
    names = [f"consumer-{number}" for number in range(27)]
    Worker.objects.create(host="here", pid=1, concurrency=10, consumers=names)

    assert (
        kanthorq("stats").lines[-1].endswith("  consumer-0, consumer-1, consumer-2 and 24 others")
    )
    (worker,) = kanthorq("stats", "--json").json["workers"]
    assert worker["consumers"] == names


def test_a_stream_that_nobody_reads_is_told(consumer: Consumer):
    ConsumerFactory.create(stream=consumer.stream)
    EventFactory.create(stream=StreamFactory.create(name="unread"))

    head, *lines = kanthorq("stats").lines[:3]

    assert head.split()[-1] == "CONSUMERS"
    assert [(line.split()[0], line.split()[-1]) for line in lines] == [
        ("orders", "2"),
        ("unread", "none"),
    ]
    streams = kanthorq("stats", "--json").json["streams"]
    assert [stream["consumers"] for stream in streams] == [2, 0]


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


def cancelled(consumer: Consumer, *, errors: tuple[str, ...] = (), **given: Any) -> Task:
    """A task that ended two seconds after it was asked to."""
    attempts = given.pop("cancel_attempt_count", len(errors) + 1)
    task: Task = TaskFactory.create(
        consumer=consumer,
        cancel_requested_at=Now() - timedelta(seconds=2),
        cancel_attempt_count=attempts,
        attempted_errors=[
            {"at": "2030-01-01T00:00:00+00:00", "attempt": 1, "verb": "cancel", "error": error}
            for error in errors
        ],
        **{"state": TaskState.CANCELLED} | given,
    )
    return task


def test_cancellations_are_told_with_their_rate_times_and_reasons(consumer: Consumer):
    cancelled(consumer, cancel_attempt_count=0)
    cancelled(consumer, errors=("OSError: no file 17",))
    cancelled(consumer)
    cancelled(consumer, errors=("OSError: no file 18", "E"), state=TaskState.DISCARDED)

    (told,) = kanthorq("stats", "--json").json["consumers"]
    numbers = told["cancellations"]
    spans = numbers.pop("median_seconds"), numbers.pop("longest_seconds")

    assert numbers == {
        "window_seconds": 86_400,
        "cancelled": 3,
        "is_bounded": False,
        "handler_succeeded": 2,
        "handler_failed": 1,
        "success_rate": pytest.approx(2 / 3),
        "failures": [{"error": "OSError: no file 18", "count": 2}, {"error": "E", "count": 1}],
    }
    assert all(2 <= span < 10 for span in spans)


def test_cancellations_stand_in_a_table_of_their_own(consumer: Consumer):
    cancelled(consumer)
    cancelled(consumer, errors=("OSError: \x1b[2J",), state=TaskState.DISCARDED)

    lines = kanthorq("stats").lines

    head = next(number for number, line in enumerate(lines) if line.startswith("CANCELLATIONS OF"))
    words = lines[head + 1].split()
    assert words[:5] == ["refunds", "1", "1", "1", "50%"]
    assert lines[head + 2] == r"  refunds: 1 x OSError: \x1b[2J"


def test_a_long_time_until_the_end_is_told_in_minutes(consumer: Consumer):
    task = cancelled(consumer)
    Task.objects.filter(pk=task.pk).update(cancel_requested_at=Now() - timedelta(minutes=9))

    (line,) = [line for line in kanthorq("stats").lines if "100%" in line]

    assert line.split()[-1].startswith(("9m", "8m59s"))


def test_without_cancellations_there_is_no_table_of_them(consumer: Consumer):
    TaskFactory.create(consumer=consumer, state=TaskState.DISCARDED)

    (told,) = kanthorq("stats", "--json").json["consumers"]

    assert told["cancellations"]["cancelled"] == told["cancellations"]["handler_failed"] == 0
    assert told["cancellations"]["success_rate"] is None
    assert "CANCELLATIONS" not in kanthorq("stats").out


def test_an_empty_database_has_tables_without_rows():
    assert kanthorq("stats", "--json").json == {"streams": [], "consumers": [], "workers": []}
    assert len(kanthorq("stats").lines) == 5


def test_workers_are_sorted_and_those_gone_summed_up():
    for host, pid in (("b", 1), ("a", 9), ("a", 2)):
        Worker.objects.create(host=host, pid=pid, concurrency=10)
    for pid in range(2):
        Worker.objects.create(
            host="gone", pid=pid, concurrency=5, seen_at=Now() - timedelta(minutes=5)
        )

    _, *alive, gone = kanthorq("stats").lines[-5:]

    assert [line.split()[0] for line in alive] == ["2@a", "9@a", "1@b"]
    assert gone.startswith("2 workers are gone, last seen 2")
    assert len(kanthorq("stats", "--json").json["workers"]) == 5
