"""Where ``async def`` handlers run: side by side on one event loop, in a thread of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

from asgiref.sync import sync_to_async
from django.db import connections

from kanthorq_django.worker.call import Call, Round
from kanthorq_django.worker.database_errors import UNAVAILABLE
from kanthorq_django.worker.endings import after_interrupt, after_timeout
from kanthorq_django.worker.executor import aexecute
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.lane import Lane
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.loop_watch import LoopWatch
from kanthorq_django.worker.suspicion import are_held, take_suspicion
from kanthorq_django.worker.upkeep import leave_connections, refresh_connections, spare_connections


class CoroutineLane(Lane):
    """``async def`` handlers, concurrent on one event loop in a thread of its own."""

    def start(self) -> None:
        """Start the event loop."""
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_refresh_due = False
        self._are_suspect = False  # the sessions of the thread that serves the ORM
        self._threads = [threading.Thread(target=self._serve, name="kanthorq-loop", daemon=True)]
        super().start()
        self._watch_over_loop = LoopWatch(self._threads[0], self._call_soon, lambda: self.is_idle)
        self._watch_over_loop.start()

    def submit(self, calls: list[Call]) -> None:
        super().submit(calls)
        self._call_soon(self._start_waiting)

    def finish(self, seconds: float) -> None:
        self._watch_over_loop.finish()
        self._call_soon(self._closing.set)
        super().finish(seconds)

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
        while (call := self._next_at_once()) is not None:
            self._spawn(call)

    def _spawn(self, call: Call) -> None:
        current: list[Flight] = []
        rounds = self._rounds(call)
        task = self._keep(self._loop.create_task(self._handle(rounds, current)))
        task.add_done_callback(lambda _: self._over(rounds))

        def cancel() -> None:
            # Once: what it cleans up must not be interrupted again. And not while it still
            # works for messages of the batch that nobody gave up.
            is_given_up = bool(current) and all(
                flight.stop.is_set() or flight.message.is_settled() for flight in current
            )
            if is_given_up and not task.cancelling():
                task.cancel()

        for flight in call.flights:
            flight.interrupt = lambda: self._call_soon(cancel)

    def _over(self, rounds: Iterator[Round]) -> None:
        """Note the end of a call, also of one that somebody cancelled before it was through."""
        for round_ in rounds:
            self._hand_back(round_)
        self._ended()
        self._start_waiting()
        if self.is_idle:
            self._line_up_refresh()  # or what the last ones left open stays so until others begin

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """Hold ``task`` until it is done: the loop itself keeps only weak references."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _handle(self, rounds: Iterator[Round], current: list[Flight]) -> None:
        self._line_up_refresh()
        await asyncio.sleep(0)
        for round_ in rounds:
            current[:] = round_
            await self._execute(round_)
            current.clear()
            await asyncio.sleep(0)  # a round that others could have is not kept from them

    def _line_up_refresh(self) -> None:
        """Have connections refreshed before the next handlers use them.

        First in line for the one thread in which Django's ORM serves coroutines; not awaited, so
        that a handler which needs no database does not wait for those that do. One that has not
        begun yet will do for all who come meanwhile.
        """
        if self._is_refresh_due:
            return
        self._is_refresh_due = True
        self._keep(self._loop.create_task(self._refresh())).add_done_callback(self._refreshed)

    def _refreshed(self, _: object = None) -> None:
        self._is_refresh_due = False

    async def _refresh(self) -> None:
        # A handler that needs one will find out, and of RuntimeError see _stay_open().
        with contextlib.suppress(*UNAVAILABLE, RuntimeError):
            await sync_to_async(self._renew)()

    def _renew(self) -> None:
        self._refreshed()  # whoever comes from now on needs one of its own
        # Another coroutine may be between two reads of a cursor.
        if are_suspect := self._are_suspect and not are_held(self._bounded):
            self._are_suspect = False
        try:
            # First: it goes by how long they have rested.
            refresh_connections(self._bounded, are_suspect=are_suspect)
        finally:
            leave_connections()
            if self.is_idle:
                spare_connections()

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
        self._settle(endings)


def _forgive_interrupts() -> None:
    """Let the current task be interrupted anew: its next round is another matter."""
    task = asyncio.current_task()
    while task and task.cancelling():
        task.uncancel()
