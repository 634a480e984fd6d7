"""Verdicts that the database, or somebody's code, refuses."""

import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from threading import Event, Semaphore
from typing import Any
from unittest.mock import Mock

import pytest
from django.db import (
    DatabaseError,
    DataError,
    OperationalError,
    ProgrammingError,
    connection,
    transaction,
)
from django.db.models import F
from django.db.models.functions import Now
from django.dispatch import Signal
from psycopg.errors import NumericValueOutOfRange, UndefinedTable
from pytest_django import Settings

from kanthorq_django import Fixed, Snooze, signals, subscribe
from kanthorq_django.domain.failures import Failure
from kanthorq_django.message import Message
from kanthorq_django.models import Stream, Task, TaskState
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.delivery.lease import Lease
from kanthorq_django.subscribers import sync
from kanthorq_django.testing.commits import committing
from kanthorq_django.worker.acknowledger import Acknowledger
from kanthorq_django.worker.endings import Ack, Ending, Nack
from tests.concurrency import begin_elsewhere, wait_until
from tests.factories import TaskFactory
from tests.flights import settle
from tests.ledger.models import Entry
from tests.receivers import heard_by
from tests.worker.working import (
    PATIENCE,
    accept,
    altered,
    announce,
    forbidden,
    indexed,
    wait_for_state,
    work_off,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)

LATER = Fixed(delay=timedelta(hours=1))


def states() -> Counter[int]:
    return Counter(Task.objects.values_list("state", flat=True))


def test_a_result_that_is_refused_does_not_take_others_with_it():
    @subscribe("work.>", stream="work", consumer="results")
    def handle(message: Message) -> dict[str, int]:
        return {"number": message.event.json()}

    announce(6)
    with forbidden("result ->> 'number' = '3'"):
        assert work_off("results") == 6

    assert states() == {TaskState.COMPLETED: 5, TaskState.DISCARDED: 1}
    refused = Task.objects.discarded().get()
    assert refused.event.json() == 3
    assert "refused to store the result" in refused.attempted_errors[0]["error"]


def test_a_result_that_exceeds_a_limit_of_the_database_does_not_hold_up_others():
    """PostgreSQL's code for it is of the family of those of a server that is away."""

    @subscribe("work.>", stream="work", consumer="results")
    def handle(message: Message) -> dict[str, str]:
        return {"text": secrets.token_hex(20_000 if message.event.json() == 3 else 1)}

    announce(6)
    with indexed("(result ->> 'text')"):
        assert work_off("results") == 6

    assert states() == {TaskState.COMPLETED: 5, TaskState.DISCARDED: 1}
    refused = Task.objects.discarded().get()
    assert "refused to store the result" in refused.attempted_errors[0]["error"]


def test_a_failure_that_is_refused_is_stored_without_its_text():
    @subscribe("work.>", stream="work", consumer="fails", retry=Fixed(timedelta(hours=1)))
    def handle(message: Message) -> None:
        raise ValueError(f"number {message.event.json()}")

    announce(4)
    with forbidden("attempted_errors ->> 0 LIKE '%number 2%'"):
        assert work_off("fails") == 4

    assert states() == {TaskState.RETRYABLE: 4}
    texts = [error["error"] for task in Task.objects.all() for error in task.attempted_errors]
    assert sum("refused to store the failure" in text for text in texts) == 1
    assert sum("ValueError: number" in text for text in texts) == 3


def test_snoozes_of_any_length_are_written_together():
    @subscribe("work.>", stream="work", consumer="snoozes")
    def handle(message: Message) -> None:
        raise Snooze(timedelta(minutes=message.event.json() % 3 + 1))

    announce(9)

    assert work_off("snoozes") == 9
    assert states() == {TaskState.AVAILABLE: 9}
    waits = Task.objects.values_list(F("schedule_at") - F("attempted_at"), flat=True)
    minutes = Counter(round(wait.total_seconds() / 60) for wait in waits)
    assert minutes == {1: 3, 2: 3, 3: 3}


@pytest.mark.parametrize("signal", [signals.acked, signals.nacked])
def test_a_receiver_that_raises_does_not_end_the_acknowledger(signal: Signal):
    def interfere(**_: object) -> None:
        raise ZeroDivisionError

    @subscribe("work.>", stream="work", consumer="watched", retry=Fixed(timedelta(hours=1)))
    def handle(message: Message) -> None:
        if message.event.json() % 2:
            raise ValueError("odd")

    announce(6)
    with heard_by(interfere, signal):
        assert work_off("watched", concurrency=1) == 6
    assert states() == {TaskState.COMPLETED: 3, TaskState.RETRYABLE: 3}


