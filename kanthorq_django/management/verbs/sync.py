"""``kanthorq sync``: write what code subscribes to into the database."""

import sys
from argparse import ArgumentParser
from typing import Any

from django.db import transaction

from kanthorq_django.domain.states import FINAL
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models import Consumer, Task
from kanthorq_django.models.registration import cannot_move_to
from kanthorq_django.models.registration import changes as changes_of
from kanthorq_django.subscribers import declared, find, registry, sync


class Sync(Verb):
    """Says of each consumer whether it was created, changed or unchanged."""

    changes = True
    help = "Register consumers, and apply changed filters and options from now on."
    description = (
        "Workers do the same when they start, and who did so last is right. Without names, all "
        "that code subscribes.\n"
        "A consumer that no code declares is listed as orphaned: it keeps its row and its tasks."
    )
    examples = ("sync", "sync refunds shipping", "sync --check")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("consumers", metavar="CONSUMER", nargs="*", help="default: all")
        parser.add_argument(
            "--check", action="store_true", help="only tell; exit with 1 if anything would change"
        )

    def run(self, *, consumers: list[str], check: bool, **_: Any) -> None:
        names = [find(name).consumer for name in consumers] or [
            subscription.consumer for subscription in registry.all()
        ]
        step = self._check if check else self._sync
        were_there = [step(name) for name in dict.fromkeys(names)]
        if not names:
            self.console.note("No subscriber is declared in any <app>/subscribers.py.")
        self._list_orphans()
        if check and not all(were_there):
            sys.exit(1)

    def _sync(self, name: str) -> bool:
        """Write what code declares; return whether that was there already."""
        stored = Consumer.objects.using(self.database).filter(name=name)
        with transaction.atomic(using=self.database):
            before = stored.first()
            sync([name], using=self.database)
            found = [] if before is None else changes_of(before, stored.get())
            counts = {"created": int(before is None), "changed": int(bool(found))}
            order = self.order(consumer=name, changes=found)
            order.record("consumers.sync", using=self.database, counts=counts, ids=[name])
        return self._tell(name, before, found, ("created", "changed"))

    def _check(self, name: str) -> bool:
        """Tell what ``_sync()`` would do, and do nothing."""
        stored = Consumer.objects.using(self.database).select_related("stream")
        before, stream = stored.filter(name=name).first(), find(name).stream
        if before is not None and before.stream.name != stream:
            raise cannot_move_to(before, stream)  # as _sync() would
        found = [] if before is None else changes_of(before, declared(name))
        return self._tell(name, before, found, ("to create", "to change"))

    def _tell(
        self, name: str, before: Consumer | None, found: list[str], words: tuple[str, str]
    ) -> bool:
        told = words[0] if before is None else words[1] if found else "unchanged"
        self.console.line(f"{told:<10} {name}")
        for change in found:
            self.console.line(f"             {change}")
        return told == "unchanged"

    def _list_orphans(self) -> None:
        known = {subscription.consumer for subscription in registry.all()}
        stored = Consumer.objects.using(self.database).exclude(name__in=known)
        for consumer in stored.order_by("name"):
            tasks = Task.objects.using(self.database).filter(consumer=consumer)
            waits = "has" if tasks.exclude(state__in=FINAL).exists() else "has no"
            self.console.line(
                f"orphaned   {consumer.name} (no code declares it; {waits} open tasks)"
            )
