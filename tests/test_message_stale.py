"""A worker whose lease was taken over commits nothing, however hard it tries."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction
from django.db.models.functions import Now
from django.db.transaction import TransactionManagementError

from kanthorq_django.exceptions import (
    LeaseLost,
)
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.models.delivery import lease
from tests.concurrency import elsewhere
from tests.factories import TaskFactory
from tests.ledger.models import Entry
from tests.messages import book, leased, rolled_back_by, state_of

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def message() -> Message:
    return leased()


def take_over(message: Message) -> Message:
    """Let the lease run out and another connection claim the task; return its message."""

    def claim() -> Message:
        Task.objects.filter(pk=message.task.pk).update(schedule_at=Now() - timedelta(seconds=1))
        (task,) = message.task.consumer.claim()
        return Message(task)

    return elsewhere(claim)


# Stale workers


def test_a_stale_worker_cannot_commit_its_business_writes(message: Message):
    with rolled_back_by(LeaseLost):
        book(message)
        successor = take_over(message)
        message.ack()
    assert not Entry.objects.exists()

    with transaction.atomic():
        book(successor)
        successor.ack()
    assert Entry.objects.count() == 1
    assert state_of(message) == TaskState.COMPLETED


def test_a_stale_worker_cannot_commit_after_its_successor_finished(message: Message):
    def finish() -> None:
        with transaction.atomic():
            book(successor)
            successor.ack()

    with rolled_back_by(LeaseLost):
        book(message)
        successor = take_over(message)
        elsewhere(finish)
        message.ack()
    assert Entry.objects.count() == 1


def test_a_stale_worker_cannot_commit_even_if_it_swallows_the_error(message: Message):
    with transaction.atomic():
        book(message)
        take_over(message)
        with pytest.raises(LeaseLost):
            message.ack()
        with pytest.raises(TransactionManagementError):
            book(message)
    assert not Entry.objects.exists()


@pytest.mark.parametrize("has_savepoint", [False, True])
def test_not_even_in_a_block_within_the_block(message: Message, has_savepoint: bool):
    with transaction.atomic():
        book(message)
        take_over(message)
        with transaction.atomic(savepoint=has_savepoint), pytest.raises(LeaseLost):
            message.ack()
        with pytest.raises(TransactionManagementError):
            book(message)
    assert not Entry.objects.exists()


def test_nor_by_swallowing_it_between_two_blocks(message: Message):
    with transaction.atomic():
        book(message)
        take_over(message)
        with transaction.atomic(), contextlib.suppress(LeaseLost), transaction.atomic():
            message.ack()
    assert not Entry.objects.exists()


def test_a_stale_nack_rolls_back_as_well(message: Message):
    with rolled_back_by(LeaseLost):
        book(message)
        take_over(message)
        message.nack("half done")
    assert not Entry.objects.exists()


def test_a_lost_lease_met_in_a_test_case_leaves_the_test_its_transaction():
    task = TaskFactory.create(state=TaskState.RUNNING)
    block: Any = transaction.atomic()
    block._from_testcase = True  # as TestCase marks the one around each test
    with block:
        Task.objects.update(lease_epoch=2)
        with pytest.raises(LeaseLost):
            Message(task).ack()
        assert Task.objects.get().lease_epoch == 2


@pytest.fixture(params=["REPEATABLE READ", "SERIALIZABLE"])
def strict(request: pytest.FixtureRequest) -> Iterator[None]:
    """Transactions that see one snapshot from their first statement on."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET default_transaction_isolation = '{request.param.lower()}'")
    yield
    with connection.cursor() as cursor:
        cursor.execute("RESET default_transaction_isolation")


@pytest.mark.usefixtures("strict")
def test_under_strict_isolation_a_stale_worker_cannot_commit_either(message: Message):
    with rolled_back_by(OperationalError, "could not serialize"):
        book(message)
        take_over(message)
        message.ack()
    assert not Entry.objects.exists()
    with pytest.raises(LeaseLost):
        message.ack()


@pytest.mark.usefixtures("strict")
def test_under_strict_isolation_a_renewal_meanwhile_makes_the_block_be_repeated(message: Message):
    renew = {message.lease: timedelta(hours=1)}
    with rolled_back_by(OperationalError, "could not serialize"):
        book(message)
        elsewhere(lambda: lease.renew(renew, "default"))
        message.ack()
    with transaction.atomic():
        book(message)
        message.ack()
    assert Entry.objects.count() == 1
    assert message.is_settled()


@pytest.mark.usefixtures("strict")
def test_under_strict_isolation_an_undisturbed_block_commits(message: Message):
    with transaction.atomic():
        book(message)
        message.ack()
    assert state_of(message) == TaskState.COMPLETED
