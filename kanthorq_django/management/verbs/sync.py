"""``kanthorq sync``: write what code subscribes to into the database."""

from argparse import ArgumentParser
from typing import Any

from django.db import transaction

from kanthorq_django.domain.states import FINAL
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models import Consumer, Task
from kanthorq_django.subscribers import find, registry, sync

DECLARED = (
    "subject_includes",
    "subject_excludes",
    "attempt_max",
    "visibility_timeout",
    "timeout",
    "parked",
    "serialize",
    "has_cancel_handler",
    "cancel_attempt_max",
)


class Sync(Verb):
    """Says of each consumer whether it was created, changed or unchanged."""

    changes = True
    help = "Register consumers, and apply changed filters and options from now on."
    description = (
        "Workers do the same when they start. Without names, all that code subscribes.\n"
        "A consumer that no code declares is listed as orphaned: it keeps its row and its tasks."
    )
    examples = ("sync", "sync refunds shipping")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("consumers", metavar="CONSUMER", nargs="*", help="default: all")

    def run(self, *, consumers: list[str], **_: Any) -> None:
        names = [find(name).consumer for name in consumers] or [
            subscription.consumer for subscription in registry.all()
        ]
        for name in dict.fromkeys(names):
            self._sync(name)
        if not names:
            self.console.note("No subscriber is declared in any <app>/subscribers.py.")
        self._list_orphans()

    def _sync(self, name: str) -> None:
        stored = Consumer.objects.using(self.database).filter(name=name)
        with transaction.atomic(using=self.database):
            before = stored.first()
            sync([name], using=self.database)
            changes = [] if before is None else _changes(before, stored.get())
            counts = {"created": int(before is None), "changed": int(bool(changes))}
            order = self.order(consumer=name, changes=changes)
            order.record("consumers.sync", using=self.database, counts=counts, ids=[name])
        if before is None:
            self.console.line(f"created    {name}")
            return
        self.console.line(f"{'changed' if changes else 'unchanged':<10} {name}")
        for change in changes:
            self.console.line(f"             {change}")

    def _list_orphans(self) -> None:
        declared = {subscription.consumer for subscription in registry.all()}
        stored = Consumer.objects.using(self.database).exclude(name__in=declared)
        for consumer in stored.order_by("name"):
            tasks = Task.objects.using(self.database).filter(consumer=consumer)
            waits = "has" if tasks.exclude(state__in=FINAL).exists() else "has no"
            self.console.line(
                f"orphaned   {consumer.name} (no code declares it; {waits} open tasks)"
            )


def _changes(before: Consumer, after: Consumer) -> list[str]:
    """Return a line for each declared option that is another one now."""
    pairs = ((name, getattr(before, name), getattr(after, name)) for name in DECLARED)
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]
