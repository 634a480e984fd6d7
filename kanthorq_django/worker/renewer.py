"""Keeps the leases in flight alive, and learns which of them are lost or asked to cancel."""

import threading
import time
from collections.abc import Callable
from typing import Any

from django.db import connections

from kanthorq_django.message import ASKED, LEASE_OVER
from kanthorq_django.models import Worker
from kanthorq_django.models.delivery import lease
from kanthorq_django.models.worker import SEEN_EVERY
from kanthorq_django.worker.backoff import Backoff
from kanthorq_django.worker.connections.probe import Probe
from kanthorq_django.worker.connections.upkeep import drop_connections, spare_connections
from kanthorq_django.worker.flight import Flight, Flights
from kanthorq_django.worker.warden import Bounded

BATCH_MAX = 1_000  # leases in one statement


class Renewer:
    """A thread with a connection of its own, so that no handler can keep leases from renewal."""

    def __init__(
        self, flights: Flights, row: Worker, using: str, interval: float, bounded: Bounded
    ) -> None:
        self._flights = flights
        self._row = row
        self._using = using
        self._interval = interval
        self._bounded = bounded
        self._stop = threading.Event()
        self._nudge = threading.Event()
        self._backoff = Backoff("renewer")
        self._seen_at = time.monotonic()
        self._probe = Probe(using)
        self._thread = threading.Thread(target=self._run, name="kanthorq-renewer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look_for_cancellations(self) -> None:
        """Ask at once, rather than with the next renewals; returns immediately."""
        self._nudge.set()

    def finish(self, seconds: float) -> None:
        self._stop.set()
        self._nudge.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._nudge.wait(self._interval):
                self._nudge.clear()
                self._attempt(self._learn_of_cancellations)
            self._attempt(self._renew)
            self._attempt(self._probe.make_if_due)
            self._attempt(self._be_seen)
            spare_connections()
        connections.close_all()

    def _attempt(self, step: Callable[[], bool]) -> None:
        """Take a step, which tells whether it has asked the database, and so proved that it can."""
        try:
            with self._bounded(connections[self._using]):
                has_asked = step()
        except BaseException as error:  # noqa: BLE001  # if this thread died, every lease would run out
            drop_connections()
            self._stop.wait(self._backoff.failed(error))
        else:
            if has_asked:
                self._backoff.succeeded()

    def _renew(self) -> bool:
        now = time.monotonic()
        due = [
            flight
            for flight in self._flights
            if flight.needs_renewal(now) and not flight.is_overdue(now)
        ]
        for start in range(0, len(due), BATCH_MAX):
            batch = {flight.lease: flight for flight in due[start : start + BATCH_MAX]}
            asked_at = time.monotonic()
            extensions = {
                held: flight.subscription.visibility_timeout for held, flight in batch.items()
            }
            for held, row in lease.renew(extensions, self._using).items():
                _learn(batch[held], row, asked_at)
        return bool(due)

    def _learn_of_cancellations(self) -> bool:
        flights = {flight.lease: flight for flight in self._flights}
        for held in lease.asked_to_cancel(flights, self._using):
            flights[held].give_up(ASKED)
        return bool(flights)

    def _be_seen(self) -> bool:
        is_due = time.monotonic() - self._seen_at >= SEEN_EVERY.total_seconds()
        if is_due:
            self._row.see()
            self._seen_at = time.monotonic()
        return is_due


def _learn(flight: Flight, row: Any, asked_at: float) -> None:
    if row.is_renewed:
        flight.renewed(asked_at)
    elif row.is_ours:
        flight.proven(asked_at)
    # A handler that has acknowledged may take its time to return.
    if not flight.message.is_settled() and (not row.is_ours or row.is_cancelled):
        flight.give_up(ASKED if row.is_cancelled else LEASE_OVER)
