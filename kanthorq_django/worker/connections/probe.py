"""Finds connections that wait for an answer which the server does not owe them.

A road that swallows what is sent, and stays open, raises no error and wakes no timeout of TCP.
The handler would wait for ever, and its lease be renewed all the while. All connections of the
process are looked after: those of coroutines belong to threads of asgiref or of the handler.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from types import FrameType
from weakref import WeakSet

import psycopg
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.dispatch import receiver
from psycopg.pq import TransactionStatus

from kanthorq_django import sql
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.warden import cut

PROBE_EVERY = 10.0  # seconds; what is found silent twice without a change is cut
STEP = 0.2  # seconds after which a watch looks whether it is over
_WAIT = psycopg.Connection.wait.__code__

_lock = threading.Lock()
_made: WeakSet[BaseDatabaseWrapper] = WeakSet()


@receiver(connection_created)
def _note(connection: BaseDatabaseWrapper, **_: object) -> None:
    with _lock:
        _made.add(connection)


class Probe:
    """Looks after the connections to the database ``using``, on the one of its caller."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._due_at = time.monotonic() + PROBE_EVERY
        self._silent: dict[int, datetime | None] = {}

    def make_if_due(self) -> bool:
        """Cut connections whose backend has been waiting for us since the last look.

        Returns whether there was anything to ask the database.
        """
        now = time.monotonic()
        if now < self._due_at:
            return False
        self._due_at = now + PROBE_EVERY
        waiting = self._waiting()
        silent = self._look(waiting) if waiting else {}
        for pid in silent.keys() & self._silent.keys():
            # A statement that has just been sent looks the same, but only once.
            if silent[pid] == self._silent[pid]:
                logger.warning("A connection waits for an answer that was lost; it is cut.")
                cut(waiting[pid])
        self._silent = silent
        return bool(waiting)

    def _look(self, pids: Iterable[int]) -> dict[int, datetime | None]:
        """Return which backends are not at work, and since when."""
        own = connections[self._using]
        own.ensure_connection()
        params = {"pids": list(pids), "own_pid": own.connection.pgconn.backend_pid}
        return {row.pid: row.state_change for row in sql.rows(self._using, "silent", params)}

    def _waiting(self) -> "dict[int, psycopg.Connection[object]]":
        """Return the connections that somebody waits for, by the process ids of their backends."""
        with _lock:
            made = [wrapper.connection for wrapper in _made if wrapper.alias == self._using]
        waited_for = _waited_for()
        found = {}
        for raw in filter(None, made):
            with contextlib.suppress(psycopg.Error):  # it is being closed just now
                is_active = raw.pgconn.transaction_status == TransactionStatus.ACTIVE
                if is_active and id(raw) in waited_for:
                    found[raw.pgconn.backend_pid] = raw
        return found


def _waited_for() -> set[int]:
    """Return the ids of the connections in whose ``wait()`` a thread is.

    A query is active until its last row is read: who reads a stream or a COPY slowly owes the
    server nothing, though it has long been idle.
    """
    found = set()
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code is _WAIT:
                found.add(id(frame.f_locals["self"]))
            frame = frame.f_back
    return found


@contextlib.contextmanager
def watched(using: str) -> Iterator[None]:
    """Cut connections that fall silent while the block runs, however long its statements take.

    Before a worker has its threads nobody else would: it would wait for ever to begin.
    """
    is_over = threading.Event()

    def watch() -> None:
        probe = Probe(using)
        while not is_over.wait(STEP):
            with contextlib.suppress(Exception):  # the next look may do better
                probe.make_if_due()
        connections.close_all()

    thread = threading.Thread(target=watch, name="kanthorq-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(STEP)
