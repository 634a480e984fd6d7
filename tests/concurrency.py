"""Work on connections of its own, and waiting for it: what other processes would do meanwhile."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from django.db import connection, connections

DEADLINE_SECONDS = 30

R = TypeVar("R")


def elsewhere(work: Callable[[], R]) -> R:
    """Run ``work`` to its end in another thread, on a connection of its own."""
    return begin_elsewhere(work).result(DEADLINE_SECONDS)


def begin_elsewhere(work: Callable[[], R]) -> "Future[R]":
    """Start ``work`` in another thread and return at once; its end is waited for at result()."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(_closing, work)
    pool.shutdown(wait=False)  # work that waits for a lock of the test must not keep it waiting
    return future


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Run all ``works`` from one moment on, each on its own connection.

    Returns what each returned, or the exception it raised, in the order given.
    """
    barrier = threading.Barrier(len(works), timeout=DEADLINE_SECONDS)

    def run(work: Callable[[], Any]) -> Any:
        for own in connections.all():
            if own.alias == "default":
                own.ensure_connection()  # connecting takes longer than the race
        barrier.wait()
        try:
            return work()
        except Exception as error:  # noqa: BLE001  # the test looks at it
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(_closing, lambda work=work: run(work)) for work in works]
    return [future.result() for future in futures]


def wait_until(condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
    """Return once ``condition()`` is true; fail the test if that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_waited_for() -> bool:
    """Tell whether somebody waits for a lock in this database."""
    with connection.cursor() as cursor:
        # A transaction would go on seeing what it saw first.
        cursor.execute("SELECT pg_stat_clear_snapshot()")
        cursor.execute(
            "SELECT EXISTS (SELECT FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock')"
        )
        return bool(cursor.fetchone()[0])


def _closing(work: Callable[[], R]) -> R:
    try:
        return work()
    finally:
        connections.close_all()
