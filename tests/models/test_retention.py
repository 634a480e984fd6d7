from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now

from kanthorq_django import publish, publish_many, signals, sql
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.exceptions import ForeignCluster
from kanthorq_django.message import Message
from kanthorq_django.models import (
    Consumer,
    Event,
    Stream,
    Task,
    TaskState,
)
from kanthorq_django.models.maintenance.retention import Pruned, count_prunable, prune
from tests.factories import ConsumerFactory, EventFactory, StreamFactory
from tests.models.pruning import WEEK, age, pull_and_ack
from tests.receivers import heard_by

# Cursors are about transactions that have committed.
pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def stream() -> Stream:
    return StreamFactory.create(name="orders")


@pytest.fixture
def consumer(stream: Stream) -> Consumer:
    return ConsumerFactory.create(name="refunds", stream=stream, subject_includes=["order.>"])


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


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_nothing_is_passed_over_though_ids_and_transactions_are_in_opposite_orders(
    batch: int, stream: Stream, consumer: Consumer
):
    for pk in sorted((uuid7() for _ in range(5)), reverse=True):
        EventFactory.create(stream=stream, id=pk)
    pull_and_ack(consumer)
    age()
    assert count_prunable(WEEK, batch=batch) == Pruned(5, 5)
    assert prune(WEEK, batch=batch) == Pruned(5, 5)


def test_the_look_ends_with_the_first_page_of_young_events(stream: Stream, consumer: Consumer):
    EventFactory.create_batch(4, stream=stream)
    pull_and_ack(consumer)
    age()
    EventFactory.create_batch(10, stream=stream)
    sums: list[Pruned] = []

    prune(WEEK, batch=2, on_batch=sums.append)

    assert len(sums) == 3


def test_a_young_event_among_old_ones_ends_no_look(stream: Stream, consumer: Consumer):
    events = EventFactory.create_batch(6, stream=stream)
    pull_and_ack(consumer)
    age()
    Event._base_manager.filter(pk=events[1].pk).update(created_at=Now())

    assert count_prunable(WEEK, batch=2) == prune(WEEK, batch=2) == Pruned(5, 5)


def test_counting_writes_nothing_and_locks_nothing(stream: Stream, consumer: Consumer):
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age()

    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION READ ONLY")
        assert count_prunable(WEEK) == Pruned(1, 1)


def test_a_foreign_cursor_of_another_stream_stops_nothing(stream: Stream, consumer: Consumer):
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age()
    Consumer.objects.filter(pk=ConsumerFactory.create().pk).update(cluster_id=1)

    assert count_prunable(WEEK, streams=[stream]) == prune(WEEK, streams=[stream]) == Pruned(1, 1)


def test_a_cursor_of_another_cluster_stops_it(stream: Stream, consumer: Consumer):
    EventFactory.create(stream=stream)
    pull_and_ack(consumer)
    age()
    Consumer.objects.update(cluster_id=17)

    for verb in (prune, count_prunable):
        with pytest.raises(ForeignCluster, match=r"'refunds'.*rebase"):
            verb(WEEK)
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

    with heard_by(note, signals.pruned):
        for _ in range(2):  # the second time nothing is left, and nothing told
            prune(WEEK, batch=2)

    assert counts == [2, 1]


@pytest.mark.parametrize("older_than", [timedelta(seconds=-1), timedelta.max, 7, None])
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

    assert 100 <= rows_read("prunable", page) <= 1_000
    assert 100 <= rows_read("prune", {"ids": ids}) <= 1_000


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
