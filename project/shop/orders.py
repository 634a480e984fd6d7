"""What happens to an order: each change and the event that tells of it are one transaction."""

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any

from django.db import transaction

from kanthorq_django import publish, publish_many
from kanthorq_django.models import Event
from project.shop.catalogue import Basket
from project.shop.models import Order, Sale

STREAM = "orders"
FLAGGED_FROM = Decimal(350)  # euros; a person looks at orders that are so large


class CardDeclined(Exception):
    """The customer cannot pay; neither the order nor its events have ever been there."""


def place(sale: Sale, basket: Basket, *, is_declined: bool = False) -> Order:
    """Store an order and publish ``order.placed.<channel>``.

    Raises CardDeclined if the card ``is_declined``, which is known last of all.
    """
    with transaction.atomic():
        order = Order.objects.create(
            sale=sale, customer=basket.customer, email=basket.email, total=basket.total
        )
        lines = [line._asdict() for line in basket.lines]
        announce(order, f"order.placed.{basket.channel}", total=order.total, lines=lines)
        if order.total >= FLAGGED_FROM:
            announce(order, "order.flagged", reason=f"{order.total} or more at once")
        if is_declined:
            raise CardDeclined(f"The card of {basket.customer} was declined.")
    return order


def cancel(order: Order) -> None:
    """Let a customer change their mind, whether the order was paid by now or not."""
    with transaction.atomic():
        locked = Order.objects.select_for_update().get(pk=order.pk)
        locked.status = Order.Status.CANCELLED
        locked.save(update_fields=["status"])
        announce(locked, "order.cancelled", reason="changed their mind")


def give_back(order: Order, amount: Decimal) -> None:
    """Give back all or a part of what was paid for an order."""
    extent = "full" if amount == order.total else "partial"
    announce(order, f"order.refunded.{extent}", amount=amount, reason="broken on arrival")


def pack(orders: Iterable[Order], pickup_at: datetime) -> list[Event]:
    """Pack a parcel for each order; the courier takes them no earlier than ``pickup_at``."""
    parcels = [
        Event(
            subject="parcel.packed",
            body={"order": order.pk},
            metadata={"sale": order.sale_id},
            resource_key=order.key,
            schedule_at=pickup_at,
        )
        for order in orders
    ]
    return publish_many(parcels, stream=STREAM)


def announce(order: Order, subject: str, **content: Any) -> Event:
    """Publish an event about ``order`` in the current transaction."""
    return publish(
        subject,
        {"order": order.pk} | content,
        stream=STREAM,
        metadata={"sale": order.sale_id},
        resource_key=order.key,
    )
