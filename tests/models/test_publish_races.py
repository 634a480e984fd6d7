"""Publishers on connections of their own: who wins, who waits, and that nobody deadlocks."""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from django.db import connection, connections, transaction

from kanthorq_django import publish, publish_many
from kanthorq_django.exceptions import IdempotencyConflict
from kanthorq_django.models import Event, Stream

pytestmark = pytest.mark.django_db(transaction=True)

T = TypeVar("T")
PATIENCE = 20  # seconds until a test gives up


class Rivals:
    """Threads that each publish over a connection of their own."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    def start(self, publishing: Callable[[], T]) -> "Future[T]":
        return self._threads.submit(_over_own_connection, publishing)

    def race(self, *publishings: Callable[[], T]) -> list[T]:
        """Start all at the same moment; return what each got."""
        barrier = threading.Barrier(len(publishings))

        def run(publishing: Callable[[], T]) -> T:
            with connection.cursor():  # connected before the start
                barrier.wait(PATIENCE)
            return publishing()

        started = [self.start(functools.partial(run, each)) for each in publishings]
        return [future.result(PATIENCE) for future in started]


def _over_own_connection(publishing: Callable[[], T]) -> T:
    try:
        return publishing()
    finally:
        connections.close_all()


@pytest.fixture
def rivals() -> Iterator[Rivals]:
    with ThreadPoolExecutor(8) as threads:
        yield Rivals(threads)


def wait_until_blocked(*futures: "Future[Any]") -> None:
    """Return once as many other connections to this database wait for a lock."""
    deadline = time.monotonic() + PATIENCE
    with connection.cursor() as cursor:
        while True:
            # What a transaction sees of others' activity is frozen at its first look.
            cursor.execute("SELECT pg_stat_clear_snapshot()")
            cursor.execute(
                "SELECT FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            if cursor.rowcount == len(futures):
                return
            assert not any(future.done() for future in futures), "it did not wait"
            assert time.monotonic() < deadline, "it neither waited nor ended"
            time.sleep(0.01)


def keyed(body: str = "3") -> Event:
    return publish("order.paid", body, stream="orders", idempotency_key="k")


def test_the_second_publisher_of_a_key_waits_and_gets_the_committed_event(rivals: Rivals) -> None:
    with transaction.atomic():
        first = keyed()
        second = rivals.start(keyed)
        wait_until_blocked(second)
    assert second.result(PATIENCE) == first == Event.objects.get()
    assert not second.result().created


def test_the_second_publisher_of_a_key_publishes_if_the_first_rolls_back(rivals: Rivals) -> None:
    with transaction.atomic():
        first = keyed()
        second = rivals.start(keyed)
        wait_until_blocked(second)
        transaction.set_rollback(True)
    assert second.result(PATIENCE) == Event.objects.get() != first
    assert second.result().created


def test_the_second_publisher_of_a_key_learns_of_a_conflict(rivals: Rivals) -> None:
    def conflict_then_publish() -> Event:
        with transaction.atomic():
            with pytest.raises(IdempotencyConflict):
                keyed("4")
            return publish("order.noted", stream="orders")

    with transaction.atomic():
        first = keyed("3")
        second = rivals.start(conflict_then_publish)
        wait_until_blocked(second)
    noted = second.result(PATIENCE)
    assert set(Event.objects.all()) == {first, noted}


@pytest.mark.parametrize("is_registered", [True, False])
def test_of_many_publishers_of_one_key_one_inserts(rivals: Rivals, is_registered: bool) -> None:
    if is_registered:
        Stream.objects.register("orders")
    events = rivals.race(*[keyed] * 8)
    assert len(set(events)) == 1
    assert [event.created for event in events].count(True) == 1
    assert Event.objects.count() == Stream.objects.count() == 1


def test_of_many_publishers_of_one_key_in_transactions_one_inserts(rivals: Rivals) -> None:
    @transaction.atomic
    def in_a_transaction() -> Event:
        publish("order.placed", stream="orders")
        return keyed()

    events = rivals.race(*[in_a_transaction] * 4, *[keyed] * 4)
    assert len(set(events)) == 1
    assert [event.created for event in events].count(True) == 1
    assert Event.objects.count() == 5


def test_many_publishers_of_one_batch_store_it_once(rivals: Rivals) -> None:
    def batch() -> list[Event]:
        return publish_many(
            [Event(subject="order.paid", idempotency_key=f"k{number}") for number in range(50)],
            stream="orders",
        )

    batches = rivals.race(*[batch] * 4)
    assert all(events == batches[0] for events in batches)
    created = [event.pk for events in batches for event in events if event.created]
    assert len(created) == len(set(created)) == Event.objects.count() == 50


def test_batches_of_the_same_keys_in_opposite_order_do_not_deadlock(rivals: Rivals) -> None:
    keys = [f"k{number}" for number in range(9)]

    def batch(order: list[str]) -> int:
        given = [Event(subject="order.paid", idempotency_key=key) for key in order]
        return sum(event.created for event in publish_many(given, stream="orders"))

    Stream.objects.register("orders")
    with transaction.atomic():
        # Both would get as far as this key, and then each wait for what the other has.
        publish("order.paid", stream="orders", idempotency_key=keys[4])
        upwards = rivals.start(lambda: batch(keys))
        downwards = rivals.start(lambda: batch(keys[::-1]))
        wait_until_blocked(upwards, downwards)
    assert upwards.result(PATIENCE) + downwards.result(PATIENCE) == 8
    assert Event.objects.count() == 9


@pytest.mark.parametrize("count", [1, 2])
def test_publishers_who_both_use_a_stream_first_share_one_row(rivals: Rivals, count: int) -> None:
    def first_use() -> list[Event]:
        return publish_many([Event(subject="order.paid") for _ in range(count)], stream="orders")

    batches = rivals.race(*[first_use] * 6)
    assert Stream.objects.count() == 1
    assert {event.stream_id for events in batches for event in events} == {Stream.objects.get().pk}
    assert Event.objects.count() == 6 * count


def test_a_stream_whose_first_use_rolls_back_is_there_for_who_waited(rivals: Rivals) -> None:
    with transaction.atomic():
        publish("order.paid", stream="orders")
        second = rivals.start(lambda: publish("order.sent", stream="orders"))
        wait_until_blocked(second)
        transaction.set_rollback(True)
    assert second.result(PATIENCE) == Event.objects.get()
    assert Stream.objects.get().name == "orders"


def test_publishers_into_one_stream_never_wait_for_each_other(rivals: Rivals) -> None:
    Stream.objects.register("orders")
    with transaction.atomic():
        mine = publish("order.paid", stream="orders")
        # It ends while our transaction is open.
        other = rivals.start(lambda: publish("order.sent", stream="orders")).result(PATIENCE)
        assert Event.objects.count() == 2
    assert set(Event.objects.all()) == {mine, other}


def test_a_thread_without_a_connection_opens_one(rivals: Rivals) -> None:
    assert rivals.start(keyed).result(PATIENCE) == Event.objects.get()
