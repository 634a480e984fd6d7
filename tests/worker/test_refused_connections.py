"""What may come in the way of a connection that a handler is to be given."""

import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, OperationalError, connection, connections
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.backends.signals import connection_created

from kanthorq_django import Fixed, Never, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState
from kanthorq_django.worker import scarcity
from kanthorq_django.worker.scarcity import REFUSED_PAUSE
from tests.errors import Abort
from tests.worker.working import accept, announce, wait_for_state, work_off, working

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
    connection_created.connect(refuse)
    try:
        with working("plain", concurrency=1):
            announce()
            wait_for_state(TaskState.COMPLETED)
            armed.set()
            announce()
            wait_for_state(TaskState.COMPLETED, 2)
    finally:
        connection_created.disconnect(refuse)
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


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_second_database_that_is_away_is_waited_for_by_who_uses_it_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    connection.ensure_connection()
    info = connection.connection.info
    place = place_of(info, "1")  # where nobody answers
    monkeypatch.setitem(connections.settings, "other", place)

    @subscribe("report.>", stream="work", consumer="reports", retry=Fixed(timedelta(0)))
    def report(message: Message) -> None:
        connections["other"].ensure_connection()

    accept("plain")
    announce(3, "report.due")
    with working("reports", "plain", concurrency=1):
        wait_for_state(TaskState.RETRYABLE)
        announce(10)
        wait_for_state(TaskState.COMPLETED, 10, consumer__name="plain")
        place["PORT"] = str(info.port)
        wait_for_state(TaskState.COMPLETED, 3, consumer__name="reports")
    # The first that met it is all that it cost.
    attempts = Task.objects.values_list("attempt_count", flat=True)
    assert sorted(attempts) == [1] * 12 + [2]


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
