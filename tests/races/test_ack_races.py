"""Two actors at one task on connections of their own: never do both of them win."""

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction
from django.db.models.functions import Now

from kanthorq_django import publish_many, subscribe
from kanthorq_django.domain.failures import Failure
from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.isolation import together, undeadlocked
from kanthorq_django.models.task import TaskQuerySet
from kanthorq_django.testing import drain
from tests.concurrency import (
    DEADLINE_SECONDS,
    at_once,
    begin_elsewhere,
    elsewhere,
    is_waited_for,
    wait_until,
)
from tests.factories import ConsumerFactory, TaskFactory
from tests.ledger.models import Entry
from tests.races.race import altered

pytestmark = pytest.mark.django_db(transaction=True)

ROUNDS = 20
INSERT = """
    INSERT INTO kanthorq_django_task
        (consumer_id, event_id, state, lease_epoch, attempt_count, finalized_at)
    SELECT %(consumer)s, id, %(state)s, 1, 1, CASE WHEN %(state)s < 0 THEN now() END
    FROM kanthorq_django_event
    WHERE stream_id = %(stream)s
"""


@pytest.fixture
def consumer() -> Consumer:
    return ConsumerFactory.create()


def rounds() -> Iterator[Consumer]:
    """Yield a consumer for each round of a race."""
    return (ConsumerFactory.create() for _ in range(ROUNDS))


def fill(consumer: Consumer, count: int, state: TaskState = TaskState.AVAILABLE) -> None:
    """Store tasks that are due, with a lease of epoch 1 if they run."""
    publish_many([Event(subject="order.paid") for _ in range(count)], stream=consumer.stream.name)
    with connection.cursor() as cursor:
        params = {"consumer": consumer.pk, "stream": consumer.stream_id, "state": int(state)}
        cursor.execute(INSERT, params)


def book_and_ack(message: Message) -> None:
    with transaction.atomic():
        Entry.objects.create(event_id=message.event.pk)
        message.ack()


def stuck(consumer: Consumer) -> Message:
    """The message of a worker whose lease has run out."""
    task = TaskFactory.create(consumer=consumer, state=TaskState.RUNNING, schedule_at=Now())
    return Message(task)


# Claims


def test_cancel_and_claim_at_once_never_both_get_a_task():
    for consumer in rounds():
        fill(consumer, 300)
        tasks = Task.objects.filter(consumer=consumer)

        outcome, *claims = at_once(tasks.cancel, *[partial(consumer.claim, 70)] * 3)

        claimed = [task.event_id for claim in claims for task in claim]
        assert len(set(claimed)) == len(claimed)
        assert not set(claimed) & set(outcome.updated)
        assert len(claimed) + len(outcome.updated) == 300
        assert set(outcome.noop) == set(claimed)
        assert set(tasks.running().values_list("event_id", flat=True)) == set(claimed)
        assert tasks.cancelled().count() == len(outcome.updated)


def test_a_cancel_that_waits_for_a_claim_finds_the_task_running(consumer: Consumer):
    fill(consumer, 1)
    with transaction.atomic():
        (task,) = consumer.claim()
        outcome = begin_elsewhere(Task.objects.all().cancel)
        wait_until(is_waited_for)
    assert outcome.result() == Outcome(noop=(task.event_id,))
    assert Task.objects.get().state == TaskState.RUNNING


def test_a_claim_does_not_wait_for_a_cancel(consumer: Consumer):
    fill(consumer, 1)
    with transaction.atomic():
        Task.objects.all().cancel()
        assert elsewhere(consumer.claim) == []
    assert consumer.claim() == []


# Verdicts


def test_ack_and_takeover_at_once_never_both_succeed():
    for consumer in rounds():
        message = stuck(consumer)

        acked, claimed = at_once(partial(book_and_ack, message), consumer.claim)

        if claimed:
            assert isinstance(acked, LeaseLost)
            book_and_ack(Message(claimed[0]))
        else:
            assert acked is None
        assert Task.objects.get(consumer=consumer).state == TaskState.COMPLETED
        assert Entry.objects.filter(event_id=message.event.pk).count() == 1


