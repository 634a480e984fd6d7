"""The shop's pages in the admin."""

from datetime import timedelta

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from kanthorq_django.models import Event
from project.shop import operating, orders
from project.shop.models import Order
from tests.shop.factories import OrderFactory, handle_all, report_till

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("idle_mailserver")]

NOUNS = ("sale", "order", "payment", "refund", "booking", "email", "parcel", "tillreport")


@pytest.fixture
def order() -> Order:
    """An order with a row of each kind."""
    order = OrderFactory.create()
    orders.pack([order], pickup_at=timezone.now() + timedelta(days=1))
    handle_all()
    orders.cancel(order)
    operating.cancel_parcels(order.sale)
    handle_all()
    report_till(order.sale)
    return order


@pytest.mark.parametrize("noun", NOUNS)
def test_every_row_has_a_line_and_a_page(admin_client: Client, order: Order, noun: str):
    listing = admin_client.get(reverse(f"admin:shop_{noun}_changelist"))
    assert listing.status_code == 200
    for row in listing.context["cl"].result_list:
        page = admin_client.get(reverse(f"admin:shop_{noun}_change", args=[row.pk]))
        assert page.status_code == 200
    assert listing.context["cl"].result_count >= 1


@pytest.mark.parametrize("noun", NOUNS)
def test_no_row_is_added_or_deleted_by_hand(admin_client: Client, order: Order, noun: str):
    assert admin_client.get(reverse(f"admin:shop_{noun}_add")).status_code == 403
    assert admin_client.get(reverse(f"admin:shop_{noun}_delete", args=[1])).status_code == 403


def test_an_order_is_found_by_its_key_and_leads_to_its_tasks(admin_client: Client, order: Order):
    listing = admin_client.get(reverse("admin:shop_order_changelist"), {"q": order.key})
    assert list(listing.context["cl"].result_list) == [order]
    tasks = reverse("admin:kanthorq_django_task_changelist", query={"q": order.key})
    assert tasks in listing.content.decode()
    found = admin_client.get(tasks).context["cl"]
    assert found.result_count == sum(
        event.tasks.count() for event in Event.objects.filter(resource_key=order.key)
    )


def test_an_address_can_be_corrected_and_nothing_else(admin_client: Client, order: Order):
    page = reverse("admin:shop_order_change", args=[order.pk])
    form = admin_client.get(page).context["adminform"].form
    assert list(form.fields) == ["email"]
    inlines = ("payments", "refunds", "bookings", "emails", "parcels")
    counts = {f"{name}-{kind}_FORMS": "0" for name in inlines for kind in ("TOTAL", "INITIAL")}
    saved = admin_client.post(page, counts | {"email": "ada@new.example"})
    assert saved.status_code == 302
    order.refresh_from_db()
    assert order.email == "ada@new.example"
