"""Sessions that answer and are broken all the same: what a handler spoilt, or a wrong default."""

import asyncio
import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.db import (
    DatabaseError,
    IntegrityError,
    ProgrammingError,
    connection,
    connections,
    transaction,
)
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from psycopg.errors import (
    DeadlockDetected,
    NumericValueOutOfRange,
    SerializationFailure,
    UndefinedTable,
    UniqueViolation,
)
from pytest_django import Settings

from kanthorq_django import Fixed, Never, publish, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Stream, Task, TaskState, Worker
from kanthorq_django.models.delivery import lease
from kanthorq_django.subscribers import find, sync
from kanthorq_django.worker import group_commit
from kanthorq_django.worker.connections import suspicion, upkeep
from kanthorq_django.worker.connections.suspicion import (
    are_held,
    replace_suspect_connections,
    suspect_sessions,
    take_suspicion,
)
from kanthorq_django.worker.connections.upkeep import (
    drop_connections,
    refresh_connections,
    spare_connections,
)
from kanthorq_django.worker.endings import Nack
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.group_commit import execute_together
from tests.concurrency import elsewhere, wait_until
from tests.ledger.models import Entry
from tests.receivers import heard_by
from tests.worker.working import (
    ACK,
    PATIENCE,
    accept,
    announce,
    terminate,
    wait_for_state,
    work_off,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)

AT_ONCE = Fixed(timedelta(0), attempt_max=3)
LONG = timedelta(hours=1)
PATIENT = Fixed(timedelta(milliseconds=50), attempt_max=1_000)


def run_sql(statement: str) -> Callable[[], None]:
    def spoil() -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement)

    return spoil


SPOILING = {
    "search_path": run_sql("SET search_path = nowhere"),
    "role": run_sql("SET ROLE pg_monitor"),
    "a table that lacks columns": run_sql("CREATE TEMP TABLE kanthorq_django_task (id bigint)"),
    "a table that lacks rows": run_sql(
        "CREATE TEMP TABLE kanthorq_django_task (LIKE kanthorq_django_task)"
    ),
}


@pytest.mark.parametrize("spoil", SPOILING.values(), ids=SPOILING.keys())
@pytest.mark.parametrize(("atomic", "group_size"), [(False, 1), (True, 1), (True, 20)])
def test_a_session_that_a_handler_spoilt_costs_one_attempt(
    spoil: Callable[[], None], atomic: bool, group_size: int, settings: Settings
):
    settings.KANTHORQ = {"GROUP_COMMIT": group_size}
    is_spoilt = threading.Event()

    @subscribe("work.>", stream="work", consumer="spoils", atomic=atomic, retry=AT_ONCE)
    def handle(message: Message) -> None:
        with transaction.atomic():
            Entry.objects.create(event_id=message.event.pk)
            if not atomic:
                message.ack()
            if not is_spoilt.is_set():
                transaction.on_commit(spoil)
                is_spoilt.set()

    with working("spoils", concurrency=1):
        announce()
        wait_for_state(TaskState.COMPLETED)
        announce(9)
        wait_for_state(TaskState.COMPLETED, 10)
    assert Entry.objects.count() == 10
    assert attempt_count() <= 12


def attempt_count() -> int:
    return sum(Task.objects.values_list("attempt_count", flat=True))


@pytest.mark.parametrize("spoil", [SPOILING["search_path"], SPOILING["role"]])
def test_a_session_that_a_coroutine_spoilt_costs_one_attempt(spoil: Callable[[], None]):
    is_spoilt = threading.Event()

    @subscribe("work.>", stream="work", consumer="spoils", retry=AT_ONCE)
    async def handle(message: Message) -> None:
        await sync_to_async(book)(message)
        if not is_spoilt.is_set():
            is_spoilt.set()
            await sync_to_async(spoil)()

    def book(message: Message) -> None:
        with transaction.atomic():  # whose rollback has Django forget that there was an error
            Entry.objects.create(event_id=message.event.pk)

    announce(10)
    with working("spoils", concurrency=1):
        wait_for_state(TaskState.COMPLETED, 10)
    assert attempt_count() == 11


def test_a_session_that_is_spoilt_soon_after_another_is_replaced_as_well():
    """Not within the same moment, so that a patient retry is not used up."""
    spoilt: list[int] = []
    patient = Fixed(timedelta(milliseconds=300), attempt_max=3)

    @subscribe("work.>", stream="work", consumer="spoils", retry=patient)
    def handle(message: Message) -> None:
        with transaction.atomic():
            Entry.objects.create(event_id=message.event.pk)
        if len(spoilt) < 2:
            spoilt.append(message.event.json())
            SPOILING["role"]()

    announce(10)
    with working("spoils", concurrency=1):
        wait_for_state(TaskState.COMPLETED, 10)
    assert len(spoilt) == 2


