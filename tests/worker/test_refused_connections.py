"""What may come in the way of a connection that a handler is to be given."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import DatabaseError, OperationalError, connection, connections
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.backends.signals import connection_created
from django.db.models import Q

from kanthorq_django import Fixed, Never, publish_many, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Event, Task, TaskState
from kanthorq_django.worker.connections import absences, own_connections, scarcity
from kanthorq_django.worker.connections.absences import TRIED_EVERY, OtherDatabaseAway
from kanthorq_django.worker.connections.scarcity import REFUSED_PAUSE
from kanthorq_django.worker.connections.upkeep import refresh_connections
from tests.concurrency import wait_until
from tests.errors import Abort
from tests.receivers import heard_by
from tests.worker.working import (
    PATIENCE,
    accept,
    announce,
    wait_for_state,
    work_off,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("error", [ValueError("no such role"), Abort()])
def test_a_receiver_that_fails_on_a_new_connection_ends_no_handler_thread(error: BaseException):
    refused: list[str] = []
    made_later: list[str] = []

    @subscribe("work.>", stream="work", consumer="plain")
    def handle(message: Message) -> None:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        except DatabaseError:
            return

    def refuse(**_: Any) -> None:
        name = threading.current_thread().name
        if not (name.startswith("kanthorq-handler") and armed.is_set()):
            return
        if not refused:
            refused.append(name)
            raise error
        made_later.append(name)

    armed = threading.Event()
    with heard_by(refuse, connection_created), working("plain", concurrency=1):
        announce()
        wait_for_state(TaskState.COMPLETED)
        armed.set()
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
    assert refused
    assert made_later, "a connection was used that a receiver had not set up"
    assert not Task.objects.exclude(attempt_count=1).exists()


def test_a_first_connection_that_is_refused_costs_an_atomic_handler_no_attempt(
    monkeypatch: pytest.MonkeyPatch,
):
    refusals = [OperationalError("the server is away")] * 2
    moments: list[float] = []
    connect = DatabaseWrapper.get_new_connection

    def refuse(wrapper: DatabaseWrapper, params: Any) -> Any:
        if threading.current_thread().name.startswith("kanthorq-handler") and refusals:
            moments.append(time.monotonic())
            raise refusals.pop()
        return connect(wrapper, params)

    @subscribe("work.>", stream="work", consumer="atomic", atomic=True, retry=Never())
    def handle(message: Message) -> None:
        """Do nothing: its transaction is what fails."""

    announce()
    with monkeypatch.context() as patch:
        patch.setattr(DatabaseWrapper, "get_new_connection", refuse)
        handled_count = work_off("atomic", concurrency=1)
    assert not refusals
    assert handled_count == 1, "what was not started is no start"
    assert moments[1] - moments[0] >= REFUSED_PAUSE
    assert Task.objects.completed().get().attempt_count == 1


def place_of(connection_info: Any, port: str) -> dict[str, Any]:
    place: dict[str, Any] = connections.settings["other"] | {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": connection_info.dbname,
        "USER": connection_info.user,
        "HOST": connection_info.host,
        "PORT": port,
    }
    return place


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_second_database_that_the_project_has_taken_away_is_waited_for_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
):
    connection.ensure_connection()
    info = connection.connection.info
    monkeypatch.setitem(connections.settings, "other", place_of(info, str(info.port)))

    @subscribe("report.>", stream="work", consumer="reports")
    def report(message: Message) -> None:
        if message.event.subject == "report.end":
            connections.settings.pop("other")
        if message.event.subject != "report.due":
            with suppress(DatabaseError), connections["other"].cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with working("reports", concurrency=1):
        for count, step in enumerate(["begin", "due", "end", "due"], 1):
            announce(1, f"report.{step}")
            wait_for_state(TaskState.COMPLETED, count)


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let the other database be where nobody answers; return its settings, to let it come back."""
    connection.ensure_connection()
    place = place_of(connection.connection.info, "1")
    monkeypatch.setitem(connections.settings, "other", place)
    monkeypatch.setattr(absences, "_rests", {})
    return place


