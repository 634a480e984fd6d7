"""Statements that wait for somebody's lock: what they find then, and what they hold meanwhile."""

from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now

from kanthorq_django.domain.failures import Failure
from kanthorq_django.models import Consumer, Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.delivery.lease import Lease
from kanthorq_django.models.registration import Registration
from tests.concurrency import DEADLINE_SECONDS, begin_elsewhere, is_waited_for, wait_until
from tests.factories import ConsumerFactory, TaskFactory

pytestmark = pytest.mark.django_db(transaction=True)

Verb = Callable[[Sequence[Lease]], object]


def ack(leases: Sequence[Lease]) -> object:
    return lease.ack(dict.fromkeys(leases), "default")


def ack_and_commit(leases: Sequence[Lease]) -> object:
    with transaction.atomic():
        if lease.ack_and_commit(dict.fromkeys(leases), "default"):
            return True
        transaction.set_rollback(True)
    return False


def nack(leases: Sequence[Lease]) -> object:
    failed = lease.Failed(Failure("failed"))
    return lease.nack(dict.fromkeys(leases, failed), "default")


def hand_back(leases: Sequence[Lease]) -> object:
    return lease.hand_back(leases, "default")


VERBS = (ack, ack_and_commit, nack, hand_back)


@pytest.fixture
def consumer() -> Consumer:
    return ConsumerFactory.create()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_verdict_that_waits_for_a_takeover_changes_nothing(
    consumer: Consumer, verb: Verb, count: int
):
    past = Now() - timedelta(seconds=1)
    tasks = TaskFactory.create_batch(
        count, consumer=consumer, state=TaskState.RUNNING, schedule_at=past
    )
    with transaction.atomic():
        assert len(consumer.claim()) == count
        verdict = begin_elsewhere(lambda: verb([task.lease for task in tasks]))
        wait_until(is_waited_for)
    assert not verdict.result(DEADLINE_SECONDS)
    assert set(Task.objects.values_list("state", "lease_epoch")) == {(TaskState.RUNNING, 2)}


def registered(serialize: str) -> Consumer:
    return Consumer.objects.register(
        "turns", Registration("s", includes=[">"], serialize=serialize)
    )


@pytest.mark.parametrize("verb", [*VERBS, lambda _: registered("on")])
def test_tasks_are_locked_in_the_order_of_verbs(verb: Verb):
    """Who locks the second while waiting for the first would deadlock with who goes by ids."""
    first, second = TaskFactory.create_batch(
        2, consumer=registered(""), state=TaskState.RUNNING, resource_key="a"
    )
    # What an update writes lies behind the other one, where a plan without an order finds it last.
    Task.objects.filter(pk=first.pk).update(cancel_attempt_count=7)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE kanthorq_django_task")
    with transaction.atomic():
        assert Task.objects.select_for_update().get(pk=first.pk)
        waiting = begin_elsewhere(lambda: verb([second.lease, first.lease]))
        wait_until(is_waited_for)
        assert Task.objects.select_for_update(nowait=True).get(pk=second.pk)
    waiting.result(DEADLINE_SECONDS)


def test_a_claim_is_rolled_back_with_the_block_around_it(consumer: Consumer):
    TaskFactory.create(consumer=consumer)
    with transaction.atomic():
        assert len(consumer.claim()) == 1
        transaction.set_rollback(True)
    assert len(consumer.claim()) == 1
