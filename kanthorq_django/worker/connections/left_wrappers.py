"""Whose the functions are that stand around each statement: Django's ``execute_wrappers``.

A project may install some whenever it connects, as for tracing. One that a handler has installed
and left would meddle with what others ask in its thread. Where a handler was the first to need a
connection, nobody can tell these from those: then the worker makes the next one, and knows.
"""

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.dispatch import receiver

from kanthorq_django.worker.connections.loans import is_lent
from kanthorq_django.worker.connections.own_connections import miss

_KEY = "_kanthorq_installed"


@receiver(connection_created)
def _note_installed(connection: BaseDatabaseWrapper, **_: object) -> None:
    if connection.execute_wrappers and not is_lent():
        # On the connection itself: they may hold it, and would keep it in any dictionary of ours.
        vars(connection)[_KEY] = tuple(connection.execute_wrappers)


def has_left_wrappers(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether it has others than those that the project is known to install."""
    if not connection.execute_wrappers:  # of nearly all
        return False
    if tuple(connection.execute_wrappers) == vars(connection).get(_KEY):
        return False
    miss(connection.alias)
    return True
