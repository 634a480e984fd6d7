"""A server that forgot a prepared transaction in one recovery, and found it in the next."""

import logging
from uuid import UUID

import pytest
from django.db import transaction

from kanthorq_django import publish
from kanthorq_django.exceptions import ForeignCluster
from kanthorq_django.models import Consumer
from kanthorq_django.models.delivery import cursor
from kanthorq_django.models.registration import Registration
from tests.races.race import execute
from tests.races.test_open_transactions import burn_xid

pytestmark = pytest.mark.django_db(transaction=True)

SEEN_AS_ENDED = "format('%1$s:%1$s:', pg_snapshot_xmax(pg_current_snapshot()))::pg_snapshot"


@pytest.fixture
def consumer() -> Consumer:
    return Consumer.objects.register("reader", Registration("s", includes=[">"]))


def forget(column: str = "cursor") -> None:
    """Let the cursor be what a pull stored while the server did not know of the transaction."""
    burn_xid("default")
    execute("default", f'UPDATE kanthorq_django_consumer SET "{column}" = {SEEN_AS_ENDED}')  # noqa: S608  # a column of this test


def pulled(consumer: Consumer) -> list[UUID]:
    return [task.event_id for task in consumer.pull()]


def test_what_is_open_again_is_read_when_it_commits(
    consumer: Consumer, second: str, caplog: pytest.LogCaptureFixture
):
    with transaction.atomic(using=second):
        event = publish("a.b", stream="s", using=second)
        forget()

        with caplog.at_level(logging.WARNING, "kanthorq_django"):
            assert pulled(consumer) == []

        other = publish("a.b", stream="s")
        assert pulled(consumer) == [other.id]
    assert "has open transactions again that consumer reader saw ended" in caplog.text
    assert pulled(consumer) == [event.id]
    assert pulled(consumer) == []


def test_it_stays_unread_to_the_end_of_an_open_window(consumer: Consumer, second: str):
    with transaction.atomic(using=second):
        event = publish("a.b", stream="s", using=second)
        known = [publish("a.b", stream="s").id for _ in range(3)]
        assert len(consumer.pull(1)) == 1
        forget("window")
        assert consumer.pull_page(10).leased == []  # it mends
        assert len(consumer.pull_page(10).leased) == 2  # and this one ends the window
    found = {event for _ in range(4) for event in pulled(consumer)}
    assert event.id in found
    assert found <= {*known, event.id}


def test_an_idle_look_finds_it(consumer: Consumer, second: str):
    with transaction.atomic(using=second):
        publish("a.b", stream="s", using=second)
        pulled(consumer)
        assert not cursor.has_unread(consumer)
        forget()
        assert cursor.has_unread(consumer)


AHEAD = SEEN_AS_ENDED.replace("())", "())::text::bigint + 1000")


@pytest.mark.parametrize("alteration", ["cluster_id = 1", f'"cursor" = {AHEAD}'])
def test_nothing_is_mended_in_another_cluster(consumer: Consumer, second: str, alteration: str):
    """Such a cursor saw nothing of what is open here, and a rebase needs it as it is."""
    with transaction.atomic(using=second):
        publish("a.b", stream="s", using=second)
        forget()
        execute("default", f"UPDATE kanthorq_django_consumer SET {alteration}")  # noqa: S608  # of this test
        before = Consumer.objects.filter(pk=consumer.pk).values().get()
        with pytest.raises(ForeignCluster):
            consumer.pull()
    assert Consumer.objects.filter(pk=consumer.pk).values().get() == before
