"""Connections that end or fall silent: each part of a worker heals by itself."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.db import OperationalError, connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.utils import timezone
from psycopg.pq import TransactionStatus

from kanthorq_django import Fixed, schedule, signals, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState, Worker
from kanthorq_django.worker import access_modes, listener, loop, renewer, warden
from kanthorq_django.worker.flight import Flights
from tests.concurrency import elsewhere, wait_until
from tests.ledger.models import Entry
from tests.proxy import Proxy, through_a_proxy
from tests.quick_run import sooner
from tests.worker.working import (
    PATIENCE,
    accept,
    announce,
    backends,
    default_database,
    terminate,
    wait_for_state,
    work_off,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)

SHORT = timedelta(seconds=1)
LONG = timedelta(minutes=1)
# How their last statements tell the connections apart.
LOOK, RENEWAL, ACK = "One cheap look", "Extend the leases in flight", "End leased tasks well"


class Gated:
    """A handler that waits until the test lets it go on."""

    def __init__(self, **options: Any) -> None:
        self.is_inside, self.gate = threading.Event(), threading.Event()
        self.cancelled: list[bool] = []

        @subscribe("gated.>", stream="work", consumer="gated", **options)
        def handle(message: Message) -> None:
            self.is_inside.set()
            self.gate.wait(PATIENCE)
            self.cancelled.append(message.cancelled)


@pytest.mark.parametrize("run", sooner(range(3), 0))
def test_a_puller_whose_backend_was_ended_goes_on(run: int):
    accept("plain")

    with working("plain"):
        terminate(LOOK)
        announce()
        wait_for_state(TaskState.COMPLETED)


@pytest.mark.parametrize("run", sooner(range(3), 0))
def test_a_renewer_whose_backend_was_ended_goes_on(run: int):
    # A busy machine may take a second to connect anew, three times in a row.
    gated = Gated(visibility_timeout=3 * SHORT)
    announce(1, "gated.due")

    with working("gated"):
        assert gated.is_inside.wait(PATIENCE)
        for _ in range(3):
            terminate(RENEWAL)
        gated.gate.set()
        wait_for_state(TaskState.COMPLETED)
    assert Task.objects.get().lease_epoch == 1
    assert gated.cancelled == [False]


@pytest.mark.parametrize("run", sooner(range(3), 0))
def test_an_acknowledger_whose_backend_was_ended_loses_no_verdict(run: int):
    accept("plain")

    with working("plain"):
        for count in range(1, 4):
            announce()
            wait_for_state(TaskState.COMPLETED, count)
            terminate(ACK)
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}


@pytest.mark.parametrize("run", sooner(range(3), 0))
def test_a_listener_whose_backend_was_ended_listens_again(run: int):
    accept("plain")

    with working("plain", listen=True, poll_interval=LONG):
        announce()
        wait_for_state(TaskState.COMPLETED)
        listening = _listening()
        _end(listening)
        wait_until(lambda: _listening() - listening, PATIENCE)
        announce()
        wait_for_state(TaskState.COMPLETED, 2)


def _listening() -> set[int]:
    """Return the backends that last said something to a channel of their own."""
    return {*backends("pg_notify("), *backends("LISTEN ")}


def _end(pids: set[int]) -> None:
    with connection.cursor() as cursor:
        for pid in pids:
            cursor.execute("SELECT pg_terminate_backend(%s)", [pid])


def test_a_handler_whose_backend_was_ended_fails_and_the_next_attempt_succeeds():
    @subscribe("work.>", stream="work", consumer="writes", retry=Fixed(timedelta(0)), atomic=True)
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk)
        if message.attempt == 1:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    announce(3)
    with working("writes", concurrency=1):
        wait_for_state(TaskState.COMPLETED, 3)
    assert Entry.objects.count() == 3
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {2}


@pytest.mark.parametrize("has_acked", [True, False])
@pytest.mark.parametrize("way", ["by Django", "by SQL"])
def test_a_transaction_that_a_handler_leaves_open_holds_up_nobody(way: str, has_acked: bool):
    """Its thread has nothing else to do, which would be the next occasion to look."""

    @subscribe("work.>", stream="work", consumer="forgets", retry=Fixed(timedelta(0)))
    def handle(message: Message) -> None:
        if message.attempt > 1:
            return
        if way == "by Django":
            transaction.set_autocommit(False)
        else:
            with connection.cursor() as cursor:
                cursor.execute("BEGIN")
        Entry.objects.create(event_id=message.event.pk)
        if has_acked:
            message.ack()

    announce()
    with working("forgets", concurrency=1):
        wait_for_state(TaskState.COMPLETED)
        wait_until(lambda: not backends_in_transaction(), PATIENCE)
    assert not Entry.objects.exists()
    assert Task.objects.get().attempt_count == (2 if has_acked else 1)


@pytest.mark.parametrize("way", ["by Django", "by SQL"])
def test_a_transaction_that_a_coroutine_leaves_open_holds_up_no_burst(way: str):
    """Nor does another coroutine begin, before which there is a look at the connections."""

    def leave_open() -> None:
        if way == "by Django":
            transaction.set_autocommit(False)
        else:
            with connection.cursor() as cursor:
                cursor.execute("BEGIN")

    @subscribe("work.>", stream="work", consumer="forgets", retry=Fixed(timedelta(0)))
    async def handle(message: Message) -> None:
        if message.attempt == 1:
            await sync_to_async(leave_open)()
            await message.aack()

    announce()
    assert work_off("forgets") == 2
    assert not backends_in_transaction()
    assert Task.objects.completed().get().attempt_count == 2


def backends_in_transaction() -> list[int]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND state LIKE 'idle in transaction%'"
        )
        return [row[0] for row in cursor.fetchall()]


def test_psycopgs_own_autocommit_that_a_handler_switched_off_harms_no_other():
    @subscribe("work.>", stream="work", consumer="switches")
    def handle(message: Message) -> None:
        if message.event.json() == 0:
            connection.ensure_connection()
            connection.connection.autocommit = False
        else:
            Entry.objects.create(event_id=message.event.pk)

    announce(3)
    work_off("switches", concurrency=1)
    assert Task.objects.completed().count() == 3
    assert Entry.objects.count() == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_a_handler_forks_is_no_second_worker():
    statuses: list[int] = []

    @subscribe("work.>", stream="work", consumer="forks")
    def handle(message: Message) -> None:
        child = os.fork()
        if child == 0:
            raise ValueError("in the child")
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    announce(3)
    work_off("forks", concurrency=1)
    assert statuses == [1, 1, 1]
    assert Task.objects.completed().filter(attempt_count=1).count() == 3


def forbid_writing_in_the_session() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")


def forbid_writing_by_a_setting() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")


def forbid_writing_by_psycopg() -> None:
    connection.ensure_connection()
    connection.connection.read_only = True


@pytest.mark.parametrize(
    ("forbid", "atomic"),
    [
        (forbid_writing_in_the_session, False),
        (forbid_writing_in_the_session, True),
        (forbid_writing_by_a_setting, False),
        (forbid_writing_by_a_setting, True),
        (forbid_writing_by_psycopg, False),  # which it refuses inside of a block
    ],
)
def test_a_session_that_a_handler_made_read_only_harms_no_other(
    forbid: Callable[[], None], atomic: bool
):
    @subscribe("work.>", stream="work", consumer="forbids", atomic=atomic)
    def handle(message: Message) -> None:
        with transaction.atomic():
            Entry.objects.create(event_id=message.event.pk)
        if message.event.json() == 0:
            forbid()

    announce(3)
    work_off("forbids", concurrency=1)
    assert Task.objects.completed().filter(attempt_count=1).count() == 3
    assert Entry.objects.count() == 3


def test_a_session_that_is_read_only_from_the_beginning_is_kept():
    """As of a database that an administrator has locked, or of a role that may only read."""
    pids: list[int] = []

    @subscribe("work.>", stream="work", consumer="reads")
    def handle(message: Message) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            pids.append(cursor.fetchone()[0])

    def set_up(connection: BaseDatabaseWrapper, **_: object) -> None:
        if threading.current_thread().name.startswith("kanthorq-handler"):
            connection.connection.execute("SET default_transaction_read_only = on")
            connection.connection.read_only = True

    announce(3)
    connection_created.connect(set_up)
    connection_created.disconnect(access_modes._note_access)
    connection_created.connect(access_modes._note_access)  # workers come after what is set up
    try:
        work_off("reads", concurrency=1)
    finally:
        connection_created.disconnect(set_up)
    assert len(set(pids)) == 1
    assert Task.objects.completed().count() == 3


@contextmanager
def read_only_database() -> Iterator[None]:
    """Let sessions that are made within the block write nothing; those that exist still may."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        name = connection.ops.quote_name(cursor.fetchone()[0])
        cursor.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        try:
            yield
        finally:
            cursor.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")


