"""One worker process: it fetches tasks, hands them to its lanes, and stops in good order."""

import math
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta

from django.db import Error, connections, router
from django.db.models.functions import Now

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.amounts import counted, listed
from kanthorq_django.message import LEAVING
from kanthorq_django.models import Consumer, Worker
from kanthorq_django.models.delivery.lease import AT_ONCE, Lease
from kanthorq_django.models.publishing.notifications import SETTLE_LONGEST, SETTLE_SECONDS
from kanthorq_django.subscribers import find
from kanthorq_django.worker.acknowledger import Acknowledger
from kanthorq_django.worker.backoff import Backoff
from kanthorq_django.worker.connections.database_errors import is_unavailable
from kanthorq_django.worker.connections.probe import watched
from kanthorq_django.worker.connections.upkeep import (
    drop_connections,
    refresh_connections,
    spare_connections,
)
from kanthorq_django.worker.endings import HandBack
from kanthorq_django.worker.flight import ELSEWHERE, Flight, Flights
from kanthorq_django.worker.lanes.call import Call, calls
from kanthorq_django.worker.lanes.deafness import STILL_RUNNING, Deafness
from kanthorq_django.worker.lanes.lanes import Lanes, make_lanes
from kanthorq_django.worker.listener import Listener
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.puller import Haul, Look, Puller
from kanthorq_django.worker.pulling.demand import Demand
from kanthorq_django.worker.renewer import Renewer
from kanthorq_django.worker.scheduler import Scheduler
from kanthorq_django.worker.sync_report import sync_and_report
from kanthorq_django.worker.warden import Warden, tick_of

PACE_CHECKED_EVERY = 1.0  # seconds, while leased tasks wait to be started
INTERRUPT_SECONDS = 1.0  # for handlers that heed the request to stop
FLUSH_SECONDS = 10.0  # what verdicts and goodbyes may take beyond the shutdown timeout
CLOSE_SECONDS = 2.0  # for threads that have nothing to do any more
FORGET_AFTER = timedelta(days=1)  # rows of workers that died without a goodbye
AWAITED_NAMED_MAX = 10


