"""What waits to be started, how much more there is room for, and what is given back.

A lane holds no more than it starts within about a second, so that idle peers never starve
behind a hoarder, and asks for no more while the bodies that wait would fill an answer. How its
calls are run is in thread_lane.py and coroutine_lane.py.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple

from kanthorq_django.models.delivery.lease import AT_ONCE
from kanthorq_django.models.delivery.leased import BODIES_SIZE_MAX
from kanthorq_django.worker.endings import Ending, HandBack
from kanthorq_django.worker.flight import Flight
from kanthorq_django.worker.forks import end_forked_executors
from kanthorq_django.worker.lanes.call import Call, Round
from kanthorq_django.worker.lanes.throughput import Throughput

WAIT_LONGEST = 2.0  # seconds that a leased task may wait to be started

Accept = Callable[[Sequence[Ending]], None]


class Lane:
    """A bounded number of running handlers, and the flights that wait for one of them to end.

    Its kinds hold ``_lock`` where they ``_take()`` a call and note that it has ``_ended()``.
    """

    def __init__(self, concurrency: int, accept: Accept, wake: Callable[[], None]) -> None:
        self.concurrency = concurrency
        self._accept = accept
        self._wake = wake
        self._lock = threading.Lock()  # its conditions take longer to enter, in Python
        self._emptied = threading.Condition(self._lock)
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0  # of their bodies
        self._remainders: set[_Remainder] = set()
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._throughput = Throughput()
        self._is_refusing = False
        self._is_closed = False
        self._ended_count = 0  # calls
        self.started_count = 0  # tasks

    @property
    def accepted_count(self) -> int:
        """How many tasks have been started, or are still to be."""
        with self._lock:
            return self.started_count + sum(waiting.size for waiting in self._waiting)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._lock:
            return not self._waiting and not self._running

    @property
    def is_full(self) -> bool:
        """Whether as many run as may."""
        return self._running >= self.concurrency

    @property
    def is_alive(self) -> bool:
        """Whether any of the threads has not ended."""
        return any(thread.is_alive() for thread in self._threads)

    def is_blocked_since(self, moment: float) -> bool:
        """Tell whether one handler has kept all others from running, or beginning, since then."""
        return False

    def start(self) -> None:
        """Start the threads: daemons, for a handler that hangs must not keep the process alive."""
        end_forked_executors()
        for thread in self._threads:
            thread.start()

    def finish(self, seconds: float) -> None:
        """Wait for the threads to end, after ``drain()`` and the last handler."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def room(self) -> int:
        """Return how many more calls are wanted now; who gets 0 is woken when there is room."""
        with self._lock:
            room = self._room()
            self._is_refusing = room == 0
            return room

    def submit(self, calls: list[Call]) -> None:
        """Queue calls, which were leased together, to be started in order."""
        body_size = calls[0].rounds[0][0].leased.body_size
        with self._lock:
            now = time.monotonic()
            arrived = [_Waiting(call, now, call.size, body_size) for call in calls]
            self._waiting.extend(arrived)
            self._waiting_bytes += body_size * sum([waiting.size for waiting in arrived])

    def surplus(self) -> list[Flight]:
        """Take back what waits for so long that others had better have it: handlers became slow."""
        found = []
        with self._lock:
            latest = time.monotonic() - WAIT_LONGEST
            while self._waiting and self._waiting[0].since < latest:
                found.append(self._pop())
            late = [each for each in self._remainders if each.is_untouched_since(latest)]
            return _flights(found) + self._take_back(late)

    def drain(self) -> list[Flight]:
        """Start nothing any more; return what was not started."""
        with self._lock:
            self._is_closed = True
            return self._take_unstarted()

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait for running handlers to end; False when ``seconds`` were not enough."""
        with self._lock:
            return self._emptied.wait_for(lambda: not self._running, seconds)

    def _room(self) -> int:
        target = self.concurrency + self._throughput.per_second(self._ended_count)
        if len(self._waiting) > target // 2:
            return 0  # refilling only when half has gone keeps the batches large
        if self._waiting_bytes >= BODIES_SIZE_MAX:
            return 0
        return max(0, target - self._running - len(self._waiting))

    def _pop(self) -> "_Waiting":
        waiting = self._waiting.popleft()
        self._waiting_bytes -= waiting.body_size * waiting.size
        return waiting

    def _take_unstarted(self) -> list[Flight]:
        """Take back all that has not begun."""
        unstarted = _flights(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        return unstarted + self._take_back(self._remainders)

    def _take_back(self, remainders: Iterable["_Remainder"]) -> list[Flight]:
        """Take the rounds that have not begun away from calls that run."""
        found: list[Flight] = []
        for each in remainders:
            found += itertools.chain.from_iterable(each.left)
            each.left.clear()
        self.started_count -= len(found)
        return found

    def _take(self) -> Call:
        waiting = self._pop()
        self.started_count += waiting.size
        if self._is_refusing:
            self._invite()
        return waiting.call

    def _rounds(self, call: Call) -> Iterator[Round]:
        """Note that a call runs; return its rounds as they begin, if they are not taken back."""
        remainder = _Remainder(deque(call.rounds))
        with self._lock:
            self._remainders.add(remainder)
        return self._left_of(remainder)

    def _left_of(self, remainder: "_Remainder") -> Iterator[Round]:
        while True:
            with self._lock:
                if not remainder.left:
                    self._remainders.discard(remainder)
                    return
                remainder.is_touched = True
                round_ = remainder.left.popleft()
            yield round_

    def _startable(self, round_: Round) -> Round:
        """Note the start of those whose lease surely stands, and hand the others back.

        A closed lane starts no further round of a call that runs.
        """
        started = () if self._is_closed else tuple(flight for flight in round_ if flight.start())
        if len(started) < len(round_):
            known = set(map(id, started))
            self._hand_back(flight for flight in round_ if id(flight) not in known)
        return started

    def _hand_back(self, flights: Iterable[Flight], delay: timedelta = AT_ONCE) -> None:
        """Take back the count of tasks whose handler must not run; others may run it."""
        for flight in flights:
            with self._lock:
                self.started_count -= 1
            self._accept([HandBack(flight.message, delay)])

    def _ended(self, count: int) -> None:
        """Note the end of ``count`` calls that took one place between them."""
        self._running -= 1
        self._ended_count += count
        if not self._running:
            self._emptied.notify_all()
        if self._is_refusing:
            self._invite()

    def _invite(self) -> None:
        if self._room():
            self._is_refusing = False
            self._wake()


class _Waiting(NamedTuple):
    """A call that is to be started, and since when."""

    call: Call
    since: float
    size: int  # messages
    body_size: int  # bytes, on average


class _Remainder:
    """A call that runs, and its rounds that have not begun."""

    def __init__(self, rounds: deque[Round]) -> None:
        self.left = rounds
        self.is_touched = False
        self._since = time.monotonic()

    def is_untouched_since(self, moment: float) -> bool:
        """Tell whether not even its first round has begun, as where an event loop is blocked."""
        return not self.is_touched and self._since < moment


def _flights(found: Iterable[_Waiting]) -> list[Flight]:
    return [flight for waiting in found for flight in waiting.call.flights]