@pytest.mark.parametrize("options", [{}, {"atomic": True}, {"atomic": True, "batch": 3}])
def test_a_receiver_is_told_of_each_ack_once_whoever_wrote_it(options: dict[str, Any]):
    told: list[object] = []

    def note(message: Message, **_: object) -> None:
        told.append(message.event.pk)

    @subscribe("work.>", stream="work", consumer="watched", **options)
    def handle(message: Any) -> None:
        pass

    events = announce(6)
    with heard_by(note, signals.acked):
        assert work_off("watched") == 6
    assert Counter(told) == Counter(event.pk for event in events)


@pytest.mark.parametrize("group_commit", [1, 20])
@pytest.mark.parametrize("options", [{}, {"batch": 3}])
def test_a_receiver_that_fails_takes_no_hook_from_an_atomic_handler(
    settings: Settings, group_commit: int, options: dict[str, Any]
):
    settings.KANTHORQ = {"GROUP_COMMIT": group_commit}
    hooks: list[int] = []

    def interfere(**_: object) -> None:
        Stream.objects.create(name="work")  # of which there is one

    @subscribe("work.>", stream="work", consumer="watched", atomic=True, **options)
    def handle(message: Any) -> None:
        transaction.on_commit(lambda: hooks.append(1))

    announce(3)
    with heard_by(interfere, signals.acked):
        work_off("watched", concurrency=1)
    assert states() == {TaskState.COMPLETED: 3}
    assert len(hooks) == (1 if options else 3)


def test_a_receiver_is_told_of_an_ack_though_a_hook_fails():
    told: list[object] = []

    def note(message: Message, **_: object) -> None:
        told.append(message.event.pk)

    @subscribe("work.>", stream="work", consumer="watched", atomic=True)
    def handle(message: Message) -> None:
        transaction.on_commit(lambda: 1 / 0)

    (event,) = announce()
    with heard_by(note, signals.acked):
        work_off("watched")
    assert told == [event.pk]


def test_nobody_is_told_of_the_verdict_on_a_lease_that_the_worker_has_been_given_anew(
    caplog: pytest.LogCaptureFixture,
):
    told: list[int] = []

    def note(message: Message, **_: object) -> None:
        told.append(message.lease_epoch)

    accept("kit")
    announce()
    (consumer,) = sync(["kit"])
    (first,) = consumer.pull()
    Task.objects.update(schedule_at=Now())
    (second,) = consumer.claim()
    with heard_by(note, signals.acked), caplog.at_level("INFO", "kanthorq_django.worker"):
        settle(Ack(Message(first), None), Ack(Message(second), None))
    assert told == [2]
    (record,) = [each for each in caplog.records if "was over" in each.message]
    assert record.message == (
        f"kit work.due: lease 1 of task {first.pk} for event {first.event_id} was over before its "
        "verdict; nothing was written."
    )
    assert record.__dict__["consumer"] == "kit"


def test_what_a_handler_has_ended_itself_waits_for_no_thread():
    """To wake one for each would cost a seventh of what gets done with atomic=True."""
    gone: list[Lease] = []
    never_started = Acknowledger("default", written=gone.extend)
    messages = [Message(task) for task in TaskFactory.create_batch(2)]

    never_started.accept([Ending(message) for message in messages])

    assert gone == [message.lease for message in messages]
    assert never_started._endings.empty()


def in_a_block(message: Message) -> None:
    with transaction.atomic():
        Entry.objects.create(event_id=message.event.pk)
        message.ack()


def in_a_block_of_its_own(message: Message) -> None:
    with transaction.atomic():
        Entry.objects.create(event_id=message.event.pk)
        with transaction.atomic():
            message.ack()


def ack(message: Message) -> None:
    message.ack()


def nack(message: Message) -> None:
    message.nack("it failed")


@pytest.mark.parametrize(
    ("verdict", "refused"),
    [
        (in_a_block, "state = 101"),
        (in_a_block_of_its_own, "state = 101"),
        (ack, "state = 101"),
        (nack, 'state = 102 AND attempted_errors @> \'[{"error": "it failed"}]\''),
    ],
)
@pytest.mark.parametrize("atomic", [False, True])
def test_a_verdict_that_the_database_refused_is_no_ack_though_the_handler_goes_on(
    verdict: Callable[[Message], None], refused: str, atomic: bool
):
    @subscribe("work.>", stream="work", consumer="swallows", atomic=atomic, retry=LATER)
    def handle(message: Message) -> None:
        with suppress(DatabaseError), transaction.atomic() if atomic else nullcontext():
            verdict(message)

    announce(1)
    with forbidden(refused):
        work_off("swallows")
    (failure,) = Task.objects.get(state=TaskState.RETRYABLE).attempted_errors
    assert "guard" in failure["error"], "that it was rolled back would not tell why"
    assert not Entry.objects.exists()


