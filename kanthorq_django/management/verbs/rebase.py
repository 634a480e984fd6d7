"""``kanthorq rebase``: go on after a restore or a move into another cluster."""

from argparse import ArgumentParser
from typing import Any

from kanthorq_django.domain.amounts import counted
from kanthorq_django.management.verbs.verb import Verb
from kanthorq_django.models.maintenance.rebase import Rebased, rebase


class Rebase(Verb):
    """Prints what each consumer is owed, or got."""

    changes = True
    help = "Rebuild every cursor after a restore, or a move into another PostgreSQL cluster."
    description = (
        "Transaction ids start anew in another cluster, so what a cursor says means nothing\n"
        "there. Each consumer gets the tasks that it owes and does not have; nothing is lost and\n"
        "nothing repeated. Stop the workers first. Publishers wait while it runs."
    )
    examples = ("rebase --dry-run", "rebase --yes")

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="count, but change nothing")
        parser.add_argument("--yes", action="store_true", help="do not ask")

    def run(self, *, dry_run: bool, yes: bool, **_: Any) -> None:
        if dry_run:
            self._print(rebase(self.database, dry_run=True))
            self.console.note("Dry run: nothing was changed.")
            return
        if not yes:
            self._ask()
        self._print(rebase(self.database, order=self.order()))

    def _ask(self) -> None:
        self.console.require_answers()
        planned = rebase(self.database, dry_run=True)
        tasks = sum(consumer.task_count for consumer in planned)
        self.console.confirm(
            f"Rebase {counted(len(planned), 'consumer')} of the database {self.database!r} "
            f"and add {counted(tasks, 'task')}?"
        )

    def _print(self, rebased: list[Rebased]) -> None:
        self.console.table(
            ("CONSUMER", "UNREAD EVENTS", "NEW TASKS"),
            [(name, f"{events:,}", f"{tasks:,}") for name, events, tasks in rebased],
            numbers={"UNREAD EVENTS", "NEW TASKS"},
        )
