"""Handlers that end their task themselves, and what they return and raise besides."""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import DataError, IntegrityError, connection, transaction

from kanthorq_django import Discard, Snooze
from kanthorq_django.exceptions import LeaseLost
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.sql.session import USES_BEFORE
from kanthorq_django.worker.endings import Ending, Nack
from tests.concurrency import elsewhere
from tests.factories import TaskFactory
from tests.flights import fly
from tests.ledger.models import Entry
from tests.proxy import through_a_proxy

pytestmark = pytest.mark.django_db(transaction=True)


class Unlucky(Exception):
    """What goes wrong in a handler."""


def go_wrong() -> None:
    raise Unlucky


def book(message: Message) -> None:
    Entry.objects.create(event_id=message.event.pk)


@pytest.fixture
def task() -> Task:
    return TaskFactory.create(state=TaskState.RUNNING)


def last_error(task: Task) -> str:
    return str(task.attempted_errors[-1]["error"])


# After an explicit verdict


@pytest.mark.parametrize(
    ("verdict", "state"),
    [
        (lambda message: message.ack("mine"), TaskState.COMPLETED),
        (lambda message: message.nack("mine"), TaskState.RETRYABLE),
    ],
)
@pytest.mark.parametrize("returned", ["ignored", object(), Snooze(timedelta(1))])
@pytest.mark.parametrize("atomic", [False, True])
def test_what_a_handler_returns_after_its_verdict_changes_nothing(
    task: Task, verdict: Callable[[Message], None], state: TaskState, returned: object, atomic: bool
):
    def handle(message: Message) -> object:
        book(message)
        verdict(message)
        return returned

    ending = fly(task, handle, atomic=atomic)
    assert type(ending) is Ending
    task.refresh_from_db()
    assert task.state == state
    assert task.result in ("mine", None)
    assert Entry.objects.exists()


@pytest.mark.parametrize("raised", [Unlucky(), Snooze(timedelta(1)), Discard(), SystemExit()])
@pytest.mark.parametrize(
    ("verdict", "state"),
    [
        (lambda message: message.ack("mine"), TaskState.COMPLETED),
        (lambda message: message.nack("mine"), TaskState.RETRYABLE),
    ],
)
def test_what_a_handler_raises_after_its_verdict_changes_nothing_but_is_logged(
    task: Task,
    raised: BaseException,
    verdict: Callable[[Message], None],
    state: TaskState,
    caplog: pytest.LogCaptureFixture,
):
    def handle(message: Message) -> None:
        verdict(message)
        raise raised

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == state
    (told,) = [each for each in caplog.records if "raised after it was settled" in each.message]
    assert told.levelname == "ERROR", "nothing else would tell of it"


def test_a_coroutine_may_end_its_task_itself(task: Task):
    async def handle(message: Message) -> None:
        await message.aack("by itself")

    fly(task, handle)
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, "by itself")


# Verdicts that were rolled back


def test_a_handler_that_returns_after_its_ack_rolled_back_is_nacked_with_that_reason(task: Task):
    def handle(message: Message) -> None:
        try:
            with transaction.atomic():
                book(message)
                message.ack()
                go_wrong()
        except Unlucky:
            return

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert last_error(task) == ("The transaction in which the message was ended was rolled back.")
    assert not Entry.objects.exists()


def test_a_handler_whose_ack_rolled_back_may_ack_again(task: Task):
    def handle(message: Message) -> None:
        try:
            with transaction.atomic():
                message.ack("first")
                go_wrong()
        except Unlucky:
            message.ack("second")

    assert type(fly(task, handle)) is Ending
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, "second")


def test_a_handler_that_raises_out_of_its_block_is_nacked_with_its_exception(task: Task):
    def handle(message: Message) -> None:
        with transaction.atomic():
            book(message)
            message.ack()
            raise Unlucky("after the ack")

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert last_error(task) == "Unlucky: after the ack"
    assert not Entry.objects.exists()


def ack_in_a_lost_savepoint(message: Message) -> None:
    book(message)
    try:
        with transaction.atomic():
            message.ack()
            go_wrong()
    except Unlucky:
        return


