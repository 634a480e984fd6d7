"""One worker process: it fetches tasks, hands them to its lanes, and stops in good order."""

import inspect
import logging
import math
import os
import random
import socket
import threading
import time
from datetime import timedelta

from django.db import connections, router
from django.db.models.functions import Now

from kanthorq_django.conf import get_settings
from kanthorq_django.domain.subscriptions import Subscription
from kanthorq_django.models import Consumer, Task, Worker, lease
from kanthorq_django.subscribers import find, sync
from kanthorq_django.worker.acknowledger import Acknowledger
from kanthorq_django.worker.flight import Flight, Flights
from kanthorq_django.worker.lanes import CoroutineLane, Lane, ThreadLane
from kanthorq_django.worker.listener import Listener
from kanthorq_django.worker.options import WorkerOptions
from kanthorq_django.worker.puller import Look, Puller
from kanthorq_django.worker.renewer import Renewer
from kanthorq_django.worker.scheduler import Scheduler
from kanthorq_django.worker.upkeep import UNAVAILABLE, Backoff

logger = logging.getLogger("kanthorq_django.worker")

CONTENDED = 0.05  # seconds to rest when another worker was at the same rows
BURST_REST = 0.02  # seconds between looks whether a burst is over
RENEWER_TICK_MIN, RENEWER_TICK_MAX = 0.1, 5.0  # seconds
FLUSH_SECONDS = 5.0  # what verdicts and goodbyes may take beyond the shutdown timeout
FORGET_AFTER = timedelta(days=1)  # rows of workers that died without a goodbye


