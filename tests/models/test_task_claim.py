"""Which tasks a claim leases, which it ends, and what it leaves alone."""

import logging
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now

from kanthorq_django import publish, signals
from kanthorq_django.domain.states import CLAIMABLE
from kanthorq_django.models import Consumer, Task, TaskState
from tests.clock import now
from tests.concurrency import elsewhere
from tests.factories import ConsumerFactory, EventFactory, TaskFactory
from tests.receivers import heard_by

pytestmark = pytest.mark.django_db

MINUTE = timedelta(minutes=1)
PAST = Now() - MINUTE


@pytest.fixture
def consumer() -> Consumer:
    return ConsumerFactory.create(visibility_timeout=7 * MINUTE, attempt_max=3)


def due(consumer: Consumer, state: TaskState = TaskState.AVAILABLE, **options: Any) -> Task:
    return TaskFactory.create(**{"schedule_at": PAST} | options, consumer=consumer, state=state)


# Leasing


@pytest.mark.parametrize("state", [TaskState.AVAILABLE, TaskState.RETRYABLE, TaskState.RUNNING])
def test_a_due_task_is_leased_for_one_more_attempt(consumer: Consumer, state: TaskState):
    task = due(consumer, state, attempt_count=2, lease_epoch=5)
    before = now()

    (claimed,) = consumer.claim()

    assert (claimed.pk, claimed.state) == (task.pk, TaskState.RUNNING)
    assert (claimed.attempt_count, claimed.lease_epoch) == (3, 6)
    assert before <= claimed.schedule_at - 7 * MINUTE <= now()
    assert claimed.attempted_at is not None
    assert before <= claimed.attempted_at <= now()
    assert Task.objects.filter(pk=task.pk).values().get() == {
        field.attname: getattr(claimed, field.attname) for field in Task._meta.concrete_fields
    }


def test_a_claimed_task_brings_its_event_and_consumer_along(
    consumer: Consumer, django_assert_num_queries
):
    event = EventFactory.create(
        stream=consumer.stream, body=b"\x00\xff", metadata={"trace": 1}, resource_key="order-1"
    )
    due(consumer, event=event, attempted_errors=[{"error": "once"}])
    (claimed,) = consumer.claim()
    with django_assert_num_queries(0):
        assert claimed.consumer == consumer
        assert claimed.event == event
        assert (bytes(claimed.event.body), claimed.event.metadata) == (b"\x00\xff", {"trace": 1})
        assert (claimed.event.subject, claimed.event.resource_key) == ("order.paid", "order-1")
        assert claimed.event.created_at == event.created_at
        assert claimed.event.stream_id == consumer.stream_id
        assert claimed.attempted_errors == [{"error": "once"}]


@pytest.mark.parametrize("state", sorted(set(TaskState) - CLAIMABLE))
def test_what_is_parked_or_final_is_not_claimed(consumer: Consumer, state: TaskState):
    due(consumer, state)
    assert consumer.claim() == []


@pytest.mark.parametrize("state", sorted(CLAIMABLE))
def test_nothing_is_claimed_before_its_time(consumer: Consumer, state: TaskState):
    due(consumer, state, schedule_at=Now() + MINUTE)
    assert consumer.claim() == []


def test_the_tasks_of_another_consumer_are_left_alone(consumer: Consumer):
    due(ConsumerFactory.create(stream=consumer.stream))
    assert consumer.claim() == []


def test_the_longest_due_are_claimed_first_and_no_more_than_asked_for(consumer: Consumer):
    waits = [3, 1, 4, 1, 5]
    tasks = [due(consumer, schedule_at=Now() - wait * MINUTE) for wait in waits]
    claimed = [consumer.claim(2), consumer.claim(2), consumer.claim(2), consumer.claim(2)]
    assert [{task.pk for task in page} for page in claimed] == [
        {tasks[4].pk, tasks[2].pk},
        {tasks[0].pk, tasks[1].pk},
        {tasks[3].pk},
        set(),
    ]


