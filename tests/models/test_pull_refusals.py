from collections.abc import Mapping

import pytest
from django.db import connection, transaction

from kanthorq_django import publish
from kanthorq_django.exceptions import ForeignCluster, PullInsideTransaction
from kanthorq_django.models import Consumer, Event, Task
from kanthorq_django.models.delivery.cursor import has_unread
from kanthorq_django.models.registration import Registration

pytestmark = pytest.mark.django_db(transaction=True)

FAR_AHEAD = (1 << 40) + 5  # transactions


@pytest.fixture
def consumer() -> Consumer:
    consumer = Consumer.objects.register("reader", Registration("s", includes=[">"]))
    publish("a.b", stream="s")
    return consumer


def stored(consumer: Consumer) -> Mapping[str, object]:
    return Consumer.objects.filter(pk=consumer.pk).values().get()


def has_events(consumer: Consumer) -> bool:
    return has_unread(consumer)


def test_a_pull_is_refused_inside_a_transaction_and_leaves_it_usable(consumer: Consumer):
    with transaction.atomic():
        with pytest.raises(PullInsideTransaction, match="transaction of its own"):
            consumer.pull()
        with pytest.raises(PullInsideTransaction):
            consumer.pull_page(10)
        publish("a.c", stream="s")

    assert [task.event.subject for task in consumer.pull()] == ["a.b", "a.c"]


def test_a_pull_is_refused_inside_a_transaction_begun_by_sql_and_ends_it_not(consumer: Consumer):
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        event = publish("a.c", stream="s")
        with pytest.raises(PullInsideTransaction):
            consumer.pull()
        cursor.execute("ROLLBACK")
    assert not Event.objects.filter(pk=event.pk).exists()


def test_a_pull_is_refused_while_autocommit_is_off(consumer: Consumer):
    connection.set_autocommit(False)
    try:
        with pytest.raises(PullInsideTransaction):
            consumer.pull()
    finally:
        connection.rollback()
        connection.set_autocommit(True)


def test_a_cursor_of_another_cluster_is_refused_with_the_way_out(consumer: Consumer):
    Consumer.objects.update(cluster_id=1)
    before = stored(consumer)

    with pytest.raises(ForeignCluster, match=r"'reader'.*manage\.py kanthorq rebase"):
        consumer.pull()

    assert stored(consumer) == before
    assert not Task.objects.exists()


def test_a_foreign_cursor_is_refused_even_if_it_has_nothing_to_read(consumer: Consumer):
    Event.objects.all().delete()
    Consumer.objects.update(cluster_id=1)

    assert has_events(consumer)
    with pytest.raises(ForeignCluster):
        consumer.pull()


def test_a_cursor_ahead_of_this_cluster_is_refused_and_nothing_is_written(consumer: Consumer):
    Consumer.objects.update(cursor=f"{FAR_AHEAD}:{FAR_AHEAD}:")
    before = stored(consumer)

    assert has_events(consumer)
    with pytest.raises(ForeignCluster):
        consumer.pull()

    assert stored(consumer) == before


def test_an_event_ahead_of_this_cluster_is_refused_instead_of_skipped(consumer: Consumer):
    publish("a.restored", stream="s")
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE kanthorq_django_event SET xid = %s::text::xid8 WHERE subject = 'a.restored'",
            [FAR_AHEAD],
        )

    with pytest.raises(ForeignCluster):
        consumer.pull()

    assert not Task.objects.exists()


def test_an_event_ahead_of_this_cluster_is_seen_where_all_others_are_read(consumer: Consumer):
    consumer.pull()
    publish("a.restored", stream="s")
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE kanthorq_django_event SET"
            " xid = (xid::text::bigint + 100000)::text::xid8 WHERE subject = 'a.restored'"
        )

    assert has_events(consumer)
    with pytest.raises(ForeignCluster):
        consumer.pull()


def test_another_stream_is_read_all_the_same(consumer: Consumer):
    publish("a.restored", stream="elsewhere")
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE kanthorq_django_event SET xid = %s::text::xid8 WHERE subject = 'a.restored'",
            [FAR_AHEAD],
        )

    assert len(consumer.pull()) == 1


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None, "3"])
def test_a_limit_that_is_no_count_is_refused(consumer: Consumer, limit: object):
    with pytest.raises(ValueError, match="limit must be 1 to 1,000,000, not"):
        consumer.pull(limit)  # type: ignore[arg-type]  # what is tested
