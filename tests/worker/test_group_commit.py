"""Several tasks of one atomic subscriber in one transaction."""

import functools
import gc
import math
import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from django.db import OperationalError, connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.functions import Now

from kanthorq_django import Fixed, Retry, signals, subscribe
from kanthorq_django.domain.states import TaskState
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Task
from kanthorq_django.subscribers import sync
from kanthorq_django.worker import group_commit
from kanthorq_django.worker.connections import upkeep
from kanthorq_django.worker.lanes import thread_lane
from kanthorq_django.worker.loop import WorkerLoop
from tests.concurrency import elsewhere, wait_until
from tests.ledger.models import Entry
from tests.receivers import heard_by
from tests.worker.working import PATIENCE, announce, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)

AT_ONCE = Fixed(delay=timedelta(0))
MANY = 60  # tasks, after which a worker has learnt to fetch more than it can start at once


@pytest.fixture(autouse=True)
def grouped(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.KANTHORQ = {"GROUP_COMMIT": 20}
    monkeypatch.setattr(group_commit, "SHARED_SECONDS", PATIENCE)
    monkeypatch.setattr(group_commit, "_careful_until", {})


def transaction_ids() -> Counter[int]:
    """Return how many entries each transaction wrote; savepoints have ids of their own."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT note::bigint FROM ledger_entry")
        return Counter(row[0] for row in cursor.fetchall())


def write(message: Message) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id()::text")
        Entry.objects.create(event_id=message.event.pk, note=cursor.fetchone()[0])


def test_tasks_of_a_backlog_share_transactions_and_each_effect_is_there_once():
    subscribe("work.>", stream="work", consumer="grouped", atomic=True)(write)
    events = announce(200)

    assert work_off("grouped", concurrency=2, batch_size=200) == 200
    assert sorted(Entry.objects.values_list("event_id", flat=True)) == sorted(e.pk for e in events)
    assert Task.objects.completed().count() == 200
    assert 1 < max(transaction_ids().values()) <= 20  # how many depends on the pace


def test_the_ack_of_all_and_the_commit_are_one_round_trip():
    """Between the two a worker that is frozen or cut off would keep all their rows locked."""
    sent: list[str] = []

    def listen(execute: Any, sql: str, *rest: Any) -> Any:
        sent.append(sql)
        return execute(sql, *rest)

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def handle(message: Message) -> None:
        if listen not in connection.execute_wrappers:
            connection.execute_wrappers.append(listen)
        write(message)

    announce(MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    commits = [sql for sql in sent if sql.endswith("COMMIT;")]
    assert len(commits) == len(transaction_ids()) < MANY
    assert all("lease_epoch" in sql for sql in commits)
    assert Task.objects.completed().count() == MANY


def test_receivers_are_told_of_each_task_that_a_transaction_ended():
    told: list[Any] = []

    def note(message: Message, **_: Any) -> None:
        assert not connection.in_atomic_block
        told.append(message.event.json())

    subscribe("work.>", stream="work", consumer="grouped", atomic=True)(write)
    announce(MANY)
    with heard_by(note, signals.acked):
        work_off("grouped", concurrency=1, batch_size=MANY)
    assert max(transaction_ids().values()) > 1
    assert sorted(told) == list(range(MANY))


def test_tasks_of_other_consumers_have_no_part_in_a_transaction():
    parts = defaultdict[str, list[str]](list)

    def noting(consumer: str) -> Callable[[Message], None]:
        def handle(message: Message) -> None:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_current_xact_id()::text")
                parts[cursor.fetchone()[0]].append(consumer)

        return handle

    consumers = {"grouped": True, "another": True, "plain": False}
    for consumer, atomic in consumers.items():
        subscribe("work.>", stream="work", consumer=consumer, atomic=atomic)(noting(consumer))
    announce(MANY)
    work_off(*consumers, concurrency=1, batch_size=7)
    assert Task.objects.completed().count() == 3 * MANY
    assert {len(set(each)) for each in parts.values()} == {1}
    assert max(map(len, parts.values())) > 1, "none was shared at all"


def test_cleanups_share_no_transaction():
    undone: list[Any] = []

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def handle(message: Message) -> None:
        """Never run: all is cancelled before."""

    @handle.on_cancel()
    def undo(message: Message) -> None:
        undone.append(message.event.json())
        write(message)

    sync(["grouped"])
    announce(MANY)
    Consumer.objects.get(name="grouped").pull(MANY)
    Task.objects.update(state=TaskState.AVAILABLE, schedule_at=Now())
    Task.objects.all().cancel()

    work_off("grouped", concurrency=1, batch_size=MANY)
    assert sorted(undone) == list(range(MANY))
    assert Task.objects.filter(state=TaskState.CANCELLED).count() == MANY
    assert set(transaction_ids().values()) == {1}


def test_a_transaction_that_lasts_is_shared_no_further(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group_commit, "SHARED_SECONDS", 0)
    subscribe("work.>", stream="work", consumer="grouped", atomic=True)(write)
    announce(100)

    assert work_off("grouped", concurrency=2, batch_size=100) == 100
    assert Task.objects.completed().count() == 100
    assert max(transaction_ids().values()) == 1


def test_the_first_that_fails_has_the_others_run_again_and_later_ones_undo_only_themselves():
    calls: Counter[int] = Counter()

    @subscribe(
        "work.>", stream="work", consumer="grouped", atomic=True, retry=AT_ONCE, attempt_max=2
    )
    def handle(message: Message) -> None:
        calls[message.event.json()] += 1
        write(message)
        if message.event.json() % 10 == 3:
            raise ValueError("after its write")

    announce(100)
    work_off("grouped", concurrency=1, batch_size=100)
    assert Task.objects.completed().count() == Entry.objects.count() == 90
    assert Task.objects.discarded().count() == 10
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1, 2}
    again = {number for number, count in calls.items() if count == 2 and number % 10 != 3}
    assert len(again) < 20
    assert sum(calls.values()) == 90 + 10 * 2 + len(again) + 1


def test_an_error_behind_a_shared_transaction_leaves_none_of_its_tasks_leased(
    monkeypatch: pytest.MonkeyPatch,
):
    """Their leases would be renewed for as long as the worker lives."""
    sharing: Counter[int] = Counter()  # by transaction
    interruptions: list[BaseException] = []

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def handle(message: Message) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()::text::bigint")
            sharing.update(cursor.fetchone())
        if 3 in sharing.values() and not interruptions:
            interruptions.append(SystemExit("set upon the thread"))
            monkeypatch.setattr(thread_lane, "leave_connections", interrupted)
            raise ValueError("takes the transaction back")

    def interrupted() -> None:
        monkeypatch.setattr(thread_lane, "leave_connections", upkeep.leave_connections)
        raise interruptions[0]

    announce(MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    assert not Task.objects.running().exists()
    assert Task.objects.retryable().count() == 3
    assert Task.objects.completed().count() == MANY - 3


@pytest.mark.parametrize("failing", [5, 25])  # without savepoints, and with them
def test_a_handler_that_wants_a_rollback_has_only_its_own(failing: int):
    @subscribe("work.>", stream="work", consumer="grouped", atomic=True, attempt_max=1)
    def handle(message: Message) -> None:
        write(message)
        if message.event.json() in {failing, 4 if failing == 25 else -1}:
            transaction.set_rollback(True)

    announce(50)
    work_off("grouped", concurrency=1, batch_size=50)
    failed = {4, 25} if failing == 25 else {5}
    assert {task.event.json() for task in Task.objects.discarded()} == failed
    assert Entry.objects.count() == Task.objects.completed().count() == 50 - len(failed)


@pytest.mark.parametrize("step", ["savepoint_commit", "savepoint_rollback"])
def test_what_comes_in_the_way_of_a_savepoints_end_leaves_no_write_of_a_task_that_failed(
    step: str, monkeypatch: pytest.MonkeyPatch
):
    """Such as an exception that somebody sets on this thread, for a handler that took too long."""
    group_commit._careful_until["grouped"] = math.inf
    ending: list[int] = []  # the handler whose savepoint is about to end
    interrupted: list[int] = []
    end = getattr(BaseDatabaseWrapper, step)

    def interrupt(wrapper: BaseDatabaseWrapper, sid: str) -> None:
        is_due = ending == [5] and not interrupted
        if step == "savepoint_commit" or not is_due:
            end(wrapper, sid)
        if is_due:
            interrupted.extend(ending)
            raise SystemExit("set upon the thread")

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True, retry=AT_ONCE)
    def handle(message: Message) -> None:
        write(message)
        ending[:] = [message.event.json()]
        if ending == [5] and step == "savepoint_rollback" and not interrupted:
            raise ValueError("after its write")

    monkeypatch.setattr(BaseDatabaseWrapper, step, interrupt)
    announce(MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    assert interrupted
    assert Task.objects.completed().count() == Entry.objects.count() == MANY


class Unlucky(Exception):  # builtin ones take no weak reference
    pass


def test_an_error_of_a_handler_needs_no_garbage_collector(caplog: pytest.LogCaptureFixture):
    """A worker runs it seldom, and the error's traceback leads to all messages of its group."""
    caplog.set_level("CRITICAL", "kanthorq_django.worker")  # what is captured keeps its errors
    group_commit._careful_until["grouped"] = math.inf
    errors: list[weakref.ref[Exception]] = []

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True, attempt_max=1)
    def handle(message: Message) -> None:
        error = Unlucky("whatever it does")
        errors.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error  # or it and this frame would hold each other

    announce(MANY)
    gc.disable()
    try:
        work_off("grouped", concurrency=1, batch_size=MANY)
        assert [error() for error in errors] == [None] * MANY
    finally:
        gc.enable()