def test_what_is_claimed_together_comes_in_the_order_of_its_ids(consumer: Consumer):
    tasks = [due(consumer, schedule_at=Now() - minutes * MINUTE) for minutes in (1, 3, 2)]
    Task.objects.filter(pk=tasks[0].pk).update(result="written behind the others")
    assert consumer.claim() == tasks


def test_equally_due_tasks_are_claimed_in_their_order(consumer: Consumer):
    moment = now() - MINUTE
    tasks = [due(consumer, schedule_at=moment) for _ in range(4)]
    assert [task.pk for task in consumer.claim(3)] == [task.pk for task in tasks[:3]]


def test_only_the_states_asked_for_are_claimed(consumer: Consumer):
    tasks = {state: due(consumer, state) for state in CLAIMABLE - {TaskState.CANCELLING}}
    for state in (TaskState.RETRYABLE, TaskState.RUNNING, TaskState.AVAILABLE):
        assert [task.pk for task in consumer.claim(states=[state])] == [tasks[state].pk]
    assert consumer.claim(states=[]) == []


@pytest.mark.parametrize("limit", [0, -1, 1.5, "2", True, None])
def test_a_limit_that_is_no_count_is_refused(consumer: Consumer, limit: Any):
    with pytest.raises(ValueError, match="limit"):
        consumer.claim(limit)


@pytest.mark.django_db(transaction=True)
def test_a_claim_passes_over_what_somebody_has_locked(consumer: Consumer):
    locked, free = due(consumer), due(consumer)
    with transaction.atomic():
        Task.objects.select_for_update().get(pk=locked.pk)
        assert [task.pk for task in elsewhere(consumer.claim)] == [free.pk]


def test_a_claim_is_announced_once(consumer: Consumer):
    due(consumer)
    heard = []

    def hear(**given: Any) -> None:
        heard.append((given["consumer"], len(given["tasks"])))

    with heard_by(hear, signals.claimed):
        consumer.claim()
    assert heard == [(consumer, 1)]


# Stuck tasks


def test_a_lease_that_ran_out_is_noted_in_the_history(consumer: Consumer):
    due(consumer, TaskState.RUNNING, attempt_count=1)
    (claimed,) = consumer.claim()
    (error,) = claimed.attempted_errors
    assert (error["attempt"], error["verb"]) == (1, "handle")
    assert error["error"].startswith("The lease ran out")


@pytest.mark.parametrize("state", [TaskState.AVAILABLE, TaskState.RETRYABLE])
def test_only_a_lease_can_run_out(consumer: Consumer, state: TaskState):
    due(consumer, state)
    assert consumer.claim()[0].attempted_errors == []


def test_a_stuck_task_without_attempts_left_is_discarded(
    consumer: Consumer, caplog: pytest.LogCaptureFixture
):
    poison = due(consumer, TaskState.RUNNING, attempt_count=3, attempted_at=PAST)
    times = (poison.attempted_at, poison.schedule_at)
    assert consumer.claim() == []
    (told,) = [record for record in caplog.records if record.name == "kanthorq_django"]
    assert told.levelname == "ERROR"
    assert f"Consumer {consumer.name}: 1 task had no attempt left" in told.getMessage()
    assert told.getMessage().endswith(f"; event {poison.event_id}")
    poison.refresh_from_db()
    assert (poison.state, poison.attempt_count) == (TaskState.DISCARDED, 3)
    assert (poison.attempted_at, poison.schedule_at) == times
    assert poison.lease_epoch == 4
    assert poison.finalized_at is not None
    assert poison.attempted_errors[-1]["error"].startswith("The lease ran out")


def test_a_task_that_is_resumed_has_one_more_attempt_though_all_were_used(consumer: Consumer):
    task = due(consumer, TaskState.DISCARDED, attempt_count=3)
    Task.objects.filter(pk=task.pk).resume()
    (claimed,) = consumer.claim()
    assert claimed.attempt_count == 4
    Task.objects.update(schedule_at=PAST)
    assert consumer.claim() == []
    assert Task.objects.get().state == TaskState.DISCARDED


