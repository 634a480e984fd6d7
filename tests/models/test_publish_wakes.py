"""The wake-up of idle workers: one notification per stream and transaction, after its commit."""

import logging
import time
from typing import Any

import psycopg
import pytest
from django.db import DatabaseError, connection, transaction
from django.test.utils import CaptureQueriesContext
from psycopg.pq import TransactionStatus
from pytest_django import Settings

from kanthorq_django import publish, publish_many, sql
from kanthorq_django.exceptions import IdempotencyConflict, InvalidEvent
from kanthorq_django.models import Event, Stream, Task, TaskState
from kanthorq_django.models.publishing import notifications
from tests.announcements import (
    Ear,
    forget_notifications,
    let_notifications_fail,
    let_server_keep,
    raw_connection,
)
from tests.factories import TaskFactory
from tests.proxy import through_a_proxy

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def unspared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every notification be sent, however fast the test publishes."""
    forget_notifications()
    monkeypatch.setattr(notifications, "SPARE_SECONDS", 0)


def test_an_event_alone_announces_its_stream(ear: Ear) -> None:
    publish("order.paid", stream="a")
    assert ear.heard() == ["a"]
    publish("order.paid", stream="b")
    publish("order.paid", stream="a")
    assert ear.heard() == ["b", "a"]


def test_a_transaction_announces_each_stream_once_and_after_its_commit(ear: Ear) -> None:
    with CaptureQueriesContext(connection) as queries, transaction.atomic():
        for stream in "abab":
            publish("order.paid", stream=stream)
        publish_many([Event(subject="x"), Event(subject="y")], stream="a")
        assert not [query for query in queries if "pg_notify" in query["sql"]]
        assert ear.heard() == []
    assert ear.heard() == ["a", "b"]


@pytest.mark.parametrize("verb", ["resume", "release", "reset"])
def test_tasks_that_begin_again_announce_the_streams_of_their_consumers(
    ear: Ear, verb: str
) -> None:
    stored = TaskState.PENDING if verb == "release" else TaskState.CANCELLED
    for stream in Stream.objects.all():
        TaskFactory.create(consumer__stream=stream, state=stored)
    ear.heard()  # of their events
    chosen = Task.objects.filter(consumer__stream__name="b")
    with transaction.atomic():
        getattr(chosen, verb)()
        assert ear.heard() == []
    assert ear.heard() == ["b"]
    assert len(getattr(chosen, verb)().noop) == 1
    assert ear.heard() == []


def test_a_process_remembers_no_more_streams_than_it_may() -> None:
    remembered = (notifications.pace, notifications.announcer, notifications._notifier)
    for number in range(notifications.REMEMBERED_MAX + 10):
        notifications.pace("default", f"never-committed-{number}")
        notifications.announcer("default", number)
        notifications._notifier("default", f"kanthorq_{number}")
    sizes = {kept.cache_info().currsize for kept in remembered}
    assert sizes == {notifications.REMEMBERED_MAX}


def test_a_stream_that_is_forgotten_within_a_transaction_is_announced_all_the_same(
    ear: Ear,
) -> None:
    with transaction.atomic():
        publish("order.paid", stream="a")
        forget_notifications()
        publish("order.paid", stream="a")
    assert set(ear.heard()) == {"a"}
    forget_notifications()
    publish("order.paid", stream="a")
    assert ear.heard() == ["a"]


def test_many_events_announce_their_stream_once(ear: Ear) -> None:
    publish_many((Event(subject="order.paid") for _ in range(100)), stream="a")
    assert ear.heard() == ["a"]


def test_a_rollback_announces_nothing(ear: Ear) -> None:
    with transaction.atomic():
        publish("order.paid", stream="a")
        transaction.set_rollback(True)
    assert ear.heard() == []


def test_a_savepoint_that_rolls_back_announces_nothing(ear: Ear) -> None:
    with transaction.atomic():
        with transaction.atomic():
            publish("order.paid", stream="a")
            transaction.set_rollback(True)
        publish("order.paid", stream="b")
    assert ear.heard() == ["b"]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_rolled_back_savepoint_does_not_silence_what_stays(ear: Ear, is_first: bool) -> None:
    with transaction.atomic():
        if is_first:
            publish("order.paid", stream="a")
        with transaction.atomic():
            publish("order.paid", stream="a")
            transaction.set_rollback(True)
        if not is_first:
            publish("order.paid", stream="a")
    assert ear.heard() == ["a"]


def test_savepoints_that_are_released_announce_their_stream_once(ear: Ear) -> None:
    with transaction.atomic():
        for _ in range(3):
            with transaction.atomic():
                publish("order.paid", stream="a")
        with transaction.atomic(), transaction.atomic(savepoint=False):
            publish("order.paid", stream="a")
    assert ear.heard() == ["a"]


def test_a_released_savepoint_inside_one_that_rolls_back_announces_nothing(ear: Ear) -> None:
    with transaction.atomic():
        with transaction.atomic():
            with transaction.atomic():
                publish("order.paid", stream="a")
            publish("order.sent", stream="a")
            transaction.set_rollback(True)
        assert not Event.objects.exists()
    assert ear.heard() == []


def test_a_released_savepoint_inside_one_that_rolls_back_does_not_speak_for_others(
    ear: Ear,
) -> None:
    with transaction.atomic():
        with transaction.atomic():
            with transaction.atomic():
                publish("order.paid", stream="a")
            transaction.set_rollback(True)
        publish("order.sent", stream="a")
    assert ear.heard() == ["a"]


def test_transactions_that_follow_each_other_each_announce(ear: Ear) -> None:
    for _ in range(2):
        with transaction.atomic():
            publish("order.paid", stream="a")
    assert ear.heard() == ["a", "a"]


@pytest.mark.parametrize("lone_after", [0, 3600])
def test_a_known_key_announces_nothing(
    ear: Ear, monkeypatch: pytest.MonkeyPatch, lone_after: float
) -> None:
    monkeypatch.setattr(notifications, "LONE_AFTER", lone_after)
    publish("order.paid", stream="a", idempotency_key="k")
    assert ear.heard() == ["a"]
    publish("order.paid", stream="a", idempotency_key="k")
    publish_many([Event(subject="order.paid", idempotency_key="k") for _ in range(2)], stream="a")
    assert ear.heard() == []


def test_a_refused_event_announces_nothing(ear: Ear) -> None:
    with transaction.atomic(), pytest.raises(ValueError, match="subject"):
        publish("not a subject", stream="a")
    assert ear.heard() == []


def test_notifications_can_be_switched_off(ear: Ear, settings: Settings) -> None:
    settings.KANTHORQ = {"NOTIFY": False}
    publish("order.paid", stream="a")
    with transaction.atomic():
        publish("order.paid", stream="b")
    assert ear.heard() == []


def test_a_transaction_managed_by_hand_publishes_and_leaves_waking_to_the_poll(ear: Ear) -> None:
    transaction.set_autocommit(False)
    try:
        publish("order.paid", stream="a")
        publish_many([Event(subject="x"), Event(subject="y", idempotency_key="k")], stream="a")
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert Event.objects.count() == 3
    assert ear.heard() == []


def test_a_transaction_begun_by_sql_publishes_and_leaves_waking_to_the_poll(ear: Ear) -> None:
    """A NOTIFY in it would make commits wait for each other, and let none be prepared."""
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        publish("order.paid", stream="a")
        publish("order.paid", stream="a")
        cursor.execute("COMMIT")
    assert Event.objects.count() == 2
    assert ear.heard() == []


def test_a_notification_that_fails_after_the_commit_is_logged_and_not_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
    with raw_connection() as operator, caplog.at_level(logging.ERROR, "django.db.backends.base"):
        try:
            with transaction.atomic():
                transaction.on_commit(
                    lambda: operator.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
                )
                publish("order.paid", stream="a")
        finally:
            connection.close()
    assert Event.objects.get().subject == "order.paid"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.fixture
def lone(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every event be the first one after a pause, on a connection that is known well."""
    let_server_keep("a")
    monkeypatch.setattr(notifications, "LONE_AFTER", -1)
    publish("order.paid", stream="a")
    ear.heard()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[psycopg.Connection]:
    """What connections wait for the server, each time that one does."""
    found: list[psycopg.Connection] = []
    wait = psycopg.Connection.wait

    def noted(raw: psycopg.Connection, *args: Any, **given: Any) -> Any:
        found.append(raw)
        return wait(raw, *args, **given)

    monkeypatch.setattr(psycopg.Connection, "wait", noted)
    return found