def fail_unnoticed(message: Message) -> None:
    with suppress(DatabaseError), connection.cursor() as cursor:
        cursor.execute("SELECT 1 / 0")


def roll_back_to_a_savepoint(message: Message) -> None:
    with connection.cursor() as cursor:
        cursor.execute("ROLLBACK TO SAVEPOINT own")


@pytest.mark.parametrize("undo", [fail_unnoticed, roll_back_to_a_savepoint])
@pytest.mark.parametrize("end", [Message.ack, lambda message: message.nack("no")])
def test_a_verdict_that_a_commit_did_not_keep_is_told_as_rolled_back(
    undo: Callable[[Message], None], end: Callable[[Message], None]
):
    @subscribe("work.>", stream="work", consumer="unlucky", retry=LATER)
    def handle(message: Message) -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SAVEPOINT own")
            end(message)
            undo(message)

    announce(1)
    work_off("unlucky")
    (failure,) = Task.objects.get(state=TaskState.RETRYABLE).attempted_errors
    assert "was rolled back" in failure["error"]


def test_a_verdict_in_a_block_that_is_left_open_is_told_as_rolled_back():
    @subscribe("work.>", stream="work", consumer="leaks", retry=LATER)
    def handle(message: Message) -> None:
        transaction.atomic().__enter__()
        message.ack()

    announce(1)
    work_off("leaks")
    (failure,) = Task.objects.get(state=TaskState.RETRYABLE).attempted_errors
    assert "was rolled back" in failure["error"]


@pytest.mark.parametrize("result", [None, 7])
def test_a_task_that_may_not_be_ended_for_a_moment_is_tried_again(result: int | None):
    """As where rights are given anew: the result is not what is refused."""

    @subscribe("work.>", stream="work", consumer="done", retry=LATER)
    def handle(message: Message) -> int | None:
        return result

    announce(1)
    with refused_by_a_trigger("insufficient_privilege"):
        work_off("done")
    (failure,) = Task.objects.get(state=TaskState.RETRYABLE).attempted_errors
    assert "refused to end the task" in failure["error"]


def refused_by_a_trigger(condition: str) -> AbstractContextManager[None]:
    """Let PostgreSQL refuse for ``condition`` that tasks are completed while the block runs."""
    return altered(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE {condition}; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON kanthorq_django_task
            FOR EACH ROW WHEN (NEW.state = 101) EXECUTE FUNCTION refuse()
        """,
        "DROP TRIGGER refuse ON kanthorq_django_task; DROP FUNCTION refuse",
    )


def test_a_verdict_is_written_where_a_table_came_back_before_anybody_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    written, refused = lease.ack, False

    def ack(results: dict[Lease, str | None], *given: Any, **options: Any) -> set[int]:
        nonlocal refused
        if results and not refused:
            refused = True
            raise ProgrammingError("relation does not exist") from UndefinedTable()
        return written(results, *given, **options)

    monkeypatch.setattr(lease, "ack", ack)
    accept("done", retry=LATER)
    announce()
    with working("done"):
        wait_for_state(TaskState.COMPLETED)
    assert refused
    assert "could not be written" not in caplog.text


def test_verdicts_wait_for_a_table_that_is_missing_for_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As for a right or a schema: it says nothing about them, and their handlers have succeeded."""
    refused: list[ProgrammingError] = []
    written = lease.ack

    def ack(*given: Any, **options: Any) -> set[int]:
        try:
            return written(*given, **options)
        except ProgrammingError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(lease, "ack", ack)
    is_inside, gate = Semaphore(0), Event()

    @subscribe("work.>", stream="work", consumer="done", retry=LATER)
    def handle(message: Message) -> None:
        is_inside.release()
        gate.wait(PATIENCE)

    announce(4)
    alter = "ALTER TABLE kanthorq_django_task"
    with working("done", concurrency=4):
        for _ in range(4):
            assert is_inside.acquire(timeout=PATIENCE)
        with altered(f"{alter} RENAME TO away", "ALTER TABLE away RENAME TO kanthorq_django_task"):
            gate.set()
            wait_until(lambda: len(refused) > 3, PATIENCE)
        wait_for_state(TaskState.COMPLETED, 4)
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}
    assert "could not be written" not in caplog.text
    assert caplog.text.count("acknowledger interrupted") == 1


