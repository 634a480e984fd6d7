"""Where handlers run: plain functions in threads, coroutines on an event loop.

Both lanes hold what waits to be started, and tell how much more they can take: no more than
they start within about a second, so that idle peers never starve behind a hoarder.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from asgiref.sync import sync_to_async
from django.db import connections

from kanthorq_django.conf import get_settings
from kanthorq_django.models.lease import AT_ONCE
from kanthorq_django.worker.call import Call, Round
from kanthorq_django.worker.executor import (
    Ending,
    HandBack,
    aexecute,
    after_interrupt,
    after_timeout,
    execute,
    execute_together,
)
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.upkeep import UNAVAILABLE, note_use, refresh_connections
from kanthorq_django.worker.warden import Bounded

WAIT_LONGEST = 2.0  # seconds that a leased task may wait to be started

Settle = Callable[[Ending], None]


class Lane:
    """A bounded number of running handlers, and the flights that wait for one of them to end."""

    group_size = 1  # calls that may share a transaction

    def __init__(
        self, concurrency: int, settle: Settle, wake: Callable[[], None], bounded: Bounded
    ) -> None:
        self.concurrency = concurrency
        self._settle = settle
        self._wake = wake
        self._bounded = bounded
        lock = threading.Lock()
        self._arrived = threading.Condition(lock)
        self._emptied = threading.Condition(lock)
        self._waiting: deque[_Waiting] = deque()
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._pace = _Pace()
        self._is_refusing = False
        self._is_closed = False
        self._ended_count = 0  # calls
        self.started_count = 0  # tasks

    @property
    def accepted_count(self) -> int:
        """How many tasks have been started, or are still to be."""
        with self._arrived:
            return self.started_count + sum(len(waiting.call.flights) for waiting in self._waiting)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._arrived:
            return not self._waiting and not self._running

    @property
    def is_alive(self) -> bool:
        """Whether any of the threads has not ended."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Start the threads: daemons, for a handler that hangs must not keep the process alive."""
        for thread in self._threads:
            thread.start()

    def finish(self, seconds: float) -> None:
        """Wait for the threads to end, after ``drain()`` and the last handler."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def room(self) -> int:
        """Return how many more calls are wanted now; who gets 0 is woken when there is room."""
        with self._arrived:
            room = self._room()
            self._is_refusing = room == 0
            return room

    def submit(self, calls: list[Call]) -> None:
        """Queue calls to be started in order."""
        with self._arrived:
            now = time.monotonic()
            self._waiting.extend(_Waiting(call, now) for call in calls)
            self._arrived.notify(len(calls))

    def surplus(self) -> list[Flight]:
        """Take back what waits for so long that others had better have it: handlers became slow."""
        found = []
        with self._arrived:
            latest = time.monotonic() - WAIT_LONGEST
            while self._waiting and self._waiting[0].since < latest:
                found.append(self._waiting.popleft())
        return _flights(found)

    def drain(self) -> list[Flight]:
        """Start nothing any more; return what was not started."""
        with self._arrived:
            self._is_closed = True
            unstarted = _flights(self._waiting)
            self._waiting.clear()
            self._arrived.notify_all()
        return unstarted

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait for running handlers to end; False when ``seconds`` were not enough."""
        with self._emptied:
            return self._emptied.wait_for(lambda: not self._running, seconds)

    def _target(self) -> int:
        return self.concurrency + self._pace.per_second(self._ended_count)

    def _room(self) -> int:
        target = self._target()
        if len(self._waiting) > target // 2:
            return 0  # refilling only when half has gone keeps the batches large
        return max(0, target - self._running - len(self._waiting))

    def _next(self) -> Call | None:
        """Wait for a call and count it as running; None when the lane is closed."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            call = self._take()
            self._running += 1
            self.started_count += len(call.flights)
            self._invite()
            return call

    def _take(self) -> Call:
        first = self._waiting.popleft().call
        # A fair share of a backlog: what idle threads can start is not kept from them.
        share = min(self.group_size, len(self._waiting) // self.concurrency)
        others: list[Call] = []
        while len(others) + 1 < share and self._waiting[0].call.may_join(first):
            others.append(self._waiting.popleft().call)
        return first.with_others(others)

    def _startable(self, round_: Round) -> Round:
        """Note the start of those whose lease surely stands, and hand the others back.

        A closed lane starts no further round of a call that runs.
        """
        started = () if self._is_closed else tuple(flight for flight in round_ if flight.start())
        self._hand_back(flight for flight in round_ if flight not in started)
        return started

    def _hand_back(self, flights: Iterable[Flight]) -> None:
        """Take back the count of tasks whose handler must not run; others may run it."""
        for flight in flights:
            with self._arrived:
                self.started_count -= 1
            self._settle(HandBack(flight.message, AT_ONCE))

    def _ended(self, count: int = 1) -> None:
        """Note the end of ``count`` calls that were run at a stretch and settled."""
        with self._emptied:
            self._running -= 1
            self._ended_count += count
            if not self._running:
                self._emptied.notify_all()
            self._invite()

    def _invite(self) -> None:
        if self._is_refusing and self._room():
            self._is_refusing = False
            self._wake()


class ThreadLane(Lane):
    """Plain handlers, each thread with Django connections of its own."""

    def start(self) -> None:
        self.group_size = get_settings().GROUP_COMMIT
        self._threads = [
            threading.Thread(target=self._run, name=f"kanthorq-handler-{number}", daemon=True)
            for number in range(self.concurrency)
        ]
        super().start()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            for round_ in call.rounds:
                self._handle(round_, execute_together if call.is_shared else execute)
            self._ended(len(call.flights) if call.is_shared else 1)
        connections.close_all()

    def _handle(self, round_: Round, run: Callable[..., list[Ending]]) -> None:
        if started := self._startable(round_):
            try:
                refresh_connections(self._bounded)
            except UNAVAILABLE:
                return self._hand_back(started)
            endings = run(*started)
            note_use()
            for ending in endings:
                self._settle(ending)
        return None


class CoroutineLane(Lane):
    """``async def`` handlers, concurrent on one event loop in a thread of its own."""

    def start(self) -> None:
        """Start the event loop and the thread that feeds it."""
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = [
            threading.Thread(target=self._serve, name="kanthorq-loop", daemon=True),
            threading.Thread(target=self._feed, name="kanthorq-feeder", daemon=True),
        ]
        super().start()

    def finish(self, seconds: float) -> None:
        with contextlib.suppress(RuntimeError):  # closed already
            self._loop.call_soon_threadsafe(self._closing.set)
        super().finish(seconds)

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._stay_open())

    async def _stay_open(self) -> None:
        await self._closing.wait()
        await sync_to_async(connections.close_all)()

    def _feed(self) -> None:
        slots = threading.Semaphore(self.concurrency)
        while slots.acquire() and (call := self._next()) is not None:
            self._loop.call_soon_threadsafe(self._spawn, call, slots)

    def _spawn(self, call: Call, slots: threading.Semaphore) -> None:
        current: list[Flight] = []
        task = self._keep(self._loop.create_task(self._handle(call, slots, current)))

        def cancel() -> None:
            # Once: what it cleans up must not be interrupted again. And not while it still
            # works for messages of the batch that nobody gave up.
            is_given_up = bool(current) and all(flight.stop.is_set() for flight in current)
            if is_given_up and not task.cancelling():
                task.cancel()

        def interrupt() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(cancel)

        for flight in call.flights:
            flight.interrupt = interrupt

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """Hold ``task`` until it is done: the loop itself keeps only weak references."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _handle(self, call: Call, slots: threading.Semaphore, current: list[Flight]) -> None:
        # First in line for the one thread in which Django's ORM serves coroutines; not awaited,
        # so that a handler which needs no database does not wait for those that do.
        self._keep(self._loop.create_task(self._refresh()))
        for round_ in call.rounds:
            current[:] = round_
            await self._execute(round_)
        slots.release()
        self._ended()

    async def _refresh(self) -> None:
        with contextlib.suppress(*UNAVAILABLE):  # a handler that needs it will find out
            await sync_to_async(refresh_connections)(self._bounded)

    async def _execute(self, round_: Round) -> None:
        started: Round = ()
        try:
            await asyncio.sleep(0)
            if not (started := self._startable(round_)):
                return
            timeout = started[0].timeout
            async with asyncio.timeout(None if timeout is None else timeout.total_seconds()):
                endings = await aexecute(*started)
        except TimeoutError:
            endings = after_timeout(*started)
        except asyncio.CancelledError:
            endings = after_interrupt(*started)
            self._hand_back(round_ if not started else ())
            if task := asyncio.current_task():
                task.uncancel()  # the next round is another matter
        for ending in endings:
            self._settle(ending)


class _Waiting(NamedTuple):
    """A call that is to be started, and since when."""

    call: Call
    since: float


def _flights(found: Iterable[_Waiting]) -> list[Flight]:
    return [flight for waiting in found for flight in waiting.call.flights]


class _Pace:
    """How many calls have ended within about the last second, so that as many were started."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._count = 0
        self._rate = 0

    def per_second(self, count: int) -> int:
        now = time.monotonic()
        elapsed, ended = now - self._since, count - self._count
        if elapsed < 1:
            return max(self._rate, ended)
        self._since, self._count, self._rate = now, count, int(ended / elapsed)
        return self._rate
