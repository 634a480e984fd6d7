"""The shop's consumers: one for each way to acknowledge and to be operated.

payments  one transaction for the handler and its ack, which publishes the next event as well
refunds   the same, for two kinds of events
bookings  an ack of its own inside ``transaction.atomic()``
emails    acknowledged by its return; what it does is outside of the database, and fails at times
reviews   parked: a person releases each task
parcels   due later; a cancelled one is unpacked by its cancellation handler
tills     published by a schedule: see tills.py
"""

from datetime import datetime, timedelta
from decimal import Decimal

from django.db import transaction
from django.db.models import Count, Sum
from django.db.models.functions import Now

from kanthorq_django import Discard, Exponential, subscribe
from kanthorq_django.message import Message
from project.shop import mailserver
from project.shop.models import Booking, Email, Order, Parcel, Payment, Refund, TillReport
from project.shop.orders import STREAM, announce

# Short, so that the demo shows within seconds how a killed worker's tasks are taken over.
LEASE = timedelta(seconds=3)
SOON = Exponential(attempt_max=8, base=timedelta(seconds=0.3), longest=timedelta(seconds=3))


@subscribe(
    "order.placed.*",
    stream=STREAM,
    consumer="payments",
    atomic=True,
    visibility_timeout=LEASE,
    retry=SOON,
)
def take_payment(message: Message) -> dict[str, str] | None:
    """Take the money, unless the customer was faster to change their mind."""
    order = _lock_order(message)
    if order.status == Order.Status.CANCELLED:
        return None
    Payment.objects.create(order=order, event_id=message.event.pk, amount=order.total)
    order.status = Order.Status.PAID
    order.save(update_fields=["status"])
    announce(order, "payment.captured", amount=order.total)
    return {"paid": str(order.total)}


@subscribe(
    "order.cancelled",
    "order.refunded.>",
    stream=STREAM,
    consumer="refunds",
    atomic=True,
    visibility_timeout=LEASE,
    retry=SOON,
)
def refund(message: Message) -> dict[str, str] | None:
    """Give back what the event says, or all that was paid for a cancelled order, if anything."""
    order = _lock_order(message)
    payment = order.payments.first()
    if payment is None:
        return None
    amount = Decimal(message.event.json().get("amount", payment.amount))
    Refund.objects.create(order=order, event_id=message.event.pk, amount=amount)
    announce(order, "payment.refunded", amount=amount)
    return {"refunded": str(amount)}


@subscribe("payment.>", stream=STREAM, consumer="bookings", visibility_timeout=LEASE, retry=SOON)
def book(message: Message) -> None:
    """Write the ledger: the line and the ack are committed together, or neither is."""
    content = message.event.json()
    sign = -1 if message.event.subject == "payment.refunded" else 1
    with transaction.atomic():
        Booking.objects.create(
            order_id=content["order"],
            event_id=message.event.pk,
            amount=sign * Decimal(content["amount"]),
        )
        message.ack()


@subscribe(
    "order.>",
    excludes=["order.flagged"],
    stream=STREAM,
    consumer="emails",
    visibility_timeout=LEASE,
    retry=SOON,
)
async def write_to_customer(message: Message) -> None:
    """Tell the customer; a mail cannot be rolled back, so a repeat is known by its event's id."""
    event = message.event
    if await Email.objects.filter(event_id=event.pk).aexists():
        return
    order = await Order.objects.aget(pk=event.json()["order"])
    try:
        await mailserver.send(order.email, event.subject)
    except mailserver.AddressUnknown as error:
        raise Discard(str(error)) from error
    await Email.objects.acreate(
        order=order, event_id=event.pk, recipient=order.email, about=event.subject
    )


@subscribe(
    "order.flagged",
    stream=STREAM,
    consumer="reviews",
    parked=True,
    visibility_timeout=LEASE,
    retry=SOON,
)
def review(message: Message) -> None:
    """Note that a person had a look: the one who released the task."""
    Order.objects.filter(pk=message.event.json()["order"]).update(reviewed_at=Now())


@subscribe(
    "parcel.packed",
    stream=STREAM,
    consumer="parcels",
    atomic=True,
    visibility_timeout=LEASE,
    retry=SOON,
)
def send_parcel(message: Message) -> None:
    """Hand the parcel to the courier."""
    _note_parcel(message, Parcel.Fate.SENT)


@send_parcel.on_cancel(retry=SOON)
def unpack_parcel(message: Message) -> None:
    """Put the goods of a cancelled parcel back on the shelf."""
    _note_parcel(message, Parcel.Fate.UNPACKED)


@subscribe(
    "till.due",
    stream=STREAM,
    consumer="tills",
    atomic=True,
    visibility_timeout=LEASE,
    retry=SOON,
)
def report_till(message: Message) -> dict[str, str]:
    """Write down what has come in so far, once for each occurrence of the schedule."""
    event = message.event
    sale = event.json()["sale"]
    payments = Payment.objects.filter(order__sale=sale)
    found = payments.aggregate(count=Count("pk"), taken=Sum("amount", default=Decimal(0)))
    TillReport.objects.create(
        sale_id=sale,
        event_id=event.pk,
        occurs_at=datetime.fromisoformat(event.metadata["occurrence"]),
        payment_count=found["count"],
        taken=found["taken"],
    )
    return {"taken": str(found["taken"])}


def _lock_order(message: Message) -> Order:
    # Whoever changes an order locks its row, so a payment and a cancellation see each other.
    return Order.objects.select_for_update().get(pk=message.event.json()["order"])


def _note_parcel(message: Message, fate: Parcel.Fate) -> None:
    Parcel.objects.create(
        order_id=message.event.json()["order"], event_id=message.event.pk, fate=fate
    )
