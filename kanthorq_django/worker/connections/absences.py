"""Databases other than the tasks' that could not be connected to of late.

A host that swallows packets has each who connects wait for the whole ``connect_timeout``: one
thread finds out for all whether it is back.
"""

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta

from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from kanthorq_django.worker.connections.database_errors import is_unavailable
from kanthorq_django.worker.connections.scarcity import note_refused_connection

AWAY_DELAY = timedelta(seconds=5)  # until a task is due again that needs one of them
TRIED_EVERY = 2.0  # seconds from a refusal to the next try, or more where it took long to come
SHARE = 3  # of the time that a try took, for which nobody tries again
TRY_LONGEST = 60.0  # seconds for which others leave it to one to try

_lock = threading.Lock()
_rests: Mapping[str, float] = {}  # until when nobody tries, by alias; replaced, never changed


class OtherDatabaseAway(OperationalError):
    """Another database than the tasks' cannot be connected to."""


def refused_aliases() -> Collection[str]:
    """Return those that have refused, and to which nobody has got through since."""
    return _rests.keys()


@contextlib.contextmanager
def tried(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Connect within the block. Raises OtherDatabaseAway if that fails, or has failed of late."""
    if connection.connection is not None:
        yield
        return
    alias, began_at = connection.alias, time.monotonic()
    _begin_try(alias, began_at)
    rest = None
    try:
        yield
    except BaseException as error:
        if not is_unavailable(error):
            raise
        note_refused_connection(error)
        now = time.monotonic()
        rest = now + max(TRIED_EVERY, SHARE * (now - began_at))
        raise OtherDatabaseAway(f"The database {alias!r} cannot be connected to.") from error
    finally:
        with _lock:
            _set_rest(alias, rest)


def _begin_try(alias: str, now: float) -> None:
    """Have others leave it to this thread. Raises OtherDatabaseAway where it is not to try."""
    with _lock:
        if alias not in _rests:
            return
        if now < _rests[alias]:
            raise OtherDatabaseAway(f"The database {alias!r} has refused a connection of late.")
        _set_rest(alias, now + TRY_LONGEST)


def _set_rest(alias: str, until: float | None) -> None:
    global _rests  # noqa: PLW0603  # it concerns all threads
    others = {other: rest for other, rest in _rests.items() if other != alias}
    _rests = others if until is None else others | {alias: until}
