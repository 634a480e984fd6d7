"""Enforces time limits: of handlers, of leases, and of statements that get no answer.

It has no connection, so nothing can keep it waiting. A half-open connection raises no error by
itself, and would hold up whoever uses it for ever.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from kanthorq_django.domain.subscriptions import Subscription
from kanthorq_django.message import LEASE_OVER, TIME_UP
from kanthorq_django.worker.flight import Flight, Flights
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.stacks import present_stack, told

# How long the block may use the connection is limited: see Warden.bounded().
Bounded = Callable[[BaseDatabaseWrapper], contextlib.AbstractContextManager[object]]

TICK_MIN, TICK_MAX = 0.1, 5.0  # seconds between two looks at the leases in flight
# Seconds after which a statement of ours is cancelled, and after which it is not waited for.
CANCEL_AFTER, CUT_AFTER = 20.0, 25.0


def tick_of(subscriptions: Collection[Subscription]) -> float:
    """Return how often leases and timeouts have to be looked at, in seconds."""
    spans = [subscription.visibility_timeout / 6 for subscription in subscriptions]
    for subscription in subscriptions:
        timeouts = (subscription.timeout, subscription.cancel_timeout)
        spans += [timeout / 4 for timeout in timeouts if timeout is not None]
    shortest = min((span.total_seconds() for span in spans), default=TICK_MAX)
    return min(max(shortest, TICK_MIN), TICK_MAX)


class _Wait:
    """Somebody's wait for an answer from ``connection``."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self.connection = connection
        self.since = time.monotonic()
        self.is_cancelled = False

    def is_for_answer(self) -> bool:
        """Tell whether the server owes one; else a receiver of the project's takes its time.

        To connect has a time limit of its own.
        """
        raw = self.connection.connection
        return raw is not None and raw.pgconn.transaction_status == TransactionStatus.ACTIVE


class Warden:
    """A thread that looks after the flights and connections of one process."""

    def __init__(self, flights: Flights, interval: float) -> None:
        self._flights = flights
        self._interval = interval
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waits: dict[int, _Wait] = {}
        self._thread = threading.Thread(target=self._run, name="kanthorq-warden", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, seconds: float) -> None:
        self._stop.set()
        self._thread.join(seconds)

    @contextlib.contextmanager
    def bounded(self, connection: BaseDatabaseWrapper) -> Iterator[None]:
        """Cancel what the block waits for if that takes too long, or else cut ``connection``.

        Who waits for it then gets an OperationalError. Cancelled first: a server that waits for
        a lock would not notice that its client has gone, and leave a backend behind each time.
        """
        thread = threading.get_ident()
        with self._lock:
            self._waits[thread] = _Wait(connection)
        try:
            yield
        finally:
            with self._lock:
                self._waits.pop(thread, None)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._stop_handlers()
                self._end_waits()
            except Exception:
                # Without this thread no limit holds any more.
                logger.exception("The warden failed; it goes on.")

    def _stop_handlers(self) -> None:
        """Stop handlers that are over their time, or whose lease can no longer be proved."""
        now = time.monotonic()
        for flight in self._flights:
            if flight.is_overdue(now):
                if not (flight.is_async or flight.stop.is_set() or flight.message.is_settled()):
                    _warn(flight)
                flight.give_up(TIME_UP)
            elif flight.is_expired(now):
                flight.give_up(LEASE_OVER)

    def _end_waits(self) -> None:
        now = time.monotonic()
        with self._lock:
            for thread, wait in list(self._waits.items()):
                if not wait.is_for_answer():
                    wait.since, wait.is_cancelled = now, False
                elif now >= wait.since + CUT_AFTER:
                    del self._waits[thread]
                    _end(wait.connection)
                elif now >= wait.since + CANCEL_AFTER and not wait.is_cancelled:
                    wait.is_cancelled = True
                    _cancel(wait.connection)


def _warn(flight: Flight) -> None:
    """Say what a thread is to stop, as nobody can interrupt it; a coroutine's nack says it."""
    logger.warning(
        "%s event %s takes longer than its timeout of %s; others run it once its lease ends. It is "
        "here:\n%s",
        flight.subscription.consumer,
        flight.leased.event_id,
        flight.timeout,
        told(present_stack(flight.thread)),
        extra={"consumer": flight.subscription.consumer, "event_id": str(flight.leased.event_id)},
    )


def _cancel(connection: BaseDatabaseWrapper) -> None:
    """Ask the server to cancel, from a thread: the question itself may remain unanswered.

    Before libpq 17 that would stop all threads, for as long; there a connection is only cut.
    """
    raw = connection.connection
    if raw is not None and psycopg.capabilities.has_cancel_safe():
        logger.warning("A statement takes too long; it is cancelled.")
        threading.Thread(
            target=_cancel_now, args=(raw,), name="kanthorq-cancel", daemon=True
        ).start()


def _cancel_now(raw: "psycopg.Connection[object]") -> None:
    with contextlib.suppress(OSError, psycopg.Error):
        raw.cancel_safe(timeout=CUT_AFTER - CANCEL_AFTER)


def _end(connection: BaseDatabaseWrapper) -> None:
    raw = connection.connection
    if raw is not None:  # while it is being made, it has a timeout of its own
        logger.warning("The database does not answer; a connection is cut.")
        cut(raw)


def cut(raw: "psycopg.Connection[object]") -> None:
    """Shut the socket under the thread that waits for it; a lost connection wakes it up."""
    with (
        contextlib.suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(raw.fileno())) as held,
    ):
        held.shutdown(socket.SHUT_RDWR)