class WorkerLoop:
    """Pulls, claims and runs tasks until ``stop()``, or until a burst or ``max_tasks`` is done."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._using: str = router.db_for_write(Consumer)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._backoff = Backoff("puller", self._stop)
        self._flights = Flights()
        self._scheduler = Scheduler(self._using)
        self._leased_count = 0

    @property
    def handled_count(self) -> int:
        """How many handlers have been started."""
        return sum(lane.started_count for lane in self._lanes.values())

    def stop(self) -> None:
        """Ask the loop to end; safe in a signal handler, which may do no more than this."""
        self._stop.set()
        self._wake.set()

    def run(self) -> int:
        """Work; return how many handlers were started.

        Raises ConfigurationError when a consumer is unknown or declared in two streams, and
        django.db.OperationalError when there is no database to begin with.
        """
        self._set_up()
        try:
            while not self._stop.is_set():
                self._turn()
        finally:
            self._shut_down()
        return self.handled_count

    def _set_up(self) -> None:
        consumers = sync(self._options.consumers or None, using=self._using)
        self._subscriptions = {consumer.pk: find(consumer.name) for consumer in consumers}
        self._puller = Puller(consumers, self._options, self._using)
        self._row = self._sign_in(consumers)
        self._acknowledger = Acknowledger(self._using, self._flights.remove)
        self._renewer = Renewer(self._flights, self._row, self._using, self._renewer_tick())
        self._lanes = self._make_lanes()
        self._listener = self._make_listener(consumers)
        for part in (self._acknowledger, self._renewer, *self._lanes.values(), self._listener):
            if part is not None:
                part.start()
        logger.info(
            "worker %s started for %s", self._row, ", ".join(self._row.consumers) or "nobody"
        )

    def _sign_in(self, consumers: list[Consumer]) -> Worker:
        workers = Worker.objects.using(self._using)
        workers.filter(seen_at__lt=Now() - FORGET_AFTER).delete()
        return workers.create(
            host=socket.gethostname(),
            pid=os.getpid(),
            concurrency=self._options.concurrency,
            consumers=[consumer.name for consumer in consumers],
        )

    def _renewer_tick(self) -> float:
        spans = [sub.visibility_timeout / 6 for sub in self._subscriptions.values()]
        for subscription in self._subscriptions.values():
            timeouts = (subscription.timeout, subscription.cancel_timeout)
            spans += [timeout / 4 for timeout in timeouts if timeout is not None]
        shortest = min((span.total_seconds() for span in spans), default=RENEWER_TICK_MAX)
        return min(max(shortest, RENEWER_TICK_MIN), RENEWER_TICK_MAX)

    def _make_lanes(self) -> dict[bool, Lane]:
        """Return the lanes by whether their handlers are coroutines; unneeded ones do not exist."""
        kinds = {
            inspect.iscoroutinefunction(handler)
            for subscription in self._subscriptions.values()
            for handler in (subscription.handler, subscription.cancel_handler)
            if handler is not None
        }
        classes: dict[bool, type[ThreadLane | CoroutineLane]] = {
            False: ThreadLane,
            True: CoroutineLane,
        }
        return {
            kind: classes[kind](self._options.concurrency, self._acknowledger.settle, self._wake)
            for kind in kinds
        }

    def _make_listener(self, consumers: list[Consumer]) -> Listener | None:
        if not (self._options.listen and self._options.pulls):
            return None
        streams = {consumer.stream_id for consumer in consumers}
        return Listener(get_settings().LISTEN_DATABASE or self._using, streams, self._wake.set)

    def _turn(self) -> None:
        """Fetch what there is room for, then rest until something is due or wakes us."""
        self._wake.clear()
        try:
            due_in = self._scheduler.turn() if self._options.pulls else math.inf
            seconds = min(self._fetch(), due_in)
        except UNAVAILABLE as error:
            self._backoff.failed(error)
            return
        self._backoff.succeeded()
        if seconds:
            self._wake.wait(seconds)

    def _fetch(self) -> float:
        """Lease and hand over one round of tasks; return how many seconds to rest."""
        looks = self._puller.look()
        if self._is_done(looks):
            self._stop.set()
            return 0
        has_progressed = is_contended = False
        for consumer in self._puller.in_turn():
            look = looks.get(consumer.pk)
            room = self._room(consumer)
            if look is None or not look.has_work or room < 1:
                continue
            leased_at = time.monotonic()
            haul = self._puller.fetch(consumer, look, room)
            self._hand_over(haul.tasks, self._subscriptions[consumer.pk], leased_at)
            has_progressed = has_progressed or haul.has_progressed
            is_contended = is_contended or haul.is_contended
        if has_progressed:
            return 0
        return CONTENDED if is_contended else self._rest(looks)

    def _room(self, consumer: Consumer) -> int:
        subscription = self._subscriptions[consumer.pk]
        room = self._lanes[inspect.iscoroutinefunction(subscription.handler)].room()
        if self._options.max_tasks is not None:
            room = min(room, self._options.max_tasks - self._leased_count)
        return room

    def _hand_over(self, tasks: list[Task], subscription: Subscription, leased_at: float) -> None:
        flights = [Flight(task, subscription, leased_at) for task in tasks]
        self._leased_count += len(flights)
        self._flights.add(flights)
        for kind, lane in self._lanes.items():
            if chosen := [flight for flight in flights if flight.is_async is kind]:
                lane.submit(chosen)

    def _is_done(self, looks: dict[int, Look]) -> bool:
        if len(self._flights):
            return False
        if self._options.max_tasks is not None and self._leased_count >= self._options.max_tasks:
            return True
        return self._options.burst and not any(look.has_work for look in looks.values())

    def _rest(self, looks: dict[int, Look]) -> float:
        """Until the next task is due, at most a poll interval; jitter keeps peers out of step."""
        if self._options.burst or self._options.max_tasks is not None:
            return BURST_REST
        waits = [look.due_in for look in looks.values() if look.due_in is not None]
        seconds = self._options.poll_interval.total_seconds()
        jittered = seconds * random.uniform(0.9, 1)  # noqa: S311  # not a secret
        return min([jittered, *(wait for wait in waits if wait > 0)])

    def _shut_down(self) -> None:
        """Hand back what was not started, wait for what runs, write its verdicts, sign out."""
        self._stop.set()
        deadline = time.monotonic() + self._options.shutdown_timeout.total_seconds()
        watchdog = self._arm_watchdog()
        self._hand_back_unstarted()
        for lane in self._lanes.values():
            lane.wait_until_idle(max(0.0, deadline - time.monotonic()))
        for flight in self._flights:
            flight.give_up()
        self._acknowledger.finish(FLUSH_SECONDS)
        self._renewer.finish(FLUSH_SECONDS)
        if self._listener is not None:
            self._listener.finish(FLUSH_SECONDS)
        self._sign_out()
        watchdog.cancel()
        logger.info("worker %s stopped after %d tasks", self._row, self.handled_count)

    def _arm_watchdog(self) -> threading.Timer:
        """A database that does not answer must not keep a stopping process alive."""
        seconds = self._options.shutdown_timeout.total_seconds() + 3 * FLUSH_SECONDS
        watchdog = threading.Timer(seconds, os._exit, [1])
        watchdog.daemon = True
        watchdog.start()
        return watchdog

    def _hand_back_unstarted(self) -> None:
        leases = [flight.lease for lane in self._lanes.values() for flight in lane.drain()]
        if not leases:
            return
        try:
            lease.hand_back(leases, self._using)
        except UNAVAILABLE as error:
            logger.warning("%d tasks could not be handed back: %s", len(leases), error)
        self._flights.remove(leases)

    def _sign_out(self) -> None:
        try:
            self._row.delete()
        except UNAVAILABLE as error:
            logger.warning("worker %s could not sign out: %s", self._row, error)
        connections.close_all()
