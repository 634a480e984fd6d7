"""What every verb of ``manage.py kanthorq`` is: words for its help, arguments, and a run."""

from abc import ABC, abstractmethod
from argparse import ArgumentParser
from typing import Any, ClassVar

from kanthorq_django.management.console import Console


class Verb(ABC):
    """One verb. ``help`` is its line in the list, ``description`` what ``--help`` says."""

    help: ClassVar[str]
    description: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]

    def __init__(self, console: Console, database: str) -> None:
        self.console = console
        self.database = database

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Declare the arguments that ``run()`` gets as keywords."""

    @abstractmethod
    def run(self, *args: Any, **options: Any) -> None:
        """Do it and print the result. Raises CommandError when it cannot be done."""


# A verb, or verbs under a name of their own with its line in the list.
VerbTree = dict[str, "type[Verb] | tuple[str, VerbTree]"]