def test_a_session_whose_errors_a_handler_swallows_is_replaced():
    is_spoilt = threading.Event()

    @subscribe("work.>", stream="work", consumer="spoils", retry=AT_ONCE)
    def handle(message: Message) -> None:
        try:
            Entry.objects.create(event_id=message.event.pk)
        except DatabaseError:
            message.nack("not now")
        if not is_spoilt.is_set():
            is_spoilt.set()
            SPOILING["role"]()

    announce(10)
    with working("spoils", concurrency=1):
        wait_for_state(TaskState.COMPLETED, 10)
    assert attempt_count() == 11


@pytest.mark.parametrize("says_so", [True, False])
def test_an_error_that_a_handler_translates_is_known_for_the_databases(*, says_so: bool):
    is_spoilt = threading.Event()

    @subscribe("work.>", stream="work", consumer="spoils", retry=AT_ONCE)
    def handle(message: Message) -> None:
        try:
            with transaction.atomic():
                Entry.objects.create(event_id=message.event.pk)
        except DatabaseError as error:
            if says_so:
                raise ValueError("it cannot be booked") from error
            raise ValueError("it cannot be booked")  # noqa: B904  # as many leave out to
        if not is_spoilt.is_set():
            is_spoilt.set()
            SPOILING["role"]()

    announce(10)
    with working("spoils", concurrency=1):
        wait_for_state(TaskState.COMPLETED, 10)
    assert attempt_count() == 11


def test_tasks_of_a_group_are_not_failed_one_after_the_other_by_a_spoilt_session(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    """Each of them is undone by its savepoint, so nothing but its end tells of the session."""
    settings.KANTHORQ = {"GROUP_COMMIT": 20}
    monkeypatch.setattr(group_commit, "_careful_until", {"spoils": math.inf})
    is_spoilt = threading.Event()

    @subscribe("work.>", stream="work", consumer="spoils", atomic=True, retry=AT_ONCE)
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk)
        if not is_spoilt.is_set():
            transaction.on_commit(run_sql("SET search_path = pg_temp, public"))
            transaction.on_commit(run_sql("CREATE TEMP TABLE ledger_entry (nothing int)"))
            is_spoilt.set()

    with working("spoils", concurrency=1):
        announce()
        wait_for_state(TaskState.COMPLETED)
        announce(40)
        wait_for_state(TaskState.COMPLETED, 41)
    assert attempt_count() == 42


@pytest.mark.parametrize("table", ["a table that lacks columns", "a table that lacks rows"])
def test_a_group_that_a_spoilt_session_does_not_let_end_costs_nobody_an_attempt(
    table: str, monkeypatch: pytest.MonkeyPatch
):
    """All of it is run again, in a new session."""
    monkeypatch.setattr(group_commit, "_careful_until", {})
    monkeypatch.setattr(group_commit, "SHARED_SECONDS", PATIENCE)
    accept("grouped", atomic=True)
    (consumer,) = sync(["grouped"])
    announce(3)
    flights = [Flight(task, find("grouped"), time.monotonic()) for task in consumer.pull(3)]

    def handle_together() -> tuple[list[Flight], bool]:
        SPOILING[table]()
        endings, spoilt = execute_together(flights[0], iter(flights[1:]))
        assert not endings
        return spoilt, take_suspicion()

    assert elsewhere(handle_together) == (flights, True)


def test_a_shared_transaction_begins_no_further_task_in_a_session_that_may_be_spoilt(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(group_commit, "_careful_until", {"grouped": math.inf})
    monkeypatch.setattr(group_commit, "SHARED_SECONDS", PATIENCE)

    @subscribe("work.>", stream="work", consumer="grouped", atomic=True)
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk)

    (consumer,) = sync(["grouped"])
    announce(3)
    flights = [Flight(task, find("grouped"), time.monotonic()) for task in consumer.pull(3)]

    def handle_together() -> None:
        run_sql("SET search_path = pg_temp, public")()
        run_sql("CREATE TEMP TABLE ledger_entry (nothing int)")()
        others = iter(flights[1:])
        (ending,), spoilt = execute_together(flights[0], others)
        assert isinstance(ending, Nack)
        assert not spoilt
        assert list(others) == flights[1:]

    elsewhere(handle_together)


