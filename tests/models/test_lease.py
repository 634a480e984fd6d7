"""What the holder of a lease may do, and nobody else."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.db.models import TextField
from django.db.models.functions import Cast, Now

from kanthorq_django.models import Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.delivery.lease import Lease
from tests.clock import now
from tests.concurrency import elsewhere
from tests.factories import ConsumerFactory, TaskFactory
from tests.models.leases import (
    MINUTE,
    OTHERS,
    ack,
    ack_among_others,
    cancelling,
    fields,
    hand_back,
    nack,
    running,
)

pytestmark = pytest.mark.django_db


# Ack


@pytest.mark.parametrize("verb", [ack, ack_among_others])
def test_ack_of_a_cancellation_cancels_the_task_and_keeps_no_result(
    verb: Callable[[Lease], object],
):
    task = cancelling(result={"earlier": True})
    assert verb(task.lease) == {task.pk}
    after = fields(task)
    assert (after["state"], after["result"]) == (TaskState.CANCELLED, {"earlier": True})
    assert after["finalized_at"] is not None


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("count", [1, 2])
def test_a_cancellation_that_is_committed_keeps_no_result_either(count: int):
    tasks = [cancelling(result={"earlier": True}) for _ in range(count)]
    with transaction.atomic():
        assert lease.ack_and_commit(dict.fromkeys([task.lease for task in tasks], "1"), "default")
    ended = Task.objects.values_list("state", "result")
    assert list(ended) == [(TaskState.CANCELLED, {"earlier": True})] * count


def test_ack_leaves_counters_and_history_alone():
    task = running(attempt_count=3, lease_epoch=5, attempted_errors=[{"error": "once"}])
    ack(task.lease)
    after = fields(task)
    assert (after["attempt_count"], after["lease_epoch"]) == (3, 5)
    assert after["attempted_errors"] == [{"error": "once"}]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("verb", [lease.ack, lease.ack_and_commit])
def test_results_are_kept_where_the_server_reads_no_null_in_arrays(
    verb: Callable[..., object],
):
    tasks = [running(attempted_at=Now()) for _ in range(5)]
    for results in (['"NULL"', None, "null"], [None, None]):
        acked, tasks = tasks[: len(results)], tasks[len(results) :]
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL array_nulls = off")
            verb({task.lease: text for task, text in zip(acked, results, strict=True)}, "default")
        assert {fields(task)["state"] for task in acked} == {TaskState.COMPLETED}
    kept = Task.objects.filter(result__isnull=False).order_by("pk")
    assert list(kept.values_list(Cast("result", TextField()), flat=True)) == ['"NULL"', "null"]


# Nack


def test_nack_tells_where_it_led():
    assert nack(running().lease) == TaskState.RETRYABLE
    final = running()
    end = fields(final)["schedule_at"]
    assert nack(final.lease, delay=MINUTE, is_final=True) == TaskState.DISCARDED
    assert fields(final)["schedule_at"] == end
    assert nack(final.lease) == set()


def test_nack_of_a_cancellation_waits_and_ends_its_lease():
    task = cancelling(attempt_count=7)
    before = now()
    state = nack(task.lease, delay=MINUTE)
    after = fields(task)
    assert state == after["state"] == TaskState.CANCELLING
    assert (after["lease_epoch"], after["attempt_count"], after["cancel_attempt_count"]) == (
        3,
        7,
        1,
    )
    assert before <= after["schedule_at"] - MINUTE <= now()
    (error,) = after["attempted_errors"]
    assert (error["verb"], error["attempt"], error["error"]) == ("cancel", 1, "failed")


def test_a_second_nack_of_a_cancellation_is_fenced():
    task = cancelling()
    nack(task.lease)
    before = fields(task)
    assert nack(task.lease) == set()
    assert fields(task) == before


def test_nack_of_the_last_cancellation_attempt_discards_the_task():
    consumer = ConsumerFactory.create(has_cancel_handler=True, cancel_attempt_max=3)
    task = cancelling(consumer=consumer, cancel_attempt_count=3)
    assert nack(task.lease) == TaskState.DISCARDED
    assert fields(task)["finalized_at"] is not None


def test_a_final_nack_forgoes_the_attempts_of_a_cancellation():
    task = cancelling()
    assert nack(task.lease, is_final=True) == TaskState.DISCARDED


def test_nack_of_a_running_task_asked_to_cancel_begins_its_cancellation_anew_and_at_once():
    consumer = ConsumerFactory.create(has_cancel_handler=True)
    task = running(consumer=consumer, cancel_requested_at=Now(), cancel_attempt_count=9)
    before = now()
    assert nack(task.lease, delay=MINUTE) == TaskState.CANCELLING
    after = fields(task)
    assert (after["lease_epoch"], after["cancel_attempt_count"]) == (2, 0)
    assert before <= after["schedule_at"] <= now()
    assert after["attempted_errors"][0]["verb"] == "handle"


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 9])
def test_only_the_newest_errors_stay_in_the_history(size: int, limit: int, settings):
    settings.KANTHORQ = {"ERRORS_MAX": limit}
    past = [{"error": number} for number in range(size)]
    task = running(attempted_errors=past)
    nack(task.lease)
    errors = [error["error"] for error in fields(task)["attempted_errors"]]
    assert errors == [*range(size), "failed"][-limit:]


# Handing back


def test_hand_back_refunds_the_attempt_and_makes_the_task_available():
    task = running(attempt_count=3, attempted_errors=[{"error": "once"}])
    before = now()
    assert hand_back(task.lease) == {task.pk}
    after = fields(task)
    assert (after["state"], after["attempt_count"]) == (TaskState.AVAILABLE, 2)
    assert after["lease_epoch"] == 3
    assert before <= after["schedule_at"] <= now()
    assert after["attempted_errors"] == [{"error": "once"}]


def test_hand_back_with_a_delay_makes_the_task_wait():
    task = running()
    before = now()
    lease.hand_back([task.lease], "default", delay=MINUTE)
    assert before <= fields(task)["schedule_at"] - MINUTE <= now()


def test_hand_back_of_a_cancellation_refunds_its_attempt_and_ends_its_lease():
    task = cancelling(attempt_count=3, cancel_attempt_count=2)
    hand_back(task.lease)
    after = fields(task)
    assert (after["state"], after["lease_epoch"]) == (TaskState.CANCELLING, 3)
    assert (after["attempt_count"], after["cancel_attempt_count"]) == (3, 1)
    assert hand_back(task.lease) == set()


@pytest.mark.parametrize(
    ("task", "verb", "state"),
    [
        (running, nack, TaskState.DISCARDED),
        (cancelling, nack, TaskState.DISCARDED),
        (running, hand_back, TaskState.AVAILABLE),
        (cancelling, hand_back, TaskState.CANCELLING),
    ],
)
def test_a_verdict_is_written_though_the_consumer_was_deleted_by_sql(
    task: Callable[[], Task], verb: Callable[[Lease], object], state: TaskState
):
    """Whoever repeats it until it is written would never end."""
    held = task()
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM kanthorq_django_consumer WHERE id = %s", [held.consumer_id])
    assert verb(held.lease)
    assert fields(held)["state"] == state


@pytest.mark.parametrize("has_handler", [False, True])
def test_hand_back_of_a_task_asked_to_cancel_cancels_it(has_handler: bool):
    consumer = ConsumerFactory.create(has_cancel_handler=has_handler)
    task = running(consumer=consumer, cancel_requested_at=Now(), cancel_attempt_count=9)
    before = now()
    lease.hand_back([task.lease], "default", delay=MINUTE)
    after = fields(task)
    assert after["state"] == (TaskState.CANCELLING if has_handler else TaskState.CANCELLED)
    assert (after["finalized_at"] is None) == has_handler
    assert after["cancel_attempt_count"] == 0
    if has_handler:
        assert before <= after["schedule_at"] <= now()


# Renewing


def test_renew_moves_the_end_of_a_lease_away_but_never_nearer():
    short = running()
    long = running(schedule_at=Now() + 10 * MINUTE)
    end = fields(long)["schedule_at"]
    before = now()
    lease.renew({short.lease: 2 * MINUTE, long.lease: MINUTE}, "default")
    assert before <= fields(short)["schedule_at"] - 2 * MINUTE <= now()
    assert fields(long)["schedule_at"] == end


def test_a_lease_that_ran_out_while_it_had_its_keys_turn_is_lost_and_others_are_renewed():
    over = Now() - MINUTE
    lost = running(turn_key="a", schedule_at=over)
    kept = [
        running(turn_key="b", schedule_at=Now() + MINUTE / 2),
        running(schedule_at=over),
        cancelling(turn_key="a", schedule_at=over),
    ]
    before = fields(lost)
    rows = lease.renew(dict.fromkeys([each.lease for each in (lost, *kept)], MINUTE), "default")
    found = {held: (row.is_renewed, row.is_ours) for held, row in rows.items()}
    assert found == {
        lost.lease: (False, False),
        **dict.fromkeys([k.lease for k in kept], (True, True)),
    }
    assert fields(lost) == before


def test_renew_tells_of_each_lease_how_it_stands():
    ours, asked = running(attempted_at=Now()), running(cancel_requested_at=Now())
    taken, done = running(lease_epoch=2), TaskFactory.create(state=TaskState.COMPLETED)
    undone = cancelling(cancel_requested_at=Now())  # which its handler is at work on
    lost, nothing = taken.lease._replace(epoch=1), Lease(0, 1, None)
    former = [other(ours.lease) for other in OTHERS]
    held = [*former, ours.lease, asked.lease, lost, done.lease, undone.lease, nothing]
    rows = {
        found: (row.is_renewed, row.is_ours, row.is_cancelled)
        for found, row in lease.renew(dict.fromkeys(held, MINUTE), "default").items()
    }
    assert rows == {
        ours.lease: (True, True, False),
        asked.lease: (True, True, True),
        undone.lease: (True, True, False),
        **dict.fromkeys((*former, lost, done.lease, nothing), (False, False, False)),
    }


@pytest.mark.django_db(transaction=True)
def test_renew_passes_over_a_task_that_is_being_acked_and_renews_the_others():
    acking, other = running(), running()
    held = dict.fromkeys((acking.lease, other.lease), timedelta(hours=1))
    with transaction.atomic():
        lease.ack({acking.lease: None}, "default")
        rows = elsewhere(lambda: lease.renew(held, "default"))
        assert {held: (row.is_renewed, row.is_ours) for held, row in rows.items()} == {
            acking.lease: (False, True),
            other.lease: (True, True),
        }
    assert fields(acking)["state"] == TaskState.COMPLETED
    assert fields(other)["schedule_at"] > now() + timedelta(minutes=50)


@pytest.mark.django_db(transaction=True)
def test_renew_tells_that_a_task_was_taken_over():
    task = running(schedule_at=Now() - MINUTE)
    elsewhere(task.consumer.claim)
    end = fields(task)["schedule_at"]
    (row,) = lease.renew({task.lease: timedelta(hours=1)}, "default").values()
    assert (row.is_renewed, row.is_ours) == (False, False)
    assert fields(task)["schedule_at"] == end