def test_a_statement_that_fails_undoes_only_its_own_task():
    @subscribe("work.>", stream="work", consumer="grouped", atomic=True, attempt_max=1)
    def handle(message: Message) -> None:
        write(message)
        if message.event.json() == 5:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1/0")

    announce(50)
    work_off("grouped", concurrency=1, batch_size=50)
    assert Entry.objects.count() == Task.objects.completed().count() == 49


def take_over(pk: int) -> None:
    """Let the lease of a task run out, and another worker claim it."""

    def claim() -> None:
        Task.objects.filter(pk=pk).update(schedule_at=Now() - timedelta(seconds=1))
        Consumer.objects.get(name="grouped").claim(1)

    elsewhere(claim)


@pytest.mark.parametrize("are_savepoints_used", [False, True])
@pytest.mark.parametrize("is_explicit", [False, True])
def test_a_lost_lease_takes_the_transaction_back_and_the_others_run_alone(
    are_savepoints_used: bool, is_explicit: bool
):
    group_commit._careful_until["grouped"] = math.inf if are_savepoints_used else 0
    lost: list[int] = []

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def handle(message: Message) -> None:
        write(message)
        if message.event.json() == 7 and not lost:
            lost.append(message.task.pk)
            take_over(message.task.pk)
        if is_explicit:
            message.ack()

    announce(50)
    work_off("grouped", concurrency=1, batch_size=50)
    assert Task.objects.completed().count() == Entry.objects.count() == 49
    assert Task.objects.running().get().pk == lost[0]
    assert not Task.objects.completed().exclude(attempt_count=1).exists(), "others had to fail"
    entries = Entry.objects.values_list("event_id", flat=True)
    assert len(set(entries)) == len(entries)