def test_a_verdict_that_a_test_can_never_write_is_raised_in_its_drain():
    message = Message(TaskFactory.create(state=TaskState.RUNNING))
    acknowledger = Acknowledger("default", written=lambda leases: None, is_patient=False)
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("ALTER TABLE kanthorq_django_task RENAME TO away")
        with committing(), pytest.raises(ProgrammingError, match="kanthorq_django_task"):
            acknowledger.write([Ack(message, None)])
        transaction.set_rollback(True)
    assert states() == {TaskState.RUNNING: 1}


def test_what_was_written_is_not_written_again_where_only_the_rest_is_in_doubt(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tasks = [TaskFactory.create(state=TaskState.RUNNING) for _ in range(2)]
    messages = [Message(task) for task in tasks]
    messages[1].ack()
    monkeypatch.setattr(lease, "last_states", Mock(side_effect=[OperationalError("gone"), {}]))
    nacks: list[Ending] = [Nack(message, Failure("no"), timedelta(hours=1)) for message in messages]
    Acknowledger("default", written=lambda leases: None).write(nacks)
    assert states() == {TaskState.RETRYABLE: 1, TaskState.COMPLETED: 1}
    lost = [each.task_id for each in caplog.records if "was over" in each.message]  # type: ignore[attr-defined]
    assert lost == [tasks[1].pk]


def test_an_ack_whose_answer_was_lost_is_told_once_and_not_taken_for_late(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    message = Message(TaskFactory.create(state=TaskState.RUNNING))
    told = Mock()
    written, answers = lease.ack, iter([OperationalError("server closed the connection"), None])

    def ack(*given: Any, **options: Any) -> set[int]:
        settled = written(*given, **options)
        if error := next(answers):
            raise error
        return settled

    monkeypatch.setattr(lease, "ack", ack)
    with heard_by(told, signals.acked):
        Acknowledger("default", written=lambda leases: None).write([Ack(message, None)])
    assert states() == {TaskState.COMPLETED: 1}
    assert told.call_count == 1
    assert "was over" not in caplog.text


def test_an_ack_outside_of_a_block_that_got_no_answer_is_said_once_more_by_the_return(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    written = lease.ack

    def ack(results: Any, using: str, **options: Any) -> set[int]:
        settled = written(results, using, **options)
        if not options:  # the handler's own
            raise OperationalError("server closed the connection")
        return settled

    monkeypatch.setattr(lease, "ack", ack)

    @subscribe("work.>", stream="work", consumer="acks")
    def handle(message: Message) -> None:
        with suppress(OperationalError):
            message.ack()

    announce(1)
    work_off("acks")
    assert states() == {TaskState.COMPLETED: 1}
    assert [each.message for each in caplog.records if each.levelno > logging.INFO][1:] == []


def test_a_conflict_that_is_not_about_the_result_has_a_task_tried_again():
    @subscribe("work.>", stream="work", consumer="done", retry=LATER)
    def handle(message: Message) -> int:
        return 7

    announce(1)
    with refused_by_a_trigger("unique_violation"):
        work_off("done")
    assert states() == {TaskState.RETRYABLE: 1}


def test_the_databases_own_reason_is_kept_with_an_atomic_handler():
    @subscribe("work.>", stream="work", consumer="atomic", atomic=True, retry=LATER)
    def handle(message: Message) -> None:
        with suppress(DatabaseError), transaction.atomic():
            message.ack()

    announce(1)
    with forbidden("state = 101"):
        work_off("atomic")
    (failure,) = Task.objects.get(state=TaskState.RETRYABLE).attempted_errors
    assert "guard" in failure["error"]


def test_an_ack_of_which_nobody_can_tell_what_became_is_not_told_as_a_failure(
    monkeypatch: pytest.MonkeyPatch,
):
    """Its task was merely locked; as it is, the lease runs out."""
    message = Message(TaskFactory.create(state=TaskState.RUNNING))
    is_locked, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic():
            Task.objects.select_for_update().get()
            is_locked.set()
            may_end.wait(PATIENCE)

    def refuse(*_: object) -> None:
        may_end.set()
        holding.result(PATIENCE)
        raise DataError("out of range") from NumericValueOutOfRange()

    holding = begin_elsewhere(hold)
    assert is_locked.wait(PATIENCE)
    monkeypatch.setattr(lease, "last_states", refuse)
    Acknowledger("default", written=lambda leases: None).write([Ack(message, None)])
    assert states() == {TaskState.RUNNING: 1}
