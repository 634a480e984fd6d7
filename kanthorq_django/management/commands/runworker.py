"""``manage.py runworker``: parses, delegates, prints."""

import argparse
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import OperationalError, ProgrammingError
from django.utils import autoreload

from kanthorq_django.domain.subscriptions import registry
from kanthorq_django.exceptions import KanthorqError
from kanthorq_django.worker.options import PULLERS, WorkerOptions
from kanthorq_django.worker.process import run_process, stop_on_signals
from kanthorq_django.worker.supervisor import Supervisor

PROCESSES_LIMIT = 256


class Command(BaseCommand):
    """Run worker processes in the foreground."""

    help = (
        "Turn events into tasks and run their handlers, until SIGTERM or Ctrl-C. "
        "Example: manage.py runworker refunds emails --concurrency 20 --processes 2"
    )

    def add_arguments(self, parser: CommandParser) -> None:
        add = parser.add_argument
        add("consumers", nargs="*", metavar="CONSUMER", help="only these; all by default")
        add("--concurrency", type=int, help="handlers that one process runs at a time")
        add("--processes", type=int, default=1, help="worker processes (default: 1)")
        add("--batch-size", type=int, help="tasks that one pull or claim leases at most")
        add("--poll-interval", type=_seconds, metavar="SECONDS", help="between looks for work")
        add("--listen", action=argparse.BooleanOptionalAction, help="wait for notifications")
        add("--burst", action="store_true", help="work until nothing is due, then exit")
        add("--max-tasks", type=int, metavar="N", help="exit after this many tasks")
        add("--shutdown-timeout", type=_seconds, metavar="SECONDS", help="for running handlers")
        add("--pullers", type=_names, metavar="A,B", help=f"of {','.join(PULLERS)}; all by default")
        add("--reload", action="store_true", help="restart when code changes (development)")

    def handle(self, *, processes: int, reload: bool, **options: Any) -> None:
        if not 1 <= processes <= PROCESSES_LIMIT:
            raise CommandError(f"--processes must be 1 to {PROCESSES_LIMIT}, not {processes}.")
        given = {
            name: options[name]
            for name in WorkerOptions.__dataclass_fields__
            if options.get(name) is not None
        }
        given["consumers"] = tuple(options["consumers"])
        if settings.DEBUG:
            self.stderr.write(
                self.style.WARNING("DEBUG is on: Django keeps every query in memory.")
            )
        if reload:
            autoreload.run_with_reloader(self._work, processes, given)
        else:
            self._work(processes, given)

    def _work(self, processes: int, given: dict[str, Any]) -> None:
        try:
            options = WorkerOptions(**given)
            if not registry.all():
                raise CommandError(
                    "No code declares a subscriber; write one in <app>/subscribers.py."
                )
            self._run(options, processes)
        except KanthorqError as error:
            raise CommandError(str(error)) from error
        except OperationalError as error:
            raise CommandError(f"The database cannot be reached: {error}".strip()) from error
        except ProgrammingError as error:
            raise CommandError(
                f"The database is not ready, run manage.py migrate: {str(error).splitlines()[0]}"
            ) from error

    def _run(self, options: WorkerOptions, processes: int) -> None:
        if processes > 1:
            supervisor = Supervisor(options, processes)
            with stop_on_signals(supervisor.stop):
                supervisor.run()
        else:
            count = run_process(options)
            self.stdout.write(self.style.SUCCESS(f"Handled {count} tasks."))


def _seconds(text: str) -> timedelta:
    try:
        return timedelta(seconds=float(text))
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))