def test_handlers_write_again_once_their_database_may_be_written(caplog: pytest.LogCaptureFixture):
    retry = Fixed(delay=timedelta(milliseconds=50), attempt_max=1_000)

    @subscribe("work.>", stream="work", consumer="writes", retry=retry)
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk)

    with working("writes", concurrency=1):
        wait_until(lambda: bool(backends(LOOK)), PATIENCE)
        with read_only_database():
            announce(1)  # the thread's connection is made for it
            wait_until(lambda: "failed: InternalError" in caplog.text, PATIENCE)
        wait_for_state(TaskState.COMPLETED)
    assert Entry.objects.count() == 1


def test_a_worker_pulls_again_once_its_database_may_be_written(caplog: pytest.LogCaptureFixture):
    accept("writes")
    with working("writes"):
        wait_until(lambda: bool(backends(LOOK)), PATIENCE)
        with read_only_database():
            terminate(LOOK)
            announce(1)
            wait_until(lambda: "in a read-only transaction" in caplog.text, PATIENCE)
        wait_for_state(TaskState.COMPLETED)


def leave() -> None:
    sys.exit(0)


def go_wrong() -> None:
    raise ValueError("in the child")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("end", [leave, go_wrong, bool])
@pytest.mark.parametrize("group_size", [1, 20])
def test_a_child_that_a_handler_forks_ends_nothing_of_its_parents_transaction(
    group_size: int, end: Callable[[], None], settings: Any
):
    """It has the same connection to the server, which cannot tell who says ROLLBACK or COMMIT."""
    settings.KANTHORQ = {"GROUP_COMMIT": group_size}

    @subscribe("work.>", stream="work", consumer="forks", atomic=True)
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk)
        if message.event.json() % 20 != 1:
            return
        child = os.fork()
        if child == 0:
            end()
        else:
            os.waitpid(child, 0)

    announce(60)
    work_off("forks", concurrency=1)
    assert Task.objects.completed().filter(attempt_count=1).count() == 60
    assert Entry.objects.count() == 60


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_a_coroutine_forks_is_no_second_worker():
    statuses: list[int] = []

    @subscribe("work.>", stream="work", consumer="forks")
    async def handle(message: Message) -> None:
        if (child := os.fork()) == 0:
            sys.exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    announce(3)
    work_off("forks", concurrency=1)
    assert statuses == [1, 1, 1]
    assert Task.objects.completed().filter(attempt_count=1).count() == 3


