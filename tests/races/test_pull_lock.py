"""A page is read under the lock of its consumer, by the filters that stand in its row."""

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connection, transaction

from kanthorq_django import publish
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.registration import Registration
from tests.concurrency import DEADLINE_SECONDS, begin_elsewhere, elsewhere, wait_until
from tests.races.race import altered

pytestmark = pytest.mark.django_db(transaction=True)

GUARD = "AND current_setting('kanthorq.locked', true) = id::text"


@pytest.fixture
def consumer() -> Consumer:
    consumer = Consumer.objects.register("reader", Registration("s", includes=["a.*"]))
    publish("a.b", stream="s")
    return consumer


@pytest.fixture
def impatient(consumer: Consumer):
    """Let a pull fail that waits for a lock."""
    with connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '1s'")
    yield
    connection.close()


def lock(consumer: Consumer, using: str) -> None:
    Consumer.objects.using(using).select_for_update(no_key=True).get(pk=consumer.pk)


@pytest.mark.usefixtures("impatient")
def test_a_page_that_somebody_else_reads_is_left_to_them(consumer: Consumer, second: str):
    with transaction.atomic(using=second):
        lock(consumer, second)
        page = consumer.pull_page(10)
        assert (page.leased, page.is_idle) == ([], True)
        assert not Task.objects.exists()

    assert [task.event.subject for task in consumer.pull()] == ["a.b"]


@pytest.mark.usefixtures("impatient")
def test_it_would_be_read_by_both_without_the_note_of_the_lock(
    consumer: Consumer, second: str, monkeypatch: pytest.MonkeyPatch
):
    with altered(monkeypatch, "pull", (GUARD, "")), transaction.atomic(using=second):
        lock(consumer, second)
        with pytest.raises(OperationalError, match="lock timeout"):
            consumer.pull_page(10)


@pytest.mark.usefixtures("impatient")
def test_the_note_of_a_lock_ends_with_its_pull(consumer: Consumer, second: str):
    consumer.pull()
    publish("a.c", stream="s")
    with transaction.atomic(using=second):
        lock(consumer, second)
        assert consumer.pull() == []


def test_a_page_that_is_left_to_others_writes_nothing(consumer: Consumer, second: str):
    def next_transaction() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
            return int(cursor.fetchone()[0])

    with transaction.atomic(using=second):
        lock(consumer, second)

        def ids_taken() -> int:
            before = next_transaction()
            for _ in range(50):
                consumer.pull_page(10)
            return next_transaction() - before

        # Others may be at work in this server; what would take fifty itself, always does.
        assert any(ids_taken() < 25 for _ in range(20))


@pytest.mark.parametrize("known", ["ä.>", "b"])
def test_filters_that_were_changed_meanwhile_are_those_of_the_row(consumer: Consumer, known: str):
    consumer.subject_includes = [known]
    Consumer.objects.filter(pk=consumer.pk).update(
        subject_includes=["ä.>"], subject_excludes=["ä.x"]
    )
    for subject in ("ä.b", "ä.x", "a.c"):
        publish(subject, stream="s")

    assert [task.event.subject for task in consumer.pull()] == ["ä.b"]
    assert (consumer.subject_includes, consumer.subject_excludes) == (["ä.>"], ["ä.x"])


@pytest.mark.parametrize(
    "delete",
    [
        lambda consumer: consumer.delete(),
        lambda consumer: Consumer.objects.filter(pk=consumer.pk).delete(),
    ],
)
def test_a_pull_makes_no_tasks_while_its_consumer_is_deleted(
    consumer: Consumer, delete: Callable[[Consumer], object]
):
    pulled: list[list[Task]] = []

    def pull_after_the_tasks(execute: Any, text: str, *rest: Any) -> Any:
        result = execute(text, *rest)
        if text.startswith('DELETE FROM "kanthorq_django_task"'):
            pulled.append(elsewhere(lambda: Consumer.objects.get(pk=consumer.pk).pull()))
        return result

    with connection.execute_wrapper(pull_after_the_tasks):
        delete(consumer)

    assert pulled == [[]]
    assert not Consumer.objects.exists()
    assert not Task.objects.exists()


def test_a_deletion_waits_for_a_pull_where_the_project_prefers_repeatable_read(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    connection.ensure_connection()
    own_pid = connection.connection.info.backend_pid
    level = psycopg.IsolationLevel.REPEATABLE_READ
    monkeypatch.setattr(connection.connection, "isolation_level", level)
    is_locked = threading.Event()

    def is_waited_for() -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT cardinality(pg_blocking_pids(%s))", [own_pid])
            return bool(cursor.fetchone()[0])

    def pull() -> None:
        with transaction.atomic():
            lock(consumer, "default")
            Consumer.objects.filter(pk=consumer.pk).update(position_xid=None)
            Task.objects.create(consumer=consumer, event=Event.objects.get())
            is_locked.set()
            wait_until(is_waited_for)

    pulling = begin_elsewhere(pull)
    assert is_locked.wait(DEADLINE_SECONDS)
    consumer.delete()

    pulling.result()
    assert not Task.objects.exists()
    assert not Consumer.objects.exists()
