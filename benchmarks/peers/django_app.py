"""Django for contestants that do not bring it: the app of effects, and its table."""

import os

import django
from django.core.management import call_command

from benchmarks.peers.board import board

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.peers.settings")


def set_up() -> None:
    """Load Django's apps."""
    django.setup()


def create_tables() -> None:
    """Create the tables of all installed apps."""
    set_up()
    call_command("migrate", run_syncdb=True, verbosity=0)


def insert_effect(number: int) -> None:
    """Insert one row with Django's ORM: what the work ``insert`` measures."""
    from benchmarks.effects.models import Effect

    Effect.objects.create(number=number)
    board().mark(number)