def replace_the_wrapper() -> None:
    del connections["default"]


def replace_what_it_wraps() -> None:
    connection.connect()


@pytest.mark.parametrize("replace", [replace_the_wrapper, replace_what_it_wraps])
@pytest.mark.parametrize("group_size", [1, 20])
def test_what_was_written_on_a_connection_that_a_handler_replaced_is_not_taken_for_done(
    group_size: int, replace: Callable[[], None], settings: Any
):
    settings.KANTHORQ = {"GROUP_COMMIT": group_size}

    @subscribe("work.>", stream="work", consumer="replaces", atomic=True, retry=Fixed(timedelta(0)))
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk)
        if message.attempt == 1 and message.event.json() % 7 == 0:
            replace()

    announce(100)
    work_off("replaces", concurrency=1)
    assert Task.objects.completed().count() == Entry.objects.count() == 100
    assert Task.objects.filter(attempt_count=2).count() == 15


def count_entries(message: Message) -> int:
    return Entry.objects.count()


async def acount_entries(message: Message) -> int:
    return await Entry.objects.acount()


@pytest.mark.parametrize(
    ("handler", "atomic", "last"),
    [
        (count_entries, True, "COMMIT"),
        (count_entries, False, "COUNT"),
        (acount_entries, False, "COUNT"),
    ],
)
def test_a_handlers_connection_that_ended_while_it_rested_costs_no_attempt(
    handler: Callable[[Message], Any], atomic: bool, last: str
):
    subscribe("work.>", stream="work", consumer="counts", atomic=atomic)(handler)
    announce()
    with working("counts", concurrency=1):
        wait_for_state(TaskState.COMPLETED)
        terminate(last)
        threading.Event().wait(1.1)  # rests are noticed from a second on
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
    assert not Task.objects.exclude(attempt_count=1).exists()


