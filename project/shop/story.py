"""A day in the shop: customers, two workers, one of them killed, and a person who operates tasks.

``Story.run()`` is the demo from the opening of the shop to its last settled task. What it proves
is looked up afterwards: see invariants.py and report.py.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from django.db.models import QuerySet
from django.db.models.functions import Now
from django.utils import timezone

from project.shop import backlog, operating, orders
from project.shop.crew import Crew
from project.shop.crowd import shopping
from project.shop.models import Order, Sale, TillReport
from project.shop.narrator import Narrator
from project.shop.patience import wait_until
from project.shop.subscribers import LEASE
from project.shop.tills import DAILY, schedule_reports

WORKERS = 2
KILL_AFTER_SHARE = 1 / 3  # of the customers have paid
REFUNDED_SHARE = 0.03  # of the customers get money back
PARCELS = 12
REPORT_AFTER = timedelta(seconds=3)
TELL_EVERY = 2.0  # seconds


class Pace(NamedTuple):
    """How fast the workers were, the wait for the killed one's leases included."""

    tasks: int
    seconds: float


class Story:
    """One sale, and the people and processes in it."""

    def __init__(self, narrator: Narrator, logs: Path, customers: int) -> None:
        self._narrator = narrator
        self._told_at = 0.0
        self._crew = Crew(logs, WORKERS)
        self._customers = customers

    def run(self) -> tuple[Sale, Pace]:
        """Return the sale once all that it led to is settled.

        Raises NothingHappens, WorkerEnded or Interrupted if that is not to be.
        """
        self._sale = Sale.objects.create()
        self._sale.refresh_from_db()  # opened by the database's clock
        with self._crew:
            self._greet()
            began_at = time.monotonic()
            self._schedule_report()
            self._sell()
            self._handle_complaints()
            self._pack_parcels()
            self._hear_report()
            self._settle()
            pace = Pace(backlog.settled_count(self._sale), time.monotonic() - began_at)
            self._operate()
        return self._sale, pace

    def _greet(self) -> None:
        self._tell(f"{WORKERS} workers start.")
        self._wait(self._crew.is_ready)
        pids = " and ".join(map(str, self._crew.pids))
        self._tell(f"{WORKERS} workers are ready: processes {pids}.")

    def _schedule_report(self) -> None:
        # By the database's clock, which decides when it is due.
        (now,) = Sale.objects.filter(pk=self._sale.pk).values_list(Now(), flat=True)
        self._sale.report_at = now.replace(microsecond=0) + REPORT_AFTER
        self._sale.save(update_fields=["report_at"])
        reports = schedule_reports(self._sale, DAILY, self._sale.report_at)
        self._tell(
            f"A schedule lets the till report {reports.in_words()}: "
            f"in {REPORT_AFTER.seconds} s for the first time."
        )

    def _sell(self) -> None:
        self._tell(f"{self._customers:,} customers come to the tills.")
        with shopping(self._sale, self._customers) as crowd:
            self._kill_one_worker()
            self._wait(crowd.has_left)
            tally = crowd.tally()
        self._sale.placed_count, self._sale.declined_count = tally
        self._sale.save()
        self._tell(
            f"{tally.placed:,} customers have ordered. {tally.declined:,} cards were declined: "
            "these orders and their events were rolled back together."
        )

    def _kill_one_worker(self) -> None:
        enough = self._customers * KILL_AFTER_SHARE
        self._wait(lambda: self._orders_paid().count() >= enough)
        pid = self._crew.kill_one()
        self._tell(
            f"kill -9 {pid}: a worker dies in the middle of its work. The other one takes over "
            f"what it held when its leases run out, {LEASE.seconds} s after the last renewal."
        )

    def _handle_complaints(self) -> None:
        complaints = self._orders_paid()[: max(2, int(self._customers * REFUNDED_SHARE))]
        for number, order in enumerate(complaints):
            orders.give_back(order, order.total if number % 2 else round(order.total / 2, 2))
        self._tell(f"{len(complaints)} customers get some or all of their money back.")

    def _pack_parcels(self) -> None:
        tomorrow = timezone.now() + timedelta(days=1)
        parcels = orders.pack(self._orders_paid()[:PARCELS], pickup_at=tomorrow)
        self._tell(f"{len(parcels)} parcels are packed; the courier comes tomorrow.")

    def _hear_report(self) -> None:
        reports = TillReport.objects.filter(sale=self._sale)
        self._wait(reports.exists)
        report = reports[0]
        late = (report.made_at - report.occurs_at).total_seconds()
        self._tell(
            f"The till has reported, {late:.1f} s after its time: {report.payment_count:,} "
            f"payments of {report.taken:,} euros by then. The next report is due tomorrow."
        )

    def _operate(self) -> None:
        released = operating.release_reviews(self._sale)
        cancelled = operating.cancel_parcels(self._sale)
        self._tell(
            f"A person releases {len(released.updated)} parked reviews and cancels "
            f"{len(cancelled.updated)} parcels, which are unpacked."
        )
        self._wait(backlog.is_empty)
        parcels = operating.resume_parcels(self._sale)
        emails = operating.correct_addresses(self._sale)
        self._tell(
            f"They resume {len(parcels.updated)} of these parcels, and {len(emails.updated)} "
            "e-mails whose mistyped address they have corrected."
        )
        self._wait(backlog.is_empty)
        self._tell("All is settled again.")

    def _orders_paid(self) -> QuerySet[Order]:
        return Order.objects.filter(sale=self._sale, status=Order.Status.PAID).order_by("pk")

    def _settle(self) -> None:
        self._wait(backlog.is_empty)
        self._tell(f"All is settled: {backlog.settled_count(self._sale):,} tasks have ended.")

    def _wait(self, is_done: Callable[[], bool]) -> None:
        wait_until(is_done, self._progress)

    def _progress(self) -> int:
        """Return how many tasks have ended, and say so now and then."""
        self._crew.check()
        count = backlog.settled_count(self._sale)
        if time.monotonic() - self._told_at > TELL_EVERY:
            self._tell(f"{count:,} tasks have ended.")
        return count

    def _tell(self, text: str) -> None:
        self._narrator.tell(text)
        self._told_at = time.monotonic()
