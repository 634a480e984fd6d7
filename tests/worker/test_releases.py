"""Two releases of a project at work side by side: filters that one of them does not declare."""

import logging
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, transaction
from django.db.models.expressions import RawSQL
from django.db.models.functions import Now

from kanthorq_django import publish, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, Task, TaskState
from kanthorq_django.subscribers import sync
from kanthorq_django.worker import flight, loop, sync_report
from tests.concurrency import wait_until
from tests.factories import TaskFactory
from tests.worker.working import PATIENCE, wait_for_state, work_off, working

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def handled() -> list[str]:
    """The subjects that the former release has handled, whose code knows of payments alone."""
    found: list[str] = []

    @subscribe("order.paid", stream="orders", consumer="books")
    def book(message: Message) -> None:
        found.append(message.event.subject)

    return found


def release_another(*includes: str) -> None:
    """Do what the start of another release's worker does to the row."""
    Consumer.objects.filter(name="books").update(subject_includes=includes)


def test_what_only_newer_code_subscribes_to_is_left_to_it(
    handled: list[str], caplog: pytest.LogCaptureFixture
):
    with working("books"):
        wait_until(lambda: Consumer.objects.filter(name="books").exists(), PATIENCE)
        release_another("order.paid", "order.refunded")
        for subject in ("order.paid", "order.refunded", "order.paid"):
            publish(subject, stream="orders")
        wait_for_state(TaskState.COMPLETED, 2)
        wait_for_state(TaskState.AVAILABLE, 1, event__subject="order.refunded")

    assert handled == ["order.paid", "order.paid"]
    waiting = Task.objects.available().get()
    assert waiting.attempt_count == 0
    soon = Now() + timedelta(seconds=10)
    assert Task.objects.available().filter(schedule_at__gt=soon).get() == waiting
    (told,) = [each for each in caplog.records if "now selects" in each.message]
    assert told.levelname == "WARNING"
    assert (
        "now selects ['order.paid', 'order.refunded'], where this code declares ['order.paid']:"
        in told.message
    )


@pytest.mark.parametrize("state", [TaskState.RETRYABLE, TaskState.AVAILABLE, TaskState.RUNNING])
def test_what_newer_code_has_begun_is_left_to_it(handled: list[str], state: TaskState):
    """The former release pulls nothing meanwhile, which would tell it of the new filters."""
    with working("books"):
        wait_until(lambda: Consumer.objects.filter(name="books").exists(), PATIENCE)
        with transaction.atomic():
            consumer = Consumer.objects.select_for_update().get(name="books")
            publish("order.refunded", stream="orders")
            publish("order.paid", stream="orders")
            release_another("order.paid", "order.refunded")
            events = Event.objects.order_by("id")
            for event in events:
                TaskFactory.create(consumer=consumer, event=event, state=state, schedule_at=Now())
            Consumer.objects.update(cursor=RawSQL("pg_current_snapshot()", ()))
        wait_for_state(TaskState.COMPLETED, 1)
        wait_for_state(TaskState.AVAILABLE, 1, event__subject="order.refunded")
    assert handled == ["order.paid"]


def test_what_nobody_seems_to_subscribe_to_is_handled_after_a_while(
    handled: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flight, "ELSEWHERE", timedelta(0))
    monkeypatch.setattr(loop, "ELSEWHERE", timedelta(0))
    monkeypatch.setattr(flight, "LEASES_MAX", 3)
    with working("books"):
        wait_until(lambda: Consumer.objects.filter(name="books").exists(), PATIENCE)
        release_another("order.>")
        publish("order.refunded", stream="orders")
        wait_for_state(TaskState.COMPLETED)
    assert handled == ["order.refunded"]
    assert Task.objects.get().lease_epoch == 4


