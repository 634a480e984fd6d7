"""Tasks of Django's own framework, for the contestants that are backends of it."""

from collections.abc import Iterable
from typing import Any

from django.core.management import call_command
from django.db import transaction
from django.tasks import task

from benchmarks.peers import django_handlers
from benchmarks.peers.adapter import Adapter


@task
def warm(number: int) -> None:
    django_handlers.warm(number)


@task
def noop(number: int) -> None:
    django_handlers.noop(number)


@task
def insert(number: int) -> None:
    django_handlers.insert(number)


@task
def ping(number: int) -> None:
    django_handlers.ping(number)


TASKS: dict[str, Any] = {"warm": warm, "noop": noop, "insert": insert, "ping": ping}


class DjangoTasksAdapter(Adapter):
    """Publishes through whatever backend the settings name."""

    def install(self) -> None:
        call_command("migrate", run_syncdb=True, verbosity=0)

    def enqueue(self, job: str, numbers: Iterable[int]) -> None:
        with transaction.atomic():
            self.publish(job, numbers)

    def publish(self, job: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            TASKS[job].enqueue(number)
