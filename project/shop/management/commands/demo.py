"""``manage.py demo``: sets up, lets the story run, prints what it proves."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import OperationalError, connection

from project.shop.crew import WorkerEnded
from project.shop.interruption import Interrupted, heeding_signals
from project.shop.invariants import audit
from project.shop.models import Sale
from project.shop.narrator import Narrator
from project.shop.patience import NothingHappens
from project.shop.report import print_next_steps, print_report
from project.shop.serving import ServerEnded, Serving
from project.shop.story import Story

CUSTOMERS = 2_000
CUSTOMERS_MIN, CUSTOMERS_MAX = 10, 1_000_000
INTERRUPTED = 130  # the exit status of what Ctrl-C ended


class Command(BaseCommand):
    """Run the shop once, or serve its admin."""

    help = (
        "Run a shop on two workers, kill one of them, and prove that nothing was lost or doubled. "
        "Example: manage.py demo --customers 5000"
    )

    def add_arguments(self, parser: CommandParser) -> None:
        add = parser.add_argument
        add("--customers", type=int, default=CUSTOMERS, help="default: %(default)s")
        add("--serve", action="store_true", help="serve the admin with that data (DEBUG only)")
        add("--port", type=int, default=8000, help="or any free one; default: %(default)s")

    def handle(self, *, customers: int, serve: bool, port: int, **_: Any) -> None:
        _check(customers, serve=serve)
        self._narrator = Narrator(self.stdout)
        try:
            with heeding_signals():
                self._run(customers, port if serve else None)
        except (Interrupted, KeyboardInterrupt):
            self.stdout.write("\nStopped.")
            sys.exit(0 if serve else INTERRUPTED)
        except (NothingHappens, WorkerEnded, ServerEnded, ImproperlyConfigured) as error:
            raise CommandError(str(error)) from error
        except OperationalError as error:
            reason = " ".join(str(error).split())
            raise CommandError(f"The database cannot be reached: {reason}") from error

    def _run(self, customers: int, port: int | None) -> None:
        logs = Path(tempfile.mkdtemp(prefix="kanthorq-demo-"))
        self._set_up(logs)
        if port is None or not Sale.objects.filter(placed_count__gt=0).exists():
            self._tell_story(customers, logs)
        if port is None:
            print_next_steps(self._narrator, f"{_python()} manage.py")
        else:
            Serving(self._narrator, logs, port).run()

    def _set_up(self, logs: Path) -> None:
        self._narrator.line("KanthorQ for Django: a day in the shop")
        self._narrator.line()
        self._narrator.tell("The database is started if need be, and migrated.")
        call_command("migrate", verbosity=0, interactive=False)
        version = connection.cursor().connection.info.server_version
        self._narrator.tell(f"PostgreSQL {version // 10_000}.{version % 10_000} is ready.")
        self._narrator.tell(f"Workers write to {logs}/")

    def _tell_story(self, customers: int, logs: Path) -> None:
        sale, pace = Story(self._narrator, logs, customers).run()
        found = audit(sale)
        print_report(self._narrator, sale, found, pace)
        if not found.is_sound:
            raise CommandError("This must never be: see above what is lost, doubled or not equal.")
        self._narrator.line("\nNothing was lost, nothing was doubled, every cent is booked.")


def _python() -> str:
    python = Path(sys.executable)
    inside = python.is_relative_to(Path.cwd())
    return str(python.relative_to(Path.cwd()) if inside else python)


def _check(customers: int, *, serve: bool) -> None:
    if not CUSTOMERS_MIN <= customers <= CUSTOMERS_MAX:
        raise CommandError(f"--customers must be {CUSTOMERS_MIN} to {CUSTOMERS_MAX:,}.")
    if serve and not settings.DEBUG:
        raise CommandError("--serve prints the password of a superuser; it needs DEBUG.")