@pytest.mark.usefixtures("lone")
def test_an_event_that_comes_alone_is_announced_in_the_same_round_trip(
    ear: Ear, waits: list[psycopg.Connection]
) -> None:
    event = publish("order.paid", stream="a", body=b"1")
    assert waits == [connection.connection]
    assert ear.heard() == ["a"]
    stored = Event.objects.get(body=b"1")
    assert (stored.pk, stored.xid, stored.created_at) == (event.pk, event.xid, event.created_at)


@pytest.mark.usefixtures("lone")
def test_the_first_event_of_a_stream_registers_it() -> None:
    assert publish("order.paid", stream="novel").stream.name == "novel"


@pytest.mark.usefixtures("lone")
def test_an_event_is_announced_once_more_where_its_companion_failed(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_notifications_fail(monkeypatch)
    event = publish("order.paid", stream="a")
    assert ear.heard() == ["a"]
    assert event.created_at == Event.objects.get(pk=event.pk).created_at


@pytest.mark.usefixtures("lone")
def test_an_event_that_comes_alone_is_published_though_nobody_can_be_notified(
    ear: Ear, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_notifications_fail(monkeypatch)
    with CaptureQueriesContext(connection):  # so that it goes as text, by a cursor
        monkeypatch.setattr(notifications, "notify", refuse)
        event = publish("order.paid", stream="a")
    assert Event.objects.filter(pk=event.pk).count() == 1
    assert ear.heard() == []
    assert "nobody can be notified" in caplog.text


def refuse(*_: object) -> None:
    raise DatabaseError("nobody can be notified")


@pytest.mark.usefixtures("lone")
def test_an_event_whose_commit_was_answered_is_published_though_the_connection_breaks(
    ear: Ear,
) -> None:
    with through_a_proxy() as proxy:
        let_server_keep("a")
        publish("order.paid", stream="a")
        ear.heard()
        lost = proxy.lose_half_of_reply_to("order.sent")
        event = publish("order.sent", stream="a")
        assert lost.is_set()
        assert Event.objects.get(subject="order.sent") == event
    assert set(ear.heard()) == {"a"}


@pytest.mark.usefixtures("lone")
def test_an_event_is_announced_though_the_server_ends_the_connection_that_was_to(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_notifications_fail(monkeypatch, "SELECT pg_terminate_backend(pg_backend_pid())")
    event = publish("order.paid", stream="a")
    assert ear.heard() == ["a"]
    assert Event.objects.filter(pk=event.pk).exists()  # on another connection


@pytest.mark.usefixtures("lone")
def test_a_known_key_names_its_event_also_for_one_that_comes_alone() -> None:
    first = publish("order.paid", stream="a", idempotency_key="k")
    again = publish("order.paid", stream="a", idempotency_key="k")
    assert (again.pk, again.created) == (first.pk, False)
    with pytest.raises(IdempotencyConflict):
        publish("order.sent", stream="a", idempotency_key="k")
    assert Event.objects.get(idempotency_key="k") == first


@pytest.mark.usefixtures("lone")
def test_a_stream_that_was_deleted_meanwhile_is_registered_anew() -> None:
    former = Stream.objects.get(name="a")
    Event.objects.all().delete()
    former.delete()
    event = publish("order.paid", stream="a")
    assert event.stream == Stream.objects.get(name="a") != former
    with raw_connection() as listening, raw_connection() as speaking:
        anew = Ear(listening, speaking)
        publish("order.paid", stream="a")
        assert anew.heard() == ["a"]


@pytest.mark.usefixtures("lone")
@pytest.mark.parametrize("timing", ["", "DEFERRABLE INITIALLY DEFERRED"])
def test_an_event_that_the_database_refuses_leaves_nothing_and_no_open_transaction(
    timing: str,
) -> None:
    before = Event.objects.count()
    kind = "CONSTRAINT TRIGGER" if timing else "TRIGGER"
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE 'no more'; END $$;"
            f"CREATE {kind} refuse AFTER INSERT ON kanthorq_django_event {timing}"
            " FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    try:
        with pytest.raises(DatabaseError, match="no more"):
            publish("order.paid", stream="a")
        assert connection.connection.info.transaction_status == TransactionStatus.IDLE
        assert Event.objects.count() == before
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP FUNCTION refuse() CASCADE")


@pytest.mark.usefixtures("lone")
def test_an_id_that_is_taken_is_refused_also_for_an_event_that_comes_alone() -> None:
    stored = publish("order.paid", b"first", stream="a")
    with pytest.raises(InvalidEvent):
        Event.objects.publish([Event(id=stored.pk, subject="order.paid", body=b"2")], stream="a")
    assert bytes(Event.objects.get(pk=stored.pk).body) == b"first"


def test_a_stream_that_was_made_anew_is_announced_by_its_new_id(monkeypatch: Any) -> None:
    monkeypatch.setattr(notifications, "LONE_AFTER", 0)
    let_server_keep("c")
    Event.objects.all().delete()
    Stream.objects.filter(name="c").delete()
    Stream.objects.register("c")
    told: list[str] = []
    monkeypatch.setattr(notifications, "notify", lambda name, using: told.append(name))

    publish("order.paid", stream="c")

    assert told == [notifications.channel(Stream.objects.get(name="c").pk)]


def test_what_a_notification_spares_counts_from_before_it_was_sent(monkeypatch: Any) -> None:
    """Whom it woke may look again before its answer has come all the way to the publisher."""
    monkeypatch.setattr(notifications, "LONE_AFTER", 0)
    let_server_keep("c")
    sent, spared = [], []
    send = sql.integers_apart

    def noted(*args: Any) -> Any:
        sent.append(time.monotonic())
        return send(*args)

    monkeypatch.setattr(sql, "integers_apart", noted)
    monkeypatch.setattr(notifications.Announcer, "spare", lambda _, since: spared.append(since))

    publish("order.paid", stream="c")

    (sent_at,), (since,) = sent, spared
    assert since <= sent_at