def test_a_worker_that_loses_all_its_connections_at_once_goes_on():
    gated = Gated(visibility_timeout=SHORT)
    accept("plain")
    announce(1, "gated.due")

    with working("gated", "plain", listen=True):
        assert gated.is_inside.wait(PATIENCE)
        announce()
        wait_for_state(TaskState.COMPLETED)
        _end(set(backends("")))
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
        gated.gate.set()
        wait_for_state(TaskState.COMPLETED, 3)
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}


def cut_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden, "CANCEL_AFTER", 0.3)
    monkeypatch.setattr(warden, "CUT_AFTER", 0.5)


@contextmanager
def behind_a_proxy() -> Iterator[Proxy]:
    connection.ensure_connection()
    info = connection.connection.info
    with (
        Proxy((info.host, info.port)) as proxy,
        default_database(HOST=proxy.host, PORT=str(proxy.port)),
    ):
        yield proxy


def test_a_worker_whose_connections_fall_silent_goes_on(monkeypatch: pytest.MonkeyPatch):
    """Half-open: no error and no end, only silence."""
    cut_soon(monkeypatch)
    gated = Gated(visibility_timeout=timedelta(seconds=3))
    accept("plain")
    announce(1, "gated.due")
    with behind_a_proxy() as proxy, working("gated", "plain"):
        assert gated.is_inside.wait(PATIENCE)
        announce()
        wait_for_state(TaskState.COMPLETED)  # now all of its connections are in use
        proxy.freeze()
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
        gated.gate.set()
        wait_for_state(TaskState.COMPLETED, 3)
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}
    assert not Worker.objects.exists()


def test_a_listener_that_has_gone_deaf_takes_a_new_connection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listener, "CALL_EVERY", 0.2)
    cut_soon(monkeypatch)
    accept("plain", visibility_timeout=SHORT)
    with behind_a_proxy() as proxy, working("plain", listen=True, poll_interval=LONG):
        announce()
        wait_for_state(TaskState.COMPLETED)
        proxy.freeze()
        announce()  # nobody hears of it, and no poll comes
        wait_for_state(TaskState.COMPLETED, 2)


def test_a_listener_that_hears_nothing_warns_and_polling_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    """As behind a pooler in transaction mode: LISTEN is accepted, and nothing ever arrives."""
    monkeypatch.setattr(listener, "ANSWER_WITHIN", 0.2)
    monkeypatch.setattr(
        listener.Listener, "_subscribe", lambda *_: False
    )  # the session never listens
    accept("plain")
    with working("plain", listen=True):
        announce()
        wait_for_state(TaskState.COMPLETED)
        wait_until(lambda: "KANTHORQ['LISTEN'] = False" in caplog.text, PATIENCE)
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
    assert caplog.text.count("KANTHORQ['LISTEN'] = False") == 1


def test_a_listener_leaves_no_session_that_listens_to_a_pool(monkeypatch: pytest.MonkeyPatch):
    create, given_back = connections.create_connection, list[Any]()

    def pooled(alias: str) -> Any:
        wrapper: Any = create(alias)
        if threading.current_thread().name == "kanthorq-listener":
            wrapper._close = lambda: given_back.append(wrapper.connection)
        return wrapper

    monkeypatch.setattr(connections, "create_connection", pooled)
    accept("plain")
    with working("plain", listen=True):
        announce()
        wait_for_state(TaskState.COMPLETED)
    assert [raw.closed for raw in given_back] == [True]


