"""Where ``async def`` handlers run: side by side on one event loop, in a thread of its own."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from kanthorq_django.worker.connections.suspicion import take_suspicion
from kanthorq_django.worker.endings import after_interrupt, after_timeout
from kanthorq_django.worker.executor import aexecute
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.lanes.call import Call, Round
from kanthorq_django.worker.lanes.lane import Accept, Lane
from kanthorq_django.worker.lanes.loop_watch import LoopWatch
from kanthorq_django.worker.lanes.orm_thread import STUCK_AFTER, OrmThread
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.warden import Bounded


class CoroutineLane(Lane):
    """``async def`` handlers, concurrent on one event loop in a thread of its own."""

    def __init__(
        self, concurrency: int, accept: Accept, wake: Callable[[], None], bounded: Bounded
    ) -> None:
        super().__init__(concurrency, accept, wake)
        self._orm = OrmThread(bounded, lambda: self.is_idle, self._go_on)
        self._is_said_to_be_stuck = False
        self._closing = asyncio.Event()
        self._current: dict[asyncio.Task[None], list[Flight]] = {}  # what each task handles

    def start(self) -> None:
        """Start the event loop."""
        self._loop = asyncio.new_event_loop()
        self._threads = [threading.Thread(target=self._serve, name="kanthorq-loop", daemon=True)]
        super().start()
        self._watch_over_loop = LoopWatch(self._threads[0], self._call_soon, lambda: self.is_idle)
        self._watch_over_loop.start()

    def submit(self, calls: list[Call]) -> None:
        super().submit(calls)
        self._call_soon(self._start_waiting)

    def surplus(self) -> list[Flight]:
        with self._lock:
            is_stuck, was_said = self._orm.is_stuck, self._is_said_to_be_stuck
            self._is_said_to_be_stuck |= is_stuck
            unstarted = self._take_unstarted() if is_stuck else []
        if not is_stuck:
            return super().surplus()
        if not was_said:
            self._say_stuck()
        return unstarted

    def is_blocked_since(self, moment: float) -> bool:
        return self._watch_over_loop.silent_since <= moment

    def finish(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._watch_over_loop.stop()  # a loop that is closed gives it no answer
        self._call_soon(self._closing.set)
        super().finish(seconds)
        self._watch_over_loop.finish(max(0.0, deadline - time.monotonic()))

    def _call_soon(self, step: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(step)

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            while not self._closing.is_set():
                try:
                    runner.run(self._stay_open())
                except BaseException as error:
                    # asyncio lets SystemExit and KeyboardInterrupt through when a task raises them
                    # that a handler has started, and a handler may cancel all tasks that it finds.
                    logger.exception("%s ended the event loop; it goes on.", type(error).__name__)

    async def _stay_open(self) -> None:
        await self._closing.wait()
        await self._orm.close_connections()

    def _start_waiting(self) -> None:
        """Start what waits, as far as there is room, from within the loop."""
        while not self._orm.is_stuck and (call := self._next()) is not None:
            self._spawn(call)

    def _next(self) -> Call | None:
        """Count a call as running; None when nothing waits, or as many run as may."""
        with self._lock:
            if not self._waiting or self._running >= self.concurrency:
                return None
            self._running += 1
            return self._take()

    def _spawn(self, call: Call) -> None:
        current: list[Flight] = []
        rounds = self._rounds(call)
        self._orm.using = call.rounds[0][0].message.using
        task = self._loop.create_task(self._handle(call, rounds, current))
        self._current[task] = current  # the loop itself has only a weak reference to the task
        task.add_done_callback(lambda _: self._over(task, rounds))

        def cancel() -> None:
            # Once: what it cleans up must not be interrupted again. And not while it still
            # works for messages of the batch that nobody gave up.
            is_given_up = bool(current) and all(
                flight.stop.is_set() or flight.message.is_settled() for flight in current
            )
            if is_given_up and not task.cancelling():
                task.cancel()

        def interrupt() -> None:
            self._call_soon(cancel)

        for flight in call.flights:
            flight.interrupt = interrupt

    async def _handle(self, call: Call, rounds: Iterator[Round], current: list[Flight]) -> None:
        for _ in call.rounds:
            if not await self._orm.is_ready():
                return
            current[:] = next(rounds, ())  # others may have been given it meanwhile
            await self._execute(tuple(current))
            current.clear()

    async def _execute(self, round_: Round) -> None:
        if not (started := self._startable(round_)):
            return
        timeout = started[0].timeout
        try:
            async with asyncio.timeout(None if timeout is None else timeout.total_seconds()):
                endings = await aexecute(*started)
        except TimeoutError as error:
            endings = after_timeout(error.__cause__, *started)
        except asyncio.CancelledError as error:
            endings = after_interrupt(error, *started)
        _forgive_interrupts()
        self._orm.are_suspect |= take_suspicion()
        self._accept(endings)

    def _over(self, task: asyncio.Task[None], rounds: Iterator[Round]) -> None:
        """Note the end of a call, also of one that somebody cancelled before it was through."""
        del self._current[task]
        for round_ in rounds:
            self._hand_back(round_)
        with self._lock:
            self._ended(1)
        self._start_waiting()
        if self.is_idle:  # or what the last ones left open stays so until others begin
            self._orm.line_up_refresh()

    def _room(self) -> int:
        return 0 if self._orm.is_stuck else super()._room()

    def _say_stuck(self) -> None:
        flights = [flight for current in list(self._current.values()) for flight in current]
        flights.sort(key=lambda flight: flight.started_at or 0.0)
        names = dict.fromkeys(flight.subscription.consumer for flight in flights)
        logger.warning(
            "The thread in which coroutines use the ORM has been busy for %s s with one or more "
            "calls; none is started until it is free. Running, longest first: %s",
            STUCK_AFTER,
            ", ".join(names) or "none",
        )

    def _go_on(self) -> None:
        with self._lock:
            was_said, self._is_said_to_be_stuck = self._is_said_to_be_stuck, False
            if self._is_refusing:
                self._invite()
        if was_said:
            logger.warning("The thread in which coroutines use the ORM is free again.")
        self._call_soon(self._start_waiting)


def _forgive_interrupts() -> None:
    """Let the current task be interrupted anew: its next round is another matter."""
    task = asyncio.current_task()
    while task and task.cancelling():
        task.uncancel()
