"""Pages of transactions that were open when others had been read, and looks for them."""

from collections.abc import Iterator
from uuid import UUID

import pytest
from django.db import transaction
from pytest_django import Settings

from kanthorq_django import publish
from kanthorq_django.domain.identifiers import uuid7
from kanthorq_django.models import Consumer, Event
from kanthorq_django.models.delivery.cursor import has_unread
from kanthorq_django.models.registration import Registration
from tests.races.test_open_transactions import burn_xid

pytestmark = pytest.mark.django_db(transaction=True)


def register(*includes: str) -> Consumer:
    return Consumer.objects.register("reader", Registration("s", includes=includes))


def publish_as(pk: UUID, using: str) -> None:
    event = Event(id=pk, subject="a.b")
    Event.objects.using(using).publish([event], stream="s")


def pages(consumer: Consumer, limit: int) -> Iterator[list[UUID]]:
    """Pull until there is nothing to read; yield what each page leased."""
    while not (page := consumer.pull_page(limit)).is_idle:
        yield [task.event_id for task in page.tasks]


def test_late_transactions_are_read_in_their_order_whatever_that_of_their_ids_is(
    second: str, third: str, settings: Settings
):
    settings.KANTHORQ = {"PAGE_SIZE": 1}
    consumer = register(">")
    publish("a.b", stream="s")
    low, high = sorted((uuid7(), uuid7()))
    with transaction.atomic(using=second), transaction.atomic(using=third):
        publish_as(high, second)
        publish_as(low, third)
        burn_xid("default")
        assert sum(map(len, pages(consumer, 1))) == 1  # now the cursor knows of both
    assert [page for page in pages(consumer, 1) if page] == [[high], [low]]


def test_a_page_is_cut_behind_late_events_too(second: str, settings: Settings):
    settings.KANTHORQ = {"PAGE_SIZE": 2}
    consumer = register("wanted")
    publish("other", stream="s")
    with transaction.atomic(using=second):
        for _ in range(2):
            publish("other", stream="s", using=second)
        publish("other", stream="s")
        assert not any(pages(consumer, 2))
    for _ in range(3):
        publish("other", stream="s")
    event = publish("wanted", stream="s")
    assert [page for page in pages(consumer, 2) if page] == [[event.id]]


def test_a_late_transaction_that_published_nothing_is_nothing_to_read(second: str):
    consumer = register(">")
    publish("a.b", stream="s")
    with transaction.atomic(using=second):
        burn_xid(second)
        for _ in range(2):
            publish("a.b", stream="s")
            assert has_unread(consumer)
            assert any(pages(consumer, 10))
    assert not has_unread(consumer)
    assert not any(pages(consumer, 10))
