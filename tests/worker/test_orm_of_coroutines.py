"""Coroutines share one thread for the ORM: it may be kept, or have no connection."""

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import pytest
from asgiref.sync import SyncToAsync, sync_to_async
from django.db import connection, connections
from django.db.backends.signals import connection_created

from kanthorq_django import Fixed, Never, publish, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.worker.connections import scarcity
from kanthorq_django.worker.lanes import lane, orm_thread, throughput
from tests.concurrency import wait_until
from tests.ledger.models import Entry
from tests.receivers import heard_by
from tests.worker.working import (
    PATIENCE,
    announce,
    default_database,
    wait_for_state,
    work_off,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)

AT_ONCE = Fixed(timedelta(0))
FOR_ALL = timedelta(seconds=0.5)  # what a coroutine of these tests may take
BUSY, FREE = "has been busy", "is free again"


class Blocking:
    """A handler that keeps the thread of the ORM until the test lets it go on."""

    def __init__(self) -> None:
        self.is_inside, self.gate = threading.Event(), threading.Event()

        @subscribe("block.>", stream="work", consumer="blocks")
        async def handle(message: Message) -> None:
            await sync_to_async(self.block)()

    def block(self) -> None:
        self.is_inside.set()
        self.gate.wait(PATIENCE)


@pytest.fixture
def blocking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Blocking]:
    monkeypatch.setattr(orm_thread, "STUCK_AFTER", 0.2)
    handler = Blocking()
    yield handler
    handler.gate.set()


def test_coroutines_that_wait_for_the_thread_of_the_orm_use_up_no_attempts(
    blocking: Blocking, caplog: pytest.LogCaptureFixture
):
    @subscribe(
        "work.>", stream="work", consumer="books", timeout=FOR_ALL, attempt_max=3, retry=AT_ONCE
    )
    async def book(message: Message) -> None:
        await Entry.objects.acreate(event_id=message.event.pk)

    with working("blocks", "books", concurrency=4):
        publish("block.due", stream="work")
        assert blocking.is_inside.wait(PATIENCE)
        announce()  # it has begun before anybody can know
        wait_until(lambda: BUSY in caplog.text, PATIENCE)
        announce(9)
        wait_until(lambda: "failed: TimeoutError" in caplog.text, PATIENCE)
        time.sleep(4 * FOR_ALL.total_seconds())  # what was started would use up its attempts
        assert FREE not in caplog.text
        blocking.gate.set()
        wait_for_state(TaskState.COMPLETED, 11)
    attempts = Task.objects.filter(consumer__name="books").values_list("attempt_count", flat=True)
    assert sorted(attempts) == [1] * 9 + [2]
    assert caplog.text.count(BUSY) == caplog.text.count(FREE) == 1
    (told,) = {each.getMessage() for each in caplog.records if BUSY in each.getMessage()}
    assert "longest first: blocks" in told


def test_later_rounds_of_a_call_do_not_wait_for_the_thread_of_the_orm(
    blocking: Blocking, caplog: pytest.LogCaptureFixture
):
    may_go_on = threading.Event()
    handled: list[int] = []

    @subscribe("work.>", stream="work", consumer="books", grouped=True, batch=2)
    async def book(messages: list[Message]) -> None:
        handled.extend(message.event.json() for message in messages)
        await sync_to_async(may_go_on.wait, thread_sensitive=False)(PATIENCE)

    with working("blocks", "books", concurrency=4):
        publish("block.due", stream="work")
        assert blocking.is_inside.wait(PATIENCE)
        for number in range(6):
            publish("work.due", stream="work", body=number, resource_key="one")
        wait_until(lambda: BUSY in caplog.text, PATIENCE)
        may_go_on.set()
        wait_for_state(TaskState.AVAILABLE, 6 - len(handled), consumer__name="books")
        blocking.gate.set()
        wait_for_state(TaskState.COMPLETED, 7)
    assert not Task.objects.exclude(attempt_count=1).exists()