def test_an_ack_that_waits_for_a_takeover_loses_its_lease_and_its_business_writes(
    consumer: Consumer,
):
    message = stuck(consumer)
    with transaction.atomic():
        (claimed,) = consumer.claim()
        acked = begin_elsewhere(lambda: book_and_ack(message))
        wait_until(is_waited_for)
    with pytest.raises(LeaseLost):
        acked.result()
    assert not Entry.objects.exists()
    book_and_ack(Message(claimed))
    assert Entry.objects.count() == 1


def test_without_the_epoch_a_stale_worker_would_commit_as_well(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    stale = stuck(consumer)
    (claimed,) = consumer.claim()
    moment = "'epoch'::timestamptz + %(since)s::bigint * interval '1 microsecond'"
    fence = (
        " AND lease_epoch = %(lease_epoch)s",
        f" AND attempted_at IS NOT DISTINCT FROM {moment}",
    )
    with altered(monkeypatch, "ack_one", *((line, "") for line in fence)):
        book_and_ack(stale)
        book_and_ack(Message(claimed))
    assert Entry.objects.count() == 2  # what the fence prevents


def test_a_takeover_does_not_wait_for_an_ack_and_wins_if_that_rolls_back(consumer: Consumer):
    message = stuck(consumer)
    with transaction.atomic():
        message.ack()
        assert elsewhere(consumer.claim) == []
        transaction.set_rollback(True)
    (claimed,) = consumer.claim()
    assert claimed.pk == message.task.pk


def test_of_the_stale_and_the_new_worker_only_the_new_one_commits():
    for consumer in rounds():
        stale = stuck(consumer)
        (claimed,) = consumer.claim()

        lost, acked = at_once(partial(book_and_ack, stale), partial(book_and_ack, Message(claimed)))

        assert isinstance(lost, LeaseLost)
        assert acked is None
        assert Entry.objects.filter(event_id=stale.event.pk).count() == 1


def test_of_opposite_verdicts_at_once_one_is_written():
    failure = Failure("failed")
    for consumer in rounds():
        held = stuck(consumer).lease

        acked, nacked = at_once(
            partial(lease.ack, {held: None}, "default"),
            partial(lease.nack, {held: lease.Failed(failure)}, "default"),
        )

        assert bool(acked) != bool(nacked)
        expected = TaskState.COMPLETED if acked else TaskState.RETRYABLE
        assert Task.objects.get(consumer=consumer).state == expected


def test_a_request_to_cancel_and_a_failure_at_once_end_in_the_cancellation():
    for consumer in rounds():
        message = stuck(consumer)
        tasks = Task.objects.filter(consumer=consumer)
        at_once(partial(tasks.cancel, running=True), partial(message.nack, "failed"))
        assert tasks.get().state == TaskState.CANCELLED


def test_a_cancel_that_waits_for_a_failure_cancels_the_retry(consumer: Consumer):
    message = stuck(consumer)
    with transaction.atomic():
        message.nack("failed")
        outcome = begin_elsewhere(lambda: Task.objects.all().cancel(running=True))
        wait_until(is_waited_for)
    assert outcome.result() == Outcome(updated=(message.event.pk,))


def test_a_cancel_does_not_wait_for_tasks_that_it_would_leave_alone(consumer: Consumer):
    message = stuck(consumer)
    with transaction.atomic():
        message.ack()
        assert elsewhere(Task.objects.all().cancel) == Outcome(noop=(message.event.pk,))


def test_a_cancel_that_waits_for_a_success_leaves_it_alone(consumer: Consumer):
    message = stuck(consumer)
    with transaction.atomic():
        message.ack()
        outcome = begin_elsewhere(lambda: Task.objects.all().cancel(running=True))
        wait_until(is_waited_for)
    assert outcome.result() == Outcome(noop=(message.event.pk,))
    assert Task.objects.get().cancel_requested_at is None


def test_an_extension_waits_for_whoever_has_the_task_locked(consumer: Consumer):
    message = stuck(consumer)
    with transaction.atomic():
        Task.objects.select_for_update().get()
        extended = begin_elsewhere(lambda: message.extend(timedelta(hours=1)))
        wait_until(is_waited_for)
    extended.result()
    assert not Task.objects.stuck().exists()


# Bulk verbs


def test_operators_at_once_move_each_task_once():
    for consumer in rounds():
        fill(consumer, 200)
        tasks = Task.objects.filter(consumer=consumer)
        one, other = at_once(tasks.cancel, tasks.order_by("-pk").cancel)
        ids = set(tasks.values_list("event_id", flat=True))
        assert len(one.updated + other.updated) == 200
        assert {*one.updated, *other.updated} == ids


Verb = Callable[[TaskQuerySet], Any]
OVERLAPPING: list[tuple[TaskState, Verb, Verb]] = [
    (TaskState.AVAILABLE, lambda tasks: tasks.cancel(), lambda tasks: tasks.cancel()),
    (TaskState.CANCELLED, lambda tasks: tasks.resume(), lambda tasks: tasks.reset()),
    (
        TaskState.RUNNING,
        lambda tasks: tasks.cancel(running=True),
        lambda tasks: lease.ack({task.lease: None for task in tasks}, "default"),
    ),
    (
        TaskState.RUNNING,
        lambda tasks: tasks.cancel(running=True),
        lambda tasks: lease.hand_back([task.lease for task in tasks], "default"),
    ),
]


@pytest.mark.parametrize(("state", "first", "second"), OVERLAPPING)
def test_verbs_over_the_same_tasks_in_opposite_orders_do_not_deadlock(
    monkeypatch: pytest.MonkeyPatch, state: TaskState, first: Verb, second: Verb
):
    monkeypatch.setattr("kanthorq_django.models.moves.CHUNK_SIZE", 10)
    for consumer in rounds():
        tasks = Task.objects.filter(consumer=consumer)
        fill(consumer, 100, state)

        results = at_once(
            partial(first, tasks.order_by("pk")), partial(second, tasks.order_by("-pk"))
        )

        assert not [result for result in results if isinstance(result, DatabaseError)]


@pytest.mark.parametrize(
    "delete", [Consumer.delete, lambda one: Consumer.objects.filter(pk=one.pk).delete()]
)
def test_a_deletion_locks_the_tasks_of_its_consumer_in_the_order_of_verbs(
    consumer: Consumer, delete: Callable[[Consumer], Any]
):
    fill(consumer, 2)
    first, second = Task.objects.order_by("pk")
    # What an update writes lies behind the other one, where a deletion comes to it last.
    Task.objects.filter(pk=first.pk).update(resource_key="moved")
    with transaction.atomic():
        assert Task.objects.select_for_update().get(pk=first.pk)
        deleting = begin_elsewhere(lambda: delete(consumer))
        wait_until(is_waited_for)
        assert Task.objects.select_for_update(nowait=True).get(pk=second.pk)
    deleting.result(DEADLINE_SECONDS)
    assert not Task.objects.exists()


@pytest.mark.parametrize("is_enclosed", [False, True])
def test_a_verb_outlives_a_deadlock_with_a_handler_that_acks_in_another_order(is_enclosed: bool):
    acked = threading.Event()

    @subscribe("order.paid", stream="kit", consumer="kit", batch=3, atomic=True)
    def handle(messages: list[Message]) -> None:
        if not acked.is_set():
            messages[-1].ack()
            acked.set()
            wait_until(is_waited_for)  # then the first ones are locked, and follow as it returns

    publish_many([Event(subject="order.paid") for _ in range(3)], stream="kit")
    handling = begin_elsewhere(lambda: drain("kit"))
    assert acked.wait(DEADLINE_SECONDS)
    cancel = partial(Task.objects.all().cancel, running=True)
    outcome = outermost(cancel) if is_enclosed else cancel()
    handling.result(DEADLINE_SECONDS)
    assert len(outcome.noop + outcome.requested) == 3


def outermost(run: Callable[[], Outcome]) -> Outcome:
    """Do what a caller has to do who has a transaction of their own."""

    def all_of_it() -> Outcome:
        with together("default"):
            return run()

    return undeadlocked("default", all_of_it)
