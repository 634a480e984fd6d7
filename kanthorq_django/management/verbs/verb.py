"""What every verb of ``manage.py kanthorq`` is: words for its help, arguments, and a run."""

from abc import ABC, abstractmethod
from argparse import ArgumentParser
from datetime import timedelta
from typing import Any, ClassVar

from kanthorq_django.management.account import shell_user
from kanthorq_django.management.console import Console
from kanthorq_django.models.audit import OperatorAction, Order

# That a look at everything waits for a lock: cron would start the next one behind it, and so on.
LOCK_TIMEOUT = timedelta(seconds=10)


class Verb(ABC):
    """One verb. ``help`` is its line in the list, ``description`` what ``--help`` says."""

    help: ClassVar[str]
    description: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    changes: ClassVar[bool] = False  # something, which the audit is told, with --reason
    done: str = "What was asked for was done"  # told if the output cannot tell it

    def __init__(self, console: Console, database: str, reason: str = "") -> None:
        self.console = console
        self.database = database
        self.reason = reason

    def order(self, **selection: Any) -> Order:
        """Return what is asked for on the command line, for the audit; without empty options."""
        return Order(
            operator=shell_user(),
            origin=OperatorAction.Origin.COMMAND,
            selection={name: value for name, value in selection.items() if value},
            reason=self.reason,
        )

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Declare the arguments that ``run()`` gets as keywords."""

    @abstractmethod
    def run(self, *args: Any, **options: Any) -> None:
        """Do it and print the result. Raises CommandError when it cannot be done."""


# A verb, or verbs under a name of their own with its line in the list.
VerbTree = dict[str, "type[Verb] | tuple[str, VerbTree]"]
