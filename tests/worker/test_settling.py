"""The look that a worker takes once more, for what committed soon after a notification."""

import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from kanthorq_django import publish, subscribe
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, TaskState
from kanthorq_django.models.delivery.cursor import peek
from kanthorq_django.models.publishing import notifications
from kanthorq_django.subscribers import sync
from kanthorq_django.worker import loop, puller, scheduler
from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.pulling.demand import Demand
from tests.announcements import forget_notifications
from tests.concurrency import elsewhere, wait_until
from tests.worker.working import PATIENCE, wait_for_state, working

pytestmark = pytest.mark.django_db(transaction=True)

LONG = timedelta(minutes=1)


def spare(monkeypatch: pytest.MonkeyPatch, *, seconds: float, settle: float) -> None:
    """Spare what follows a notification for so long, and look once more after ``settle``."""
    forget_notifications()
    monkeypatch.setattr(notifications, "SPARE_SECONDS", seconds)
    monkeypatch.setattr(notifications, "SPARE_LONGEST", seconds)
    monkeypatch.setattr(notifications, "LONE_AFTER", 3600)  # what comes alone is never spared
    monkeypatch.setattr(loop, "SETTLE_SECONDS", settle)
    monkeypatch.setattr(loop, "SETTLE_LONGEST", settle)
    monkeypatch.setattr(scheduler, "LOOK_EVERY", 60.0)


def test_a_look_that_takes_long_does_not_stand_for_the_one_after_a_notification(monkeypatch):
    spare(monkeypatch, seconds=1.0, settle=1.1)
    unwanted = threading.Event()

    def slow(*args: Any, **kwargs: Any) -> list[Any]:
        rows = peek(*args, **kwargs)
        if unwanted.is_set() and not any(row.has_events for row in rows):
            unwanted.clear()
            elsewhere(lambda: publish("work.wanted", stream="work"))  # which is spared
            time.sleep(1.2)  # so that the second look would be due before this one ends
        return rows

    monkeypatch.setattr(puller, "peek", slow)
    subscribe("work.wanted", stream="work", consumer="woken")(lambda message: None)

    with working("woken", poll_interval=LONG, listen=True):
        publish("work.wanted", stream="work")
        wait_for_state(TaskState.COMPLETED)
        time.sleep(2)  # until nothing is spared any more
        unwanted.set()
        publish("work.unwanted", stream="work")
        wait_for_state(TaskState.COMPLETED, 2)


def test_what_is_published_soon_after_a_notification_sends_none_and_is_found(monkeypatch):
    spare(monkeypatch, seconds=1.0, settle=1.5)
    vain_looks: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> list[Any]:
        rows = peek(*args, **kwargs)
        if not any(row.has_events for row in rows):
            vain_looks.append(None)
        return rows

    monkeypatch.setattr(puller, "peek", counted)
    subscribe("work.wanted", stream="work", consumer="woken")(lambda message: None)

    with working("woken", poll_interval=LONG, listen=True):
        publish("work.wanted", stream="work")
        wait_for_state(TaskState.COMPLETED)
        # Until nothing is spared and no second look is due; sooner, the test would prove nothing.
        time.sleep(2)
        vain_looks.clear()
        publish("work.unwanted", stream="work")  # wakes the worker, and leaves it nothing to end
        wait_until(lambda: vain_looks, PATIENCE)
        publish("work.wanted", stream="work")
        wait_for_state(TaskState.COMPLETED, 2)


def test_what_follows_without_a_pause_sends_none_and_is_found_soon_all_the_same(monkeypatch):
    spare(monkeypatch, seconds=3600, settle=0.5)
    monkeypatch.setattr(loop, "SETTLE_LONGEST", 3600)  # only who found something looks again
    is_over = threading.Event()

    @subscribe("work.*", stream="work", consumer="woken")
    def handle(message: Message) -> None:
        if message.event.subject == "work.long":
            is_over.wait(PATIENCE)  # else the loop would look because all handlers have ended
        elif left := int(message.event.body):
            publish("work.next", b"%d" % (left - 1), stream="work")

    with working("woken", poll_interval=LONG, listen=True):
        publish("work.long", stream="work")
        wait_for_state(TaskState.RUNNING)
        publish("work.next", b"3", stream="work")
        wait_for_state(TaskState.COMPLETED, 4)
        is_over.set()


def test_guesses_do_not_stand_for_looks_for_long(monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr(puller, "time", SimpleNamespace(monotonic=lambda: now[0]))
    subscribe("work.wanted", stream="work", consumer="told")(lambda message: None)
    (consumer,) = sync(["told"])
    reader = puller.Puller([consumer], WorkerOptions(), "default", nullcontext)
    told = {consumer.stream_id}
    for _ in range(2):
        assert reader.guess(told)
        now[0] += 0.6 * puller.LOOK_EVERY
        assert reader.guess(told)
        now[0] += 0.6 * puller.LOOK_EVERY
        assert not reader.guess(told)
        reader.look(is_quiet=True)


def test_only_a_few_consumers_of_streams_that_were_told_of_are_guessed_to_have_work():
    few, many = ("few", puller.GUESSES_MAX), ("many", puller.GUESSES_MAX + 1)
    for stream, count in (few, many):
        for number in range(count):
            name = f"{stream}-{number}"
            subscribe("work.>", stream=stream, consumer=name)(lambda message: None)
    consumers = sync()
    streams = {consumer.stream.name: consumer.stream_id for consumer in consumers}
    reader = puller.Puller(consumers, WorkerOptions(), "default", nullcontext)
    guessed = reader.guess({streams["few"]})
    assert [each.name for each in reader.in_turn(guessed)] == [f"few-{n}" for n in range(few[1])]
    assert reader.guess({streams["many"]}) == reader.guess(set()) == {}


def test_who_hears_of_one_stream_pulls_without_a_look(monkeypatch: pytest.MonkeyPatch):
    guessed: list[str] = []
    fetch = puller.Puller.fetch

    def note(reader: puller.Puller, consumer: Consumer, look: puller.Look, demand: Demand) -> Any:
        guessed.extend([consumer.name] * look.is_guess)
        return fetch(reader, consumer, look, demand)

    monkeypatch.setattr(puller.Puller, "fetch", note)
    for stream in ("work", "other"):
        subscribe("work.>", stream=stream, consumer=stream)(lambda message: None)
    with working("work", "other", poll_interval=LONG, listen=True):
        for count in range(1, 6):
            publish("work.wanted", stream="work")
            wait_for_state(TaskState.COMPLETED, count)
        wait_until(lambda: "work" in guessed, PATIENCE)
