"""Verdicts inside transaction.atomic(): business writes and the end of a task, both or neither."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.db import IntegrityError, connection, transaction
from django.db.transaction import TransactionManagementError

from kanthorq_django.exceptions import (
    AlreadyAcknowledged,
    CrossDatabaseAck,
    InvalidBody,
)
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from tests.concurrency import elsewhere
from tests.ledger.models import Entry
from tests.messages import book, leased, rolled_back_by, state_of

pytestmark = pytest.mark.django_db(transaction=True)


class Unlucky(Exception):
    """What goes wrong in a block."""


def go_wrong() -> None:
    raise Unlucky


@pytest.fixture
def message() -> Message:
    return leased()


def state_elsewhere(message: Message) -> TaskState:
    return elsewhere(lambda: state_of(message))


# Both or neither


def test_ack_commits_with_the_business_write_and_not_before(message: Message):
    with transaction.atomic():
        book(message)
        message.ack({"booked": 1})
        assert not message.is_settled()
        assert state_elsewhere(message) == TaskState.RUNNING
    assert message.is_settled()
    assert state_elsewhere(message) == TaskState.COMPLETED
    assert Entry.objects.count() == 1


def test_nack_commits_with_the_business_write(message: Message):
    with transaction.atomic():
        book(message)
        message.nack("half done", delay=timedelta(hours=1))
    assert message.is_settled()
    assert state_of(message) == TaskState.RETRYABLE
    assert Entry.objects.count() == 1


@pytest.mark.parametrize("first", ["ack", "nack"])
@pytest.mark.parametrize("second", ["ack", "nack"])
def test_a_message_is_as_open_as_before_after_its_block_rolled_back(
    message: Message, first: str, second: str
):
    verdicts = {"ack": message.ack, "nack": lambda: message.nack("no")}

    with rolled_back_by(Unlucky):
        book(message)
        verdicts[first]()
        go_wrong()

    assert message.has_verdict()
    assert not message.is_settled()
    assert state_of(message) == TaskState.RUNNING
    assert not Entry.objects.exists()
    verdicts[second]()
    assert message.is_settled()
    assert state_of(message) in (TaskState.COMPLETED, TaskState.RETRYABLE)


def test_a_block_marked_for_rollback_takes_the_ack_along(message: Message):
    with transaction.atomic():
        message.ack()
        transaction.set_rollback(True)
    assert not message.is_settled()
    assert state_of(message) == TaskState.RUNNING


def test_a_savepoint_that_rolls_back_takes_the_ack_along_though_the_block_commits(message: Message):
    with transaction.atomic():
        book(message)
        with rolled_back_by(Unlucky):
            message.ack()
            assert not message.is_open()
            go_wrong()
        assert message.is_open()
    assert not message.is_settled()
    assert state_of(message) == TaskState.RUNNING
    assert Entry.objects.count() == 1
    message.ack()
    assert state_of(message) == TaskState.COMPLETED


def test_an_ack_repeated_after_its_savepoint_rolled_back_lasts(message: Message):
    with transaction.atomic():
        with rolled_back_by(Unlucky):
            message.ack("lost")
            go_wrong()
        message.ack("kept")
    assert message.is_settled()
    assert Task.objects.get().result == "kept"


def test_an_ack_in_a_savepoint_lasts_once_the_outer_block_commits(message: Message):
    with transaction.atomic():
        with transaction.atomic():
            message.ack()
        assert not message.is_settled()
    assert message.is_settled()


def test_an_ack_in_a_transaction_begun_past_django_is_not_taken_for_lasting(message: Message):
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        message.ack()
        assert not message.is_settled()
        cursor.execute("ROLLBACK")
    assert message.is_open()


def test_a_manual_transaction_covers_the_ack_as_well(message: Message):
    transaction.set_autocommit(False)
    try:
        book(message)
        message.ack()
        assert not message.is_settled()
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)
    assert state_of(message) == TaskState.RUNNING
    assert not Entry.objects.exists()


def test_the_verdicts_inside_one_block_follow_the_same_rules(message: Message):
    with transaction.atomic():
        message.ack("first")
        message.ack("second")
        with pytest.raises(AlreadyAcknowledged):
            message.nack("no")
    assert Task.objects.get().result == "first"


def test_a_refused_result_leaves_the_block_usable(message: Message):
    with transaction.atomic():
        book(message)
        with pytest.raises(InvalidBody):
            message.ack(object())
        message.ack()
    assert state_of(message) == TaskState.COMPLETED
    assert Entry.objects.count() == 1


def test_a_broken_block_refuses_the_ack_as_it_refuses_everything(message: Message):
    entry = book(message)
    with rolled_back_by(TransactionManagementError):
        with pytest.raises(IntegrityError):
            Entry.objects.create(pk=entry.pk, event_id=message.event.pk)
        message.ack()
    assert state_of(message) == TaskState.RUNNING


# The other database


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("verdict", [Message.ack, lambda message: message.nack("no")])
def test_a_block_on_another_database_cannot_cover_the_verdict(
    message: Message, verdict: Callable[[Message], None]
):
    with transaction.atomic(using="other"):
        Entry.objects.using("other").create(event_id=message.event.pk)
        with pytest.raises(CrossDatabaseAck, match=r"'other'.*'default'"):
            verdict(message)
        assert state_elsewhere(message) == TaskState.RUNNING
    assert not message.has_verdict()
    assert Entry.objects.using("other").count() == 1  # the other block stayed usable
    verdict(message)
    assert state_of(message) != TaskState.RUNNING


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_blocks_on_both_databases_let_the_tasks_one_cover_the_ack(message: Message):
    with transaction.atomic(using="other"), transaction.atomic():
        book(message)
        message.ack()
    assert message.is_settled()


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_extend_does_not_mind_a_block_on_another_database(message: Message):
    with transaction.atomic(using="other"):
        message.extend(timedelta(hours=1))


@pytest.mark.django_db
def test_in_a_test_case_the_same_verdict_in_another_block_is_a_no_op(message: Message):
    """Its hooks never run, so no verdict is ever known to last; but no commit is in doubt."""
    for _ in range(2):
        with transaction.atomic():
            message.ack()
    assert Task.objects.get().state == TaskState.COMPLETED


@pytest.mark.django_db(transaction=True)
def test_the_same_verdict_in_another_block_is_a_no_op_once_it_is_known_to_last(message: Message):
    for _ in range(2):
        with transaction.atomic():
            message.ack()
    assert Task.objects.get().state == TaskState.COMPLETED
