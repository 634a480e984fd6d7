"""In which state a handler may leave connections, and what the next ones get."""

import contextlib
import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from asgiref.sync import sync_to_async
from django.db import DatabaseError, InternalError, connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from psycopg import IsolationLevel, RawCursor
from psycopg.errors import ReadOnlySqlTransaction
from psycopg.rows import dict_row

from kanthorq_django import Fixed, Never, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.worker.connections import access_modes, left_wrappers, own_connections
from kanthorq_django.worker.connections.upkeep import (
    leave_connections,
    note_failure,
    refresh_connections,
    replace_failed_connections,
)
from tests.concurrency import begin_elsewhere, elsewhere, wait_until
from tests.ledger.models import Entry
from tests.worker.working import (
    LOOK,
    PATIENCE,
    accept,
    announce,
    backends,
    terminate,
    wait_for_state,
    work_off,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)


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


def test_a_connection_that_a_handler_closed_past_django_costs_no_other_an_attempt():
    @subscribe("work.>", stream="work", consumer="closes", retry=Never())
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk)
        connection.connection.close()

    announce(3)
    work_off("closes", concurrency=1)
    assert Task.objects.completed().count() == Entry.objects.count() == 3


def forbid_writing_in_the_session() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")


def forbid_writing_by_a_setting() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")


def forbid_writing_by_psycopg() -> None:
    connection.ensure_connection()
    connection.connection.read_only = True


def get_rows_as_dicts() -> None:
    connection.ensure_connection()
    connection.connection.row_factory = dict_row


def get_rows_of_another_cursor() -> None:
    connection.ensure_connection()
    connection.connection.cursor_factory = RawCursor


def isolate() -> None:
    connection.ensure_connection()
    connection.connection.isolation_level = IsolationLevel.SERIALIZABLE


@pytest.mark.parametrize("switch", [get_rows_as_dicts, get_rows_of_another_cursor, isolate])
def test_what_a_handler_switches_on_a_connection_is_not_for_others(switch: Callable[[], None]):
    levels: list[str] = []

    @subscribe("work.>", stream="work", consumer="switches", retry=Never())
    def handle(message: Message) -> None:
        if message.event.json() == 0:
            return switch()
        Entry.objects.create(event_id=message.event.pk)
        with transaction.atomic(), connection.cursor() as cursor:  # without, no level is asked for
            cursor.execute("SELECT current_setting(%s)", ["transaction_isolation"])
            levels.append(cursor.fetchone()[0])
        return None

    announce(3)
    work_off("switches", concurrency=1)
    assert Task.objects.completed().count() == 3
    assert levels == ["read committed"] * 2


def test_a_session_that_a_pool_gives_again_is_known_by_how_it_was_made():
    def is_known() -> bool:
        isolate()
        # As Django tells of whatever it is given, also of what a handler has had before.
        connection_created.send(type(connection), connection=connections["default"])
        return access_modes.is_altered(connections["default"])

    assert elsewhere(is_known)


@contextmanager
def setting_up(receiver: Callable[..., None], before: Callable[..., None]) -> Iterator[None]:
    """Let a project set up what is connected: ahead of ours, for workers come after its apps."""
    connection_created.connect(receiver)
    connection_created.disconnect(before)
    connection_created.connect(before)
    try:
        yield
    finally:
        connection_created.disconnect(receiver)


def refuse(*_: Any) -> NoReturn:
    raise ValueError("left by a handler")


def wrap() -> None:
    connection.execute_wrappers.append(refuse)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_wrapper_that_a_handler_leaves_around_statements_is_not_for_others(is_first: bool):
    """Also one that was there before there was a connection."""

    @subscribe("work.>", stream="work", consumer="wraps", retry=Never())
    def handle(message: Message) -> None:
        if message.event.json() == 0:
            if not is_first:
                connection.ensure_connection()
            return wrap()
        Entry.objects.create(event_id=message.event.pk)
        return None

    announce(3)
    work_off("wraps", concurrency=1)
    assert Task.objects.completed().count() == 3
    assert Entry.objects.count() == 2


def test_a_wrapper_that_a_coroutine_leaves_around_statements_is_not_for_others():
    @subscribe("work.>", stream="work", consumer="wraps", retry=Never())
    async def handle(message: Message) -> None:
        if message.event.json() == 0:
            await sync_to_async(wrap)()
        else:
            await Entry.objects.acreate(event_id=message.event.pk)

    announce(3)
    work_off("wraps", concurrency=1)
    assert Task.objects.completed().count() == 3


def test_wrappers_that_a_project_installs_stay_and_cost_a_thread_one_connection():
    """The first one was a handler's, who might have installed them."""
    pids: list[int] = []
    traced: list[str] = []

    def trace(execute: Any, sql: str, *rest: Any) -> Any:
        traced.append(sql)
        return execute(sql, *rest)

    def install(connection: BaseDatabaseWrapper, **_: object) -> None:
        if threading.current_thread().name.startswith("kanthorq-handler"):
            connection.execute_wrappers.append(trace)

    @subscribe("work.>", stream="work", consumer="reads")
    def handle(message: Message) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            pids.append(cursor.fetchone()[0])

    announce(5)
    with setting_up(install, before=left_wrappers._note_installed):
        work_off("reads", concurrency=1)
    assert len(pids) == traced.count("SELECT pg_backend_pid()") == 5
    assert len(set(pids)) == len(set(pids[1:])) + 1 == 2


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
    with setting_up(set_up, before=access_modes._note_access):
        work_off("reads", concurrency=1)
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