class WorkerLoop:
    """Pulls, claims and runs tasks until ``stop()``, or until a burst or ``max_tasks`` is done."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._using: str = router.db_for_write(Consumer)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._woken_at = self._found_at = self._looked_at = -math.inf
        self._told: set[int] = set()  # streams, by their ids
        self._is_held_up = False
        self.has_failed = False  # and is to be replaced
        self._backoff = Backoff("puller")
        self._flights = Flights(emptied=self._wake.set)
        self._scheduler = Scheduler(self._using)
        self._lanes = Lanes()
        self._parts: list[Acknowledger | Renewer | Listener] = []

    @property
    def handled_count(self) -> int:
        """How many handlers have been started."""
        return self._lanes.started_count

    @property
    def has_stragglers(self) -> bool:
        """Whether, after ``run()``, handlers or what they started did not end within their time."""
        return self._lanes.is_alive

    def tell_stragglers(self) -> None:
        """Log which tasks were left in the middle, for others once their leases run out."""
        left = [_name(each) for each in self._flights]
        logger.warning("handlers did not end in time; left behind: %s", ", ".join(left) or "none")

    def stop(self) -> None:
        """Ask the loop to end; for any other thread than the one that runs it."""
        self._stop.set()
        self._wake.set()

    def run(self) -> int:
        """Work; return how many handlers were started.

        Raises ConfigurationError when a consumer is unknown or declared in two streams,
        PullRefused when a burst had to leave events unread, and django.db.OperationalError
        when there is no database to begin with.
        """
        with watched(self._using):
            self._set_up()
        try:
            while not self._stop.is_set():
                self._turn()
        finally:
            self._shut_down()
        if self._options.burst:
            for refusal in self._puller.refusals:
                raise refusal
        return self.handled_count

    def _set_up(self) -> None:
        consumers = sync_and_report(self._options.consumers, self._using)
        self._subscriptions = {consumer.pk: find(consumer.name) for consumer in consumers}
        tick = tick_of(self._subscriptions.values())
        self._warden = Warden(self._flights, tick)
        bounded = self._warden.bounded
        for consumer in consumers:
            consumer.turns.group_size = self._subscriptions[consumer.pk].group_size
        self._puller = Puller(consumers, self._options, self._using, bounded)
        self._row = self._sign_in(consumers)
        self._acknowledger = Acknowledger(self._using, self._written, bounded)
        self._renewer = Renewer(self._flights, self._row, self._using, tick, bounded)
        self._lanes = make_lanes(
            self._subscriptions.values(),
            self._options.concurrency,
            self._acknowledger.accept,
            self._wake.set,
            bounded,
        )
        self._deafness = Deafness(self._flights, self._lanes)
        self._demands = {
            pk: Demand(subscription, self._lanes, self._options.batch_size, self._allowed)
            for pk, subscription in self._subscriptions.items()
        }
        self._parts = [self._acknowledger, self._renewer, *self._make_listeners(consumers)]
        for part in (self._warden, *self._parts, self._lanes):
            part.start()
        logger.info("worker %s started for %s", self._row, ", ".join(self._row.consumers))

    def _sign_in(self, consumers: list[Consumer]) -> Worker:
        workers = Worker.objects.using(self._using)
        workers.filter(seen_at__lt=Now() - FORGET_AFTER).delete()
        return workers.create(
            host=socket.gethostname(),
            pid=os.getpid(),
            concurrency=self._options.concurrency,
            consumers=[consumer.name for consumer in consumers],
        )

    def _make_listeners(self, consumers: list[Consumer]) -> list[Listener]:
        """Return the listener, if there is anything to wait for."""
        if self._options.burst or not self._options.listen:
            return []
        # Who pulls nothing waits for requests to cancel alone.
        streams = {consumer.stream_id for consumer in consumers if self._options.pulls}
        using = get_settings().LISTEN_DATABASE or self._using
        on_cancel = self._renewer.look_for_cancellations
        return [Listener(using, streams, self._wake_up, on_cancel, self._warden.bounded)]

    def _wake_up(self, stream_id: int) -> None:
        """Note that something was published into a stream."""
        self._woken_at = self._found_at = time.monotonic()
        self._told.add(stream_id)
        self._wake.set()

    def _turn(self) -> None:
        """Fetch what there is room for, then rest until something is due or wakes us."""
        self._wake.clear()
        if self._stop.is_set():
            return  # asked between the loop's look and the line above, which forgot the wake-up
        if self._deafness.is_total():
            logger.error("All handlers that may run are deaf to their timeouts; the worker ends.")
            self.has_failed = True
            self._stop.set()
            return
        try:
            self._publish_scheduled()
            seconds = self._fetch()
        except Error as error:
            if self._options.burst and not is_unavailable(error):
                raise
            drop_connections()
            self._stop.wait(self._backoff.failed(error))
            return
        self._backoff.succeeded()
        spare_connections()
        if seconds:
            self._rest_until(time.monotonic() + self._cut_short(seconds))

    def _rest_until(self, moment: float) -> None:
        """Rest, but for the schedules; what they publish is looked for at once."""
        while (seconds := moment - time.monotonic()) > 0:
            if self._wake.wait(min(seconds, self._scheduled_in())) or self._publish_scheduled():
                return

    def _cut_short(self, seconds: float) -> float:
        """Cut short a rest until a look that began late enough after the last notification.

        What committed soon after that sent no other, and an earlier look cannot have seen it.
        """
        last_at, next_at = self._woken_at + SETTLE_LONGEST, self._found_at + SETTLE_SECONDS
        if self._looked_at >= last_at:
            return seconds
        due_at = next_at if self._looked_at < next_at else last_at
        return min(seconds, max(0.0, due_at - time.monotonic()))

    def _scheduled_in(self) -> float:
        """Return in how many seconds the schedules are due."""
        return self._scheduler.seconds if self._options.pulls else math.inf

    def _publish_scheduled(self) -> bool:
        """Publish what is due of the schedules, if it is time; tell whether there may be any."""
        if self._scheduled_in() > 0:
            return False
        try:
            with self._warden.bounded(connections[self._using]):
                return self._scheduler.turn() > 0
        except Exception as error:
            if self._options.burst and not is_unavailable(error):
                raise
            self._scheduler.postpone(error)
            return True  # of those that did not fail

    def _fetch(self) -> float:
        """Lease and hand over one round of tasks; return how many seconds to rest."""
        is_quiet = not len(self._flights)  # before the look: a handler's last act may be to publish
        told, self._told = self._told, set()  # one that comes this moment leads to a look at least
        self._looked_at = time.monotonic()
        self._puller.look_for_turns(told)
        looks = self._puller.guess(told) or self._puller.look(is_quiet=is_quiet)
        if (is_quiet and self._is_done(looks)) or self._is_spent():
            self._stop.set()
            return 0
        has_progressed = self._lease(looks)
        self._hand_back(self._lanes.surplus())
        if has_progressed or told:
            # What a guess left out is looked for when handlers have had the processor.
            return SETTLE_SECONDS if self._puller.may_pause(looks) else 0
        return self._rest(looks)

    def _lease(self, looks: dict[int, Look]) -> bool:
        """Fetch and hand over what was seen; tell whether there was any."""
        has_progressed = self._is_held_up = False
        for consumer in self._puller.in_turn(looks):
            demand = self._demands[consumer.pk]
            for haul in self._puller.fetch(consumer, looks[consumer.pk], demand):
                found = self._hand_over(haul, consumer)
                if haul.is_claim:
                    demand.learn(found)
                has_progressed = True
        if has_progressed:
            self._found_at = max(self._found_at, self._looked_at)
        return has_progressed

    def _allowed(self) -> int:
        """Return how many tasks may be leased at all now."""
        if self._acknowledger.is_behind:
            self._is_held_up = True  # so that the next verdicts that are written wake us
            return 0
        return max(0, self._left())

    def _left(self) -> int:
        """Return how many more tasks this worker may start."""
        if (limit := self._options.max_tasks) is None:
            return sys.maxsize  # nothing is counted: lanes hold thousands
        return limit - self._lanes.accepted_count

    def _hand_over(self, haul: Haul, consumer: Consumer) -> list[Call]:
        subscription = self._subscriptions[consumer.pk]
        flights = [Flight(leased, subscription, haul.asked_at) for leased in haul.leased]
        self._flights.add(flights)
        if haul.is_claim and (still := self._deafness.still_running(flights)):
            self._hand_back(still, STILL_RUNNING)
            flights = [flight for flight in flights if flight not in still]
        if self._puller.filters.is_overruled(consumer):
            theirs = {id(flight) for flight in flights if flight.is_for_others(consumer)}
            self._hand_back([flight for flight in flights if id(flight) in theirs], ELSEWHERE)
            flights = [flight for flight in flights if id(flight) not in theirs]
        found = calls(flights, subscription)
        self._lanes.submit(found)
        return found

    def _written(self, leases: Iterable[Lease]) -> None:
        """Forget leases whose verdicts are written; a key that became free is served at once."""
        for flight in self._flights.remove(leases):
            if flight.subscription.serialize or flight.subscription.grouped:
                self._puller.resume(flight.subscription.consumer)
                self._wake.set()
        if self._is_held_up:
            self._wake.set()

    def _is_done(self, looks: dict[int, Look]) -> bool:
        if self._left() <= 0:
            return True
        return self._options.burst and not any(look.has_work for look in looks.values())

    def _is_spent(self) -> bool:
        """Tell whether nothing is to be started any more, and what still runs heeds no timeout."""
        return self._left() <= 0 and len(self._flights.overdue()) == len(self._flights)

    def _rest(self, looks: dict[int, Look]) -> float:
        """Until the next task is due, at most a poll interval; jitter keeps peers out of step."""
        seconds = self._options.poll_interval.total_seconds()
        jittered = seconds * random.uniform(0.9, 1)  # noqa: S311  # not a secret
        longest = PACE_CHECKED_EVERY if self._lanes.waiting_count else math.inf
        return min(jittered, longest, self._puller.rest(looks))

    def _hand_back(self, flights: Iterable[Flight], delay: timedelta = AT_ONCE) -> None:
        self._acknowledger.accept([HandBack(flight.message, delay) for flight in flights])

    def _shut_down(self) -> None:
        """Hand back what was not started, wait for what runs, write its verdicts, sign out."""
        self._stop.set()
        self._hand_back(self._lanes.drain())
        self._tell_awaited()
        self._lanes.wait_until_idle(self._options.shutdown_timeout.total_seconds())
        for flight in self._flights:
            flight.give_up(LEAVING)
        self._lanes.wait_until_idle(INTERRUPT_SECONDS)
        deadline = time.monotonic() + FLUSH_SECONDS
        for part in self._parts:
            part.finish(_left(deadline))
        self._sign_out()
        self._warden.finish(_left(deadline))
        self._lanes.finish(CLOSE_SECONDS)
        handled = counted(self.handled_count, "task")
        logger.info("worker %s stopped after %s", self._row, handled)

    def _tell_awaited(self) -> None:
        """Log which handlers still run: a deployment that waits for them is to say for which."""
        awaited = [_name(each) for each in self._flights if each.started_at is not None]
        if awaited and not self._lanes.is_idle:  # else verdicts are still to be written
            logger.info(
                "worker %s is to end and waits up to %g s for %s",
                self._row,
                self._options.shutdown_timeout.total_seconds(),
                listed(awaited, shown_max=AWAITED_NAMED_MAX),
            )

    def _sign_out(self) -> None:
        try:
            refresh_connections(self._warden.bounded)
            with self._warden.bounded(connections[self._using]):
                self._row.sign_out()
        except Error as error:
            logger.warning("worker %s could not sign out: %s", self._row, error)
        connections.close_all()


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _name(flight: Flight) -> str:
    return f"{flight.subscription.consumer} {flight.leased.event_id}"
