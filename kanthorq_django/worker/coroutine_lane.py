"""Where ``async def`` handlers run: side by side on one event loop, in a thread of its own."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from kanthorq_django.worker.call import Call, Round
from kanthorq_django.worker.database_errors import is_unavailable
from kanthorq_django.worker.endings import after_interrupt, after_timeout
from kanthorq_django.worker.executor import aexecute
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.lane import Lane
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.loop_watch import LoopWatch
from kanthorq_django.worker.own_connections import forget
from kanthorq_django.worker.scarcity import REFUSED_PAUSE, are_scarce, pool_size
from kanthorq_django.worker.suspicion import are_held, take_suspicion
from kanthorq_django.worker.upkeep import (
    leave_connections,
    note_failure,
    refresh_connections,
    spare_connections,
)

STUCK_AFTER = 2.0  # seconds that a call for the thread of the ORM may wait for others

R = TypeVar("R")


class CoroutineLane(Lane):
    """``async def`` handlers, concurrent on one event loop in a thread of its own."""

    def start(self) -> None:
        """Start the event loop."""
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refresh: asyncio.Task[bool] | None = None  # the one that has not begun yet
        self._queued_at: float | None = None  # when it was put in line for its thread
        self._is_said_to_be_stuck = False
        self._using = DEFAULT_DB_ALIAS
        self._current: dict[asyncio.Task[None], list[Flight]] = {}
        self._are_suspect = False  # the sessions of the thread that serves the ORM
        self._threads = [threading.Thread(target=self._serve, name="kanthorq-loop", daemon=True)]
        super().start()
        self._watch_over_loop = LoopWatch(self._threads[0], self._call_soon, lambda: self.is_idle)
        self._watch_over_loop.start()

    def submit(self, calls: list[Call]) -> None:
        super().submit(calls)
        self._call_soon(self._start_waiting)

    def surplus(self) -> list[Flight]:
        with self._lock:
            is_stuck, was_said = self._is_stuck, self._is_said_to_be_stuck
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
        with contextlib.suppress(RuntimeError):  # the interpreter is exiting, as under a reloader
            await sync_to_async(connections.close_all)()

    def _start_waiting(self) -> None:
        """Start what waits, as far as there is room, from within the loop."""
        while not self._is_stuck and (call := self._next_at_once()) is not None:
            self._spawn(call)

    def _spawn(self, call: Call) -> None:
        current: list[Flight] = []
        rounds = self._rounds(call)
        self._using = call.rounds[0][0].message.using
        task = self._keep(self._loop.create_task(self._handle(call, rounds, current)))
        self._current[task] = current
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

    def _over(self, task: asyncio.Task[None], rounds: Iterator[Round]) -> None:
        """Note the end of a call, also of one that somebody cancelled before it was through."""
        del self._current[task]
        for round_ in rounds:
            self._hand_back(round_)
        with self._lock:
            self._ended(1)
        self._start_waiting()
        if self.is_idle:
            self._line_up_refresh()  # or what the last ones left open stays so until others begin

    def _keep(self, task: asyncio.Task[R]) -> asyncio.Task[R]:
        """Hold ``task`` until it is done: the loop itself keeps only weak references."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _handle(self, call: Call, rounds: Iterator[Round], current: list[Flight]) -> None:
        for _ in call.rounds:
            if not await self._is_ready():
                return
            current[:] = next(rounds, ())  # others may have been given it meanwhile
            await self._execute(tuple(current))
            current.clear()

    async def _is_ready(self) -> bool:
        """Tell whether a round may begin; its attempt would be lost on what it cannot help.

        Where connections are scarce it waits until there is one. Else it does not, so that who
        needs none is not kept by those who do.
        """
        refresh = self._line_up_refresh()
        await asyncio.sleep(0)  # so it is the first in line; and others may have the round
        if self._is_stuck:
            return False
        if not are_scarce():
            return True
        await asyncio.wait({refresh}, timeout=STUCK_AFTER)
        if refresh.done() and not refresh.cancelled() and refresh.result():
            return True
        await asyncio.sleep(REFUSED_PAUSE)
        return False

    def _line_up_refresh(self) -> asyncio.Task[bool]:
        """Have connections refreshed before the next handlers use them.

        First in line for the one thread in which Django's ORM serves coroutines. One that has not
        begun yet will do for all who come meanwhile.
        """
        if (refresh := self._refresh) is None:
            refresh = self._refresh = self._keep(self._loop.create_task(self._queue_refresh()))
            refresh.add_done_callback(self._forget_refresh)
        return refresh

    def _forget_refresh(self, refresh: asyncio.Task[bool]) -> None:
        """Line up another one if this has never begun, as somebody cancelled it."""
        if self._refresh is refresh:
            self._refresh = self._queued_at = None

    async def _queue_refresh(self) -> bool:
        """Refresh connections; False if there is none to be had."""
        self._queued_at = time.monotonic()
        try:
            await sync_to_async(self._renew)()
        except (asyncio.CancelledError, RuntimeError):  # of the latter see _stay_open()
            return False
        except BaseException as error:  # of a receiver, as any other
            note_failure(error)
            if not is_unavailable(error):
                logger.exception("A connection could not be made ready for coroutines.")
            return False
        return True

    def _renew(self) -> None:
        self._begin_refresh()  # whoever comes from now on needs one of its own
        # Another coroutine may be between two reads of a cursor.
        if are_suspect := self._are_suspect and not are_held(self._bounded):
            self._are_suspect = False
        try:
            # First: it goes by how long they have rested.
            refresh_connections(self._bounded, using=self._using, are_suspect=are_suspect)
        finally:
            leave_connections()
            if self.is_idle:
                spare_connections()
        # Not the only one of a pool: nobody could write a verdict, or extend a lease, meanwhile.
        if are_scarce() and not self.is_idle and pool_size(connections[self._using]) > 1:
            self._connect(connections[self._using])

    def _connect(self, connection: BaseDatabaseWrapper) -> None:
        try:
            connection.ensure_connection()
        except BaseException:
            forget(connection)  # what a receiver began to set up is not to be used
            raise

    def _begin_refresh(self) -> None:
        was_stuck = self._is_stuck
        self._refresh = self._queued_at = None
        if was_stuck:
            self._go_on()

    @property
    def _is_stuck(self) -> bool:
        """Tell whether the thread that serves the ORM is kept for so long that none may start.

        Those that need it would only wait for it until their time is up, attempt after attempt.
        """
        queued_at = self._queued_at
        return queued_at is not None and time.monotonic() > queued_at + STUCK_AFTER

    def _room(self) -> int:
        return 0 if self._is_stuck else super()._room()

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
        self._are_suspect |= take_suspicion()
        self._accept(endings)


def _forgive_interrupts() -> None:
    """Let the current task be interrupted anew: its next round is another matter."""
    task = asyncio.current_task()
    while task and task.cancelling():
        task.uncancel()