def refused_write() -> DatabaseError:
    error = InternalError("cannot execute INSERT in a read-only transaction")
    error.__cause__ = ReadOnlySqlTransaction()
    return error


@pytest.mark.parametrize(
    "use",
    [
        lambda: refresh_connections(contextlib.nullcontext),
        leave_connections,
        lambda: replace_failed_connections(ValueError()),
    ],
    ids=["before a handler", "after a handler", "after a failure"],
)
@pytest.mark.parametrize(
    ("error", "is_young", "is_replaced"),
    [
        (refused_write(), False, True),
        (refused_write(), True, False),  # a new one would not differ
        (InternalError("something else"), False, False),
        (None, False, False),
    ],
)
def test_a_write_that_one_thread_was_refused_replaces_the_read_only_sessions_of_all(
    error: DatabaseError | None,
    is_young: bool,
    is_replaced: bool,
    use: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
):
    """Each of them would else cost an attempt, once the database may be written again."""
    monkeypatch.setattr(access_modes, "_refused_at", -math.inf)
    monkeypatch.setattr(access_modes, "READ_ONLY_FOR", PATIENCE if is_young else 0.0)

    has_connected, is_refused = threading.Event(), threading.Event()

    def is_given_another() -> bool:
        connection.ensure_connection()
        session = connection.connection
        has_connected.set()
        is_refused.wait(PATIENCE)
        use()
        connection.ensure_connection()
        assert session.closed is (connection.connection is not session)
        return session.closed

    with read_only_database():
        asked = begin_elsewhere(is_given_another)
        assert has_connected.wait(PATIENCE)
    note_failure(error)
    is_refused.set()
    assert asked.result(PATIENCE) is is_replaced


@pytest.mark.parametrize("setting", ["default_transaction_read_only", "in_hot_standby"])
@pytest.mark.parametrize("is_on", [True, False])
def test_sessions_on_a_standby_are_replaced_as_those_that_may_not_write(
    setting: str, monkeypatch: pytest.MonkeyPatch, *, is_on: bool
):
    """A new one is another server's, where the name of the primary has moved on."""
    monkeypatch.setattr(access_modes, "_refused_at", -math.inf)
    monkeypatch.setattr(access_modes, "READ_ONLY_FOR", 0.0)
    told = {b"default_transaction_read_only": b"off", b"in_hot_standby": b"off"}
    told[setting.encode()] = b"on" if is_on else b"off"
    raw: Any = SimpleNamespace(
        closed=False,
        pgconn=SimpleNamespace(parameter_status=told.get),
        read_only=None,
        isolation_level=None,
        row_factory=None,
        cursor_factory=None,
    )
    wrapper: Any = SimpleNamespace(vendor="postgresql", connection=raw)
    access_modes._note_access(wrapper)
    assert not access_modes.is_outdated(wrapper)
    note_failure(refused_write())
    assert access_modes.is_outdated(wrapper) is is_on


def test_a_connection_that_the_worker_has_made_for_a_handler_is_missed_no_longer():
    def were_missed() -> list[bool]:
        own_connections.miss("default")
        found = [bool(own_connections.missing_aliases())]
        refresh_connections(contextlib.nullcontext)
        return [*found, bool(own_connections.missing_aliases()), connection.connection is not None]

    assert elsewhere(were_missed) == [True, False, True]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_wrapper_that_a_handler_removed_is_closed_and_its_successor_kept(*, is_replaced: bool):
    successors: list[BaseDatabaseWrapper] = []

    @subscribe("work.>", stream="work", consumer="removes", retry=Never())
    def handle(message: Message) -> None:
        if message.event.json() == 0:
            connection.ensure_connection()
        elif message.event.json() == 1:
            transaction.set_autocommit(False)
            Entry.objects.create(event_id=message.event.pk)
            del connections["default"]
            if is_replaced:
                successors.append(connections["default"])
        elif is_replaced:
            successors.append(connections["default"])

    announce(3)
    with working("removes", concurrency=1):
        wait_for_state(TaskState.COMPLETED, 3)
        wait_until(lambda: not backends_in_transaction(), PATIENCE)
    assert not Entry.objects.exists()
    assert len(set(map(id, successors))) == is_replaced


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


def test_a_wrapper_that_holds_its_connection_does_not_keep_it():
    def install(connection: BaseDatabaseWrapper, **_: object) -> None:
        connection.execute_wrappers.append(lambda execute, *rest: execute(*rest) or connection)

    with setting_up(install, before=left_wrappers._note_installed):
        made = connections.create_connection("default")
        made.connect()
    assert not left_wrappers.has_left_wrappers(made)
    made.close()
    kept = weakref.ref(made)
    del made
    gc.collect()
    assert kept() is None
