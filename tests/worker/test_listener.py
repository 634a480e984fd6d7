"""A listener that is deaf, hears what is not meant for it, or has lost its connection."""

import math
import threading
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import OperationalError, connection, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.backends.signals import connection_created

from kanthorq_django.models import TaskState
from kanthorq_django.worker import listener
from kanthorq_django.worker.connections import scarcity
from tests.concurrency import wait_until
from tests.quick_run import sooner
from tests.receivers import heard_by
from tests.worker.outages import behind_a_proxy, cut_soon, end
from tests.worker.working import (
    PATIENCE,
    accept,
    announce,
    backends,
    default_database,
    wait_for_state,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)

SHORT = timedelta(seconds=1)
LONG = timedelta(minutes=1)


@pytest.mark.parametrize("run", sooner(range(3), 0))
def test_a_listener_whose_backend_was_ended_listens_again(
    run: int, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "kanthorq_django.worker")
    accept("plain")

    with working("plain", listen=True, poll_interval=LONG):
        announce()
        wait_for_state(TaskState.COMPLETED)
        listening = _listening()
        end(listening)
        wait_until(lambda: _listening() - listening, PATIENCE)
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
        wait_until(lambda: "listener works again" in caplog.text, PATIENCE)


def _listening() -> set[int]:
    """Return the backends that last said something to a channel of their own."""
    return {*backends("pg_notify("), *backends("LISTEN ")}


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


def test_a_listener_calls_itself_every_now_and_then_and_waits_for_the_answer(
    monkeypatch: pytest.MonkeyPatch,
):
    now = [0.0]
    monkeypatch.setattr(listener, "time", SimpleNamespace(monotonic=lambda: now[0]))
    call = listener._Call()
    assert call.is_due()
    for _ in range(2):
        call.made()
        now[0] += listener.ANSWER_WITHIN
        assert not call.is_due()
        call.answered()
        assert not call.is_due()
        now[0] += listener.CALL_EVERY
        assert call.is_due()
    call.made()
    now[0] += listener.ANSWER_WITHIN + 0.1
    with pytest.raises(OperationalError, match="notifications do not arrive"):
        call.is_due()


def test_a_listener_that_hears_nothing_warns_and_polling_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    """As behind a pooler in transaction mode: LISTEN is accepted, and nothing ever arrives."""
    monkeypatch.setattr(listener, "ANSWER_WITHIN", 0.2)
    monkeypatch.setattr(listener.Listener, "_subscribe", lambda *_: False)  # it never listens
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


def test_a_listener_is_in_no_transaction_whatever_its_database_prefers():
    """It would hear nothing, and hold up the queue of notifications of the whole cluster."""
    with default_database(AUTOCOMMIT=False), unstarted()._connected() as found:
        assert found.connection.autocommit


@pytest.mark.parametrize("is_pooled", [False, True])
def test_a_listener_calls_itself_from_another_session_behind_a_pooler(
    monkeypatch: pytest.MonkeyPatch, *, is_pooled: bool
):
    """Else the pooler may take the very session that listens, which hears that, and only that."""
    called_from: list[BaseDatabaseWrapper] = []
    monkeypatch.setattr(
        listener.Listener, "_notify", lambda _, session: called_from.append(session)
    )
    made = unstarted()
    with made._connected() as listening:
        made._call_ourselves(listening, is_pooled=is_pooled)
        assert [each is not listening for each in called_from] == [is_pooled]


def unstarted() -> listener.Listener:
    return listener.Listener("default", [], lambda _: None, lambda: None, bounded=nullcontext)


def test_a_listener_takes_no_connection_where_they_are_scarce_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    connect, asked_by = DatabaseWrapper.get_new_connection, list[str]()

    def noted(wrapper: DatabaseWrapper, params: Any) -> Any:
        asked_by.append(threading.current_thread().name)
        return connect(wrapper, params)

    monkeypatch.setattr(DatabaseWrapper, "get_new_connection", noted)
    monkeypatch.setattr(scarcity, "_refused_at", math.inf)  # as with a small pool
    accept("plain")
    with working("plain", listen=True):
        announce()
        wait_for_state(TaskState.COMPLETED)
        wait_until(lambda: "listener interrupted" in caplog.text, PATIENCE)
        threading.Event().wait(0.5)  # for a second try
    assert asked_by
    assert "kanthorq-listener" not in asked_by
    assert caplog.text.count("connections are scarce") == 1


def test_a_listener_gives_its_connection_back_once_they_are_scarce(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(scarcity, "_refused_at", -math.inf)
    accept("plain")
    with working("plain", listen=True):
        wait_until(_listening, PATIENCE)
        monkeypatch.setattr(scarcity, "_refused_at", math.inf)
        wait_until(lambda: "connections are scarce" in caplog.text, PATIENCE)
        wait_until(lambda: not _listening(), PATIENCE)
        announce()
        wait_for_state(TaskState.COMPLETED)


def test_a_listener_passes_over_channels_of_the_project(caplog: pytest.LogCaptureFixture):
    def listen_as_well(connection: BaseDatabaseWrapper, **_: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("LISTEN cache_of_the_project")

    accept("plain")
    listens = working("plain", listen=True, poll_interval=LONG)
    with heard_by(listen_as_well, connection_created), listens:
        announce()
        wait_for_state(TaskState.COMPLETED)
        wait_until(_listening, PATIENCE)
        listening = _listening()
        with connection.cursor() as cursor:
            cursor.execute("NOTIFY cache_of_the_project")
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
        assert _listening() == listening
    assert "listener" not in caplog.text
