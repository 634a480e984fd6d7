"""What holders of leases and operators do in the database, each as one call."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.db import transaction

from kanthorq_django.domain.outcome import Outcome
from kanthorq_django.models import Consumer, Task
from kanthorq_django.models.delivery import lease
from tests.races.expected import ExpectedConsumer, ExpectedTask
from tests.races.life import Hand

OPERATIONS = ("cancel", "cancel running", "release", "resume", "reset")


def end(hand: Hand, verdict: str, delay: timedelta, meanwhile: Callable[[], bool]) -> None:
    """End a lease in a transaction, with an effect if it is an ack; ``meanwhile`` says commit."""
    with transaction.atomic():
        if verdict == "ack":
            hand.write_effect()
            hand.message.ack({"epoch": hand.message.lease_epoch})
        elif verdict == "nack":
            hand.message.nack("failed", delay=delay)
        elif not lease.hand_back([hand.message.lease], "default", delay=delay):
            raise hand.message.lost()
        if not meanwhile():
            transaction.set_rollback(True)


def operate(operation: str, tasks: list[ExpectedTask]) -> Outcome:
    """Use one of OPERATIONS on ``tasks``, whatever their states are."""
    verb, running = verb_of(operation)
    found = Task.objects.filter(pk__in=[task.pk for task in tasks])
    outcome: Outcome = getattr(found, verb)(**({"running": True} if running else {}))
    return outcome


def verb_of(operation: str) -> tuple[str, bool]:
    """Return the verb, and whether it is meant for running tasks too."""
    return operation.removesuffix(" running"), operation.endswith(" running")


def told(outcome: Outcome) -> tuple[list[Any], list[Any], list[Any]]:
    """Return what was updated, requested and left alone, comparable with what was expected."""
    return sorted(outcome.updated), sorted(outcome.requested), sorted(outcome.noop)


def stored(consumer: ExpectedConsumer, group: int) -> Consumer:
    """Return the row, to claim ``group`` tasks of a key at a time."""
    found = Consumer.objects.get(pk=consumer.pk)
    found.turns.group_size = group
    return found