def test_what_fails_with_the_commit_is_run_again_on_its_own():
    """A deferred constraint speaks up only at the commit of the whole."""
    with connection.cursor() as cursor:
        cursor.execute(
            "ALTER TABLE ledger_entry ADD CONSTRAINT once UNIQUE (event_id)"
            " DEFERRABLE INITIALLY DEFERRED"
        )
    try:

        @subscribe("work.>", stream="work", consumer="grouped", atomic=True, attempt_max=1)
        def handle(message: Message) -> None:
            write(message)
            if message.event.json() == 2:
                write(message)

        announce(30)
        work_off("grouped", concurrency=1, batch_size=30)
        assert Entry.objects.count() == Task.objects.completed().count() == 29
        assert Task.objects.discarded().get().event.json() == 2
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE ledger_entry DROP CONSTRAINT once")


def test_a_verdict_that_was_taken_back_with_others_is_forgotten_when_its_task_is_run_again():
    seen, transactions = set[int](), list[str]()
    has_failed = threading.Event()

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True, attempt_max=1)
    def handle(message: Message) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()::text")
            transactions.append(cursor.fetchone()[0])
        if transactions.count(transactions[-1]) == 3 and not has_failed.is_set():
            has_failed.set()
            raise ValueError("not along with others")
        if message.event.json() not in seen:
            seen.add(message.event.json())
            message.ack()

    announce(MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    assert has_failed.is_set()
    assert Task.objects.completed().count() == MANY


def test_what_a_handler_wrote_is_not_kept_where_a_savepoint_took_its_verdict_back():
    @subscribe("work.>", stream="work", consumer="grouped", atomic=True, attempt_max=1)
    def handle(message: Message) -> None:
        write(message)
        if message.event.json() == MANY - 5:
            with suppress(ValueError), transaction.atomic():
                message.ack()
                raise ValueError("and it is taken back")

    announce(MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    lost = Task.objects.discarded().get()
    assert lost.event.json() == MANY - 5
    assert Entry.objects.count() == Task.objects.completed().count() == MANY - 1
    assert not Entry.objects.filter(event_id=lost.event_id).exists()


def test_explicit_verdicts_and_results_stand_in_a_shared_transaction():
    @subscribe(
        "work.>", stream="work", consumer="grouped", atomic=True, retry=Fixed(delay=timedelta(1))
    )
    def handle(message: Message) -> int | None:
        number: int = message.event.json()
        if number % 3 == 0:
            message.ack("explicit")
        elif number % 3 == 1:
            message.nack("not now")
        else:
            return number
        return None

    announce(60)
    work_off("grouped", concurrency=1, batch_size=60)
    assert Task.objects.completed().filter(result="explicit").count() == 20
    assert Task.objects.retryable().count() == 20
    results = Task.objects.completed().exclude(result="explicit").values_list("result", flat=True)
    assert set(results) == set(range(2, 60, 3))


@pytest.mark.parametrize("returned", [object(), Retry(timedelta(1))])
def test_what_is_returned_after_a_verdict_spoils_no_shared_transaction(returned: object):
    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def handle(message: Message) -> object:
        write(message)
        message.ack()
        return returned

    announce(MANY)
    assert work_off("grouped", concurrency=1, batch_size=MANY) == MANY
    assert Task.objects.completed().count() == Entry.objects.count() == MANY
    assert len(transaction_ids()) < MANY


def is_first_of_its_transaction() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id_if_assigned() IS NULL")
        return bool(cursor.fetchone()[0])


def test_the_first_of_a_transaction_that_fails_is_not_run_again():
    calls: Counter[int] = Counter()
    failed: list[int] = []

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True, attempt_max=1)
    def handle(message: Message) -> None:
        number = message.event.json()
        calls[number] += 1
        # By then more than one are fetched at a time.
        if number >= MANY and not failed and is_first_of_its_transaction():
            failed.append(number)
            raise ValueError("nobody else was in its transaction")
        write(message)

    announce(2 * MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    assert [task.event.json() for task in Task.objects.discarded()] == failed != []
    assert Entry.objects.count() == Task.objects.completed().count() == 2 * MANY - 1
    assert set(calls.values()) == {1}


def test_the_timeout_of_a_task_begins_with_its_own_handler():
    were_late: list[bool] = []

    @subscribe(
        "work.>", stream="work", consumer="grouped", atomic=True, timeout=timedelta(seconds=0.3)
    )
    def handle(message: Message) -> None:
        write(message)
        if message.event.json() == MANY:
            wait_until(lambda: message.cancelled, PATIENCE)
        elif message.event.json() > MANY:
            were_late.append(message.cancelled)

    announce(2 * MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    assert were_late == [False] * (MANY - 1)
    assert max(transaction_ids().values()) > 1


def test_what_has_not_begun_when_the_worker_stops_is_handed_back_uncounted():
    has_begun = threading.Event()
    loops: list[WorkerLoop] = []
    begun_later: list[Message] = []

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def handle(message: Message) -> None:
        if has_begun.is_set():
            begun_later.append(message)
        elif message.event.json() >= MANY and loops[0]._lanes[False].waiting_count:
            has_begun.set()
            wait_until(lambda: not loops[0]._lanes[False].waiting_count, PATIENCE)

    announce(3 * MANY)
    with working("grouped", concurrency=1, batch_size=MANY) as loop:
        loops.append(loop)
        assert has_begun.wait(PATIENCE)
    assert not begun_later
    assert Task.objects.completed().count() == loop.handled_count
    assert set(Task.objects.exclude(state=TaskState.COMPLETED).values_list("state")) == {
        (TaskState.AVAILABLE,)
    }
    assert set(Task.objects.available().values_list("attempt_count")) == {(0,)}


def test_what_waits_behind_a_slow_handler_is_there_for_other_threads():
    slow_one_may_end = threading.Event()
    handled: list[int] = []

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def handle(message: Message) -> None:
        if message.event.json() == MANY:
            assert slow_one_may_end.wait(PATIENCE)
        handled.append(message.event.json())
        if len(handled) == 2 * MANY - 1:
            slow_one_may_end.set()

    announce(2 * MANY)
    work_off("grouped", concurrency=2, batch_size=MANY)
    assert handled[-1] == MANY
    assert Task.objects.completed().count() == 2 * MANY


def test_a_transaction_that_cannot_begin_costs_no_attempt(monkeypatch: pytest.MonkeyPatch):
    refusals = [OperationalError("the server is away")] * 3
    enter = transaction.Atomic.__enter__

    def begin(block: transaction.Atomic) -> None:
        # Of one that nobody shares, as where little waits, the handler has begun.
        is_shared = sys._getframe(1).f_code is group_commit.execute_together.__code__
        if is_shared and refusals:
            raise refusals.pop()
        enter(block)

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True, attempt_max=1)
    def handle(message: Message) -> None:
        write(message)
        if message.event.json() == MANY:
            monkeypatch.setattr(transaction.Atomic, "__enter__", begin)

    announce(3 * MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    assert not refusals
    assert Entry.objects.count() == Task.objects.completed().count() == 3 * MANY


def test_idle_threads_are_not_kept_from_a_small_backlog():
    meeting = threading.Barrier(4, timeout=20)

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def meet(message: Message) -> None:
        meeting.wait()

    announce(4)
    assert work_off("grouped", concurrency=4) == 4


def fail() -> None:
    raise ValueError("in a hook")


@pytest.mark.parametrize("hook", [sys.exit, fail])
@pytest.mark.parametrize("is_explicit", [False, True])
def test_a_hook_that_fails_after_the_commit_has_nothing_run_again(
    *, is_explicit: bool, hook: Callable[[], None]
):
    handled: list[UUID] = []
    hooked: list[UUID] = []

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True, retry=AT_ONCE)
    def handle(message: Message) -> None:
        handled.append(message.event.pk)
        write(message)
        if message.event.json() == MANY:
            transaction.on_commit(hook)
        transaction.on_commit(functools.partial(hooked.append, message.event.pk))
        if is_explicit:
            message.ack()

    announce(2 * MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    assert max(transaction_ids().values()) > 1
    assert len(handled) == len(set(handled)) == Entry.objects.count()
    assert sorted(hooked) == sorted(handled)
    assert Task.objects.completed().filter(attempt_count=1).count() == 2 * MANY


def test_what_is_committed_is_not_run_again_though_its_block_fails_behind_that(
    monkeypatch: pytest.MonkeyPatch,
):
    calls: Counter[int] = Counter()
    in_block: list[Message] = []
    failures: list[OperationalError] = []
    commit = BaseDatabaseWrapper.commit

    def lost(wrapper: BaseDatabaseWrapper) -> None:
        commit(wrapper)
        if threading.current_thread().name.startswith("kanthorq-handler"):
            is_shared = len(in_block) > 1
            in_block.clear()
            if is_shared and not failures:
                failures.append(OperationalError("gone"))
                raise failures[0]

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def handle(message: Message) -> None:
        calls[message.event.json()] += 1
        in_block.append(message)
        write(message)

    monkeypatch.setattr(BaseDatabaseWrapper, "commit", lost)
    announce(MANY)
    work_off("grouped", concurrency=1, batch_size=MANY)
    assert failures
    assert set(calls.values()) == {1}
    assert Task.objects.completed().count() == Entry.objects.count() == MANY
