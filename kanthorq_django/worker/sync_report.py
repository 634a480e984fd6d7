"""What the start of a worker changes for all others, told to the log."""

from collections.abc import Iterable

from kanthorq_django.domain.amounts import counted
from kanthorq_django.models import Consumer
from kanthorq_django.models.registration import changes
from kanthorq_django.subscribers import find, sync
from kanthorq_django.worker.log import logger


def sync_and_report(consumers: Iterable[str], using: str) -> list[Consumer]:
    """Do what ``sync()`` does, of all consumers if none is named, and log what that changes."""
    known = {consumer.name: consumer for consumer in Consumer.objects.using(using)}
    rows = sync(tuple(consumers) or None, using=using)
    for row in rows:
        _tell_of_changes(known.get(row.name), row)
    return rows


def _tell_of_changes(former: Consumer | None, consumer: Consumer) -> None:
    """Log what the start of this worker changes for all others, and what it begins anew."""
    extra = {"consumer": consumer.name}
    if former is not None:
        for change in changes(former, consumer):
            logger.warning(
                "Consumer %s is changed to what this code declares, for all workers: %s.",
                consumer.name,
                change,
                extra=extra,
            )
    elif find(consumer.name).deliver != "new" and (lag := consumer.lag()).count:
        logger.warning(
            "Consumer %s is new and begins with %s that stream %r holds already.",
            consumer.name,
            f"more than {lag.count:,} events" if lag.is_bounded else counted(lag.count, "event"),
            consumer.stream.name,
            extra=extra,
        )