def test_an_ack_lost_with_its_savepoint_is_nacked_though_the_outer_block_commits(task: Task):
    def handle(message: Message) -> None:
        with transaction.atomic():
            ack_in_a_lost_savepoint(message)

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert "rolled back" in last_error(task)
    assert Entry.objects.count() == 1  # the handler's own block, and its own risk


@pytest.mark.parametrize("verdict", [Message.ack, lambda message: message.nack("no")])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_verdict_that_a_savepoint_of_its_own_takes_back_is_none(
    task: Task, verdict: Callable[[Message], None], is_async: bool
):
    def handle(message: Message) -> None:
        with transaction.atomic():
            book(message)
            before = str(connection.savepoint())
            verdict(message)
            connection.savepoint_rollback(before)

    async def handle_async(message: Message) -> None:
        await sync_to_async(handle)(message)

    fly(task, handle_async if is_async else handle)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert last_error(task) == "The transaction in which the message was ended was rolled back."
    assert Entry.objects.count() == 1


def test_a_verdict_lasts_that_was_given_after_a_savepoint(task: Task):
    def handle(message: Message) -> None:
        with transaction.atomic():
            connection.savepoint_rollback(str(connection.savepoint()))
            message.ack("kept")

    assert type(fly(task, handle)) is Ending
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, "kept")


def test_an_atomic_handler_commits_nothing_without_its_ack(task: Task):
    fly(task, ack_in_a_lost_savepoint, atomic=True)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert "rolled back" in last_error(task)
    assert not Entry.objects.exists()


# Atomic handlers


def test_an_atomic_handler_commits_with_its_ack(task: Task):
    seen: list[TaskState] = []

    def handle(message: Message) -> str:
        book(message)
        transaction.on_commit(lambda: seen.append(TaskState(Task.objects.get().state)))
        return "booked"

    assert type(fly(task, handle, atomic=True)) is Ending
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, "booked")
    assert seen == [TaskState.COMPLETED]
    assert Entry.objects.count() == 1


def test_an_atomic_handler_that_raises_leaves_nothing_behind(task: Task):
    def handle(message: Message) -> None:
        book(message)
        raise Unlucky

    fly(task, handle, atomic=True)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert not Entry.objects.exists()


def test_an_atomic_handler_without_its_lease_leaves_nothing_behind(task: Task):
    def handle(message: Message) -> None:
        book(message)
        Task.objects.update(lease_epoch=2)

    ending = fly(task, handle, atomic=True)
    assert isinstance(ending, Nack)
    task.refresh_from_db()
    # The update was the handler's own write, so even that is gone; the nack then was in time.
    assert (task.state, task.lease_epoch) == (TaskState.RETRYABLE, 1)
    assert last_error(task).startswith("LeaseLost")
    assert not Entry.objects.exists()


def test_a_failing_commit_hook_of_an_atomic_handler_does_not_undo_the_ack(task: Task):
    def fail() -> None:
        raise Unlucky

    def handle(message: Message) -> None:
        book(message)
        transaction.on_commit(fail)

    fly(task, handle, atomic=True)
    task.refresh_from_db()
    assert (task.state, task.attempted_errors) == (TaskState.COMPLETED, [])
    assert Entry.objects.count() == 1


def test_an_atomic_handlers_ack_and_commit_are_one_round_trip(task: Task):
    """Between the two a worker that is frozen or cut off would keep its row locked."""
    sent: list[str] = []

    def listen(execute: Any, sql: str, *rest: Any) -> Any:
        sent.append(sql)
        return execute(sql, *rest)

    with connection.execute_wrapper(listen):
        fly(task, book, atomic=True)
    assert [sql for sql in sent if "COMMIT" in sql] == [sent[-1]]
    assert sent[-1].endswith("COMMIT;")
    assert "lease_epoch" in sent[-1]
    task.refresh_from_db()
    assert task.state == TaskState.COMPLETED


def test_they_are_one_round_trip_too_when_the_server_keeps_them():
    with through_a_proxy() as proxy:
        for task in TaskFactory.create_batch(USES_BEFORE + 2, state=TaskState.RUNNING):
            before = proxy.sent_count
            fly(task, book, atomic=True)
        begin, insert, ack_and_commit = 1, 1, 1
        assert proxy.sent_count - before == begin + insert + ack_and_commit
        assert Task.objects.completed().count() == USES_BEFORE + 2