def accept_reports(**options: Any) -> None:
    @subscribe("report.>", stream="work", consumer="reports", retry=Fixed(timedelta(0)), **options)
    def report(message: Message) -> None:
        connections["other"].ensure_connection()
        message.ack(message.event.json())


def wait_for_failure() -> None:
    """Wait until somebody has met the database that is away."""
    wait_until(Task.objects.exclude(attempted_errors=[]).exists, PATIENCE)


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_second_database_that_is_away_is_waited_for_by_who_uses_it_alone(
    unanswered: dict[str, Any],
):
    accept_reports()
    accept("plain")
    announce(3, "report.due")
    with working("reports", "plain", concurrency=1):
        wait_for_failure()
        announce(10)
        wait_for_state(TaskState.COMPLETED, 10, consumer__name="plain")
        unanswered["PORT"] = str(connection.connection.info.port)
        wait_for_state(TaskState.COMPLETED, 3, consumer__name="reports")
    # The first that met it is all that it cost.
    attempts = Task.objects.values_list("attempt_count", flat=True)
    assert sorted(attempts) == [1] * 12 + [2]


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_nor_is_one_that_is_taken_away_while_it_does_not_answer(unanswered: dict[str, Any]):
    @subscribe("report.>", stream="work", consumer="reports", retry=Fixed(timedelta(0)))
    def report(message: Message) -> None:
        if message.event.subject == "report.due":
            connections["other"].ensure_connection()

    announce(1, "report.due")
    with working("reports", concurrency=1):
        wait_until(absences.refused_aliases, PATIENCE)
        del connections.settings["other"]
        announce(1, "report.idle")
        wait_for_state(TaskState.COMPLETED)


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_many_tasks_that_need_a_database_which_is_away_keep_no_thread_from_others(
    unanswered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    refusals: list[float] = []
    connect = DatabaseWrapper.get_new_connection

    def refuse_slowly(wrapper: DatabaseWrapper, params: Any) -> Any:
        if wrapper.alias == "other":
            time.sleep(0.2)  # as where the host swallows packets
            refusals.append(time.monotonic())
        return connect(wrapper, params)

    accept_reports()
    accept("plain")
    announce(100, "report.due")
    with monkeypatch.context() as patch:
        patch.setattr(DatabaseWrapper, "get_new_connection", refuse_slowly)
        with working("reports", "plain", concurrency=1):
            wait_for_failure()
            began_at = time.monotonic()
            announce(100)
            wait_for_state(TaskState.COMPLETED, 100, consumer__name="plain")
            took = time.monotonic() - began_at
    assert took < 100 * REFUSED_PAUSE / 4
    assert len(refusals) <= 2 + took / TRIED_EVERY
    assert not Task.objects.filter(attempt_count__gt=1).exists()
    assert Task.objects.filter(attempt_count=1).count() == 100 + 1, "the first that met it"


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_strictly_serialized_tasks_keep_their_order_while_a_database_is_away(
    unanswered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(absences, "TRIED_EVERY", 0.0)  # or the last one would be put off as well
    accept_reports(serialize="strict")
    events = [Event(subject="report.due", body=n, resource_key="same") for n in range(6)]
    publish_many(events[:5], stream="work")
    with working("reports", concurrency=1):
        wait_for_failure()
        handed_back = Q(lease_epoch=2, state=TaskState.AVAILABLE) | Q(lease_epoch__gt=2)
        wait_until(Task.objects.filter(handed_back).exists, PATIENCE)
        unanswered["PORT"] = str(connection.connection.info.port)
        publish_many(events[5:], stream="work")  # which nothing has put off
        wait_for_state(TaskState.COMPLETED, 6)
    ended = Task.objects.order_by("finalized_at").values_list("result", flat=True)
    assert list(ended) == list(range(6))


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_who_is_connected_to_a_database_is_not_kept_from_it_by_who_was_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(absences, "_rests", {})
    wrapper = connections["other"]
    wrapper.close()
    with pytest.raises(OtherDatabaseAway), absences.tried(wrapper):
        raise OperationalError("the server is away")
    with pytest.raises(OtherDatabaseAway), absences.tried(wrapper):
        pytest.fail("it was tried again at once")
    wrapper.ensure_connection()
    with absences.tried(wrapper):
        pass
    assert "other" in absences.refused_aliases()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock for those who know which databases are away; call it to have seconds pass."""
    now = [time.monotonic()]
    monkeypatch.setattr(absences, "_rests", {})
    monkeypatch.setattr(absences, "time", SimpleNamespace(monotonic=lambda: now[0]))
    connections["other"].close()

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def refuse_after(seconds: float, clock: Callable[[float], None]) -> None:
    def connect() -> None:
        clock(seconds)
        raise OperationalError("the server is away")

    with pytest.raises(OtherDatabaseAway), absences.tried(connections["other"]):
        connect()


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_one_alone_finds_out_for_all_whether_a_database_is_back(clock: Callable[[float], None]):
    refuse_after(0, clock)
    clock(TRIED_EVERY)
    other = connections["other"]
    with absences.tried(other), pytest.raises(OtherDatabaseAway), absences.tried(other):
        pytest.fail("another one waits for it as well")
    with absences.tried(other):
        assert not absences.refused_aliases()


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_database_that_took_long_to_refuse_is_left_alone_for_longer(
    clock: Callable[[float], None],
):
    refuse_after(10, clock)
    clock(3 * 10 - 1)
    with pytest.raises(OtherDatabaseAway), absences.tried(connections["other"]):
        pytest.fail("most of the time goes into waiting for it")
    clock(1)
    with absences.tried(connections["other"]):
        pass


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_what_fails_otherwise_while_connecting_is_no_absence(clock: Callable[[float], None]):
    with pytest.raises(ValueError, match="such role"), absences.tried(connections["other"]):
        raise ValueError("no such role")
    assert not absences.refused_aliases()


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_another_database_without_a_connection_left_tells_all_others(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scarcity, "_refused_at", float("-inf"))
    with pytest.raises(OtherDatabaseAway), absences.tried(connections["other"]):
        raise OperationalError("sorry, too many clients already")
    assert scarcity.are_scarce()


@pytest.mark.parametrize("using", [None, "default"])
def test_the_tasks_own_database_is_tried_as_soon_as_it_is_needed(
    using: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(absences, "_rests", {})
    connect, tries = DatabaseWrapper.get_new_connection, []

    def refuse_once(wrapper: DatabaseWrapper, params: Any) -> Any:
        tries.append(wrapper.alias)
        if len(tries) == 1:
            raise OperationalError("the server is away")
        return connect(wrapper, params)

    def refresh() -> None:
        own_connections.miss("default")
        with pytest.raises(OperationalError, match="is away"):
            refresh_connections(nullcontext, using=using)
        refresh_connections(nullcontext, using=using)
        connections.close_all()

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(DatabaseWrapper, "get_new_connection", refuse_once)
        pool.submit(refresh).result(PATIENCE)
    assert tries == ["default"] * 2
    assert not absences.refused_aliases()


def test_a_handlers_thread_that_is_left_without_a_connection_tells_all_others(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(scarcity, "_refused_at", float("-inf"))
    connect, refused = DatabaseWrapper.get_new_connection, threading.Event()

    def refuse(wrapper: DatabaseWrapper, params: Any) -> Any:
        if threading.current_thread().name.startswith("kanthorq-handler") and not refused.is_set():
            refused.set()
            raise OperationalError("sorry, too many clients already")
        return connect(wrapper, params)

    subscribe("work.>", stream="work", consumer="atomic", atomic=True)(lambda message: None)
    announce()
    with monkeypatch.context() as patch:
        patch.setattr(DatabaseWrapper, "get_new_connection", refuse)
        work_off("atomic", concurrency=1)
    assert refused.is_set()
    assert scarcity.are_scarce()


def test_a_handler_that_is_left_without_a_connection_tells_all_others(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(scarcity, "_refused_at", float("-inf"))

    @subscribe("work.>", stream="work", consumer="plain", retry=Never())
    def handle(message: Message) -> None:
        raise OperationalError("sorry, too many clients already")

    announce()
    work_off("plain", concurrency=1)
    assert scarcity.are_scarce()
