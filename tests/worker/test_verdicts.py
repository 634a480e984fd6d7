"""Verdicts that the database, or somebody's code, refuses."""

import secrets
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from django.db import transaction
from django.db.models import F
from django.db.models.functions import Now
from django.dispatch import Signal
from pytest_django import Settings

from kanthorq_django import Fixed, Snooze, signals, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Stream, Task, TaskState
from kanthorq_django.models.lease import Lease
from kanthorq_django.subscribers import sync
from kanthorq_django.worker.acknowledger import Acknowledger
from kanthorq_django.worker.endings import Ack, Ending
from tests.factories import TaskFactory
from tests.flights import settle
from tests.worker.working import accept, announce, forbidden, indexed, work_off

pytestmark = pytest.mark.django_db(transaction=True)


def states() -> Counter[int]:
    return Counter(Task.objects.values_list("state", flat=True))


def test_a_result_that_is_refused_does_not_take_others_with_it():
    @subscribe("work.>", stream="work", consumer="results")
    def handle(message: Message) -> dict[str, int]:
        return {"number": message.event.json()}

    announce(6)
    with forbidden("result ->> 'number' = '3'"):
        assert work_off("results") == 6

    assert states() == {TaskState.COMPLETED: 5, TaskState.DISCARDED: 1}
    refused = Task.objects.discarded().get()
    assert refused.event.json() == 3
    assert "refused to store the result" in refused.attempted_errors[0]["error"]


def test_a_result_that_exceeds_a_limit_of_the_database_does_not_hold_up_others():
    """PostgreSQL's code for it is of the family of those of a server that is away."""

    @subscribe("work.>", stream="work", consumer="results")
    def handle(message: Message) -> dict[str, str]:
        return {"text": secrets.token_hex(20_000 if message.event.json() == 3 else 1)}

    announce(6)
    with indexed("(result ->> 'text')"):
        assert work_off("results") == 6

    assert states() == {TaskState.COMPLETED: 5, TaskState.DISCARDED: 1}
    refused = Task.objects.discarded().get()
    assert "refused to store the result" in refused.attempted_errors[0]["error"]


def test_a_failure_that_is_refused_is_stored_without_its_text():
    @subscribe("work.>", stream="work", consumer="fails", retry=Fixed(timedelta(hours=1)))
    def handle(message: Message) -> None:
        raise ValueError(f"number {message.event.json()}")

    announce(4)
    with forbidden("attempted_errors ->> 0 LIKE '%number 2%'"):
        assert work_off("fails") == 4

    assert states() == {TaskState.RETRYABLE: 4}
    texts = [error["error"] for task in Task.objects.all() for error in task.attempted_errors]
    assert sum("refused to store the failure" in text for text in texts) == 1
    assert sum("ValueError: number" in text for text in texts) == 3


def test_snoozes_of_any_length_are_written_together():
    @subscribe("work.>", stream="work", consumer="snoozes")
    def handle(message: Message) -> None:
        raise Snooze(timedelta(minutes=message.event.json() % 3 + 1))

    announce(9)

    assert work_off("snoozes") == 9
    assert states() == {TaskState.AVAILABLE: 9}
    waits = Task.objects.values_list(F("schedule_at") - F("attempted_at"), flat=True)
    minutes = Counter(round(wait.total_seconds() / 60) for wait in waits)
    assert minutes == {1: 3, 2: 3, 3: 3}


@pytest.mark.parametrize("signal", [signals.acked, signals.nacked])
def test_a_receiver_that_raises_does_not_end_the_acknowledger(signal: Signal):
    def interfere(**_: object) -> None:
        raise ZeroDivisionError

    @subscribe("work.>", stream="work", consumer="watched", retry=Fixed(timedelta(hours=1)))
    def handle(message: Message) -> None:
        if message.event.json() % 2:
            raise ValueError("odd")

    announce(6)
    signal.connect(interfere)
    try:
        assert work_off("watched", concurrency=1) == 6
    finally:
        signal.disconnect(interfere)
    assert states() == {TaskState.COMPLETED: 3, TaskState.RETRYABLE: 3}


@pytest.mark.parametrize("options", [{}, {"atomic": True}, {"atomic": True, "batch": 3}])
def test_a_receiver_is_told_of_each_ack_once_whoever_wrote_it(options: dict[str, Any]):
    told: list[object] = []

    def note(message: Message, **_: object) -> None:
        told.append(message.event.pk)

    @subscribe("work.>", stream="work", consumer="watched", **options)
    def handle(message: Any) -> None:
        pass

    events = announce(6)
    signals.acked.connect(note)
    try:
        assert work_off("watched") == 6
    finally:
        signals.acked.disconnect(note)
    assert Counter(told) == Counter(event.pk for event in events)


@pytest.mark.parametrize("group_commit", [1, 20])
@pytest.mark.parametrize("options", [{}, {"batch": 3}])
def test_a_receiver_that_fails_takes_no_hook_from_an_atomic_handler(
    settings: Settings, group_commit: int, options: dict[str, Any]
):
    settings.KANTHORQ = {"GROUP_COMMIT": group_commit}
    hooks: list[int] = []

    def interfere(**_: object) -> None:
        Stream.objects.create(name="work")  # of which there is one

    @subscribe("work.>", stream="work", consumer="watched", atomic=True, **options)
    def handle(message: Any) -> None:
        transaction.on_commit(lambda: hooks.append(1))

    announce(3)
    signals.acked.connect(interfere)
    try:
        work_off("watched", concurrency=1)
    finally:
        signals.acked.disconnect(interfere)
    assert states() == {TaskState.COMPLETED: 3}
    assert len(hooks) == (1 if options else 3)


def test_a_receiver_is_told_of_an_ack_though_a_hook_fails():
    told: list[object] = []

    def note(message: Message, **_: object) -> None:
        told.append(message.event.pk)

    @subscribe("work.>", stream="work", consumer="watched", atomic=True)
    def handle(message: Message) -> None:
        transaction.on_commit(lambda: 1 / 0)

    (event,) = announce()
    signals.acked.connect(note)
    try:
        work_off("watched")
    finally:
        signals.acked.disconnect(note)
    assert told == [event.pk]


def test_nobody_is_told_of_the_verdict_on_a_lease_that_the_worker_has_been_given_anew(
    caplog: pytest.LogCaptureFixture,
):
    told: list[int] = []

    def note(message: Message, **_: object) -> None:
        told.append(message.lease_epoch)

    accept("kit")
    announce()
    (consumer,) = sync(["kit"])
    (first,) = consumer.pull()
    Task.objects.update(schedule_at=Now())
    (second,) = consumer.claim()
    signals.acked.connect(note)
    try:
        with caplog.at_level("INFO", "kanthorq_django.worker"):
            settle(Ack(Message(first), None), Ack(Message(second), None))
    finally:
        signals.acked.disconnect(note)
    assert told == [2]
    assert f"Lease 1 of task {first.pk} was over before its verdict" in caplog.text


def test_what_a_handler_has_ended_itself_waits_for_no_thread():
    """To wake one for each would cost a seventh of what gets done with atomic=True."""
    gone: list[Lease] = []
    never_started = Acknowledger("default", written=gone.extend)
    messages = [Message(task) for task in TaskFactory.create_batch(2)]

    never_started.settle([Ending(message) for message in messages])

    assert gone == [message.lease for message in messages]
    assert never_started._endings.empty()
