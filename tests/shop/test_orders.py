"""Orders and their events are one transaction."""

from datetime import timedelta
from decimal import Decimal

import pytest
from django.utils import timezone

from kanthorq_django.models import Event
from project.shop import orders
from project.shop.catalogue import Basket, Line
from project.shop.models import Order
from tests.shop.factories import OrderFactory, SaleFactory

pytestmark = pytest.mark.django_db


def subjects() -> list[str]:
    return list(Event.objects.order_by("pk").values_list("subject", flat=True))


def test_an_order_is_announced_with_its_lines_and_its_key():
    order = OrderFactory.create(total=Decimal("17.25"))
    event = Event.objects.get()
    assert event.subject == "order.placed.web"
    assert event.resource_key == order.key == f"order-{order.pk}"
    assert event.metadata == {"sale": order.sale_id}
    assert event.json() == {
        "order": order.pk,
        "total": "17.25",
        "lines": [{"article": "moka pot", "quantity": 1, "price": "17.25"}],
    }


def test_a_declined_card_leaves_neither_order_nor_event():
    basket = Basket("Ada Lind", "ada@mail.example", "web", (Line("moka pot", 1, Decimal(33)),))
    with pytest.raises(orders.CardDeclined, match="The card of Ada Lind was declined"):
        orders.place(SaleFactory.create(), basket, is_declined=True)
    assert not Order.objects.exists()
    assert not Event.objects.exists()


def test_a_large_order_is_flagged_for_a_person():
    OrderFactory.create(total=orders.FLAGGED_FROM)
    OrderFactory.create(total=orders.FLAGGED_FROM - 1)
    assert subjects() == ["order.placed.web", "order.flagged", "order.placed.web"]


def test_a_cancelled_order_is_announced():
    order = OrderFactory.create()
    orders.cancel(order)
    order.refresh_from_db()
    assert order.status == Order.Status.CANCELLED
    assert subjects()[1:] == ["order.cancelled"]


@pytest.mark.parametrize(("amount", "extent"), [("12.30", "full"), ("12.29", "partial")])
def test_giving_back_says_how_much(amount, extent):
    orders.give_back(OrderFactory.create(total=Decimal("12.30")), Decimal(amount))
    assert subjects()[1:] == [f"order.refunded.{extent}"]


def test_parcels_are_due_when_the_courier_comes():
    tomorrow = timezone.now() + timedelta(days=1)
    sale = SaleFactory.create()
    packed = orders.pack(
        [OrderFactory.create(sale=sale), OrderFactory.create(sale=sale)], pickup_at=tomorrow
    )
    assert [event.subject for event in packed] == ["parcel.packed"] * 2
    assert {event.schedule_at for event in Event.objects.filter(pk__in=[e.pk for e in packed])} == {
        tomorrow
    }