def test_a_listener_passes_over_channels_of_the_project(caplog: pytest.LogCaptureFixture):
    def listen_as_well(connection: BaseDatabaseWrapper, **_: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("LISTEN cache_of_the_project")

    accept("plain")
    connection_created.connect(listen_as_well)
    try:
        with working("plain", listen=True, poll_interval=LONG):
            announce()
            wait_for_state(TaskState.COMPLETED)
            wait_until(_listening, PATIENCE)
            listening = _listening()
            with connection.cursor() as cursor:
                cursor.execute("NOTIFY cache_of_the_project")
            announce()
            wait_for_state(TaskState.COMPLETED, 2)
            assert _listening() == listening
    finally:
        connection_created.disconnect(listen_as_well)
    assert "listener" not in caplog.text


def test_verdicts_wait_for_a_database_that_is_away():
    gated = Gated(visibility_timeout=LONG)
    announce(1, "gated.due")
    with behind_a_proxy() as proxy, working("gated"):
        assert gated.is_inside.wait(PATIENCE)
        with proxy.away():
            gated.gate.set()
            wait_until(lambda: gated.cancelled, PATIENCE)
        wait_for_state(TaskState.COMPLETED)
    assert Task.objects.get().attempt_count == 1


def test_a_worker_stops_while_the_database_is_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "FLUSH_SECONDS", 0.5)
    gated = Gated(visibility_timeout=LONG)
    announce(1, "gated.due")
    with behind_a_proxy() as proxy, contextlib.ExitStack() as away, working("gated"):
        assert gated.is_inside.wait(PATIENCE)
        away.enter_context(proxy.away())
        gated.gate.set()
        wait_until(lambda: gated.cancelled, PATIENCE)
    assert Task.objects.get().state == TaskState.RUNNING  # until its lease runs out


def test_a_task_that_somebody_locks_does_not_hold_up_the_verdicts_of_others():
    gated = Gated(visibility_timeout=LONG)
    accept("plain")
    announce(1, "gated.due")
    with working("gated", "plain"):
        assert gated.is_inside.wait(PATIENCE)
        with transaction.atomic():
            Task.objects.select_for_update(of=("self",)).get()
            gated.gate.set()
            wait_until(lambda: gated.cancelled, PATIENCE)
            elsewhere(lambda: announce(3))
            wait_until(lambda: elsewhere(Task.objects.completed().count) == 3, PATIENCE)
        wait_for_state(TaskState.COMPLETED, 4)
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}


def test_a_statement_that_waits_for_a_table_is_cancelled_not_left_behind(
    monkeypatch: pytest.MonkeyPatch,
):
    """A migration may lock a table for long; each try must not cost the server a backend."""
    monkeypatch.setattr(warden, "CANCEL_AFTER", 0.2)
    accept("plain", visibility_timeout=SHORT)
    with working("plain"):
        announce()
        wait_for_state(TaskState.COMPLETED)
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("LOCK TABLE kanthorq_django_task IN ACCESS EXCLUSIVE MODE")
            seen: set[int] = set()
            wait_until(lambda: has_seen(6, seen), PATIENCE)
            assert len(elsewhere(waiting)) <= 3
        announce()
        wait_for_state(TaskState.COMPLETED, 2)


def test_where_a_cancellation_would_stop_all_threads_a_connection_is_only_cut(
    monkeypatch: pytest.MonkeyPatch,
):
    """As libpq does before version 17, to whom a network that is silent gives no answer."""
    cut_soon(monkeypatch)
    asked: list[object] = []
    monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", lambda: False)
    monkeypatch.setattr(psycopg.Connection, "cancel_safe", lambda raw, **_: asked.append(raw))
    accept("plain", visibility_timeout=timedelta(seconds=1))  # so that the warden looks often
    with behind_a_proxy() as proxy, working("plain"):
        announce()
        wait_for_state(TaskState.COMPLETED)
        proxy.freeze()
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
    assert asked == []


