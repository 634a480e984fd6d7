"""Whether there are connections enough for all threads of this process, or some have to share."""

import math
import time

from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

# How the server, a pooler, or psycopg's pool, says that it has no connection left; there is no code
# before one is made. In another language than English a worker only waits, as for a server that is
# away.
_REFUSALS = (
    *("too many connections", "too many clients", "connection slots", "no more connections"),
    "couldn't get a connection",
)
SCARCE_FOR = 10.0  # seconds after a refusal
REFUSED_PAUSE = 0.3  # seconds until a task is given back that no connection was left for
_refused_at = float("-inf")

# Of a worker, with a connection each: puller, renewer, acknowledger, listener, and where coroutines
# have Django's ORM work.
OWN_THREADS = 5
_POOL_SIZE_DEFAULT = 4  # psycopg_pool's


def pool_size(connection: BaseDatabaseWrapper) -> float:
    """Return how many connections Django's pool has at most; infinite without a pool."""
    options = connection.settings_dict["OPTIONS"].get("pool")
    if not options:  # also where they are an empty dictionary
        return math.inf
    if not isinstance(options, dict):
        return _POOL_SIZE_DEFAULT
    return int(options.get("max_size") or options.get("min_size", _POOL_SIZE_DEFAULT))


def expect_small_pools(concurrency: int) -> None:
    """Have threads share connections from the start where a pool has not one for each of them.

    To find out by a refusal takes the pool's ``timeout``, which may be longer than leases last.
    """
    global _refused_at  # noqa: PLW0603  # it concerns all threads
    if any(pool_size(each) < concurrency + OWN_THREADS for each in connections.all()):
        _refused_at = math.inf


def note_refused_connection(error: BaseException | None) -> None:
    """Remember that there was no connection left, if ``error`` is that."""
    global _refused_at  # noqa: PLW0603  # what one thread meets concerns all
    if isinstance(error, OperationalError) and any(text in str(error) for text in _REFUSALS):
        _refused_at = max(_refused_at, time.monotonic())


def are_scarce() -> bool:
    """Tell whether we have been refused a connection of late."""
    return time.monotonic() < _refused_at + SCARCE_FOR