def test_what_no_filter_selects_any_more_is_nobody_elses(handled: list[str]):
    sync(["books"])
    release_another("order.>")
    publish("order.sent", stream="orders")
    Consumer.objects.get(name="books").pull()
    Task.objects.update(state=TaskState.PENDING)
    with working("books"):
        wait_until(lambda: Consumer.objects.get().subject_includes == ["order.paid"], PATIENCE)
        release_another("order.paid", "order.refunded")
        publish("order.paid", stream="orders")
        wait_for_state(TaskState.COMPLETED)
        Task.objects.pending().release()
        wait_for_state(TaskState.COMPLETED, 2)
    assert handled == ["order.paid", "order.sent"]


def test_a_key_in_strict_order_keeps_it():
    found: list[str] = []

    @subscribe("order.paid", stream="orders", consumer="books", serialize="strict")
    def book(message: Message) -> None:
        found.append(message.event.subject)

    with working("books"):
        wait_until(lambda: Consumer.objects.filter(name="books").exists(), PATIENCE)
        release_another("order.>")
        for subject in ("order.sent", "order.paid"):
            publish(subject, stream="orders", resource_key="k")
        wait_for_state(TaskState.COMPLETED, 2)
    assert found == ["order.sent", "order.paid"]


def test_what_waits_since_filters_were_wider_is_handled_all_the_same(handled: list[str]):
    sync(["books"])
    release_another("order.>")
    publish("order.sent", stream="orders")
    Consumer.objects.get(name="books").pull()
    Task.objects.update(state=TaskState.AVAILABLE, schedule_at=Now())

    work_off("books")  # its start narrows the filters again, which says nothing of old tasks

    assert handled == ["order.sent"]


def test_what_was_claimed_is_handled_if_its_consumer_cannot_be_read_then(
    handled: list[str], monkeypatch: pytest.MonkeyPatch
):
    refused: list[str] = []

    def refuse(consumer: Consumer, **_: Any) -> None:
        refused.append(consumer.name)
        raise OperationalError("the connection is lost")

    sync(["books"])
    TaskFactory.create(consumer=Consumer.objects.get(), event__subject="order.refunded")
    monkeypatch.setattr(Consumer, "refresh_from_db", refuse)
    with working("books"):
        wait_for_state(TaskState.COMPLETED)
    assert handled == ["order.refunded"]
    assert refused == ["books"]
    assert Task.objects.get().attempt_count == 1


def test_a_worker_whose_filters_were_taken_back_says_so(
    handled: list[str], caplog: pytest.LogCaptureFixture
):
    with working("books"):
        wait_until(lambda: Consumer.objects.filter(name="books").exists(), PATIENCE)
        release_another("order.sent")
        publish("order.paid", stream="orders")
        wait_until(lambda: "now selects ['order.sent']" in caplog.text, PATIENCE)
        release_another("order.paid")
        publish("order.paid", stream="orders")
        wait_for_state(TaskState.COMPLETED)
    assert caplog.text.count("now selects") == 1


@pytest.mark.usefixtures("handled")
def test_a_start_tells_what_it_changes_for_all_workers(caplog: pytest.LogCaptureFixture):
    sync(["books"])
    release_another("order.paid", "order.refunded")
    work_off("books")
    work_off("books")
    (told,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert told.message.endswith(
        "for all workers: subject_includes: ['order.paid', 'order.refunded'] -> ['order.paid']."
    )


@pytest.mark.usefixtures("handled")
def test_a_start_tells_of_a_new_consumer_that_begins_with_old_events(
    caplog: pytest.LogCaptureFixture,
):
    for _ in range(3):
        publish("order.paid", stream="orders")
    work_off("books")
    work_off("books")
    (told,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert told.message == (
        "Consumer books is new and begins with 3 events that stream 'orders' holds already."
    )


def test_what_comes_meanwhile_is_not_old_for_a_consumer_of_new_events(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    subscribe("order.paid", stream="orders", consumer="books", deliver="new")(lambda message: None)

    def sync_and_publish(*args: Any, **options: Any) -> list[Consumer]:
        rows = sync(*args, **options)
        publish("order.paid", stream="orders")
        return rows

    monkeypatch.setattr(sync_report, "sync", sync_and_publish)
    assert work_off("books") == 1
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
