"""``manage.py runworker``: parses, delegates, prints."""

import argparse
import contextlib
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections, router
from django.utils import autoreload

from kanthorq_django.domain.amounts import counted
from kanthorq_django.domain.quoting import quoted
from kanthorq_django.domain.subscriptions import registry
from kanthorq_django.management.refusals import one_sentence
from kanthorq_django.models import Consumer
from kanthorq_django.subscribers import find
from kanthorq_django.worker.connections.probe import watched
from kanthorq_django.worker.options import PULLERS, WorkerOptions
from kanthorq_django.worker.process import run_process
from kanthorq_django.worker.stopping import stop_on_signals
from kanthorq_django.worker.supervisor import Supervisor
from kanthorq_django.worker.sync_report import sync_and_report

PROCESSES_LIMIT = 256
MAX_TASKS_HELP = "exit after this many tasks; of several processes, each is replaced then"


class Command(BaseCommand):
    """Run worker processes in the foreground."""

    help = (
        "Turn events into tasks and run their handlers, until SIGTERM or Ctrl-C. "
        "Example: manage.py runworker refunds emails --concurrency 20 --processes 2"
    )

    def add_arguments(self, parser: CommandParser) -> None:
        add = parser.add_argument
        add("consumers", nargs="*", metavar="CONSUMER", help="only these; all by default")
        add(
            "--except",
            dest="excepted",
            type=_names,
            action="extend",
            default=[],
            metavar="A,B",
            help="all but these; repeatable",
        )
        add(
            "--concurrency",
            type=int,
            help="handlers at a time in one process, plain and async ones each",
        )
        add("--processes", type=int, default=1, help="worker processes (default: 1)")
        add("--batch-size", type=int, help="tasks that one pull or claim leases at most")
        add("--poll-interval", type=_seconds, metavar="SECONDS", help="between looks for work")
        add("--listen", action=argparse.BooleanOptionalAction, help="wait for notifications")
        add("--burst", action="store_true", help="work until nothing is due, then exit")
        add("--max-tasks", type=int, metavar="N", help=MAX_TASKS_HELP)
        add("--shutdown-timeout", type=_seconds, metavar="SECONDS", help="for running handlers")
        add("--pullers", type=_names, metavar="A,B", help=f"of {','.join(PULLERS)}; all by default")
        add("--reload", action="store_true", help="restart when code changes (development)")

    def handle(self, *, processes: int, reload: bool, **options: Any) -> None:
        if not 1 <= processes <= PROCESSES_LIMIT:
            raise CommandError(f"--processes must be 1 to {PROCESSES_LIMIT}, not {processes}.")
        if options["consumers"] and options["excepted"]:
            raise CommandError("Name consumers or leave some out with --except A,B, not both.")
        if reload and options["burst"]:
            raise CommandError("--reload waits for changes for ever; leave out --burst.")
        given = {
            name: options[name]
            for name in WorkerOptions.__dataclass_fields__
            if options.get(name) is not None
        }
        given["consumers"] = tuple(options["consumers"])
        excepted: list[str] = options["excepted"]
        if settings.DEBUG:
            self.stderr.write(
                self.style.WARNING("DEBUG is on: each connection remembers its queries in memory.")
            )
        if reload:
            autoreload.run_with_reloader(self._work_until_reload, processes, given, excepted)
        else:
            is_all = getattr(self, "_called_from_command_line", False)
            self._work(processes, given, excepted, is_all=is_all)

    def _work_until_reload(
        self, processes: int, given: dict[str, Any], excepted: list[str]
    ) -> None:
        autoreload.raise_last_exception()  # of a subscriber's import
        try:
            self._work(processes, given, excepted)
        except CommandError as error:
            # The next change of the code may mend it.
            self.stderr.write(self.style.ERROR(str(error)))

    def _work(
        self, processes: int, given: dict[str, Any], excepted: list[str], *, is_all: bool = False
    ) -> None:
        alias = router.db_for_write(Consumer)
        with one_sentence(alias):
            options = WorkerOptions(**given)
            if not registry.all():
                raise CommandError(
                    "No code declares a subscriber; write one in <app>/subscribers.py."
                )
            if connections[alias].vendor != "postgresql":
                raise CommandError(f"The database {alias!r} is not PostgreSQL.")
            if connections[alias].in_atomic_block:
                raise CommandError(
                    "A worker commits what it does, and a transaction is open: in a TestCase use "
                    "kanthorq_django.testing.drain(), or a TransactionTestCase."
                )
            if excepted:
                options = replace(options, consumers=_all_but(excepted))
            with watched(alias):
                Consumer.objects.using(alias).exists()  # it can be reached, and has our tables
            self._announce(options, processes, alias)
            if processes > 1:
                self._supervise(options, processes, alias)
            else:
                run_process(options, self._tell, is_all=is_all)

    def _tell(self, count: int) -> None:
        self._say(self.style.SUCCESS(f"Handled {counted(count, 'task')}."))

    def _say(self, text: str) -> None:
        """Print; a full disk behind the output keeps no worker from its work."""
        with contextlib.suppress(OSError):
            self.stdout.write(text)
            self.stdout.flush()  # into a pipe as well, while it works

    def _announce(self, options: WorkerOptions, processes: int, alias: str) -> None:
        """Say what is to be worked for, also where nobody has configured a log."""
        chosen = [find(name) for name in options.consumers] or registry.all()
        names = ", ".join(sorted({subscription.consumer for subscription in chosen}))
        each = f" in each of {processes} processes" if processes > 1 else ""
        self._say(
            f"Working for {names}: up to {options.concurrency} handlers at a time{each}, "
            f"database {alias!r}."
        )

    def _supervise(self, options: WorkerOptions, processes: int, alias: str) -> None:
        # What no process could do is refused here, once, instead of by all of them for ever.
        with watched(alias):
            sync_and_report(options.consumers, alias)
        connections.close_all()
        supervisor = Supervisor(options, processes)
        with stop_on_signals(
            supervisor.stop, patience=supervisor.patience, at_once=supervisor.kill
        ):
            supervisor.run()


def _all_but(excepted: Iterable[str]) -> tuple[str, ...]:
    left_out = {find(name).consumer for name in excepted}
    names = (subscription.consumer for subscription in registry.all())
    if not (left := tuple(name for name in names if name not in left_out)):
        # An empty choice would mean all of them.
        raise CommandError("--except leaves no consumer to work for.")
    return left


def _seconds(text: str) -> timedelta:
    try:
        return timedelta(seconds=float(text))
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of seconds") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))
