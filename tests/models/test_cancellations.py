"""What is told of cancellations: which tasks count, and what the looking costs."""

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task, TaskState
from kanthorq_django.models.delivery.claim import LEASE_RAN_OUT
from kanthorq_django.models.delivery.lease import hand_back
from kanthorq_django.models.maintenance import cancellations as module
from kanthorq_django.models.maintenance.cancellations import Cancellations, cancellations
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db

MANY = 20_000


def told(consumer: Consumer) -> Cancellations:
    return cancellations([consumer.pk], "default")[consumer.pk]


def failed(number: int, verb: str = "cancel") -> dict[str, Any]:
    return {"at": "2030-01-01", "attempt": 1, "verb": verb, "error": f"E {number}", "stack": ""}


def ended(consumer: Consumer, state: TaskState, **given: Any) -> Task:
    asked = {"cancel_requested_at": Now(), "cancel_attempt_count": 1}
    task: Task = TaskFactory.create(consumer=consumer, state=state, **(asked | given))
    return task


@pytest.fixture
def consumer() -> Consumer:
    return ConsumerFactory.create(has_cancel_handler=True)


def test_a_consumer_without_cancellations_has_nothing_to_tell(consumer: Consumer):
    TaskFactory.create(consumer=consumer, state=TaskState.DISCARDED, attempted_errors=[failed(1)])
    assert not told(consumer)
    assert told(consumer) == Cancellations()


def test_a_cancellation_is_counted_from_the_request_to_the_end(consumer: Consumer):
    """The whole way: cancelled while it waited, cleaned up with the second attempt."""
    task = TaskFactory.create(consumer=consumer)
    Task.objects.filter(pk=task.pk).cancel()
    Task.objects.filter(pk=task.pk).update(cancel_requested_at=Now() - timedelta(seconds=5))
    Message(*consumer.claim()).nack("E 1", delay=timedelta(0))
    Message(*consumer.claim()).ack()

    found = told(consumer)

    assert (found.cancelled, found.succeeded, found.failed) == (1, 1, 0)
    assert found.median == found.longest
    assert found.median is not None
    assert timedelta(seconds=5) <= found.median < timedelta(seconds=30)
    assert found.failures == [("E 1", 1)]


def test_a_handler_that_uses_up_its_attempts_has_failed(consumer: Consumer):
    Consumer.objects.update(cancel_attempt_max=1)
    task = TaskFactory.create(consumer=consumer)
    Task.objects.filter(pk=task.pk).cancel()
    Message(*consumer.claim()).nack("E 1")

    found = told(consumer)

    assert (found.cancelled, found.failed, found.success_rate) == (0, 1, 0.0)
    assert found.longest is not None


@pytest.mark.parametrize("then", ["waits", "was handed back"])
def test_a_handler_that_failed_and_was_taken_out_of_the_code_has_not_succeeded(
    consumer: Consumer, then: str
):
    task = TaskFactory.create(consumer=consumer)
    Task.objects.filter(pk=task.pk).cancel()
    Message(*consumer.claim()).nack("E 1", delay=timedelta(0))
    if then == "was handed back":
        assert hand_back([claimed.lease for claimed in consumer.claim()], "default")
    Consumer.objects.update(has_cancel_handler=False)
    consumer.claim()

    found = told(consumer)

    assert (found.cancelled, found.succeeded, found.failed) == (1, 0, 0)
    assert found.failures == [("E 1", 1)]


def test_a_cleanup_whose_lease_ran_out_and_that_has_no_handler_any_more_has_not_succeeded(
    consumer: Consumer,
):
    task = TaskFactory.create(consumer=consumer)
    Task.objects.filter(pk=task.pk).cancel()
    assert consumer.claim()
    Task.objects.update(schedule_at=Now() - timedelta(minutes=1))
    Consumer.objects.update(has_cancel_handler=False)
    assert consumer.claim() == []

    found = told(consumer)

    assert (found.cancelled, found.succeeded, found.failed) == (1, 0, 0)
    assert found.failures == [(LEASE_RAN_OUT, 1)]


def test_what_ended_earlier_or_at_other_consumers_is_left_out(consumer: Consumer):
    old = ended(consumer, TaskState.CANCELLED)
    Task.objects.filter(pk=old.pk).update(finalized_at=Now() - timedelta(days=2))
    ended(ConsumerFactory.create(), TaskState.CANCELLED)
    assert not told(consumer)


def test_a_task_that_was_resumed_and_then_discarded_is_no_failed_cancellation(consumer: Consumer):
    task = ended(consumer, TaskState.CANCELLED)
    Task.objects.filter(pk=task.pk).resume()
    Task.objects.filter(pk=task.pk).update(state=TaskState.DISCARDED, finalized_at=Now())
    assert not told(consumer)


def test_failures_of_a_cancellation_that_still_goes_on_are_told(consumer: Consumer):
    ended(consumer, TaskState.CANCELLING, attempted_errors=[failed(1, "handle"), failed(2)])
    assert told(consumer).failures == [("E 2", 1)]


def test_reasons_that_differ_by_numbers_alone_are_one_told_by_its_newest(consumer: Consumer):
    for number in (1, 22, 333):
        ended(consumer, TaskState.DISCARDED, attempted_errors=[failed(number)])
    assert told(consumer).failures == [("E 333", 3)]


@pytest.mark.parametrize(
    "history", [[], {}, "text", 7, [7, "text", {}], [{"verb": "cancel"}], [{"verb": ["cancel"]}]]
)
def test_a_history_of_another_shape_does_no_harm(consumer: Consumer, history: Any):
    ended(consumer, TaskState.DISCARDED, attempted_errors=history)
    assert told(consumer).failures == []


def test_counting_stops_and_says_so(consumer: Consumer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOKED_AT_MAX", 2)
    for _ in range(3):
        ended(consumer, TaskState.CANCELLED)
    assert (told(consumer).cancelled, told(consumer).is_bounded) == (2, True)


def test_a_million_tasks_set_aside_are_not_read(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LOOKED_AT_MAX", 100)
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE kanthorq_django_task")  # with what the planner learnt of it
        cursor.execute(
            """
            INSERT INTO kanthorq_django_task (consumer_id, event_id, state, schedule_at,
                finalized_at, cancel_requested_at, cancel_attempt_count, created_at)
            SELECT %s, gen_random_uuid(), CASE n %% 3 WHEN 0 THEN -101 WHEN 1 THEN -102 ELSE 1 END,
                now(), CASE n %% 3 WHEN 2 THEN NULL ELSE now() END, now(), 2, now()
            FROM generate_series(1, %s) AS n
            """,
            [consumer.pk, MANY],
        )
        cursor.execute("ANALYZE kanthorq_django_task")
    with CaptureQueriesContext(connection) as queries:
        assert told(consumer).is_bounded
    assert max(rows_read(query["sql"]) for query in queries) <= 300


def rows_read(statement: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {statement}")
        (plans,) = cursor.fetchone()
    (plan,) = plans if isinstance(plans, list) else json.loads(plans)
    return max(int(node["Actual Rows"] * node["Actual Loops"]) for node in nodes(plan["Plan"]))


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", []):
        yield from nodes(child)
