"""Publishing from coroutines, on the connection of the thread that runs them."""

import asyncio

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import SynchronousOnlyOperation
from django.db import transaction

from kanthorq_django import apublish, apublish_many, publish, publish_many
from kanthorq_django.exceptions import InvalidSubject
from kanthorq_django.models import Consumer, Event
from kanthorq_django.models.registration import Registration
from kanthorq_django.sql.session import USES_BEFORE

pytestmark = pytest.mark.django_db


def test_a_coroutine_publishes_with_every_option() -> None:
    @async_to_sync
    async def publish_in_a_loop() -> Event:
        return await apublish(
            "order.paid",
            {"total": 3},
            stream="orders",
            metadata={"trace": "1f"},
            resource_key="order-17",
            idempotency_key="k",
        )

    event = publish_in_a_loop()
    assert event == Event.objects.get()
    assert (event.stream.name, event.json(), event.metadata) == (
        "orders",
        {"total": 3},
        {"trace": "1f"},
    )


def test_a_coroutine_publishes_many() -> None:
    given = [Event(subject=f"order.{number}") for number in range(3)]
    assert async_to_sync(apublish_many)(given, stream="orders") == given
    assert list(Event.objects.order_by("pk")) == given


def test_coroutines_publish_side_by_side() -> None:
    @async_to_sync
    async def publish_together() -> list[Event]:
        return await asyncio.gather(*(apublish(f"order.{number}") for number in range(5)))

    assert set(publish_together()) == set(Event.objects.all())


def test_a_coroutine_joins_the_transaction_of_its_thread() -> None:
    with transaction.atomic():
        async_to_sync(apublish)("order.paid")
        transaction.set_rollback(True)
    assert not Event.objects.exists()


def test_a_coroutine_gets_the_same_errors() -> None:
    with pytest.raises(InvalidSubject):
        async_to_sync(apublish)("order..paid")
    with pytest.raises(InvalidSubject, match=r"events\[1\]"):
        async_to_sync(apublish_many)([Event(subject="a"), Event(subject="")])


def test_publishing_without_await_in_a_coroutine_is_refused_as_django_does() -> None:
    @async_to_sync
    async def publish_blocking(count: int) -> None:
        if count == 1:
            publish("order.paid")
        else:
            publish_many([Event(subject="order.paid") for _ in range(count)])

    for _ in range(USES_BEFORE + 2):  # by a statement that is kept, too
        publish("order.before")
    for count in (1, 2):
        with pytest.raises(SynchronousOnlyOperation, match=r"async context; use `await apublish"):
            publish_blocking(count)
    assert not Event.objects.filter(subject="order.paid").exists()


def test_a_pull_in_a_coroutine_is_refused_as_django_does() -> None:
    consumer = Consumer.objects.register("reader", Registration("default", includes=[">"]))

    @async_to_sync
    async def look() -> None:
        consumer.lag()

    with pytest.raises(SynchronousOnlyOperation, match="async context"):
        look()