def test_a_thread_whose_handlers_all_fail_takes_a_new_session_now_and_then_only():
    """What they write would be refused in any: to connect each time would take as long again."""
    made: list[object] = []
    moments: list[float] = []

    def note(connection: BaseDatabaseWrapper, **_: object) -> None:
        if threading.current_thread().name.startswith("kanthorq-handler"):
            made.append(connection.connection)

    @subscribe("work.>", stream="work", consumer="fails", retry=Fixed(LONG))
    def handle(message: Message) -> None:
        moments.append(time.monotonic())
        Stream.objects.create(name="work")  # of which there is one

    announce(400)
    with heard_by(note, connection_created):
        work_off("fails", concurrency=1)
    assert Task.objects.filter(state=TaskState.RETRYABLE).count() == 400
    # After pauses that have doubled from 0.03 to 1 second.
    assert len(made) <= 8 + (moments[-1] - moments[0]) / suspicion.REPLACED_EVERY


def test_values_that_are_refused_cost_no_session():
    pids: set[int] = set()

    @subscribe("work.>", stream="work", consumer="fails", retry=Fixed(LONG))
    def handle(message: Message) -> None:
        connection.ensure_connection()
        pids.add(connection.connection.info.backend_pid)
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 / 0")

    announce(10)
    work_off("fails", concurrency=1)
    assert len(pids) == 1


def test_a_suspect_session_is_closed_and_not_given_back_to_a_pool(
    monkeypatch: pytest.MonkeyPatch,
):
    given_back: list[Any] = []

    def suspect_and(leave: Callable[[], object]) -> None:
        connection.ensure_connection()
        wrapper: Any = connections["default"]
        wrapper._close = lambda: given_back.append(wrapper.connection)
        error = ProgrammingError("relation does not exist")
        error.__cause__ = UndefinedTable()
        suspect_sessions(error)
        leave()

    monkeypatch.setattr(upkeep, "are_scarce", lambda: True)
    for leave in (
        replace_suspect_connections,
        drop_connections,
        spare_connections,
        lambda: refresh_connections(contextlib.nullcontext),
    ):
        elsewhere(functools.partial(suspect_and, leave))
    assert [raw.closed for raw in given_back] == [True] * 4


