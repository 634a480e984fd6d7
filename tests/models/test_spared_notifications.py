"""Which notifications a process spares, and which it must not."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import DatabaseError, connection, transaction

from kanthorq_django import publish
from kanthorq_django.models import Event, Stream
from kanthorq_django.models.publishing import insertion, notifications
from tests.announcements import (
    Ear,
    forget_notifications,
    let_notifications_fail,
    let_server_keep,
    raw_connection,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    forget_notifications()
    yield
    forget_notifications()


def test_a_burst_of_commits_announces_itself_sparingly(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 3600)
    monkeypatch.setattr(notifications, "LONE_AFTER", 3600)
    for stream in "aabb":  # the first of each may come alone
        publish("order.paid", stream=stream)
    ear.heard()
    for _ in range(3):
        publish("order.paid", stream="a")
        publish("order.paid", stream="b")
    assert ear.heard() == []


def test_what_follows_a_known_key_is_announced(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    publish("order.paid", stream="a", idempotency_key="k")
    forget_notifications()
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 3600)
    publish("order.paid", stream="a", idempotency_key="k")  # comes alone, and tells nobody
    ear.heard()
    monkeypatch.setattr(notifications, "LONE_AFTER", 3600)
    publish("order.sent", stream="a")
    assert ear.heard() == ["a"]


def test_what_follows_a_notification_that_failed_is_announced(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_server_keep("a")
    forget_notifications()
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 0)
    publish("order.paid", stream="a")  # the process knows whom to tell again, and spares nobody
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 3600)
    with monkeypatch.context() as patch:
        patch.setattr(notifications, "LONE_AFTER", -1)
        let_notifications_fail(patch)
        patch.setattr(notifications, "notify", refuse)
        publish("order.paid", stream="a")
    ear.heard()
    monkeypatch.setattr(notifications, "LONE_AFTER", 3600)
    publish("order.sent", stream="a")
    assert ear.heard() == ["a"]


def refuse(*_: object) -> None:
    raise DatabaseError("nobody can be notified")


def test_a_stream_of_the_same_name_is_announced_for_itself(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 3600)
    monkeypatch.setattr(notifications, "LONE_AFTER", 3600)
    for _ in range(2):  # the second is spared
        publish("order.paid", stream="a")
    assert ear.heard() == ["a"]
    Event.objects.all().delete()
    Stream.objects.get(name="a").delete()
    with raw_connection() as listening, raw_connection() as speaking:
        anew = Ear(listening, speaking)
        publish("order.paid", stream="a")
        assert anew.heard() == ["a"]


class Clock:
    """Stands still until time passes."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(notifications, "time", clock)
    return clock


def publish_slowly(clock: Clock, count: int, *, pause: float = 0.0, events: int = 1) -> None:
    """Commit ``count`` transactions, each after a pause, by a database that takes its time."""

    def slow(execute: Callable[..., Any], statement: str, *rest: Any) -> Any:
        clock.now += 0.011 if "INSERT" in statement else 0.0
        return execute(statement, *rest)

    with connection.execute_wrapper(slow):
        for _ in range(count):
            clock.now += pause
            with transaction.atomic():
                for _ in range(events):
                    publish("order.paid", stream="a")


def test_a_burst_that_goes_on_announces_itself_ever_more_rarely(ear: Ear, clock: Clock) -> None:
    publish_slowly(clock, 10)
    assert len(ear.heard()) == 5  # after 11, 22, 33, 55 and 88 milliseconds
    publish_slowly(clock, 100)
    assert len(ear.heard()) == 20  # every fifth: fifty milliseconds are spared


def test_transactions_that_publish_often_are_no_pauses(ear: Ear, clock: Clock) -> None:
    publish_slowly(clock, 100, events=2)
    assert len(ear.heard()) == 36  # one in fifty milliseconds in the end: every third


def test_what_comes_after_a_pause_announces_itself_at_once(ear: Ear, clock: Clock) -> None:
    publish_slowly(clock, 100)
    ear.heard()
    publish_slowly(clock, 10, pause=0.006)
    assert len(ear.heard()) == 10


def test_what_follows_an_event_that_came_alone_at_once_is_spared(
    ear: Ear, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(insertion, "time", clock)
    let_server_keep("a")
    clock.now += 1
    ear.heard()
    publish("order.paid", stream="a")  # tells of itself together with its commit
    assert ear.heard() == ["a"]
    publish("order.sent", stream="a")
    assert ear.heard() == []
