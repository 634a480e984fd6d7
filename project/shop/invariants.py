"""What must be true after a sale, whatever happened to the workers.

It is found out row by row in Python, with none of the statements that are on trial.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple
from uuid import UUID

from django.utils import timezone

from kanthorq_django.domain.states import FINAL
from kanthorq_django.models import Consumer, Event, Task, TaskState
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
from project.shop.orders import STREAM

SETTLED = FINAL | {TaskState.PENDING}


class Money(NamedTuple):
    """What moved, and what the ledger says about it, in euros."""

    moved: Decimal
    booked: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What was found. Each count should be 0, and each sum of money as it was booked."""

    lost: dict[str, int]
    doubled: dict[str, int]
    phantom_count: int  # orders and events that were rolled back, reports that were never due
    payments: Money
    refunds: Money

    @property
    def is_sound(self) -> bool:
        broken = [*self.lost.values(), *self.doubled.values(), self.phantom_count]
        return not any(broken) and all(
            money.moved == money.booked for money in (self.payments, self.refunds)
        )


def audit(sale: Sale) -> Audit:
    """Compare all that ``sale`` led to with all that it should have led to."""
    return _Books(sale).audit()


class _Books:
    """All rows of one sale."""

    def __init__(self, sale: Sale) -> None:
        self._sale = sale
        self._orders = {order.pk: order for order in sale.orders.all()}
        events = Event.objects.filter(stream__name=STREAM, metadata__sale=sale.pk)
        self._events = {event.pk: event for event in events}
        self._tasks = {
            (task.event_id, task.consumer.name): task
            for task in Task.objects.filter(event__in=events).select_related("consumer")
        }
        self._payments = list(Payment.objects.filter(order__sale=sale))
        self._refunds = list(Refund.objects.filter(order__sale=sale))
        self._bookings = list(Booking.objects.filter(order__sale=sale))
        self._emails = list(Email.objects.filter(order__sale=sale))
        self._parcels = list(Parcel.objects.filter(order__sale=sale))
        self._reports = list(TillReport.objects.filter(sale=sale))

    def audit(self) -> Audit:
        booked = [booking.amount for booking in self._bookings]
        return Audit(
            lost=dict(self._lost()),
            doubled=dict(self._doubled()),
            phantom_count=self._phantoms(),
            payments=Money(
                _sum(payment.amount for payment in self._payments),
                _sum(amount for amount in booked if amount > 0),
            ),
            refunds=Money(
                _sum(refund.amount for refund in self._refunds),
                _sum(-amount for amount in booked if amount < 0),
            ),
        )

    def _lost(self) -> Iterator[tuple[str, int]]:
        """Yield what should be there, and how many of it are not."""
        announced = {self._order_id(event) for event in self._about("order.placed.")}
        yield "orders", max(0, self._sale.placed_count - len(self._orders))
        yield "events", len(self._orders.keys() - announced)
        yield "tasks", self._missing_tasks() + self._unfinished_tasks()
        yield "payments", _missing(self._owed_payments(), self._payments)
        yield "refunds", _missing(self._owed_refunds(), self._refunds)
        yield "bookings", _missing(self._about("payment."), self._bookings)
        yield "e-mails", _missing(self._ended("emails", TaskState.COMPLETED), self._emails)
        yield "parcels", sum(self._missing_parcels(fate) for fate in Parcel.Fate)
        yield "reports", len(self._due_reports() - {report.occurs_at for report in self._reports})

    def _doubled(self) -> Iterator[tuple[str, int]]:
        """Yield what should be there once, and how many more there are."""
        yield "payments", _repeated(payment.event_id for payment in self._payments)
        yield "refunds", _repeated(refund.event_id for refund in self._refunds)
        yield "bookings", _repeated(booking.event_id for booking in self._bookings)
        yield "parcels", _repeated((parcel.event_id, parcel.fate) for parcel in self._parcels)
        yield "reports", _repeated(report.occurs_at for report in self._reports)

    def _phantoms(self) -> int:
        """Count what outlived its rollback, and reports that nobody has scheduled.

        What outlives it are orders nobody was told of, and events without an order.
        """
        orders = max(0, len(self._orders) - self._sale.placed_count)
        of_orders = self._events.keys() - set(self._about("till."))
        events = sum(self._order_id(event) not in self._orders for event in of_orders)
        due = self._due_reports()
        return orders + events + sum(report.occurs_at not in due for report in self._reports)

    def _missing_tasks(self) -> int:
        consumers = Consumer.objects.filter(stream__name=STREAM)
        return sum(
            consumer.selects(event.subject) and (event.pk, consumer.name) not in self._tasks
            for consumer in consumers
            for event in self._events.values()
        )

    def _unfinished_tasks(self) -> int:
        now = timezone.now()
        return sum(
            task.state not in SETTLED
            and not (task.state == TaskState.AVAILABLE and task.schedule_at > now)
            for task in self._tasks.values()
        )

    def _owed_payments(self) -> Iterator[UUID]:
        """Every order is paid, unless its customer was faster."""
        for event in self._about("order.placed."):
            order = self._orders.get(self._order_id(event))
            if order is not None and order.status != Order.Status.CANCELLED:
                yield event

    def _owed_refunds(self) -> Iterator[UUID]:
        """Nothing is given back that was not paid."""
        paid = {payment.order_id for payment in self._payments}
        for subject in ("order.cancelled", "order.refunded."):
            yield from (event for event in self._about(subject) if self._order_id(event) in paid)

    def _missing_parcels(self, fate: Parcel.Fate) -> int:
        ended = TaskState.COMPLETED if fate == Parcel.Fate.SENT else TaskState.CANCELLED
        found = [parcel for parcel in self._parcels if parcel.fate == fate]
        return _missing(self._ended("parcels", ended), found)

    def _due_reports(self) -> set[datetime]:
        """Return when the till had to report: once so far, as its schedule is a daily one."""
        return {self._sale.report_at} if self._sale.report_at else set()

    def _about(self, subject: str) -> list[UUID]:
        """Return the ids of the events whose subject starts with ``subject``."""
        return [event.pk for event in self._events.values() if event.subject.startswith(subject)]

    def _ended(self, consumer: str, state: TaskState) -> list[UUID]:
        """Return the ids of the events whose task ended in ``state``."""
        return [
            event
            for (event, name), task in self._tasks.items()
            if name == consumer and task.state == state
        ]

    def _order_id(self, event: UUID) -> int:
        return int(self._events[event].json()["order"])


def _missing(owed: Iterable[UUID], effects: Iterable[Effect]) -> int:
    return len(set(owed) - {effect.event_id for effect in effects})


def _repeated(found: Iterable[object]) -> int:
    return sum(count - 1 for count in Counter(found).values())


def _sum(amounts: Iterable[Decimal]) -> Decimal:
    return sum(amounts, Decimal("0.00"))
