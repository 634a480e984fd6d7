"""Database aliases made for one test: a second connection, or a cluster to break."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connections


@contextmanager
def database_alias(name: str, **settings: Any) -> Iterator[str]:
    """Yield a new alias for the default database, or for what ``settings`` say instead.

    Threads that use it close their own connections.
    """
    default = connections["default"]
    default.ensure_connection()  # the embedded server then has told where it is
    connections.settings[name] = {**default.settings_dict, **settings}
    try:
        yield name
    finally:
        connections[name].close()
        del connections[name]
        del connections.settings[name]
