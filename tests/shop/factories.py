"""Sales, orders and what handlers made of them."""

import random
from decimal import Decimal
from typing import Any

from django.utils import timezone
from factory.declarations import SubFactory
from factory.django import DjangoModelFactory

from kanthorq_django.models import Schedule
from kanthorq_django.testing import drain
from project.shop import orders
from project.shop.catalogue import Basket, Line
from project.shop.crowd import Tally, serve_one
from project.shop.models import Order, Sale
from project.shop.tills import DAILY, schedule_reports

CONSUMERS = ("payments", "refunds", "bookings", "emails", "reviews", "parcels", "tills")


class SaleFactory(DjangoModelFactory[Sale]):
    class Meta:
        model = Sale


class OrderFactory(DjangoModelFactory[Order]):
    """Placed as a customer would place it, with its event."""

    class Meta:
        model = Order

    sale = SubFactory(SaleFactory)
    total = Decimal("12.30")
    email = "ada@mail.example"

    @classmethod
    def _create(cls, model_class: type[Order], *args: Any, **kwargs: Any) -> Order:
        lines = (Line("moka pot", 1, kwargs["total"]),)
        basket = Basket("Ada Lind", kwargs["email"], "web", lines)
        return orders.place(kwargs["sale"], basket)


def handle_all() -> int:
    """Let the shop's consumers do what is due; return how many handlers ran."""
    return drain(*CONSUMERS)


def report_till(sale: Sale) -> None:
    """Let the till of ``sale`` report as scheduled, which is now."""
    sale.report_at = timezone.now().replace(microsecond=0)
    sale.save(update_fields=["report_at"])
    schedule_reports(sale, DAILY, sale.report_at)
    Schedule.objects.publish_due()
    handle_all()


def hold_sale(customers: int, seed: int = 1) -> Sale:
    """Return a sale with all that it led to, which only a person and the courier can go on with."""
    sale = SaleFactory.create()
    chance = random.Random(seed)  # noqa: S311  # not a secret
    tally = Tally()
    for _ in range(customers):
        tally = tally.plus(serve_one(sale, chance))
    sale.placed_count, sale.declined_count = tally
    sale.save()
    handle_all()
    return sale