def test_leases_are_renewed_while_somebody_holds_the_row_of_the_worker(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(renewer, "SEEN_EVERY", timedelta(0))
    gated = Gated(visibility_timeout=timedelta(seconds=3))
    announce(1, "gated.due")
    with working("gated"):
        assert gated.is_inside.wait(PATIENCE)
        began_at = Task.objects.get().schedule_at
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("LOCK TABLE kanthorq_django_worker IN ACCESS EXCLUSIVE MODE")
            renewed = began_at + timedelta(seconds=4)
            wait_until(
                lambda: elsewhere(lambda: Task.objects.get().schedule_at) > renewed, PATIENCE
            )
        gated.gate.set()
        wait_for_state(TaskState.COMPLETED)
    assert Task.objects.get().attempt_count == 1


def test_a_worker_whose_row_somebody_holds_ends_in_good_order(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    monkeypatch.setattr(warden, "CANCEL_AFTER", 3600)
    monkeypatch.setattr(warden, "CUT_AFTER", 3600)
    accept("plain")
    with transaction.atomic(), connection.cursor() as cursor, working("plain"):
        wait_until(lambda: elsewhere(Worker.objects.exists), PATIENCE)
        cursor.execute("SELECT FROM kanthorq_django_worker FOR UPDATE")
    assert "could not sign out" in caplog.text


def has_seen(count: int, seen: set[int]) -> bool:
    """Add to ``seen`` who waits at present; tell whether ``count`` have been seen."""
    seen.update(elsewhere(waiting))
    return len(seen) >= count


def waiting() -> list[int]:
    """Return the backends that wait for a lock in this database."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return [pid for (pid,) in cursor.fetchall()]


def test_a_renewer_says_that_it_works_again_when_the_database_has_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A step that had nothing to ask proves nothing."""
    tried: list[None] = []

    def fail(_: Worker) -> None:
        tried.append(None)
        raise OperationalError("away")

    monkeypatch.setattr(renewer, "SEEN_EVERY", timedelta(0))
    monkeypatch.setattr(Worker, "see", fail)
    subscribe("work.>", stream="work", consumer="rests", visibility_timeout=timedelta(seconds=1))(
        lambda message: None
    )
    with working("rests"):
        wait_until(lambda: len(tried) >= 3, PATIENCE)
    assert caplog.text.count("renewer interrupted") == 1
    assert "renewer works again" not in caplog.text


def test_a_block_is_not_written_twice_when_the_reply_to_its_commit_was_lost():
    lost: list[threading.Event] = []

    @subscribe("work.>", stream="work", consumer="tries", retry=Fixed(timedelta(hours=1)))
    def handle(message: Message) -> None:
        for _ in range(2):
            with contextlib.suppress(OperationalError), transaction.atomic():
                Entry.objects.create(event_id=message.event.pk)
                message.ack()
                lost[len(lost) :] = [] if lost else [proxy.lose_reply_to("COMMIT\x00")]

    announce()
    connection.ensure_connection()
    with through_a_proxy() as proxy, default_database(HOST=proxy.host, PORT=str(proxy.port)):
        work_off("tries", concurrency=1)
    assert lost[0].is_set()
    assert Task.objects.get().state == TaskState.COMPLETED
    assert Entry.objects.count() == 1


def test_a_receiver_that_takes_its_time_is_not_taken_for_a_silent_database(
    monkeypatch: pytest.MonkeyPatch,
):
    """Nothing is asked meanwhile in the transaction of a schedule's turn, which stays open."""
    monkeypatch.setattr(warden, "CANCEL_AFTER", 0.5)
    monkeypatch.setattr(warden, "CUT_AFTER", 1.0)
    end_waits, looks = warden.Warden._end_waits, []

    def noted(self: warden.Warden) -> None:
        end_waits(self)
        looks.append(self)

    def take_time(**_: Any) -> None:
        seen = len(looks)
        wait_until(lambda: len(looks) >= seen + 10)

    monkeypatch.setattr(warden.Warden, "_end_waits", noted)
    accept("taker", visibility_timeout=SHORT)
    schedule("daily", rrule="FREQ=DAILY", dtstart=timezone.now(), subject="work.due", stream="work")
    signals.published.connect(take_time)
    try:
        with working("taker"):
            wait_for_state(TaskState.COMPLETED)
    finally:
        signals.published.disconnect(take_time)


def test_the_time_that_connecting_takes_is_no_statements(monkeypatch: pytest.MonkeyPatch):
    """A pool has its callers wait for longer than a statement may take."""
    monkeypatch.setattr(warden, "CANCEL_AFTER", 0.0)
    monkeypatch.setattr(warden, "CUT_AFTER", 0.0)
    ended: list[object] = []
    monkeypatch.setattr(warden, "_end", ended.append)
    watch, wrapper = warden.Warden(Flights(lambda: None), PATIENCE), Mock(connection=None)
    with watch.bounded(wrapper):
        watch._end_waits()
        assert not ended
        wrapper.connection = Mock()
        wrapper.connection.pgconn.transaction_status = TransactionStatus.ACTIVE
        watch._end_waits()
    assert ended == [wrapper]
