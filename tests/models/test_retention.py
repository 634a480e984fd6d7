import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.db.models.functions import Now

from kanthorq_django import publish, publish_many, signals, sql
from kanthorq_django.exceptions import ForeignCluster
from kanthorq_django.message import Message
from kanthorq_django.models import (
    Consumer,
    Event,
    OperatorAction,
    Stream,
    Task,
    TaskState,
    retention,
)
from kanthorq_django.models.audit import Order
from kanthorq_django.models.retention import Pruned, count_prunable, prune
from tests.factories import ConsumerFactory, EventFactory, StreamFactory

# Cursors are about transactions that have committed.
pytestmark = pytest.mark.django_db(transaction=True)

WEEK = timedelta(days=7)
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


def age(days: float = 8) -> None:
    """Let everything stored so far have happened ``days`` ago."""
    ago = Now() - timedelta(days=days)
    Event._base_manager.update(created_at=ago)
    Task.objects.update(created_at=ago)
    Task.objects.final().update(finalized_at=ago)


def pull_and_ack(consumer: Consumer) -> None:
    while tasks := consumer.pull():
        for task in tasks:
            Message(task).ack()


def test_finished_events_go_with_their_tasks(stream: Stream, consumer: Consumer):
    EventFactory.create_batch(3, stream=stream)
    pull_and_ack(consumer)
    age()

    assert count_prunable(WEEK) == Pruned(3, 3)
    assert prune(WEEK) == Pruned(3, 3)
    assert not Event.objects.exists()
    assert not Task.objects.exists()


def test_events_that_no_consumer_selected_go_too(stream: Stream, consumer: Consumer):
    EventFactory.create(stream=stream, subject="parcel.sent")
    consumer.pull()
    age()

    assert prune(WEEK) == Pruned(1, 0)


@pytest.mark.parametrize("state", [state for state in TaskState if state not in (101, -101, -102)])
def test_an_event_with_a_task_that_is_not_final_stays(
    state: TaskState, stream: Stream, consumer: Consumer
):
    EventFactory.create(stream=stream)
    consumer.pull()
    Task.objects.update(state=state)
    age()

    assert count_prunable(WEEK) == prune(WEEK) == Pruned()
    assert Task.objects.exists()


def test_one_open_task_of_several_keeps_the_event_and_all_its_tasks(
    stream: Stream, consumer: Consumer
):
    other = ConsumerFactory.create(stream=stream)
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    other.pull()
    age()

    assert prune(WEEK) == Pruned()
    assert Task.objects.count() == 2


def test_what_has_been_final_for_less_long_stays(stream: Stream, consumer: Consumer):
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age()
    Task.objects.update(finalized_at=Now() - timedelta(days=6))

    assert count_prunable(WEEK) == prune(WEEK) == Pruned()


def test_young_events_stay_also_without_tasks(stream: Stream, consumer: Consumer):
    EventFactory.create(stream=stream, subject="parcel.sent")
    consumer.pull()

    assert count_prunable(WEEK) == prune(WEEK) == Pruned()


def test_an_event_that_one_consumer_has_not_read_stays_however_old(
    stream: Stream, consumer: Consumer
):
    ConsumerFactory.create(stream=stream)
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age(days=1000)

    assert count_prunable(WEEK) == prune(WEEK) == Pruned()


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


def test_a_window_that_is_still_being_read_keeps_its_events(stream: Stream, consumer: Consumer):
    EventFactory.create_batch(3, stream=stream)
    (task,) = consumer.pull(1)
    Message(task).ack()
    age()

    assert prune(WEEK) == Pruned()
    pull_and_ack(consumer)
    age()
    assert prune(WEEK) == Pruned(3, 3)


def test_a_stream_without_consumers_is_pruned_by_age_only_when_it_is_named(stream: Stream):
    EventFactory.create_batch(2, stream=stream)
    age()
    EventFactory.create(stream=stream)

    assert prune(WEEK) == Pruned()
    assert prune(WEEK, streams=[stream]) == Pruned(2, 0)


