"""To whom a thread's connections are lent, and which databases it has used.

Where one is away, who has never used it is not to wait for it.
"""

import threading

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.dispatch import receiver

ANYBODY = ""  # coroutines share a thread, whatever consumer they belong to


class _Loan(threading.local):
    borrower: str | None = None  # a consumer, or ANYBODY; None: the worker itself


_loan = _Loan()
_borrowers: dict[str, set[str]] = {}  # by the alias of what they have used


def lend(borrower: str) -> None:
    """Note that handlers of a consumer, or of ANYBODY, have this thread's connections now."""
    _loan.borrower = borrower


def take_back() -> None:
    """Note that the worker has them."""
    _loan.borrower = None


def is_lent() -> bool:
    return _loan.borrower is not None


def has_used(borrower: str, alias: str) -> bool:
    """Tell whether it is known to have connected to a database, or to have tried."""
    return borrower in _borrowers.get(alias, ())


@receiver(connection_created)
def note_use(connection: BaseDatabaseWrapper, **_: object) -> None:
    """Note that who has the connections has connected, or could not."""
    if _loan.borrower is not None:
        _borrowers.setdefault(connection.alias, set()).add(_loan.borrower)
