"""What happens beside a prune: it waits for nobody, and takes nothing that is not done with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.db.models.functions import Now

from kanthorq_django import publish
from kanthorq_django.message import Message
from kanthorq_django.models import Consumer, Event, OperatorAction, Stream, Task
from kanthorq_django.models.audit import Order
from kanthorq_django.models.maintenance import retention
from kanthorq_django.models.maintenance.retention import Pruned, count_prunable, prune
from tests.concurrency import elsewhere
from tests.factories import ConsumerFactory, EventFactory, StreamFactory
from tests.models.pruning import WEEK, age, pull_and_ack

# Cursors are about transactions that have committed.
pytestmark = pytest.mark.django_db(transaction=True)

DEADLINE = 20  # seconds for another connection to get on


@pytest.fixture
def stream() -> Stream:
    return StreamFactory.create(name="orders")


@pytest.fixture
def consumer(stream: Stream) -> Consumer:
    return ConsumerFactory.create(name="refunds", stream=stream, subject_includes=["order.>"])


@pytest.fixture
def in_thread() -> Iterator[Any]:
    """Run something on a connection of its own; at the end it must be done."""
    threads = []

    def start(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                work()
            finally:
                connections.close_all()

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_an_event_that_was_old_when_its_transaction_committed_is_read_before_it_goes(
    stream: Stream, consumer: Consumer, in_thread: Any
):
    """Purging by age alone would lose it: it is older than the limit when it first is visible."""
    written, finish = threading.Event(), threading.Event()

    def long_transaction() -> None:
        with transaction.atomic():
            publish("order.late", stream="orders")
            Event._base_manager.update(created_at=Now() - timedelta(days=8))
            written.set()
            assert finish.wait(DEADLINE)

    thread = in_thread(long_transaction)
    assert written.wait(DEADLINE)
    publish("order.early", stream="orders")
    pull_and_ack(consumer)
    finish.set()
    thread.join(DEADLINE)
    age()

    assert prune(WEEK) == Pruned(1, 1)
    (task,) = consumer.pull()
    assert task.event.subject == "order.late"


def test_a_task_that_an_operator_resets_meanwhile_stays(
    stream: Stream, consumer: Consumer, in_thread: Any
):
    EventFactory.create_batch(2, stream=stream)
    pull_and_ack(consumer)
    age()
    first = Task.objects.order_by("pk")[0]
    with being_reset(first, in_thread):
        assert prune(WEEK) == Pruned(1, 1)

    assert Task.objects.get().event.pk == first.event_id


def test_the_audit_names_what_went_and_not_what_stayed(
    stream: Stream, consumer: Consumer, in_thread: Any
):
    EventFactory.create_batch(3, stream=stream)
    pull_and_ack(consumer)
    age()
    first, *others = Task.objects.order_by("event_id")
    with being_reset(first, in_thread):
        prune(WEEK, order=Order(operator="alice", origin=OperatorAction.Origin.COMMAND))

    told = OperatorAction.objects.get()
    assert told.counts == {"events": 2, "tasks": 2}
    assert told.sample == [str(task.event_id) for task in others]


@contextmanager
def being_reset(task: Task, in_thread: Any) -> Iterator[None]:
    """Let an operator reset ``task`` in a transaction that lasts as long as the block."""
    is_reset, finish = threading.Event(), threading.Event()

    def reset_slowly() -> None:
        with transaction.atomic():
            Task.objects.filter(pk=task.pk).reset()
            is_reset.set()
            assert finish.wait(DEADLINE)

    thread = in_thread(reset_slowly)
    assert is_reset.wait(DEADLINE)
    yield
    finish.set()
    thread.join(DEADLINE)


def test_a_consumer_that_joins_meanwhile_waits_and_never_gets_a_task_without_its_event(
    stream: Stream, consumer: Consumer, in_thread: Any
):
    EventFactory.create_batch(2, stream=stream)
    pull_and_ack(consumer)
    age()
    joined = threading.Event()

    def join() -> None:
        ConsumerFactory.create(name="newcomer", stream=stream)
        joined.set()

    with transaction.atomic():
        prune(WEEK)
        in_thread(join)
        # The newcomer's foreign key waits for the lock on the stream.
        assert not joined.wait(0.5)
    assert joined.wait(DEADLINE)

    newcomer = Consumer.objects.get(name="newcomer")
    assert newcomer.pull() == []


def test_publishers_do_not_wait_for_a_prune(stream: Stream, consumer: Consumer, in_thread: Any):
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age()
    published = threading.Event()

    def work() -> None:
        publish("order.paid", stream="orders")
        published.set()

    with transaction.atomic():
        assert prune(WEEK) == Pruned(1, 1)
        in_thread(work)
        assert published.wait(DEADLINE)


def test_no_event_may_go_by_a_cursor_that_becomes_foreign_meanwhile(
    stream: Stream, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
):
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age()
    check = retention._check_cursors

    def restored_after(*args: Any) -> None:
        check(*args)
        Consumer.objects.update(cluster_id=17)

    monkeypatch.setattr(retention, "_check_cursors", restored_after)
    assert count_prunable(WEEK) == Pruned()
    Consumer.objects.update(cluster_id=consumer.cluster_id)
    assert prune(WEEK) == Pruned()
    assert Event.objects.exists()


@pytest.mark.parametrize("is_done_again", [False, True])
def test_a_task_that_was_reset_between_the_look_and_the_deletion_stays(
    stream: Stream, consumer: Consumer, monkeypatch: pytest.MonkeyPatch, *, is_done_again: bool
):
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age()
    look = retention._Reader._page

    def and_reset(*args: Any) -> list[Any]:
        page = look(*args)
        elsewhere(Task.objects.all().reset)
        if is_done_again:
            elsewhere(lambda: [Message(task).ack() for task in consumer.claim()])
        return page

    monkeypatch.setattr(retention._Reader, "_page", and_reset)
    assert prune(WEEK) == Pruned()
    assert Task.objects.get().event.pk
    assert Task.objects.final().exists() == is_done_again


def test_a_prune_does_not_wait_for_who_refers_to_a_task(stream: Stream, consumer: Consumer):
    """As a row of the project's does that is about to point at it."""
    EventFactory.create_batch(2, stream=stream)
    pull_and_ack(consumer)
    age()
    first = Task.objects.order_by("pk")[0]
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT FROM kanthorq_django_task WHERE id = %s FOR KEY SHARE", [first.pk])
        assert elsewhere(lambda: prune(WEEK)) == Pruned(1, 1)
    assert Task.objects.get().pk == first.pk
