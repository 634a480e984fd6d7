"""Lag beside open transactions: it counts what pulls have not read yet, and nothing else."""

from contextlib import ExitStack

import pytest
from django.db import transaction

from kanthorq_django import publish
from kanthorq_django.models import Consumer, Event, Stream, Task
from kanthorq_django.models.registration import Registration

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def consumer() -> Consumer:
    Stream.objects.register("another")  # or one transaction would wait for the other
    return Consumer.objects.register("reader", Registration("s", includes=[">"]))


def publish_some(count: int, using: str = "default") -> None:
    for _ in range(count):
        publish("a.b", stream="s", using=using)
        publish("a.b", stream="another", using=using)


def unread_count() -> int:
    """Return how many events have no task; each that was read has one."""
    return (
        Event.objects.filter(stream__name="s").exclude(pk__in=Task.objects.values("event")).count()
    )


def read_page(consumer: Consumer, limit: int) -> bool:
    """Pull a page; tell whether there was nothing to read, and check the lag."""
    page = consumer.pull_page(limit)
    assert consumer.lag().count == unread_count()
    return page.is_idle


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize(("first_ends", "second_ends"), [(0, 2), (1, 1), (1, 3), (2, 0), (3, 2)])
def test_lag_is_what_pulls_have_not_read_whenever_transactions_end(
    consumer: Consumer, second: str, third: str, limit: int, first_ends: int, second_ends: int
):
    with ExitStack() as first, ExitStack() as later:
        first.enter_context(transaction.atomic(using=second))
        publish_some(2, second)
        publish_some(2)
        while not read_page(consumer, 10):
            pass  # now the cursor knows of the first
        publish_some(1)
        later.enter_context(transaction.atomic(using=third))
        publish_some(2, third)
        publish_some(3)
        for page in range(4):
            read_page(consumer, limit)  # a window that knows of both
            if page == first_ends:
                first.close()
            if page == second_ends:
                later.close()
            publish_some(1)
            assert consumer.lag().count == unread_count() > 0
        while not read_page(consumer, limit):
            pass
    assert consumer.lag().count == unread_count() == 0