@contextmanager
def new_sessions_with(setting: str, value: str) -> Iterator[None]:
    """Let sessions that are made within the block begin with a setting; those that exist do not."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_database()")
        name = connection.ops.quote_name(cursor.fetchone()[0])
        cursor.execute(f"ALTER DATABASE {name} SET {setting} = '{value}'")
        try:
            yield
        finally:
            cursor.execute(f"ALTER DATABASE {name} RESET {setting}")


WRONG_DEFAULTS = [("search_path", "nowhere"), ("role", "pg_monitor")]


@pytest.mark.parametrize(("setting", "value"), WRONG_DEFAULTS)
@pytest.mark.parametrize("atomic", [False, True])
def test_handlers_get_over_a_wrong_default_of_sessions(
    setting: str, value: str, atomic: bool, caplog: pytest.LogCaptureFixture
):
    @subscribe("work.>", stream="work", consumer="writes", retry=PATIENT, atomic=atomic)
    def handle(message: Message) -> None:
        Entry.objects.create(event_id=message.event.pk)

    with working("writes", concurrency=1):
        wait_until(Worker.objects.exists, PATIENCE)
        with new_sessions_with(setting, value):
            announce()  # the thread's connection is made for it
            wait_until(lambda: "failed: ProgrammingError" in caplog.text, PATIENCE)
        wait_for_state(TaskState.COMPLETED)
    assert Entry.objects.count() == 1


@pytest.mark.parametrize(("setting", "value"), WRONG_DEFAULTS)
def test_an_acknowledger_loses_no_verdict_by_a_wrong_default_of_sessions(
    setting: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    written, refused = lease.ack, []

    def ack(*given: Any, **options: Any) -> set[int]:
        try:
            return written(*given, **options)
        except ProgrammingError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(lease, "ack", ack)
    accept("plain")
    with working("plain"):
        announce()
        wait_for_state(TaskState.COMPLETED)
        with new_sessions_with(setting, value):
            terminate(ACK)
            announce(20)
            wait_until(lambda: len(refused) > 2, PATIENCE)
        wait_for_state(TaskState.COMPLETED, 21)
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}
    assert "could not be written" not in caplog.text


def test_a_puller_gets_over_a_default_with_which_it_can_look_and_not_lease(
    caplog: pytest.LogCaptureFixture,
):
    accept("plain")
    with working("plain"):
        announce()
        wait_for_state(TaskState.COMPLETED)
        with new_sessions_with("role", "pg_read_all_data"):
            terminate("")
            announce()
            wait_until(lambda: "consumer plain interrupted" in caplog.text, PATIENCE)
        wait_for_state(TaskState.COMPLETED, 2)


def test_what_breaks_a_constraint_costs_no_connection():
    """Many handlers go by that, to find out what they have done already."""
    sessions: set[int] = set()

    @subscribe("work.>", stream="work", consumer="repeats", retry=AT_ONCE)
    def handle(message: Message) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            sessions.add(cursor.fetchone()[0])
        raise IntegrityError("done already") from UniqueViolation()

    announce(5)
    with working("repeats", concurrency=1):
        wait_for_state(TaskState.DISCARDED, 5)
    assert len(sessions) == 1


HELD = {
    "a cursor": "DECLARE walk CURSOR WITH HOLD FOR SELECT 1",
    "a lock": "SELECT pg_advisory_lock(17)",
}


@pytest.mark.parametrize("statement", HELD.values(), ids=HELD.keys())
def test_a_session_that_coroutines_share_is_kept_while_one_of_them_holds_something(statement: str):
    def answers() -> list[bool]:
        found = [are_held(contextlib.nullcontext)]
        connection.ensure_connection()
        found.append(are_held(contextlib.nullcontext))
        run_sql(statement)()
        return [*found, are_held(contextlib.nullcontext)]

    assert elsewhere(answers) == [False, False, True]


@pytest.mark.parametrize(
    ("error", "is_suspect"),
    [
        (UndefinedTable(), True),
        (UniqueViolation(), False),
        (DeadlockDetected(), False),
        (SerializationFailure(), False),
        (NumericValueOutOfRange(), False),
        (None, False),
    ],
)
def test_only_an_error_that_another_session_might_not_meet_makes_one_suspect(
    error: psycopg.Error | None, is_suspect: bool
):
    def told() -> bool:
        kind = IntegrityError if isinstance(error, UniqueViolation) else DatabaseError
        failure = kind("no")
        failure.__cause__ = error
        suspect_sessions(failure)
        return take_suspicion()

    assert elsewhere(told) is is_suspect


@pytest.mark.parametrize("are_scarce", [False, True])
def test_a_coroutine_between_two_reads_keeps_its_session_though_another_fails(
    are_scarce: bool, monkeypatch: pytest.MonkeyPatch
):
    """They share one, where the third one's start sees to connections."""
    monkeypatch.setattr(upkeep, "are_scarce", lambda: are_scarce)
    Entry.objects.bulk_create(Entry(event_id=uuid4()) for _ in range(3))
    is_reading, may_go_on = threading.Event(), threading.Event()

    @subscribe("walk.due", stream="work", consumer="walks", retry=Never())
    async def walk(message: Message) -> None:
        async for _ in Entry.objects.aiterator(chunk_size=1):
            is_reading.set()
            await asyncio.to_thread(may_go_on.wait, PATIENCE)

    @subscribe("fail.due", stream="work", consumer="fails", retry=Never())
    async def fail(message: Message) -> None:
        await sync_to_async(run_sql("SELECT * FROM nowhere"))()

    @subscribe("rest.due", stream="work", consumer="rests")
    async def rest(message: Message) -> None: ...

    with working("walks", "fails", "rests"):
        publish("walk.due", stream="work")
        assert is_reading.wait(PATIENCE)
        publish("fail.due", stream="work")
        wait_for_state(TaskState.DISCARDED, consumer__name="fails")
        publish("rest.due", stream="work")
        wait_for_state(TaskState.COMPLETED, consumer__name="rests")
        may_go_on.set()
        wait_for_state(TaskState.COMPLETED, consumer__name="walks")


def test_where_connections_are_scarce_what_fails_again_gets_no_new_session_each_time(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(upkeep, "are_scarce", lambda: True)
    monkeypatch.setattr(suspicion, "REPLACED_FIRST", PATIENCE)
    given_back: list[Any] = []

    def fail_again_and_again() -> None:
        for _ in range(3):
            connection.ensure_connection()
            wrapper: Any = connections["default"]
            wrapper._close = functools.partial(given_back.append, wrapper.connection)
            error = ProgrammingError("relation does not exist")
            error.__cause__ = UndefinedTable()
            suspect_sessions(error)
            spare_connections()

    elsewhere(fail_again_and_again)
    were_closed = [raw.closed for raw in given_back]
    for raw in given_back:
        raw.close()
    assert were_closed == [True, False, False]


def test_sessions_are_replaced_ever_more_rarely_for_as_long_as_that_goes_on(
    monkeypatch: pytest.MonkeyPatch,
):
    now, held = [0.0], suspicion._Suspicion()
    monkeypatch.setattr(suspicion, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(suspicion, "_suspicion", held)
    pauses = []
    for _ in range(8):
        suspicion._note_replaced()
        pauses.append(held.replace_after)
        now[0] += held.replace_after
    first, longest = suspicion.REPLACED_FIRST, suspicion.REPLACED_EVERY
    assert pauses[:3] == [first, 2 * first, 4 * first]
    assert pauses[-2:] == [longest] * 2
    now[0] += 2 * longest
    suspicion._note_replaced()
    assert held.replace_after == first
