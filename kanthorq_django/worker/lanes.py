"""Where handlers run: plain functions in threads, coroutines on an event loop.

Both lanes hold what waits to be started, and tell how much more they can take: no more than
they start within about a second, so that idle peers never starve behind a hoarder.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable

from asgiref.sync import sync_to_async
from django.db import connections

from kanthorq_django.models.lease import AT_ONCE
from kanthorq_django.worker.executor import (
    Ending,
    HandBack,
    aexecute,
    after_interrupt,
    after_timeout,
    execute,
)
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.upkeep import UNAVAILABLE, note_use, refresh_connections

Settle = Callable[[Ending], None]


class Lane:
    """A bounded number of running handlers, and the flights that wait for one of them to end."""

    def __init__(self, concurrency: int, settle: Settle, wake: threading.Event) -> None:
        self.concurrency = concurrency
        self._settle = settle
        self._wake = wake
        lock = threading.Lock()
        self._arrived = threading.Condition(lock)
        self._emptied = threading.Condition(lock)
        self._waiting: deque[Flight] = deque()
        self._running = 0
        self._pace = _Pace()
        self._low_water = 0
        self._is_closed = False
        self.started_count = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._arrived:
            return not self._waiting and not self._running

    def start(self) -> None:
        """Start what the handlers run in."""
        raise NotImplementedError

    def room(self) -> int:
        """Return how many more tasks may be leased for this lane now."""
        with self._arrived:
            target = self.concurrency + self._pace.per_second(self.started_count)
            self._low_water = target // 2
            if len(self._waiting) > self._low_water:
                return 0  # refilling only when half has gone keeps the batches large
            return max(0, target - self._running - len(self._waiting))

    def submit(self, flights: list[Flight]) -> None:
        """Queue leased flights to be started in order."""
        with self._arrived:
            self._waiting.extend(flights)
            self._arrived.notify(len(flights))

    def drain(self) -> list[Flight]:
        """Start nothing any more; return what was not started."""
        with self._arrived:
            self._is_closed = True
            unstarted = list(self._waiting)
            self._waiting.clear()
            self._arrived.notify_all()
        return unstarted

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait for running handlers to end; False when ``seconds`` were not enough."""
        with self._emptied:
            return self._emptied.wait_for(lambda: not self._running, seconds)

    def _next(self) -> Flight | None:
        """Wait for a flight and count it as running; None when the lane is closed."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            flight = self._waiting.popleft()
            self._running += 1
            self.started_count += 1
            if len(self._waiting) == self._low_water:
                self._wake.set()
            return flight

    def _ended(self, ending: Ending) -> None:
        self._settle(ending)
        with self._emptied:
            self._running -= 1
            if not self._running:
                self._emptied.notify_all()
            is_hungry = not self._waiting
        if is_hungry:
            self._wake.set()


class ThreadLane(Lane):
    """Plain handlers, each thread with Django connections of its own."""

    def start(self) -> None:
        """Start the threads: daemons, for a handler that hangs must not keep the process alive."""
        for number in range(self.concurrency):
            name = f"kanthorq-handler-{number}"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        while (flight := self._next()) is not None:
            self._ended(self._handle(flight))
        connections.close_all()

    def _handle(self, flight: Flight) -> Ending:
        if not flight.start():
            return Ending(flight.message)
        try:
            refresh_connections()
        except UNAVAILABLE:
            return HandBack(flight.message, AT_ONCE)
        ending = execute(flight)
        note_use()
        return ending


class CoroutineLane(Lane):
    """``async def`` handlers, concurrent on one event loop in a thread of its own."""

    def start(self) -> None:
        """Start the event loop and the thread that feeds it."""
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._loop.run_forever, name="kanthorq-loop", daemon=True).start()
        threading.Thread(target=self._feed, name="kanthorq-feeder", daemon=True).start()

    def _feed(self) -> None:
        slots = threading.Semaphore(self.concurrency)
        while slots.acquire() and (flight := self._next()) is not None:
            self._loop.call_soon_threadsafe(self._spawn, flight, slots)

    def _spawn(self, flight: Flight, slots: threading.Semaphore) -> None:
        task = self._loop.create_task(self._handle(flight, slots))
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)

        def interrupt() -> None:
            self._loop.call_soon_threadsafe(task.cancel)

        flight.interrupt = interrupt

    async def _handle(self, flight: Flight, slots: threading.Semaphore) -> None:
        try:
            ending = await self._execute(flight)
        except asyncio.CancelledError:
            ending = after_interrupt(flight)
        slots.release()
        self._ended(ending)

    async def _execute(self, flight: Flight) -> Ending:
        if not flight.start():
            return Ending(flight.message)
        try:
            await sync_to_async(refresh_connections)()
        except UNAVAILABLE:
            return HandBack(flight.message, AT_ONCE)
        seconds = None if flight.timeout is None else flight.timeout.total_seconds()
        try:
            async with asyncio.timeout(seconds):
                return await aexecute(flight)
        except TimeoutError:
            return after_timeout(flight)


class _Pace:
    """How many handlers were started within about the last second."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._count = 0
        self._rate = 0

    def per_second(self, count: int) -> int:
        now = time.monotonic()
        elapsed, started = now - self._since, count - self._count
        if elapsed < 1:
            return max(self._rate, started)
        self._since, self._count, self._rate = now, count, int(started / elapsed)
        return self._rate
