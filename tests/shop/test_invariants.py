"""The audit finds each way in which a sale can be wrong."""

from datetime import timedelta
from decimal import Decimal

import pytest
from django.db.models import F
from django.utils import timezone

from kanthorq_django import publish
from kanthorq_django.models import Event, Task, TaskState
from project.shop import operating, orders
from project.shop.invariants import audit
from project.shop.models import (
    Booking,
    Effect,
    Email,
    Order,
    Parcel,
    Payment,
    Refund,
    Sale,
    TillReport,
)
from tests.shop.factories import handle_all, hold_sale, report_till

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("idle_mailserver")]


@pytest.fixture
def sale() -> Sale:
    """A sale with something of everything: refunds, released, cancelled and resumed tasks."""
    held = hold_sale(8)
    paid = Order.objects.filter(sale=held, status=Order.Status.PAID).order_by("pk")
    orders.cancel(paid[0])
    orders.give_back(paid[1], Decimal("1.00"))
    orders.pack(paid[:4], pickup_at=timezone.now() + timedelta(days=1))
    handle_all()
    operating.release_reviews(held)
    operating.cancel_parcels(held)
    handle_all()
    operating.resume_parcels(held)
    handle_all()
    report_till(held)
    return held


def double(model: type[Effect | TillReport]) -> None:
    effect = model._base_manager.earliest("pk")
    effect.pk = None
    effect.save(force_insert=True)


def lose(model: type[Effect | TillReport]) -> None:
    model._base_manager.latest("pk").delete()


def lose_task() -> None:
    Task.objects.filter(consumer__name="bookings").latest("pk").delete()


def lose_event() -> None:
    event = Event.objects.filter(subject__startswith="order.placed.").earliest("pk")
    Task.objects.filter(event=event).delete()
    event.delete()


def forget_order() -> None:
    Sale.objects.update(placed_count=F("placed_count") + 1)


def leave_task_running() -> None:
    task = Task.objects.filter(consumer__name="refunds").earliest("pk")
    Task.objects.filter(pk=task.pk).update(state=TaskState.RUNNING, finalized_at=None)


def discard_task() -> None:
    task = Task.objects.filter(consumer__name="refunds").earliest("pk")
    Task.objects.filter(pk=task.pk).update(state=TaskState.DISCARDED)
    Refund.objects.filter(event_id=task.event_id).delete()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Payment, "payments"),
        (Refund, "refunds"),
        (Booking, "bookings"),
        (Parcel, "parcels"),
        (TillReport, "reports"),
    ],
)
def test_an_effect_that_is_there_twice_is_doubled(sale, model, name):
    double(model)
    found = audit(sale)
    assert {name: count for name, count in found.doubled.items() if count} == {name: 1}
    assert not found.is_sound


@pytest.mark.parametrize(
    ("sabotage", "name"),
    [
        (lambda: lose(Payment), "payments"),
        (lambda: lose(Refund), "refunds"),
        (lambda: lose(Booking), "bookings"),
        (lambda: lose(Email), "e-mails"),
        (lambda: lose(Parcel), "parcels"),
        (lambda: lose(TillReport), "reports"),
        (discard_task, "refunds"),
        (lose_task, "tasks"),
        (leave_task_running, "tasks"),
        (lose_event, "events"),
        (forget_order, "orders"),
    ],
)
def test_what_is_missing_is_lost(sale, sabotage, name):
    sabotage()
    found = audit(Sale.objects.get(pk=sale.pk))
    assert found.lost[name] == 1
    assert not found.is_sound


@pytest.mark.parametrize(("sign", "kind"), [(1, "payments"), (-1, "refunds")])
def test_a_cent_that_is_not_booked_is_found(sale, sign, kind):
    booking = Booking.objects.filter(amount__gt=0 if sign > 0 else -1_000_000).order_by(
        "-amount" if sign > 0 else "amount"
    )[0]
    booking.amount -= Decimal("0.01")
    booking.save()
    found = audit(sale)
    moved, booked = getattr(found, kind)
    assert booked - moved == -sign * Decimal("0.01")
    assert not found.is_sound


def test_an_event_that_outlived_its_order_is_a_phantom(sale):
    publish("order.flagged", {"order": 0}, stream=orders.STREAM, metadata={"sale": sale.pk})
    handle_all()
    found = audit(sale)
    assert found.phantom_count == 1
    assert not found.is_sound


def test_a_report_that_nobody_has_scheduled_is_a_phantom(sale):
    TillReport.objects.update(occurs_at=F("occurs_at") + timedelta(days=1))
    found = audit(sale)
    assert (found.phantom_count, found.lost["reports"]) == (1, 1)
    assert not found.is_sound


def test_an_order_that_nobody_was_told_of_is_a_phantom(sale):
    Sale.objects.update(placed_count=F("placed_count") - 1)
    assert audit(Sale.objects.get(pk=sale.pk)).phantom_count == 1


def test_other_sales_do_not_count(sale):
    hold_sale(5, seed=2)
    double(Booking)
    other = Sale.objects.latest("pk")
    assert audit(other).is_sound


def test_a_sale_that_went_well_is_sound(sale):
    found = audit(sale)
    assert found.is_sound
    assert found.payments.moved == found.payments.booked > found.refunds.moved > 1
