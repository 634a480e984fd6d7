"""``kanthorq prune``: delete what everybody has dealt with."""

from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from kanthorq_django.domain.amounts import counted
from kanthorq_django.management.arguments import count, duration
from kanthorq_django.management.lookup import find_streams
from kanthorq_django.management.times import format_duration
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models import Consumer, Stream
from kanthorq_django.models.maintenance.retention import (
    BATCH,
    BATCH_MAX,
    Pruned,
    consumed_streams,
    count_prunable,
    prune,
)


class Prune(Verb):
    """Counts first when somebody is there to see it; says who keeps events from being pruned."""

    changes = True
    help = "Delete events that are done with, and their tasks."
    description = (
        "An event goes when every consumer of its stream has read it, all its tasks have been\n"
        "final for --older-than, and it is as old itself. Its idempotency key is forgotten.\n"
        "Each batch is a short transaction of its own; interrupt it at any time. Rows of other\n"
        "apps that point at events or tasks are not deleted with them. A stream that has no\n"
        "consumers is left alone, since nobody has read it, unless --stream names it: then its\n"
        "events go by their age alone. At the end, rows of the audit go that are older than\n"
        "KANTHORQ['AUDIT_RETENTION']."
    )
    examples = (
        "prune --older-than 7d --dry-run",
        "prune --older-than 7d --yes",
        "prune --older-than 24h --stream audit --batch 5000 --yes",
    )

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--older-than", type=duration, required=True, metavar="DURATION", help="such as 7d"
        )
        parser.add_argument(
            "--stream",
            dest="streams",
            action="append",
            default=[],
            metavar="NAME",
            help="only this stream; repeatable",
        )
        parser.add_argument(
            "--batch",
            type=count(1, BATCH_MAX),
            default=BATCH,
            metavar="N",
            help="events in one transaction; default: %(default)s",
        )
        parser.add_argument("--dry-run", action="store_true", help="count, but delete nothing")
        parser.add_argument("--yes", action="store_true", help="do not ask")

    def run(
        self,
        *,
        older_than: timedelta,
        streams: list[str],
        batch: int,
        dry_run: bool,
        yes: bool,
        **_: Any,
    ) -> None:
        chosen = self._choose(streams)
        if dry_run:
            self._tell("would be pruned", self._count(older_than, chosen, batch))
        elif yes:
            self._prune(older_than, chosen, batch, expected=None)
        else:
            # Counting reads as much as pruning does, so it is done for those who are asked.
            expected = self._ask(older_than, chosen, batch)
            # Where there was nothing to ask about, only the audit goes by its age.
            agreed = chosen if expected.events else []
            self._prune(older_than, agreed, batch, expected=expected)
        self._name_the_slow(older_than, chosen)

    def _choose(self, names: list[str]) -> list[Stream]:
        if names:
            return find_streams(names, self.database)
        chosen = consumed_streams(self.database)
        unread = Stream.objects.using(self.database).exclude(pk__in=[row.pk for row in chosen])
        for stream in unread.order_by("name"):
            self.console.note(
                f"Stream {stream.name!r} has no consumers and is left alone; "
                f"to prune it by age, add --stream {stream.name}"
            )
        return chosen

    def _count(self, older_than: timedelta, streams: list[Stream], batch: int) -> Pruned:
        return count_prunable(older_than, streams=streams, batch=batch, using=self.database)

    def _ask(self, older_than: timedelta, streams: list[Stream], batch: int) -> Pruned:
        self.console.require_answers()
        expected = self._count(older_than, streams, batch)
        if expected.events:
            self.console.confirm(
                f"Delete {counted(expected.events, 'event')} and "
                f"{counted(expected.tasks, 'task')} that are done with for "
                f"{format_duration(older_than)}{_and_audit(expected)}?"
            )
        return expected

    def _prune(
        self, older_than: timedelta, streams: list[Stream], batch: int, *, expected: Pruned | None
    ) -> None:
        def show(done: Pruned) -> None:
            total = expected.events if expected else None
            self.console.progress(done.events, total, counted(done.events, "event"))

        try:
            pruned = prune(
                older_than,
                streams=streams,
                batch=batch,
                using=self.database,
                on_batch=show,
                order=self.order(
                    older_than=format_duration(older_than), streams=[row.name for row in streams]
                ),
            )
        finally:
            self.console.end_progress()
        self._tell("pruned", pruned)

    def _tell(self, what: str, pruned: Pruned) -> None:
        told = f"{counted(pruned.events, 'event')} and {counted(pruned.tasks, 'task')} {what}"
        self.console.line(f"{told}{_and_audit(pruned)}")

    def _name_the_slow(self, older_than: timedelta, streams: list[Stream]) -> None:
        """Say which consumers keep old events unread, and so from being pruned."""
        for consumer in Consumer.objects.using(self.database).filter(stream__in=streams):
            oldest = consumer.lag().oldest
            if oldest is not None and oldest > older_than:
                self.console.warn(
                    f"Consumer {consumer.name!r} has not read events that are "
                    f"{format_duration(oldest)} old; they stay."
                )


def _and_audit(pruned: Pruned) -> str:
    """Return the end of a sentence; empty where no row of the audit is too old."""
    if not pruned.audit:
        return ""
    return f", and {counted(pruned.audit, 'row')} of the audit"
