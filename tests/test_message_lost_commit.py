"""A COMMIT whose reply is lost on the wire: nobody knows what happened, but the row does."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
from django.db import OperationalError, transaction

from kanthorq_django import Fixed, signals
from kanthorq_django.exceptions import AlreadyAcknowledged
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.worker.endings import Ack, Nack
from tests.factories import TaskFactory
from tests.flights import board, run, settle
from tests.ledger.models import Entry
from tests.proxy import Proxy, through_a_proxy
from tests.receivers import heard_by

pytestmark = pytest.mark.django_db(transaction=True)

AT_ONCE = Fixed(delay=timedelta(0))


def write_with_ack(message: Message) -> None:
    with transaction.atomic():
        Entry.objects.create(event_id=message.event.pk)
        message.ack()


def write(message: Message) -> None:
    Entry.objects.create(event_id=message.event.pk)


def write_and_go_on(message: Message) -> None:
    """What a careless handler does about errors."""
    try:
        write_with_ack(message)
    except OperationalError:
        return


TRANSACTIONAL = [(write_with_ack, {}), (write, {"atomic": True}), (write_and_go_on, {})]


@pytest.fixture
def task() -> Task:
    return TaskFactory.create(state=TaskState.RUNNING)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with through_a_proxy() as proxy:
        yield proxy


@pytest.mark.parametrize(("handler", "options"), TRANSACTIONAL)
def test_a_commit_that_happened_is_not_nacked_though_its_reply_was_lost(
    task: Task, proxy: Proxy, handler: Callable[[Message], None], options: dict[str, Any]
):
    flight = board(task, handler, retry=AT_ONCE, **options)
    lost = proxy.lose_reply_to("COMMIT")

    ending = run(flight)

    assert lost.is_set()
    assert isinstance(ending, Nack)  # as far as the handler's side can tell
    assert not flight.message.is_settled()
    settle(ending)
    task.refresh_from_db()
    assert (task.state, task.attempted_errors) == (TaskState.COMPLETED, [])
    assert task.consumer.claim() == []
    assert Entry.objects.count() == 1


@pytest.mark.parametrize(("handler", "options"), TRANSACTIONAL)
def test_a_commit_that_never_arrived_is_nacked_and_done_once_by_the_next_attempt(
    task: Task, proxy: Proxy, handler: Callable[[Message], None], options: dict[str, Any]
):
    lost = proxy.lose("COMMIT")

    settle(run(board(task, handler, retry=AT_ONCE, **options)))

    assert lost.is_set()
    assert not Entry.objects.exists()
    (again,) = task.consumer.claim()
    assert again.attempt_count == 2
    assert len(again.attempted_errors) == 1
    settle(run(board(again, handler, retry=AT_ONCE, **options)))
    task.refresh_from_db()
    assert task.state == TaskState.COMPLETED
    assert Entry.objects.count() == 1


def test_an_explicit_ack_whose_reply_was_lost_is_not_nacked(task: Task, proxy: Proxy):
    flight = board(task, Message.ack)
    lost = proxy.lose_reply_to("UPDATE kanthorq_django_task")

    ending = run(flight)

    assert lost.is_set()
    assert isinstance(ending, Nack)
    settle(ending)
    task.refresh_from_db()
    assert (task.state, task.attempted_errors) == (TaskState.COMPLETED, [])


def test_an_implicit_ack_is_written_again_until_it_is_answered(task: Task, proxy: Proxy):
    ending = run(board(task, lambda message: "done"))
    assert isinstance(ending, Ack)
    lost = proxy.lose("UPDATE kanthorq_django_task")
    lost_again = proxy.lose_reply_to("UPDATE kanthorq_django_task")

    settle(ending)

    assert lost.is_set()
    assert lost_again.is_set()
    task.refresh_from_db()
    assert (task.state, task.result) == (TaskState.COMPLETED, "done")


def test_an_implicit_nack_whose_reply_was_lost_counts_once(task: Task, proxy: Proxy):
    ending = run(board(task, lambda message: 1 / 0))
    lost = proxy.lose_reply_to("UPDATE kanthorq_django_task")

    settle(ending)

    assert lost.is_set()
    task.refresh_from_db()
    assert task.state == TaskState.RETRYABLE
    assert len(task.attempted_errors) == 1


def test_an_implicit_nack_whose_reply_was_lost_is_told_of_once_and_as_written(
    task: Task, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    told: list[str] = []
    ending = run(board(task, lambda message: 1 / 0))
    lost = proxy.lose_reply_to("UPDATE kanthorq_django_task")

    def hear(*, reason: str, **_: Any) -> None:
        told.append(reason)

    with heard_by(hear, signals.nacked):
        settle(ending)

    assert lost.is_set()
    assert told == ["ZeroDivisionError: division by zero"]
    assert "nothing was written" not in caplog.text


@pytest.mark.parametrize("verdict", [Message.ack, lambda message: message.nack("no")])
def test_what_is_tried_again_after_a_commit_without_an_answer_is_not_committed_twice(
    task: Task, proxy: Proxy, verdict: Callable[[Message], None]
):
    """Not even by a handler that swallows the error which says so."""
    message = Message(task)
    lost = proxy.lose_reply_to("COMMIT")

    @transaction.atomic
    def write_and_end() -> None:
        write(message)
        verdict(message)

    with pytest.raises(OperationalError):
        write_and_end()
    assert lost.is_set()

    with pytest.raises(AlreadyAcknowledged, match="earlier block"):
        write_and_end()
    with transaction.atomic():
        write(message)
        with pytest.raises(AlreadyAcknowledged, match="earlier block"):
            verdict(message)

    assert Entry.objects.count() == 1
    verdict(message)  # outside of a block nothing could be applied twice


@pytest.mark.parametrize("verdict", [Message.ack, lambda message: message.nack("no")])
def test_the_same_verdict_again_in_the_same_transaction_is_no_other_block(
    task: Task, verdict: Callable[[Message], None]
):
    message = Message(task)
    with transaction.atomic():
        for _ in range(2):
            with transaction.atomic():
                write(message)
                verdict(message)
    assert Entry.objects.count() == 2


@pytest.mark.parametrize(
    ("verdict", "is_in_block", "stands"),
    [
        (Message.ack, False, False),  # the return of the handler says the same once more
        (Message.ack, True, True),
        (lambda message: message.nack("no"), False, True),
        (lambda message: message.nack("no"), True, True),
    ],
)
def test_a_handler_that_goes_on_after_a_lost_connection_has_spoken_but_for_a_lone_ack(
    task: Task,
    proxy: Proxy,
    verdict: Callable[[Message], None],
    *,
    is_in_block: bool,
    stands: bool,
):
    message = Message(task)
    lost = proxy.lose("UPDATE kanthorq_django_task")
    block = transaction.atomic() if is_in_block else nullcontext()
    with pytest.raises(OperationalError), block:
        verdict(message)
    assert lost.is_set()
    assert message.has_verdict() is stands
    assert isinstance(message.refusal, OperationalError) is stands


def test_a_commit_is_no_failure_where_nobody_can_tell_whether_it_lasts(
    task: Task, monkeypatch: pytest.MonkeyPatch
):
    message = Message(task)
    monkeypatch.setattr(lease, "last_states", Mock(side_effect=OperationalError("gone")))
    write_with_ack(message)
    assert not message.is_settled()
    task.refresh_from_db()
    assert task.state == TaskState.COMPLETED
