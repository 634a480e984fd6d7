"""What errors of the database mean: it is away, or will never take what it was given."""

from django.db import InterfaceError, InternalError, OperationalError

# What the database's absence looks like, and, as InternalError, a primary that became a standby.
UNAVAILABLE = (OperationalError, InterfaceError, InternalError)

# Classes of errors that psycopg counts among these, though they are about what was asked for: a
# routine or trigger of the project's, a limit such as that of an index's row, a damaged page.
_ABOUT_THE_ASKED = ("27", "2F", "38", "39", "54", "XX001", "XX002")

# What cannot be stored: data, what a constraint on it forbids, and what exceeds a limit.
_ABOUT_VALUES = ("22", "23514", "54")


def is_unavailable(error: BaseException) -> bool:
    """Tell whether ``error`` says that the database is away: what failed may go well later."""
    sqlstate = getattr(error.__cause__, "sqlstate", None) or ""
    return isinstance(error, UNAVAILABLE) and not sqlstate.startswith(_ABOUT_THE_ASKED)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an answer did not fit into memory: ours, as libpq says, or the server's."""
    is_told = isinstance(error, OperationalError) and "out of memory" in str(error)
    return is_told or isinstance(error, MemoryError)


def is_about_values(error: BaseException) -> bool:
    """Tell whether the database refused what it was given, and would refuse it again."""
    sqlstate = getattr(error.__cause__, "sqlstate", None) or ""
    return sqlstate.startswith(_ABOUT_VALUES)