def test_only_the_named_stream_is_pruned(stream: Stream, consumer: Consumer):
    other = ConsumerFactory.create()
    for one in (consumer, other):
        EventFactory.create(stream=one.stream)
        pull_and_ack(one)
    age()

    assert prune(WEEK, streams=[other.stream]) == Pruned(1, 1)
    assert Event.objects.filter(stream=stream).count() == 1


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_any_batch_prunes_everything_past_what_stays(
    batch: int, stream: Stream, consumer: Consumer
):
    EventFactory.create_batch(7, stream=stream)
    pull_and_ack(consumer)
    age()
    kept = Task.objects.order_by("pk")[2]
    Task.objects.filter(pk=kept.pk).reset()
    sums: list[Pruned] = []

    assert count_prunable(WEEK, batch=batch) == Pruned(6, 6)
    assert prune(WEEK, batch=batch, on_batch=sums.append) == Pruned(6, 6)
    assert sums[-1] == Pruned(6, 6)
    assert Event.objects.get().pk == kept.event_id


def test_the_look_ends_with_the_first_page_of_young_events(stream: Stream, consumer: Consumer):
    EventFactory.create_batch(4, stream=stream)
    pull_and_ack(consumer)
    age()
    EventFactory.create_batch(10, stream=stream)
    sums: list[Pruned] = []

    prune(WEEK, batch=2, on_batch=sums.append)

    assert len(sums) == 3


def test_counting_writes_nothing_and_locks_nothing(stream: Stream, consumer: Consumer):
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age()

    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION READ ONLY")
        assert count_prunable(WEEK) == Pruned(1, 1)


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


def test_a_cursor_of_another_cluster_stops_it(stream: Stream, consumer: Consumer):
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age()
    Consumer.objects.update(cluster_id=17)

    for verb in (prune, count_prunable):
        with pytest.raises(ForeignCluster, match=r"'refunds'.*rebase"):
            verb(WEEK)
    assert Event.objects.exists()


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


def test_a_pruned_idempotency_key_can_be_used_anew(stream: Stream, consumer: Consumer):
    publish("order.paid", stream="orders", idempotency_key="once")
    pull_and_ack(consumer)
    age()
    prune(WEEK)

    assert publish("order.paid", stream="orders", idempotency_key="once").created


def test_pulling_goes_on_after_a_prune(stream: Stream, consumer: Consumer):
    EventFactory.create_batch(3, stream=stream)
    pull_and_ack(consumer)
    age()
    prune(WEEK)
    EventFactory.create(stream=stream)

    assert len(consumer.pull()) == 1


def test_the_signal_tells_how_many_were_pruned(stream: Stream, consumer: Consumer):
    EventFactory.create_batch(3, stream=stream)
    pull_and_ack(consumer)
    age()
    counts: list[int] = []

    def note(*, count: int, **_: Any) -> None:
        counts.append(count)

    signals.pruned.connect(note, sender=Event)
    prune(WEEK, batch=2)

    assert counts == [2, 1]


@pytest.mark.parametrize("older_than", [timedelta(seconds=-1), 7, None])
def test_only_a_duration_can_be_older(older_than: Any):
    with pytest.raises(ValueError, match="older_than must be a timedelta"):
        prune(older_than)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, 100_001])
def test_a_batch_is_a_number_within_bounds(batch: Any):
    with pytest.raises(ValueError, match="batch must be 1 to 100,000"):
        prune(WEEK, batch=batch)


def test_a_batch_reads_its_own_rows_and_not_the_whole_table(stream: Stream, consumer: Consumer):
    publish_many([Event(subject="order.paid") for _ in range(20_000)], stream="orders")
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO kanthorq_django_task (consumer_id, event_id, state, finalized_at)"
            " SELECT %s, id, 101, now() FROM kanthorq_django_event",
            [consumer.pk],
        )
        cursor.execute("ANALYZE kanthorq_django_event, kanthorq_django_task")
    ids = list(Event.objects.order_by("pk").values_list("pk", flat=True)[:100])
    page = {"stream_id": stream.pk, "after_xid": "0", "after_id": ids[0], "batch": 100}

    assert rows_read("prunable", page) <= 1_000
    assert rows_read("prune", {"ids": ids}) <= 1_000


def rows_read(statement: str, params: dict[str, Any]) -> float:
    """Return how many rows the hungriest step of ``statement`` goes through."""
    explained = f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {sql.load(statement)}"
    with connection.cursor() as cursor:
        cursor.execute(explained, params | {"older_than": timedelta(0)})
        return max(_rows(cursor.fetchone()[0][0]["Plan"]))


def _rows(step: dict[str, Any]) -> Iterator[float]:
    rows = step["Actual Rows"] + step.get("Rows Removed by Filter", 0)
    yield rows * step["Actual Loops"]
    for part in step.get("Plans", []):
        yield from _rows(part)
