"""A person who operates tasks: what the admin's actions and ``manage.py kanthorq tasks`` do too."""

from collections.abc import Iterable
from uuid import UUID

from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.models import Consumer, Task
from kanthorq_django.models.task import TaskQuerySet
from project.shop.backlog import tasks_of
from project.shop.models import Order, Sale

CORRECT_DOMAIN = "mail.example"


def release_reviews(sale: Sale) -> Outcome:
    """Release every second of the parked reviews; a person has looked at the orders."""
    return _consumer("reviews").release(_every_second(_tasks(sale, "reviews").pending()))


def cancel_parcels(sale: Sale) -> Outcome:
    """Cancel every second of the parcels that wait for the courier; they are unpacked again."""
    return _consumer("parcels").cancel(_every_second(_tasks(sale, "parcels").available()))


def resume_parcels(sale: Sale) -> Outcome:
    """Send every second of the cancelled parcels after all, at once."""
    return _consumer("parcels").resume(_every_second(_tasks(sale, "parcels").cancelled()))


def correct_addresses(sale: Sale) -> Outcome:
    """Correct the mistyped addresses, and resume every second of the discarded mails."""
    events = list(_every_second(_tasks(sale, "emails").discarded()))
    keys = Task.objects.filter(event__in=events).values_list("resource_key", flat=True)
    numbers = {int(key.removeprefix("order-")) for key in keys}
    for order in Order.objects.filter(pk__in=numbers):
        order.email = f"{order.email.partition('@')[0]}@{CORRECT_DOMAIN}"
        order.save(update_fields=["email"])
    return _consumer("emails").resume(events)


def _tasks(sale: Sale, consumer: str) -> TaskQuerySet:
    return tasks_of(sale).filter(consumer__name=consumer)


def _consumer(name: str) -> Consumer:
    return Consumer.objects.get(name=name)


def _every_second(tasks: TaskQuerySet) -> Iterable[UUID]:
    return tasks.order_by("pk").values_list("event_id", flat=True)[::2]
