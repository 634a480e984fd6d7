"""Connections that end: each part of a worker heals by itself."""

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction

from kanthorq_django import Fixed, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Task, TaskState, Worker
from kanthorq_django.models.delivery.cursor import peek
from kanthorq_django.worker import loop, persistence, puller, renewer
from kanthorq_django.worker.connections import upkeep
from tests.concurrency import elsewhere, wait_until
from tests.ledger.models import Entry
from tests.quick_run import sooner
from tests.worker.outages import Gated, behind_a_proxy, end
from tests.worker.working import (
    ACK,
    LOOK,
    PATIENCE,
    RENEWAL,
    accept,
    announce,
    backends,
    terminate,
    wait_for_state,
    working,
)

pytestmark = pytest.mark.django_db(transaction=True)

SHORT = timedelta(seconds=1)
LONG = timedelta(minutes=1)


@pytest.mark.parametrize("run", sooner(range(3), 0))
def test_a_puller_whose_backend_was_ended_goes_on(run: int):
    accept("plain")

    with working("plain"):
        terminate(LOOK)
        announce()
        wait_for_state(TaskState.COMPLETED)


def test_a_puller_that_fails_looks_again_after_pauses_that_grow(monkeypatch: pytest.MonkeyPatch):
    moments: list[float] = []

    def refuse(*args: Any, **kwargs: Any) -> list[Any]:
        moments.append(time.monotonic())
        if len(moments) <= 3:
            raise OperationalError("not now")
        return peek(*args, **kwargs)

    monkeypatch.setattr(puller, "peek", refuse)
    accept("plain")
    announce()
    with working("plain"):
        wait_for_state(TaskState.COMPLETED)
    for begun_at, next_at, pause in zip(moments, moments[1:], (0.1, 0.2, 0.4), strict=False):
        assert next_at - begun_at >= pause / 2  # the least that chance makes of it


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


def test_an_acknowledger_whose_connection_was_lost_at_rest_takes_a_new_one_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(persistence, "CHECK_AFTER_IDLE", 0.0)
    accept("plain")

    with working("plain"):
        announce()
        wait_for_state(TaskState.COMPLETED)
        terminate(ACK)
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
    assert "acknowledger" not in caplog.text


def test_a_connection_that_is_lost_again_and_again_was_not_lost_at_rest(
    monkeypatch: pytest.MonkeyPatch,
):
    """In an outage a new one is not taken at once each time."""
    monkeypatch.setattr(persistence, "CHECK_AFTER_IDLE", 0.0)
    moments: list[float] = []

    def try_in_vain() -> None:
        keeper = persistence.Persistence(
            "keeper", "default", contextlib.nullcontext, is_patient=True
        )

        def write(given: Sequence[Any]) -> None:
            moments.append(time.monotonic())
            if len(moments) == 4:
                keeper.give_up()
            connection.ensure_connection()
            connection.connection.close()
            raise OperationalError("the connection is lost")

        assert keeper.refusal_of(write, ["verdict"]) is None

    elsewhere(try_in_vain)
    assert len(moments) == 4
    assert moments[3] - moments[2] >= 0.1  # at least, of pauses that double from there


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
    handler: Callable[[Message], Any], atomic: bool, last: str, monkeypatch: pytest.MonkeyPatch
):
    subscribe("work.>", stream="work", consumer="counts", atomic=atomic)(handler)
    announce()
    with working("counts", concurrency=1):
        wait_for_state(TaskState.COMPLETED)
        terminate(last)
        monkeypatch.setattr(upkeep, "CHECK_AFTER_IDLE", 0.0)  # as if it had rested for long
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
        end(set(backends("")))
        announce()
        wait_for_state(TaskState.COMPLETED, 2)
        gated.gate.set()
        wait_for_state(TaskState.COMPLETED, 3)
    assert set(Task.objects.values_list("attempt_count", flat=True)) == {1}


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


def test_a_renewer_says_that_it_works_again_when_the_database_has_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A step that had nothing to ask proves nothing."""
    caplog.set_level("INFO", "kanthorq_django.worker")
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