def test_an_atomic_handler_whose_lease_was_taken_over_commits_nothing(task: Task):
    def handle(message: Message) -> None:
        book(message)
        elsewhere(lambda: Task.objects.update(lease_epoch=2))

    assert isinstance(fly(task, handle, atomic=True), Nack)
    task.refresh_from_db()
    assert (task.state, task.lease_epoch) == (TaskState.RUNNING, 2)
    assert not Entry.objects.exists()


def test_an_atomic_handler_that_fails_at_its_commit_leaves_nothing_behind(task: Task):
    with connection.cursor() as cursor:
        cursor.execute(
            "ALTER TABLE ledger_entry ADD CONSTRAINT once UNIQUE (event_id)"
            " DEFERRABLE INITIALLY DEFERRED"
        )
    try:

        def handle(message: Message) -> None:
            book(message)
            book(message)

        fly(task, handle, atomic=True)
        task.refresh_from_db()
        assert task.state == TaskState.RETRYABLE
        assert last_error(task).startswith("IntegrityError")
        assert not Entry.objects.exists()
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE ledger_entry DROP CONSTRAINT once")


def test_an_atomic_handler_that_dooms_its_transaction_leaves_nothing_behind(task: Task):
    def handle(message: Message) -> None:
        book(message)
        transaction.set_rollback(True)

    fly(task, handle, atomic=True)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert "left its transaction marked for rollback" in last_error(task)
    assert not Entry.objects.exists()


def test_an_atomic_handler_that_catches_an_error_of_the_database_is_told_which_and_what_to_do(
    task: Task,
):
    def handle(message: Message) -> None:
        with suppress(IntegrityError):
            for _ in range(2):
                Entry.objects.create(pk=1, event_id=message.event.pk)

    fly(task, handle, atomic=True)
    task.refresh_from_db()
    assert "transaction.atomic() of its own" in last_error(task)
    stack = task.attempted_errors[0]["stack"]
    assert "IntegrityError" in stack
    assert ", in handle" in stack

    other = TaskFactory.create(state=TaskState.RUNNING)
    fly(other, lambda message: transaction.set_rollback(True), atomic=True)
    other.refresh_from_db()
    assert "IntegrityError" not in other.attempted_errors[0]["stack"]  # that was another block


def test_an_atomic_handler_that_swallows_an_error_of_the_database_commits_nothing(task: Task):
    def handle(message: Message) -> None:
        book(message)
        with suppress(DataError), connection.cursor() as cursor:
            cursor.execute("SELECT 1 / 0")

    fly(task, handle, atomic=True)
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert "transaction.atomic() of its own" in last_error(task)
    assert not Entry.objects.exists()


# Stale workers


@pytest.mark.parametrize("ends", [lambda message: "late", lambda message: 1 / 0])
def test_an_implicit_verdict_of_a_lost_lease_changes_nothing(
    task: Task, ends: Callable[[Message], Any]
):
    def handle(message: Message) -> Any:
        Task.objects.update(lease_epoch=2, attempt_count=2)
        return ends(message)

    fly(task, handle)
    task.refresh_from_db()
    assert (task.state, task.lease_epoch, task.attempt_count) == (TaskState.RUNNING, 2, 2)
    assert task.attempted_errors == []
    assert task.result is None


def test_a_handler_that_meets_its_lost_lease_is_logged_as_such(
    task: Task, caplog: pytest.LogCaptureFixture
):
    def handle(message: Message) -> None:
        Task.objects.update(lease_epoch=2)
        message.ack()

    fly(task, handle)
    (told,) = [each for each in caplog.records if "lost its lease" in each.getMessage()]
    assert told.levelname == "WARNING", "what it did is done again"
    task.refresh_from_db()
    assert task.state == TaskState.RUNNING


def test_a_handler_that_swallows_its_lost_lease_does_not_end_the_task(task: Task):
    def handle(message: Message) -> None:
        Task.objects.update(lease_epoch=2)
        with pytest.raises(LeaseLost):
            message.ack()

    fly(task, handle)
    task.refresh_from_db()
    assert task.state == TaskState.RUNNING