def test_what_waits_to_be_started_is_for_others_while_the_thread_of_the_orm_is_kept(
    blocking: Blocking, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(throughput.Throughput, "per_second", lambda *_: 10)  # so that some wait
    monkeypatch.setattr(lane, "BODIES_SIZE_MAX", 5)  # of one byte each
    may_end = threading.Event()

    @subscribe("work.>", stream="work", consumer="books")
    async def book(message: Message) -> None:
        await sync_to_async(may_end.wait, thread_sensitive=False)(2 * PATIENCE)

    with working("blocks", "books", concurrency=2):
        publish("block.due", stream="work")
        assert blocking.is_inside.wait(PATIENCE)
        announce(6)
        wait_for_state(TaskState.AVAILABLE, 5, consumer__name="books", attempt_count=0)
        may_end.set()
        blocking.gate.set()
        wait_for_state(TaskState.COMPLETED, 7)


def test_a_worker_is_done_with_a_burst_once_the_thread_of_the_orm_is_free(blocking: Blocking):
    @subscribe("work.>", stream="work", consumer="books")
    async def book(message: Message) -> None: ...

    publish("block.due", stream="work")
    announce(5)
    threading.Timer(1.0, blocking.gate.set).start()  # well after STUCK_AFTER
    assert work_off("blocks", "books", concurrency=2) == 6


@contextmanager
def role_with(connection_limit: int) -> Iterator[str]:
    """Let threads that begin within the block connect as a role that may do so a few times only."""
    role = "kanthorq_few"
    with connection.cursor() as cursor:
        cursor.execute(f"DROP ROLE IF EXISTS {role}")  # of a run that was killed
        cursor.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT {connection_limit}")
        for kind in ("TABLES", "SEQUENCES"):
            cursor.execute(f"GRANT ALL ON ALL {kind} IN SCHEMA public TO {role}")
        host, port = connection.connection.info.host, connection.connection.info.port
        try:
            with default_database(HOST=host, PORT=str(port), USER=role):
                connect_anew()
                yield role
        finally:
            connect_anew()
            wait_until(lambda: not sessions_of(role), PATIENCE)
            cursor.execute(f"DROP OWNED BY {role}")
            cursor.execute(f"DROP ROLE {role}")


def connect_anew() -> None:
    """Let the thread of the ORM, which lives as long as the process, look at the settings."""

    def begin_anew() -> None:
        connections["default"].close()
        del connections["default"]

    SyncToAsync.single_thread_executor.submit(begin_anew).result(PATIENCE)


def sessions_of(role: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = %s", [role])
        return int(cursor.fetchone()[0])


def test_coroutines_use_up_no_attempt_where_connections_are_scarce(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(scarcity, "_refused_at", math.inf)  # somebody has been refused one

    @subscribe("work.>", stream="work", consumer="books", retry=Never())
    async def book(message: Message) -> None:
        await Entry.objects.acreate(event_id=message.event.pk)

    announce(20)
    with role_with(connection_limit=2), working("books", concurrency=2, batch_size=2):
        wait_for_state(TaskState.COMPLETED, 20)
    assert not Task.objects.exclude(attempt_count=1).exists()


def test_a_refresh_that_somebody_cancelled_before_it_began_is_lined_up_anew():
    """As a handler may that cancels all tasks it finds: no connection would be refreshed again."""

    async def line_up() -> list[bool]:
        orm = orm_thread.OrmThread(nullcontext, lambda: True, lambda: None)
        first = orm.line_up_refresh()
        lined_up = [orm.line_up_refresh() is first]
        first.cancel()
        await asyncio.wait({first})
        await asyncio.sleep(0)  # for who is told of its end
        second = orm.line_up_refresh()
        second.cancel()
        await asyncio.wait({second})
        return [*lined_up, second is first]

    assert asyncio.run(line_up()) == [True, False]


def refreshed(count: int = 1, *, are_suspect: bool = False) -> bool:
    """Have a busy thread refresh connections; return whether it is connected afterwards."""

    async def refresh() -> bool:
        orm = orm_thread.OrmThread(nullcontext, lambda: False, lambda: None)
        orm.are_suspect = are_suspect
        for _ in range(count):
            await orm.line_up_refresh()
        return await sync_to_async(lambda: connections["default"].connection is not None)()

    return asyncio.run(refresh())


def test_sessions_are_suspect_until_the_next_refresh(monkeypatch: pytest.MonkeyPatch):
    """Or each would be replaced, for as long as the worker runs."""
    told: list[bool] = []
    monkeypatch.setattr(
        orm_thread,
        "refresh_connections",
        lambda *_, are_suspect, **__: told.append(are_suspect),
    )
    refreshed(2, are_suspect=True)
    assert told == [True, False]


@pytest.mark.parametrize(("size", "is_made"), [(1, False), (2, True)])
def test_the_only_connection_of_a_pool_is_left_to_who_writes_verdicts(
    monkeypatch: pytest.MonkeyPatch, size: int, *, is_made: bool
):
    monkeypatch.setattr(scarcity, "_refused_at", math.inf)
    monkeypatch.setattr(orm_thread, "pool_size", lambda _: size)
    connect_anew()
    try:
        assert refreshed() is is_made
    finally:
        connect_anew()


def test_a_connection_that_a_receiver_did_not_set_up_is_for_no_coroutine(
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(**_: object) -> None:
        raise LookupError

    monkeypatch.setattr(scarcity, "_refused_at", math.inf)
    connect_anew()
    try:
        with heard_by(refuse, connection_created):
            assert not refreshed()
    finally:
        connect_anew()
