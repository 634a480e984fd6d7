"""Statements that get no answer, as somebody holds what they want or the road swallows it."""

import contextlib
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psycopg
import pytest
from django.db import OperationalError, connection, transaction
from django.utils import timezone
from psycopg.pq import TransactionStatus

from kanthorq_django import Fixed, schedule, signals, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState, Worker
from kanthorq_django.worker import renewer, warden
from kanthorq_django.worker.flight import Flights
from tests.concurrency import elsewhere, wait_until
from tests.ledger.models import Entry
from tests.proxy import through_a_proxy
from tests.receivers import heard_by
from tests.worker.outages import Gated, behind_a_proxy, cut_soon
from tests.worker.working import (
    PATIENCE,
    accept,
    announce,
    default_database,
    wait_for_state,
    work_off,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)

SHORT = timedelta(seconds=1)


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
    with heard_by(take_time, signals.published), working("taker"):
        wait_for_state(TaskState.COMPLETED)


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


def test_each_statement_of_a_block_has_its_own_time_and_is_cancelled_once(
    monkeypatch: pytest.MonkeyPatch,
):
    now = [0.0]
    cancelled: list[object] = []
    ended: list[object] = []
    monkeypatch.setattr(warden, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(warden, "_cancel", cancelled.append)
    monkeypatch.setattr(warden, "_end", ended.append)
    watch, wrapper = warden.Warden(Flights(lambda: None), PATIENCE), Mock()

    def look_after(seconds: float, status: TransactionStatus) -> None:
        now[0] += seconds
        wrapper.connection.pgconn.transaction_status = status
        watch._end_waits()

    with watch.bounded(wrapper):
        for count in range(2):
            look_after(warden.CANCEL_AFTER - 1, TransactionStatus.ACTIVE)
            assert len(cancelled) == count
            look_after(1, TransactionStatus.ACTIVE)
            look_after(1, TransactionStatus.ACTIVE)
            assert len(cancelled) == count + 1
            look_after(1, TransactionStatus.INTRANS)  # it was answered
        assert not ended
        look_after(warden.CUT_AFTER, TransactionStatus.ACTIVE)
    assert ended == [wrapper]
