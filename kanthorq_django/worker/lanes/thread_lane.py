"""Where plain handlers run: threads, as many as may run at a time."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from django.db import connections

from kanthorq_django.conf import get_settings
from kanthorq_django.worker import forks
from kanthorq_django.worker.connections.absences import AWAY_DELAY, OtherDatabaseAway
from kanthorq_django.worker.connections.database_errors import is_unavailable
from kanthorq_django.worker.connections.scarcity import REFUSED_PAUSE, are_scarce
from kanthorq_django.worker.connections.upkeep import (
    drop_connections,
    leave_connections,
    note_failure,
    refresh_connections,
    spare_connections,
)
from kanthorq_django.worker.endings import Ending, untold
from kanthorq_django.worker.executor import execute
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.group_commit import execute_together
from kanthorq_django.worker.lanes.call import Call, Round
from kanthorq_django.worker.lanes.crew import Crew
from kanthorq_django.worker.lanes.lane import Accept, Lane
from kanthorq_django.worker.log import logger
from kanthorq_django.worker.warden import Bounded

RELENT_EVERY = 2.0  # seconds
STALLED_AFTER = 0.005  # seconds in which handlers that get on would have started some


class ThreadLane(Lane):
    """Plain handlers, each thread with Django connections of its own."""

    def __init__(
        self,
        concurrency: int,
        accept: Accept,
        wake: Callable[[], None],
        bounded: Bounded,
        *,
        is_alone: bool,
    ) -> None:
        """``is_alone``: it is no other lane that keeps the interpreter of this process busy."""
        super().__init__(concurrency, accept, wake)
        self._bounded = bounded
        self._arrived = threading.Condition(self._lock)
        self._crew = Crew(concurrency)
        self._is_watched = False
        self._pause = threading.Event()
        self._group_size = get_settings().GROUP_COMMIT  # calls that may share a transaction
        if self._group_size > 1 and is_alone:
            self._crew.share()

    def start(self) -> None:
        self._depth = forks.depth
        self._threads = [
            threading.Thread(target=self._run, name=f"kanthorq-handler-{number}", daemon=True)
            for number in range(self.concurrency)
        ]
        super().start()

    def submit(self, calls: list[Call]) -> None:
        super().submit(calls)
        with self._lock:
            self._arrived.notify(min(self._crew.size, len(calls)))

    def drain(self) -> list[Flight]:
        unstarted = super().drain()
        with self._lock:
            self._arrived.notify_all()
        return unstarted

    def _run(self) -> None:
        is_open = True
        while is_open:
            try:
                is_open = self._work()
            except BaseException:
                # Such as one that somebody sets on this thread, for a handler that took too long.
                # No promise: it may come at any line, so also at one that ends the thread, or
                # within logging, whose lock it can leave taken.
                logger.exception("A handler's thread was to end; it goes on.")
        connections.close_all()

    def _work(self) -> bool:
        """Wait for a call and run it; False when the lane is closed."""
        if (call := self._next()) is None:
            return False
        began_at = time.monotonic()
        count = 1
        try:
            if (share := self._share(call)) > 1:
                count = self._handle_together(call, share)
            else:
                # Of a single one nothing is left to be taken back; nearly all are.
                for round_ in self._rounds(call) if len(call.rounds) > 1 else call.rounds:
                    self._handle(round_)
            spare_connections()
        finally:
            self._note_stretch(count, time.monotonic() - began_at)
        return True

    def _next(self) -> Call | None:
        """Wait for a call and count it as running; None when the lane is closed."""
        with self._lock:
            while not self._may_begin():
                if self._is_closed:
                    return None
                if self._waiting and not self._is_watched:
                    self._watch()
                elif not self._arrived.wait(RELENT_EVERY):
                    spare_connections()
            self._running += 1
            call = self._take()
            if self._crew.size < self.concurrency and not self._is_watched:
                self._arrived.notify()  # this one may block, and nobody would know for seconds
            return call

    def _may_begin(self) -> bool:
        return bool(self._waiting) and self._running < self._crew.size

    def _watch(self) -> None:
        """Leave what waits to the threads that run for as long as they get on with it.

        More would only wait for the interpreter's lock, and have the puller wait for it too.
        """
        self._is_watched = True
        count = self.started_count
        try:
            # What arrives meanwhile begins no new term: it may arrive all the time.
            is_over = self._arrived.wait_for(self._ends_watch, STALLED_AFTER)
            if not is_over and count == self.started_count:
                self._crew.forget()
                self._arrived.notify(len(self._waiting))
        finally:
            self._is_watched = False

    def _ends_watch(self) -> bool:
        return self._is_closed or not self._waiting or self._may_begin()

    def _share(self, call: Call) -> int:
        """Return how many calls may be handled in one transaction that begins with ``call``.

        A fair share of the backlog: what idle threads can start is not kept from them.
        """
        if self._group_size == 1 or not call.may_share:
            return 1
        with self._lock:
            return min(self._group_size, len(self._waiting) // self._crew.size)

    def _handle_together(self, call: Call, share: int) -> int:
        """Run a call and others in one transaction; return how many calls they were."""
        (first,) = call.flights
        joined: list[Flight] = []
        try:
            if not self._ready((first,)):
                return 1
            endings, spoiled = execute_together(first, self._joining(call, share - 1, joined))
            self._conclude(endings)
        except BaseException as error:  # noqa: BLE001  # as in _handle()
            self._untold([first, *joined], error)
        else:
            for flight in spoiled:
                self._handle((flight,))
        return 1 + len(joined)

    def _joining(self, call: Call, count: int, joined: list[Flight]) -> Iterator[Flight]:
        """Take up to ``count`` more calls into the transaction of ``call``, each when it begins.

        All that are taken are noted in ``joined``, also those that may not begin any more.
        """
        for _ in range(count):
            with self._lock:
                if not (self._waiting and self._waiting[0].call.may_join(call)):
                    return
                joined += self._take().flights
            yield from self._startable((joined[-1],))

    def _handle(self, round_: Round) -> None:
        try:
            if started := self._ready(round_):
                self._conclude(execute(*started))
        except BaseException as error:  # noqa: BLE001  # its lease would be renewed for ever
            self._untold(round_, error)

    def _ready(self, round_: Round) -> Round:
        """Note the start of a round, on connections that are fit for it; return what may run."""
        if started := self._startable(round_):
            try:
                using, subscription = started[0].message.using, started[0].subscription
                refresh_connections(self._bounded, borrower=subscription.consumer, using=using)
                # Its transaction begins with a connection, and the attempt would be lost without.
                if subscription.atomic or are_scarce():
                    connections[using].ensure_connection()
            except OtherDatabaseAway:
                self._put_off(started)
                return ()
            except BaseException as error:  # noqa: BLE001  # of a receiver, as any other
                self._refused(error)
                self._hand_back(started)
                return ()
        return started

    def _put_off(self, started: Round) -> None:
        """Hand back what has to wait for another database than its own; others go on."""
        if started[0].subscription.serialize != "strict":
            self._hand_back(started, AWAY_DELAY)
            return
        self._pause.wait(REFUSED_PAUSE)
        self._hand_back(started)  # a delay would have later ones of its key pass it

    def _refused(self, error: BaseException) -> None:
        """Wait a little after ``error``; the thread has to outlive also what receivers raise."""
        note_failure(error)
        if not is_unavailable(error):
            logger.error("A connection could not be made ready for a handler.", exc_info=error)
            drop_connections()  # what a receiver began to set up is not to be used
        self._pause.wait(REFUSED_PAUSE)

    def _conclude(self, endings: list[Ending]) -> None:
        forks.leave_as_child_of(self._depth)  # one that a hook forked, or a receiver of a signal
        leave_connections()
        self._accept(endings)

    def _untold(self, flights: Iterable[Flight], error: BaseException) -> None:
        self._accept([untold(flight, error) for flight in flights])  # fenced, if it was settled

    def _note_stretch(self, count: int, seconds: float) -> None:
        """Note the end of ``count`` calls that were run at a stretch, and settled, in that time."""
        with self._lock:
            self._ended(count)
            if self._crew.note(seconds / count, more_waits=bool(self._waiting)):
                self._arrived.notify(len(self._waiting))