def test_a_claim_looks_past_a_page_of_tasks_that_end_there(consumer: Consumer):
    for wait in (5, 4, 3):
        due(consumer, TaskState.RUNNING, attempt_count=3, schedule_at=Now() - timedelta(hours=wait))
    alive = due(consumer)
    assert [task.pk for task in consumer.claim(2)] == [alive.pk]
    assert Task.objects.discarded().count() == 3


def test_the_history_of_a_stuck_task_is_bounded(consumer: Consumer, settings):
    settings.KANTHORQ = {"ERRORS_MAX": 2}
    due(consumer, TaskState.RUNNING, attempted_errors=[{"error": n} for n in range(5)])
    (claimed,) = consumer.claim()
    assert [error["error"] for error in claimed.attempted_errors][:-1] == [4]


@pytest.mark.parametrize("attempt_count", [1, 3])
def test_a_stuck_task_that_was_asked_to_cancel_is_cancelled(
    consumer: Consumer, attempt_count: int, caplog: pytest.LogCaptureFixture
):
    task = due(consumer, TaskState.RUNNING, cancel_requested_at=Now(), attempt_count=attempt_count)
    assert consumer.claim() == []
    task.refresh_from_db()
    assert task.state == TaskState.CANCELLED
    assert task.finalized_at is not None
    assert task.attempt_count == attempt_count
    assert caplog.text == ""  # it is not told of as discarded


@pytest.mark.parametrize(("count", "shown"), [(20, 20), (21, 20)])
def test_the_log_tells_of_many_discarded_tasks_and_names_some(
    consumer: Consumer, caplog: pytest.LogCaptureFixture, count: int, shown: int
):
    for _ in range(count):
        due(consumer, TaskState.RUNNING, attempt_count=3)
    waiting = due(consumer)
    assert [task.pk for task in consumer.claim()] == [waiting.pk]
    text = caplog.text
    assert f"{count} tasks had no attempt left" in text
    assert sum(str(pk) in text for pk in Task.objects.values_list("event_id", flat=True)) == shown
    assert text.rstrip().endswith("…") is (count > shown)


def test_a_filter_of_the_log_that_raises_costs_no_lease(consumer: Consumer):
    def refuse(record: Any) -> bool:
        raise ValueError

    due(consumer, TaskState.RUNNING, attempt_count=3)
    waiting = due(consumer)
    logger = logging.getLogger("kanthorq_django")
    logger.addFilter(refuse)
    try:
        assert [task.pk for task in consumer.claim()] == [waiting.pk]
    finally:
        logger.removeFilter(refuse)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("way", ["pull", "claim"])
def test_a_lease_is_as_long_as_its_holder_believes(way: str):
    """Newer code may have changed the row meanwhile; who renews goes by its own."""
    consumer = ConsumerFactory.create(visibility_timeout=7 * MINUTE)
    Consumer.objects.update(visibility_timeout=MINUTE)
    if way == "claim":
        due(consumer)
    else:
        publish("order.created", stream=consumer.stream.name)
    (task,) = consumer.pull() if way == "pull" else consumer.claim()
    assert task.attempted_at is not None
    assert task.schedule_at - task.attempted_at == 7 * MINUTE


@pytest.mark.parametrize(
    "states",
    [
        *([TaskState.COMPLETED], [TaskState.RUNNING, 7], "1"),
        *([2.0], [TaskState.RUNNING, 2.0], [Decimal(2)], [True], [None], [[2]]),
    ],
)
def test_a_state_that_no_claim_takes_is_refused(consumer: Consumer, states: Any):
    with pytest.raises(ValueError, match=r"^states must be some of AVAILABLE, .*, not "):
        consumer.claim(states=states)
    assert Task.objects.count() == 0  # the transaction is still usable


def test_a_state_may_be_given_as_its_number(consumer: Consumer):
    due(consumer)
    numbers: Any = iter([1, TaskState.AVAILABLE])
    assert len(consumer.claim(states=numbers)) == 1


def test_tasks_whose_consumer_was_deleted_by_sql_are_not_looked_for_for_ever(consumer: Consumer):
    due(consumer)
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM kanthorq_django_consumer")
    assert consumer.claim() == []
