"""What each consumer makes of its events."""

from datetime import timedelta
from decimal import Decimal

import pytest
from django.db.models.functions import Now
from django.utils import timezone

from kanthorq_django.models import Consumer, Event, Schedule, Task, TaskState
from project.shop import mailserver, operating, orders
from project.shop.models import Booking, Email, Order, Parcel, Payment, Refund, TillReport
from project.shop.tills import DAILY, schedule_reports
from tests.shop.factories import OrderFactory, SaleFactory, handle_all, report_till

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("idle_mailserver")]


def state(consumer: str) -> TaskState:
    return TaskState(Task.objects.get(consumer__name=consumer).state)


def amounts(model: type[Payment | Refund | Booking]) -> list[Decimal]:
    return list(model._base_manager.order_by("pk").values_list("amount", flat=True))


def pack_for_tomorrow() -> Order:
    order = OrderFactory.create()
    orders.pack([order], pickup_at=timezone.now() + timedelta(days=1))
    handle_all()
    return order


def test_an_order_is_paid_booked_and_confirmed():
    order = OrderFactory.create(total=Decimal("12.30"))
    handle_all()
    order.refresh_from_db()
    assert order.status == Order.Status.PAID
    assert amounts(Payment) == amounts(Booking) == [Decimal("12.30")]
    assert Email.objects.get().recipient == order.email
    assert Task.objects.get(consumer__name="payments").result == {"paid": "12.30"}


def test_an_order_that_is_cancelled_before_it_is_paid_moves_no_money():
    orders.cancel(OrderFactory.create())
    handle_all()
    assert amounts(Payment) == amounts(Refund) == amounts(Booking) == []
    assert state("payments") == state("refunds") == TaskState.COMPLETED


def test_an_order_that_is_cancelled_later_gets_all_its_money_back():
    order = OrderFactory.create(total=Decimal("12.30"))
    handle_all()
    orders.cancel(order)
    handle_all()
    assert amounts(Refund) == [Decimal("12.30")]
    assert amounts(Booking) == [Decimal("12.30"), Decimal("-12.30")]


def test_a_partial_refund_gives_back_what_its_event_says():
    order = OrderFactory.create(total=Decimal("12.30"))
    handle_all()
    orders.give_back(order, Decimal("6.15"))
    handle_all()
    assert amounts(Refund) == [Decimal("6.15")]
    assert amounts(Booking) == [Decimal("12.30"), Decimal("-6.15")]


def test_what_one_event_led_to_says_which_sale_it_belongs_to():
    order = OrderFactory.create()
    handle_all()
    captured = Event.objects.get(subject="payment.captured")
    assert captured.metadata == {"sale": order.sale_id}
    assert captured.resource_key == order.key


def test_a_mail_that_has_gone_is_not_sent_again():
    order = OrderFactory.create()
    Email.objects.create(order=order, event_id=Event.objects.get().pk, recipient="a@b.example")
    handle_all()
    assert Email.objects.get().recipient == "a@b.example"
    assert state("emails") == TaskState.COMPLETED


def test_a_busy_mail_server_is_tried_again(monkeypatch):
    monkeypatch.setattr(mailserver, "BUSY_SHARE", 1)
    OrderFactory.create()
    handle_all()
    assert state("emails") == TaskState.RETRYABLE
    monkeypatch.setattr(mailserver, "BUSY_SHARE", 0)
    Task.objects.filter(consumer__name="emails").update(schedule_at=Now())
    handle_all()
    assert state("emails") == TaskState.COMPLETED
    assert Email.objects.count() == 1


def test_a_mistyped_address_is_given_up_until_it_is_corrected():
    order = OrderFactory.create(email="ada@shop.invalid")
    handle_all()
    assert state("emails") == TaskState.DISCARDED
    operating.correct_addresses(order.sale)
    handle_all()
    assert Email.objects.get().recipient == "ada@mail.example"


def test_a_flagged_order_waits_until_a_person_releases_it():
    order = OrderFactory.create(total=orders.FLAGGED_FROM)
    handle_all()
    assert state("reviews") == TaskState.PENDING
    operating.release_reviews(order.sale)
    handle_all()
    order.refresh_from_db()
    assert order.reviewed_at is not None


def test_nobody_is_told_that_their_order_was_flagged():
    OrderFactory.create(total=orders.FLAGGED_FROM)
    handle_all()
    assert Email.objects.get().about == "order.placed.web"


def test_a_parcel_waits_for_the_courier():
    pack_for_tomorrow()
    assert state("parcels") == TaskState.AVAILABLE
    assert not Parcel.objects.exists()


def test_a_cancelled_parcel_is_unpacked():
    order = pack_for_tomorrow()
    operating.cancel_parcels(order.sale)
    assert state("parcels") == TaskState.CANCELLING
    handle_all()
    assert state("parcels") == TaskState.CANCELLED
    assert Parcel.objects.get().fate == Parcel.Fate.UNPACKED


def test_a_resumed_parcel_is_sent_at_once():
    order = pack_for_tomorrow()
    operating.cancel_parcels(order.sale)
    handle_all()
    operating.resume_parcels(order.sale)
    handle_all()
    assert state("parcels") == TaskState.COMPLETED
    assert Parcel.objects.filter(fate=Parcel.Fate.SENT).count() == 1


def test_the_till_reports_what_has_come_in_to_its_own_sale():
    order = OrderFactory.create(total=Decimal("12.30"))
    OrderFactory.create(sale=order.sale, total=Decimal("7.70"))
    OrderFactory.create(sale=SaleFactory.create())
    handle_all()
    report_till(order.sale)
    report = TillReport.objects.get()
    assert (report.sale, report.occurs_at) == (order.sale, order.sale.report_at)
    assert (report.payment_count, report.taken) == (2, Decimal("20.00"))


def test_a_new_sale_takes_the_till_over():
    report_till(SaleFactory.create())
    second, soon = SaleFactory.create(), timezone.now().replace(microsecond=0) + timedelta(hours=1)
    schedule_reports(second, DAILY, soon)
    (schedule,) = Schedule.objects.all()
    assert (schedule.next_at, schedule.metadata) == (soon, {"sale": second.pk})


def test_the_leases_are_short_enough_to_see_a_take_over():
    handle_all()
    shop = Consumer.objects.filter(stream__name=orders.STREAM)
    assert {consumer.visibility_timeout for consumer in shop} == {timedelta(seconds=3)}
