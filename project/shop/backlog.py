"""What the shop's consumers have still to do."""

from datetime import timedelta

from django.db import connection, transaction
from django.db.models.functions import Now

from kanthorq_django.models import Consumer, Task, TaskState
from kanthorq_django.models.task import TaskQuerySet
from project.shop.models import Sale
from project.shop.orders import STREAM

OPEN = (TaskState.AVAILABLE, TaskState.RUNNING, TaskState.RETRYABLE, TaskState.CANCELLING)
LATER = timedelta(minutes=10)  # what is due then waits for its day, not for a worker


def is_empty() -> bool:
    """Tell whether nothing is left to do before ``LATER``."""
    # Both looks have to see the same moment: between two, an event can become a task and back.
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        return not (_open_tasks().exists() or _has_unread_events())


def settled_count(sale: Sale) -> int:
    """Count the tasks that have ended since ``sale`` began."""
    return _tasks().filter(finalized_at__gte=sale.opened_at).count()


def tasks_of(sale: Sale) -> TaskQuerySet:
    """Return all tasks that the events of ``sale`` led to."""
    return Task.objects.filter(event__metadata__sale=sale.pk)


def _open_tasks() -> TaskQuerySet:
    return _tasks().filter(state__in=OPEN, schedule_at__lte=Now() + LATER)


def _tasks() -> TaskQuerySet:
    return Task.objects.filter(consumer__in=Consumer.objects.filter(stream__name=STREAM))


def _has_unread_events() -> bool:
    return any(
        consumer.lag(limit=1).count for consumer in Consumer.objects.filter(stream__name=STREAM)
    )
