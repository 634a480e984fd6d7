"""Enforces time limits: of handlers, of leases, and of statements that get no answer.

It has no connection, so nothing can keep it waiting. A half-open connection raises no error by
itself, and would hold up whoever uses it for ever.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper

from kanthorq_django.worker.flight import Flights

logger = logging.getLogger("kanthorq_django.worker")

# How long the block may use the connection is limited: see Warden.bounded().
Bounded = Callable[[BaseDatabaseWrapper], contextlib.AbstractContextManager[object]]

ANSWER_WITHIN = 20.0  # seconds after which a statement of ours will not be answered any more


class Warden:
    """A thread that looks after the flights and connections of one process."""

    def __init__(self, flights: Flights, interval: float) -> None:
        self._flights = flights
        self._interval = interval
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waits: dict[int, tuple[float, BaseDatabaseWrapper]] = {}
        self._thread = threading.Thread(target=self._run, name="kanthorq-warden", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, seconds: float) -> None:
        self._stop.set()
        self._thread.join(seconds)

    @contextlib.contextmanager
    def bounded(self, connection: BaseDatabaseWrapper) -> Iterator[None]:
        """Cut ``connection`` if the block takes longer than its statements ever should.

        Who waits for it then gets an OperationalError, as for any lost connection.
        """
        thread = threading.get_ident()
        with self._lock:
            self._waits[thread] = time.monotonic() + ANSWER_WITHIN, connection
        try:
            yield
        finally:
            with self._lock:
                self._waits.pop(thread, None)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._stop_handlers()
                self._cut_connections()
            except Exception:
                # Without this thread no limit holds any more.
                logger.exception("The warden failed; it goes on.")

    def _stop_handlers(self) -> None:
        """Stop handlers that are over their time, or whose lease can no longer be proved."""
        now = time.monotonic()
        for flight in self._flights:
            if flight.is_overdue(now) or flight.is_expired(now):
                flight.give_up()

    def _cut_connections(self) -> None:
        now = time.monotonic()
        with self._lock:
            for thread, (deadline, connection) in list(self._waits.items()):
                if now >= deadline:
                    del self._waits[thread]
                    logger.warning("The database does not answer; a connection was cut.")
                    _cut(connection)


def _cut(connection: BaseDatabaseWrapper) -> None:
    """Shut the socket under the thread that waits for it; a lost connection wakes it up."""
    raw = connection.connection
    if raw is None:
        return  # it is being made, which has a timeout of its own
    with (
        contextlib.suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(raw.fileno())) as held,
    ):
        held.shutdown(socket.SHUT_RDWR)
